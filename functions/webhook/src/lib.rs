//! Tells who gave a `callback_url` that a job has ended.
//!
//! Triggered by its own queue, which notify fills. Reads the record; sends one request (`courier.rs`).
//! Writes, in this order: the delivery's end, or when it is tried again, into the record; and for the
//! second the message's visibility. After the last try the message becomes a dead letter. A message may
//! come twice or late: the record says whether there is still something to deliver, and `webhook-id` tells
//! the receiver what it has already.

pub mod courier;
mod signature;

use aws_lambda_events::event::sqs::{BatchItemFailure, SqsBatchResponse, SqsEvent, SqsMessage};
use chrono::TimeDelta;
use futures_util::future::join_all;
use shared::Error;
use shared::clock::Clock;
use shared::crash::{self, Point};
use shared::job::{Job, Policy, Record, Refused};
use shared::message::Message;
use shared::ports::{JobQueue, JobStore};
use shared::push::{self, Told, Webhook as Sent};
use shared::telemetry;
use shared::transition::{NotMoved, transition};
use tracing::Instrument;
use uuid::Uuid;

use crate::courier::{Courier, Refusal};

/// How long after each try the next one is made: about the schedule that Standard Webhooks recommends, for a
/// little more than a day.
const WAITS: [TimeDelta; 7] = [
    TimeDelta::seconds(5),
    TimeDelta::minutes(5),
    TimeDelta::minutes(30),
    TimeDelta::hours(2),
    TimeDelta::hours(5),
    TimeDelta::hours(10),
    TimeDelta::hours(10),
];
/// Tries, by the message's receive count; the queue gives a message up after as many.
pub const MAX_TRIES: u32 = WAITS.len() as u32 + 1;

/// What webhook works with.
pub struct Webhook<J, Q> {
    pub jobs: J,
    /// Its own, for the visibility of what is tried again.
    pub queue: Q,
    pub courier: Courier,
    pub clock: Clock,
    pub policy: Policy,
}

/// What becomes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is left to do for it.
    Acknowledge,
    /// It comes back after this long.
    Retry(TimeDelta),
}

impl<J: JobStore, Q: JobQueue> Webhook<J, Q> {
    /// Works a batch, all messages at once: a receiver that takes its time holds up no other.
    pub async fn handle(&self, event: SqsEvent) -> SqsBatchResponse {
        let worked = join_all(event.records.iter().map(|message| self.settle(message))).await;
        let mut response = SqsBatchResponse::default();
        for (message, worked) in event.records.into_iter().zip(worked) {
            if !worked {
                let mut failure = BatchItemFailure::default();
                failure.item_identifier = message.message_id.unwrap_or_default();
                response.batch_item_failures.push(failure);
            }
        }
        response
    }

    /// Works one message; `false` where it must come back.
    async fn settle(&self, message: &SqsMessage) -> bool {
        let outcome = match Message::decode(message.body.as_deref().unwrap_or("")) {
            Ok(Message::Deliver { id }) => self.process(id, receives(message)).await,
            Ok(Message::Infer { .. } | Message::Forget { .. }) => {
                self.unreadable(message, "a message of another queue")
            }
            Err(error) => self.unreadable(message, &error.to_string()),
        };
        let Outcome::Retry(delay) = outcome else { return true };
        let seconds = u32::try_from(delay.num_seconds()).unwrap_or(0);
        let receipt = message.receipt_handle.as_deref().unwrap_or("");
        if let Err(error) = self.queue.set_visibility(receipt, seconds).await {
            // It comes back when its first visibility timeout ends, before its time, and is acknowledged;
            // then sweep sends another.
            tracing::warn!(error.chain = error.chain(), "message not hidden");
        }
        crash::here(Point::WebhookHidden);
        false
    }

    /// As inference does: soon, and as often as the queue allows; then it is a dead letter.
    fn unreadable(&self, message: &SqsMessage, why: &str) -> Outcome {
        let message_id = message.message_id.as_deref().unwrap_or("");
        tracing::error!(
            message.id = message_id,
            error.code = "unreadable_message",
            error.chain = why,
            "message not read"
        );
        Outcome::Retry(self.policy.backoff)
    }

