//! chat as a Lambda behind a function URL: an HTTP API would end each call after 30 seconds.

use std::sync::Arc;

use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::get;
use axum::{Json, Router};
use chat::{Api, Cache, Chat, Meter, OnLeave};
use shared::api::describe;
use shared::aws::{Stage, flush_after};
use shared::clock::Clock;
use shared::http;
use shared::llm::models::Models;
use utoipa::OpenApi;

#[tokio::main]
async fn main() -> Result<(), lambda_http::Error> {
    let stage = Stage::open(env!("CARGO_PKG_NAME")).await?;
    let chat = Chat {
        models: Arc::new(Models::with_secrets(&stage.env, &stage.secrets()?)?),
        llm: stage.llm()?.into(),
        meter: Arc::new(Meter::new(stage.callers()?, Clock::System)),
        cache: Cache::default(),
        // A function is not stopped when its client leaves.
        on_leave: OnLeave::Drain,
    };
    // The HTTP API describes what it serves; this address, what is served here.
    let description = Json(describe([Api::openapi()]));
    let open = Router::new().route("/openapi.json", get(move || async { description }));
    let app = http::app(chat::router(Arc::new(chat)), open, stage.access()?);
    let app = app.layer(from_fn(http::trace)).layer(from_fn_with_state(stage.metrics, flush_after));
    lambda_http::run_with_streaming_response(app).await
}
