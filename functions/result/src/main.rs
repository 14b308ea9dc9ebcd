//! result as a Lambda behind an HTTP API (payload format 2.0).

use std::sync::Arc;

use axum::middleware::from_fn;
use shared::aws::Stage;
use shared::http;

#[tokio::main]
async fn main() -> Result<(), lambda_http::Error> {
    let stage = Stage::open().await?;
    let results = result::Results {
        jobs: stage.jobs()?,
        queue: stage.queue()?,
        blobs: stage.blobs()?,
        clock: stage.clock.clone(),
        policy: stage.policy,
    };
    let app = http::app(result::router(Arc::new(results)), result::open_router(), stage.access()?);
    lambda_http::run(app.layer(from_fn(http::trace))).await
}
