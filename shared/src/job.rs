//! The record of one request and its state machine: pure, no clock, no I/O.
//!
//! Every method that moves a job takes the moment as an argument and returns the record as it must
//! be written next, or says why the move is refused. The store writes it only where the record it
//! was computed from still stands ([`Job::fence`]), so a worker whose lease was taken over changes
//! nothing.
//!
//! ```text
//! pending ─claim─▶ processing ─▶ awaiting_description ─▶ completed
//!    ▲                 │ │ └────▶ completed (no description asked for, or abstained)
//!    └─release/expire──┘ └──────▶ needs_retake
//! any open state ─▶ failed {retryable} ─redrive─▶ pending | awaiting_description
//! ```
//!
//! A photo starts as `pending`, a prompt as `awaiting_description`. What is told of the end, and to whom,
//! is in `callback.rs`.

mod callback;
mod machine;
mod prompt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::clock::{Timestamp, from_millis};

pub use callback::{Callback, Delivery, DeliveryOutcome, FailedTry, Turn};
pub use machine::{InferenceOutcome, Policy, Refused, SweepAction};
pub use prompt::{AnswerContent, LlmAnswer, LlmTrouble, StoredPrompt, answer_key, prompt_key};

/// Where a job stands. The names are part of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Pending,
    Processing,
    AwaitingDescription,
    Completed,
    NeedsRetake,
    Failed,
}

impl Status {
    /// Open states still have work ahead; the others are final.
    #[must_use]
    pub fn is_open(self) -> bool {
        matches!(self, Self::Pending | Self::Processing | Self::AwaitingDescription)
    }

    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Processing => "processing",
            Self::AwaitingDescription => "awaiting_description",
            Self::Completed => "completed",
            Self::NeedsRetake => "needs_retake",
            Self::Failed => "failed",
        }
    }
}

/// The part of the pipeline that claims jobs, counts attempts, and can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Inference,
    Enrichment,
}

/// What the change feed is asked to start; the feed's filter looks at nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dispatch {
    Enrichment,
    /// The delivery of a job's end.
    Webhook,
}

impl Dispatch {
    /// The marker's value in the record, which the feed's filter names.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enrichment => "enrichment",
            Self::Webhook => "webhook",
        }
    }
}

/// Claims made so far, per stage. Only claims count: a message delivered twice costs nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempts {
    pub inference: u32,
    pub enrichment: u32,
}

/// What is known of the stored photo, whose bytes lie in the blob store under [`photo_key`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Photo {
    /// `image/jpeg`, `image/png` or `image/webp`, from the magic bytes.
    pub content_type: String,
    /// Pixels as stored, before `orientation` is applied.
    pub width: u32,
    pub height: u32,
    /// EXIF orientation, 1–8; the metadata itself is not stored.
    pub orientation: u8,
    pub size_bytes: u64,
    /// When the bytes may be gone; a redrive after it is refused.
    pub expires_at: Timestamp,
}

/// What a job works on. Its name is that of a field of the record, as in records of builds that
/// knew photos alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// Read by the model, then described.
    Photo(Photo),
    /// Answered by the LLM.
    Prompt(StoredPrompt),
}

impl Input {
    /// What it counts against its caller's queued bytes while the job is open.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        match self {
            Self::Photo(photo) => photo.size_bytes,
            Self::Prompt(prompt) => prompt.size_bytes,
        }
    }

    /// When its bytes may be gone; a redrive after it is refused.
    #[must_use]
    pub fn expires_at(&self) -> Timestamp {
        match self {
            Self::Photo(photo) => photo.expires_at,
            Self::Prompt(prompt) => prompt.expires_at,
        }
    }
}

/// Why a new photo is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RetakeReason {
    TooSmall,
    Blurred,
    TooDark,
    TooBright,
    LowContrast,
}

/// One class and its calibrated probability.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Prediction {
    /// The class's code in the model's manifest.
    #[schema(example = "nv")]
    pub label: String,
    #[schema(example = "Melanocytic nevus")]
    pub name: String,
    /// Calibrated, 0–1; all classes add up to 1.
    pub probability: f64,
    /// Whether the manifest counts the class among the malignant or pre-malignant ones.
    pub malignant: bool,
}

