//! result as a Lambda behind an HTTP API (payload format 2.0).

use std::sync::Arc;

use axum::middleware::{from_fn, from_fn_with_state};
use shared::api::describe;
use shared::aws::{Stage, flush_after};
use shared::http;
use utoipa::OpenApi;

#[tokio::main]
async fn main() -> Result<(), lambda_http::Error> {
    let stage = Stage::open(env!("CARGO_PKG_NAME")).await?;
    let results = result::Results {
        jobs: stage.jobs()?,
        queue: stage.queue()?,
        blobs: stage.blobs()?,
        clock: stage.clock.clone(),
        policy: stage.policy,
    };
    let description =
        describe([submit::Api::openapi(), result::Api::openapi(), admin::Api::openapi(), socket::Api::openapi()]);
    let app = http::app(result::router(Arc::new(results)), result::open_router(description), stage.access()?);
    let app = app.layer(from_fn(http::trace)).layer(from_fn_with_state(stage.metrics, flush_after));
    lambda_http::run(app).await
}
