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

use chrono::TimeDelta;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::clock::{Timestamp, from_millis};

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
}

impl Dispatch {
    /// The marker's value in the record, which the feed's filter names.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enrichment => "enrichment",
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
}

impl FailureCode {
    /// A sentence for the person who reads the result.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            Self::PhotoUnreadable => "The photo is damaged and cannot be decoded. Send it again.",
            Self::PhotoMissing => "The stored photo is gone. Send it again.",
            Self::ModelError => "The model gave no usable answer for this photo.",
            Self::AttemptsExhausted => "The photo could not be processed after several attempts.",
            Self::DeadlineExceeded => "The photo could not be processed in time.",
        }
    }
}

/// Milliseconds spent in each stage; absent where the stage did not run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Timings {
    /// From submission to the claim that finished the job's inference.
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

/// The numbers that the state machine goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Claims per stage before a job is given up (`MAX_ATTEMPTS`).
    pub max_attempts: u32,
    /// How long a dispatched job may lie unclaimed before sweep sends it again; doubles each time.
    pub redispatch: TimeDelta,
    /// The first wait after a retryable failure; doubles with each attempt.
    pub backoff: TimeDelta,
    /// Upper bound of both.
    pub max_delay: TimeDelta,
    /// The longest that one claim may last.
    pub lease: TimeDelta,
    /// How long a job may stay open.
    pub deadline: TimeDelta,
    pub photo_ttl: TimeDelta,
    pub result_ttl: TimeDelta,
    pub tombstone_ttl: TimeDelta,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_attempts: 5,
            redispatch: TimeDelta::seconds(120),
            backoff: TimeDelta::seconds(5),
            max_delay: TimeDelta::hours(1),
            lease: TimeDelta::seconds(120),
            deadline: TimeDelta::hours(24),
            photo_ttl: TimeDelta::days(7),
            result_ttl: TimeDelta::days(30),
            tombstone_ttl: TimeDelta::days(15),
        }
    }
}

impl Policy {
    /// `base` doubled `times` times, at most `max_delay`.
    #[must_use]
    pub fn doubled(&self, base: TimeDelta, times: u32) -> TimeDelta {
        let factor = 1_i32.checked_shl(times.min(20)).unwrap_or(i32::MAX);
        base.checked_mul(factor).map_or(self.max_delay, |delay| delay.min(self.max_delay))
    }
}

/// Why a move is refused. Nothing is written then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the job has ended")]
    Ended,
    #[error("another worker holds a live lease")]
    Leased,
    #[error("the claim is no longer held")]
    Stale,
    #[error("the job is not in the state that this move leaves")]
    WrongState,
    #[error("the attempts are used up or the deadline has passed: sweep ends the job")]
    Exhausted,
    #[error("nothing is due")]
    NotDue,
    #[error("the photo has expired")]
    PhotoExpired,
}

/// How inference ended; see [`Job::finish_inference`].
#[derive(Debug, Clone, PartialEq)]
pub enum InferenceOutcome {
    /// The model gave predictions or abstained.
    Read { reading: Reading, quality: Quality, cache_key: Option<String> },
    /// The quality gate wants another photo.
    Retake { quality: Quality },
    /// No later attempt would do better.
    Failed { code: FailureCode },
}

/// What sweep must do after it wrote a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SweepAction {
    /// Send the inference message again.
    SendInfer,
    /// The write itself was the dispatch: the feed carries it.
    Marked,
    /// The job was ended.
    Ended,
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
    /// When sweep looks at the job; set in every open state, absent in every final one.
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
    pub photo: Photo,
    pub quality: Option<Quality>,
    pub reading: Option<Reading>,
    /// Where the cache keeps the raw outputs, so that a delete can erase them.
    pub cache_key: Option<String>,
    pub description: Option<Description>,
    pub llm_calls: Vec<LlmCall>,
    pub failure: Option<Failure>,
    pub timings_ms: Timings,
}

/// What is left of a deleted job: enough to erase late writes and to refuse stale workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    pub id: Uuid,
    pub caller: String,
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

/// What the store holds under an id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "tombstones are rare and short-lived in memory")]
pub enum Record {
    Job(Job),
    Tombstone(Tombstone),
}

/// The record that a write replaces. The version alone would do; naming the state and the claim
/// as well keeps the condition readable in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    pub id: Uuid,
    pub version: u64,
    pub claim: u64,
    /// Absent for a tombstone.
    pub status: Option<Status>,
}

