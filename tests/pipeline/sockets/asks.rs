//! Prompts over a WebSocket: their answers as they are written, whole, in pieces, and not at all.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use shared::embedded::Hub;
use shared::error::Error;
use shared::ports::{JobStore, Push, Pushed};
use socket::Event;

use super::{ANSWER, asked, connect, fill, question};
use crate::support::llm_server::{Behaviour, Ending, LlmServer, chunks};
use crate::support::{Running, standing};

#[tokio::test]
async fn an_answer_comes_as_it_is_written_and_then_whole() {
    let mut pieces = chunks(ANSWER);
    pieces.push("data: [DONE]\n\n".to_owned());
    let llm = LlmServer::start([Behaviour::Stream(pieces, Ending::Close)]).await;
    let host = Running::asking(&llm, &[]).await;
    let mut socket = connect(&host).await;
    let (told, frame) = asked(&mut socket, question()).await;
    assert_eq!(told.text(), ANSWER);
    // A dozen words that come within 250 ms go out together.
    assert_eq!((told.frames, told.claim), (1, 1));
    assert_eq!((&frame["type"], &frame["result"]["content"]), (&json!("result"), &json!(ANSWER)), "{frame}");
    assert_eq!(frame["result"]["token_usage"], json!({"prompt_tokens": 19, "completion_tokens": 10}));
    assert_eq!(llm.requests()[0].1["stream"], true);
    assert_eq!(frame["result"], host.result(frame["request_id"].as_str().unwrap()).await);
}

#[tokio::test]
async fn no_more_text_is_told_of_an_answer_that_was_deleted() {
    let llm = LlmServer::start([Behaviour::Slow(Duration::from_millis(100), ANSWER.repeat(4))]).await;
    let host = Running::asking(&llm, &[]).await;
    let mut socket = connect(&host).await;
    socket.send(question()).await;
    let mut frame = socket.next().await.unwrap();
    while frame["type"] != "text" {
        frame = socket.next().await.unwrap();
    }
    let id = frame["request_id"].as_str().unwrap();
    host.http.delete(format!("{}/result/{id}", host.url)).send().await.unwrap().error_for_status().unwrap();
    while frame["type"] != "deleted" {
        frame = socket.next().await.unwrap();
    }
    // The server writes for seconds yet.
    tokio::time::sleep(Duration::from_secs(2)).await;
    socket.send(json!({"action": "ping"})).await;
    let mut later = Vec::new();
    while frame["type"] != "pong" {
        frame = socket.next().await.unwrap();
        later.push(frame["type"].as_str().unwrap().to_owned());
    }
    // One piece may have been on its way.
    let texts = later.iter().filter(|kind| *kind == "text").count();
    assert!(texts <= 1, "{later:?}");
}

#[tokio::test]
async fn a_second_attempt_takes_the_place_of_what_the_first_one_wrote() {
    for ending in [Ending::CutOff, Ending::Stall] {
        let begun = chunks("A growth that nobody will hear the end of.")[..5].to_vec();
        let llm = LlmServer::start([Behaviour::Stream(begun, ending)]).await;
        llm.behave(Behaviour::Answer(ANSWER.into()));
        let host = Running::asking(&llm, &[("PROMPT_LEASE_SECONDS", "3"), ("REDISPATCH_SECONDS", "1")]).await;
        let mut socket = connect(&host).await;
        let (told, frame) = asked(&mut socket, question()).await;
        // Not the same try again, which would write the same text twice under one claim.
        assert_eq!((told.frames, told.claim, llm.calls()), (2, 2, 2), "{ending:?}");
        assert_eq!((told.text().as_str(), &frame["result"]["content"]), (ANSWER, &json!(ANSWER)), "{ending:?}");
    }
}

#[tokio::test]
async fn an_answer_that_is_whole_is_taken_however_its_connection_ends() {
    let whole = chunks(ANSWER);
    let done = [whole.clone(), vec!["data: [DONE]\n\n".to_owned()]].concat();
    for (pieces, ending) in
        [(&done, Ending::CutOff), (&done, Ending::Stall), (&whole, Ending::CutOff), (&whole, Ending::Stall)]
    {
        let llm = LlmServer::start([Behaviour::Stream(pieces.clone(), ending)]).await;
        let host = Running::asking(&llm, &[]).await;
        let (told, frame) = asked(&mut connect(&host).await, question()).await;
        assert_eq!((told.text().as_str(), &frame["result"]["content"]), (ANSWER, &json!(ANSWER)), "{ending:?}");
        assert_eq!(llm.calls(), 1, "{ending:?}: it was paid for again");
    }
}

#[tokio::test]
async fn an_error_within_a_stream_and_one_that_just_ends_are_no_answers() {
    let error = vec!["data: {\"error\": {\"message\": \"upstream says no\"}}\n\n".to_owned()];
    let ended = chunks("A growth that")[..3].to_vec();
    for pieces in [error, ended] {
        let llm = LlmServer::start([Behaviour::Stream(pieces.clone(), Ending::Close)]).await;
        llm.behave(Behaviour::Answer(ANSWER.into()));
        let host = Running::asking(&llm, &[]).await;
        let (told, frame) = asked(&mut connect(&host).await, question()).await;
        assert_eq!((told.text().as_str(), &frame["result"]["content"]), (ANSWER, &json!(ANSWER)), "{pieces:?}");
        assert_eq!(llm.calls(), 2);
    }
}

