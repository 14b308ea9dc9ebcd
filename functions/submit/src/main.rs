//! submit as a Lambda behind an HTTP API (payload format 2.0).

use std::sync::Arc;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use shared::aws::{Stage, flush_after};
use shared::http;
use tokio::sync::Semaphore;

#[tokio::main]
async fn main() -> Result<(), lambda_http::Error> {
    let stage = Stage::open(env!("CARGO_PKG_NAME")).await?;
    let submit = submit::Submit {
        jobs: stage.jobs()?,
        queue: stage.queue()?,
        blobs: stage.blobs()?,
        clock: stage.clock.clone(),
        policy: stage.policy,
        max_queued_bytes: shared::config::max_queued_bytes(&stage.env)?,
        destinations: shared::callback::Destinations::from_env(&stage.env)?,
        has_llm: shared::config::has_llm(&stage.env)?,
        // Lambda gives each instance one request at a time.
        upload_turns: Semaphore::new(1),
    };
    let app = http::app(submit::router(Arc::new(submit)), Router::new(), stage.access()?);
    let app = app.layer(from_fn(http::trace)).layer(from_fn_with_state(stage.metrics, flush_after));
    lambda_http::run(app).await
}
