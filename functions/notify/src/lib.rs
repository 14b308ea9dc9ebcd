//! Tells those who have subscribed to a job over a WebSocket how it stands.
//!
//! Triggered by the change feed, by every write to a record. Reads the job's subscribers and, where
//! there are any, the record: not the change, so that a late or repeated one tells the latest state.
//! Pushes the frames that `shared::push` decides on; writes nothing but the end of a connection that
//! is gone.

use std::collections::BTreeSet;

use aws_lambda_events::event::streams::{DynamoDbBatchItemFailure, DynamoDbEventResponse};
use futures_util::future::join_all;
use shared::Error;
use shared::crash::{self, Point};
use shared::ports::{Connections, JobStore, Push, Pushed};
use shared::push::{self, Frame, Subscriber};
use shared::stream::Event;
use uuid::Uuid;

/// What notify works with.
pub struct Notify<J, C, P> {
    pub jobs: J,
    pub connections: C,
    pub push: P,
}

impl<J: JobStore, C: Connections, P: Push> Notify<J, C, P> {
    /// Works a batch; several changes of one job are told once. What could not be told is reported,
    /// and comes back.
    pub async fn handle(&self, event: Event) -> DynamoDbEventResponse {
        // Items of the table that are no records concern nobody.
        let ids: BTreeSet<Uuid> = event.records.iter().filter_map(|record| record.id()).collect();
        let worked = join_all(ids.into_iter().map(async |id| (id, self.process(id).await))).await;
        let failed: BTreeSet<Uuid> = worked.into_iter().filter(|(_, told)| told.is_err()).map(|(id, _)| id).collect();
        let mut response = DynamoDbEventResponse::default();
        for record in event.records.iter().filter(|record| record.id().is_some_and(|id| failed.contains(&id))) {
            let mut failure = DynamoDbBatchItemFailure::default();
            failure.item_identifier = record.sequence_number().map(str::to_owned);
            response.batch_item_failures.push(failure);
        }
        response
    }

    /// The rule for one record.
    ///
    /// # Errors
    /// Where a store cannot be reached, or a frame not be sent.
    pub async fn process(&self, id: Uuid) -> Result<(), Error> {
        self.tell(id).await.inspect_err(|error| {
            tracing::warn!(job.id = %id, error.code = error.code().as_str(), error.chain = error.chain(), "not told");
        })
    }

    async fn tell(&self, id: Uuid) -> Result<(), Error> {
        let subscribers = self.connections.subscribers(id).await?;
        if subscribers.is_empty() {
            return Ok(());
        }
        let Some(record) = self.jobs.get(id).await? else { return Ok(()) };
        let told = push::deliveries(&record, subscribers).into_iter().map(|(to, frame)| self.deliver(to, frame));
        join_all(told).await.into_iter().collect()
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
