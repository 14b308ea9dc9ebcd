//! Who is let in: API keys, guests, limits, and what a host without keys asks instead.

use std::path::Path;
use std::process::Output;

use chrono::{TimeDelta, Utc};
use local::{Config, Host};
use reqwest::{Method, Response};
use serde_json::{Value, json};
use shared::clock::Clock;
use shared::config::Env;
use tokio::process::Command;

use crate::support::keyed::{Keyed, init};
use crate::support::process::{Process, binary};
use crate::support::{Running, client, mole, ort_library, root, settings};

async fn id_of(response: Response) -> String {
    assert_eq!(response.status().as_u16(), 202);
    response.json::<Value>().await.unwrap()["request_id"].as_str().unwrap().to_owned()
}

async fn code_of(response: Response) -> String {
    response.json::<Value>().await.unwrap()["error"]["code"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn without_keys_no_route_answers_a_name_that_is_not_loopback() {
    let host = Running::start(&[]).await;
    for path in ["/healthz", "/openapi.json", "/results", "/admin/keys", "/admin/dead-letters", "/nothing"] {
        let rebound = host.http.get(format!("{}{path}", host.url)).header("host", "rebound.example").send().await;
        assert_eq!(rebound.unwrap().status().as_u16(), 403, "{path}");
        let foreign = host.http.get(format!("{}{path}", host.url)).header("origin", "https://elsewhere.example");
        assert_eq!(foreign.send().await.unwrap().status().as_u16(), 403, "{path}");
    }
    let id = host.submit(&mole()).await;
    let writes = [
        (Method::POST, "/submit".to_owned()),
        (Method::POST, "/uploads".to_owned()),
        (Method::PUT, "/uploads/incoming/local/x".to_owned()),
        (Method::DELETE, format!("/result/{id}")),
        (Method::POST, "/chat".to_owned()),
        (Method::POST, "/v1/chat/completions".to_owned()),
        (Method::POST, "/socket-tickets".to_owned()),
        (Method::POST, "/admin/keys".to_owned()),
        (Method::DELETE, "/admin/keys/x".to_owned()),
        (Method::POST, "/admin/dead-letters/redrive".to_owned()),
        (Method::POST, format!("/admin/jobs/{id}/redrive")),
    ];
    for (method, path) in writes {
        for (name, value) in [("host", "rebound.example"), ("origin", "https://elsewhere.example")] {
            let request = host.http.request(method.clone(), format!("{}{path}", host.url)).header(name, value);
            let answer = request.json(&json!({"caller": "x"})).send().await.unwrap();
            assert_eq!(answer.status().as_u16(), 403, "{method} {path} with {name}");
        }
    }
    assert_eq!(host.ended(&id).await["status"], "completed", "nobody has deleted it");
    let keys: Value = host.get("/admin/keys").await.json().await.unwrap();
    assert_eq!(keys, json!({"keys": []}));
}

async fn local_init(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary("local"));
    command.env_clear().env("DATA_DIR", folder).arg("init").args(arguments).output().await.unwrap()
}

#[tokio::test]
async fn init_makes_the_first_key_and_another_only_on_demand() {
    let folder = tempfile::tempdir().unwrap();
    let first = local_init(folder.path(), &[]).await;
    let key = String::from_utf8(first.stdout).unwrap();
    assert!(first.status.success());
    assert!(key.starts_with("lesion_") && key.lines().count() == 1, "the key alone, for scripts");
    let taught = String::from_utf8(first.stderr).unwrap();
    assert!(taught.contains("LESION_API_KEY") && !taught.contains(key.trim()), "{taught}");

    let again = local_init(folder.path(), &[]).await;
    let complaint = String::from_utf8(again.stderr).unwrap();
    assert_eq!((again.status.code(), again.stdout.len()), (Some(1), 0), "{complaint}");
    assert!(complaint.contains("--another"), "{complaint}");
    let another = local_init(folder.path(), &["--another"]).await;
    assert!(another.status.success() && String::from_utf8(another.stdout).unwrap() != key);

    let host = Keyed::on(folder, key.trim().to_owned(), &[]).await;
    let beside = local_init(host.host.folder.path(), &["--another"]).await;
    assert!(!beside.status.success());
    assert!(String::from_utf8(beside.stderr).unwrap().contains("another host is running"));
    let keys: Value = host.get("/admin/keys", &host.admin).await.json().await.unwrap();
    assert_eq!(keys["keys"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn only_a_host_with_keys_listens_beyond_this_machine() {
    let folder = tempfile::tempdir().unwrap();
    let opened = async |extra: &[(&str, &str)]| {
        let (library, model) = (ort_library(), root().join("model"));
        let data = folder.path().to_str().unwrap();
        let mut variables = settings(data, library.to_str().unwrap(), model.to_str().unwrap());
        variables.extend_from_slice(extra);
        let env = Env::of(variables);
        Host::open(Config::from_env(&env).unwrap(), &env, Clock::System).await.map(|_| ())
    };
    let everywhere = [("LISTEN_ADDR", "0.0.0.0:0")];
    let complaint = opened(&everywhere).await.unwrap_err().to_string();
    assert!(complaint.starts_with("LISTEN_ADDR") && complaint.contains("local init"), "{complaint}");
    assert!(opened(&[("ADMIT_GUESTS", "true")]).await.unwrap_err().to_string().starts_with("ADMIT_GUESTS"));
    let issuer = [("JWT_ISSUER", "https://issuer.example"), ("JWT_AUDIENCE", "app")];
    opened(&[everywhere.as_slice(), &issuer].concat()).await.unwrap();
    init(folder.path(), false).await.unwrap();
    opened(&[everywhere.as_slice(), &[("ADMIT_GUESTS", "true")]].concat()).await.unwrap();
}

#[tokio::test]
async fn with_keys_every_route_demands_them_but_for_health_and_the_description() {
    let host = Keyed::start(&[]).await;
    let description: Value = host.get("/openapi.json", "").await.json().await.unwrap();
    let mut open = Vec::new();
    for (path, methods) in description["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let method: Method = method.to_uppercase().parse().unwrap();
            let filled = path.replace("{request_id}", "00000000-0000-7000-8000-000000000000").replace("{id}", "0");
            let response = host.request(method.clone(), &filled, "").send().await.unwrap();
            if response.status().as_u16() == 200 {
                open.push(format!("{method} {path}"));
                continue;
            }
            assert_eq!(response.status().as_u16(), 401, "{method} {path}");
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
            assert_eq!(code_of(response).await, "unauthorized");
        }
    }
    assert_eq!(open, ["GET /healthz"]);
    // With keys the name by which the host is called does not matter.
    let named =
        host.request(Method::GET, "/results", &host.admin).header("host", "lesion.example").send().await.unwrap();
    assert_eq!(named.status().as_u16(), 200);
}

#[tokio::test]
async fn wrong_credentials_are_refused_and_change_nothing() {
    let host = Keyed::start(&[("ADMIT_GUESTS", "true")]).await;
    let key = host.admin.clone();
    let flipped = format!("{}{}", &key[..key.len() - 1], if key.ends_with('0') { '1' } else { '0' });
    let other_id = format!("lesion_{}_{}", "0".repeat(12), key.rsplit('_').next().unwrap());
    let unsigned = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.";
    let headers = [
        format!("Bearer {flipped}"),
        format!("Bearer {other_id}"),
        format!("Bearer {}", &key[..key.len() - 1]),
        format!("Bearer {key}0"),
        format!("Bearer {}", key.to_uppercase()),
        format!("Bearer {key} {key}"),
        format!("Bearer lesion_' OR 1=1 --_{}", "0".repeat(64)),
        format!("Bearer {unsigned}"),
        format!("Bearer {}", "x".repeat(9000)),
        format!("Bearer lesion_{}", "_".repeat(8000)),
        format!("Basic {key}"),
        key.clone(),
        "Bearer".to_owned(),
        "Bearer ".to_owned(),
        String::new(),
    ];
    for header in headers {
        let request = host.request(Method::POST, "/submit", "").header("authorization", &header);
        let response = request.header("content-type", "image/png").body(mole()).send().await.unwrap();
        // Also where guests are admitted: who sends credentials does not want to be one.
        assert_eq!(response.status().as_u16(), 401, "{header}");
        assert_eq!(response.headers()["www-authenticate"], "Bearer", "{header}");
        let body = response.text().await.unwrap();
        assert!(!body.contains(&key[20..40]), "{body}");
    }
    let twice = host.request(Method::GET, "/results", &key).header("authorization", format!("Bearer {key}"));
    assert_eq!(twice.send().await.unwrap().status().as_u16(), 401);
    let bytes = reqwest::header::HeaderValue::from_bytes(b"Bearer \xff\xfe").unwrap();
    let odd = host.request(Method::GET, "/results", "").header("authorization", bytes).send().await.unwrap();
    assert_eq!(odd.status().as_u16(), 401);
    assert_eq!(std::fs::read_dir(host.host.folder.path().join("blobs/jobs")).map_or(0, Iterator::count), 0);
    assert_eq!(host.get("/results", &key).await.status().as_u16(), 200);
}

#[tokio::test]
async fn a_key_does_what_its_scopes_say_and_no_more() {
    let host = Keyed::start(&[]).await;
    let jobs = host.key_of("ward").await;
    let made = host.make(json!({"caller": "office", "scopes": ["admin", "admin"]})).await;
    assert_eq!(made["scopes"], json!(["admin"]));
    let admin = made["key"].as_str().unwrap();
    for (method, path) in [
        (Method::GET, "/admin/keys"),
        (Method::POST, "/admin/keys"),
        (Method::DELETE, "/admin/keys/0"),
        (Method::GET, "/admin/dead-letters"),
        (Method::POST, "/admin/dead-letters/redrive"),
        (Method::POST, "/admin/jobs/00000000-0000-7000-8000-000000000000/redrive"),
    ] {
        let response = host.request(method.clone(), path, &jobs).json(&json!({"caller": "x"})).send().await.unwrap();
        assert_eq!(response.status().as_u16(), 403, "{method} {path}");
        assert_eq!(code_of(response).await, "forbidden");
    }
    let keys: Value = host.get("/admin/keys", admin).await.json().await.unwrap();
    assert_eq!(keys["keys"].as_array().unwrap().len(), 3, "the key of jobs made none");
    let refused = host.submit(admin).await;
    assert_eq!(refused.status().as_u16(), 403);
    assert!(refused.text().await.unwrap().contains("\\\"jobs\\\""));
    assert_eq!(host.status(Method::GET, "/results", admin).await, 403);
    assert_eq!(host.submit(&jobs).await.status().as_u16(), 202);
}

#[tokio::test]
async fn a_job_is_its_callers_whichever_of_their_keys_asks() {
    let host = Keyed::start(&[]).await;
    let (old, new, other) = (host.key_of("ward").await, host.key_of("ward").await, host.key_of("ward2").await);
    let id = id_of(host.submit(&old).await).await;
    let path = format!("/result/{id}");
    for stranger in [&other, &host.admin] {
        assert_eq!(host.status(Method::GET, &path, stranger).await, 404);
        assert_eq!(host.status(Method::GET, &format!("/result?request_id={id}"), stranger).await, 404);
        assert_eq!(host.status(Method::DELETE, &path, stranger).await, 404);
        let list: Value = host.get("/results", stranger).await.json().await.unwrap();
        assert_eq!(list["results"], json!([]));
    }
    let list: Value = host.get("/results", &new).await.json().await.unwrap();
    assert_eq!(list["results"][0]["request_id"], id.as_str());
    assert_eq!(host.status(Method::DELETE, &path, &new).await, 204);
    assert_eq!(host.status(Method::GET, &path, &old).await, 404);
}

#[tokio::test]
async fn an_expired_and_a_revoked_key_stop_working_at_once() {
    let host = Keyed::start(&[]).await;
    let end = (host.clock.now() + TimeDelta::hours(1)).to_rfc3339();
    let brief = host.make(json!({"caller": "ward", "name": "loan", "expires_at": end})).await;
    let lasting = host.make(json!({"caller": "ward"})).await;
    let (brief_key, lasting_key) = (brief["key"].as_str().unwrap(), lasting["key"].as_str().unwrap());
    host.clock.advance(TimeDelta::hours(1) - TimeDelta::milliseconds(1));
    assert_eq!(host.get("/results", brief_key).await.status().as_u16(), 200);
    host.clock.advance(TimeDelta::milliseconds(1));
    assert_eq!(host.get("/results", brief_key).await.status().as_u16(), 401);
    let path = format!("/admin/keys/{}", lasting["id"].as_str().unwrap());
    assert_eq!(host.get("/results", lasting_key).await.status().as_u16(), 200);
    for _ in 0..2 {
        assert_eq!(host.status(Method::DELETE, &path, &host.admin).await, 204);
        assert_eq!(host.get("/results", lasting_key).await.status().as_u16(), 401);
        host.clock.advance(TimeDelta::minutes(5));
    }
    let keys: Value = host.get("/admin/keys", &host.admin).await.json().await.unwrap();
    let mine = keys["keys"].as_array().unwrap().iter().find(|key| key["id"] == lasting["id"]).unwrap();
    let revoked: chrono::DateTime<Utc> = mine["revoked_at"].as_str().unwrap().parse().unwrap();
    assert_eq!(revoked, host.clock.now() - TimeDelta::minutes(10), "the second call keeps the first's moment");
    assert_eq!(host.status(Method::DELETE, "/admin/keys/000000000000", &host.admin).await, 404);
    assert_eq!(host.status(Method::DELETE, "/admin/keys/%ff", &host.admin).await, 404);
}

#[tokio::test]
async fn what_is_no_proper_key_is_not_made() {
    let host = Keyed::start(&[]).await;
    let past = (host.clock.now() - TimeDelta::seconds(1)).to_rfc3339();
    for body in [
        json!({}),
        json!({"caller": ""}),
        json!({"caller": "user:x"}),
        json!({"caller": "guest"}),
        json!({"caller": "Ward"}),
        json!({"caller": "w", "scopes": []}),
        json!({"caller": "w", "scopes": ["root"]}),
        json!({"caller": "w", "name": "two\nlines"}),
        json!({"caller": "w", "name": "x".repeat(101)}),
        json!({"caller": "w", "expires_at": past}),
        json!({"caller": "w", "expires_at": "soon"}),
        json!({"caller": "w", "colour": "red"}),
        json!([]),
    ] {
        let response = host.request(Method::POST, "/admin/keys", &host.admin).json(&body).send().await.unwrap();
        assert_eq!(response.status().as_u16(), 400, "{body}");
    }
    let text = host.request(Method::POST, "/admin/keys", &host.admin).body("{\"caller\": \"w\"}").send().await.unwrap();
    assert_eq!(text.status().as_u16(), 415);
    let long = host.request(Method::POST, "/admin/keys", &host.admin).json(&json!({"caller": "x".repeat(200_000)}));
    assert_eq!(long.send().await.unwrap().status().as_u16(), 413);
    let keys: Value = host.get("/admin/keys", &host.admin).await.json().await.unwrap();
    assert_eq!(keys["keys"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn keys_outlive_a_restart_and_revoking_the_last_opens_the_host_to_nobody() {
    let host = Keyed::start(&[]).await;
    let ward = host.key_of("ward").await;
    let admin = host.admin.clone();
    let host = Keyed::on(host.host.stop().await, admin, &[]).await;
    assert_eq!(host.get("/results", &ward).await.status().as_u16(), 200);
    let keys: Value = host.get("/admin/keys", &host.admin).await.json().await.unwrap();
    // The admin's own last, or the others could not be revoked.
    for key in keys["keys"].as_array().unwrap().iter().rev() {
        let path = format!("/admin/keys/{}", key["id"].as_str().unwrap());
        assert_eq!(host.status(Method::DELETE, &path, &host.admin).await, 204);
    }
    let admin = host.admin.clone();
    let folder = host.host.stop().await;
    let host = Keyed::on(folder, admin, &[]).await;
    for key in ["", &ward, &host.admin] {
        assert_eq!(host.get("/results", key).await.status().as_u16(), 401);
    }
    let folder = host.host.stop().await;
    let another = init(folder.path(), true).await.unwrap();
    let host = Keyed::on(folder, another, &[]).await;
    assert_eq!(host.get("/admin/keys", &host.admin).await.status().as_u16(), 200);
}

#[tokio::test]
async fn a_caller_beyond_its_limit_waits_for_the_next_minute_and_holds_up_no_other() {
    let host = Keyed::start(&[("REQUESTS_PER_MINUTE", "3")]).await;
    let (ward, other) = (host.key_of("ward").await, host.key_of("other").await);
    let second_key = host.key_of("ward").await;
    let next_minute = |clock: &Clock| {
        let into = clock.now().timestamp_millis().rem_euclid(60_000);
        clock.advance(TimeDelta::milliseconds(60_000 - into));
    };
    next_minute(&host.clock);
    host.clock.advance(TimeDelta::seconds(20));
    for key in [&ward, &second_key, &ward] {
        assert_eq!(host.get("/results", key).await.status().as_u16(), 200);
    }
    for path in ["/results", "/result/00000000-0000-7000-8000-000000000000"] {
        let refused = host.get(path, &second_key).await;
        assert_eq!(refused.status().as_u16(), 429, "the keys of one caller share one limit");
        assert_eq!(refused.headers()["retry-after"], "40");
        assert_eq!(code_of(refused).await, "too_many_requests");
    }
    assert_eq!(host.submit(&ward).await.status().as_u16(), 429);
    assert_eq!(host.get("/healthz", &ward).await.status().as_u16(), 200);
    assert_eq!(host.get("/results", &other).await.status().as_u16(), 200);
    host.clock.advance(TimeDelta::seconds(39));
    assert_eq!(host.get("/results", &ward).await.headers()["retry-after"], "1");
    host.clock.advance(TimeDelta::seconds(1));
    assert_eq!(host.get("/results", &ward).await.status().as_u16(), 200);
    let list: Value = host.get("/results", &ward).await.json().await.unwrap();
    assert_eq!(list["results"], json!([]), "what was refused was not done");
}

#[tokio::test]
async fn guests_submit_and_read_by_id_under_a_limit_of_their_own_and_never_list() {
    let host = Keyed::start(&[("ADMIT_GUESTS", "true"), ("GUEST_REQUESTS_PER_MINUTE", "7")]).await;
    let ward = host.key_of("ward").await;
    let hidden = id_of(host.submit(&ward).await).await;
    host.clock.advance(TimeDelta::minutes(1));
    let id = id_of(host.submit("").await).await;
    assert_eq!(host.status(Method::GET, &format!("/result/{id}"), "").await, 200);
    assert_eq!(host.status(Method::GET, &format!("/result/{hidden}"), "").await, 404);
    assert_eq!(host.status(Method::GET, "/results", "").await, 403);
    assert_eq!(host.status(Method::GET, "/admin/keys", "").await, 403);
    assert_eq!(host.status(Method::POST, "/chat", "").await, 403, "an LLM costs money");
    assert_eq!(host.status(Method::DELETE, &format!("/result/{id}"), "").await, 204);
    let refused = host.get(&format!("/result/{id}"), "").await;
    assert_eq!(refused.status().as_u16(), 429, "all guests together have seven");
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(host.get("/results", &ward).await.status().as_u16(), 200);
    host.clock.advance(TimeDelta::minutes(1));
    assert_eq!(host.status(Method::GET, &format!("/result/{id}"), "").await, 404);
}

/// Every byte of every file under a folder.
fn everything(folder: &Path, found: &mut Vec<u8>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { everything(&path, found) } else { found.extend(std::fs::read(path).unwrap()) }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_in_no_file_and_in_no_line_of_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let admin = init(folder.path(), false).await.unwrap();
    let host = Process::start(folder.path(), &[("LOG_LEVEL", "trace")]).await.unwrap();
    let url = host.url.clone();
    let http = client();
    let made = http.post(format!("{url}/admin/keys")).bearer_auth(&admin).json(&json!({"caller": "ward"}));
    let made: Value = made.send().await.unwrap().json().await.unwrap();
    let ward = made["key"].as_str().unwrap().to_owned();
    let wrong = format!("{}{}", &ward[..ward.len() - 4], "0123");
    for (key, status) in [(&ward, 200), (&wrong, 401)] {
        let answer = http.get(format!("{url}/results")).bearer_auth(key).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), status);
    }
    let id = made["id"].as_str().unwrap();
    let revoked = http.delete(format!("{url}/admin/keys/{id}")).bearer_auth(&admin).send().await.unwrap();
    assert_eq!(revoked.status().as_u16(), 204);
    // Whole keys in the place of an id.
    for (path, status) in [(format!("admin/keys/{ward}"), 404), (format!("result/{admin}"), 404)] {
        let answer = http.delete(format!("{url}/{path}")).bearer_auth(&admin).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), status);
    }
    let log = host.whole_log().await;
    let admin_id = admin.split('_').nth(1).unwrap();
    for action in ["key_created", "key_revoked"] {
        let line = log.lines().find(|line| line.contains(action)).expect(action);
        assert!(line.contains(id) && line.contains(admin_id) && line.contains("\"local\""), "{line}");
    }
    let mut files = Vec::new();
    everything(folder.path(), &mut files);
    for secret in [&admin, &ward, &wrong].map(|key| &key.rsplit('_').next().unwrap()[..32]) {
        for (place, bytes) in [("log", log.as_bytes()), ("files", &files)] {
            assert!(!bytes.windows(secret.len()).any(|part| part == secret.as_bytes()), "{place}");
        }
    }
}
