//! A function's metrics, as lines of CloudWatch's embedded metric format on standard output: Lambda
//! puts them into the function's log, and CloudWatch takes them out of it.
//!
//! Format: Amazon CloudWatch's user guide, "Specification: Embedded metric format".

use std::io::Write;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use metrics_cloudwatch_embedded::{Builder, Collector};

use crate::config::ConfigError;
use crate::metrics;

/// What this process has counted and not written yet.
#[derive(Clone, Copy)]
pub struct Emf(&'static Collector);

impl Emf {
    /// Begins to listen to [`metrics`], once in a process.
    ///
    /// # Errors
    /// [`ConfigError`] where somebody listens already.
    pub fn start(stage: &str) -> Result<Self, ConfigError> {
        let builder =
            Builder::new().cloudwatch_namespace(metrics::NAMESPACE).with_dimension(metrics::STAGE, stage.to_owned());
        let collector = builder.init().map_err(|error| ConfigError::new("STAGE", error.to_string()))?;
        metrics::describe();
        Ok(Self(collector))
    }

    /// Writes what has happened since the last time, for each set of dimensions a line. Called at the
    /// end of each invocation: until the next one the process may stand still, or never go on.
    pub fn flush(self) {
        let mut lines = Vec::new();
        // In one piece: who writes to the same log must not come in between.
        let written = self.0.flush(&mut lines).and_then(|()| std::io::stdout().write_all(&lines));
        if let Err(error) = written {
            tracing::warn!(error.chain = %error, "metrics not written");
        }
    }
}

/// For HTTP functions: writes what a request has counted, once it is answered.
pub async fn flush_after(State(emf): State<Emf>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    emf.flush();
    response
}
