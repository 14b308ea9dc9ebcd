//! The record of one request and its state machine: pure, no clock, no I/O.
//!
//! Every method that moves a job takes the moment as an argument and returns the record as it must
//! be written next, or says why the move is refused. The store writes it only where the record it
//! was computed from still stands ([`Job::fence`]), so a worker whose lease was taken over changes
//! nothing.
//!
//! ```text
//! pending ─claim─▶ processing ─▶ awaiting_description ─▶ completed
//!    ▲                 │ │ └────▶ completed (no description asked for, abstained, or described at once)
//!    └─release/expire──┘ └──────▶ needs_retake
//! any open state ─▶ failed {retryable} ─redrive─▶ pending | awaiting_description
//! ```
//!
//! A photo starts as `pending`, a prompt as `awaiting_description`. What is told of the end, and to whom,
//! is in `callback.rs`.

mod callback;
mod machine;
mod outcome;
mod prompt;
mod record;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::clock::{Timestamp, from_millis};

pub use callback::{Callback, Delivery, DeliveryOutcome, FailedTry, Turn};
pub use machine::{InferenceOutcome, Policy, Refused, SweepAction};
pub use outcome::{
    AbstainReason, Abstention, Description, DescriptionSource, Failure, FailureCode, LlmCall, Prediction, Quality,
    Reading, RetakeReason,
};
pub use prompt::{AnswerContent, LlmAnswer, LlmTrouble, StoredPrompt, answer_key, prompt_key};
pub use record::{Fence, Record, Tombstone, Upload};

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

impl Job {
    /// Puts a claim's call into the ledger, in the place of what its begin left there; `None` where nobody was asked.
    pub fn settle_call(&mut self, claim: u64, call: Option<LlmCall>) {
        self.llm_calls.retain(|known| known.claim != claim);
        self.llm_calls.extend(call);
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
