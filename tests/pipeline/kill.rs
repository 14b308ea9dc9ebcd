//! The process is killed (SIGKILL) between any two writes of a handler, started again, and every
//! job must end exactly once, with nothing left behind.
//!
//! `Point::ALL` is the list; the first test fails where a point is in no scenario.

mod admin;
mod erasing;
mod photos;
mod prompts;
mod webhooks;

use std::path::{Path, PathBuf};

use chrono::{TimeDelta, Utc};
use reqwest::Client;
use shared::clock::Clock;
use shared::crash::Point;
use shared::job::Status;
use shared::ports::{BlobStore, JobStore};
use tempfile::TempDir;

use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::Process;
use crate::support::{client, ended, eventually, mole, open, submit};

pub(super) const SUBMIT: &[Point] =
    &[Point::BlobWritten, Point::SubmitPhotoStored, Point::SubmitRecordWritten, Point::SubmitMessageSent];
pub(super) const UPLOAD: &[Point] = &[
    Point::SubmitUploadReserved,
    Point::BlobWritten,
    Point::SubmitPhotoStored,
    Point::SubmitRecordWritten,
    Point::SubmitMessageSent,
    Point::SubmitOriginalErased,
];
pub(super) const INFERENCE: &[Point] = &[
    Point::QueueReceived,
    Point::InferenceClaimed,
    Point::InferenceFinished,
    Point::InferenceCached,
    Point::QueueBeforeAck,
];
/// Where the network draws maps.
pub(super) const INFERENCE_MAP: &[Point] = &[Point::InferenceMapStored];
pub(super) const INFERENCE_RETRY: &[Point] = &[Point::InferenceReleased, Point::InferenceHidden];
pub(super) const ENRICHMENT: &[Point] =
    &[Point::EnrichmentClaimed, Point::EnrichmentAnswered, Point::EnrichmentFinished, Point::FeedBeforeRemoval];
/// Where the template describes what was read for an LLM.
pub(super) const ENRICHMENT_OFFLINE: &[Point] = &[Point::EnrichmentFinished];
pub(super) const ENRICHMENT_RETRY: &[Point] = &[Point::EnrichmentDeferred];
pub(super) const SUBMIT_PROMPT: &[Point] = &[Point::BlobWritten, Point::SubmitPromptStored, Point::SubmitRecordWritten];
pub(super) const PROMPT: &[Point] = &[
    Point::EnrichmentClaimed,
    Point::EnrichmentAnswered,
    Point::EnrichmentAnswerStored,
    Point::EnrichmentFinished,
    Point::FeedBeforeRemoval,
];
pub(super) const RESULT: &[Point] = &[
    Point::ResultTombstoned,
    Point::ResultBlobsErased,
    Point::ResultForgetSent,
    Point::QueueReceived,
    Point::InferenceForgotten,
    Point::QueueBeforeAck,
];
pub(super) const SWEEP: &[Point] = &[Point::SweepWritten, Point::SweepSent];
pub(super) const SWEEP_TOMBSTONE: &[Point] =
    &[Point::SweepErased, Point::SweepTombstoneSettled, Point::SweepForgetSent];
pub(super) const SWEEP_UPLOAD: &[Point] = &[Point::SweepUploadErased, Point::SweepUploadSettled];
pub(super) const SWEEP_ORPHAN: &[Point] = &[Point::SweepOrphanErased];
/// Of a folder that nobody has used before.
pub(super) const FIRST: &[Point] = &[Point::StartSecretWritten, Point::BlobWritten, Point::InitKeyWritten];
/// Deletes of what has expired.
pub(super) const HOUSEKEEPING: &[Point] = &[Point::HousekeepingRecordsRemoved, Point::HousekeepingPhotosRemoved];
pub(super) const START: &[Point] = &[Point::StartLeaseEnded, Point::StartPhotosShown, Point::StartMessagesShown];
pub(super) const ADMIN_KEYS: &[Point] = &[Point::AdminKeyWritten, Point::AdminKeyRevoked];
pub(super) const ADMIN_JOB: &[Point] = &[Point::AdminJobRedriven, Point::AdminMessageSent];
/// Between the letters of photos and those of webhooks, which lie in queues of their own, and behind both.
pub(super) const ADMIN_DEAD_LETTERS: &[Point] = &[Point::AdminPhotoLettersMoved, Point::AdminDeadLettersMoved];
pub(super) const CHAT: &[Point] = &[Point::ChatReserved, Point::ChatSettled];
/// Around an `ask` over a WebSocket, from the ticket to the connection's end.
pub(super) const SOCKET: &[Point] = &[
    Point::SocketTicketWritten,
    Point::SocketTicketTaken,
    Point::SocketOpened,
    Point::SubmitPromptStored,
    Point::SubmitRecordWritten,
    Point::SocketSubscribed,
    Point::SocketAnswered,
    Point::NotifyPushed,
    Point::EnrichmentTextPushed,
    Point::SocketClosed,
];
/// From the end of a job to its receiver.
pub(super) const WEBHOOK: &[Point] = &[Point::NotifyQueued, Point::WebhookAnswered, Point::WebhookSettled];
/// Where the receiver does not take it.
pub(super) const WEBHOOK_RETRY: &[Point] = &[Point::WebhookPostponed, Point::WebhookHidden];
/// By the last try.
pub(super) const WEBHOOK_LAST: &[Point] =
    &[Point::QueueReceived, Point::WebhookBuried, Point::WebhookGivenUp, Point::QueueBeforeAck];
