//! A data folder with hundreds of jobs: how it is filled, looked into, and what must be true of it
//! in the end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use chrono::{SecondsFormat, TimeDelta, Utc};
use local::Host;
use rusqlite::Connection;
use shared::clock::Clock;
use shared::embedded::{DirBlobStore, SqliteJobQueue, SqliteJobStore};
use shared::http::Caller;
use shared::job::{Attempts, Job, Policy, Status};
use shared::ports::{BlobStore, JobStore};
use submit::Submission;
use sweep::Sweep;
use uuid::Uuid;

use super::{numbered_mole, within};

/// How many jobs a fault must not harm.
pub const JOBS: usize = 500;

/// Long enough for the most loaded machine; nothing is asserted about it.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Accepts `count` photos, no two the same, and works none.
pub async fn accept(host: &Host, count: usize) -> Vec<Uuid> {
    let caller = Caller("local".into());
    let mut ids = Vec::new();
    for number in 0..count {
        let submission = Submission { image: numbered_mole(number), describe: true, callback_url: None };
        ids.push(host.submit.accept(&caller, None, submission).await.unwrap());
    }
    ids
}

/// Waits until nobody holds the folder's databases any more.
pub async fn closed(data: &Path) {
    within(PATIENCE, "the databases are closed", async || {
        ["jobs.sqlite-wal", "queue.sqlite-wal", "webhooks.sqlite-wal"].iter().all(|file| !data.join(file).exists())
    })
    .await;
}

/// Copies a closed folder. Photos are linked: they are replaced or deleted, never written into. (Copied, where the
/// two lie on different disks.)
pub fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let (source, target) = (entry.as_ref().unwrap().path(), to.join(entry.as_ref().unwrap().file_name()));
        if source.is_dir() {
            std::fs::create_dir_all(&target).unwrap();
            copy(&source, &target);
        } else if source.file_name().is_some_and(|name| name == "photo") {
            std::fs::hard_link(&source, &target).or_else(|_| std::fs::copy(&source, &target).map(|_| ())).unwrap();
        } else {
            std::fs::copy(&source, &target).unwrap();
        }
    }
}

/// Every photo of the folder's jobs.
pub fn photos(data: &Path) -> Vec<PathBuf> {
    let folders = std::fs::read_dir(data.join("blobs/jobs")).unwrap().map(|entry| entry.unwrap().path());
    folders.filter(|folder| !folder.join("prompt.json").exists()).map(|folder| folder.join("photo")).collect()
}

fn connect(data: &Path, file: &str) -> Connection {
    let connection = Connection::open(data.join(file)).unwrap();
    connection.busy_timeout(PATIENCE).unwrap();
    connection
}

fn count(data: &Path, file: &str, sql: &str) -> usize {
    connect(data, file).query_row(sql, [], |row| row.get(0)).unwrap()
}

/// How many jobs, none of them deleted, are in this state.
pub fn in_state(data: &Path, status: Status) -> usize {
    count(data, "jobs.sqlite", &format!("SELECT count(*) FROM jobs WHERE status = '{}'", status.as_str()))
}

/// Nothing is due, queued, or in the feed for enrichment; room that is kept for an upload is no work.
pub fn is_quiet(data: &Path) -> bool {
    // An upload waits: unused for its submit, and used until its address is worth nothing any more.
    let due = "SELECT count(*) FROM jobs WHERE due_at IS NOT NULL AND json_extract(record, '$.used') IS NOT 0
        AND NOT (json_extract(record, '$.used') IS 1
            AND json_extract(record, '$.due_at') IS json_extract(record, '$.expires_at'))";
    count(data, "jobs.sqlite", due) == 0
        && count(data, "queue.sqlite", "SELECT count(*) FROM messages") == 0
        && count(data, "webhooks.sqlite", "SELECT count(*) FROM messages") == 0
        && count(data, "jobs.sqlite", "SELECT count(*) FROM changes") == 0
}

