//! Photos that are too large for a request: the client gets a presigned PUT, sends the bytes to the
//! blob store by itself, and submits the key.
//!
//! `POST /uploads` writes one record, the upload, which keeps room among the caller's queued bytes.
//! It is due after an hour: what was not submitted by then is erased by sweep.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chrono::TimeDelta;
use sha2::{Digest, Sha256};
use shared::api::{MAX_UPLOAD_BYTES, UploadBody, UploadPermit};
use shared::crash::{self, Point};
use shared::create::{Asked, Draft, Kind, idempotency_item, queue_full, same_content, upload_used};
use shared::error::{Code, Error, ErrorBody};
use shared::http::{Caller, body};
use shared::job::{self, Record, Upload};
use shared::photo::Format;
use shared::ports::{BlobStore, JobQueue, JobStore, PutTerms};
use tokio::sync::SemaphorePermit;
use uuid::Uuid;

use crate::Submit;
use crate::body::ImageKey;

/// How long a client has to begin its upload.
const PERMIT_TTL: TimeDelta = TimeDelta::minutes(15);
/// When what was uploaded and not submitted is erased.
const UPLOAD_TTL: TimeDelta = TimeDelta::hours(1);
const MAX_BODY_BYTES: usize = 4096;

/// Upload a larger photo
///
/// For photos of 4 to 25 MiB: answers a URL, to which the client sends the bytes with a `PUT`, and
/// the `image_key` that `POST /submit` then takes in the place of the photo. Type, length and
/// SHA-256 are signed: nothing else can be put there. The upload must begin within 15 minutes and be
/// submitted within an hour; what is not is erased.
#[utoipa::path(
    post,
    path = "/uploads",
    tag = "jobs",
    request_body = UploadBody,
    responses(
        (status = 201, description = "PUT the bytes to `url` with `headers`, then submit `image_key`.", body = UploadPermit),
        (status = 400, description = "The body is not valid.", body = ErrorBody),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Not permitted.", body = ErrorBody),
        (status = 413, description = "More than 25 MiB.", body = ErrorBody),
        (status = 415, description = "Not image/jpeg, image/png or image/webp.", body = ErrorBody),
        (status = 429, description = "Too many requests, or too much queued.", body = ErrorBody),
        (status = 503, description = "A store is not available.", body = ErrorBody),
    )
)]
pub(crate) async fn create_upload<J: JobStore, Q: JobQueue, B: BlobStore>(
    State(submit): State<Arc<Submit<J, Q, B>>>,
    caller: Caller,
    request: Request,
) -> Result<(StatusCode, Json<UploadPermit>), Error> {
    let shape = r#"{"content_type": "image/jpeg", "size_bytes": number, "sha256": hex}"#;
    let body = body::json(request, MAX_BODY_BYTES, shape).await?;
    submit.permit(&caller, &body).await.map(|permit| (StatusCode::CREATED, Json(permit)))
}

impl<J: JobStore, Q: JobQueue, B: BlobStore> Submit<J, Q, B> {
    /// Keeps room for a photo and lets the client upload it.
    ///
    /// # Errors
    /// What is wrong with the announced photo, 429 where too much is queued, or
    /// [`Code::Unavailable`].
    pub async fn permit(&self, caller: &Caller, body: &UploadBody) -> Result<UploadPermit, Error> {
        if body.size_bytes > MAX_UPLOAD_BYTES {
            let mib = MAX_UPLOAD_BYTES / (1024 * 1024);
            return Err(Error::new(
                Code::PayloadTooLarge,
                format!("The photo is larger than {mib} MiB. Send it smaller."),
            ));
        }
        if body.size_bytes == 0 {
            return Err(body::invalid("\"size_bytes\" must be the number of bytes, at least 1."));
        }
        let format = Format::of_content_type(&body.content_type)?;
        let checksum_sha256 = STANDARD.encode(digest(&body.sha256)?);
        let now = self.clock.now();
        let id = job::new_id(now);
        let image_key = image_key(caller, id);
        let expires_at = now + PERMIT_TTL;
        let (content_type, size_bytes) = (format.content_type().to_owned(), body.size_bytes);
        let terms = PutTerms { content_type, size_bytes, checksum_sha256, expires_at };
        let put = self.blobs.presign_put(&image_key, &terms).await?;
        let upload = Upload::new(id, caller.0.clone(), image_key.clone(), size_bytes, now + UPLOAD_TTL);
        if !self.jobs.reserve(&upload, self.max_queued_bytes).await? {
            return Err(queue_full());
        }
        crash::here(Point::SubmitUploadReserved);
        Ok(UploadPermit { image_key, method: "PUT".to_owned(), url: put.url, headers: put.headers, expires_at })
    }

