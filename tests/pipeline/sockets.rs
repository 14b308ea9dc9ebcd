//! Results over a WebSocket: who may open one, what comes over it, and what happens to those who do
//! not read.

mod asks;

use chrono::TimeDelta;
use futures_util::future::join_all;
use futures_util::{SinkExt, StreamExt};
use reqwest::Method;
use serde_json::{Value, json};
use shared::auth::Identity;
use shared::embedded::Hub;
use shared::ports::{Connection, Connections, Push, Pushed};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use crate::support::keyed::Keyed;
use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::Process;
use crate::support::websocket::{Socket, Told, open, ticket};
use crate::support::{Running, client, eventually, mole, numbered_mole};

const ANSWER: &str = "A growth of pigment cells, often round or oval, é and 🩺.";

async fn connect(host: &Running) -> Socket {
    Socket::connect(&host.http, &host.url, "").await
}

fn question() -> Value {
    json!({"action": "ask", "prompt": "What is a naevus?", "tag": "7"})
}

/// Asks, and reads what comes until the job has ended.
async fn asked(socket: &mut Socket, message: Value) -> (Told, Value) {
    socket.send(message).await;
    let accepted = socket.next().await.unwrap();
    assert_eq!((&accepted["type"], &accepted["tag"]), (&json!("accepted"), &json!("7")), "{accepted}");
    let mut told = Told::default();
    loop {
        let frame = socket.next().await.unwrap();
        assert_eq!(frame["request_id"], accepted["request_id"], "{frame}");
        match frame["type"].as_str().unwrap() {
            "text" => told.add(&frame),
            "status" => {}
            _ => return (told, frame),
        }
    }
}

