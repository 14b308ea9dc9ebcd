//! `POST /submit`: takes a photo, stores it without its metadata, and enqueues its job; or takes a
//! prompt for the LLM.
//! `POST /uploads`: lets a client put a larger photo straight into the blob store first.
//!
//! Triggered by HTTP. Submit writes, in this order: the photo (blob store), the record with its
//! idempotency item (one transaction), the message (queue). Where the last write fails the answer
//! is still 202: the record is due, and sweep sends. A job of an upload also uses the upload up (in
//! the same transaction) and then erases what was uploaded.

pub mod body;
mod uploads;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Router};
use shared::api::prompt::PromptRequest;
use shared::api::{SubmitBody, Submitted, UploadBody, UploadPermit};
use shared::auth::Identity;
use shared::callback::Destinations;
use shared::clock::Clock;
use shared::crash::{self, Point};
use shared::create::{self, Draft, Kind, Maker, PromptDraft, checked_key, idempotency_item, same_content};
use shared::error::{Error, ErrorBody};
use shared::http::Caller;
use shared::job::{self, Input, Photo, Policy, Status};
use shared::photo;
use shared::ports::{BlobStore, JobQueue, JobStore};
use tokio::sync::Semaphore;
use utoipa::OpenApi;
use uuid::Uuid;

use body::Asked;
pub use body::Submission;

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
    /// Where the end of a job may be told (`WEBHOOK_HOSTS`).
    pub destinations: Destinations,
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
        ("Idempotency-Key" = Option<String>, Header, pattern = "^[!-~]([ -~]{0,253}[!-~])?$", description = "Repeating a request under the same key within 24 hours gives the same id; other content under it gives 409. At most 255 printable ASCII characters."),
        ("describe" = Option<bool>, Query, description = "For raw bodies: whether a description is wanted (default true)."),
        ("callback_url" = Option<String>, Query, description = "For raw bodies: where to tell of the end."),
    ),
    request_body(content(
        (SubmitBody = "application/json"),
        (Vec<u8> = "image/jpeg"),
        (Vec<u8> = "image/png"),
        (Vec<u8> = "image/webp"),
        (body::PhotoForm = "multipart/form-data"),
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
        (status = 422, description = "The photo is damaged or cut off, or `callback_url` is none that may be called.", body = ErrorBody),
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
    let mut asked = body::read(request).await?;
    if let Some(url) = asked.callback_url() {
        *url = submit.destinations.check(url)?.into();
    }
    let (id, status) = match asked {
        Asked::Photo(submission) => (submit.accept(&caller, key, submission).await?, Status::Pending),
        Asked::Upload(upload) => (submit.accept_upload(&caller, key, upload).await?, Status::Pending),
        Asked::Prompt { request, callback_url } => {
            identity.without_limits()?;
            (submit.accept_prompt(&caller, key, &request, callback_url).await?, Status::AwaitingDescription)
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
    // What is no text is no key either.
    checked_key(value.to_str().unwrap_or("")).map(Some)
}

impl<J: JobStore, Q: JobQueue, B: BlobStore> Submit<J, Q, B> {
    fn maker(&self) -> Maker<'_, J, Q, B> {
        Maker {
            jobs: &self.jobs,
            queue: &self.queue,
            blobs: &self.blobs,
            policy: &self.policy,
            max_queued_bytes: self.max_queued_bytes,
            has_llm: self.has_llm,
        }
    }

    /// Makes a job of a submission and returns its id, or the id that the same submission under
    /// the same key was given before.
    ///
    /// # Errors
    /// What is wrong with the photo or the key, 429 where too much is queued, or
    /// [`shared::error::Code::Unavailable`]; the client may repeat the request then.
    pub async fn accept(&self, caller: &Caller, key: Option<String>, submission: Submission) -> Result<Uuid, Error> {
        let now = self.clock.now();
        let id = job::new_id(now);
        let Submission { image, describe, callback_url } = submission;
        let asked =
            create::Asked { kind: Kind::Photo { describe }, content: &image, callback_url: callback_url.as_deref() };
        let idempotency = key.map(|key| idempotency_item(caller, key, asked, id, now));
        if let Some(item) = &idempotency
            && let Some(earlier) = self.jobs.idempotency(&item.caller, &item.key, now).await?
        {
            return same_content(item, &earlier);
        }
        let draft = Draft { id, now, caller, describe, idempotency, upload: None, callback_url };
        self.create_of_photo(draft, &image).await
    }

    /// Makes a job of a checked prompt, as [`Maker::make_prompt`] does.
    ///
    /// # Errors
    /// Those of [`Maker::make_prompt`].
    pub async fn accept_prompt(
        &self,
        caller: &Caller,
        key: Option<String>,
        request: &PromptRequest,
        callback_url: Option<String>,
    ) -> Result<Uuid, Error> {
        let now = self.clock.now();
        let draft = PromptDraft { now, caller, key, request, connection: None, callback_url };
        self.maker().make_prompt(draft).await
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
        self.maker().make(draft, Input::Photo(photo)).await
    }
}
