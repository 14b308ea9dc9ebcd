//! Descriptions by an LLM that misbehaves, and what it gets to see.

use serde_json::{Value, json};

use crate::support::llm_server::{Behaviour, HONEST, LlmServer, explanation};
use crate::support::{LLM_KEY, Running, mole};

async fn described(script: impl IntoIterator<Item = Behaviour>, extra: &[(&str, &str)]) -> (Value, LlmServer) {
    let llm = LlmServer::start(script).await;
    let host = Running::asking(&llm, extra).await;
    let result = host.run(&mole()).await;
    assert_eq!(result["status"], "completed", "{result}");
    assert!(!result["predictions"].as_array().unwrap().is_empty(), "{result}");
    (result, llm)
}

#[tokio::test]
async fn an_honest_answer_is_shown_between_our_numbers_and_our_disclaimer() {
    let (result, llm) = described([], &[]).await;
    let description = &result["description"];
    assert_eq!(description["source"], "llm", "{description}");
    let text = description["text"].as_str().unwrap();
    assert!(text.contains(HONEST) && text.starts_with("Of the classes") && text.ends_with("written here."), "{text}");
    assert_eq!(llm.calls(), 1);
}

#[tokio::test]
async fn the_llm_sees_names_and_bands_and_neither_number_photo_nor_caller() {
    let (result, llm) = described([], &[("LLM_MAX_TOKENS", "321"), ("LLM_TEMPERATURE", "0.25")]).await;
    let (headers, body) = llm.requests().remove(0);
    assert_eq!(headers["authorization"], format!("Bearer {LLM_KEY}"));
    assert_eq!(
        (&body["model"], &body["max_tokens"], &body["temperature"]),
        (&json!("tiny"), &json!(321), &json!(0.25))
    );
    assert_eq!(body["response_format"]["json_schema"]["schema"]["required"], json!(["explanation"]));
    let user: Value = serde_json::from_str(body["messages"][1]["content"].as_str().unwrap()).unwrap();
    let name = &result["predictions"][0]["name"];
    assert_eq!(&user["classes"][0]["name"], name);
    let keys: Vec<_> = user["classes"][0].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["name", "probability"]);
    assert!(!user.to_string().contains(|letter: char| letter.is_ascii_digit()), "{user}");
    let whole = body.to_string();
    for secret in ["local", result["request_id"].as_str().unwrap(), "base64", "image_url"] {
        assert!(!whole.contains(secret), "{secret}");
    }
}

#[tokio::test]
async fn passing_trouble_is_tried_again_until_an_answer_comes() {
    for script in [
        vec![Behaviour::Status(500, None)],
        vec![Behaviour::Status(429, Some(1))],
        vec![Behaviour::CutOff],
        vec![Behaviour::Stall],
        vec![Behaviour::Status(503, None), Behaviour::CutOff],
        // More than one claim's tries: sweep sends the job round again.
        vec![Behaviour::Status(500, None); 4],
    ] {
        let calls = script.len() + 1;
        let (result, llm) = described(script.clone(), &[("LLM_TIMEOUT_SECONDS", "3")]).await;
        assert_eq!(result["description"]["source"], "llm", "{script:?}: {result}");
        assert_eq!(llm.calls(), calls, "{script:?}");
    }
}

#[tokio::test]
async fn retry_after_is_waited_for() {
    let started = std::time::Instant::now();
    let (_, llm) = described([Behaviour::Status(429, Some(2))], &[]).await;
    assert!(started.elapsed() >= std::time::Duration::from_secs(2), "asked again too soon");
    assert_eq!(llm.calls(), 2);
}

#[tokio::test]
async fn an_outage_never_hides_a_prediction() {
    let llm = LlmServer::start(vec![Behaviour::Status(500, None); 100]).await;
    let host = Running::asking(&llm, &[("MAX_ATTEMPTS", "2")]).await;
    let id = host.submit(&mole()).await;
    crate::support::eventually("the prediction is shown while the LLM is down", async || {
        let result = host.result(&id).await;
        result["status"] == "awaiting_description" && result["predictions"].as_array().unwrap().len() == 7
    })
    .await;
    let result = host.ended(&id).await;
    assert_eq!(result["status"], "completed");
    assert_eq!(result["description"]["source"], "template");
    assert_eq!(result["description"]["fallback"], "llm_unavailable");
    assert_eq!(llm.calls(), 6, "two claims of three tries");
}

#[tokio::test]
async fn a_complete_answer_that_cannot_be_shown_is_replaced_and_not_asked_for_again() {
    let reassuring =
        "A melanocytic naevus is a growth made of pigment cells, and there is nothing to worry about with it.";
    for (behaviour, fallback) in [
        (Behaviour::Answer(r#"{"explanation": "A melanocytic na"#.into()), "llm_invalid_answer"),
        (Behaviour::Answer(r#"{"summary": "other schema"}"#.into()), "llm_invalid_answer"),
        (Behaviour::Answer(String::new()), "llm_invalid_answer"),
        (Behaviour::Answer(explanation(reassuring)), "llm_text_reassures"),
        (Behaviour::Answer(explanation("Short.")), "llm_text_length"),
        (Behaviour::Body("<html>no JSON at all</html>"), "llm_invalid_response"),
        (Behaviour::Body(r#"{"choices": []}"#), "llm_invalid_response"),
        (Behaviour::Status(401, None), "llm_denied"),
        (Behaviour::Status(400, None), "llm_refused"),
    ] {
        let (result, llm) = described([behaviour.clone()], &[]).await;
        let description = &result["description"];
        assert_eq!(description["source"], "template", "{behaviour:?}");
        assert_eq!(description["fallback"], fallback, "{behaviour:?}");
        assert!(!description["text"].as_str().unwrap().contains("worry about with it"));
        assert_eq!(llm.calls(), 1, "{behaviour:?}");
    }
}
