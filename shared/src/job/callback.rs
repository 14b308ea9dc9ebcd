//! Whom to tell of a job's end over HTTP, and how far that is.
//!
//! The write that ends a job marks its delivery due. What is written about a delivery changes nothing
//! that a caller reads: neither the result nor the number by which it is known ([`Job::seq`]).

use chrono::TimeDelta;
use serde::{Deserialize, Serialize};

use super::{Dispatch, Job, Policy, Refused, SweepAction};
use crate::clock::Timestamp;

/// Where a job's end is to be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Callback {
    /// As checked at submission; it is checked again before anything is sent there.
    pub url: String,
    /// Absent while the job is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delivery: Option<Delivery>,
}

/// One end of a job, on its way to who asked to be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    /// The version that ended the job. With the job's id it names the delivery, in every try.
    pub seq: u64,
    /// Nobody tries before this.
    pub not_before: Timestamp,
    /// After this sweep gives it up.
    pub until: Timestamp,
    /// Tries that have failed; those before an operator sent it round again are not among them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tries: u32,
    /// The message that brings the next try about. Another one is its twin, and not needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub carrier: Option<String>,
    /// How it ended; absent while it is due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<DeliveryOutcome>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's shape")]
fn is_zero(tries: &u32) -> bool {
    *tries == 0
}

impl Delivery {
    /// Tries that have failed in this round; a delivery that was given up begins another.
    #[must_use]
    pub fn failed_tries(&self) -> u32 {
        if self.outcome == Some(DeliveryOutcome::GivenUp) { 0 } else { self.tries }
    }

    fn is_carried_by(&self, message: &str) -> bool {
        self.carrier.as_deref() == Some(message)
    }

    /// What a message for this delivery is to do, which comes at `now`.
    #[must_use]
    pub fn turn(&self, message: &str, now: Timestamp) -> Turn {
        let carried = self.is_carried_by(message);
        match self.outcome {
            Some(DeliveryOutcome::Delivered) => Turn::Nothing,
            // Given up by this very message, which was not acknowledged. Any other was sent by an operator.
            Some(DeliveryOutcome::GivenUp) if carried => Turn::Nothing,
            Some(DeliveryOutcome::GivenUp) => Turn::Try,
            None if now >= self.not_before => Turn::Try,
            // Of records of earlier builds no message is known.
            None if carried || self.carrier.is_none() => Turn::Wait(self.not_before - now),
            None => Turn::Nothing,
        }
    }
}

/// What is the turn of a message; see [`Delivery::turn`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    Try,
    /// It comes too early, by this much.
    Wait(TimeDelta),
    /// Nothing is left for it: the delivery has ended, or another message carries it.
    Nothing,
}

/// A try that has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailedTry<'a> {
    /// The delivery's, when the try began: of two that failed at once one is counted.
    pub failed_before: u32,
    /// The message that brought it about.
    pub message: &'a str,
}

/// How a delivery ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeliveryOutcome {
    /// The receiver has said that it has it.
    Delivered,
    /// It was tried as often as is worth while. An operator may have it tried again.
    GivenUp,
}

impl Job {
    /// By which clients know what is newer: the version of the last write that changed what they are
    /// told.
    #[must_use]
    pub fn seq(&self) -> u64 {
        self.delivery().map_or(self.version, |delivery| delivery.seq)
    }

    /// The delivery of the job's end.
    #[must_use]
    pub fn delivery(&self) -> Option<&Delivery> {
        self.callback.as_ref()?.delivery.as_ref()
    }

    /// The write that ended the job, with its delivery due where somebody is to be told.
    pub(super) fn marked(mut self, policy: &Policy) -> Self {
        let Some(callback) = &mut self.callback else { return self };
        let now = self.updated_at;
        let until = (now + policy.delivery_ttl).min(self.expires_at);
        callback.delivery =
            Some(Delivery { seq: self.version, not_before: now, until, tries: 0, carrier: None, outcome: None });
        self.due_at = Some(now + policy.redispatch);
        self.dispatch = Some(Dispatch::Webhook);
        self.redispatches = 0;
        self
    }