/// Whose time passes in [`hurry`].
#[derive(Debug, Clone, Copy)]
pub enum Whose {
    /// Leases run out; what waits unclaimed waits on.
    Leased,
    /// Everything that is open is due.
    Open,
    /// As `Open`, but uploads may still be submitted.
    Jobs,
}

/// How many ends of jobs their receiver has refused.
pub fn refused_deliveries(data: &Path) -> usize {
    let sql = "SELECT count(*) FROM jobs WHERE json_extract(record, '$.callback.delivery.tries') > 0";
    count(data, "jobs.sqlite", sql)
}

/// As if all tries but the last had been made, and the last were due.
pub fn leave_one_try(data: &Path) {
    let sql = format!(
        "UPDATE jobs SET record = json_replace(record, '$.callback.delivery.tries', {})",
        webhook::MAX_TRIES - 1
    );
    assert_eq!(connect(data, "jobs.sqlite").execute(&sql, []).unwrap(), JOBS);
    hurry(data, Whose::Open);
}

/// Has the ends of all jobs told at another address.
pub fn call_back(data: &Path, url: &str) {
    let sql = "UPDATE jobs SET record = json_replace(record, '$.callback.url', ?1)";
    assert_eq!(connect(data, "jobs.sqlite").execute(sql, [url]).unwrap(), JOBS);
}

/// As if days had passed in which nobody tried: the messages are lost.
pub fn overdue_deliveries(data: &Path) {
    let past = (Utc::now() - TimeDelta::hours(1)).to_rfc3339_opts(SecondsFormat::Millis, true);
    let sql = "UPDATE jobs SET record = json_replace(record, '$.callback.delivery.until', ?1)";
    assert_eq!(connect(data, "jobs.sqlite").execute(sql, [past]).unwrap(), JOBS);
    assert_eq!(connect(data, "webhooks.sqlite").execute("DELETE FROM messages", []).unwrap(), JOBS);
}

/// Makes dead letters of the queue's messages.
pub fn bury_messages(data: &Path) {
    let queue = connect(data, "queue.sqlite");
    let sql = "INSERT INTO dead_letters SELECT id, body, receive_count, sent_at, visible_at FROM messages";
    assert_eq!(queue.execute(sql, []).unwrap(), JOBS);
    queue.execute("DELETE FROM messages", []).unwrap();
}

/// Lets an hour pass in the records and the queue of a folder whose host is gone.
pub fn hurry(data: &Path, whose: Whose) {
    let past = Utc::now() - TimeDelta::hours(1);
    let text = past.to_rfc3339_opts(SecondsFormat::Millis, true);
    let condition = match whose {
        Whose::Leased => "due_at IS NOT NULL AND json_extract(record, '$.lease_until') IS NOT NULL",
        Whose::Open => "due_at IS NOT NULL",
        Whose::Jobs => "due_at IS NOT NULL AND status IS NOT NULL",
    };
    let lease = "CASE WHEN json_extract(record, '$.lease_until') IS NOT NULL THEN '$.lease_until' ELSE '$.due_at' END";
    let sql = format!(
        "UPDATE jobs SET due_at = {}, record = json_replace(record, '$.due_at', '{text}', {lease}, '{text}',
                '$.callback.delivery.not_before', '{text}')
            WHERE {condition}",
        past.timestamp_millis()
    );
    connect(data, "jobs.sqlite").execute(&sql, []).unwrap();
    let sql = format!("UPDATE messages SET visible_at = min(visible_at, {})", past.timestamp_millis());
    for file in ["queue.sqlite", "webhooks.sqlite"] {
        connect(data, file).execute(&sql, []).unwrap();
    }
}

/// Takes every message out of the queue.
pub fn lose_messages(data: &Path) {
    connect(data, "queue.sqlite").execute("DELETE FROM messages", []).unwrap();
}

