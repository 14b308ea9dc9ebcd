//! Prompt jobs: from `POST /submit` to the LLM's answer, however long it takes and whatever goes wrong.

use std::path::Path;
use std::time::Duration;

use reqwest::Response;
use serde_json::{Value, json};
use shared::embedded::SqliteJobStore;
use shared::job::{Job, Record, blob_prefix};
use shared::ports::JobStore;

use crate::support::llm_server::{Behaviour, HONEST, LlmServer, explanation};
use crate::support::process::Process;
use crate::support::{Running, client, ended, eventually, mole, within};

const KEY: &str = "sk-test-0123456789";
const QUESTION: &str = "What is a naevus?";
const ANSWER: &str = "A growth of pigment cells.";

async fn host(llm: &LlmServer, extra: &[(&str, &str)]) -> Running {
    let base_url = llm.base_url();
    let mut settings = vec![
        ("LLM_BASE_URL", base_url.as_str()),
        ("LLM_MODEL", "tiny"),
        ("LLM_API_KEY", KEY),
        ("BACKOFF_SECONDS", "1"),
    ];
    settings.extend_from_slice(extra);
    Running::start(&settings).await
}

async fn post(host: &Running, body: &Value) -> Response {
    host.http.post(format!("{}/submit", host.url)).json(body).send().await.unwrap()
}

async fn accepted(response: Response) -> String {
    let (status, body) = (response.status(), response.json::<Value>().await.unwrap());
    assert_eq!((status.as_u16(), &body["status"]), (202, &json!("awaiting_description")), "{body}");
    body["request_id"].as_str().unwrap().to_owned()
}

async fn ask(host: &Running, body: &Value) -> String {
    accepted(post(host, body).await).await
}

async fn answered(
    script: impl IntoIterator<Item = Behaviour>,
    body: &Value,
    extra: &[(&str, &str)],
) -> (Value, LlmServer) {
    let llm = LlmServer::start(script).await;
    let host = host(&llm, extra).await;
    let id = ask(&host, body).await;
    (host.ended(&id).await, llm)
}

fn question() -> Value {
    json!({"prompt": QUESTION})
}

async fn job(data: &Path, id: &str) -> Job {
    let store = SqliteJobStore::open(&data.join("jobs.sqlite")).unwrap();
    store.get(id.parse().unwrap()).await.unwrap().and_then(Record::into_job).unwrap()
}

#[tokio::test]
async fn an_answer_comes_with_what_it_took_and_without_a_photos_fields() {
    let prices = [("LLM_PROMPT_USD_PER_MILLION", "1"), ("LLM_COMPLETION_USD_PER_MILLION", "4")];
    let (mut result, llm) = answered([Behaviour::Answer(ANSWER.into())], &question(), &prices).await;
    for moment in ["created_at", "updated_at", "request_id", "disclaimer"] {
        assert!(result.as_object_mut().unwrap().remove(moment).unwrap().is_string(), "{moment}");
    }
    assert!(result.as_object_mut().unwrap().remove("latency_ms").unwrap().is_u64());
    let timings = result.as_object_mut().unwrap().remove("timings_ms").unwrap();
    assert_eq!(timings.as_object().unwrap().keys().collect::<Vec<_>>(), ["queued", "total"]);
    let expected = json!({
        "status": "completed",
        "kind": "prompt",
        "content": ANSWER,
        "finish_reason": "stop",
        "token_usage": {"prompt_tokens": 19, "completion_tokens": 10},
        "cost_usd": 59e-6,
        "error": null,
    });
    assert_eq!(result, expected);
    assert_eq!(llm.calls(), 1);
}

#[tokio::test]
async fn the_llm_gets_the_messages_with_the_hosts_key_model_and_defaults() {
    let llm = LlmServer::start([]).await;
    let host = host(&llm, &[("LLM_MAX_TOKENS", "321"), ("LLM_TEMPERATURE", "0.25")]).await;
    let user = json!({"role": "user", "content": QUESTION});
    let short = json!({"role": "system", "content": "Be short."});
    for (body, messages) in [
        (question(), json!([user])),
        (json!({"prompt": QUESTION, "system": "Be short.", "max_tokens": 7, "temperature": 0}), json!([short, user])),
        (json!({"messages": [user], "system": "Be short.", "format": "text"}), json!([short, user])),
    ] {
        let id = ask(&host, &body).await;
        host.ended(&id).await;
        let (headers, sent) = llm.requests().pop().unwrap();
        assert_eq!(headers["authorization"], format!("Bearer {KEY}"));
        let wished = body["max_tokens"].is_number();
        let (max_tokens, temperature) = if wished { (7, 0.0) } else { (321, 0.25) };
        let expected =
            json!({"model": "tiny", "max_tokens": max_tokens, "temperature": temperature, "messages": messages});
        assert_eq!(sent, expected);
    }
}