#[tokio::test]
async fn a_subscriber_is_told_of_every_end_and_what_get_says_of_it() {
    let host = Running::start(&[]).await;
    let mut socket = connect(&host).await;
    let id = host.submit(&mole()).await;
    socket.subscribe(&id).await;
    let (frame, _) = socket.until_ended(&id).await.unwrap();
    assert_eq!((&frame["type"], &frame["status"]), (&json!("result"), &json!("completed")), "{frame}");
    // A link is made for who asks for it.
    let mut result = host.result(&id).await;
    assert!(result["map"].take().is_object(), "{result}");
    assert_eq!(frame["result"], result);
    // Again, over another connection: the latest state, at once.
    let mut again = connect(&host).await;
    again.subscribe(&id).await;
    assert_eq!(again.next().await.unwrap(), frame);
    // Who is subscribed learns of the end of it as well.
    host.http.delete(format!("{}/result/{id}", host.url)).send().await.unwrap();
    for socket in [&mut socket, &mut again] {
        let mut deleted = socket.next().await.unwrap();
        // At least once: the answer to `subscribe` and the change's own frame may both come.
        while deleted == frame {
            deleted = socket.next().await.unwrap();
        }
        let expected = json!({"v": 1, "type": "deleted", "request_id": id, "seq": frame["seq"].as_u64().unwrap() + 1});
        assert_eq!(deleted, expected);
    }
    again.subscribe(&id).await;
    assert_eq!(again.next().await.unwrap()["code"], "not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_clients_are_each_told_the_end_of_their_own_job_in_order() {
    let host = Running::start(&[]).await;
    let clients = join_all((0..50).map(async |number| {
        let mut socket = connect(&host).await;
        let id = host.submit(&numbered_mole(number)).await;
        socket.subscribe(&id).await;
        let (frame, came) = socket.until_ended(&id).await.unwrap();
        assert_eq!(frame["status"], "completed", "{frame}");
        assert!(came.is_sorted(), "{came:?}");
        (socket, id, frame["seq"].as_u64().unwrap())
    }))
    .await;
    assert_eq!((clients.len(), host.hub.len()), (50, 50));
    // Once all have ended there is nobody who might still be told of something older.
    let quiet = clients.into_iter().map(async |(mut socket, id, newest)| {
        socket.nothing_older_comes(&id, newest).await;
        socket
    });
    drop(join_all(quiet).await);
    eventually("connections that were left are forgotten", async || host.hub.is_empty()).await;
}

#[tokio::test]
async fn a_ticket_opens_one_connection_within_a_minute_and_nothing_else_does() {
    let keyed = Keyed::start(&[]).await;
    let (http, url) = (&keyed.host.http, keyed.host.url.as_str());
    assert_eq!(keyed.status(Method::POST, "/socket-tickets", "").await, 401);
    let first = ticket(http, url, &keyed.admin).await.unwrap();
    let path = first["url"].as_str().unwrap();
    assert_eq!(path, format!("/ws?ticket={}", first["ticket"].as_str().unwrap()));
    // Not an upgrade: the ticket is still good after it.
    assert_eq!(keyed.status(Method::GET, path, "").await, 400);
    let _socket = open(url, path, &[]).await.unwrap();
    assert_eq!(open(url, path, &[]).await.err(), Some(401), "a ticket was used twice");
    let late = ticket(http, url, &keyed.admin).await.unwrap();
    keyed.clock.advance(TimeDelta::seconds(61));
    assert_eq!(open(url, late["url"].as_str().unwrap(), &[]).await.err(), Some(401), "an expired ticket was taken");
    let key = keyed.admin.clone();
    for path in
        ["/ws", "/ws?ticket=", "/ws?ticket=0", &format!("/ws?ticket={key}"), &format!("/ws?ticket={}", "0".repeat(64))]
    {
        let bearer = format!("Bearer {key}");
        assert_eq!(open(url, path, &[("authorization", &bearer)]).await.err(), Some(401), "{path}");
    }
    assert_eq!(keyed.host.hub.len(), 1);
}

#[tokio::test]
async fn another_callers_job_looks_like_none_and_is_never_told() {
    let keyed = Keyed::start(&[]).await;
    let (http, url) = (&keyed.host.http, keyed.host.url.as_str());
    let (own, other) = (keyed.key_of("ward-1").await, keyed.key_of("ward-2").await);
    let id: Value = keyed.submit(&own).await.json().await.unwrap();
    let id = id["request_id"].as_str().unwrap();
    let unknown = "01a1fd23-16e4-7867-8ba2-ef5c50a78321";
    let (mut socket, mut owner) = (Socket::connect(http, url, &other).await, Socket::connect(http, url, &own).await);
    for id in [id, unknown] {
        socket.subscribe(id).await;
        let expected = json!({
            "v": 1, "type": "error", "code": "not_found", "message": "There is no such request.", "request_id": id,
        });
        assert_eq!(socket.next().await.unwrap(), expected);
    }
    owner.subscribe(id).await;
    owner.until_ended(id).await.unwrap();
    keyed.request(Method::DELETE, &format!("/result/{id}"), &own).send().await.unwrap();
    // The end may be told twice: by the subscription, and by the write.
    let mut told = owner.next().await.unwrap();
    while told["type"] == "result" {
        told = owner.next().await.unwrap();
    }
    assert_eq!(told["type"], "deleted");
    // What comes next is the answer to this, so nothing came before.
    socket.send(json!({"action": "ping"})).await;
    assert_eq!(socket.next().await.unwrap(), json!({"v": 1, "type": "pong"}));
}

#[tokio::test]
async fn a_key_that_was_revoked_asks_for_nothing_more_over_an_open_connection() {
    let keyed = Keyed::start(&[]).await;
    let made = keyed.make(json!({"caller": "ward"})).await;
    let mut socket = Socket::connect(&keyed.host.http, &keyed.host.url, made["key"].as_str().unwrap()).await;
    let path = format!("/admin/keys/{}", made["id"].as_str().unwrap());
    assert_eq!(keyed.status(Method::DELETE, &path, &keyed.admin).await, 204);
    for message in [question(), json!({"action": "subscribe", "request_id": "x"})] {
        socket.send(message).await;
        let frame = socket.next().await.unwrap();
        assert_eq!((&frame["type"], &frame["code"]), (&json!("error"), &json!("unauthorized")), "{frame}");
    }
}

#[tokio::test]
async fn guests_keys_with_limits_and_hosts_without_an_llm_get_no_answer() {
    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let settings = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "tiny"), ("ADMIT_GUESTS", "true")];
    let keyed = Keyed::start(&settings).await;
    let limited = keyed.make(json!({"caller": "ward", "requests_per_minute": 5})).await;
    for key in ["", limited["key"].as_str().unwrap()] {
        let mut socket = Socket::connect(&keyed.host.http, &keyed.host.url, key).await;
        socket.send(question()).await;
        let frame = socket.next().await.unwrap();
        assert_eq!((&frame["code"], &frame["tag"]), (&json!("forbidden"), &json!("7")), "{frame}");
    }
    assert_eq!(llm.calls(), 0);
    let host = Running::start(&[]).await;
    let mut socket = connect(&host).await;
    socket.send(question()).await;
    assert_eq!(socket.next().await.unwrap()["code"], "llm_not_configured");
}

