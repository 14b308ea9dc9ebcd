//! Requests that no client sends: answered below 500 or cut off, in bounded memory, and the host
//! serves on.

use std::time::{Duration, Instant};

use axum::routing::get;
use axum::{Router, middleware};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use shared::config::Env;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::llm_server::LlmServer;
use crate::support::memory::{MIB, alone, peak};
use crate::support::process::Process;
use crate::support::{Running, client, mole, submit};

/// What the host may hold while it serves requests like these; docs/ARCHITECTURE.md names it.
const HOST_CAP: u64 = 512 * MIB;
/// Connections that begin a body and do not end it.
const SLOW_CLIENTS: usize = 300;

/// Photos as large as they may be, sent at the same time.
const FAST_CLIENTS: usize = 64;

/// Connections that leave out the last byte of a request to a model.
const SLOW_QUESTIONS: usize = 140;
/// The length of each: 32 of them fill the room that there is, to the byte.
const QUESTION_BYTES: usize = 4 * 1024 * 1024;

/// Sends some bytes and, again and again, some more, until the host answers or hangs up or `times`
/// are over; returns the status, 0 where there was none.
async fn status_of(address: &str, head: &[u8], more: &[u8], times: usize) -> u16 {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut answer = Vec::new();
    let mut sent = stream.write_all(head).await.is_ok();
    for _ in 0..times {
        let mut buffer = [0; 4096];
        match stream.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                answer.extend_from_slice(&buffer[..length]);
                break;
            }
            Err(_) if !sent => break,
            Err(_) => sent = stream.write_all(more).await.is_ok(),
        }
    }
    if answer.is_empty() {
        let mut buffer = [0; 4096];
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut buffer)).await;
        answer.extend_from_slice(&buffer[..read.map_or(0, |length| length.unwrap_or(0))]);
    }
    let line = String::from_utf8_lossy(&answer);
    line.split_whitespace().nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
}

fn post(content_type: &str, rest: &str) -> Vec<u8> {
    format!("POST /submit HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n{rest}\r\n").into_bytes()
}