/// Why the model gives no label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AbstainReason {
    /// The highest calibrated probability is below the manifest's threshold.
    LowConfidence,
    /// The picture does not look like what the model was trained on.
    OutOfDistribution,
}

/// The model gives no label for this photo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Abstention {
    pub reason: AbstainReason,
}

/// What the model said: predictions, or an abstention and none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reading {
    /// SHA-256 of the bundle's manifest, in hex.
    pub model_digest: String,
    /// Highest first; empty where the model abstained.
    pub predictions: Vec<Prediction>,
    pub abstained: Option<Abstention>,
    /// Whether an overlay of the class activation map lies under [`map_key`]; in no record of
    /// earlier builds.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub has_map: bool,
}

/// Measures of the photo, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Quality {
    /// Whether the photo went on to the model.
    pub accepted: bool,
    /// Empty where accepted.
    pub reasons: Vec<RetakeReason>,
    /// The measures behind the reasons, by name; units in `docs/API.md`.
    #[schema(value_type = std::collections::BTreeMap<String, f64>)]
    pub measures: std::collections::BTreeMap<String, f64>,
}

/// Who wrote a description.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DescriptionSource {
    Llm,
    /// The offline template; `fallback` says why where an LLM had been asked.
    Template,
}

/// A plain-language text about the predictions, disclaimer included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Description {
    pub text: String,
    pub source: DescriptionSource,
    /// Version of the prompt or of the template.
    #[schema(example = "describe-v1")]
    pub version: String,
    /// The code of what kept the LLM's text out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
}

/// One call to the LLM, for the ledger. No prompt and no answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LlmCall {
    pub claim: u64,
    pub at: Timestamp,
    pub latency_ms: u64,
    /// Requests that the call took; all but the last failed.
    pub tries: u32,
    /// `ok`, or the code of what went wrong.
    pub outcome: String,
    pub finish_reason: Option<String>,
    pub prompt_tokens: Option<u64>,
    pub completion_tokens: Option<u64>,
    /// By the prices that were set; absent where none are.
    pub cost_usd: Option<f64>,
}

/// How a job ended badly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    pub stage: Stage,
    pub code: FailureCode,
    /// Whether an operator may send the job round again.
    pub retryable: bool,
}

/// Why a job failed. The names are part of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The header was right, the pixels are damaged.
    PhotoUnreadable,
    /// The stored photo is gone.
    PhotoMissing,
    /// The network gave something that is no probability.
    ModelError,
    /// Workers died or were refused `MAX_ATTEMPTS` times.
    AttemptsExhausted,
    /// The job was open for longer than its deadline.
    DeadlineExceeded,
    /// The stored prompt is gone.
    PromptMissing,
    /// The host has no LLM any more.
    LlmNotConfigured,
    /// The LLM refused the request.
    LlmRefused,
    /// What the LLM's server answered is no completion.
    LlmInvalidResponse,
    /// JSON was asked for, and the answer is none.
    LlmInvalidJson,
    /// The LLM takes no more requests, `MAX_ATTEMPTS` times.
    LlmRateLimited,
    /// The LLM took too long, `MAX_ATTEMPTS` times.
    LlmTimeout,
    /// The LLM could not be reached or failed, `MAX_ATTEMPTS` times.
    LlmUnavailable,
}

impl FailureCode {
    /// A sentence for the person who reads the result.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            Self::PhotoUnreadable => "The photo is damaged and cannot be decoded. Send it again.",
            Self::PhotoMissing => "The stored photo is gone. Send it again.",
            Self::ModelError => "The model gave no usable answer for this photo.",
            Self::AttemptsExhausted => "The request could not be processed after several attempts.",
            Self::DeadlineExceeded => "The request could not be processed in time.",
            Self::PromptMissing => "The stored prompt is gone. Send it again.",
            Self::LlmNotConfigured => "This host has no LLM; its operator sets LLM_BASE_URL.",
            Self::LlmRefused => "The LLM refused the request.",
            Self::LlmInvalidResponse => "The LLM answered something that is no completion.",
            Self::LlmInvalidJson => "The LLM's answer is not the JSON that was asked for.",
            Self::LlmRateLimited => "The LLM took no more requests, several times.",
            Self::LlmTimeout => "The LLM took too long, several times.",
            Self::LlmUnavailable => "The LLM was not available, several times.",
        }
    }
}

