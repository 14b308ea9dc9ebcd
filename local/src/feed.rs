//! What stands between the change feed and enrichment on AWS: reads changes, hands each to
//! `enrichment.handle` as an event of one record, and moves the durable cursor behind a change when
//! it and all before it are done.
//!
//! Changes are worked beside each other, so that a prompt of minutes holds up no description.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use shared::Error;
use shared::crash::{self, Point};
use shared::embedded::Change;
use shared::job::{Dispatch, Record};
use shared::ports::JobStore;
use tokio::sync::watch::Receiver;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::{JoinError, JoinSet};
use uuid::Uuid;

use crate::Host;
use crate::workers::{PAUSE, POLL, failed, idle};

const CONSUMER: &str = "enrichment";
/// Descriptions that the LLM is asked for at once.
const DESCRIPTIONS: usize = 10;
/// Prompts that the LLM is asked at once.
const PROMPTS: usize = 10;
/// Changes read ahead, those that wait for their turn included.
const WINDOW: usize = 1000;

/// Who may ask the LLM at the moment.
struct Turns {
    descriptions: Semaphore,
    prompts: Semaphore,
}

impl Turns {
    fn new() -> Self {
        Self { descriptions: Semaphore::new(DESCRIPTIONS), prompts: Semaphore::new(PROMPTS) }
    }

    /// A turn for this job; `None` where the host stops.
    async fn take(&self, host: &Host, id: Uuid, stopped: &mut Receiver<bool>) -> Option<SemaphorePermit<'_>> {
        // What cannot be read is read again by the handler, which reports it.
        let is_prompt = matches!(host.store.get(id).await, Ok(Some(Record::Job(job))) if job.is_prompt());
        let turns = if is_prompt { &self.prompts } else { &self.descriptions };
        tokio::select! {
            turn = turns.acquire() => turn.ok(),
            _ = stopped.wait_for(|stopped| *stopped) => None,
        }
    }
}

/// What was read of the feed and lies before the cursor.
struct Feed {
    host: Arc<Host>,
    turns: Arc<Turns>,
    /// Up to where the feed was read; 0 before the first look.
    read_to: i64,
    /// The changes behind the cursor, and whether each is done.
    under_way: BTreeMap<i64, bool>,
    tasks: JoinSet<(i64, bool)>,
}

pub(crate) async fn enrichment(host: Arc<Host>, mut stopped: Receiver<bool>) {
    let turns = Arc::new(Turns::new());
    let mut feed = Feed { host, turns, read_to: 0, under_way: BTreeMap::new(), tasks: JoinSet::new() };
    let host = Arc::clone(&feed.host);
    let mut at_most = Duration::ZERO;
    while !*stopped.borrow() {
        tokio::select! {
            Some(done) = feed.tasks.join_next() => {
                let was_full = room(&feed.under_way) == 0;
                feed.settle(done).await;
                if !was_full {
                    continue;
                }
            }
            () = idle(host.store.changed(), at_most, &mut stopped) => {}
        }
        at_most = match feed.look(&stopped).await {
            Ok(()) => POLL,
            Err(error) => {
                failed("feed not read", &error);
                PAUSE
            }
        };
    }
    while let Some(done) = feed.tasks.join_next().await {
        feed.settle(done).await;
    }
}

impl Feed {
    /// Reads on, and begins to work what was found.
    async fn look(&mut self, stopped: &Receiver<bool>) -> Result<(), Error> {
        let room = room(&self.under_way);
        if room == 0 {
            return Ok(());
        }
        for change in self.host.store.changes_behind(CONSUMER, self.read_to, room).await? {
            self.read_to = change.seq;
            self.under_way.insert(change.seq, false);
            let (host, turns) = (Arc::clone(&self.host), Arc::clone(&self.turns));
            self.tasks.spawn(work(host, turns, change, stopped.clone()));
        }
        Ok(())
    }

    /// Notes what is done, and moves the cursor as far as all is.
    async fn settle(&mut self, done: Result<(i64, bool), JoinError>) {
        let mut done = Some(done);
        // Whatever has ended meanwhile goes with it: each move of the cursor is a write.
        while let Some(ended) = done {
            match ended {
                Ok((seq, worked)) => drop(self.under_way.insert(seq, worked)),
                // The host ends with it, as with any other of its loops.
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => {}
            }
            done = self.tasks.try_join_next();
        }
        let mut passed = None;
        while let Some(first) = self.under_way.first_entry().filter(|first| *first.get()) {
            passed = Some(first.remove_entry().0);
        }
        let Some(passed) = passed else { return };
        crash::here(Point::FeedBeforeCursor);
        if let Err(error) = self.host.store.advance(CONSUMER, passed).await {
            // They are read again at the next start, and find their jobs worked.
            failed("feed not moved on", &error);
        }
    }
}

/// How many changes may be read. What is done and lies behind a slow prompt takes no room: others would wait for it.
fn room(under_way: &BTreeMap<i64, bool>) -> u32 {
    let open = under_way.values().filter(|done| !**done).count();
    u32::try_from(WINDOW.saturating_sub(open)).unwrap_or(0)
}

/// Works one change, again where the store could not be reached, and keeps its turn until then: what
/// waits behind it would fail as well. `false` where the host stops first.
async fn work(host: Arc<Host>, turns: Arc<Turns>, change: Change, mut stopped: Receiver<bool>) -> (i64, bool) {
    let Some(_turn) = turns.take(&host, change.id, &mut stopped).await else { return (change.seq, false) };
    loop {
        let policy = host.config.policy;
        let deadline = host.clock.now() + policy.lease.max(policy.prompt_lease);
        let event = match serde_json::from_value(event(&change)) {
            Ok(event) => event,
            Err(error) => {
                failed("change not worked", &Error::internal(error));
                return (change.seq, true);
            }
        };
        let response = host.enrichment.handle(event, deadline).await;
        if response.batch_item_failures.is_empty() {
            return (change.seq, true);
        }
        idle(std::future::pending(), PAUSE, &mut stopped).await;
        if *stopped.borrow() {
            return (change.seq, false);
        }
    }
}

/// A change in the shape of DynamoDB Streams.
fn event(change: &Change) -> serde_json::Value {
    json!({"Records": [{
        "eventID": change.seq.to_string(),
        "eventName": "MODIFY",
        "eventSource": "aws:dynamodb",
        "eventVersion": "1.1",
        "awsRegion": "local",
        "dynamodb": {
            "ApproximateCreationDateTime": 0,
            "Keys": {"id": {"S": change.id}},
            "NewImage": {"id": {"S": change.id}, "dispatch": {"S": Dispatch::Enrichment.as_str()}},
            "SequenceNumber": change.seq.to_string(),
            "SizeBytes": 0,
            "StreamViewType": "NEW_IMAGE",
        },
    }]})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_behind_a_slow_prompt_keeps_nothing_from_being_read() {
        let behind = |open: i64, done: i64| (0..open + done).map(|seq| (seq, seq >= open)).collect();
        assert_eq!(room(&behind(1, 5000)), WINDOW as u32 - 1);
        assert_eq!(room(&behind(WINDOW as i64, 0)), 0);
        assert_eq!(room(&behind(WINDOW as i64 + 1, 1)), 0);
    }
}
