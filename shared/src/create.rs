//! How a job comes into being, whatever asked for it.
//!
//! Writes, in this order: the prompt where it is one (blob store), the record with its idempotency
//! item (one transaction), the message of a photo (queue). A prompt's record asks the change feed for
//! enrichment, so it needs no message.

use chrono::TimeDelta;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::api::chat::{self, MAX_BODY_BYTES};
use crate::api::prompt::PromptRequest;
use crate::clock::Timestamp;
use crate::crash::{self, Point};
use crate::error::{Code, Error};
use crate::http::Caller;
use crate::http::body::invalid;
use crate::job::{self, Input, Job, NewJob, Policy, Status, StoredPrompt, Upload};
use crate::message::Message;
use crate::ports::{BlobStore, Created, Creation, Idempotency, JobQueue, JobStore};
use crate::telemetry;

/// How long a client may repeat a request under its `Idempotency-Key`.
pub(crate) const IDEMPOTENCY_TTL: TimeDelta = TimeDelta::hours(24);
/// The longest `Idempotency-Key`, in bytes.
pub const MAX_KEY_BYTES: usize = 255;
/// What a client is told to wait where too much is queued: a good many photos are worked meanwhile.
const QUEUE_FULL_SECONDS: u32 = 30;

/// What jobs are made with.
#[derive(Clone, Copy)]
pub struct Maker<'a, J, Q, B> {
    pub jobs: &'a J,
    pub queue: &'a Q,
    pub blobs: &'a B,
    pub policy: &'a Policy,
    /// The most that one caller may have queued (`MAX_QUEUED_MB`).
    pub max_queued_bytes: u64,
    /// Whether prompts are taken (`LLM_BASE_URL`).
    pub has_llm: bool,
}

/// A new job on its way: what names it, and what the client asked for.
pub struct Draft<'a> {
    pub id: Uuid,
    pub now: Timestamp,
    pub caller: &'a Caller,
    pub describe: bool,
    pub idempotency: Option<Idempotency>,
    pub upload: Option<Upload>,
    /// Where to tell of the end, checked.
    pub callback_url: Option<String>,
}

/// A prompt on its way.
pub struct PromptDraft<'a> {
    pub now: Timestamp,
    pub caller: &'a Caller,
    /// The client's `Idempotency-Key`.
    pub key: Option<String>,
    pub request: &'a PromptRequest,
    /// The connection that asked, which is told the text as it comes.
    pub connection: Option<String>,
    /// Where to tell of the end, checked.
    pub callback_url: Option<String>,
}

/// What an idempotency key was used for, besides the bytes.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Photo { describe: bool },
    Prompt,
}

/// What a request asks for: the same under the same key is the same request.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub kind: Kind,
    /// The bytes of the photo or the prompt, or where the photo was uploaded.
    pub content: &'a [u8],
    pub callback_url: Option<&'a str>,
}

/// What is wrong with a prompt, whoever sends it.
///
/// # Errors
/// 400 or 413, in words that repeat nothing of it.
pub fn check_prompt(request: &PromptRequest) -> Result<(), Error> {
    chat::check(&request.messages, request.temperature, request.max_tokens).map_err(invalid)?;
    let size: usize = request.messages.iter().map(|message| message.content.len()).sum();
    if size > MAX_BODY_BYTES {
        return Err(Error::new(Code::PayloadTooLarge, "The prompt is larger than 1 MiB. Send less."));
    }
    Ok(())
}