    /// The rule for one message, received for the `receives`th time.
    pub async fn process(&self, id: Uuid, receives: u32) -> Outcome {
        self.deliver(id, receives).await.unwrap_or_else(|error| {
            tracing::error!(
                job.id = %id,
                error.code = error.code().as_str(),
                error.chain = error.chain(),
                "message not worked"
            );
            Outcome::Retry(self.policy.doubled(self.policy.backoff, receives.saturating_sub(1)))
        })
    }

    async fn deliver(&self, id: Uuid, receives: u32) -> Result<Outcome, Error> {
        let Some(record) = self.jobs.get(id).await? else { return Ok(Outcome::Acknowledge) };
        let told = push::deliveries(&record, Vec::new()).into_iter().find_map(|told| match told {
            Told::Webhook(sent) => Some(sent),
            Told::Frame(..) => None,
        });
        // Delivered already, sent round again, or deleted.
        let (Record::Job(job), Some(sent)) = (record, told) else { return Ok(Outcome::Acknowledge) };
        if self.clock.now() < sent.not_before {
            // Another message has just failed on it and comes back in time; were it lost, sweep would send one.
            return Ok(Outcome::Acknowledge);
        }
        let span = telemetry::job_span(job.id, &job.trace_id);
        Box::pin(self.send(&job, &sent, receives)).instrument(span).await
    }

    async fn send(&self, job: &Job, sent: &Sent, receives: u32) -> Result<Outcome, Error> {
        let answer = self.courier.send(sent, self.clock.now()).await?;
        crash::here(Point::WebhookAnswered);
        match answer {
            Ok(()) => {
                let settle = |job: &Job| Ok((job.settle_delivery(sent.seq)?, ()));
                written(transition(&self.jobs, job, settle).await)?;
                crash::here(Point::WebhookSettled);
                tracing::info!(webhook.tries = receives, "webhook delivered");
                Ok(Outcome::Acknowledge)
            }
            Err(refusal) => self.failed(job, sent, receives, &refusal).await,
        }
    }

    async fn failed(&self, job: &Job, sent: &Sent, receives: u32, refusal: &Refusal) -> Result<Outcome, Error> {
        tracing::warn!(
            webhook.tries = receives,
            http.status = refusal.status,
            error.code = refusal.code,
            error.chain = refusal.cause,
            "webhook not delivered"
        );
        let Some(wait) = WAITS.get(receives.saturating_sub(1) as usize) else {
            let give_up = |job: &Job| Ok((job.give_up_delivery(sent.seq)?, ()));
            if !written(transition(&self.jobs, job, give_up).await)? {
                return Ok(Outcome::Acknowledge);
            }
            crash::here(Point::WebhookGivenUp);
            tracing::error!(error.code = "webhook_given_up", "nobody is told of a job's end");
            // The queue makes it a dead letter in the place of handing it out once more.
            return Ok(Outcome::Retry(TimeDelta::zero()));
        };
        let now = self.clock.now();
        let postpone = |job: &Job| Ok((job.postpone_delivery(sent.seq, *wait, now, &self.policy)?, ()));
        let postponed = written(transition(&self.jobs, job, postpone).await)?;
        crash::here(Point::WebhookPostponed);
        Ok(if postponed { Outcome::Retry(*wait) } else { Outcome::Acknowledge })
    }
}

/// Whether the write was made; not where the job was deleted or sent round again, or somebody else has
/// delivered.
fn written(moved: Result<(Job, ()), NotMoved>) -> Result<bool, Error> {
    match moved {
        Ok(_) => Ok(true),
        Err(NotMoved::Refused(Refused::Stale | Refused::Ended) | NotMoved::Gone) => Ok(false),
        Err(NotMoved::Refused(refused)) => Err(Error::internal(refused)),
        Err(NotMoved::Store(error)) => Err(error),
    }
}

fn receives(message: &SqsMessage) -> u32 {
    let count = message.attributes.get("ApproximateReceiveCount").and_then(|count| count.parse().ok());
    count.unwrap_or(1).max(1)
}
