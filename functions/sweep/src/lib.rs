//! Sends round again whatever got stuck.
//!
//! Triggered by a schedule, every minute. Reads the records that are due and the blob store's
//! listing. Writes, for a job: its record (a later `due_at`, the dispatch marker, its end), then the
//! message; for a delivery that nobody has made in days: a dead letter, then the record; for a
//! tombstone: it erases blobs, writes the record, which stays due until inference has confirmed, then
//! sends the order to erase the cache; for an upload: it erases what was uploaded, then writes the
//! record; for blobs of an hour that have no record: it deletes them.
//!
//! What a run does not get to, the next goes on with. How far it got is kept in memory alone: a new process
//! starts over.

use std::sync::{Mutex, MutexGuard, PoisonError};

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use chrono::TimeDelta;
use futures_util::StreamExt;
use futures_util::{future, stream};
use serde::Serialize;
use shared::Error;
use shared::clock::{Clock, Timestamp};
use shared::crash::{self, Point};
use shared::job::{self, Job, Policy, Record, SweepAction, Tombstone, Upload};
use shared::llm::template;
use shared::message::Message;
use shared::metrics;
use shared::ports::{BlobStore, JobQueue, JobStore};
use shared::telemetry;
use shared::transition::{NotMoved, transition};
use tracing::{Instrument, Span};
use uuid::Uuid;

/// Records read at once.
const PAGE: u32 = 100;
/// Records worked at once. Each is a few calls of some milliseconds on AWS, one after another: of records that one
/// caller can make in a minute a run would not get through without. Those of one caller meet in the item that counts
/// what it has queued, so there are few.
const AT_ONCE: usize = 4;
/// Records worked in one run; the next run is a minute away.
const MAX_RECORDS: u32 = 10_000;
/// Names of blobs compared with the records in one run. Each is one read, of some milliseconds on AWS: 2,000 take
/// about ten seconds, and are more than a minute brings.
const MAX_NAMES: u32 = 2_000;
/// From the start of a run to the last record that it takes up, at most. Where that is slow, orphans have their time
/// all the same.
const RECORDS_TIME: TimeDelta = TimeDelta::seconds(30);
/// From the start of a run to the last page of names. The function is stopped after 60 s, and what it has counted is
/// told only at its end.
const RUN_TIME: TimeDelta = TimeDelta::seconds(45);
/// Blobs without a record are left alone for this long: their submit may still be running.
const ORPHAN_AGE: TimeDelta = TimeDelta::hours(1);

/// What sweep works with.
pub struct Sweep<J: JobStore, Q, B> {
    jobs: J,
    queue: Q,
    /// The queue before webhook.
    webhooks: Q,
    blobs: B,
    clock: Clock,
    policy: Policy,
    /// Where the next run begins, if the last one did not come to the end of what was due.
    records_swept: Mutex<Option<J::Position>>,
    /// Names of blobs up to this one were compared with the records. A new process starts over at the
    /// oldest photo that may exist; what none gets to goes when photos expire.
    orphans_checked: Mutex<String>,
}

/// What a run did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Report {
    pub sent: u32,
    pub marked: u32,
    pub ended: u32,
    /// Ends of jobs of which nobody could be told.
    pub undelivered: u32,
    pub erased: u32,
    pub uploads: u32,
    pub orphans: u32,
    pub failed: u32,
}

/// What became of a record.
enum Swept {
    Sent,
    Marked,
    Ended,
    Undelivered,
    Erased,
    Upload,
    /// Somebody was faster, which is as good.
    Nothing,
}

impl Report {
    fn count(&mut self, swept: &Result<Swept, Error>) {
        let counted = match swept {
            Ok(Swept::Sent) => &mut self.sent,
            Ok(Swept::Marked) => &mut self.marked,
            Ok(Swept::Ended) => &mut self.ended,
            Ok(Swept::Undelivered) => &mut self.undelivered,
            Ok(Swept::Erased) => &mut self.erased,
            Ok(Swept::Upload) => &mut self.uploads,
            Ok(Swept::Nothing) => return,
            Err(_) => &mut self.failed,
        };
        *counted += 1;
    }
}

