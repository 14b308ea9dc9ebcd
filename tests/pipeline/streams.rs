//! Streams below `/v1/` whose server, client or store falls silent in the middle.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::proxy::{ask, asked, host_of, models_file};
use crate::support::keyed::Keyed;
use crate::support::llm_server::{Behaviour, Ending, LlmServer, chunks};
use crate::support::within;

const HEARTBEAT: &str = ": waiting for the model\n\n";

/// What a client hears, in pieces that belong together.
async fn heard(behaviour: Behaviour, until: &str) -> String {
    let llm = LlmServer::start([]).await;
    llm.behave(behaviour);
    let host = host_of(&json!({"fast": {"base_url": llm.base_url(), "timeout_seconds": 60}})).await;
    let mut response = ask(&host, &asked(true)).await;
    assert_eq!(response.status(), 200);
    let mut text = String::new();
    while !text.ends_with(until)
        && let Some(piece) = response.chunk().await.unwrap()
    {
        text.push_str(str::from_utf8(&piece).unwrap());
    }
    text
}

#[tokio::test]
async fn a_client_hears_of_a_silent_model_before_the_first_piece_and_between_two() {
    let pieces = chunks("A growth.")[..2].to_vec();
    let expected = format!("{HEARTBEAT}{}{HEARTBEAT}{}", pieces[0], pieces[1]);
    let text = heard(Behaviour::Paced(Duration::from_secs(11), pieces.clone(), Ending::Stall), &pieces[1]).await;
    assert_eq!(text, expected);
}

#[tokio::test]
async fn what_a_server_says_to_keep_its_own_line_open_keeps_no_heartbeat_from_the_client() {
    // Three comments, of which clients hear nothing, in each pause between two heartbeats.
    let pieces = [vec![chunks("A growth.")[0].clone()], vec![": still here\n\n".to_owned(); 9]].concat();
    let expected = format!("{}{HEARTBEAT}{HEARTBEAT}", pieces[0]);
    let behaviour = Behaviour::Paced(Duration::from_secs(3), pieces, Ending::Close);
    let text = heard(behaviour, &format!("{HEARTBEAT}{HEARTBEAT}")).await;
    assert_eq!(text, expected);
}

#[tokio::test]
async fn a_server_that_falls_silent_behind_the_end_of_its_answer_is_not_waited_for() {
    let mut pieces = chunks("A growth.");
    pieces.pop();
    let expected = format!("{}data: [DONE]\n\n", pieces.concat());
    let text = heard(Behaviour::Stream(pieces, Ending::Stall), "[DONE]\n\n").await;
    assert_eq!(text, expected, "with a heartbeat every ten seconds of a minute");
}

#[tokio::test]
async fn a_failure_behind_a_heartbeat_is_an_event() {
    let error = r#"data: {"error": {"message": "overloaded", "code": 503}}"#;
    // Each of the two tries.
    let behaviour = Behaviour::Paced(Duration::from_secs(11), vec![format!("{error}\n\n")], Ending::Close);
    let text = heard(behaviour, "[DONE]\n\n").await;
    let rest = text.trim_start_matches(HEARTBEAT);
    assert!(text.starts_with(HEARTBEAT) && !text.contains("[DONE]"), "{text}");
    let error: Value = serde_json::from_str(rest.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "llm_unavailable");
}

#[tokio::test]
async fn an_answer_of_a_server_without_streams_that_comes_behind_a_heartbeat_is_a_chunk() {
    let text = heard(Behaviour::Late(Duration::from_secs(11), "A growth.".into()), "[DONE]\n\n").await;
    let chunk = text.strip_prefix(HEARTBEAT).unwrap().strip_suffix("data: [DONE]\n\n").unwrap();
    let chunk: Value = serde_json::from_str(chunk.strip_prefix("data: ").unwrap()).unwrap();
    let choice = &chunk["choices"][0];
    assert_eq!((&chunk["object"], &choice["delta"]["content"]), (&json!("chat.completion.chunk"), &json!("A growth.")));
    assert_eq!((&choice["finish_reason"], choice.get("message"), chunk.get("usage")), (&json!("stop"), None, None));
}