impl Record {
    #[must_use]
    pub fn id(&self) -> Uuid {
        match self {
            Self::Job(job) => job.id,
            Self::Tombstone(tombstone) => tombstone.id,
        }
    }

    #[must_use]
    pub fn due_at(&self) -> Option<Timestamp> {
        match self {
            Self::Job(job) => job.due_at,
            Self::Tombstone(tombstone) => tombstone.due_at,
        }
    }

    #[must_use]
    pub fn fence(&self) -> Fence {
        match self {
            Self::Job(job) => job.fence(),
            Self::Tombstone(tombstone) => {
                Fence { id: tombstone.id, version: tombstone.version, claim: 0, status: None }
            }
        }
    }

    /// The job, unless it was deleted.
    #[must_use]
    pub fn into_job(self) -> Option<Job> {
        match self {
            Self::Job(job) => Some(job),
            Self::Tombstone(_) => None,
        }
    }
}

/// What a new photo job is made from; see [`Job::new`].
#[derive(Debug, Clone)]
pub struct NewJob {
    pub id: Uuid,
    pub caller: String,
    pub trace_id: String,
    pub describe: bool,
    pub idempotency_key: Option<String>,
    pub photo: Photo,
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

impl Job {
    /// A pending job whose message is about to be sent.
    #[must_use]
    pub fn new(new: NewJob, now: Timestamp, policy: &Policy) -> Self {
        Self {
            id: new.id,
            caller: new.caller,
            status: Status::Pending,
            version: 1,
            claim: 0,
            attempts: Attempts::default(),
            redispatches: 0,
            created_at: now,
            updated_at: now,
            deadline_at: now + policy.deadline,
            due_at: Some(now + policy.redispatch),
            lease_until: None,
            dispatch: None,
            expires_at: now + policy.result_ttl,
            trace_id: new.trace_id,
            describe: new.describe,
            idempotency_key: new.idempotency_key,
            photo: new.photo,
            quality: None,
            reading: None,
            cache_key: None,
            description: None,
            llm_calls: Vec::new(),
            failure: None,
            timings_ms: Timings::default(),
        }
    }

    /// The condition under which a write computed from this record may happen.
    #[must_use]
    pub fn fence(&self) -> Fence {
        Fence { id: self.id, version: self.version, claim: self.claim, status: Some(self.status) }
    }

    fn next(&self, now: Timestamp) -> Self {
        Self { version: self.version + 1, updated_at: now, ..self.clone() }
    }

    fn open(self, status: Status, due_at: Timestamp) -> Self {
        Self { status, due_at: Some(due_at), lease_until: None, dispatch: None, ..self }
    }

    fn ended(mut self, status: Status) -> Self {
        let elapsed = self.updated_at - self.created_at;
        self.timings_ms.total = Some(elapsed.num_milliseconds().max(0) as f64);
        Self { status, due_at: None, lease_until: None, dispatch: None, ..self }
    }

    fn fail(self, stage: Stage, code: FailureCode, retryable: bool) -> Self {
        let failed = self.ended(Status::Failed);
        Self { failure: Some(Failure { stage, code, retryable }), ..failed }
    }

    fn is_leased(&self, now: Timestamp) -> bool {
        self.lease_until.is_some_and(|until| until > now)
    }

    /// Whether no claim is left for `stage`.
    fn is_exhausted(&self, attempts: u32, now: Timestamp, policy: &Policy) -> bool {
        attempts >= policy.max_attempts || now >= self.deadline_at
    }

    /// `pending → processing`, or a take-over of a claim whose lease ran out.
    ///
    /// # Errors
    /// [`Refused`] where the job is not waiting for inference.
    pub fn claim_inference(&self, now: Timestamp, lease_until: Timestamp, policy: &Policy) -> Result<Self, Refused> {
        match self.status {
            Status::Pending => {}
            Status::Processing if !self.is_leased(now) => {}
            Status::Processing => return Err(Refused::Leased),
            Status::AwaitingDescription => return Err(Refused::WrongState),
            Status::Completed | Status::NeedsRetake | Status::Failed => return Err(Refused::Ended),
        }
        if self.is_exhausted(self.attempts.inference, now, policy) {
            return Err(Refused::Exhausted);
        }
        let mut next = self.next(now).open(Status::Processing, lease_until);
        next.lease_until = Some(lease_until);
        next.claim += 1;
        next.attempts.inference += 1;
        next.redispatches = 0;
        next.timings_ms.queued = Some((now - self.created_at).num_milliseconds().max(0) as f64);
        Ok(next)
    }

