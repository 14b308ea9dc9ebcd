//! The page for people, as the host serves it; `scripts/page` drives it in a browser.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use reqwest::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, HOST, IF_NONE_MATCH, ORIGIN};
use serde_json::Value;
use shared::api::{DISCLAIMER, MAP_NOTE};

use crate::support::keyed::Keyed;
use crate::support::{Running, root};

/// Read by the host and by Terraform, and served by neither.
const HEADERS: &str = "headers.json";

fn web(name: &str) -> String {
    std::fs::read_to_string(root().join("web").join(name)).unwrap()
}

fn names() -> Vec<String> {
    let files = std::fs::read_dir(root().join("web")).unwrap();
    let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != HEADERS).collect()
}

fn path(name: &str) -> String {
    if name == "index.html" { "/".to_owned() } else { format!("/{name}") }
}

fn words(language: &str) -> BTreeMap<String, String> {
    serde_json::from_str(&web(&format!("{language}.json"))).unwrap()
}

/// What the page is written in.
fn scripts() -> String {
    let scripts = names().into_iter().filter(|name| name.ends_with(".js") || name.ends_with(".html"));
    scripts.map(|name| web(&name)).collect()
}

#[tokio::test]
async fn every_file_of_the_page_is_served_with_its_type_and_the_headers_of_the_page() {
    let host = Running::start(&[]).await;
    let headers: BTreeMap<String, String> = serde_json::from_str(&web(HEADERS)).unwrap();
    assert!(headers["content-security-policy"].starts_with("default-src 'none'; "));
    assert!(!headers["content-security-policy"].contains("unsafe"));
    for name in names() {
        let url = format!("{}{}", host.url, path(&name));
        let answer = host.http.get(&url).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{name}");
        let content_type = match PathBuf::from(&name).extension().unwrap().to_str().unwrap() {
            "html" => "text/html; charset=utf-8",
            "css" => "text/css; charset=utf-8",
            "js" => "text/javascript; charset=utf-8",
            "json" => "application/json",
            "svg" => "image/svg+xml",
            other => panic!("{other}"),
        };
        assert_eq!(answer.headers()[CONTENT_TYPE], content_type, "{name}");
        assert_eq!(answer.headers()[CACHE_CONTROL], "no-cache", "{name}");
        for (header, value) in &headers {
            assert_eq!(answer.headers()[header], value, "{name}");
        }
        // Asked again, it is not sent again.
        let tag = answer.headers()[ETAG].clone();
        let again = host.http.get(&url).header(IF_NONE_MATCH, &tag).send().await.unwrap();
        assert_eq!((again.status().as_u16(), &again.headers()[ETAG]), (304, &tag), "{name}");
        assert_eq!(again.bytes().await.unwrap().len(), 0);
        if name != "config.json" {
            assert_eq!(answer.text().await.unwrap(), web(&name), "{name}");
        }
    }
}

#[tokio::test]
async fn what_is_no_file_of_the_page_is_answered_as_before() {
    let host = Running::start(&[]).await;
    for path in ["/index.html", "/headers.json", "/app.mjs", "/web/app.js", "/%2e%2e/Cargo.toml", "/favicon.ico"] {
        let answer = host.http.get(format!("{}{path}", host.url)).send().await.unwrap();
        assert_eq!(answer.status(), 404, "{path}");
        let body: Value = answer.json().await.unwrap();
        assert_eq!(body["error"]["code"], "not_found", "{path}");
    }
    let answer = host.http.post(format!("{}/", host.url)).send().await.unwrap();
    assert_eq!(answer.status(), 405);
}

#[tokio::test]
async fn the_page_is_open_where_there_are_keys_and_keyless_for_this_machine_alone() {
    let keyed = Keyed::start(&[]).await;
    for path in ["/", "/app.js", "/config.json"] {
        let answer = keyed.host.http.get(format!("{}{path}", keyed.host.url)).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
    }
    let host = Running::start(&[]).await;
    for (header, value) in [(HOST, "attacker.example"), (ORIGIN, "https://attacker.example")] {
        let answer = host.http.get(format!("{}/", host.url)).header(header, value).send().await.unwrap();
        assert_eq!(answer.status(), 403, "{value}");
    }
}