fn with_body(content_type: &str, body: &str) -> Vec<u8> {
    [post(content_type, &format!("Content-Length: {}\r\n", body.len())), body.as_bytes().to_vec()].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_requests_are_answered_below_500_in_bounded_memory() {
    let folder = tempfile::tempdir().unwrap();
    let host = Process::start(folder.path(), &[]).await.unwrap();
    let address = host.url.strip_prefix("http://").unwrap().to_owned();
    let get =
        |line: &str, headers: &str| format!("GET {line} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n").into_bytes();
    let many: String = (0..10_000).map(|number| format!("x-{number}: y\r\n")).collect();
    let part = "--b\r\nContent-Disposition: form-data; name=\"describe\"\r\n\r\ntrue\r\n";
    let named = |name: &str| format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\nx\r\n");
    let form = "multipart/form-data; boundary=b";
    let chunk = [b"10000\r\n".to_vec(), vec![b'x'; 0x10000], b"\r\n".to_vec()].concat();
    let length = |bytes: &str| format!("Content-Length: {bytes}\r\n");
    let deep = format!("{{\"image\": {}", "[".repeat(1_000_000));
    let keys = format!("{{{}}}", (0..100_000).map(|number| format!("\"{number}\":0")).collect::<Vec<_>>().join(","));
    let block = vec![b'x'; 0x10000];
    let cases: Vec<(&str, Vec<u8>, &[u8], usize)> = vec![
        ("10,000 headers", get("/healthz", &many), b"", 0),
        ("headers without end", b"GET / HTTP/1.1\r\n".to_vec(), b"x: y\r\n", 1_000_000),
        ("a header of a megabyte", get("/healthz", &format!("x: {}\r\n", "y".repeat(1_000_000))), b"", 0),
        ("an address of 100,000 letters", get(&format!("/{}", "x".repeat(100_000)), ""), b"", 0),
        ("a query of 60,000 letters", get(&format!("/results?cursor={}", "%41".repeat(20_000)), ""), b"", 0),
        ("an id of slashes", get("/result/%2e%2e%2f%2e%2e%2fjobs.sqlite", ""), b"", 0),
        ("an id that is no UTF-8", get("/result/%ff%fe%00", ""), b"", 0),
        (
            "an ETag of 50,000 commas",
            get("/result?request_id=x", &format!("If-None-Match: {}\r\n", ",".repeat(50_000))),
            b"",
            0,
        ),
        ("chunks without end", post("image/png", "Transfer-Encoding: chunked\r\n"), &chunk, 2_000),
        ("chunks without end, JSON", post("application/json", "Transfer-Encoding: chunked\r\n"), &chunk, 2_000),
        (
            "a part without end",
            [
                post(form, "Transfer-Encoding: chunked\r\n"),
                b"3D\r\n--b\r\nContent-Disposition: form-data; name=\"image\"\r\n\r\nxxxxxxxx\r\n".to_vec(),
            ]
            .concat(),
            &chunk,
            2_000,
        ),
        ("a length of 10 GB", post("image/png", &length("10000000000")), &block, 2_000),
        ("a length that is no number", post("image/png", &length("-1")), &block, 2),
        ("a length beyond 64 bits", post("image/png", &length("99999999999999999999")), &block, 2),
        ("two lengths", post("image/png", "Content-Length: 1\r\nContent-Length: 2\r\n"), b"xx", 1),
        (
            "a length and chunks",
            post("image/png", "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"),
            b"0\r\n\r\n",
            1,
        ),
        ("a chunk of 2^64", post("image/png", "Transfer-Encoding: chunked\r\n"), b"ffffffffffffffff\r\nx", 1),
        ("10,000 parts", with_body(form, &(part.repeat(10_000) + "--b--\r\n")), b"", 0),
        ("10,000 photos", with_body(form, &(named("image").repeat(10_000) + "--b--\r\n")), b"", 0),
        ("a part's name of a megabyte", with_body(form, &named(&"x".repeat(1_000_000))), b"", 0),
        (
            "a boundary of 5,000 letters",
            with_body(&format!("multipart/form-data; boundary={}", "b".repeat(5_000)), "--b"),
            b"",
            0,
        ),
        ("no boundary", with_body("multipart/form-data", "--b"), b"", 0),
        ("JSON a million deep", with_body("application/json", &deep), b"", 0),
        ("JSON of 100,000 keys", with_body("application/json", &keys), b"", 0),
        ("a body for a body-less call", [get("/healthz", &length("1000000")), block.clone()].concat(), &block, 20),
        ("HTTP/2 without upgrade", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), b"\0\0\0\x04\0\0\0\0\0", 10),
        ("TLS", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03".to_vec(), b"\0", 600),
        ("zeros", vec![0; 1000], b"\0", 1000),
        ("no host", b"GET /healthz HTTP/1.1\r\n\r\n".to_vec(), b"", 0),
        ("another host", b"GET /results HTTP/1.1\r\nHost: attacker.example\r\n\r\n".to_vec(), b"", 0),
    ];
    for (name, head, more, times) in cases {
        let status = status_of(&address, &head, more, times).await;
        println!("{name}: {status}, peak {} MiB", peak(&host.id().to_string()) / MIB);
        assert!((200..500).contains(&status) && status != 202 || status == 0, "{name}: {status}");
    }
    let id = submit(&client(), &host.url, &mole(), None).await.unwrap();
    assert!(!id.is_empty(), "the host serves on");
    let peak = peak(&host.id().to_string());
    assert!(peak <= HOST_CAP, "{} MiB", peak / MIB);
    assert!(host.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_at_once_hold_little_memory_whether_they_finish_their_bodies_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let host = Process::start(folder.path(), &[]).await.unwrap();
    let address = host.url.strip_prefix("http://").unwrap().to_owned();
    let mut open = Vec::new();
    for _ in 0..SLOW_CLIENTS {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        let head = post("image/png", "Content-Length: 4194304\r\n");
        stream.write_all(&head).await.unwrap();
        // What the host does not read stays in the system's buffers, and the rest here.
        let body = vec![b'x'; 4_000_000];
        let _ = tokio::time::timeout(Duration::from_millis(50), stream.write_all(&body)).await;
        open.push(stream);
    }
    let health = client().get(format!("{}/healthz", host.url)).send().await.unwrap();
    assert_eq!(health.status().as_u16(), 200);
    let request = client().post(format!("{}/submit", host.url)).header("content-type", "image/png").body(mole());
    let response = request.send().await.unwrap();
    assert_eq!(response.status().as_u16(), 429);
    assert!(response.headers().contains_key("retry-after"));
    let held = peak(&host.id().to_string());
    println!("{SLOW_CLIENTS} slow clients: peak {} MiB", held / MIB);
    drop(open);

    large_photos_at_once(&host.url).await;
    let peak = peak(&host.id().to_string());
    println!("{FAST_CLIENTS} photos of 4 MiB at once: peak {} MiB", peak / MIB);
    assert!(peak <= HOST_CAP, "{} MiB", peak / MIB);
    assert!(host.terminate().await.success());
}

/// Sends [`FAST_CLIENTS`] photos, which are taken or told to come again.
async fn large_photos_at_once(url: &str) {
    // A PNG of 4 MiB, nearly all of it a comment.
    let mut large = mole();
    let comment = vec![b'x'; 4_190_000 - large.len()];
    let chunk = [&(comment.len() as u32).to_be_bytes()[..], b"tEXt", &comment, &[0; 4]].concat();
    large.splice(33..33, chunk);
    let body = json!({"image": STANDARD.encode(&large), "describe": false}).to_string();
    let http = client();
    let requests = (0..FAST_CLIENTS).map(|_| {
        http.post(format!("{url}/submit")).header("content-type", "application/json").body(body.clone()).send()
    });
    for response in futures_util::future::join_all(requests).await {
        let status = response.unwrap().status().as_u16();
        assert!([202, 429].contains(&status), "{status}");
    }
}

/// Sends a body that never ends, a byte a second, and returns what is answered to it.
async fn trickled(address: &str, path: &str) -> String {
    let head = format!("POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{head}Content-Length: 4000\r\n\r\n{{").as_bytes()).await.unwrap();
    let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
    while !answer.ends_with(b"}") {
        match tokio::time::timeout(Duration::from_secs(1), stream.read(&mut buffer)).await {
            Ok(Ok(length)) if length > 0 => answer.extend_from_slice(&buffer[..length]),
            Ok(_) => break,
            // The host may hang up meanwhile; what it has answered is read all the same.
            Err(_) => drop(stream.write_all(b" ").await),
        }
    }
    String::from_utf8(answer).unwrap()
}

/// Takes the minute that a body has.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_comes_byte_by_byte_holds_no_connection_for_ever_on_any_route_that_takes_one() {
    let host = Running::start(&[]).await;
    let address = host.url.strip_prefix("http://").unwrap();
    let paths = ["/submit", "/uploads", "/chat", "/v1/chat/completions", "/admin/keys", "/admin/dead-letters/redrive"];
    let answers = futures_util::future::join_all(paths.map(|path| trickled(address, path)));
    let answers = tokio::time::timeout(Duration::from_secs(300), answers).await.expect("a connection is held");
    for (path, answer) in paths.iter().zip(answers) {
        assert!(answer.starts_with("HTTP/1.1 400 "), "{path}: {answer}");
        assert!(answer.contains("The body did not arrive within 60 seconds."), "{path}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unsent_questions_to_the_llm_hold_little_memory_and_keep_no_short_one_and_no_photo_waiting() {
    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let folder = tempfile::tempdir().unwrap();
    let settings = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "tiny")];
    let host = Process::start(folder.path(), &settings).await.unwrap();
    let address = host.url.strip_prefix("http://").unwrap().to_owned();
    let ask = async |path: &str, length: usize| {
        let mut body = json!({"messages": [{"role": "user", "content": "x".repeat(length)}]});
        if path != "/chat" {
            body["model"] = json!("tiny");
        }
        client().post(format!("{}{path}", host.url)).json(&body).send().await.unwrap()
    };
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {QUESTION_BYTES}\r\n\r\n"
    );
    let begun = [head.into_bytes(), vec![b' '; QUESTION_BYTES - 1]].concat();
    let mut open = Vec::new();
    for _ in 0..SLOW_QUESTIONS {
        open.push(TcpStream::connect(&address).await.unwrap());
    }
    // What the host does not read stays in the system's buffers, and the rest here.
    let patience = Duration::from_secs(5);
    let sent = open.iter_mut().map(|stream| tokio::time::timeout(patience, stream.write_all(&begun)));
    futures_util::future::join_all(sent).await;

    let started = Instant::now();
    for path in ["/v1/chat/completions", "/chat"] {
        assert_eq!(ask(path, 10).await.status().as_u16(), 200, "{path}");
    }
    assert!(started.elapsed() < Duration::from_secs(5), "they have waited: {:?}", started.elapsed());
    let refused = tokio::join!(ask("/v1/chat/completions", 100_000), ask("/chat", 100_000));
    for refused in [refused.0, refused.1] {
        assert_eq!(refused.status().as_u16(), 429);
        assert!(refused.headers().contains_key("retry-after"));
        assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "too_many_requests");
    }
    assert_eq!(llm.calls(), 2, "the model was asked what was refused");
    large_photos_at_once(&host.url).await;
    let peak = peak(&host.id().to_string());
    println!("{SLOW_QUESTIONS} slow questions, then {FAST_CLIENTS} photos besides: peak {} MiB", peak / MIB);
    assert!(peak <= HOST_CAP, "{} MiB", peak / MIB);

    drop(open);
    assert_eq!(ask("/v1/chat/completions", 100_000).await.status().as_u16(), 200);
    assert!(host.terminate().await.success());
}

