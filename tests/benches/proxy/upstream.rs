//! The model server that everything is measured in front of: answers at once, or piece by piece at a
//! steady pace, and writes into every piece when it was sent.

use std::convert::Infallible;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::DefaultBodyLimit;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::serve::ListenerExt;
use futures_util::stream;
use rustix::time::{ClockId, clock_gettime};
use tokio::net::TcpListener;

/// Pieces of a stream.
pub const PIECES: u32 = 20;
/// Between two pieces of a stream at a pace.
pub const PACE: Duration = Duration::from_millis(50);

/// Nanoseconds of the clock that all processes of this machine share.
pub fn now() -> i64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// Prints its address and serves until it is killed.
pub async fn serve() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    let router = Router::new().route("/v1/chat/completions", post(complete)).layer(DefaultBodyLimit::disable());
    // Or the second piece of a stream waits for the kernel's acknowledgement of the first.
    let listener = listener.tap_io(|stream| stream.set_nodelay(true).unwrap());
    axum::serve(listener, router).await.unwrap();
}

async fn complete(body: Bytes) -> Response {
    // The fields are in front of a picture that may follow.
    let asked = String::from_utf8_lossy(&body[..body.len().min(1024)]);
    if !asked.contains("\"stream\":true") && !asked.contains("\"stream\": true") {
        let answer = format!(
            r#"{{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[{{"index":0,"message":{{"role":"assistant","content":"{}"}},"finish_reason":"stop"}}],"usage":{{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}}}}"#,
            now()
        );
        return ([(header::CONTENT_TYPE, "application/json")], answer).into_response();
    }
    let pace = asked.contains("paced").then_some(PACE);
    let events = stream::unfold(0, move |sent| async move {
        if sent > PIECES {
            return None;
        }
        if let Some(pace) = pace {
            tokio::time::sleep(pace).await;
        }
        Some((Ok::<_, Infallible>(if sent < PIECES { piece() } else { end() }), sent + 1))
    });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(events)).into_response()
}

fn piece() -> String {
    format!(
        "data: {{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{}\"}},\"finish_reason\":null}}]}}\n\n",
        now()
    )
}

fn end() -> String {
    let chunk = |rest: &str| {
        format!("data: {{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",{rest}}}\n\n")
    };
    let finish = chunk(r#""choices":[{"index":0,"delta":{},"finish_reason":"stop"}]"#);
    let usage = chunk(r#""choices":[],"usage":{"prompt_tokens":9,"completion_tokens":20,"total_tokens":29}"#);
    format!("{finish}{usage}data: [DONE]\n\n")
}
