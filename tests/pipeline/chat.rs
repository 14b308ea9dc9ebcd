//! Conversations with an LLM that misbehaves.

use std::time::Duration;

use reqwest::Response;
use serde_json::{Value, json};

use crate::support::llm_server::{Behaviour, LlmServer, completion};
use crate::support::{LLM_KEY, Running, eventually};

const QUESTION: &str = "What is a naevus?";
/// Of what the LLM's server answers, so much is read.
const MAX_ANSWER_BYTES: usize = 5 * 1024 * 1024 / 2;

fn conversation() -> Value {
    json!({"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}]})
}

async fn ask(host: &Running, body: &Value) -> Response {
    host.http.post(format!("{}/chat", host.url)).json(body).send().await.unwrap()
}

async fn refusal(response: Response) -> (u16, String) {
    let status = response.status().as_u16();
    let body: Value = response.json().await.unwrap();
    assert!(!body.to_string().contains(QUESTION) && !body.to_string().contains(LLM_KEY), "{body}");
    (status, body["error"]["code"].as_str().unwrap().to_owned())
}

#[tokio::test]
async fn an_answer_comes_whole_with_what_it_took() {
    let llm = LlmServer::start([Behaviour::Answer("A growth of pigment cells.".into())]).await;
    let host = Running::asking(&llm, &[]).await;
    let response = ask(&host, &conversation()).await;
    assert_eq!(response.status(), 200);
    let exchange = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let mut answer: Value = response.json().await.unwrap();
    assert!(answer.as_object_mut().unwrap().remove("latency_ms").unwrap().is_u64());
    let expected = json!({
        "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
        "model": "gpt-4.1-2025-04-14",
        "content": "A growth of pigment cells.",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 19, "completion_tokens": 10},
        "request_id": exchange,
    });
    assert_eq!(answer, expected);
}

#[tokio::test]
async fn an_answer_of_a_megabyte_comes_whole_and_one_that_is_longer_than_is_read_is_refused_at_once() {
    let llm = LlmServer::start([]).await;
    let host = Running::asking(&llm, &[]).await;
    // Letters of one, two and four bytes, and what JSON writes with two.
    let megabyte = "A \"naevus\" é 🩺.\n".repeat(1024 * 1024 / 20 + 1);
    assert!(megabyte.len() > 1024 * 1024);
    let longest = "x".repeat(MAX_ANSWER_BYTES - completion("").to_string().len());
    for content in [&megabyte, &longest] {
        llm.script([Behaviour::Answer(content.clone())]);
        let response = ask(&host, &conversation()).await;
        assert_eq!(response.status(), 200, "{} bytes", content.len());
        let answer: Value = response.json().await.unwrap();
        assert!(answer["content"] == content.as_str(), "{} bytes are not what was said", content.len());
    }
    llm.script([Behaviour::Answer(longest + "x")]);
    assert_eq!(refusal(ask(&host, &conversation()).await).await, (502, "llm_invalid_response".to_owned()));
    assert_eq!(llm.calls(), 3, "it is not asked for once more");
}

#[tokio::test]
async fn the_llm_gets_the_conversation_with_the_hosts_key_model_and_defaults() {
    let llm = LlmServer::start([]).await;
    let host = Running::asking(&llm, &[("LLM_MAX_TOKENS", "321"), ("LLM_TEMPERATURE", "0.25")]).await;
    ask(&host, &conversation()).await;
    let mut wishes = conversation();
    wishes["temperature"] = json!(0);
    wishes["max_tokens"] = json!(7);
    ask(&host, &wishes).await;
    let [(headers, plain), (_, wished)] = &llm.requests()[..] else { panic!("two requests") };
    assert_eq!(headers["authorization"], format!("Bearer {LLM_KEY}"));
    let expected = json!({
        "model": "tiny", "max_tokens": 321, "temperature": 0.25, "messages": conversation()["messages"],
    });
    assert_eq!(plain, &expected);
    assert_eq!((&wished["max_tokens"], wished["temperature"].as_f64()), (&json!(7), Some(0.0)));
}

#[tokio::test]
async fn passing_trouble_is_tried_again_before_the_caller_hears_of_it() {
    for trouble in [Behaviour::Status(500, None), Behaviour::Status(429, Some(1)), Behaviour::CutOff] {
        let llm = LlmServer::start([trouble.clone()]).await;
        let host = Running::asking(&llm, &[]).await;
        assert_eq!(ask(&host, &conversation()).await.status(), 200, "{trouble:?}");
        assert_eq!(llm.calls(), 2, "{trouble:?}");
    }
}

#[tokio::test]
async fn lasting_trouble_has_a_status_and_a_code_of_its_own() {
    let table = [
        (Behaviour::Status(500, None), 502, "llm_unavailable", 3),
        (Behaviour::CutOff, 502, "llm_unavailable", 3),
        (Behaviour::Status(429, Some(600)), 502, "llm_rate_limited", 1),
        (Behaviour::Status(400, None), 502, "llm_refused", 1),
        (Behaviour::Status(401, None), 502, "llm_refused", 1),
        (Behaviour::Body("<html>no JSON at all</html>"), 502, "llm_invalid_response", 1),
        (Behaviour::Body(r#"{"choices": []}"#), 502, "llm_invalid_response", 1),
        (Behaviour::Stall, 504, "llm_timeout", 3),
    ];
    for (behaviour, status, code, calls) in table {
        let llm = LlmServer::start([]).await;
        llm.behave(behaviour.clone());
        let host = Running::asking(&llm, &[("LLM_TIMEOUT_SECONDS", "3")]).await;
        let response = ask(&host, &conversation()).await;
        let wait = response.headers().get("retry-after").map(|wait| wait.to_str().unwrap().to_owned());
        assert_eq!(wait.as_deref(), (code == "llm_rate_limited").then_some("600"), "{behaviour:?}");
        assert_eq!(refusal(response).await, (status, code.to_owned()), "{behaviour:?}");
        assert_eq!(llm.calls(), calls, "{behaviour:?}");
    }
}

#[tokio::test]
async fn what_is_no_conversation_is_refused_before_the_llm_is_asked() {
    let llm = LlmServer::start([]).await;
    let host = Running::asking(&llm, &[]).await;
    let huge = json!({"messages": [{"role": "user", "content": "x".repeat(1024 * 1024)}]});
    for (body, status, code) in [
        (json!({"messages": []}), 400, "invalid_request"),
        (json!({"messages": [{"role": "tool", "content": QUESTION}]}), 400, "invalid_request"),
        (huge, 413, "payload_too_large"),
    ] {
        assert_eq!(refusal(ask(&host, &body).await).await, (status, code.to_owned()));
    }
    let text = host.http.post(format!("{}/chat", host.url)).body(QUESTION).send().await.unwrap();
    assert_eq!(refusal(text).await, (415, "unsupported_media_type".to_owned()));
    assert_eq!(llm.calls(), 0);
}

#[tokio::test]
async fn a_host_without_an_llm_says_so() {
    let host = Running::start(&[]).await;
    assert_eq!(refusal(ask(&host, &conversation()).await).await, (404, "llm_not_configured".to_owned()));
}

#[tokio::test]
async fn a_caller_who_leaves_ends_the_call() {
    let llm = LlmServer::start([]).await;
    llm.behave(Behaviour::Stall);
    let host = Running::asking(&llm, &[("LLM_TIMEOUT_SECONDS", "1")]).await;
    let request = host.http.post(format!("{}/chat", host.url)).json(&conversation());
    assert!(request.timeout(Duration::from_millis(500)).send().await.is_err());
    eventually("the call has arrived", async || llm.calls() == 1).await;
    // Three tries would have been made by then, were anybody still waiting.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(llm.calls(), 1);
}
