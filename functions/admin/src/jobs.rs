//! `POST /admin/jobs/{request_id}/redrive`.
//!
//! Writes the record, then sends the message. What a crash or a failed send leaves out, sweep does:
//! the record is due at once.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use shared::api::admin::RedrivenJob;
use shared::auth::Admin as Allowed;
use shared::crash::{self, Point};
use shared::error::{Code, Error, ErrorBody};
use shared::job::{Record, Refused, Status};
use shared::message::Message;
use shared::ports::{Callers, JobQueue, JobStore};
use shared::telemetry;
use shared::transition::{NotMoved, transition};
use uuid::Uuid;

use crate::{Admin, log};

/// Redrive a job
///
/// Sends any caller's job that failed retryably round again, with new attempts and a new deadline.
#[utoipa::path(
    post,
    path = "/admin/jobs/{request_id}/redrive",
    tag = "admin",
    params(("request_id" = String, Path, description = "The id that submit answered.")),
    responses(
        (status = 202, description = "On its way again.", body = RedrivenJob),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope admin; or not addressed to a loopback name.", body = ErrorBody),
        (status = 404, description = "No such job.", body = ErrorBody),
        (status = 409, description = "The job did not fail retryably, or its photo or prompt has expired.", body = ErrorBody),
        (status = 429, description = "Too many requests in this minute.", body = ErrorBody),
        (status = 503, description = "The store is not available.", body = ErrorBody),
    )
)]
pub(crate) async fn redrive_job<J: JobStore, Q: JobQueue, C: Callers>(
    State(admin): State<Arc<Admin<J, Q, C>>>,
    Allowed(who): Allowed,
    request_id: Result<Path<String>, PathRejection>,
) -> Result<(StatusCode, Json<RedrivenJob>), Error> {
    let Path(request_id) = request_id.map_err(|_| Error::not_found())?;
    let id = Uuid::parse_str(&request_id).map_err(|_| Error::not_found())?;
    let job = admin.jobs.get(id).await?.and_then(Record::into_job).ok_or_else(Error::not_found)?;
    telemetry::about_job(job.id, &job.trace_id);
    let (now, is_prompt) = (admin.clock.now(), job.is_prompt());
    let moved = transition(&admin.jobs, &job, |job| Ok((job.redrive(now, &admin.policy)?, ()))).await;
    let (job, ()) = moved.map_err(|not_moved| match not_moved {
        NotMoved::Refused(Refused::InputExpired) if is_prompt => not_redrivable("Its prompt has expired."),
        NotMoved::Refused(Refused::InputExpired) => not_redrivable("Its photo has expired."),
        NotMoved::Refused(_) => not_redrivable("Only a job that failed with \"retryable\": true can be redriven."),
        NotMoved::Gone => Error::not_found(),
        NotMoved::Store(error) => error,
    })?;
    crash::here(Point::AdminJobRedriven);
    log(&who, "job_redriven", &job.id.to_string());
    if job.status == Status::Pending {
        match admin.queue.send(Message::Infer { id: job.id }).await {
            Ok(()) => crash::here(Point::AdminMessageSent),
            Err(error) => tracing::warn!(error.chain = error.chain(), "message not sent; sweep will send it"),
        }
    }
    Ok((StatusCode::ACCEPTED, Json(RedrivenJob { request_id: job.id, status: job.status })))
}

fn not_redrivable(why: &str) -> Error {
    Error::new(Code::NotRedrivable, format!("This job cannot be sent round again. {why}"))
}
