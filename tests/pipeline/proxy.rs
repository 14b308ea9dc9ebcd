//! The proxy below `/v1/`, before a model server that misbehaves.

use std::time::{Duration, Instant};

use reqwest::Response;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::llm_server::{Behaviour, Ending, LlmServer, chunks};
use crate::support::{Running, eventually};

const KEY: &str = "sk-test-0123456789";
const QUESTION: &str = "What is a naevus?";

/// A file of models, in a folder that must live as long as the host starts.
pub(crate) fn models_file(models: &Value) -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("models.json");
    std::fs::write(&path, json!({"models": models}).to_string()).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

pub(crate) async fn host_of(models: &Value) -> Running {
    let (_folder, path) = models_file(models);
    Running::start(&[("LLM_MODELS_FILE", &path), ("UPSTREAM_KEY", KEY)]).await
}

/// A host whose model `fast` is `tiny` of this server.
async fn host(llm: &LlmServer) -> Running {
    host_of(&json!({"fast": {"base_url": llm.base_url(), "model": "tiny", "api_key_name": "UPSTREAM_KEY", "timeout_seconds": 3}}))
        .await
}

pub(crate) fn asked(stream: bool) -> Value {
    json!({"model": "fast", "messages": [{"role": "user", "content": QUESTION}], "stream": stream})
}

pub(crate) async fn ask(host: &Running, body: &Value) -> Response {
    host.http.post(format!("{}/v1/chat/completions", host.url)).json(body).send().await.unwrap()
}

/// What comes of a stream, as the text on the wire.
async fn streamed(host: &Running, body: &Value) -> String {
    let response = ask(host, body).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    response.text().await.unwrap()
}

/// Status and error of an answer, which is of OpenAI's shape and tells no secret.
async fn refusal(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let body: Value = response.json().await.unwrap();
    assert!(!body.to_string().contains(QUESTION) && !body.to_string().contains(KEY), "{body}");
    let error = body["error"].clone();
    assert!(error["message"].is_string() && error["type"].is_string() && error.get("param").is_some(), "{body}");
    (status, error)
}

#[tokio::test]
async fn a_request_and_its_answer_pass_through_as_they_are() {
    let llm = LlmServer::start([Behaviour::Answer("A growth.".into())]).await;
    let host = host(&llm).await;
    let mut body = asked(false);
    for (field, value) in [
        ("tools", json!([{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}])),
        ("response_format", json!({"type": "json_object"})),
        ("nobody_knows_this", json!({"a": [1, null, 1.5e300]})),
        ("temperature", json!(0)),
    ] {
        body[field] = value;
    }
    let picture =
        json!({"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{}", "A".repeat(5 << 20))}});
    body["messages"] = json!([{"role": "user", "content": [{"type": "text", "text": QUESTION}, picture]}]);
    let response = ask(&host, &body).await;
    assert_eq!(response.status(), 200);
    assert!(response.headers().contains_key("x-request-id"));
    assert_eq!(response.json::<Value>().await.unwrap(), crate::support::llm_server::completion("A growth."));
    let [(headers, received)] = &llm.requests()[..] else { panic!("one request") };
    assert_eq!(headers["authorization"], format!("Bearer {KEY}"));
    // Not every server takes chunks.
    assert!(headers.contains_key("content-length") && !headers.contains_key("transfer-encoding"), "{headers:?}");
    body["model"] = json!("tiny");
    assert!(received == &body, "the server got something else");
}

#[tokio::test]
async fn a_stream_passes_through_without_the_usage_that_nobody_asked_for() {
    let llm = LlmServer::start(vec![Behaviour::Answer("A growth of cells.".into()); 2]).await;
    let host = host(&llm).await;
    let all = chunks("A growth of cells.");
    let text = streamed(&host, &asked(true)).await;
    assert_eq!(text, format!("{}data: [DONE]\n\n", all[..all.len() - 1].concat()));
    let mut body = asked(true);
    body["stream_options"] = json!({"include_usage": true});
    assert_eq!(streamed(&host, &body).await, format!("{}data: [DONE]\n\n", all.concat()));
    let usage: Vec<_> =
        llm.requests().iter().map(|(_, body)| body["stream_options"]["include_usage"].clone()).collect();
    assert_eq!(usage, [true, true]);
}

#[tokio::test]
async fn the_pieces_of_a_stream_arrive_as_they_are_made() {
    let pieces = chunks("A growth.");
    let llm = LlmServer::start([Behaviour::Stream(pieces[..2].to_vec(), Ending::Stall)]).await;
    let host = host(&llm).await;
    let mut response = ask(&host, &asked(true)).await;
    let mut text = String::new();
    while text.len() < pieces[..2].concat().len() {
        text.push_str(str::from_utf8(&response.chunk().await.unwrap().unwrap()).unwrap());
    }
    // The server has said nothing more for three seconds by then.
    assert_eq!(text, pieces[..2].concat());
    let rest = response.text().await.unwrap();
    assert!(rest.contains("llm_timeout") && !rest.contains("[DONE]"), "{rest}");
}

