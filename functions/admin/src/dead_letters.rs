//! `GET /admin/dead-letters`, `POST /admin/dead-letters/redrive`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use shared::api::admin::{DeadLetterInfo, DeadLetterList, RedriveDeadLetters, RedrivenDeadLetters};
use shared::auth::Admin as Allowed;
use shared::crash::{self, Point};
use shared::error::{Code, Error, ErrorBody};
use shared::http::body;
use shared::message::Message;
use shared::ports::{Callers, DeadLetter, JobQueue, JobStore};

use crate::{Admin, MAX_BODY_BYTES, log};

/// Dead letters shown at once.
const SHOWN: u32 = 100;
/// Ids that one call may name.
const MAX_IDS: usize = 1000;

/// List the dead letters
///
/// Messages to inference and to webhook that were received too often and given up. What could not be read is shown by its size
/// alone.
#[utoipa::path(
    get,
    path = "/admin/dead-letters",
    tag = "admin",
    responses(
        (status = 200, description = "At most 100, longest dead first.", body = DeadLetterList),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope admin; or not addressed to a loopback name.", body = ErrorBody),
        (status = 429, description = "Too many requests in this minute.", body = ErrorBody),
        (status = 503, description = "The queue is not available.", body = ErrorBody),
    )
)]
pub(crate) async fn list_dead_letters<J: JobStore, Q: JobQueue, C: Callers>(
    State(admin): State<Arc<Admin<J, Q, C>>>,
    _: Allowed,
) -> Result<Response, Error> {
    let mut letters = admin.queue.dead_letters(SHOWN).await?;
    letters.extend(admin.webhooks.dead_letters(SHOWN).await?);
    letters.sort_by_key(|letter| letter.given_up_at.unwrap_or(letter.sent_at));
    letters.truncate(SHOWN as usize);
    let dead_letters = letters.into_iter().map(shown).collect();
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(DeadLetterList { dead_letters })).into_response())
}

fn shown(letter: DeadLetter) -> DeadLetterInfo {
    let (kind, job_id) = match Message::decode(&letter.body) {
        Ok(Message::Infer { id }) => (Some("infer"), Some(id)),
        Ok(Message::Forget { id }) => (Some("forget"), Some(id)),
        Ok(Message::Deliver { id }) => (Some("deliver"), Some(id)),
        Ok(Message::Answer { id }) => (Some("answer"), Some(id)),
        Err(_) => (None, None),
    };
    DeadLetterInfo {
        id: letter.id,
        sent_at: letter.sent_at,
        given_up_at: letter.given_up_at,
        receive_count: letter.receive_count,
        kind: kind.map(str::to_owned),
        job_id,
        size_bytes: letter.body.len() as u64,
    }
}

/// Redrive dead letters
///
/// Moves them back into their queues with a fresh receive count: those with these ids, or all (`{}`).
/// An id that is no dead letter's is passed by, so the call may be repeated. On AWS one call moves some hundreds
/// out of each queue: repeat it until it has moved none.
#[utoipa::path(
    post,
    path = "/admin/dead-letters/redrive",
    tag = "admin",
    request_body = RedriveDeadLetters,
    responses(
        (status = 200, description = "How many were moved.", body = RedrivenDeadLetters),
        (status = 400, description = "The body is not valid.", body = ErrorBody),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope admin; or not addressed to a loopback name.", body = ErrorBody),
        (status = 413, description = "More than 128 KiB.", body = ErrorBody),
        (status = 415, description = "No JSON.", body = ErrorBody),
        (status = 429, description = "Too many requests in this minute.", body = ErrorBody),
        (status = 503, description = "The queue is not available.", body = ErrorBody),
    )
)]
pub(crate) async fn redrive_dead_letters<J: JobStore, Q: JobQueue, C: Callers>(
    State(admin): State<Arc<Admin<J, Q, C>>>,
    Allowed(who): Allowed,
    request: Request,
) -> Result<Json<RedrivenDeadLetters>, Error> {
    let chosen: RedriveDeadLetters = body::json(request, MAX_BODY_BYTES, r#"{"ids": ["…"]}, or {} for all"#).await?;
    if chosen.ids.as_ref().is_some_and(|ids| ids.len() > MAX_IDS) {
        return Err(Error::new(Code::InvalidRequest, "At most 1000 ids in one call."));
    }
    let ids = chosen.ids.as_deref();
    // Each back into its own queue.
    let photos = admin.queue.redrive_dead_letters(ids).await?;
    crash::here(Point::AdminPhotoLettersMoved);
    let redriven = photos + admin.webhooks.redrive_dead_letters(ids).await?;
    crash::here(Point::AdminDeadLettersMoved);
    log(&who, "dead_letters_redriven", &redriven.to_string());
    Ok(Json(RedrivenDeadLetters { redriven }))
}