#[tokio::test]
async fn a_panic_is_answered_500_logged_once_without_its_message_and_served_on() {
    let name = "requests::a_panic_is_answered_500_logged_once_without_its_message_and_served_on";
    // The log is this process's standard error, so the host is in a process of its own.
    let Some(output) = alone(name) else {
        shared::telemetry::init(&Env::of([("LOG_LEVEL", "trace")])).unwrap();
        return panicking_host().await;
    };
    let log = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let panics: Vec<_> = lines.iter().filter(|line| line["error.code"] == "panic").collect();
    assert_eq!(panics.len(), 1, "{log}");
    assert!(panics[0]["panic.place"].as_str().unwrap().contains("requests.rs"), "{log}");
    assert!(!log.contains("what the photo showed"), "{log}");
    assert_eq!(lines.iter().filter(|line| line["http.status"] == 500).count(), 1, "{log}");
}

async fn panicking_host() {
    let panics = || async {
        if true {
            panic!("what the photo showed");
        }
    };
    let router = Router::new().route("/panic", get(panics)).route("/works", get(|| async { "yes" }));
    let router = router.layer(middleware::from_fn(shared::http::trace));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    let response = client().get(format!("{url}/panic")).send().await.unwrap();
    assert_eq!(response.status().as_u16(), 500);
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], "internal");
    assert_eq!(body["error"]["request_id"], id.as_str());
    let works = client().get(format!("{url}/works")).send().await.unwrap();
    assert_eq!(works.text().await.unwrap(), "yes");
}