/// What is no message.
pub(super) const WEBHOOK_UNREADABLE: &[Point] = &[Point::WebhookUnreadableBuried];
/// By sweep, days later, where no try was left.
pub(super) const WEBHOOK_SWEPT: &[Point] = &[Point::SweepBuried];
/// Between two requests to SQS, where an embedded queue has one transaction, and before a queue where there is a feed:
/// `tests/aws/kill.rs`. Who is gone here is forgotten in one step.
pub(super) const AWS_ALONE: &[Point] =
    &[Point::AdminLettersReceived, Point::AdminLetterSent, Point::EnrichmentQueued, Point::NotifyClosed];

#[test]
fn every_crash_point_is_in_a_scenario() {
    let scenarios = [
        SUBMIT,
        UPLOAD,
        INFERENCE,
        INFERENCE_MAP,
        INFERENCE_RETRY,
        ENRICHMENT,
        ENRICHMENT_OFFLINE,
        ENRICHMENT_RETRY,
        SUBMIT_PROMPT,
        PROMPT,
        RESULT,
        SWEEP,
        SWEEP_TOMBSTONE,
        SWEEP_UPLOAD,
        SWEEP_ORPHAN,
        HOUSEKEEPING,
        FIRST,
        START,
        ADMIN_KEYS,
        ADMIN_JOB,
        ADMIN_DEAD_LETTERS,
        CHAT,
        SOCKET,
        WEBHOOK,
        WEBHOOK_RETRY,
        WEBHOOK_LAST,
        WEBHOOK_UNREADABLE,
        WEBHOOK_SWEPT,
        AWS_ALONE,
    ];
    let mut tested: Vec<_> = scenarios.concat().iter().map(|point| point.name()).collect();
    let mut all: Vec<_> = Point::ALL.iter().map(|point| point.name()).collect();
    tested.sort_unstable();
    tested.dedup();
    all.sort_unstable();
    assert_eq!(tested, all);
    println!("{} crash points", all.len());
}

/// One data folder with its LLM, and the processes that come and go on it.
struct Scene {
    folder: TempDir,
    http: Client,
    llm: LlmServer,
    /// The shipped one where there is none.
    model: Option<PathBuf>,
}