    /// The delivery `seq`, unless it was made.
    fn undelivered(&self, seq: u64) -> Result<&Delivery, Refused> {
        let delivery = self.delivery().filter(|delivery| delivery.seq == seq).ok_or(Refused::Stale)?;
        if delivery.outcome == Some(DeliveryOutcome::Delivered) { Err(Refused::Ended) } else { Ok(delivery) }
    }

    fn with_delivery(&self, delivery: Delivery, due_at: Option<Timestamp>) -> Self {
        let callback = self.callback.clone().map(|callback| Callback { delivery: Some(delivery), ..callback });
        Self { version: self.version + 1, callback, due_at, dispatch: None, ..self.clone() }
    }

    /// The receiver has it.
    ///
    /// # Errors
    /// [`Refused`] where the job was sent round again meanwhile, or somebody else has delivered it.
    pub fn settle_delivery(&self, seq: u64) -> Result<Self, Refused> {
        let outcome = Some(DeliveryOutcome::Delivered);
        let delivery = Delivery { outcome, ..self.undelivered(seq)?.clone() };
        Ok(self.with_delivery(delivery, None))
    }

    /// The delivery after one more try, unless another message has counted one meanwhile.
    fn tried(&self, seq: u64, failed: FailedTry<'_>) -> Result<Delivery, Refused> {
        let delivery = self.undelivered(seq)?;
        if delivery.failed_tries() != failed.failed_before {
            return Err(Refused::Stale);
        }
        let (tries, carrier) = (failed.failed_before + 1, Some(failed.message.to_owned()));
        Ok(Delivery { tries, carrier, ..delivery.clone() })
    }

    /// The receiver did not take it: it is tried again after `wait`. The message that brings that about
    /// is due then; where it is lost, sweep sends another.
    ///
    /// # Errors
    /// As [`Job::settle_delivery`], and where another message has failed meanwhile.
    pub fn postpone_delivery(
        &self,
        seq: u64,
        failed: FailedTry<'_>,
        not_before: Timestamp,
        policy: &Policy,
    ) -> Result<Self, Refused> {
        let delivery = Delivery { not_before, outcome: None, ..self.tried(seq, failed)? };
        Ok(self.with_delivery(delivery, Some(not_before + policy.redispatch)))
    }

    /// The last try has failed.
    ///
    /// # Errors
    /// As [`Job::postpone_delivery`].
    pub fn give_up_delivery(&self, seq: u64, failed: FailedTry<'_>) -> Result<Self, Refused> {
        let delivery = Delivery { outcome: Some(DeliveryOutcome::GivenUp), ..self.tried(seq, failed)? };
        Ok(self.with_delivery(delivery, None))
    }

    /// Whether sweep, at `now`, gives the delivery up.
    #[must_use]
    pub fn is_undeliverable(&self, now: Timestamp) -> bool {
        let is_due = self.due_at.is_some_and(|due| due <= now);
        let is_over = |delivery: &Delivery| delivery.outcome.is_none() && now >= delivery.until;
        is_due && !self.status.is_open() && self.delivery().is_some_and(is_over)
    }

    /// Marks a due delivery again, after which it is due once more after `wait`; or gives it up.
    pub(super) fn sweep_delivery(&self, now: Timestamp, wait: TimeDelta) -> Result<(Self, SweepAction), Refused> {
        let delivery = self.delivery().ok_or(Refused::NotDue)?;
        if self.is_undeliverable(now) {
            let delivery = Delivery { outcome: Some(DeliveryOutcome::GivenUp), ..delivery.clone() };
            return Ok((self.with_delivery(delivery, None), SweepAction::Undelivered));
        }
        let next = self.with_delivery(delivery.clone(), Some(now + wait));
        let redispatches = self.redispatches + 1;
        Ok((Self { dispatch: Some(Dispatch::Webhook), redispatches, ..next }, SweepAction::Marked))
    }
}
