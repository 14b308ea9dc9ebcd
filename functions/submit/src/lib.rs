//! `POST /submit`: takes a photo, stores it without its metadata, and enqueues its job; or takes a
//! prompt for the LLM (`prompts.rs`).
//! `POST /uploads`: lets a client put a larger photo straight into the blob store first.
//!
//! Triggered by HTTP. Submit writes, in this order: the photo (blob store), the record with its
//! idempotency item (one transaction), the message (queue). Where the last write fails the answer
//! is still 202: the record is due, and sweep sends. A job of an upload also uses the upload up (in
//! the same transaction) and then erases what was uploaded.

pub mod body;
mod prompts;
mod uploads;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Router};
use chrono::TimeDelta;
use sha2::{Digest, Sha256};
use shared::api::{SubmitBody, Submitted, UploadBody, UploadPermit};
use shared::auth::Identity;
use shared::clock::{Clock, Timestamp};
use shared::crash::{self, Point};
use shared::create;
use shared::error::{Code, Error, ErrorBody};
use shared::http::Caller;
use shared::job::{self, Input, Job, NewJob, Photo, Policy, Status, Upload};
use shared::photo;
use shared::ports::{BlobStore, Created, Creation, Idempotency, JobQueue, JobStore};
use tokio::sync::Semaphore;
use utoipa::OpenApi;
use uuid::Uuid;

use body::Asked;
pub use body::Submission;

/// How long a client may repeat a request under its `Idempotency-Key`.
const IDEMPOTENCY_TTL: TimeDelta = TimeDelta::hours(24);
/// The longest `Idempotency-Key`, in bytes.
const MAX_KEY_BYTES: usize = 255;

/// What a client is told to wait where too much is queued: a good many photos are worked meanwhile.
const QUEUE_FULL_SECONDS: u32 = 30;

/// What submit works with.
pub struct Submit<J, Q, B> {
    pub jobs: J,
    pub queue: Q,
    pub blobs: B,
    pub clock: Clock,
    pub policy: Policy,
    /// The most that one caller may have queued (`MAX_QUEUED_MB`).
    pub max_queued_bytes: u64,
    /// Whether prompts are taken (`LLM_BASE_URL`).
    pub has_llm: bool,
    /// Uploads at work at the same time: one is held twice while its metadata is taken off, up to
    /// 50 MiB.
    pub upload_turns: Semaphore,
}

/// This function's part of the API's description.
#[derive(OpenApi)]
#[openapi(
    paths(submit, uploads::create_upload),
    components(schemas(SubmitBody, Submitted, UploadBody, UploadPermit, ErrorBody))
)]
pub struct Api;

/// This function's routes.
pub fn router<J: JobStore, Q: JobQueue, B: BlobStore>(submit: Arc<Submit<J, Q, B>>) -> Router {
    // The other two forms are limited where they are read; a form's parser buffers by itself.
    let limit = DefaultBodyLimit::max(body::MAX_FORM_BYTES);
    Router::new()
        .route("/submit", post(self::submit::<J, Q, B>).layer(limit))
        .route("/uploads", post(uploads::create_upload::<J, Q, B>))
        .with_state(submit)
}

/// Submit a photo or a prompt
///
/// Answers at once; the result is found under the id. The photo comes as JSON, as a raw body or as
/// `multipart/form-data` (file field `image`, optional text field `describe`); one of more than
/// 4 MiB is uploaded first (`POST /uploads`) and named by its `image_key`. Its format is read from
/// its bytes. Metadata (GPS, device, thumbnail) is removed before it is stored.
///
/// With `prompt` or `messages` it is the LLM that is asked, text only; it may take minutes.
#[utoipa::path(
    post,
    path = "/submit",
    tag = "jobs",
    params(
        ("Idempotency-Key" = Option<String>, Header, description = "Repeating a request under the same key within 24 hours gives the same id; other content under it gives 409. At most 255 visible ASCII characters."),
        ("describe" = Option<bool>, Query, description = "For raw bodies: whether a description is wanted (default true)."),
    ),
    request_body(content(
        (SubmitBody = "application/json"),
        (Vec<u8> = "image/jpeg"),
        (Vec<u8> = "image/png"),
        (Vec<u8> = "image/webp"),
        (String = "multipart/form-data"),
    )),
    responses(
        (status = 202, description = "Accepted; poll `Location` after `Retry-After` seconds.", body = Submitted,
            headers(("Location" = String), ("Retry-After" = u32)),
            links(
                ("get" = (operation_id = "get_result", parameters(("request_id" = "$response.body#/request_id")))),
                ("get by query" = (operation_id = "get_result_by_query", parameters(("request_id" = "$response.body#/request_id")))),
                ("delete" = (operation_id = "delete_result", parameters(("request_id" = "$response.body#/request_id")))),
            )),
        (status = 400, description = "The body, a parameter or a header is not valid.", body = ErrorBody),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope jobs; a prompt of a guest, or of a key with limits; or not addressed to a loopback name.", body = ErrorBody),
        (status = 404, description = "Nothing was uploaded under this `image_key`; or a prompt, and this host has no LLM.", body = ErrorBody),
        (status = 409, description = "The key was used for other content, or the upload for another job.", body = ErrorBody),
        (status = 413, description = "A photo of more than 4 MiB, 50 megapixels, or 200 MB decoded; a prompt of more than 1 MiB.", body = ErrorBody),
        (status = 415, description = "Not a JPEG, PNG or WebP photo.", body = ErrorBody),
        (status = 422, description = "The photo is damaged or cut off.", body = ErrorBody),
        (status = 429, description = "Too many requests, or too much queued.", body = ErrorBody),
        (status = 503, description = "A store is not available.", body = ErrorBody),
    )
)]
async fn submit<J: JobStore, Q: JobQueue, B: BlobStore>(
    State(submit): State<Arc<Submit<J, Q, B>>>,
    caller: Caller,
    Extension(identity): Extension<Identity>,
    request: Request,
) -> Result<Response, Error> {
    let key = idempotency_key(request.headers())?;
    let (id, status) = match body::read(request).await? {
        Asked::Photo(submission) => (submit.accept(&caller, key, submission).await?, Status::Pending),
        Asked::Upload { image_key, describe } => {
            (submit.accept_upload(&caller, key, image_key, describe).await?, Status::Pending)
        }
        Asked::Prompt(prompt) => {
            identity.without_limits()?;
            (submit.accept_prompt(&caller, key, &prompt).await?, Status::AwaitingDescription)
        }
    };
    let body = Submitted { request_id: id, status };
    let mut response = (StatusCode::ACCEPTED, axum::Json(body)).into_response();
    let location = HeaderValue::from_str(&format!("/result/{id}")).map_err(Error::internal)?;
    response.headers_mut().insert(header::LOCATION, location);
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    Ok(response)
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Error> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let key = value.to_str().ok().filter(|key| (1..=MAX_KEY_BYTES).contains(&key.len()));
    let wrong = || Error::new(Code::InvalidRequest, "Idempotency-Key must be 1 to 255 visible ASCII characters.");
    key.map(|key| Some(key.to_owned())).ok_or_else(wrong)
}