    fn held(&self, status: Status, claim: u64) -> Result<(), Refused> {
        if self.status == status && self.claim == claim && self.lease_until.is_some() {
            return Ok(());
        }
        Err(if self.status.is_open() { Refused::Stale } else { Refused::Ended })
    }

    /// `processing →` whatever the outcome says.
    ///
    /// # Errors
    /// [`Refused`] where `claim` is no longer held.
    pub fn finish_inference(
        &self,
        claim: u64,
        outcome: InferenceOutcome,
        now: Timestamp,
        policy: &Policy,
    ) -> Result<Self, Refused> {
        self.held(Status::Processing, claim)?;
        let mut next = self.next(now);
        match outcome {
            InferenceOutcome::Failed { code } => Ok(next.fail(Stage::Inference, code, false)),
            InferenceOutcome::Retake { quality } => {
                next.quality = Some(quality);
                Ok(next.ended(Status::NeedsRetake))
            }
            InferenceOutcome::Read { reading, quality, cache_key } => {
                let wants_description = self.describe && reading.abstained.is_none();
                next.quality = Some(quality);
                next.reading = Some(reading);
                next.cache_key = cache_key;
                if !wants_description {
                    return Ok(next.ended(Status::Completed));
                }
                let mut next = next.open(Status::AwaitingDescription, now + policy.redispatch);
                next.dispatch = Some(Dispatch::Enrichment);
                Ok(next)
            }
        }
    }

    /// `processing → pending` after a failure that another attempt may cure; the last attempt ends
    /// the job.
    ///
    /// # Errors
    /// [`Refused`] where `claim` is no longer held.
    pub fn release_inference(&self, claim: u64, now: Timestamp, policy: &Policy) -> Result<Self, Refused> {
        self.held(Status::Processing, claim)?;
        if self.is_exhausted(self.attempts.inference, now, policy) {
            return Ok(self.next(now).fail(Stage::Inference, FailureCode::AttemptsExhausted, true));
        }
        let delay = self.inference_backoff(policy);
        Ok(self.next(now).open(Status::Pending, now + delay))
    }

    /// How long a released message stays invisible.
    #[must_use]
    pub fn inference_backoff(&self, policy: &Policy) -> TimeDelta {
        policy.doubled(policy.backoff, self.attempts.inference.saturating_sub(1))
    }

    /// Takes the dispatch marker off, so that a second delivery of the same change finds none.
    ///
    /// # Errors
    /// [`Refused`] where the job waits for no description or the marker is gone.
    pub fn claim_enrichment(&self, now: Timestamp, lease_until: Timestamp, policy: &Policy) -> Result<Self, Refused> {
        if !self.status.is_open() {
            return Err(Refused::Ended);
        }
        if self.status != Status::AwaitingDescription {
            return Err(Refused::WrongState);
        }
        if self.dispatch != Some(Dispatch::Enrichment) {
            return Err(Refused::Leased);
        }
        if self.is_exhausted(self.attempts.enrichment, now, policy) {
            return Err(Refused::Exhausted);
        }
        let mut next = self.next(now).open(Status::AwaitingDescription, lease_until);
        next.lease_until = Some(lease_until);
        next.claim += 1;
        next.attempts.enrichment += 1;
        next.redispatches = 0;
        Ok(next)
    }

    /// `awaiting_description → completed`.
    ///
    /// # Errors
    /// [`Refused`] where `claim` is no longer held.
    pub fn finish_description(&self, claim: u64, description: Description, now: Timestamp) -> Result<Self, Refused> {
        self.held(Status::AwaitingDescription, claim)?;
        let mut next = self.next(now).ended(Status::Completed);
        next.description = Some(description);
        Ok(next)
    }

    /// Gives an enrichment claim back after an LLM failure: sweep marks the job again after
    /// `wait`, or after the backoff where that is longer.
    ///
    /// # Errors
    /// [`Refused`] where `claim` is no longer held; [`Refused::Exhausted`] where no attempt is left
    /// and the template must do.
    pub fn defer_description(
        &self,
        claim: u64,
        wait: Option<TimeDelta>,
        now: Timestamp,
        policy: &Policy,
    ) -> Result<Self, Refused> {
        self.held(Status::AwaitingDescription, claim)?;
        if self.is_exhausted(self.attempts.enrichment, now, policy) {
            return Err(Refused::Exhausted);
        }
        let backoff = policy.doubled(policy.backoff, self.attempts.enrichment.saturating_sub(1));
        let delay = wait.map_or(backoff, |wait| wait.min(policy.max_delay).max(backoff));
        Ok(self.next(now).open(Status::AwaitingDescription, now + delay))
    }

