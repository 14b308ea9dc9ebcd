//! admin as a Lambda behind an HTTP API (payload format 2.0).

use std::sync::Arc;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use shared::aws::{Stage, flush_after};
use shared::http;

#[tokio::main]
async fn main() -> Result<(), lambda_http::Error> {
    let stage = Stage::open(env!("CARGO_PKG_NAME")).await?;
    let admin = admin::Admin {
        jobs: stage.jobs()?,
        queue: stage.queue()?,
        webhooks: stage.webhooks()?,
        callers: stage.callers()?,
        clock: stage.clock.clone(),
        policy: stage.policy,
    };
    let app = http::app(admin::router(Arc::new(admin)), Router::new(), stage.access()?);
    let app = app.layer(from_fn(http::trace)).layer(from_fn_with_state(stage.metrics, flush_after));
    lambda_http::run(app).await
}
