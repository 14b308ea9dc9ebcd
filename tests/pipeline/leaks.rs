//! Promises 1 and 6: what a photo carries beside its pixels is nowhere once submit has answered, and
//! no photo, key, prompt or completion is in a log.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rand::RngExt;
use reqwest::multipart::{Form, Part};
use reqwest::{RequestBuilder, Response};
use serde_json::{Value, json};
use shared::photo::accept;
use tokio::process::Command;

use crate::support::leaks::Leaks;
use crate::support::llm_server::{Behaviour, HONEST, LlmServer, explanation};
use crate::support::metadata::{Marked, marked_photos};
use crate::support::process::{Process, binary};
use crate::support::receiver::Receiver;
use crate::support::redis_server::Redis;
use crate::support::websocket::Socket;
use crate::support::{client, ended, eventually, within};
use crate::uploads;
use crate::webhooks::variables;

/// Bytes that nobody else would write.
pub(crate) fn secret(name: &str) -> String {
    format!("{name}-{:016x}", rand::rng().random::<u64>())
}

/// Everything of an answer, head and body.
async fn whole(response: Response) -> Vec<u8> {
    let head = format!("{:?} {:?}", response.status(), response.headers());
    [head.as_bytes(), &response.bytes().await.unwrap()].concat()
}

/// A photo in each of the three forms of a body, and uploaded before; the end of each is to be told.
async fn requests(url: &str, photo: &Marked, file_name: &str, callback_url: &str) -> [RequestBuilder; 4] {
    let http = client();
    let permit = uploads::permit(&http, url, &photo.bytes).await.unwrap();
    assert_eq!(uploads::put(&http, url, &permit, &photo.bytes).await.unwrap().status().as_u16(), 200);
    let submit = || client().post(format!("{url}/submit"));
    // All that stands in it may stand in a query.
    let raw = client().post(format!("{url}/submit?callback_url={callback_url}"));
    let part = Part::bytes(photo.bytes.clone()).file_name(file_name.to_owned()).mime_str(photo.content_type).unwrap();
    let form = Form::new().part("image", part).text("callback_url", callback_url.to_owned());
    [
        submit().json(&json!({"image": STANDARD.encode(&photo.bytes), "callback_url": callback_url})),
        raw.header("content-type", photo.content_type).body(photo.bytes.clone()),
        submit().multipart(form),
        submit().json(&json!({"image_key": permit["image_key"], "callback_url": callback_url})),
    ]
}

/// Every frame until each of these jobs has ended.
async fn frames(mut socket: Socket, ids: &[String]) -> Vec<Vec<u8>> {
    let (mut frames, mut ended) = (Vec::new(), BTreeSet::new());
    while ended.len() < ids.len() {
        let frame = socket.next().await.unwrap();
        if frame["type"] == "result" {
            ended.insert(frame["request_id"].as_str().unwrap().to_owned());
        }
        frames.push(frame.to_string().into_bytes());
    }
    frames
}

/// Every webhook, once each of these jobs was told of.
async fn deliveries(receiver: &Receiver, ids: &[String]) -> Vec<Vec<u8>> {
    let is_told = |id: &String| receiver.received().iter().any(|it| it.event()["data"]["request_id"] == id.as_str());
    // At most two are sent at once; one that finds no place waits for five seconds.
    within(Duration::from_secs(60), "each job is told of", async || ids.iter().all(&is_told)).await;
    receiver.received().iter().map(|it| format!("{} {:?} {}", it.uri, it.headers, it.body).into_bytes()).collect()
}

/// Every request to the LLM, but for the key, which it alone is sent.
fn prompts(llm: &LlmServer, key: &str) -> Vec<Vec<u8>> {
    let mut prompts = Vec::new();
    for (mut headers, body) in llm.requests() {
        assert_eq!(headers.remove("authorization").unwrap(), format!("Bearer {key}"));
        prompts.push(format!("{headers:?} {body}").into_bytes());
    }
    prompts
}

