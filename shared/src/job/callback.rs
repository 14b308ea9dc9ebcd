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
    /// How it ended; absent while it is due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<DeliveryOutcome>,
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
        callback.delivery = Some(Delivery { seq: self.version, not_before: now, until, outcome: None });
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

    /// The receiver did not take it: it is tried again after `wait`. The message that brings that about
    /// is due then; where it is lost, sweep sends another.
    ///
    /// # Errors
    /// As [`Job::settle_delivery`].
    pub fn postpone_delivery(
        &self,
        seq: u64,
        wait: TimeDelta,
        now: Timestamp,
        policy: &Policy,
    ) -> Result<Self, Refused> {
        let not_before = now + wait;
        let delivery = Delivery { not_before, outcome: None, ..self.undelivered(seq)?.clone() };
        Ok(self.with_delivery(delivery, Some(not_before + policy.redispatch)))
    }

    /// The last try has failed.
    ///
    /// # Errors
    /// As [`Job::settle_delivery`].
    pub fn give_up_delivery(&self, seq: u64) -> Result<Self, Refused> {
        let outcome = Some(DeliveryOutcome::GivenUp);
        let delivery = Delivery { outcome, ..self.undelivered(seq)?.clone() };
        Ok(self.with_delivery(delivery, None))
    }

    /// Marks a due delivery again, after which it is due once more after `wait`; or gives it up.
    pub(super) fn sweep_delivery(&self, now: Timestamp, wait: TimeDelta) -> Result<(Self, SweepAction), Refused> {
        let delivery = self.delivery().ok_or(Refused::NotDue)?;
        if now >= delivery.until {
            return Ok((self.give_up_delivery(delivery.seq)?, SweepAction::Undelivered));
        }
        let next = self.with_delivery(delivery.clone(), Some(now + wait));
        let redispatches = self.redispatches + 1;
        Ok((Self { dispatch: Some(Dispatch::Webhook), redispatches, ..next }, SweepAction::Marked))
    }
}
