//! submit as a Lambda behind an HTTP API (payload format 2.0).

use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn;
use shared::aws::Stage;
use shared::http;
use tokio::sync::Semaphore;

#[tokio::main]
async fn main() -> Result<(), lambda_http::Error> {
    let stage = Stage::open().await?;
    let submit = submit::Submit {
        jobs: stage.jobs()?,
        queue: stage.queue()?,
        blobs: stage.blobs()?,
        clock: stage.clock.clone(),
        policy: stage.policy,
        max_queued_bytes: shared::config::max_queued_bytes(&stage.env)?,
        // Lambda gives each instance one request at a time.
        upload_turns: Semaphore::new(1),
    };
    let app = http::app(submit::router(Arc::new(submit)), Router::new(), stage.access()?);
    lambda_http::run(app.layer(from_fn(http::trace))).await
}
