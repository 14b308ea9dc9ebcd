//! Whom the proxy answers from its cache.

use reqwest::Method;
use serde_json::{Value, json};

use crate::proxy::models_file;
use crate::support::keyed::Keyed;
use crate::support::llm_server::{Behaviour, LlmServer};

#[tokio::test]
async fn an_answer_is_kept_for_the_caller_who_asked_and_for_nobody_else() {
    let llm = LlmServer::start(["to the ward", "to the clinic"].map(|words| Behaviour::Answer(words.into()))).await;
    let server = json!({"base_url": llm.base_url()});
    let (_folder, path) = models_file(&json!({"fast": server, "slow": server}));
    let host = Keyed::start(&[("LLM_MODELS_FILE", &path)]).await;
    // The same bytes each time.
    let body = json!({"model": "fast", "messages": [{"role": "user", "content": "?"}], "temperature": 0}).to_string();
    let ask = async |key: &str| {
        let request = host.request(Method::POST, "/v1/chat/completions", key);
        request.header("content-type", "application/json").body(body.clone()).send().await.unwrap()
    };
    let (ward, clinic) = (host.key_of("ward").await, host.key_of("clinic").await);
    let another_of_the_ward = host.key_of("ward").await;
    for (key, cache, words, calls) in [
        (&ward, "miss", "to the ward", 1),
        (&clinic, "miss", "to the clinic", 2),
        (&ward, "hit", "to the ward", 2),
        (&clinic, "hit", "to the clinic", 2),
        (&another_of_the_ward, "hit", "to the ward", 2),
    ] {
        let response = ask(key).await;
        assert_eq!(response.status(), 200, "{words}");
        assert_eq!(response.headers()["x-cache"], cache, "{words}");
        let answer: Value = response.json().await.unwrap();
        assert_eq!((&answer["choices"][0]["message"]["content"], llm.calls()), (&json!(words), calls), "{cache}");
    }
    // Nor for a key of the caller's that may not ask this model.
    let limited = host.make(json!({"caller": "ward", "models": ["slow"]})).await;
    let refused = ask(limited["key"].as_str().unwrap()).await;
    assert_eq!((refused.status().as_u16(), refused.headers().get("x-cache")), (404, None));
    assert_eq!(llm.calls(), 2);
}