/// Milliseconds spent in each stage; absent where the stage did not run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Timings {
    /// From submission to the claim that finished the job's inference, or its prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued: Option<f64>,
    /// Reading the photo from the blob store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fetch: Option<f64>,
    /// Decoding to upright pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode: Option<f64>,
    /// The quality gate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<f64>,
    /// Resizing and normalising to the input tensor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preprocess: Option<f64>,
    /// The network; absent where a cached run of the same photo was used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inference: Option<f64>,
    /// Writing the description, LLM included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub describe: Option<f64>,
    /// From submission to the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<f64>,
}

/// One request, from submission to its end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// UUIDv7: sorts by time of submission.
    pub id: Uuid,
    /// Whose job it is; another caller's request for it is answered 404.
    pub caller: String,
    pub status: Status,
    /// Grows by one with every write.
    pub version: u64,
    /// Grows by one with every claim; a worker may write only under the claim it was given.
    pub claim: u64,
    pub attempts: Attempts,
    /// How often the job was sent since it last moved; doubles the wait for the next time.
    pub redispatches: u32,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// After this moment an open job is ended.
    pub deadline_at: Timestamp,
    /// When sweep looks at the job; set in every open state, and in a final one for as long as somebody
    /// is still to be told of it.
    pub due_at: Option<Timestamp>,
    /// Until when the holder of `claim` may work undisturbed.
    pub lease_until: Option<Timestamp>,
    /// Set where the feed must start something.
    pub dispatch: Option<Dispatch>,
    /// When the record is deleted.
    pub expires_at: Timestamp,
    /// Follows the job through every log line.
    pub trace_id: String,
    /// Whether a description was asked for.
    pub describe: bool,
    /// Names the idempotency item, which goes when the job is deleted.
    pub idempotency_key: Option<String>,
    /// Who wants to be told of the end over HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub callback: Option<Callback>,
    #[serde(flatten)]
    pub input: Input,
    pub quality: Option<Quality>,
    pub reading: Option<Reading>,
    /// Where the cache keeps the raw outputs, so that a delete can erase them.
    pub cache_key: Option<String>,
    pub description: Option<Description>,
    /// What the LLM answered to a prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<LlmAnswer>,
    pub llm_calls: Vec<LlmCall>,
    pub failure: Option<Failure>,
    pub timings_ms: Timings,
}

/// What is left of a deleted job: enough to erase late writes and to refuse stale workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    pub id: Uuid,
    pub caller: String,
    /// The job's; absent in tombstones of earlier builds.
    #[serde(default)]
    pub trace_id: String,
    pub version: u64,
    /// Where the cache may still hold the outputs; absent once they are erased for good.
    pub cache_key: Option<String>,
    /// One lease after the delete: from then on no worker can still be writing.
    pub erase_after: Timestamp,
    /// How often sweep has come by.
    pub sweeps: u32,
    /// When sweep erases (again); absent when everything is gone.
    pub due_at: Option<Timestamp>,
    pub expires_at: Timestamp,
}

/// A photo that a caller may send straight to the blob store, until a job is made of it. Its size
/// counts against the caller's queued bytes from the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    pub id: Uuid,
    pub caller: String,
    pub version: u64,
    /// Where the blob store puts it: `incoming/<digest of the caller>/<id>/photo`.
    pub image_key: String,
    /// As announced, and signed with the permission to upload.
    pub size_bytes: u64,
    /// Whether a job was made of it, or it was given up.
    pub used: bool,
    /// When sweep erases what was uploaded; absent when it is gone.
    pub due_at: Option<Timestamp>,
    pub expires_at: Timestamp,
}

/// What the store holds under an id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "the others are rare and short-lived in memory")]
pub enum Record {
    Job(Job),
    Tombstone(Tombstone),
    Upload(Upload),
}

