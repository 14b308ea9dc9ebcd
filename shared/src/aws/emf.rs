//! A function's metrics, as lines of CloudWatch's embedded metric format on standard output: Lambda
//! puts them into the function's log, and CloudWatch takes them out of it.
//!
//! Format: Amazon CloudWatch's user guide, "Specification: Embedded metric format".

use std::io::Write;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};
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

/// For HTTP functions: writes what a request has counted, once its answer is with the client, which is the end of a
/// stream. The function may stand still from then on.
pub async fn flush_after(State(emf): State<Emf>, request: Request, next: Next) -> Response {
    next.run(request).await.map(|body| Body::new(Flushed { body, emf }))
}

/// A body at whose end the metrics are written, whichever end that is.
struct Flushed {
    body: Body,
    emf: Emf,
}

impl HttpBody for Flushed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Flushed {
    fn drop(&mut self) {
        self.emf.flush();
    }
}