impl Scene {
    async fn new(script: impl IntoIterator<Item = Behaviour>) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), http: client(), llm: LlmServer::start(script).await, model: None }
    }

    fn with_model(self, folder: &Path) -> Self {
        Self { model: Some(folder.to_owned()), ..self }
    }

    async fn start(&self, crash_at: Option<Point>) -> Process {
        self.start_with(crash_at, &[]).await.expect("the host died before it listened")
    }

    async fn start_with(&self, crash_at: Option<Point>, times: &[(&str, &str)]) -> Option<Process> {
        let base_url = self.llm.base_url();
        let mut extra = vec![("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")];
        extra.extend(self.model.as_ref().map(|folder| ("MODEL_DIR", folder.to_str().unwrap())));
        extra.extend(crash_at.map(|point| ("CRASH_AT", point.name())));
        extra.extend(times);
        Process::start(self.folder.path(), &extra).await
    }

    fn data(&self) -> &Path {
        self.folder.path()
    }

    async fn submit(&self, host: &Process, key: &str) -> reqwest::Result<String> {
        submit(&self.http, &host.url, &mole(), Some(key)).await
    }

    async fn ask(&self, host: &Process, key: &str) -> reqwest::Result<String> {
        ask(&self.http, &host.url, key).await
    }

    /// A job that has ended, and whose host is gone.
    async fn one_that_ended(&self) -> String {
        let host = self.start(None).await;
        let id = self.submit(&host, "key").await.unwrap();
        ended(&self.http, &host.url, &id).await;
        host.kill().await;
        id
    }

    /// As [`Scene::recover`], with a prompt whose answer is too large for the record.
    async fn recover_prompt(&self, key: &str, point: Point) {
        let host = self.start(None).await;
        let id = self.ask(&host, key).await.unwrap();
        let result = ended(&self.http, &host.url, &id).await;
        assert_eq!(result["status"], "completed", "{}: {}", point.name(), result["error"]);
        assert!(result["content"] == long_answer(), "{}: not the answer", point.name());
        self.settled(host, &[id], point).await;
    }

    /// Starts a host that stays up, submits again under the same key as an app would, waits for
    /// the end, and looks at what is left.
    async fn recover(&self, key: &str, point: Point) {
        let host = self.start(None).await;
        let id = self.submit(&host, key).await.unwrap();
        let result = ended(&self.http, &host.url, &id).await;
        assert_eq!(result["status"], "completed", "{}: {result}", point.name());
        assert!(result["description"]["text"].is_string(), "{}: {result}", point.name());
        self.settled(host, &[id], point).await;
    }

    /// Nothing is open, queued, dead or left over; the listed jobs are all there are.
    async fn settled(&self, host: Process, ids: &[String], point: Point) {
        // Messages that lost their purpose are acknowledged when they are next seen.
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        eventually(&format!("{}: queue and feed run empty", point.name()), async || {
            ["queue.sqlite", "webhooks.sqlite"].iter().all(|file| {
                let queue = rusqlite::Connection::open(self.data().join(file)).unwrap();
                queue.query_row("SELECT count(*) FROM messages", [], |row| row.get::<_, u32>(0)).unwrap() == 0
            })
        })
        .await;
        host.kill().await;
        let clock = Clock::manual(Utc::now() + TimeDelta::hours(2));
        let host = open(self.data(), clock, &[]).await;
        // Two hours later: orphans go, nothing else is due.
        let report =
            host.sweep.handle(aws_lambda_events::event::eventbridge::EventBridgeEvent::default()).await.unwrap();
        assert_eq!(
            (report.sent, report.marked, report.ended, report.undelivered, report.failed),
            (0, 0, 0, 0, 0),
            "{}: {report:?}",
            point.name()
        );
        let jobs = host.store.list("local", None, 100).await.unwrap().records;
        let mut found: Vec<_> = jobs.iter().map(|job| job.id.to_string()).collect();
        found.sort();
        assert_eq!(found, ids, "{}", point.name());
        assert!(jobs.iter().all(|job| job.status == Status::Completed), "{}", point.name());
        let blobs = host.blobs.list("jobs/", None, 100).await.unwrap();
        assert_eq!(blobs, ids, "{}: photos and jobs must match", point.name());
        for caller in host.blobs.list("incoming/", None, 100).await.unwrap() {
            let left = host.blobs.list(&format!("incoming/{caller}/"), None, 100).await.unwrap();
            assert_eq!(left, [] as [&str; 0], "{}: what was uploaded is erased", point.name());
        }
        let jobs = rusqlite::Connection::open(self.data().join("jobs.sqlite")).unwrap();
        let queued = jobs.query_row("SELECT count(*) FROM usage", [], |row| row.get::<_, u32>(0)).unwrap();
        assert_eq!(queued, 0, "{}: nothing is counted as queued", point.name());
        assert_eq!(host.queue.depth().await.unwrap(), (0, 0), "{}", point.name());
        assert_eq!(host.webhooks.depth().await.unwrap(), (0, 0), "{}", point.name());
    }
}

/// Submits a prompt and returns its id; an error where the host is gone.
pub(super) async fn ask(http: &Client, url: &str, key: &str) -> reqwest::Result<String> {
    let request = http.post(format!("{url}/submit")).header("idempotency-key", key);
    let response = request.json(&serde_json::json!({"prompt": format!("What is a naevus? ({key})")})).send().await?;
    let (status, body) = (response.status(), response.json::<serde_json::Value>().await?);
    assert_eq!(status.as_u16(), 202, "{body}");
    Ok(body["request_id"].as_str().unwrap().to_owned())
}

/// Too large for a record.
pub(super) fn long_answer() -> String {
    "A growth of pigment cells. ".repeat(10_000)
}

/// Makes everything that waits due now.
fn hurry(data: &Path) {
    let jobs = rusqlite::Connection::open(data.join("jobs.sqlite")).unwrap();
    let past = Utc::now() - TimeDelta::hours(1);
    let record =
        format!("json_set(record, '$.due_at', '{}')", past.to_rfc3339_opts(chrono::SecondsFormat::Millis, true));
    let sql =
        format!("UPDATE jobs SET due_at = {}, record = {record} WHERE due_at IS NOT NULL", past.timestamp_millis());
    assert_eq!(jobs.execute(&sql, []).unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_the_host_with_success() {
    let scene = Scene::new([]).await;
    let host = scene.start(None).await;
    let id = scene.submit(&host, "key").await.unwrap();
    assert!(host.terminate().await.success());
    let host = scene.start(None).await;
    assert_eq!(ended(&scene.http, &host.url, &id).await["status"], "completed");
}