#[tokio::test]
async fn a_stream_that_the_server_leaves_without_a_word_is_ended_and_one_that_breaks_off_says_so() {
    let all = chunks("A growth.");
    let whole = all[..all.len() - 1].to_vec();
    let begun = all[..2].to_vec();
    let llm = LlmServer::start([]).await;
    let host = host(&llm).await;
    for (pieces, ending, is_whole) in [
        (whole.clone(), Ending::Close, true),
        (whole, Ending::CutOff, true),
        (begun.clone(), Ending::Close, false),
        (begun, Ending::CutOff, false),
    ] {
        llm.behave(Behaviour::Stream(pieces.clone(), ending));
        let before = llm.calls();
        let text = streamed(&host, &asked(true)).await;
        let rest = text.strip_prefix(&pieces.concat()).unwrap();
        if is_whole {
            assert_eq!(rest, "data: [DONE]\n\n", "{ending:?}");
        } else {
            let error: Value = serde_json::from_str(rest.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(error["error"]["code"], "llm_unavailable", "{ending:?}");
        }
        assert_eq!(llm.calls(), before + 1, "{ending:?}: nothing is tried again behind the first byte");
    }
}

#[tokio::test]
async fn a_stream_is_not_whole_while_a_choice_is_not_or_only_because_it_says_what_it_took_so_far() {
    let chunk = |rest: &str| format!("data: {{\"object\":\"chat.completion.chunk\",{rest}}}\n\n");
    let end = r#""choices":[{"index":0,"delta":{},"finish_reason":"stop"}]"#;
    let begun = r#""choices":[{"index":1,"delta":{"content":"A"}}]"#;
    let so_far = r#""choices":[{"index":0,"delta":{"content":"A"}}],"usage":{"prompt_tokens":3,"completion_tokens":1}"#;
    let llm = LlmServer::start([]).await;
    let host = host(&llm).await;
    let unending = r#""choices":[{"index":0,"delta":{"content":"A"},"finish_reason":""}]"#;
    for (pieces, choices) in [
        (vec![chunk(end), chunk(begun)], 2),
        (vec![chunk(end), chunk(end)], 2),
        (vec![chunk(so_far)], 1),
        (vec![chunk(unending)], 1),
    ] {
        for ending in [Ending::Close, Ending::CutOff] {
            llm.behave(Behaviour::Stream(pieces.clone(), ending));
            let mut body = asked(true);
            body["n"] = json!(choices);
            let text = streamed(&host, &body).await;
            assert!(text.contains("llm_unavailable") && !text.contains("[DONE]"), "{ending:?}: {text}");
        }
    }
}

#[tokio::test]
async fn passing_trouble_is_tried_again_until_the_first_byte() {
    let error = r#"data: {"error": {"message": "overloaded", "code": 503}}"#;
    for (trouble, stream) in [
        (Behaviour::Status(500, None), false),
        (Behaviour::Status(500, None), true),
        (Behaviour::Status(429, Some(1)), true),
        (Behaviour::Stall, false),
        (Behaviour::Stall, true),
        (Behaviour::Stream(vec![], Ending::Close), true),
        (Behaviour::Stream(vec![], Ending::CutOff), true),
        (Behaviour::Stream(vec![": wait\n\n".to_owned()], Ending::Stall), true),
        (Behaviour::Stream(vec![format!("{error}\n\n")], Ending::Close), true),
    ] {
        let llm = LlmServer::start([trouble.clone(), Behaviour::Answer("A growth.".into())]).await;
        let host = host(&llm).await;
        let response = ask(&host, &asked(stream)).await;
        assert_eq!(response.status(), 200, "{trouble:?}");
        assert!(response.text().await.unwrap().contains("growth"), "{trouble:?}");
        assert_eq!(llm.calls(), 2, "{trouble:?}");
    }
}

#[tokio::test]
async fn between_two_tries_there_is_the_pause_that_the_server_asks_for_or_a_short_one() {
    for (wait, least_ms) in [(None, 200), (Some(1), 1000), (Some(2), 2000)] {
        let llm = LlmServer::start([Behaviour::Status(503, wait), Behaviour::Answer("A growth.".into())]).await;
        let host = host(&llm).await;
        assert_eq!(ask(&host, &asked(false)).await.status(), 200, "{wait:?}");
        let [first, second] = &llm.arrivals()[..] else { panic!("{wait:?}: two calls") };
        let pause = second.duration_since(*first);
        assert!(pause >= Duration::from_millis(least_ms), "{wait:?}: {pause:?}");
    }
}

#[tokio::test]
async fn a_server_that_asks_for_a_longer_pause_than_ten_seconds_is_not_waited_for() {
    let llm = LlmServer::start([]).await;
    llm.behave(Behaviour::Status(429, Some(11)));
    let host = host(&llm).await;
    let started = Instant::now();
    let response = ask(&host, &asked(false)).await;
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert_eq!(response.headers()["retry-after"], "11");
    assert_eq!((refusal(response).await.0, llm.calls()), (429, 1));
}

#[tokio::test]
async fn the_model_that_stands_in_is_asked_after_passing_trouble_alone() {
    for (trouble, calls) in [
        (Behaviour::Status(503, None), (2, 1)),
        (Behaviour::Status(429, Some(600)), (1, 1)),
        (Behaviour::Stall, (2, 1)),
        (Behaviour::Refuse(400, "no".into()), (1, 0)),
        (Behaviour::Status(401, None), (1, 0)),
    ] {
        let (first, second) = (LlmServer::start([]).await, LlmServer::start([]).await);
        first.behave(trouble.clone());
        second.behave(Behaviour::Answer("A growth.".into()));
        let models = json!({
            "fast": {"base_url": first.base_url(), "timeout_seconds": 3, "fallback": "sure"},
            "sure": {"base_url": second.base_url(), "model": ""},
        });
        let host = host_of(&models).await;
        let response = ask(&host, &asked(true)).await;
        assert_eq!(response.status() == 200, calls.1 == 1, "{trouble:?}");
        assert_eq!((first.calls(), second.calls()), calls, "{trouble:?}");
        if let [(_, body)] = &second.requests()[..] {
            assert_eq!(body["model"], "");
        }
    }
}

#[tokio::test]
async fn lasting_trouble_is_told_in_openais_shape_and_without_the_servers_key() {
    let quoted = format!("Incorrect API key provided: {KEY}.");
    for (trouble, status, code, calls) in [
        (Behaviour::Refuse(400, "Too many messages.".into()), 400, "odd", 1),
        (Behaviour::Refuse(404, "No such model.".into()), 404, "odd", 1),
        (Behaviour::Refuse(422, "Odd.".into()), 422, "odd", 1),
        (Behaviour::Refuse(500, "Broken.".into()), 500, "odd", 2),
        (Behaviour::Refuse(401, quoted.clone()), 502, "llm_refused", 1),
        (Behaviour::Refuse(400, quoted.clone()), 400, "invalid_request", 1),
        (Behaviour::Status(400, None), 400, "invalid_request", 1),
        (Behaviour::Status(413, None), 413, "payload_too_large", 1),
        (Behaviour::Status(503, None), 502, "llm_unavailable", 2),
        (Behaviour::Status(429, Some(600)), 429, "too_many_requests", 1),
        (Behaviour::CutOff, 502, "llm_unavailable", 2),
        (Behaviour::Stall, 504, "llm_timeout", 2),
        (Behaviour::Body("<html>"), 502, "llm_invalid_response", 1),
        (Behaviour::Body(r#"{"error": {"message": "overloaded"}}"#), 502, "llm_invalid_response", 1),
    ] {
        let llm = LlmServer::start([]).await;
        llm.behave(trouble.clone());
        let host = host(&llm).await;
        let response = ask(&host, &asked(false)).await;
        let wait = response.headers().get("retry-after").map(|wait| wait.to_str().unwrap().to_owned());
        assert_eq!(wait.as_deref(), (status == 429).then_some("600"), "{trouble:?}");
        let (told, error) = refusal(response).await;
        assert_eq!((told, error["code"].as_str().unwrap()), (status, code), "{trouble:?}");
        assert_eq!(llm.calls(), calls, "{trouble:?}");
    }
}

#[tokio::test]
async fn a_servers_error_within_a_stream_is_passed_on_without_its_key() {
    let begun = chunks("A growth.")[0].clone();
    let error = |words: &str| format!("data: {}\n\n", json!({"error": {"message": words, "code": "odd"}}));
    for (words, expected) in [("filtered", "filtered"), (KEY, "llm_unavailable")] {
        let llm = LlmServer::start([Behaviour::Stream(vec![begun.clone(), error(words)], Ending::Stall)]).await;
        let host = host(&llm).await;
        let text = streamed(&host, &asked(true)).await;
        assert!(text.starts_with(&begun) && text.contains(expected) && !text.contains(KEY), "{text}");
        assert!(!text.contains("[DONE]"), "{text}");
    }
}

#[tokio::test]
async fn what_is_wrong_is_refused_in_openais_shape_before_any_server_is_asked() {
    let llm = LlmServer::start([]).await;
    let host = host(&llm).await;
    let huge = json!({"model": "fast", "messages": "x".repeat(6 << 20)});
    for (body, status, code) in [
        (json!({"messages": []}), 400, "invalid_request"),
        (json!({"model": "slow", "messages": []}), 404, "model_not_found"),
        (json!({"model": "fast", "stream": 1}), 400, "invalid_request"),
        (huge, 413, "payload_too_large"),
    ] {
        let (told, error) = refusal(ask(&host, &body).await).await;
        assert_eq!((told, error["code"].as_str().unwrap()), (status, code));
    }
    for (path, status) in [("/v1/chat/completions", 405), ("/v1/none", 404), ("/v1/models/slow", 404)] {
        let response = host.http.get(format!("{}{path}", host.url)).send().await.unwrap();
        assert_eq!(refusal(response).await.0, status, "{path}");
    }
    let text = host.http.post(format!("{}/v1/chat/completions", host.url)).body(QUESTION).send().await.unwrap();
    assert_eq!(refusal(text).await.0, 415);
    assert_eq!(llm.calls(), 0);
}

#[tokio::test]
async fn the_models_are_listed_by_the_names_that_clients_use() {
    let llm = LlmServer::start([]).await;
    let host = host(&llm).await;
    let get = async |path: &str| -> Value {
        host.http.get(format!("{}{path}", host.url)).send().await.unwrap().json().await.unwrap()
    };
    let fast = json!({"id": "fast", "object": "model", "created": 0, "owned_by": "lesion"});
    assert_eq!(get("/v1/models").await, json!({"object": "list", "data": [fast]}));
    assert_eq!(get("/v1/models/fast").await, fast);
    let none = Running::start(&[]).await;
    let response = none.http.get(format!("{}/v1/models", none.url)).send().await.unwrap();
    assert_eq!(response.json::<Value>().await.unwrap(), json!({"object": "list", "data": []}));
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_call_and_nothing_is_tried_again() {
    for stream in [false, true] {
        let llm = LlmServer::start([]).await;
        llm.behave(Behaviour::Stall);
        let models = json!({"fast": {"base_url": llm.base_url(), "timeout_seconds": 2}});
        let host = host_of(&models).await;
        let request = host.http.post(format!("{}/v1/chat/completions", host.url)).json(&asked(stream));
        assert!(request.timeout(Duration::from_millis(500)).send().await.is_err());
        eventually("the call has arrived", async || llm.calls() == 1).await;
        // A second try would have been made by then, were anybody still waiting.
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert_eq!(llm.calls(), 1);
    }
}

#[tokio::test]
async fn the_same_deterministic_request_is_answered_from_the_cache_and_says_so() {
    let llm = LlmServer::start([]).await;
    let host = host(&llm).await;
    let ask = async |body: &Value, headers: &[(&str, &str)]| {
        let mut request = host.http.post(format!("{}/v1/chat/completions", host.url)).json(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        let cache = response.headers().get("x-cache").map(|value| value.to_str().unwrap().to_owned());
        response.bytes().await.unwrap();
        cache.unwrap_or_default()
    };
    let with = |temperature: Value, stream: bool| {
        let mut body = asked(stream);
        body["temperature"] = temperature;
        body
    };
    for (body, headers, first, second, calls) in [
        (with(json!(0), false), &[][..], "miss", "hit", 1),
        (with(json!(0.0), false), &[], "miss", "hit", 1),
        (with(json!(0.5), false), &[], "", "", 2),
        (asked(false), &[], "", "", 2),
        (asked(false), &[("x-cache", "use")], "miss", "hit", 1),
        (with(json!(0), true), &[("x-cache", "use")], "", "", 2),
        (with(json!(0), false), &[("cache-control", "no-cache")], "", "", 2),
    ] {
        let before = llm.calls();
        assert_eq!((ask(&body, headers).await, ask(&body, headers).await), (first.into(), second.into()), "{body}");
        assert_eq!(llm.calls() - before, calls, "{body}");
    }
    // What failed is not kept.
    let mut other = with(json!(0), false);
    other["seed"] = json!(1);
    llm.behave(Behaviour::Refuse(400, "no".into()));
    for _ in 0..2 {
        assert_eq!(crate::proxy::ask(&host, &other).await.status(), 400);
    }
    llm.behave(Behaviour::Answer("A growth.".into()));
    assert_eq!(ask(&other, &[]).await, "miss");
}
