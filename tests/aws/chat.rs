//! Conversations through the function's own address, as Terraform has put it there.
//!
//! The emulator gives each answer in one piece, and lets everybody invoke the function through its
//! address once the first of the two rights is there.

use std::time::Instant;

use futures_util::future::join_all;
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::lambda::Lambda;
use crate::llm_server::{Behaviour, HONEST, explanation};
use crate::pipeline::{LLM_TURN, User};
use crate::support::{llm, of_stage, within};

const QUESTION: &str = "What is a mole, in one sentence that nobody else would ask for?";

async fn ask(user: &User, body: &Value) -> Response {
    user.http.post(format!("{}/chat", of_stage("CHAT_URL"))).bearer_auth(&user.key).json(body).send().await.unwrap()
}

fn conversation() -> Value {
    json!({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 20})
}

#[tokio::test]
async fn a_conversation_is_answered_with_the_stages_key_and_leaves_no_word_in_the_log() {
    let (_turn, user) = (LLM_TURN.read().await, User::new("nadia").await);
    llm();
    let answer = ask(&user, &conversation()).await;
    assert_eq!(answer.status(), StatusCode::OK, "{}", answer.text().await.unwrap());
    let request_id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
    let answer: Value = answer.json().await.unwrap();
    assert!(answer["content"].as_str().unwrap().contains(HONEST), "{answer}");
    assert_eq!(answer["request_id"], request_id.as_str());
    let asked = llm().requests();
    let (headers, _) = asked.iter().find(|(_, body)| body["messages"][0]["content"] == QUESTION).unwrap();
    assert_eq!(headers["authorization"], "Bearer a-key-of-the-emulator");
    let log = Lambda::new().log("chat").await.join("\n");
    assert!(log.contains(&request_id), "the log is that of this function");
    for secret in [QUESTION, HONEST, &user.key, "a-key-of-the-emulator"] {
        assert!(!log.contains(secret), "{secret}");
    }
}

#[tokio::test]
async fn the_llm_is_not_asked_for_a_stranger_or_for_what_is_no_conversation() {
    let (_turn, user) = (LLM_TURN.read().await, User::new("oscar").await);
    let before = llm().requests().iter().filter(|(_, body)| body["max_tokens"] == 77).count();
    let question = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 77});
    let mut stranger = User::new("peter").await;
    stranger.key = "lesion_0123456789ab_no-such-secret".to_owned();
    let refused = ask(&stranger, &question).await;
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    let refused = ask(&user, &json!({"messages": [], "max_tokens": 77})).await;
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["code"], "invalid_request");
    let address = of_stage("CHAT_URL");
    let elsewhere = user.http.get(format!("{address}/results")).bearer_auth(&user.key).send().await.unwrap();
    assert_eq!(elsewhere.status(), StatusCode::NOT_FOUND);
    let after = llm().requests().iter().filter(|(_, body)| body["max_tokens"] == 77).count();
    assert_eq!(after, before);
}

#[tokio::test]
async fn upstream_trouble_has_its_code_and_the_next_conversation_is_answered() {
    let (_turn, user) = (LLM_TURN.write().await, User::new("quentin").await);
    llm().behave(Behaviour::Status(400, None));
    let answer = ask(&user, &conversation()).await;
    assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["error"]["code"], "llm_refused", "{body}");
    llm().behave(Behaviour::Stall);
    let answer = ask(&user, &conversation()).await;
    llm().behave(Behaviour::Answer(explanation(HONEST)));
    assert_eq!(answer.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(ask(&user, &conversation()).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn the_address_describes_what_it_serves() {
    let http = User::new("rosa").await.http;
    let description: Value =
        http.get(format!("{}/openapi.json", of_stage("CHAT_URL"))).send().await.unwrap().json().await.unwrap();
    let paths: Vec<_> = description["paths"].as_object().unwrap().keys().collect();
    assert_eq!(paths, ["/chat", "/v1/chat/completions", "/v1/models", "/v1/models/{model}"]);
}

/// What one completion of the stand-in takes.
const TOKENS: u64 = 29;

#[tokio::test(flavor = "multi_thread")]
async fn twenty_clients_of_many_lambdas_stay_within_their_keys_limit_and_the_ledger_is_the_servers() {
    let (_turn, user) = (LLM_TURN.read().await, User::new("sam").await);
    llm();
    let new = json!({"caller": "sam", "requests_per_minute": 30, "budget_usd_per_month": 1});
    let made: Value = user.request(Method::POST, "/admin/keys").json(&new).send().await.unwrap().json().await.unwrap();
    let (id, key) = (made["id"].as_str().unwrap(), made["key"].as_str().unwrap());
    let url = format!("{}/v1/chat/completions", of_stage("CHAT_URL"));
    let started = Instant::now();
    let clients = (0..20).map(async |number| {
        let mut let_in = 0;
        for round in 0..3 {
            let streams = (number + round) % 2 == 0;
            let messages = json!([{"role": "user", "content": format!("{number} {round}")}]);
            let body = json!({"model": "stand-in", "messages": messages, "stream": streams, "max_tokens": 20});
            let answer = user.http.post(&url).bearer_auth(key).json(&body).send().await.unwrap();
            let status = answer.status().as_u16();
            let text = answer.text().await.unwrap();
            match status {
                200 if streams => assert!(text.ends_with("data: [DONE]\n\n"), "{text}"),
                200 => assert!(text.contains("chat.completion"), "{text}"),
                429 => assert!(text.contains("rate_limit"), "{text}"),
                _ => panic!("{status}: {text}"),
            }
            let_in += u64::from(status == 200);
        }
        let_in
    });
    let let_in: u64 = join_all(clients).await.into_iter().sum();
    // The bucket fills while it is emptied: one comes back in two seconds.
    let refilled = started.elapsed().as_secs().div_ceil(2);
    assert!((30..=31 + refilled).contains(&let_in), "{let_in} of 30, {refilled} refilled");
    let mut usage = Value::Null;
    within("everything is settled", async || {
        let answer = user.request(Method::GET, &format!("/admin/keys/{id}/usage")).send().await.unwrap();
        usage = answer.json().await.unwrap();
        usage["under_way"] == 0
    })
    .await;
    let month = &usage["months"][0];
    let tokens = month["prompt_tokens"].as_u64().unwrap() + month["completion_tokens"].as_u64().unwrap();
    assert_eq!((month["requests"].as_u64(), tokens), (Some(let_in), let_in * TOKENS), "{usage}");
}