impl<J: JobStore, Q: JobQueue, B: BlobStore> Maker<'_, J, Q, B> {
    /// Makes a job of a checked prompt and returns its id, or the id that the same prompt under the
    /// same key was given before.
    ///
    /// # Errors
    /// 403 for guests, 404 where there is no LLM, 409 for a key of other content, 429 where too much
    /// is queued, or [`Code::Unavailable`]; the client may repeat the request then.
    pub async fn make_prompt(&self, draft: PromptDraft<'_>) -> Result<Uuid, Error> {
        let PromptDraft { now, caller, key, request, connection, callback_url } = draft;
        if caller.is_guest() {
            return Err(Error::new(Code::Forbidden, "The LLM answers to callers with credentials."));
        }
        if !self.has_llm {
            return Err(Error::new(Code::LlmNotConfigured, "This host has no LLM; its operator sets LLM_BASE_URL."));
        }
        let id = job::new_id(now);
        let bytes = serde_json::to_vec(request).map_err(Error::internal)?;
        let asked = Asked { kind: Kind::Prompt, content: &bytes, callback_url: callback_url.as_deref() };
        let idempotency = key.map(|key| idempotency_item(caller, key, asked, id, now));
        if let Some(item) = &idempotency
            && let Some(earlier) = self.jobs.idempotency(&item.caller, &item.key, now).await?
        {
            return same_content(item, &earlier);
        }
        let expires_at = now + self.policy.photo_ttl;
        let stored = StoredPrompt { size_bytes: bytes.len() as u64, expires_at, connection };
        self.blobs.put(&job::prompt_key(id), bytes).await?;
        crash::here(Point::SubmitPromptStored);
        let draft = Draft { id, now, caller, describe: false, idempotency, upload: None, callback_url };
        self.make(draft, Input::Prompt(stored)).await
    }

    /// Writes the job of what was stored, and sends its message.
    ///
    /// # Errors
    /// Where the record could not be written, or may not be.
    pub async fn make(&self, draft: Draft<'_>, input: Input) -> Result<Uuid, Error> {
        let Draft { id, now, caller, describe, idempotency, upload, callback_url } = draft;
        let trace_id = crate::http::request_id();
        let idempotency_key = idempotency.as_ref().map(|item| item.key.clone());
        let caller = caller.0.clone();
        let new = NewJob { id, caller, trace_id, describe, idempotency_key, callback_url, input };
        let job = Job::new(new, now, self.policy);
        let max_queued_bytes = self.max_queued_bytes;
        let creation = Creation { job, idempotency: idempotency.clone(), upload, max_queued_bytes };
        let created = create_job(self.jobs, self.queue, creation).await?;
        if created != Created::New {
            // What this request has stored is not needed. What stays, sweep erases.
            if let Err(error) = self.blobs.delete_prefix(&job::blob_prefix(id)).await {
                tracing::warn!(error.code = error.code().as_str(), error.chain = error.chain(), "blobs left for sweep");
            }
        }
        match created {
            Created::New => Ok(id),
            // Another request under the same key was faster.
            Created::KeyTaken(earlier) => {
                idempotency.as_ref().map_or(Ok(earlier.id), |item| same_content(item, &earlier))
            }
            Created::UploadTaken => Err(upload_used()),
            Created::QueueFull => Err(queue_full()),
        }
    }
}

/// Writes a job with what belongs to it, then sends the message of a photo; a prompt's record is its
/// own dispatch. A message that cannot be sent is no error: the record is due, and sweep sends it.
async fn create_job(jobs: &impl JobStore, queue: &impl JobQueue, creation: Creation) -> Result<Created, Error> {
    let (id, trace_id) = (creation.job.id, creation.job.trace_id.clone());
    let is_pending = creation.job.status == Status::Pending;
    let created = jobs.create(creation).await?;
    if created == Created::New {
        crash::here(Point::SubmitRecordWritten);
        telemetry::about_job(id, &trace_id);
        if !is_pending {
            return Ok(created);
        }
        match queue.send(Message::Infer { id }).await {
            Ok(()) => crash::here(Point::SubmitMessageSent),
            Err(error) => {
                tracing::warn!(error.chain = error.chain(), "message not sent; sweep will send it");
            }
        }
    }
    Ok(created)
}

/// What remembers that this caller has used `key` for this content.
#[must_use]
pub fn idempotency_item(caller: &Caller, key: String, asked: Asked<'_>, id: Uuid, now: Timestamp) -> Idempotency {
    let mut hash = Sha256::new();
    let kind = match asked.kind {
        Kind::Photo { describe } => u8::from(describe),
        Kind::Prompt => 2,
    };
    match asked.callback_url {
        None => hash.update([kind]),
        Some(url) => {
            // With its length, so that it cannot be taken for a part of the content.
            hash.update([kind + 4]);
            hash.update((url.len() as u64).to_le_bytes());
            hash.update(url);
        }
    }
    hash.update(asked.content);
    let fingerprint = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Idempotency { caller: caller.0.clone(), key, fingerprint, id, expires_at: now + IDEMPOTENCY_TTL }
}

/// The id that the same request was given before.
///
/// # Errors
/// 409 where it was another.
pub fn same_content(item: &Idempotency, earlier: &Idempotency) -> Result<Uuid, Error> {
    if item.fingerprint == earlier.fingerprint {
        return Ok(earlier.id);
    }
    Err(Error::new(
        Code::IdempotencyConflict,
        "This Idempotency-Key was used for another photo, another prompt or other settings.",
    ))
}

/// A client's `Idempotency-Key`.
///
/// # Errors
/// 400 where it is none.
pub fn checked_key(key: &str) -> Result<String, Error> {
    let is_key = (1..=MAX_KEY_BYTES).contains(&key.len()) && key.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    let wrong = || Error::new(Code::InvalidRequest, "Idempotency-Key must be 1 to 255 printable ASCII characters.");
    is_key.then(|| key.to_owned()).ok_or_else(wrong)
}

/// 429: the caller has too much waiting.
#[must_use]
pub fn queue_full() -> Error {
    let message = "Too much of yours is waiting. Send this again when some of it is done.";
    Error::too_many_requests(message, QUEUE_FULL_SECONDS)
}

/// 409: an upload makes one job.
#[must_use]
pub fn upload_used() -> Error {
    let message = "This upload was submitted before: under another key, with other settings, or for a job that was \
        deleted since. Upload the photo again.";
    Error::new(Code::IdempotencyConflict, message)
}
