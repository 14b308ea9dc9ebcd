//! What AWS does between the functions: receives messages, keeps the schedule, expires what is old
//! (`feed.rs` reads the feed). Each loop ends after the item in hand once `stopped` turns true.

use std::sync::Arc;
use std::time::Duration;

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use aws_lambda_events::event::sqs::{SqsEvent, SqsMessage};
use chrono::TimeDelta;
use futures_util::future::join_all;
use shared::Error;
use shared::crash::{self, Point};
use shared::embedded::Delivery;
use shared::job::Job;
use shared::transition::{NotMoved, transition};
use tokio::sync::watch::Receiver;
use tokio::time::timeout;

use crate::{Host, Queue};

/// How often a loop looks without being rung: messages become visible in silence.
pub(crate) const POLL: Duration = Duration::from_millis(500);
/// The pause after a failure of a store.
pub(crate) const PAUSE: Duration = Duration::from_secs(1);
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(3600);
const LATE_UPLOAD_TTL: TimeDelta = TimeDelta::days(1);
/// Messages under way for each photo on the processor: while one is worked, others are finished and
/// acknowledged, and share the flushes that this takes.
pub(crate) const AHEAD: usize = 16;
/// Webhooks that are sent at once, to all receivers together.
pub(crate) const WEBHOOKS: usize = 16;
/// Of them to one receiver: one that takes its time takes no more of the senders than that.
pub(crate) const WEBHOOKS_TO_ONE: usize = 2;
/// How long a receiver's place is waited for: one that answers at once is soon free.
const FREE_SOON: Duration = Duration::from_millis(50);
/// When it is looked again whether a receiver has a place.
const NO_PLACE: TimeDelta = TimeDelta::seconds(5);
/// Longer than one may take.
const WEBHOOK_VISIBILITY: TimeDelta = TimeDelta::seconds(60);
/// Beyond the lease, so that a message comes back after its worker has given up.
const VISIBILITY_MARGIN: TimeDelta = TimeDelta::seconds(10);

/// Waits for `rung`, for the next look, or for the stop.
pub(crate) async fn idle(rung: impl Future<Output = ()>, at_most: Duration, stopped: &mut Receiver<bool>) {
    tokio::select! {
        () = rung => {}
        () = tokio::time::sleep(at_most) => {}
        _ = stopped.wait_for(|stopped| *stopped) => {}
    }
}

/// Ends what the host's last life left held: the lock of the data folder proves that its workers are
/// dead. Their attempts count; sweep and queue send the jobs round again.
pub(crate) async fn take_over(host: &Host) -> Result<(), Error> {
    let now = host.clock.now();
    let leased = host.store.leased().await?;
    let lapse = async |job: &Job| match transition(&host.store, job, |job| Ok((job.lapse(now)?, ()))).await {
        Err(NotMoved::Store(error)) => Err(error),
        // The lease has run out by itself.
        Err(NotMoved::Refused(_) | NotMoved::Gone) => Ok(()),
        Ok(_) => {
            crash::here(Point::StartLeaseEnded);
            Ok(())
        }
    };
    join_all(leased.iter().map(lapse)).await.into_iter().collect::<Result<(), _>>()?;
    let photos = host.queue.show_received().await?;
    crash::here(Point::StartPhotosShown);
    let shown = photos + host.webhooks.show_received().await?;
    crash::here(Point::StartMessagesShown);
    if !leased.is_empty() || shown > 0 {
        tracing::warn!(jobs = leased.len(), messages = shown, "work was cut off at the last end; it is taken up now");
    }
    Ok(())
}

pub(crate) async fn inference(host: Arc<Host>, stopped: Receiver<bool>) {
    let lease = host.config.policy.lease;
    let host = &*host;
    // A message is received when it is its turn: what waits, waits in the queue.
    let ready = || async { host.inference.room.turn().await.ok() };
    let work = |delivery: Delivery, turn| async move {
        let deadline = host.clock.now() + lease;
        host.inference.handle(sqs_event(&delivery), deadline, turn).await.batch_item_failures.is_empty()
    };
    consume(&host.queue, lease + VISIBILITY_MARGIN, ready, work, stopped).await;
}

