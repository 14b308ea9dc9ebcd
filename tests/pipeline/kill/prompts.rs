//! Prompts, over HTTP and a WebSocket, and completions.

use chrono::{TimeDelta, Utc};
use reqwest::Client;
use shared::api::admin::KeyLimits;
use shared::crash::Point;
use shared::embedded::SqliteCallers;
use shared::ports::Callers;

use super::{CHAT, ENRICHMENT_RETRY, PROMPT, SOCKET, SUBMIT_PROMPT, Scene, hurry, long_answer};
use crate::support::llm_server::Behaviour;
use crate::support::websocket::{Told, open as open_socket, ticket};

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_a_prompt_loses_and_doubles_nothing() {
    for &point in SUBMIT_PROMPT {
        let scene = Scene::new([]).await;
        scene.llm.behave(Behaviour::Answer(long_answer()));
        scene.start(None).await.kill().await;
        let mut host = scene.start(Some(point)).await;
        assert!(scene.ask(&host, "key").await.is_err(), "{}: the answer came before the kill", point.name());
        host.killed().await;
        scene.recover_prompt("key", point).await;
        assert_eq!(scene.llm.calls(), 1, "{}", point.name());
    }
    // The second blob after the first start's is the answer.
    let second_blob = (Point::BlobWritten, "blobs.written_before_rename:2");
    for (point, crash_at) in PROMPT.iter().map(|point| (*point, point.name())).chain([second_blob]) {
        let scene = Scene::new([]).await;
        scene.llm.behave(Behaviour::Answer(long_answer()));
        scene.start(None).await.kill().await;
        let mut host = scene.start_with(None, &[("CRASH_AT", crash_at)]).await.unwrap();
        let _ = scene.ask(&host, "key").await;
        host.killed().await;
        scene.recover_prompt("key", point).await;
        // Only an answer whose commit was cut off is asked for again.
        let again = [Point::EnrichmentAnswered, Point::EnrichmentAnswerStored, Point::BlobWritten].contains(&point);
        assert_eq!(scene.llm.calls(), if again { 2 } else { 1 }, "{}", point.name());
    }
    for &point in ENRICHMENT_RETRY {
        let scene = Scene::new([const { Behaviour::Status(503, Some(700)) }]).await;
        scene.llm.behave(Behaviour::Answer(long_answer()));
        let mut host = scene.start(Some(point)).await;
        let _ = scene.ask(&host, "key").await;
        host.killed().await;
        // The server's 700 s are up in the record, not in this test.
        hurry(scene.data());
        scene.recover_prompt("key", point).await;
        assert_eq!(scene.llm.calls(), 2, "{}", point.name());
    }
    println!("prompts: killed at {} points", SUBMIT_PROMPT.len() + PROMPT.len() + 1 + ENRICHMENT_RETRY.len());
}

/// Opens a WebSocket, asks under a key, and reads to the end; `None` where the host is gone before.
async fn ask_over_socket(http: &Client, url: &str, key: &str) -> Option<(Told, serde_json::Value)> {
    let ticket = ticket(http, url, "").await.ok()?;
    let mut socket = open_socket(url, ticket["url"].as_str()?, &[]).await.ok()?;
    socket.send(serde_json::json!({"action": "ask", "prompt": "What is a naevus?", "idempotency_key": key})).await;
    let mut told = Told::default();
    loop {
        let frame = socket.next().await?;
        match frame["type"].as_str()? {
            "text" => told.add(&frame),
            "accepted" | "status" => {}
            _ => return Some((told, frame)),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_steps_of_a_websocket_loses_and_doubles_nothing() {
    const ANSWER: &str = "A growth of pigment cells.";
    for &point in SOCKET {
        let scene = Scene::new([]).await;
        scene.llm.behave(Behaviour::Answer(ANSWER.into()));
        let mut host = scene.start(Some(point)).await;
        // The end of the connection may come before or after the kill.
        let _ = ask_over_socket(&scene.http, &host.url, "key").await;
        host.killed().await;
        // A client comes again, and asks again under its key.
        let host = scene.start(None).await;
        let (_, frame) = ask_over_socket(&scene.http, &host.url, "key").await.unwrap();
        let shown = (&frame["type"], &frame["result"]["content"]);
        assert_eq!(shown, (&serde_json::json!("result"), &serde_json::json!(ANSWER)), "{}: {frame}", point.name());
        let id = frame["request_id"].as_str().unwrap().to_owned();
        // From the record on enrichment works beside, and its answer may be cut off.
        let before =
            [Point::SocketTicketWritten, Point::SocketTicketTaken, Point::SocketOpened, Point::SubmitPromptStored];
        let again = if before.contains(&point) { 1..=1 } else { 1..=2 };
        assert!(again.contains(&scene.llm.calls()), "{}: {} calls", point.name(), scene.llm.calls());
        scene.settled(host, &[id], point).await;
    }
    println!("sockets: killed at {} points", SOCKET.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_around_a_completion_leaves_what_it_took_or_a_reservation_that_falls_due() {
    for &point in CHAT {
        let scene = Scene::new([]).await;
        let admin = crate::support::keyed::init(scene.data(), false).await.unwrap();
        let id = admin.split('_').nth(1).unwrap();
        let mut host = scene.start(Some(point)).await;
        let body = serde_json::json!({"model": "m", "messages": [], "max_tokens": 20});
        let request = scene.http.post(format!("{}/v1/chat/completions", host.url)).bearer_auth(&admin).json(&body);
        // The answer may be there before its settlement.
        let _ = request.send().await;
        host.killed().await;
        let host = scene.start(None).await;
        let usage = scene.http.get(format!("{}/admin/keys/{id}/usage", host.url)).bearer_auth(&admin).send().await;
        let usage: serde_json::Value = usage.unwrap().json().await.unwrap();
        host.kill().await;
        let callers = SqliteCallers::open(&scene.data().join("callers.sqlite")).unwrap();
        let mut account = callers.find_account(id).await.unwrap();
        account.refill(&KeyLimits::default(), Utc::now() + TimeDelta::minutes(21));
        let month = *account.months.values().next().unwrap();
        let (calls, under_way, estimated, completion_tokens) = match point {
            Point::ChatReserved => (0, 1, 1, 20),
            _ => (1, 0, 0, 10),
        };
        assert_eq!((scene.llm.calls(), usage["under_way"].as_u64()), (calls, Some(under_way)), "{}", point.name());
        assert_eq!((month.requests, month.estimated_requests), (1, estimated), "{}", point.name());
        assert_eq!((month.completion_tokens, account.under_way()), (completion_tokens, 0), "{}", point.name());
    }
    println!("chat: killed at {} points", CHAT.len());
}
