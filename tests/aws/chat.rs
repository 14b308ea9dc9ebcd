//! Conversations through the function's own address, as Terraform has put it there.
//!
//! The emulator gives each answer in one piece, and lets everybody invoke the function through its
//! address once the first of the two rights is there.

use reqwest::{Response, StatusCode};
use serde_json::{Value, json};

use crate::lambda::Lambda;
use crate::llm_server::{Behaviour, HONEST, explanation};
use crate::pipeline::{LLM_TURN, User};
use crate::support::{llm, of_stage};

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
    assert_eq!(paths, ["/chat"]);
}