/// What an idempotency key was used for, besides the bytes.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Photo { describe: bool },
    Prompt,
}

/// A new job on its way: what names it, and what the client asked for.
struct Draft<'a> {
    id: Uuid,
    now: Timestamp,
    caller: &'a Caller,
    describe: bool,
    idempotency: Option<Idempotency>,
    upload: Option<Upload>,
}

impl<J: JobStore, Q: JobQueue, B: BlobStore> Submit<J, Q, B> {
    /// Makes a job of a submission and returns its id, or the id that the same submission under
    /// the same key was given before.
    ///
    /// # Errors
    /// What is wrong with the photo or the key, 429 where too much is queued, or
    /// [`Code::Unavailable`]; the client may repeat the request then.
    pub async fn accept(&self, caller: &Caller, key: Option<String>, submission: Submission) -> Result<Uuid, Error> {
        let now = self.clock.now();
        let id = job::new_id(now);
        let Submission { image, describe } = submission;
        let idempotency = key.map(|key| idempotency_item(caller, key, (Kind::Photo { describe }, &image), id, now));
        if let Some(item) = &idempotency
            && let Some(earlier) = self.jobs.idempotency(&item.caller, &item.key, now).await?
        {
            return same_content(item, &earlier);
        }
        self.create_of_photo(Draft { id, now, caller, describe, idempotency, upload: None }, &image).await
    }

    /// Stores the photo, writes the job, sends its message.
    async fn create_of_photo(&self, draft: Draft<'_>, image: &[u8]) -> Result<Uuid, Error> {
        let accepted = photo::accept(image)?;
        let photo = Photo {
            content_type: accepted.format.content_type().to_owned(),
            width: accepted.width,
            height: accepted.height,
            orientation: accepted.orientation,
            size_bytes: accepted.bytes.len() as u64,
            expires_at: draft.now + self.policy.photo_ttl,
        };
        self.blobs.put(&job::photo_key(draft.id), accepted.bytes).await?;
        crash::here(Point::SubmitPhotoStored);
        self.create(draft, Input::Photo(photo)).await
    }

    /// Writes the job of what was stored, and sends its message.
    async fn create(&self, draft: Draft<'_>, input: Input) -> Result<Uuid, Error> {
        let Draft { id, now, caller, describe, idempotency, upload } = draft;
        let trace_id = shared::http::request_id();
        let idempotency_key = idempotency.as_ref().map(|item| item.key.clone());
        let new = NewJob { id, caller: caller.0.clone(), trace_id, describe, idempotency_key, input };
        let job = Job::new(new, now, &self.policy);
        let max_queued_bytes = self.max_queued_bytes;
        let creation = Creation { job, idempotency: idempotency.clone(), upload, max_queued_bytes };
        let created = create::create_job(&self.jobs, &self.queue, creation).await?;
        if created != Created::New {
            // What this request has stored is not needed.
            self.blobs.delete_prefix(&job::blob_prefix(id)).await?;
        }
        match created {
            Created::New => Ok(id),
            // Another request under the same key was faster.
            Created::KeyTaken(earlier) => {
                idempotency.as_ref().map_or(Ok(earlier.id), |item| same_content(item, &earlier))
            }
            Created::UploadTaken => Err(uploads::used()),
            Created::QueueFull => Err(queue_full()),
        }
    }
}

fn idempotency_item(
    caller: &Caller,
    key: String,
    (kind, content): (Kind, &[u8]),
    id: Uuid,
    now: Timestamp,
) -> Idempotency {
    let mut hash = Sha256::new();
    hash.update([match kind {
        Kind::Photo { describe } => u8::from(describe),
        Kind::Prompt => 2,
    }]);
    hash.update(content);
    let fingerprint = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Idempotency { caller: caller.0.clone(), key, fingerprint, id, expires_at: now + IDEMPOTENCY_TTL }
}

fn queue_full() -> Error {
    let message = "Too much of yours is waiting. Send this again when some of it is done.";
    Error::too_many_requests(message, QUEUE_FULL_SECONDS)
}

fn same_content(item: &Idempotency, earlier: &Idempotency) -> Result<Uuid, Error> {
    if item.fingerprint == earlier.fingerprint {
        return Ok(earlier.id);
    }
    Err(Error::new(
        Code::IdempotencyConflict,
        "This Idempotency-Key was used for another photo, another prompt or other settings.",
    ))
}
