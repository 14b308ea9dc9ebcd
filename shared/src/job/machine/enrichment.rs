//! The moves of enrichment: descriptions of readings, and answers to prompts.

use chrono::TimeDelta;

use super::{Policy, Refused};
use crate::clock::Timestamp;
use crate::job::{AnswerContent, Description, Dispatch, Job, LlmAnswer, LlmTrouble, Stage, Status};

impl Job {
    /// Takes the dispatch marker off, so that a second delivery of the same change finds none. The
    /// lease is as long as the work may take, and ends at `lease_until` at the latest.
    ///
    /// # Errors
    /// [`Refused`] where the job waits for no description or answer, or the marker is gone.
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
        let lease_until = lease_until.min(now + self.longest_lease(policy));
        let mut next = self.next(now).open(Status::AwaitingDescription, lease_until);
        next.lease_until = Some(lease_until);
        next.claim += 1;
        next.attempts.enrichment += 1;
        next.redispatches = 0;
        if self.is_prompt() {
            next.timings_ms.queued = Some((now - self.created_at).num_milliseconds().max(0) as f64);
        }
        Ok(next)
    }

    fn held_for(&self, prompt: bool, claim: u64) -> Result<(), Refused> {
        self.held(Status::AwaitingDescription, claim)?;
        if self.is_prompt() == prompt { Ok(()) } else { Err(Refused::WrongState) }
    }

    /// `awaiting_description → completed`.
    ///
    /// # Errors
    /// [`Refused`] where `claim` is no longer held.
    pub fn finish_description(
        &self,
        claim: u64,
        description: Description,
        now: Timestamp,
        policy: &Policy,
    ) -> Result<Self, Refused> {
        self.held_for(false, claim)?;
        let mut next = self.next(now).ended(Status::Completed, policy);
        next.description = Some(description);
        Ok(next)
    }

    /// Claims and completes in one write, for a description that takes no time: there is nothing that a second
    /// worker could do meanwhile, and nothing to begin anew after a kill.
    ///
    /// # Errors
    /// As [`Job::claim_enrichment`]; [`Refused::WrongState`] for a prompt.
    pub fn describe_at_once(&self, description: Description, now: Timestamp, policy: &Policy) -> Result<Self, Refused> {
        // As many versions as writes.
        let claimed = Self { version: self.version, ..self.claim_enrichment(now, now, policy)? };
        claimed.finish_description(claimed.claim, description, now, policy)
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
        self.held_for(false, claim)?;
        if self.is_exhausted(self.attempts.enrichment, now, policy) {
            return Err(Refused::Exhausted);
        }
        Ok(self.deferred(wait, now, policy))
    }

    fn deferred(&self, wait: Option<TimeDelta>, now: Timestamp, policy: &Policy) -> Self {
        let backoff = policy.doubled(policy.backoff, self.attempts.enrichment.saturating_sub(1));
        let delay = wait.map_or(backoff, |wait| wait.min(policy.max_delay).max(backoff));
        self.next(now).open(Status::AwaitingDescription, now + delay)
    }

    /// `awaiting_description → completed`, for a prompt. A record whose answer is a blob goes when
    /// the blob may go.
    ///
    /// # Errors
    /// [`Refused`] where `claim` is no longer held.
    pub fn finish_answer(
        &self,
        claim: u64,
        answer: LlmAnswer,
        now: Timestamp,
        policy: &Policy,
    ) -> Result<Self, Refused> {
        self.held_for(true, claim)?;
        let mut next = self.next(now);
        if matches!(answer.content, AnswerContent::Blob { .. }) {
            next.expires_at = next.expires_at.min(now + policy.photo_ttl);
        }
        let mut next = next.ended(Status::Completed, policy);
        next.answer = Some(answer);
        Ok(next)
    }

    /// Gives a claim on a prompt back: sweep marks the job again after `wait`, or after the backoff
    /// where that is longer. What does not pass, and the last attempt, fail the job.
    ///
    /// # Errors
    /// [`Refused`] where `claim` is no longer held.
    pub fn release_answer(
        &self,
        claim: u64,
        trouble: LlmTrouble,
        wait: Option<TimeDelta>,
        now: Timestamp,
        policy: &Policy,
    ) -> Result<Self, Refused> {
        self.held_for(true, claim)?;
        if !trouble.passing || self.is_exhausted(self.attempts.enrichment, now, policy) {
            return Ok(self.next(now).fail(Stage::Enrichment, trouble.code, trouble.redrivable, policy));
        }
        Ok(self.deferred(wait, now, policy))
    }
}