#[tokio::test]
async fn the_page_warns_by_the_limits_of_the_model_that_is_loaded() {
    let host = Running::start(&[]).await;
    let config: Value = host.http.get(format!("{}/config.json", host.url)).send().await.unwrap().json().await.unwrap();
    let manifest: Value = serde_json::from_slice(&std::fs::read(root().join("model/manifest.json")).unwrap()).unwrap();
    let quality = manifest["quality"].as_object().unwrap();
    for (name, limit) in quality {
        let served = config["quality"][name].as_f64().unwrap();
        assert!((served - limit.as_f64().unwrap()).abs() < 1e-6, "{name}");
    }
    assert_eq!((config["quality"].as_object().unwrap().len(), &config["api"]), (quality.len(), &"".into()));
    // For a static host, the shipped model's.
    let on_disk: Value = serde_json::from_str(&web("config.json")).unwrap();
    assert_eq!(on_disk["quality"], manifest["quality"]);
}

#[test]
fn both_languages_have_the_same_texts_with_the_same_places_to_fill() {
    let (english, german) = (words("en"), words("de"));
    assert_eq!(english.keys().collect::<Vec<_>>(), german.keys().collect::<Vec<_>>());
    let places = |text: &str| text.split('{').skip(1).map(|rest| rest.split('}').next().unwrap().to_owned()).collect();
    for (key, text) in &english {
        let (ours, theirs): (BTreeSet<String>, BTreeSet<String>) = (places(text), places(&german[key]));
        assert_eq!(ours, theirs, "{key}");
        // Only what an English page need not say is empty.
        assert_eq!(text.is_empty(), key == "result.english", "{key}");
        assert!(!german[key].is_empty(), "{key}");
    }
    // What the host says is recognised by these, word for word.
    assert_eq!((english["disclaimer"].as_str(), english["map.note"].as_str()), (DISCLAIMER, MAP_NOTE));
}

#[test]
fn every_text_is_used_and_every_text_that_is_used_is_there() {
    let (scripts, texts) = (scripts(), words("en"));
    // A key stands in quotes, as an attribute or as an argument; the rest of some is what the API says.
    let quoted: BTreeSet<&str> = scripts.split(['"', '`']).collect();
    let prefixes: Vec<&str> =
        quoted.iter().filter_map(|text| text.strip_suffix('}')?.split_once("${")).map(|(prefix, _)| prefix).collect();
    for key in texts.keys() {
        let is_made = prefixes.iter().any(|prefix| prefix.ends_with('.') && key.starts_with(prefix));
        assert!(quoted.contains(key.as_str()) || is_made, "{key} is not used");
    }
    let groups: BTreeSet<&str> = texts.keys().filter_map(|key| key.split_once('.')).map(|(group, _)| group).collect();
    let is_key = |text: &str| {
        let plain = text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'.' || byte == b'_');
        plain && text.split_once('.').is_some_and(|(group, rest)| groups.contains(group) && !rest.is_empty())
    };
    for text in &quoted {
        assert!(!is_key(text) || texts.contains_key(*text), "{text} is missing");
    }
    for attribute in ["data-text=\"", "data-label=\"", "data-alt=\""] {
        for key in scripts.split(attribute).skip(1).map(|rest| rest.split('"').next().unwrap()) {
            assert!(texts.contains_key(key), "{key} is missing");
        }
    }
}

#[test]
fn everything_that_the_api_can_say_of_a_job_has_a_text() {
    let texts = words("en");
    let openapi = serde_json::to_value(local::openapi()).unwrap();
    for (schema, prefix) in
        [("Status", "status"), ("RetakeReason", "reason"), ("AbstainReason", "abstained"), ("FailureCode", "failure")]
    {
        for name in openapi["components"]["schemas"][schema]["enum"].as_array().unwrap() {
            let key = format!("{prefix}.{}", name.as_str().unwrap());
            assert!(texts.contains_key(&key), "{key}");
        }
    }
    let manifest: Value = serde_json::from_slice(&std::fs::read(root().join("model/manifest.json")).unwrap()).unwrap();
    for label in manifest["labels"].as_array().unwrap() {
        let name = label["name"].as_str().unwrap();
        assert_eq!(texts.get(&format!("class.{name}")).map(String::as_str), Some(name));
    }
}

/// Of what a strict policy forbids nothing is written: it would be ignored, and only a browser would say so.
#[test]
fn the_page_has_no_inline_script_no_inline_style_and_names_no_other_host() {
    let page = web("index.html");
    for part in [" style=", " onclick=", "<style", "javascript:"] {
        assert!(!page.contains(part), "{part}");
    }
    assert_eq!(page.matches("<script").count(), page.matches("<script type=\"module\" src=").count());
    for name in names() {
        let text = web(&name).replace("http://www.w3.org/2000/svg", "");
        assert!(!text.contains("http://") && !text.contains("https://") && !text.contains("innerHTML"), "{name}");
    }
}