/// The record that a write replaces. The version alone would do; naming the state and the claim
/// as well keeps the condition readable in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    pub id: Uuid,
    pub version: u64,
    pub claim: u64,
    /// Absent for what is no job.
    pub status: Option<Status>,
    /// What the record counts against its caller; the write settles the difference.
    pub queued_bytes: u64,
}

impl Record {
    #[must_use]
    pub fn id(&self) -> Uuid {
        match self {
            Self::Job(job) => job.id,
            Self::Tombstone(tombstone) => tombstone.id,
            Self::Upload(upload) => upload.id,
        }
    }

    #[must_use]
    pub fn caller(&self) -> &str {
        match self {
            Self::Job(job) => &job.caller,
            Self::Tombstone(tombstone) => &tombstone.caller,
            Self::Upload(upload) => &upload.caller,
        }
    }

    #[must_use]
    pub fn due_at(&self) -> Option<Timestamp> {
        match self {
            Self::Job(job) => job.due_at,
            Self::Tombstone(tombstone) => tombstone.due_at,
            Self::Upload(upload) => upload.due_at,
        }
    }

    #[must_use]
    pub fn expires_at(&self) -> Timestamp {
        match self {
            Self::Job(job) => job.expires_at,
            Self::Tombstone(tombstone) => tombstone.expires_at,
            Self::Upload(upload) => upload.expires_at,
        }
    }

    /// What the record counts against its caller's queued bytes: the photo or prompt of an open job,
    /// or the room kept for an upload.
    #[must_use]
    pub fn queued_bytes(&self) -> u64 {
        match self {
            Self::Job(job) => job.queued_bytes(),
            Self::Upload(upload) if !upload.used => upload.size_bytes,
            Self::Tombstone(_) | Self::Upload(_) => 0,
        }
    }

    #[must_use]
    pub fn fence(&self) -> Fence {
        match self {
            Self::Job(job) => job.fence(),
            Self::Tombstone(tombstone) => {
                Fence { id: tombstone.id, version: tombstone.version, claim: 0, status: None, queued_bytes: 0 }
            }
            Self::Upload(upload) => {
                let (id, version, queued_bytes) = (upload.id, upload.version, self.queued_bytes());
                Fence { id, version, claim: 0, status: None, queued_bytes }
            }
        }
    }

    /// The job, unless it was deleted.
    #[must_use]
    pub fn into_job(self) -> Option<Job> {
        match self {
            Self::Job(job) => Some(job),
            Self::Tombstone(_) | Self::Upload(_) => None,
        }
    }
}

/// What a new job is made from; see [`Job::new`].
#[derive(Debug, Clone)]
pub struct NewJob {
    pub id: Uuid,
    pub caller: String,
    pub trace_id: String,
    pub describe: bool,
    pub idempotency_key: Option<String>,
    /// Where to tell of the end.
    pub callback_url: Option<String>,
    pub input: Input,
}

/// A new, time-ordered id. `now` gives the order, randomness the rest.
#[must_use]
pub fn new_id(now: Timestamp) -> Uuid {
    let millis = u64::try_from(now.timestamp_millis()).unwrap_or(0);
    let timestamp = uuid::Timestamp::from_unix_time(millis / 1000, (millis % 1000) as u32 * 1_000_000, 0, 0);
    Uuid::new_v7(timestamp)
}

/// When an id was made, from its UUIDv7 timestamp.
#[must_use]
pub fn id_time(id: Uuid) -> Option<Timestamp> {
    let (seconds, nanos) = id.get_timestamp()?.to_unix();
    Some(from_millis(i64::try_from(seconds).ok()? * 1000 + i64::from(nanos / 1_000_000)))
}

/// All blobs of a job lie under this prefix.
#[must_use]
pub fn blob_prefix(id: Uuid) -> String {
    format!("jobs/{id}/")
}

/// Where a job's photo lies.
#[must_use]
pub fn photo_key(id: Uuid) -> String {
    format!("jobs/{id}/photo")
}

/// Where the overlay of a job's class activation map lies. By the model's digest: the same photo
/// and model give the same bytes, so a stale worker's takes nobody's place.
#[must_use]
pub fn map_key(id: Uuid, model_digest: &str) -> String {
    format!("jobs/{id}/map-{model_digest}")
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod model;