/// Beside inference and with a queue of its own: a receiver that takes its time holds up no photo.
pub(crate) async fn webhooks(host: Arc<Host>, stopped: Receiver<bool>) {
    let host = &*host;
    let work = |delivery: Delivery, ()| async move {
        let Some(receiver) = host.webhook.receiver(&delivery.body).await else {
            return host.webhook.handle(sqs_event(&delivery)).await.batch_item_failures.is_empty();
        };
        let Ok(Some(_place)) = timeout(FREE_SOON, host.places.take(&receiver)).await else {
            if let Err(error) = host.webhooks.put_back(&delivery.receipt, NO_PLACE).await {
                failed("message not put back", &error);
            }
            return false;
        };
        host.webhook.handle(sqs_event(&delivery)).await.batch_item_failures.is_empty()
    };
    consume(&host.webhooks, WEBHOOK_VISIBILITY, || async {}, work, stopped).await;
}

/// Waits for what `ready` gives before it receives. `work` says whether the message is to be acknowledged.
async fn consume<P, R: Future<Output = P> + Send, F: Future<Output = bool> + Send>(
    queue: &Queue,
    visibility: TimeDelta,
    ready: impl Fn() -> R,
    work: impl Fn(Delivery, P) -> F,
    mut stopped: Receiver<bool>,
) {
    while !*stopped.borrow() {
        let ready = ready().await;
        if *stopped.borrow() {
            break;
        }
        match queue.receive(visibility).await {
            Ok(Some(delivery)) => {
                crash::here(Point::QueueReceived);
                if work(delivery.clone(), ready).await
                    && let Err(error) = acknowledge(queue, &delivery).await
                {
                    failed("message not acknowledged", &error);
                }
            }
            Ok(None) => {
                drop(ready);
                idle(queue.sent(), POLL, &mut stopped).await;
            }
            Err(error) => {
                drop(ready);
                failed("queue not read", &error);
                idle(std::future::pending(), PAUSE, &mut stopped).await;
            }
        }
    }
}

async fn acknowledge(queue: &Queue, delivery: &Delivery) -> Result<(), Error> {
    crash::here(Point::QueueBeforeAck);
    queue.acknowledge(&delivery.receipt).await
}

fn sqs_event(delivery: &Delivery) -> SqsEvent {
    let mut message = SqsMessage::default();
    message.message_id = Some(delivery.id.clone());
    message.receipt_handle = Some(delivery.receipt.clone());
    message.body = Some(delivery.body.clone());
    message.attributes.insert("ApproximateReceiveCount".to_owned(), delivery.receive_count.to_string());
    let mut event = SqsEvent::default();
    event.records.push(message);
    event
}

pub(crate) async fn sweep(host: Arc<Host>, mut stopped: Receiver<bool>) {
    while !*stopped.borrow() {
        let mut event = EventBridgeEvent::default();
        event.detail_type = "Scheduled Event".to_owned();
        event.source = "aws.events".to_owned();
        if let Err(error) = host.sweep.handle(event).await {
            failed("not swept", &error);
        }
        idle(std::future::pending(), host.config.sweep_interval, &mut stopped).await;
    }
}

/// Expires records and photos, as DynamoDB's TTL and S3's lifecycle rules do.
pub(crate) async fn housekeeping(host: Arc<Host>, mut stopped: Receiver<bool>) {
    while !*stopped.borrow() {
        let now = host.clock.now();
        match host.store.remove_expired(now).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "expired records deleted"),
            Err(error) => failed("expired records not deleted", &error),
        }
        crash::here(Point::HousekeepingRecordsRemoved);
        // Uploads that came after sweep had given them up.
        for (prefix, ttl) in [("jobs/", host.config.policy.photo_ttl), ("incoming/", LATE_UPLOAD_TTL)] {
            match host.blobs.remove_older(prefix, (now - ttl).into()).await {
                Ok(0) => {}
                Ok(count) => tracing::info!(count, "expired photos deleted"),
                Err(error) => failed("expired photos not deleted", &error),
            }
            crash::here(Point::HousekeepingPhotosRemoved);
        }
        idle(std::future::pending(), HOUSEKEEPING_INTERVAL, &mut stopped).await;
    }
}

pub(crate) fn failed(what: &str, error: &Error) {
    tracing::error!(error.code = error.code().as_str(), error.chain = error.chain(), "{what}");
}
