//! An OpenAI-compatible server on loopback that misbehaves on purpose. It answers the script's
//! behaviours one by one, then behaves as it was told to, which is well at first.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// What the server does with one request.
#[derive(Debug, Clone)]
pub enum Behaviour {
    /// A complete answer with this content.
    Answer(String),
    /// A status, and perhaps `Retry-After` in seconds.
    Status(u16, Option<u32>),
    /// A good answer, after a while.
    After(Duration),
    /// A complete answer with this content, after a while.
    Late(Duration, String),
    /// A complete answer with this content, the pieces of a stream so far apart; a whole one comes after one
    /// such pause.
    Slow(Duration, String),
    /// A complete answer with this content and this reason for its end.
    Ended(String, &'static str),
    /// Never answers.
    Stall,
    /// Closes the connection in the middle of the body.
    CutOff,
    /// A body that is not OpenAI's.
    Body(&'static str),
    /// A status with OpenAI's shape of an error, in these words.
    Refuse(u16, String),
    /// An event stream in these pieces, and then what.
    Stream(Vec<String>, Ending),
    /// The same, each piece after such a pause.
    Paced(Duration, Vec<String>, Ending),
}

/// How a stream goes on behind its pieces.
#[derive(Debug, Clone, Copy)]
pub enum Ending {
    Close,
    /// The connection breaks.
    CutOff,
    /// Nothing more comes.
    Stall,
}

/// A text that promise 4 lets through, for the drawn mole.
pub const HONEST: &str =
    "A melanocytic naevus is a growth made of pigment cells. It is often round or oval with an even colour.";

#[derive(Default)]
struct Inner {
    script: Mutex<VecDeque<Behaviour>>,
    otherwise: Mutex<Option<Behaviour>>,
    requests: Mutex<Vec<(HeaderMap, Value)>>,
    arrivals: Mutex<Vec<Instant>>,
}

/// The running server; it ends with the test's runtime.
#[derive(Clone)]
pub struct LlmServer {
    inner: Arc<Inner>,
    address: SocketAddr,
}

impl LlmServer {
    pub async fn start(script: impl IntoIterator<Item = Behaviour>) -> Self {
        Self::start_at("127.0.0.1:0", script).await
    }

    /// At an address that somebody was told before.
    pub async fn start_at(address: &str, script: impl IntoIterator<Item = Behaviour>) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let inner = Arc::new(Inner::default());
        // Pictures come in messages.
        let router = Router::new().route("/v1/chat/completions", post(answer)).layer(DefaultBodyLimit::disable());
        let router = router.with_state(Arc::clone(&inner));
        tokio::spawn(async move { axum::serve(listener, router).await });
        let server = Self { inner, address };
        server.script(script);
        server
    }

    /// What it does from now on, behind the script.
    pub fn behave(&self, behaviour: Behaviour) {
        *self.inner.otherwise.lock().unwrap() = Some(behaviour);
    }

    /// What it does with the next requests.
    pub fn script(&self, script: impl IntoIterator<Item = Behaviour>) {
        self.inner.script.lock().unwrap().extend(script);
    }

    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// The requests so far, headers and body.
    pub fn requests(&self) -> Vec<(HeaderMap, Value)> {
        self.inner.requests.lock().unwrap().clone()
    }

    /// When they came.
    pub fn arrivals(&self) -> Vec<Instant> {
        self.inner.arrivals.lock().unwrap().clone()
    }

    pub fn calls(&self) -> usize {
        self.inner.requests.lock().unwrap().len()
    }
}

/// A completion as OpenAI's API reference shows it.
pub fn completion(content: &str) -> Value {
    json!({
        "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
        "object": "chat.completion",
        "created": 1_741_569_952,
        "model": "gpt-4.1-2025-04-14",
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": content, "refusal": null, "annotations": []},
            "logprobs": null,
            "finish_reason": "stop",
        }],
        "usage": {"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29},
        "service_tier": "default",
    })
}

