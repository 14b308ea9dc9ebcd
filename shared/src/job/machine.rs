//! The state machine: every way in which a record becomes the next one.
//!
//! Each move takes the moment as an argument and returns the record as it must be written, or says
//! why the move is refused.

mod enrichment;

use chrono::TimeDelta;
use uuid::Uuid;

use super::{
    Attempts, Callback, Description, Dispatch, Failure, FailureCode, Fence, Input, Job, NewJob, Quality, Reading,
    Stage, Status, Timings, Tombstone, Upload,
};
use crate::clock::Timestamp;

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
    /// The longest that one claim on a photo or its description may last.
    pub lease: TimeDelta,
    /// The same on a prompt, the LLM's answer included.
    pub prompt_lease: TimeDelta,
    /// How long a job may stay open.
    pub deadline: TimeDelta,
    pub photo_ttl: TimeDelta,
    pub result_ttl: TimeDelta,
    pub tombstone_ttl: TimeDelta,
    /// How long it is tried to tell somebody of a job's end.
    pub delivery_ttl: TimeDelta,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_attempts: 5,
            redispatch: TimeDelta::seconds(120),
            backoff: TimeDelta::seconds(5),
            max_delay: TimeDelta::hours(1),
            lease: TimeDelta::seconds(120),
            prompt_lease: TimeDelta::seconds(600),
            deadline: TimeDelta::hours(24),
            photo_ttl: TimeDelta::days(7),
            result_ttl: TimeDelta::days(30),
            tombstone_ttl: TimeDelta::days(15),
            delivery_ttl: TimeDelta::days(3),
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
    #[error("the photo or prompt has expired")]
    InputExpired,
}

/// How inference ended; see [`Job::finish_inference`].
#[derive(Debug, Clone, PartialEq)]
pub enum InferenceOutcome {
    /// The model gave predictions or abstained. `description` where nobody is to be asked for one.
    Read { reading: Reading, quality: Quality, cache_key: Option<String>, description: Option<Description> },
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
    /// Nobody could be told of the end, for as long as it is tried.
    Undelivered,
}

impl Job {
    /// A pending job whose message is about to be sent, or for a prompt one that the feed starts.
    #[must_use]
    pub fn new(new: NewJob, now: Timestamp, policy: &Policy) -> Self {
        let (status, dispatch) = match new.input {
            Input::Photo(_) => (Status::Pending, None),
            Input::Prompt(_) => (Status::AwaitingDescription, Some(Dispatch::Enrichment)),
        };
        Self {
            id: new.id,
            caller: new.caller,
            status,
            version: 1,
            claim: 0,
            attempts: Attempts::default(),
            redispatches: 0,
            created_at: now,
            updated_at: now,
            deadline_at: now + policy.deadline,
            due_at: Some(now + policy.redispatch),
            lease_until: None,
            dispatch,
            expires_at: now + policy.result_ttl,
            trace_id: new.trace_id,
            describe: new.describe,
            idempotency_key: new.idempotency_key,
            callback: new.callback_url.map(|url| Callback { url, delivery: None }),
            input: new.input,
            quality: None,
            reading: None,
            cache_key: None,
            description: None,
            answer: None,
            llm_calls: Vec::new(),
            failure: None,
            timings_ms: Timings::default(),
        }
    }

    /// The condition under which a write computed from this record may happen.
    #[must_use]
    pub fn fence(&self) -> Fence {
        Fence {
            id: self.id,
            version: self.version,
            claim: self.claim,
            status: Some(self.status),
            queued_bytes: self.queued_bytes(),
        }
    }

    /// What the job counts against its caller's queued bytes.
    #[must_use]
    pub fn queued_bytes(&self) -> u64 {
        if self.status.is_open() { self.input.size_bytes() } else { 0 }
    }

    /// Whether the LLM is to answer a prompt; otherwise the job is about a photo.
    #[must_use]
    pub fn is_prompt(&self) -> bool {
        matches!(self.input, Input::Prompt(_))
    }

    /// The longest that one claim on this job may last.
    fn longest_lease(&self, policy: &Policy) -> TimeDelta {
        if self.is_prompt() { policy.prompt_lease } else { policy.lease }
    }

    fn next(&self, now: Timestamp) -> Self {
        Self { version: self.version + 1, updated_at: now, ..self.clone() }
    }

    fn open(self, status: Status, due_at: Timestamp) -> Self {
        Self { status, due_at: Some(due_at), lease_until: None, dispatch: None, ..self }
    }

    fn ended(mut self, status: Status, policy: &Policy) -> Self {
        let elapsed = self.updated_at - self.created_at;
        self.timings_ms.total = Some(elapsed.num_milliseconds().max(0) as f64);
        Self { status, due_at: None, lease_until: None, dispatch: None, ..self }.marked(policy)
    }

    fn fail(self, stage: Stage, code: FailureCode, retryable: bool, policy: &Policy) -> Self {
        let failed = self.ended(Status::Failed, policy);
        Self { failure: Some(Failure { stage, code, retryable }), ..failed }
    }