#[tokio::test]
async fn no_model_stands_in_behind_the_first_piece() {
    let (first, second) = (LlmServer::start([]).await, LlmServer::start([]).await);
    let begun = chunks("A growth.")[..2].to_vec();
    first.behave(Behaviour::Stream(begun.clone(), Ending::CutOff));
    let models = json!({
        "fast": {"base_url": first.base_url(), "fallback": "sure"},
        "sure": {"base_url": second.base_url()},
    });
    let host = host_of(&models).await;
    let text = ask(&host, &asked(true)).await.text().await.unwrap();
    assert!(text.starts_with(&begun.concat()) && text.contains("llm_unavailable"), "{text}");
    assert_eq!((first.calls(), second.calls()), (1, 0));
}

/// A host with a key of the caller `ward`, and the usage of that key.
struct Metered {
    host: Keyed,
    id: String,
    key: String,
}

impl Metered {
    async fn start(llm: &LlmServer) -> Self {
        let (_folder, path) = models_file(&json!({"fast": {"base_url": llm.base_url(), "timeout_seconds": 60}}));
        let host = Keyed::start(&[("LLM_MODELS_FILE", &path)]).await;
        let made = host.make(json!({"caller": "ward", "tokens_per_minute": 1_000_000})).await;
        let text = |name: &str| made[name].as_str().unwrap().to_owned();
        Self { id: text("id"), key: text("key"), host }
    }

    async fn usage(&self) -> Value {
        self.host.get(&format!("/admin/keys/{}/usage", self.id), &self.host.admin).await.json().await.unwrap()
    }

    /// Requests, completion tokens and how many of the requests are estimated, once nothing is under way.
    async fn settled(&self, limit: Duration) -> (u64, u64, u64) {
        let mut usage = Value::Null;
        within(limit, "everything is settled", async || {
            usage = self.usage().await;
            usage["under_way"] == 0
        })
        .await;
        let of = |name: &str| usage["months"][0][name].as_u64().unwrap();
        (of("requests"), of("completion_tokens"), of("estimated_requests"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stays_and_reads_no_more_is_left_and_what_it_took_is_settled() {
    let llm = LlmServer::start([]).await;
    // More than all buffers on the way hold.
    let piece = format!("data: {}\n\n", json!({"choices": [{"index": 0, "delta": {"content": "x".repeat(64_000)}}]}));
    llm.behave(Behaviour::Stream(vec![piece; 500], Ending::Stall));
    let scene = Metered::start(&llm).await;
    let address = scene.host.host.url.strip_prefix("http://").unwrap().to_owned();
    let mut client = TcpStream::connect(&address).await.unwrap();
    let body = asked(true).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n",
        scene.key,
        body.len()
    );
    client.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let mut begun = [0; 1000];
    client.read_exact(&mut begun).await.unwrap();
    assert!(begun.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&begun));
    assert_eq!(scene.usage().await["under_way"], 1);
    let (requests, tokens, estimated) = scene.settled(Duration::from_secs(60)).await;
    assert!(requests == 1 && estimated == 1 && tokens > 1000, "{requests} {tokens} {estimated}");
    drop(client);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_is_locked_when_an_answer_ends_is_settled_when_it_is_free() {
    let llm = LlmServer::start([Behaviour::Slow(Duration::from_secs(1), "A growth of cells.".into())]).await;
    let scene = Metered::start(&llm).await;
    let request = scene.host.request(Method::POST, "/v1/chat/completions", &scene.key).json(&asked(true));
    let mut response = request.send().await.unwrap();
    response.chunk().await.unwrap();
    let other = rusqlite::Connection::open(scene.host.host.folder.path().join("callers.sqlite")).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    while response.chunk().await.unwrap().is_some() {}
    // Longer than a write waits for a lock.
    tokio::time::sleep(Duration::from_millis(5_500)).await;
    other.execute_batch("ROLLBACK").unwrap();
    assert_eq!(scene.settled(Duration::from_secs(20)).await, (1, 10, 0));
}
