//! What stands between a change feed and enrichment on AWS: reads changes, hands each to
//! `enrichment.handle` as an event of one record, and takes it out of the feed when it is worked.
//!
//! Descriptions and prompts have a feed each, so that no number of prompts of minutes holds up a description.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use shared::Error;
use shared::crash::{self, Point};
use shared::embedded::{Change, Work};
use shared::job::Dispatch;
use tokio::sync::watch::Receiver;
use tokio::task::{JoinError, JoinSet};

use crate::Host;
use crate::workers::{PAUSE, POLL, failed, idle};

/// Changes of a feed that are worked at once: so often the LLM is asked.
const AT_ONCE: usize = 10;

struct Feed {
    host: Arc<Host>,
    work: Work,
    /// Up to where the feed was read.
    read_to: i64,
    tasks: JoinSet<(i64, bool)>,
    /// What is worked and still in the feed.
    worked: Vec<i64>,
}

pub(crate) async fn enrichment(host: Arc<Host>, work: Work, mut stopped: Receiver<bool>) {
    let mut feed = Feed { host, work, read_to: 0, tasks: JoinSet::new(), worked: Vec::new() };
    let host = Arc::clone(&feed.host);
    let mut at_most = Duration::ZERO;
    while !*stopped.borrow() {
        tokio::select! {
            Some(done) = feed.tasks.join_next() => feed.settle(done),
            () = idle(host.store.changed(work), at_most, &mut stopped) => {}
        }
        at_most = match feed.go_on(&stopped).await {
            Ok(()) => POLL,
            Err(error) => {
                failed("feed not worked", &error);
                PAUSE
            }
        };
    }
    while let Some(done) = feed.tasks.join_next().await {
        feed.settle(done);
    }
    if let Err(error) = feed.remove().await {
        // They are read again at the next start, and find their jobs worked.
        failed("feed not worked", &error);
    }
}

impl Feed {
    /// Begins to work what is next, as far as there is room.
    async fn go_on(&mut self, stopped: &Receiver<bool>) -> Result<(), Error> {
        self.remove().await?;
        let room = AT_ONCE - self.tasks.len();
        if room == 0 {
            return Ok(());
        }
        for change in self.host.store.changes_behind(self.work, self.read_to, room as u32).await? {
            self.read_to = change.seq;
            self.tasks.spawn(work(Arc::clone(&self.host), change, stopped.clone()));
        }
        Ok(())
    }

    /// Notes what is worked.
    fn settle(&mut self, done: Result<(i64, bool), JoinError>) {
        let mut done = Some(done);
        // Whatever has ended meanwhile is removed with it, in one write.
        while let Some(ended) = done {
            match ended {
                Ok((seq, true)) => self.worked.push(seq),
                Ok((_, false)) => {}
                // The host ends with it, as with any other of its loops.
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => {}
            }
            done = self.tasks.try_join_next();
        }
    }

    /// Takes out of the feed what is worked.
    async fn remove(&mut self) -> Result<(), Error> {
        if self.worked.is_empty() {
            return Ok(());
        }
        crash::here(Point::FeedBeforeRemoval);
        self.host.store.worked(self.worked.clone()).await?;
        self.worked.clear();
        Ok(())
    }
}

/// Works one change, again where the store could not be reached, and keeps its place until then: what
/// waits behind it would fail as well. `false` where the host stops first.
async fn work(host: Arc<Host>, change: Change, mut stopped: Receiver<bool>) -> (i64, bool) {
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