/// The folder's jobs.
pub async fn jobs(data: &Path) -> Vec<Job> {
    let store = SqliteJobStore::open(&data.join("jobs.sqlite")).unwrap();
    store.list("local", None, 10_000).await.unwrap().records
}

/// State and claims of every job at one moment.
pub async fn standing(data: &Path) -> BTreeMap<Uuid, (Status, Attempts)> {
    jobs(data).await.into_iter().map(|job| (job.id, (job.status, job.attempts))).collect()
}

/// What must be true of a folder whose host is gone: these jobs and no others, each completed once
/// and described once; nothing open, queued, dead or due; as many photos as jobs. Returns the jobs.
pub async fn ended_once(data: &Path, ids: impl IntoIterator<Item = Uuid>, what: &str) -> Vec<Job> {
    let store = SqliteJobStore::open(&data.join("jobs.sqlite")).unwrap();
    let clock = Clock::manual(Utc::now() + TimeDelta::hours(2));
    let queue = SqliteJobQueue::open(&data.join("queue.sqlite"), clock.clone(), 100).unwrap();
    let blobs = DirBlobStore::open(&data.join("blobs"), b"secret").unwrap();
    let sweep = Sweep::new(store.clone(), [queue.clone(), queue.clone()], blobs.clone(), clock, Policy::default());
    // Two hours later: orphans and uploads that nobody submitted go, nothing else is due.
    let report = sweep.handle(EventBridgeEvent::default()).await.unwrap();
    let others = sweep::Report { orphans: 0, uploads: 0, ..report };
    assert_eq!(others, sweep::Report::default(), "{what}: something was due");
    assert_eq!(queue.depth().await.unwrap(), (0, 0), "{what}: messages and dead letters");
    let given_up = count(data, "webhooks.sqlite", "SELECT count(*) FROM dead_letters");
    assert_eq!(given_up, 0, "{what}: dead letters of webhooks");
    assert_eq!(count(data, "jobs.sqlite", "SELECT count(*) FROM usage"), 0, "{what}: nothing is counted as queued");
    for caller in blobs.list("incoming/", None, 100).await.unwrap() {
        let left = blobs.list(&format!("incoming/{caller}/"), None, 10).await.unwrap();
        assert_eq!(left, [] as [&str; 0], "{what}: what was uploaded is erased");
    }

    let jobs = store.list("local", None, 10_000).await.unwrap().records;
    let mut expected: Vec<_> = ids.into_iter().map(|id| id.to_string()).collect();
    expected.sort();
    let mut found: Vec<_> = jobs.iter().map(|job| job.id.to_string()).collect();
    found.sort();
    assert_eq!(found, expected, "{what}: jobs");
    assert_eq!(blobs.list("jobs/", None, 10_000).await.unwrap(), expected, "{what}: photos");
    assert!(photos(data).iter().all(|photo| photo.is_file()), "{what}: photos");
    for job in &jobs {
        assert_eq!(job.status, Status::Completed, "{what}: {}", job.id);
        let done =
            if job.is_prompt() { job.answer.is_some() } else { job.description.is_some() && job.reading.is_some() };
        assert!(done, "{what}: {}", job.id);
        let open = (job.due_at, job.lease_until, job.dispatch);
        assert_eq!(open, (None, None, None), "{what}: {}", job.id);
        // Every claim is one attempt of one stage, and one answer at most was committed.
        let claims = u64::from(job.attempts.inference + job.attempts.enrichment);
        assert_eq!(job.claim, claims, "{what}: {}", job.id);
        assert!(job.llm_calls.iter().filter(|call| call.outcome == "ok").count() <= 1, "{what}: {}", job.id);
        // Where an LLM was asked at all, each claim's call is in the ledger.
        let asked = if job.llm_calls.is_empty() { 0 } else { job.attempts.enrichment as usize };
        assert_eq!(job.llm_calls.len(), asked, "{what}: {}: {:?}", job.id, job.llm_calls);
    }
    jobs
}