    /// Makes a job of what was uploaded under `image_key`, and erases the upload. Without an
    /// `Idempotency-Key` the image key is one: an upload makes one job, however often it is
    /// submitted.
    ///
    /// # Errors
    /// 404 where nothing of this caller was uploaded there, 409 where it was used otherwise, and
    /// the errors of [`Submit::accept`].
    pub async fn accept_upload(&self, caller: &Caller, key: Option<String>, upload: ImageKey) -> Result<Uuid, Error> {
        let ImageKey { image_key, describe, callback_url } = upload;
        // Before it is looked for: what else somebody sends may be longer than a store takes.
        let upload_id = upload_id(caller, &image_key).ok_or_else(nothing_uploaded)?;
        let now = self.clock.now();
        let id = job::new_id(now);
        let key = key.unwrap_or_else(|| image_key.clone());
        let (kind, content) = (Kind::Photo { describe }, image_key.as_bytes());
        let asked = Asked { kind, content, callback_url: callback_url.as_deref() };
        let item = idempotency_item(caller, key, asked, id, now);
        if let Some(earlier) = self.jobs.idempotency(&item.caller, &item.key, now).await? {
            return same_content(&item, &earlier);
        }
        let (upload, image, _turn) = match self.uploaded(caller, upload_id, &image_key).await {
            Ok(found) => found,
            // The same request, sent twice at once, may have used it up since the look above.
            Err(error) => {
                let earlier = self.jobs.idempotency(&item.caller, &item.key, now).await?;
                return earlier.map_or(Err(error), |earlier| same_content(&item, &earlier));
            }
        };
        let prefix = upload.prefix().to_owned();
        let (idempotency, upload) = (Some(item), Some(upload));
        let draft = Draft { id, now, caller, describe, idempotency, upload, callback_url };
        let id = self.create_of_photo(draft, &image).await?;
        // Where this fails, sweep erases it: the upload is due since it was used up.
        if let Err(error) = self.blobs.delete_prefix(&prefix).await {
            tracing::warn!(job.id = %id, error.chain = error.chain(), "upload not erased; sweep will");
        }
        crash::here(Point::SubmitOriginalErased);
        Ok(id)
    }

    /// The upload, its bytes, and the turn under which they are held.
    async fn uploaded(
        &self,
        caller: &Caller,
        id: Uuid,
        image_key: &str,
    ) -> Result<(Upload, Vec<u8>, SemaphorePermit<'_>), Error> {
        let upload = self.own_upload(caller, id, image_key).await?;
        let turn = self.upload_turns.acquire().await.map_err(Error::internal)?;
        let image = self.blobs.get(image_key).await?.ok_or_else(nothing_uploaded)?;
        Ok((upload, image, turn))
    }

    async fn own_upload(&self, caller: &Caller, id: Uuid, image_key: &str) -> Result<Upload, Error> {
        match self.jobs.get(id).await? {
            Some(Record::Upload(upload)) if upload.caller == caller.0 && upload.image_key == image_key => {
                if upload.used { Err(upload_used()) } else { Ok(upload) }
            }
            _ => Err(nothing_uploaded()),
        }
    }
}

/// `incoming/<digest of the caller>/<id>/photo`: a caller's name may hold anything, and is nobody's
/// business.
fn image_key(caller: &Caller, id: Uuid) -> String {
    let digest = Sha256::digest(caller.0.as_bytes());
    let folder: String = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("incoming/{folder}/{id}/photo")
}

/// The upload that a key of this caller's names.
fn upload_id(caller: &Caller, key: &str) -> Option<Uuid> {
    let id = key.rsplit('/').nth(1).and_then(|id| Uuid::parse_str(id).ok())?;
    (image_key(caller, id) == key).then_some(id)
}

fn digest(hex: &str) -> Result<Vec<u8>, Error> {
    let is_hex = hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    let wrong = || body::invalid("\"sha256\" must be the SHA-256 of the bytes, 64 hex digits.");
    if !is_hex {
        return Err(wrong());
    }
    let pairs = (0..hex.len()).step_by(2).map(|start| u8::from_str_radix(&hex[start..start + 2], 16));
    pairs.collect::<Result<_, _>>().map_err(|_| wrong())
}

fn nothing_uploaded() -> Error {
    Error::new(
        Code::NotFound,
        "Nothing was uploaded under this image_key, or it was not submitted within an hour. Ask POST /uploads again.",
    )
}