#[tokio::test]
async fn messages_are_counted_against_their_callers_limit() {
    let keyed = Keyed::start(&[("REQUESTS_PER_MINUTE", "5")]).await;
    let key = keyed.key_of("ward").await;
    let mut socket = Socket::connect(&keyed.host.http, &keyed.host.url, &key).await;
    let mut codes = Vec::new();
    for _ in 0..6 {
        socket.subscribe("01a1fd23-16e4-7867-8ba2-ef5c50a78321").await;
        codes.push(socket.next().await.unwrap()["code"].as_str().unwrap().to_owned());
    }
    // The ticket was the first of the five.
    assert_eq!(codes[..4], ["not_found"; 4]);
    assert_eq!(codes[4..], ["too_many_requests"; 2]);
}

#[tokio::test]
async fn pings_and_what_cannot_be_read_are_counted_as_well() {
    for message in [r#"{"action": "ping"}"#, "hello"] {
        let keyed = Keyed::start(&[("REQUESTS_PER_MINUTE", "5")]).await;
        let key = keyed.key_of("ward").await;
        let mut socket = Socket::connect(&keyed.host.http, &keyed.host.url, &key).await;
        let mut refused = Vec::new();
        for _ in 0..6 {
            socket.say(message).await;
            refused.push(socket.next().await.unwrap()["code"] == "too_many_requests");
        }
        assert_eq!(refused, [false, false, false, false, true, true], "{message}");
    }
}

#[tokio::test]
async fn a_refused_message_is_answered_with_its_tag() {
    let host = Running::start(&[]).await;
    let mut socket = connect(&host).await;
    let long = json!({"action": "ask", "tag": "7", "prompt": "x".repeat(33_000)}).to_string();
    for message in [
        r#"{"action": "ask", "tag": "7", "bogus": 1}"#,
        r#"{"action": "dance", "tag": "7"}"#,
        r#"{"tag": "7"}"#,
        r#"{"action": "subscribe", "tag": "7"}"#,
        &long,
    ] {
        socket.say(message).await;
        let frame = socket.next().await.unwrap();
        assert_eq!((&frame["type"], &frame["tag"]), (&json!("error"), &json!("7")), "{frame}");
    }
    // No tag, or none that is repeated.
    for tag in [json!(7), json!({"a": 1}), json!("x".repeat(65)), Value::Null] {
        socket.send(json!({"action": "dance", "tag": tag})).await;
        let frame = socket.next().await.unwrap();
        assert_eq!((&frame["type"], &frame["tag"]), (&json!("error"), &Value::Null), "{frame}");
    }
}

/// Connections that nobody is behind.
async fn fill(hub: &Hub, caller: &str, count: usize) {
    for number in 0..count {
        let identity = Identity {
            caller: caller.to_owned(),
            scopes: Vec::new(),
            key_id: None,
            limits: Default::default(),
            expires_at: None,
        };
        let expires_at = chrono::Utc::now() + TimeDelta::hours(2);
        hub.open(&Connection { id: format!("{caller}-{number}"), identity, expires_at }).await.unwrap();
    }
}