#[tokio::test]
async fn every_route_reads_json_by_the_same_rules() {
    let host = Running::start(&[]).await;
    let kib = 1024;
    for (path, limit) in [
        ("/submit", 5900 * kib),
        ("/uploads", 4 * kib),
        ("/chat", 1024 * kib),
        ("/admin/keys", 128 * kib),
        ("/admin/dead-letters/redrive", 128 * kib),
    ] {
        let long = format!("{{\"{}\": 0}}", "x".repeat(limit));
        for (content_type, body, status) in [
            ("application/jsonx", "{\"x\": 0}", 415),
            ("text/plain", "{\"x\": 0}", 415),
            ("Application/JSON; charset=utf-8", "{\"x\": 0}", 400),
            ("application/json", "[]", 400),
            ("application/json", "", 400),
            ("application/json", "{\"x\": ", 400),
            ("application/json", &long, 413),
        ] {
            let request = host.http.post(format!("{}{path}", host.url)).header("content-type", content_type);
            let response = request.body(body.to_owned()).send().await.unwrap();
            let shown = (path, content_type, &body[..body.len().min(20)]);
            assert_eq!(response.status(), status, "{shown:?}");
            let text = response.text().await.unwrap();
            assert!(path == "/submit" || !text.contains("photo is larger"), "{shown:?}: {text}");
        }
    }
}