    /// Whether a worker still has it.
    pub(crate) fn is_leased(&self, now: Timestamp) -> bool {
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

    /// Ends the lease of a worker that is known to be dead: the job is due at once, for sweep.
    ///
    /// # Errors
    /// [`Refused::NotDue`] where nobody holds a lease that would run on.
    pub fn lapse(&self, now: Timestamp) -> Result<Self, Refused> {
        if !self.is_leased(now) {
            return Err(Refused::NotDue);
        }
        Ok(Self { lease_until: Some(now), due_at: Some(now), ..self.next(now) })
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
            InferenceOutcome::Failed { code } => Ok(next.fail(Stage::Inference, code, false, policy)),
            InferenceOutcome::Retake { quality } => {
                next.quality = Some(quality);
                Ok(next.ended(Status::NeedsRetake, policy))
            }
            InferenceOutcome::Read { reading, quality, cache_key, description } => {
                let wants_description = self.describe && reading.abstained.is_none();
                next.quality = Some(quality);
                next.reading = Some(reading);
                next.cache_key = cache_key;
                next.description = description.filter(|_| wants_description);
                if !wants_description || next.description.is_some() {
                    return Ok(next.ended(Status::Completed, policy));
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
            return Ok(self.next(now).fail(Stage::Inference, FailureCode::AttemptsExhausted, true, policy));
        }
        let delay = self.inference_backoff(policy);
        Ok(self.next(now).open(Status::Pending, now + delay))
    }

    /// How long a released message stays invisible.
    #[must_use]
    pub fn inference_backoff(&self, policy: &Policy) -> TimeDelta {
        policy.doubled(policy.backoff, self.attempts.inference.saturating_sub(1))
    }

    /// Sends a due job round again, or ends it; marks or gives up what is due of an ended one. `template` is
    /// the description for a job of which only that is missing.
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
        // What nobody claims ends at its deadline, not when a doubled wait is over.
        let again_at = (now + wait).min(self.deadline_at);
        let mut next = self.next(now);
        next.redispatches += 1;
        match self.status {
            Status::Pending | Status::Processing => {
                if self.is_exhausted(self.attempts.inference, now, policy) {
                    return Ok((next.fail(Stage::Inference, self.given_up(now), true, policy), SweepAction::Ended));
                }
                Ok((next.open(Status::Pending, again_at), SweepAction::SendInfer))
            }
            Status::AwaitingDescription => {
                let exhausted = self.is_exhausted(self.attempts.enrichment, now, policy);
                match (&self.reading, exhausted) {
                    (Some(reading), true) => {
                        next.description = Some(template(reading));
                        Ok((next.ended(Status::Completed, policy), SweepAction::Ended))
                    }
                    (None, true) => {
                        Ok((next.fail(Stage::Enrichment, self.given_up(now), true, policy), SweepAction::Ended))
                    }
                    (_, false) => {
                        let mut next = next.open(Status::AwaitingDescription, again_at);
                        next.dispatch = Some(Dispatch::Enrichment);
                        Ok((next, SweepAction::Marked))
                    }
                }
            }
            Status::Completed | Status::NeedsRetake | Status::Failed => self.sweep_delivery(now, wait),
        }
    }

    /// Why sweep ends a job that is exhausted.
    fn given_up(&self, now: Timestamp) -> FailureCode {
        if now >= self.deadline_at { FailureCode::DeadlineExceeded } else { FailureCode::AttemptsExhausted }
    }

    /// `failed {retryable} → pending | awaiting_description`, due at once. The second is marked for
    /// the feed as well.
    ///
    /// # Errors
    /// [`Refused::WrongState`] where the job did not fail retryably, [`Refused::InputExpired`]
    /// where there is nothing left to work on.
    pub fn redrive(&self, now: Timestamp, policy: &Policy) -> Result<Self, Refused> {
        let Some(failure) = self.failure.as_ref().filter(|failure| failure.retryable) else {
            return Err(Refused::WrongState);
        };
        let needs_input = self.is_prompt() || failure.stage == Stage::Inference;
        if needs_input && now >= self.input.expires_at() {
            return Err(Refused::InputExpired);
        }
        let (status, dispatch) = match failure.stage {
            Stage::Inference => (Status::Pending, None),
            Stage::Enrichment => (Status::AwaitingDescription, Some(Dispatch::Enrichment)),
        };
        let mut next = Self { dispatch, ..self.next(now).open(status, now) };
        next.failure = None;
        // The next end is another one to be told of.
        next.callback = next.callback.map(|callback| Callback { delivery: None, ..callback });
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
            trace_id: self.trace_id.clone(),
            version: self.version + 1,
            cache_key: self.cache_key.clone(),
            erase_after: now + self.longest_lease(policy),
            sweeps: 0,
            due_at: Some(now + self.longest_lease(policy)),
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

impl Upload {
    /// Room for a photo of `size_bytes`, until `due_at`.
    #[must_use]
    pub fn new(id: Uuid, caller: String, image_key: String, size_bytes: u64, due_at: Timestamp) -> Self {
        Self { id, caller, version: 1, image_key, size_bytes, used: false, due_at: Some(due_at), expires_at: due_at }
    }

    /// What was uploaded lies under this prefix, and nothing else.
    #[must_use]
    pub fn prefix(&self) -> &str {
        self.image_key.trim_end_matches("photo")
    }

    /// The upload once a job was made of it: its room is given back, and what was uploaded is due
    /// to be erased, in case that whoever made the job dies before doing so.
    #[must_use]
    pub fn used(&self, now: Timestamp) -> Self {
        Self { version: self.version + 1, used: true, due_at: Some(now), ..self.clone() }
    }

    /// The upload once what was uploaded is erased. While what was signed may be used again it is looked at once
    /// more.
    #[must_use]
    pub fn erased(&self, now: Timestamp) -> Self {
        let due_at = (now < self.expires_at).then_some(self.expires_at);
        Self { version: self.version + 1, used: true, due_at, ..self.clone() }
    }
}