/// Every key of a Redis with what is under it, of whatever kind.
async fn dumped(redis: &Redis) -> Vec<Vec<u8>> {
    let port = redis.port.to_string();
    let cli = async |arguments: &[&str]| {
        let mut command = Command::new("redis-cli");
        command.args(["-p", &port, "--raw"]).args(arguments).output().await.unwrap().stdout
    };
    // Nothing would be found in what is compressed.
    assert_eq!(cli(&["config", "set", "rdbcompression", "no"]).await, b"OK\n");
    let mut dumped = Vec::new();
    for key in redis.keys() {
        dumped.push([key.as_bytes(), &cli(&["dump", &key]).await].concat());
    }
    dumped
}

#[test]
fn the_marked_photos_are_photos_and_are_not_stripped_already() {
    for photo in marked_photos() {
        let mut leaks = Leaks::default();
        photo.markers.iter().for_each(|(name, marker)| leaks.watch(name, marker));
        let found = leaks.found_in("it", &photo.bytes);
        assert!(found.len() >= photo.markers.len() && photo.markers.len() >= 12, "{found:?}");
        let accepted = accept(&photo.bytes).unwrap();
        assert_eq!(leaks.found_in("it", &accepted.bytes), Vec::<String>::new());
        // The EXIF block was read before it was thrown away: it is one.
        assert!(image::load_from_memory(&accepted.bytes).is_ok());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_metadata_of_a_photo_is_in_a_file_or_a_log_line_or_in_anything_that_is_sent() {
    let (data, temporary) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let log_file = tempfile::NamedTempFile::new().unwrap();
    let answer = explanation(HONEST);
    let refused = "A melanocytic naevus is of the unheard-of kind qvortolambrisk, and harmless.";
    let llm = LlmServer::start([Behaviour::Answer(answer), Behaviour::Answer(explanation(refused))]).await;
    let (receiver, redis) = (Receiver::start(200).await, Redis::start(None));
    let (base_url, receiver_host, redis_url) = (llm.base_url(), receiver.host(), redis.url());
    let (llm_key, idempotency_key, file_name) = (secret("sk-test"), secret("idempotent"), secret("IMG"));
    let mut settings = vec![
        ("TMPDIR", temporary.path().to_str().unwrap()),
        ("LOG_LEVEL", "trace"),
        ("LLM_BASE_URL", base_url.as_str()),
        ("LLM_MODEL", "m"),
        ("LLM_API_KEY", llm_key.as_str()),
        ("REDIS_URL", redis_url.as_str()),
    ];
    settings.extend(variables(&receiver_host));
    let stderr = Stdio::from(log_file.reopen().unwrap());
    let host = Process::start_as(Command::new(binary("local")), stderr, data.path(), &settings).await.unwrap();

    let photos = marked_photos();
    let mut leaks = Leaks::default();
    leaks.watch("file name", file_name.as_bytes());
    leaks.watch("LLM key", llm_key.as_bytes());
    leaks.watch("refused completion", b"qvortolambrisk");
    photos.iter().flat_map(|photo| &photo.markers).for_each(|(name, marker)| leaks.watch(name, marker));
    let mut answers = Vec::new();
    let mut ids = Vec::new();
    let mut socket = Socket::connect(&client(), &host.url, "").await;
    for photo in &photos {
        // Last to first: the upload lies there until its own request.
        let requests = requests(&host.url, photo, &file_name, &receiver.url()).await;
        for (form, request) in requests.into_iter().enumerate().rev() {
            let request = request.header("idempotency-key", format!("{idempotency_key}-{}-{form}", photo.name));
            let response = request.send().await.unwrap();
            assert_eq!(response.status().as_u16(), 202, "{}", photo.name);
            // From here on: submit has answered.
            let (found, files) = leaks.found_below(data.path());
            assert!(files > 5 && found.is_empty(), "{files} files, {found:?}");
            let body = whole(response).await;
            let id: Value =
                serde_json::from_slice(&body[body.iter().rposition(|byte| *byte == b'{').unwrap()..]).unwrap();
            ids.push(id["request_id"].as_str().unwrap().to_owned());
            socket.subscribe(ids.last().unwrap()).await;
            answers.push(body);
        }
    }
    for id in &ids {
        let result = ended(&client(), &host.url, id).await;
        assert_eq!(result["status"], "completed", "{result}");
        assert!(result["description"]["text"].is_string(), "{result}");
        let get = |path: String| client().get(format!("{}{path}", host.url)).send();
        answers.push(whole(get(format!("/result/{id}")).await.unwrap()).await);
    }
    // What is refused is not told of either.
    let cut = &photos[0].bytes[..photos[0].bytes.len() / 3];
    let refusal = client().post(format!("{}/submit", host.url)).header("content-type", "image/jpeg");
    answers.push(whole(refusal.body(cut.to_vec()).send().await.unwrap()).await);
    for path in ["/results", "/openapi.json", "/healthz"] {
        answers.push(whole(client().get(format!("{}{path}", host.url)).send().await.unwrap()).await);
    }
    let mut found = leaks.found_among("an answer", &answers, &ids);
    found.extend(leaks.found_among("a frame", &frames(socket, &ids).await, &ids));
    found.extend(leaks.found_among("a webhook", &deliveries(&receiver, &ids).await, &ids));
    let prompts = prompts(&llm, &llm_key);
    assert!(prompts.len() >= ids.len(), "{} requests to the LLM", prompts.len());
    found.extend(leaks.found_among("a request to the LLM", &prompts, &["Melanocytic naevus"]));
    // A photo has the same outputs in whatever form it came.
    eventually("the outputs are in Redis", async || redis.keys().len() >= photos.len()).await;
    found.extend(leaks.found_among("Redis", &dumped(&redis).await, &[r#""scores":["#]));
    for folder in [data.path(), temporary.path()] {
        found.extend(leaks.found_below(folder).0);
    }
    assert!(host.terminate().await.success());
    for folder in [data.path(), temporary.path()] {
        found.extend(leaks.found_below(folder).0);
    }

    // What may be in a file or in an answer, and never in a log.
    let log = std::fs::read(log_file.path()).unwrap();
    leaks.watch("idempotency key", idempotency_key.as_bytes());
    leaks.watch("completion", HONEST.as_bytes());
    photos.iter().for_each(|photo| leaks.watch("pixels", &photo.pixels));
    for message in llm.requests()[0].1["messages"].as_array().unwrap() {
        let text = message["content"].as_str().unwrap();
        leaks.watch("prompt", &text.as_bytes()[..text.len().min(40)]);
    }
    found.extend(leaks.found_in("the log", &log));
    assert!(found.is_empty(), "{found:#?}");
    assert_eq!(libraries_below_info(&log), Vec::<String>::new());
    let log = String::from_utf8(log).unwrap();
    assert!(ids.iter().all(|id| log.contains(id)), "the log tells of every job");
}

/// Lines of other people's crates that no operator needs and nobody has read for what they tell.
pub(crate) fn libraries_below_info(log: &[u8]) -> Vec<String> {
    let lines = log.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let lines = lines.map(|line| serde_json::from_slice::<Value>(line).unwrap());
    let below = lines.filter(|line| ["DEBUG", "TRACE"].contains(&line["level"].as_str().unwrap()));
    let own = [
        "shared",
        "submit",
        "inference",
        "enrichment",
        "result",
        "sweep",
        "admin",
        "chat",
        "socket",
        "notify",
        "webhook",
        "local",
    ];
    let others = below.filter(|line| !own.contains(&line["target"].as_str().unwrap().split("::").next().unwrap()));
    let mut targets: Vec<_> = others.map(|line| line["target"].to_string()).collect();
    targets.sort();
    targets.dedup();
    targets
}