/// The chunks of a stream as OpenAI's API reference shows them, the one with the usage last.
pub fn chunks(content: &str) -> Vec<String> {
    let chunk = |choices: Value, usage: Value| {
        let chunk = json!({
            "id": "chatcmpl-123", "object": "chat.completion.chunk", "created": 1_694_268_190, "model": "gpt-4o-mini",
            "system_fingerprint": "fp_44709d6fcb", "choices": choices, "usage": usage,
        });
        format!("data: {chunk}\n\n")
    };
    let part = |delta: Value, finish: Value| {
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish});
        chunk(json!([choice]), Value::Null)
    };
    let words = content.split_inclusive(' ').map(|word| part(json!({"content": word}), Value::Null));
    let usage = json!({"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29});
    std::iter::once(part(json!({"role": "assistant", "content": ""}), Value::Null))
        .chain(words)
        .chain([part(json!({}), json!("stop")), chunk(json!([]), usage)])
        .collect()
}

/// A good stream, with the usage only where it was asked for.
fn streamed(content: &str, asked: &Value, pause: Duration) -> Response {
    let mut pieces = chunks(content);
    if asked["stream_options"]["include_usage"] != true {
        pieces.pop();
    }
    pieces.push("data: [DONE]\n\n".to_owned());
    stream(pieces, pause, Ending::Close)
}

fn stream(pieces: Vec<String>, pause: Duration, ending: Ending) -> Response {
    let pieces = futures_util::stream::iter(pieces).then(move |piece| async move {
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        Ok::<_, std::io::Error>(piece)
    });
    let end = futures_util::stream::once(async move {
        match ending {
            Ending::Close => Ok(String::new()),
            Ending::CutOff => {
                // Or the pieces before might be dropped with the connection.
                tokio::time::sleep(Duration::from_millis(200)).await;
                Err(std::io::Error::other("cut off"))
            }
            Ending::Stall => std::future::pending().await,
        }
    });
    let body = Body::from_stream(pieces.chain(end));
    ([(header::CONTENT_TYPE, "text/event-stream; charset=utf-8")], body).into_response()
}

/// The content of an answer that follows the schema.
pub fn explanation(text: &str) -> String {
    json!({"explanation": text}).to_string()
}

async fn answer(State(inner): State<Arc<Inner>>, headers: HeaderMap, body: Bytes) -> Response {
    let asked: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    inner.arrivals.lock().unwrap().push(Instant::now());
    inner.requests.lock().unwrap().push((headers, asked.clone()));
    let behaviour = inner.script.lock().unwrap().pop_front();
    let behaviour = behaviour.or_else(|| inner.otherwise.lock().unwrap().clone());
    match behaviour.unwrap_or_else(|| Behaviour::Answer(explanation(HONEST))) {
        Behaviour::Answer(content) if asked["stream"] == true => streamed(&content, &asked, Duration::ZERO),
        Behaviour::Slow(pause, content) if asked["stream"] == true => streamed(&content, &asked, pause),
        Behaviour::Answer(content) => Json(completion(&content)).into_response(),
        Behaviour::Late(pause, content) | Behaviour::Slow(pause, content) => {
            tokio::time::sleep(pause).await;
            Json(completion(&content)).into_response()
        }
        Behaviour::Ended(content, reason) => {
            let mut completion = completion(&content);
            completion["choices"][0]["finish_reason"] = reason.into();
            Json(completion).into_response()
        }
        Behaviour::Status(status, retry_after) => {
            let mut response = (StatusCode::from_u16(status).unwrap(), "upstream says no").into_response();
            if let Some(seconds) = retry_after {
                response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
            }
            response
        }
        Behaviour::After(pause) => {
            tokio::time::sleep(pause).await;
            Json(completion(&explanation(HONEST))).into_response()
        }
        Behaviour::Stall => {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            StatusCode::OK.into_response()
        }
        Behaviour::CutOff => {
            let piece = r#"{"choices": [{"message": {"content": "A mel"#.to_owned();
            let mut response = stream(vec![piece], Duration::ZERO, Ending::CutOff);
            response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
            response
        }
        Behaviour::Body(body) => body.into_response(),
        Behaviour::Refuse(status, words) => {
            let error = json!({"message": words, "type": "invalid_request_error", "param": "messages", "code": "odd"});
            (StatusCode::from_u16(status).unwrap(), Json(json!({"error": error}))).into_response()
        }
        Behaviour::Stream(pieces, ending) => stream(pieces, Duration::ZERO, ending),
        Behaviour::Paced(pause, pieces, ending) => stream(pieces, pause, ending),
    }
}