#[tokio::test]
async fn a_server_that_knows_no_streams_is_told_in_one_piece_and_json_not_before_its_end() {
    let llm = LlmServer::start([Behaviour::Late(Duration::ZERO, ANSWER.into())]).await;
    let host = Running::asking(&llm, &[]).await;
    let (told, frame) = asked(&mut connect(&host).await, question()).await;
    assert_eq!((told.text().as_str(), &frame["result"]["content"]), (ANSWER, &json!(ANSWER)));
    llm.behave(Behaviour::Answer("{}".into()));
    let wish = json!({"action": "ask", "prompt": "As JSON.", "format": "json", "tag": "7"});
    let (told, frame) = asked(&mut connect(&host).await, wish).await;
    assert_eq!((told.frames, &frame["result"]["content"]), (0, &json!("{}")), "{frame}");
}

#[tokio::test]
async fn an_answer_that_fits_into_no_frame_comes_in_pieces_and_is_fetched_at_the_end() {
    // The second is more than a client's outbox holds: its text may be left out, and its client is kept.
    for (times, is_told) in [(3_000, true), (40_000, false)] {
        let answer = "Pigment cells é 🩺. ".repeat(times);
        let llm = LlmServer::start([]).await;
        llm.behave(Behaviour::Answer(answer.clone()));
        let host = Running::asking(&llm, &[]).await;
        let mut socket = connect(&host).await;
        let (told, frame) = asked(&mut socket, question()).await;
        if is_told {
            assert!(told.frames > 10, "{}", told.frames);
            assert!(told.text() == answer);
        }
        assert_eq!(frame["type"], "result_elsewhere", "{frame}");
        let result: Value = host.get(frame["location"].as_str().unwrap()).await.json().await.unwrap();
        assert!(result["content"] == answer);
    }
}

#[tokio::test]
async fn the_same_prompt_under_the_same_key_is_asked_once() {
    let llm = LlmServer::start([]).await;
    llm.behave(Behaviour::Answer(ANSWER.into()));
    let host = Running::asking(&llm, &[]).await;
    let mut message = question();
    message["idempotency_key"] = "once".into();
    let (_, first) = asked(&mut connect(&host).await, message.clone()).await;
    let mut socket = connect(&host).await;
    let (_, again) = asked(&mut socket, message.clone()).await;
    assert_eq!((&again, llm.calls()), (&first, 1));
    message["prompt"] = "Another?".into();
    socket.send(message).await;
    assert_eq!(socket.next().await.unwrap()["code"], "idempotency_conflict");
}

/// The way to clients, on which frames of one kind are lost.
struct Lossy {
    hub: Hub,
    lost: &'static str,
}

impl Push for Lossy {
    async fn push(&self, connection: &str, frame: String) -> Result<Pushed, Error> {
        if serde_json::from_str::<Value>(&frame).unwrap()["type"] == self.lost {
            return Err(Error::unavailable("the connection", "throttled"));
        }
        self.hub.push(connection, frame).await
    }
}

#[tokio::test]
async fn an_error_names_the_prompt_that_was_made_before_it_and_none_where_none_was() {
    let (_folder, _, host) = standing(&[]).await;
    for (caller, lost, has_llm, code) in [
        ("ward-1", "accepted", true, "unavailable"),
        ("ward-2", "status", true, "unavailable"),
        ("ward-3", "accepted", false, "llm_not_configured"),
    ] {
        fill(&host.hub, caller, 1).await;
        let connection = format!("{caller}-0");
        let mut outbox = host.hub.outbox(&connection).unwrap();
        let socket = socket::Socket {
            jobs: host.store.clone(),
            queue: host.queue.clone(),
            blobs: host.blobs.clone(),
            access: Arc::clone(&host.access),
            connections: host.hub.clone(),
            push: Lossy { hub: host.hub.clone(), lost },
            clock: host.clock.clone(),
            policy: host.config.policy,
            max_queued_bytes: host.config.max_queued_bytes,
            has_llm,
        };
        socket.handle(Event::Message { connection, text: question().to_string() }).await.unwrap();
        let frame = loop {
            let next = tokio::time::timeout(Duration::from_secs(60), outbox.next()).await;
            let frame: Value = serde_json::from_str(&next.expect("no error is told").unwrap()).unwrap();
            if frame["type"] == "error" {
                break frame;
            }
        };
        assert_eq!((&frame["code"], &frame["tag"]), (&json!(code), &json!("7")), "{frame}");
        let made: Vec<_> = host.store.list(caller, None, 10).await.unwrap().records.iter().map(|job| job.id).collect();
        assert_eq!(made.len(), usize::from(has_llm), "{caller}");
        assert_eq!(frame["request_id"], json!(made.first()), "{caller}: who is not told of it asks the LLM again");
    }
}