    /// Sends a due job round again, or ends it. `template` is the description for a job of which
    /// only that is missing.
    ///
    /// # Errors
    /// [`Refused::NotDue`] where nothing is due yet.
    pub fn sweep(
        &self,
        now: Timestamp,
        policy: &Policy,
        template: impl FnOnce(&Reading) -> Description,
    ) -> Result<(Self, SweepAction), Refused> {
        if self.due_at.is_none_or(|due| due > now) {
            return Err(Refused::NotDue);
        }
        let wait = policy.doubled(policy.redispatch, self.redispatches);
        let mut next = self.next(now);
        next.redispatches += 1;
        match self.status {
            Status::Pending | Status::Processing => {
                if self.is_exhausted(self.attempts.inference, now, policy) {
                    let late = now >= self.deadline_at;
                    let code = if late { FailureCode::DeadlineExceeded } else { FailureCode::AttemptsExhausted };
                    return Ok((next.fail(Stage::Inference, code, true), SweepAction::Ended));
                }
                Ok((next.open(Status::Pending, now + wait), SweepAction::SendInfer))
            }
            Status::AwaitingDescription => {
                let exhausted = self.is_exhausted(self.attempts.enrichment, now, policy);
                match (&self.reading, exhausted) {
                    (Some(reading), true) => {
                        next.description = Some(template(reading));
                        Ok((next.ended(Status::Completed), SweepAction::Ended))
                    }
                    (None, true) => {
                        let code = FailureCode::AttemptsExhausted;
                        Ok((next.fail(Stage::Enrichment, code, true), SweepAction::Ended))
                    }
                    (_, false) => {
                        let mut next = next.open(Status::AwaitingDescription, now + wait);
                        next.dispatch = Some(Dispatch::Enrichment);
                        Ok((next, SweepAction::Marked))
                    }
                }
            }
            Status::Completed | Status::NeedsRetake | Status::Failed => Err(Refused::NotDue),
        }
    }

    /// `failed {retryable} → pending | awaiting_description`, due at once.
    ///
    /// # Errors
    /// [`Refused::WrongState`] where the job did not fail retryably, [`Refused::PhotoExpired`]
    /// where there is no photo left to work on.
    pub fn redrive(&self, now: Timestamp, policy: &Policy) -> Result<Self, Refused> {
        let Some(failure) = self.failure.as_ref().filter(|failure| failure.retryable) else {
            return Err(Refused::WrongState);
        };
        let status = match failure.stage {
            Stage::Inference if now >= self.photo.expires_at => return Err(Refused::PhotoExpired),
            Stage::Inference => Status::Pending,
            Stage::Enrichment => Status::AwaitingDescription,
        };
        let mut next = self.next(now).open(status, now);
        next.failure = None;
        next.attempts = Attempts::default();
        next.redispatches = 0;
        next.deadline_at = now + policy.deadline;
        next.timings_ms.total = None;
        Ok(next)
    }

    /// What is left when the caller deletes the job, whatever its state.
    #[must_use]
    pub fn tombstone(&self, now: Timestamp, policy: &Policy) -> Tombstone {
        Tombstone {
            id: self.id,
            caller: self.caller.clone(),
            version: self.version + 1,
            cache_key: self.cache_key.clone(),
            erase_after: now + policy.lease,
            sweeps: 0,
            due_at: Some(now + policy.lease),
            expires_at: now + policy.tombstone_ttl,
        }
    }
}

impl Tombstone {
    /// The tombstone after sweep has erased the blobs: settled where the cache holds nothing,
    /// otherwise due again, at doubling intervals, until [`Tombstone::forgotten`].
    #[must_use]
    pub fn swept(&self, now: Timestamp, policy: &Policy) -> Self {
        let wait = policy.doubled(policy.redispatch, self.sweeps);
        let due_at = self.cache_key.as_ref().map(|_| now + wait);
        Self { version: self.version + 1, sweeps: self.sweeps + 1, due_at, ..self.clone() }
    }

    /// The tombstone after the cache entry was erased; `None` where a worker may still write it.
    #[must_use]
    pub fn forgotten(&self, now: Timestamp) -> Option<Self> {
        let is_final = self.cache_key.is_some() && now >= self.erase_after;
        is_final.then(|| Self { version: self.version + 1, cache_key: None, due_at: Some(now), ..self.clone() })
    }
}

#[cfg(test)]
#[path = "job_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "job_model.rs"]
mod model;
