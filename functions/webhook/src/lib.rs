//! Tells who gave a `callback_url` that a job has ended.
//!
//! Triggered by its own queue, which notify fills. Reads the record; sends one request (`courier.rs`).
//! Writes, in this order: the delivery's end, or when it is tried again, into the record; and for the
//! second the message's visibility. After the last try a dead letter, then the delivery's end. How often was
//! tried stands in the record: a message may come twice, early or late, and `webhook-id` tells the receiver
//! what it has already.

pub mod courier;
mod signature;

use aws_lambda_events::event::sqs::{BatchItemFailure, SqsBatchResponse, SqsEvent, SqsMessage};
use chrono::TimeDelta;
use futures_util::future::join_all;
use shared::Error;
use shared::clock::Clock;
use shared::crash::{self, Point};
use shared::job::{FailedTry, Job, Policy, Record, Refused, Turn};
use shared::message::Message;
use shared::ports::{JobQueue, JobStore};
use shared::push::{self, Told, Webhook as Sent};
use shared::telemetry;
use shared::transition::{NotMoved, transition};
use tracing::Instrument;
use uuid::Uuid;

use crate::courier::Courier;

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
/// The status by which a receiver says that it wants no webhooks any more (Standard Webhooks).
const GONE: u16 = 410;
/// Tries of one delivery.
pub const MAX_TRIES: u32 = WAITS.len() as u32 + 1;
/// How often the queue hands a message out. It is far more than a delivery takes: what is given up by it
/// could not be worked at all.
pub const MAX_RECEIVES: u32 = 100;

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
            Ok(Message::Deliver { id }) => {
                self.process(message.message_id.as_deref().unwrap_or(""), id, receives(message)).await
            }
            Ok(Message::Infer { .. } | Message::Forget { .. } | Message::Answer { .. }) => {
                self.unreadable(message, "a message of another queue").await
            }
            Err(error) => self.unreadable(message, &error.to_string()).await,
        };
        let Outcome::Retry(delay) = outcome else { return true };
        let receipt = message.receipt_handle.as_deref().unwrap_or("");
        if let Err(error) = self.queue.set_visibility(receipt, seconds(delay)).await {
            // It comes back when its first visibility timeout ends, and waits for the rest.
            tracing::warn!(error.chain = error.chain(), "message not hidden");
        }
        crash::here(Point::WebhookHidden);
        false
    }

    /// Who a message is for, as `host:port`, so that a host may send each a few at a time; `None` where that is
    /// not known, which is for [`Webhook::handle`] to say.
    pub async fn receiver(&self, body: &str) -> Option<String> {
        let Ok(Message::Deliver { id }) = Message::decode(body) else { return None };
        let Ok(Some(Record::Job(job))) = self.jobs.get(id).await else { return None };
        let url = reqwest::Url::parse(&job.callback?.url).ok()?;
        Some(format!("{}:{}", url.host_str()?, url.port_or_known_default()?))
    }

    /// No later receive would read it.
    async fn unreadable(&self, message: &SqsMessage, why: &str) -> Outcome {
        let message_id = message.message_id.as_deref().unwrap_or("");
        tracing::error!(
            message.id = message_id,
            error.code = "unreadable_message",
            error.chain = why,
            "message not read"
        );
        match self.queue.bury(message.body.clone().unwrap_or_default()).await {
            Ok(()) => {
                crash::here(Point::WebhookUnreadableBuried);
                Outcome::Acknowledge
            }
            Err(error) => self.not_worked(&error, receives(message)),
        }
    }

    fn not_worked(&self, error: &Error, receives: u32) -> Outcome {
        tracing::error!(error.code = error.code().as_str(), error.chain = error.chain(), "message not worked");
        Outcome::Retry(self.policy.doubled(self.policy.backoff, receives.saturating_sub(1)))
    }

    /// The rule for one message about a job, received for the `receives`th time.
    pub async fn process(&self, message: &str, id: Uuid, receives: u32) -> Outcome {
        match self.deliver(message, id).await {
            Ok(outcome) => outcome,
            Err(error) => tracing::error_span!("job", job.id = %id).in_scope(|| self.not_worked(&error, receives)),
        }
    }

    async fn deliver(&self, message: &str, id: Uuid) -> Result<Outcome, Error> {
        let Some(record) = self.jobs.get(id).await? else { return Ok(Outcome::Acknowledge) };
        let told = push::deliveries(&record, Vec::new()).into_iter().find_map(|told| match told {
            Told::Webhook(sent) => Some(sent),
            Told::Frame(..) => None,
        });
        // Delivered already, sent round again, or deleted.
        let (Record::Job(job), Some(sent)) = (record, told) else { return Ok(Outcome::Acknowledge) };
        let Some(delivery) = job.delivery() else { return Ok(Outcome::Acknowledge) };
        match delivery.turn(message, self.clock.now()) {
            Turn::Nothing => Ok(Outcome::Acknowledge),
            Turn::Wait(left) => Ok(Outcome::Retry(left)),
            Turn::Try => {
                let span = telemetry::job_span(job.id, &job.trace_id);
                let failed = FailedTry { failed_before: delivery.failed_tries(), message };
                Box::pin(self.send(&job, &sent, failed)).instrument(span).await
            }
        }
    }

    /// `failed` is what is written where the receiver does not take it.
    async fn send(&self, job: &Job, sent: &Sent, failed: FailedTry<'_>) -> Result<Outcome, Error> {
        let answer = self.courier.send(sent, self.clock.now()).await?;
        crash::here(Point::WebhookAnswered);
        match answer {
            Ok(()) => {
                let settle = |job: &Job| Ok((job.settle_delivery(sent.seq)?, ()));
                written(transition(&self.jobs, job, settle).await)?;
                crash::here(Point::WebhookSettled);
                tracing::info!(webhook.tries = failed.failed_before + 1, "webhook delivered");
                Ok(Outcome::Acknowledge)
            }
            Err(refusal) => {
                tracing::warn!(
                    webhook.tries = failed.failed_before + 1,
                    http.status = refusal.status,
                    error.code = refusal.code,
                    error.chain = refusal.cause,
                    "webhook not delivered"
                );
                let asked = refusal.retry_after.unwrap_or_default().min(self.policy.max_delay);
                match WAITS.get(failed.failed_before as usize) {
                    _ if refusal.status == Some(GONE) => self.end(job, sent, failed).await,
                    Some(wait) => self.postpone(job, sent, failed, spread((*wait).max(asked), job.id)).await,
                    None => self.give_up(job, sent, failed).await,
                }
            }
        }
    }

    async fn postpone(&self, job: &Job, sent: &Sent, failed: FailedTry<'_>, wait: TimeDelta) -> Result<Outcome, Error> {
        let not_before = self.clock.now() + wait;
        let postpone = |job: &Job| Ok((job.postpone_delivery(sent.seq, failed, not_before, &self.policy)?, ()));
        let postponed = written(transition(&self.jobs, job, postpone).await)?;
        crash::here(Point::WebhookPostponed);
        Ok(if postponed { Outcome::Retry(wait) } else { Outcome::Acknowledge })
    }

    async fn give_up(&self, job: &Job, sent: &Sent, failed: FailedTry<'_>) -> Result<Outcome, Error> {
        // First: cut off behind it, there are two of it in the end. None would be the end of it.
        self.queue.bury(Message::Deliver { id: job.id }.encode()).await?;
        crash::here(Point::WebhookBuried);
        tracing::error!(error.code = "webhook_given_up", "nobody is told of a job's end");
        self.end(job, sent, failed).await
    }

    async fn end(&self, job: &Job, sent: &Sent, failed: FailedTry<'_>) -> Result<Outcome, Error> {
        let give_up = |job: &Job| Ok((job.give_up_delivery(sent.seq, failed)?, ()));
        written(transition(&self.jobs, job, give_up).await)?;
        crash::here(Point::WebhookGivenUp);
        Ok(Outcome::Acknowledge)
    }
}

/// A wait, and up to a tenth more: jobs that ended together are not all tried again in the same second.
fn spread(wait: TimeDelta, id: Uuid) -> TimeDelta {
    // The end of an id is random.
    let [.., high, low] = *id.as_bytes();
    wait + wait / 10 * i32::from(u16::from_be_bytes([high, low])) / i32::from(u16::MAX)
}

/// As a queue takes it, and no sooner.
fn seconds(delay: TimeDelta) -> u32 {
    u32::try_from((delay + TimeDelta::milliseconds(999)).num_seconds()).unwrap_or(0)
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