#[tokio::test]
async fn one_caller_has_half_of_a_hosts_connections_at_most_and_a_full_host_uses_no_ticket_up() {
    let keyed = Keyed::start(&[]).await;
    let (http, url) = (&keyed.host.http, keyed.host.url.as_str());
    let (own, other) = (keyed.key_of("ward-1").await, keyed.key_of("ward-2").await);
    fill(&keyed.host.hub, "ward-1", 500).await;
    let first = ticket(http, url, &own).await.unwrap();
    let path = first["url"].as_str().unwrap();
    assert_eq!(open(url, path, &[]).await.err(), Some(429));
    let _socket = Socket::connect(http, url, &other).await;
    keyed.host.hub.close("ward-1-0").await.unwrap();
    // The ticket was not used up.
    let socket = open(url, path, &[]).await.unwrap();
    drop(socket);
    fill(&keyed.host.hub, "ward-3", 499).await;
    eventually("the host is nearly full", async || keyed.host.hub.len() == 999).await;
    fill(&keyed.host.hub, "ward-4", 1).await;
    let late = ticket(http, url, &other).await.unwrap();
    let path = late["url"].as_str().unwrap();
    assert_eq!(open(url, path, &[]).await.err(), Some(503));
    keyed.host.hub.close("ward-4-0").await.unwrap();
    open(url, path, &[]).await.unwrap();
}

#[tokio::test]
async fn a_ticket_acts_for_who_asked_for_it_whatever_else_is_sent_with_it() {
    let keyed = Keyed::start(&[]).await;
    let (http, url) = (&keyed.host.http, keyed.host.url.as_str());
    let (own, other) = (keyed.key_of("ward-1").await, keyed.key_of("ward-2").await);
    let id: Value = keyed.submit(&own).await.json().await.unwrap();
    let id = id["request_id"].as_str().unwrap();
    let path = ticket(http, url, &own).await.unwrap()["url"].as_str().unwrap().to_owned();
    let bearer = format!("Bearer {other}");
    let mut socket = open(url, &path, &[("authorization", &bearer)]).await.unwrap();
    socket.subscribe(id).await;
    assert!(socket.until_ended(id).await.is_some());
    let path = ticket(http, url, &other).await.unwrap()["url"].as_str().unwrap().to_owned();
    let bearer = format!("Bearer {own}");
    let mut socket = open(url, &path, &[("authorization", &bearer)]).await.unwrap();
    socket.subscribe(id).await;
    assert_eq!(socket.next().await.unwrap()["code"], "not_found");
}

