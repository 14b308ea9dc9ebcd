//! Tells those who have subscribed to a job over a WebSocket how it stands, and has who gave a
//! `callback_url` told of its end.
//!
//! Triggered by the change feed, by every write to a record. Reads the job's subscribers and, where
//! there are any or the change carries the marker `dispatch = "webhook"`, the record: not the change, so
//! that a late or repeated one tells the latest state. Pushes the frames that `shared::push` decides on,
//! and sends the message of a delivery to the function webhook: a receiver that takes its time holds up
//! nobody here. Writes nothing but the end of a connection that is gone.

use std::collections::{BTreeMap, BTreeSet};

use aws_lambda_events::event::streams::{DynamoDbBatchItemFailure, DynamoDbEventResponse};
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use shared::Error;
use shared::crash::{self, Point};
use shared::job::{Dispatch, Record};
use shared::message::Message;
use shared::ports::{Connections, JobQueue, JobStore, Push, Pushed};
use shared::push::{self, Frame, Subscriber, Told};
use shared::stream::Event;
use uuid::Uuid;

/// Of a job's subscribers, told at once. Nothing bounds how many connections subscribe to a job.
const TOLD_AT_ONCE: usize = 32;

/// What notify works with.
pub struct Notify<J, C, P, Q> {
    pub jobs: J,
    pub connections: C,
    pub push: P,
    /// The queue before webhook.
    pub webhooks: Q,
}

impl<J: JobStore, C: Connections, P: Push, Q: JobQueue> Notify<J, C, P, Q> {
    /// Works a batch; several changes of one job are told once. What could not be told is reported,
    /// and comes back.
    pub async fn handle(&self, event: Event) -> DynamoDbEventResponse {
        let mut ids = BTreeMap::new();
        for record in &event.records {
            // Items of the table that are no records concern nobody.
            let Some(id) = record.id() else { continue };
            *ids.entry(id).or_default() |= record.dispatch() == Some(Dispatch::Webhook.as_str());
        }
        let worked = join_all(ids.into_iter().map(async |(id, marked)| (id, self.process(id, marked).await))).await;
        // What this build cannot read would come back in vain, and hold up what is behind it.
        let comes_back = |told: &Result<(), Error>| told.as_ref().is_err_and(Error::is_retryable);
        let failed: BTreeSet<Uuid> =
            worked.into_iter().filter(|(_, told)| comes_back(told)).map(|(id, _)| id).collect();
        let mut response = DynamoDbEventResponse::default();
        for record in event.records.iter().filter(|record| record.id().is_some_and(|id| failed.contains(&id))) {
            let mut failure = DynamoDbBatchItemFailure::default();
            failure.item_identifier = record.sequence_number().map(str::to_owned);
            response.batch_item_failures.push(failure);
        }
        response
    }

    /// The rule for one record; `marked` where a change of it asks for its delivery.
    ///
    /// # Errors
    /// Where a store cannot be reached, or a frame or message not be sent.
    pub async fn process(&self, id: Uuid, marked: bool) -> Result<(), Error> {
        self.tell(id, marked).await.inspect_err(|error| {
            tracing::warn!(job.id = %id, error.code = error.code().as_str(), error.chain = error.chain(), "not told");
        })
    }

    async fn tell(&self, id: Uuid, marked: bool) -> Result<(), Error> {
        let subscribers = self.connections.subscribers(id).await?;
        if subscribers.is_empty() && !marked {
            return Ok(());
        }
        let Some(record) = self.jobs.get(id).await? else { return Ok(()) };
        // Once webhook has taken it up the marker is gone: a late change sends no second message.
        let due = matches!(&record, Record::Job(job) if job.dispatch == Some(Dispatch::Webhook));
        let told = push::deliveries(&record, subscribers).into_iter().map(async |told| match told {
            Told::Frame(to, frame) => self.deliver(to, frame).await,
            Told::Webhook(_) if due && marked => self.send(id).await,
            Told::Webhook(_) => Ok(()),
        });
        // All of them, whatever becomes of one.
        let told: Vec<_> = stream::iter(told).buffer_unordered(TOLD_AT_ONCE).collect().await;
        told.into_iter().collect()
    }

    async fn send(&self, id: Uuid) -> Result<(), Error> {
        self.webhooks.send(Message::Deliver { id }).await?;
        crash::here(Point::NotifyQueued);
        Ok(())
    }

    async fn deliver(&self, to: Subscriber, frame: Frame) -> Result<(), Error> {
        let pushed = self.push.push(&to.connection, frame.to_json()?).await?;
        crash::here(Point::NotifyPushed);
        if pushed == Pushed::Gone {
            self.connections.close(&to.connection).await?;
            crash::here(Point::NotifyClosed);
        }
        Ok(())
    }
}