impl<J: JobStore, Q: JobQueue, B: BlobStore> Sweep<J, Q, B> {
    pub fn new(jobs: J, [queue, webhooks]: [Q; 2], blobs: B, clock: Clock, policy: Policy) -> Self {
        let (records_swept, orphans_checked) = (Mutex::default(), Mutex::default());
        Self { jobs, queue, webhooks, blobs, clock, policy, records_swept, orphans_checked }
    }

    /// One run. It ends in time for its function, however much there is to do.
    ///
    /// # Errors
    /// Where the due records cannot be read; a single record that fails is counted and stays due.
    pub async fn handle(&self, _: EventBridgeEvent) -> Result<Report, Error> {
        let (mut report, start) = (Report::default(), self.clock.now());
        let swept = self.sweep_records(start + RECORDS_TIME, &mut report).await;
        metrics::jobs_given_up(report.ended);
        swept?;
        self.sweep_orphans(start + RUN_TIME, &mut report).await?;
        if report != Report::default() {
            tracing::info!(
                sweep.sent = report.sent,
                sweep.marked = report.marked,
                sweep.ended = report.ended,
                sweep.undelivered = report.undelivered,
                sweep.erased = report.erased,
                sweep.uploads = report.uploads,
                sweep.orphans = report.orphans,
                sweep.failed = report.failed,
                "swept"
            );
        }
        Ok(report)
    }

    /// Page behind page: what cannot be read or fails stays first in line, and must not keep what is behind it
    /// from being swept.
    async fn sweep_records(&self, until: Timestamp, report: &mut Report) -> Result<(), Error> {
        let now = self.clock.now();
        // Taken: after an error the next run begins with what is longest due.
        let mut after = locked(&self.records_swept).take();
        for _ in 0..MAX_RECORDS / PAGE {
            let due = self.jobs.due(now, after.as_ref(), PAGE).await?;
            let found = due.records.len();
            let in_time = stream::iter(due.records).take_while(|_| future::ready(self.clock.now() <= until));
            let swept = in_time.map(|record| async move {
                let span = span(&record);
                self.sweep_record(&record, now).instrument(span).await
            });
            let swept: Vec<_> = swept.buffer_unordered(AT_ONCE).collect().await;
            swept.iter().for_each(|swept| report.count(swept));
            if swept.len() < found {
                break;
            }
            after = due.next;
            if after.is_none() {
                break;
            }
        }
        *locked(&self.records_swept) = after;
        Ok(())
    }

    async fn sweep_record(&self, record: &Record, now: Timestamp) -> Result<Swept, Error> {
        let swept = match record {
            Record::Job(job) => self.sweep_job(job, now).await,
            Record::Tombstone(tombstone) => self.sweep_tombstone(tombstone, now).await,
            Record::Upload(upload) => self.sweep_upload(upload).await,
        };
        swept.inspect_err(|error| {
            tracing::error!(error.code = error.code().as_str(), error.chain = error.chain(), "record not swept");
        })
    }

    async fn sweep_job(&self, job: &Job, now: Timestamp) -> Result<Swept, Error> {
        if job.is_undeliverable(now) {
            // First: once the record says that it was given up, nobody comes by it again. Cut off in between there
            // are two of it, and one of what somebody delivers at this moment does nothing.
            self.webhooks.bury(Message::Deliver { id: job.id }.encode()).await?;
            crash::here(Point::SweepBuried);
        }
        let step =
            |job: &Job| job.sweep(now, &self.policy, |reading| template::describe(reading, Some("attempts_exhausted")));
        let (job, action) = match transition(&self.jobs, job, step).await {
            Ok(moved) => moved,
            Err(NotMoved::Refused(_) | NotMoved::Gone) => return Ok(Swept::Nothing),
            Err(NotMoved::Store(error)) => return Err(error),
        };
        crash::here(Point::SweepWritten);
        tracing::warn!(
            job.status = job.status.as_str(),
            job.redispatches = job.redispatches,
            sweep.action = ?action,
            "job was due"
        );
        Ok(match action {
            SweepAction::SendInfer => {
                self.queue.send(Message::Infer { id: job.id }).await?;
                crash::here(Point::SweepSent);
                Swept::Sent
            }
            SweepAction::Marked => Swept::Marked,
            SweepAction::Ended => Swept::Ended,
            SweepAction::Undelivered => {
                tracing::error!(error.code = "webhook_given_up", "nobody is told of a job's end");
                Swept::Undelivered
            }
        })
    }