#[tokio::test]
async fn what_is_not_understood_is_answered_and_what_is_too_large_ends_the_connection() {
    let host = Running::start(&[]).await;
    let mut socket = connect(&host).await;
    for (text, code) in [
        ("hello".to_owned(), "invalid_request"),
        (r#"{"action": "subscribe"}"#.to_owned(), "invalid_request"),
        (json!({"action": "ask", "prompt": "x".repeat(40_000)}).to_string(), "payload_too_large"),
    ] {
        socket.say(&text).await;
        let frame = socket.next().await.unwrap();
        assert_eq!((&frame["type"], &frame["code"]), (&json!("error"), &json!(code)), "{frame}");
    }
    socket.0.send(Message::Ping(b"are you there"[..].into())).await.unwrap();
    assert_eq!(socket.0.next().await.unwrap().unwrap(), Message::Pong(b"are you there"[..].into()));
    socket.say(&"x".repeat(200_000)).await;
    assert_eq!(socket.closed().await, Some(CloseCode::Size));
    let mut socket = connect(&host).await;
    socket.0.send(Message::binary(vec![1])).await.unwrap();
    assert_eq!(socket.closed().await, Some(CloseCode::Unsupported));
    eventually("both are forgotten", async || host.hub.is_empty()).await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_let_go_and_others_go_on() {
    let host = Running::start(&[]).await;
    let mut slow = connect(&host).await;
    let id = host.submit(&mole()).await;
    slow.subscribe(&id).await;
    // The answer is all that it reads.
    slow.next().await.unwrap();
    let followers = host.hub.subscribers(id.parse().unwrap()).await.unwrap();
    let mut quick = connect(&host).await;
    quick.subscribe(&id).await;
    quick.until_ended(&id).await.unwrap();
    // The system's buffers take some megabytes; behind them a bounded outbox fills up.
    let frame = "x".repeat(32 * 1024);
    let mut pushed = 0;
    while host.hub.push(&followers[0].connection, frame.clone()).await.unwrap() == Pushed::Sent {
        pushed += frame.len();
        assert!(pushed < 64 * 1024 * 1024, "it takes whatever comes");
        tokio::task::yield_now().await;
    }
    assert_eq!(host.hub.len(), 1);
    quick.send(json!({"action": "ping", "tag": "a"})).await;
    // The end may have been told a second time before it.
    let mut told = quick.next().await.unwrap();
    while told["type"] == "result" {
        told = quick.next().await.unwrap();
    }
    assert_eq!(told, json!({"v": 1, "type": "pong", "tag": "a"}));
    drop(slow);
}

#[tokio::test]
async fn a_page_from_elsewhere_opens_nothing_on_a_host_without_keys() {
    let host = Running::start(&[]).await;
    let path = ticket(&host.http, &host.url, "").await.unwrap()["url"].as_str().unwrap().to_owned();
    for headers in [
        [("origin", "https://attacker.example")],
        [("origin", "null")],
        [("origin", "http://127.0.0.1.attacker.example")],
        [("host", "attacker.example")],
    ] {
        assert_eq!(open(&host.url, &path, &headers).await.err(), Some(403), "{headers:?}");
    }
    let refused = host.http.post(format!("{}/socket-tickets", host.url)).header("origin", "https://attacker.example");
    assert_eq!(refused.send().await.unwrap().status().as_u16(), 403);
    // None of them has used the ticket up; a page of this machine may.
    open(&host.url, &path, &[("origin", "http://localhost:3000")]).await.unwrap();
}

#[tokio::test]
async fn a_host_that_stops_says_so_to_those_who_are_connected() {
    let host = Running::start(&[]).await;
    let mut socket = connect(&host).await;
    let (_, code) = tokio::join!(host.stop(), socket.closed());
    assert_eq!(code, Some(CloseCode::Away));
}

#[tokio::test]
async fn no_log_line_holds_a_ticket_a_prompt_or_an_answer() {
    let llm = LlmServer::start([]).await;
    llm.behave(Behaviour::Answer(ANSWER.into()));
    let (folder, base_url) = (tempfile::tempdir().unwrap(), llm.base_url());
    let settings = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("LOG_LEVEL", "trace")];
    let host = Process::start(folder.path(), &settings).await.unwrap();
    let http = client();
    let ticket = ticket(&http, &host.url, "").await.unwrap();
    let mut socket = open(&host.url, ticket["url"].as_str().unwrap(), &[]).await.unwrap();
    let (_, frame) = asked(&mut socket, question()).await;
    assert_eq!(frame["type"], "result");
    let id = frame["request_id"].as_str().unwrap();
    let is_about_job = |line: &String| line.contains(id);
    eventually("the message is in the log", async || host.log().iter().any(|line| line.contains("message answered")))
        .await;
    for _ in 0..3 {
        socket.send(json!({"action": "ping"})).await;
        assert_eq!(socket.next().await.unwrap()["type"], "pong");
    }
    let log = host.log();
    assert!(log.iter().any(is_about_job), "{log:?}");
    let answered = log.iter().filter(|line| line.contains("message answered")).count();
    assert_eq!(answered, 1, "a line for each ping");
    for secret in [ticket["ticket"].as_str().unwrap(), "What is a naevus", "pigment cells"] {
        let found: Vec<_> = log.iter().filter(|line| line.contains(secret)).collect();
        assert!(found.is_empty(), "{secret}: {found:?}");
    }
}