    async fn sweep_tombstone(&self, tombstone: &Tombstone, now: Timestamp) -> Result<Swept, Error> {
        self.blobs.delete_prefix(&job::blob_prefix(tombstone.id)).await?;
        crash::here(Point::SweepErased);
        let fence = Record::Tombstone(tombstone.clone()).fence();
        let written = self.jobs.replace(fence, &Record::Tombstone(tombstone.swept(now, &self.policy))).await?;
        crash::here(Point::SweepTombstoneSettled);
        // Sent before, the order would be carried out on a tombstone that is about to change, and what
        // inference then says would be lost.
        if written && tombstone.cache_key.is_some() {
            self.queue.send(Message::Forget { id: tombstone.id }).await?;
            crash::here(Point::SweepForgetSent);
        }
        Ok(Swept::Erased)
    }

    /// An upload that was used, or that nobody has submitted in time.
    async fn sweep_upload(&self, upload: &Upload) -> Result<Swept, Error> {
        self.blobs.delete_prefix(upload.prefix()).await?;
        crash::here(Point::SweepUploadErased);
        let fence = Record::Upload(upload.clone()).fence();
        // Where a submit was faster it is due again, and erased once more.
        self.jobs.replace(fence, &Record::Upload(upload.erased(self.clock.now()))).await?;
        crash::here(Point::SweepUploadSettled);
        Ok(Swept::Upload)
    }

    async fn sweep_orphans(&self, until: Timestamp, report: &mut Report) -> Result<(), Error> {
        let end = self.clock.now() - ORPHAN_AGE;
        let (oldest, newest) = (first_id_of(end - self.policy.photo_ttl).to_string(), first_id_of(end).to_string());
        // A clock that was ahead for a while must not leave a gap.
        let mut after = locked(&self.orphans_checked).clone().min(newest.clone()).max(oldest);
        for _ in 0..MAX_NAMES / PAGE {
            if self.clock.now() > until {
                break;
            }
            let names = self.blobs.list("jobs/", Some(&after), PAGE).await?;
            let past_end = self.delete_orphans(&names, end, report).await?;
            let last = names.last().filter(|_| !past_end);
            after.clone_from(last.unwrap_or(&newest));
            locked(&self.orphans_checked).clone_from(&after);
            if last.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Deletes the blobs without a record among `names`; `true` where one is younger than `end`.
    async fn delete_orphans(&self, names: &[String], end: Timestamp, report: &mut Report) -> Result<bool, Error> {
        for name in names {
            let Ok(id) = Uuid::parse_str(name) else { continue };
            if job::id_time(id).is_none_or(|made| made > end) {
                return Ok(true);
            }
            let has_record = match self.jobs.get(id).await {
                Ok(record) => record.is_some(),
                Err(error) if error.is_retryable() => return Err(error),
                Err(error) => {
                    tracing::error!(job.id = %id, error.chain = error.chain(), "record not read");
                    true
                }
            };
            if !has_record {
                self.blobs.delete_prefix(&job::blob_prefix(id)).await?;
                crash::here(Point::SweepOrphanErased);
                report.orphans += 1;
            }
        }
        Ok(false)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn span(record: &Record) -> Span {
    match record {
        Record::Job(job) => telemetry::job_span(job.id, &job.trace_id),
        Record::Tombstone(tombstone) => telemetry::job_span(tombstone.id, &tombstone.trace_id),
        Record::Upload(upload) => tracing::error_span!("upload", upload.id = %upload.id),
    }
}

/// Sorts before every id made at `moment` or later.
fn first_id_of(moment: Timestamp) -> Uuid {
    let millis = u128::try_from(moment.timestamp_millis()).unwrap_or(0);
    Uuid::from_u128(millis << 80)
}
