//! The process is killed (SIGKILL) between any two writes of a handler, started again, and every
//! job must end exactly once, with nothing left behind.
//!
//! `Point::ALL` is the list; the first test fails where a point is in no scenario.

use std::path::{Path, PathBuf};

use chrono::{TimeDelta, Utc};
use reqwest::Client;
use shared::api::admin::KeyLimits;
use shared::clock::Clock;
use shared::crash::Point;
use shared::embedded::{SqliteCallers, SqliteJobStore};
use shared::job::{Record, Status, photo_key};
use shared::ports::{BlobStore, Callers, JobStore};
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::network::Network;
use crate::support::process::Process;
use crate::support::receiver::Receiver;
use crate::support::websocket::{Told, open as open_socket, ticket};
use crate::support::{client, ended, eventually, mole, open, submit};
use crate::uploads;
use crate::webhooks::{submit_told, variables};

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
pub(super) const INFERENCE: &[Point] =
    &[Point::InferenceClaimed, Point::InferenceFinished, Point::InferenceCached, Point::QueueBeforeAck];
/// Where the network draws maps.
pub(super) const INFERENCE_MAP: &[Point] = &[Point::InferenceMapStored];
pub(super) const INFERENCE_RETRY: &[Point] = &[Point::InferenceReleased, Point::InferenceHidden];
pub(super) const ENRICHMENT: &[Point] =
    &[Point::EnrichmentClaimed, Point::EnrichmentAnswered, Point::EnrichmentFinished, Point::FeedBeforeCursor];
pub(super) const ENRICHMENT_RETRY: &[Point] = &[Point::EnrichmentDeferred];
pub(super) const SUBMIT_PROMPT: &[Point] = &[Point::BlobWritten, Point::SubmitPromptStored, Point::SubmitRecordWritten];
pub(super) const PROMPT: &[Point] = &[
    Point::EnrichmentClaimed,
    Point::EnrichmentAnswered,
    Point::EnrichmentAnswerStored,
    Point::EnrichmentFinished,
    Point::FeedBeforeCursor,
];
pub(super) const RESULT: &[Point] =
    &[Point::ResultTombstoned, Point::ResultBlobsErased, Point::ResultForgetSent, Point::InferenceForgotten];
pub(super) const SWEEP: &[Point] = &[Point::SweepWritten, Point::SweepSent];
pub(super) const SWEEP_TOMBSTONE: &[Point] =
    &[Point::SweepErased, Point::SweepTombstoneSettled, Point::SweepForgetSent];
pub(super) const SWEEP_UPLOAD: &[Point] = &[Point::SweepUploadErased, Point::SweepUploadSettled];
pub(super) const SWEEP_ORPHAN: &[Point] = &[Point::SweepOrphanErased];
pub(super) const START: &[Point] = &[Point::StartLeaseEnded, Point::StartMessagesShown];
pub(super) const ADMIN_KEYS: &[Point] = &[Point::AdminKeyWritten, Point::AdminKeyRevoked];
pub(super) const ADMIN_JOB: &[Point] = &[Point::AdminJobRedriven, Point::AdminMessageSent];
pub(super) const ADMIN_DEAD_LETTERS: &[Point] = &[Point::AdminDeadLettersMoved];
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
pub(super) const WEBHOOK_LAST: &[Point] = &[Point::WebhookBuried, Point::WebhookGivenUp];
/// By sweep, days later, where no try was left.
pub(super) const WEBHOOK_SWEPT: &[Point] = &[Point::SweepBuried];
/// Between two requests to SQS, where the embedded queue has one transaction: `tests/aws/kill.rs`. Who is gone
/// here is forgotten in one step.
pub(super) const AWS_ALONE: &[Point] = &[Point::AdminLettersReceived, Point::AdminLetterSent, Point::NotifyClosed];

#[test]
fn every_crash_point_is_in_a_scenario() {
    let scenarios = [
        SUBMIT,
        UPLOAD,
        INFERENCE,
        INFERENCE_MAP,
        INFERENCE_RETRY,
        ENRICHMENT,
        ENRICHMENT_RETRY,
        SUBMIT_PROMPT,
        PROMPT,
        RESULT,
        SWEEP,
        SWEEP_TOMBSTONE,
        SWEEP_UPLOAD,
        SWEEP_ORPHAN,
        START,
        ADMIN_KEYS,
        ADMIN_JOB,
        ADMIN_DEAD_LETTERS,
        CHAT,
        SOCKET,
        WEBHOOK,
        WEBHOOK_RETRY,
        WEBHOOK_LAST,
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
        let jobs = host.store.list("local", None, 100).await.unwrap();
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
    let response = request.json(&serde_json::json!({"prompt": "What is a naevus?"})).send().await?;
    let (status, body) = (response.status(), response.json::<serde_json::Value>().await?);
    assert_eq!(status.as_u16(), 202, "{body}");
    Ok(body["request_id"].as_str().unwrap().to_owned())
}

/// Too large for a record.
pub(super) fn long_answer() -> String {
    "A growth of pigment cells. ".repeat(10_000)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_a_prompt_loses_and_doubles_nothing() {
    for &point in SUBMIT_PROMPT {
        let scene = Scene::new([]).await;
        scene.llm.behave(Behaviour::Answer(long_answer()));
        scene.start(None).await.kill().await;
        let mut host = scene.start(Some(point)).await;
        assert!(scene.ask(&host, "key").await.is_err(), "{}: the answer came before the kill", point.name());
        host.killed().await;
        scene.recover_prompt("key", point).await;
        assert_eq!(scene.llm.calls(), 1, "{}", point.name());
    }
    // The second blob after the first start's is the answer.
    let second_blob = (Point::BlobWritten, "blobs.written_before_rename:2");
    for (point, crash_at) in PROMPT.iter().map(|point| (*point, point.name())).chain([second_blob]) {
        let scene = Scene::new([]).await;
        scene.llm.behave(Behaviour::Answer(long_answer()));
        scene.start(None).await.kill().await;
        let mut host = scene.start_with(None, &[("CRASH_AT", crash_at)]).await.unwrap();
        let _ = scene.ask(&host, "key").await;
        host.killed().await;
        scene.recover_prompt("key", point).await;
        // Only an answer whose commit was cut off is asked for again.
        let again = [Point::EnrichmentAnswered, Point::EnrichmentAnswerStored, Point::BlobWritten].contains(&point);
        assert_eq!(scene.llm.calls(), if again { 2 } else { 1 }, "{}", point.name());
    }
    for &point in ENRICHMENT_RETRY {
        let scene = Scene::new([const { Behaviour::Status(503, Some(700)) }]).await;
        scene.llm.behave(Behaviour::Answer(long_answer()));
        let mut host = scene.start(Some(point)).await;
        let _ = scene.ask(&host, "key").await;
        host.killed().await;
        // The server's 700 s are up in the record, not in this test.
        hurry(scene.data());
        scene.recover_prompt("key", point).await;
        assert_eq!(scene.llm.calls(), 2, "{}", point.name());
    }
    println!("prompts: killed at {} points", SUBMIT_PROMPT.len() + PROMPT.len() + 1 + ENRICHMENT_RETRY.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_submit_loses_and_doubles_nothing() {
    for &point in SUBMIT {
        let scene = Scene::new([]).await;
        // The first start of all writes the model bundle into the blob store.
        scene.start(None).await.kill().await;
        let mut host = scene.start(Some(point)).await;
        assert!(scene.submit(&host, "key").await.is_err(), "{}: the answer came before the kill", point.name());
        host.killed().await;
        scene.recover("key", point).await;
        assert_eq!(scene.llm.calls(), 1, "{}", point.name());
    }
    println!("submit: killed at {} points", SUBMIT.len());
}

/// Uploads and submits as an app does: whatever step fails is begun again.
async fn upload_and_submit(scene: &Scene, host: &Process, known: &mut Option<String>) -> reqwest::Result<String> {
    let photo = mole();
    let image_key = match known {
        Some(image_key) => image_key.clone(),
        None => {
            let permit = uploads::permit(&scene.http, &host.url, &photo).await?;
            assert_eq!(uploads::put(&scene.http, &host.url, &permit, &photo).await?.status().as_u16(), 200);
            known.insert(permit["image_key"].as_str().unwrap().to_owned()).clone()
        }
    };
    let response = uploads::submit_key(&scene.http, &host.url, &image_key).await?;
    assert_eq!(response.status().as_u16(), 202);
    let body: serde_json::Value = response.json().await?;
    Ok(body["request_id"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_an_upload_loses_and_doubles_nothing() {
    for &point in UPLOAD {
        let scene = Scene::new([]).await;
        scene.start(None).await.kill().await;
        let mut host = scene.start(Some(point)).await;
        let mut image_key = None;
        assert!(upload_and_submit(&scene, &host, &mut image_key).await.is_err(), "{}", point.name());
        host.killed().await;
        let host = scene.start(None).await;
        let id = upload_and_submit(&scene, &host, &mut image_key).await.unwrap();
        assert_eq!(ended(&scene.http, &host.url, &id).await["status"], "completed", "{}", point.name());
        scene.settled(host, &[id], point).await;
    }
    for &point in SWEEP_UPLOAD {
        let scene = Scene::new([]).await;
        let host = scene.start(None).await;
        let photo = mole();
        let permit = uploads::permit(&scene.http, &host.url, &photo).await.unwrap();
        assert_eq!(uploads::put(&scene.http, &host.url, &permit, &photo).await.unwrap().status().as_u16(), 200);
        host.kill().await;
        hurry(scene.data());
        // Sweep meets it at once; the host may be dead before it listens.
        if let Some(mut host) = Process::start(scene.data(), &[("CRASH_AT", point.name())]).await {
            host.killed().await;
        }
        scene.recover("key", point).await;
    }
    println!("uploads: killed at {} points", UPLOAD.len() + SWEEP_UPLOAD.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_inference_loses_and_doubles_nothing() {
    for &point in INFERENCE {
        let scene = Scene::new([]).await;
        let mut host = scene.start(Some(point)).await;
        // The host may be dead before it has answered: the key makes the second try the same job.
        let _ = scene.submit(&host, "key").await;
        host.killed().await;
        scene.recover("key", point).await;
        // Once the record is written enrichment works beside, and its answer may be killed as well.
        let calls = if point == Point::InferenceClaimed { 1..=1 } else { 1..=2 };
        assert!(calls.contains(&scene.llm.calls()), "{}: {} calls", point.name(), scene.llm.calls());
    }
    let model = tempfile::tempdir().unwrap();
    Network::default().write(model.path());
    for &point in INFERENCE_MAP {
        let scene = Scene::new([]).await.with_model(model.path());
        let mut host = scene.start(Some(point)).await;
        let _ = scene.submit(&host, "key").await;
        host.killed().await;
        let left = std::fs::read_dir(only_photo(scene.data()).await.parent().unwrap()).unwrap();
        assert_eq!(left.count(), 2, "the map lies beside the photo, and no record names it");
        let host = scene.start(None).await;
        let id = scene.submit(&host, "key").await.unwrap();
        let result = ended(&scene.http, &host.url, &id).await;
        let url = format!("{}{}", host.url, result["map"]["url"].as_str().unwrap());
        assert_eq!(scene.http.get(url).send().await.unwrap().status().as_u16(), 200);
        let left = std::fs::read_dir(only_photo(scene.data()).await.parent().unwrap()).unwrap();
        assert_eq!(left.count(), 2, "it was written again under the same key");
        scene.settled(host, &[id], point).await;
        assert_eq!(scene.llm.calls(), 1);
    }
    for &point in INFERENCE_RETRY {
        let scene = Scene::new([]).await;
        let mut host = scene.start(Some(Point::SubmitRecordWritten)).await;
        assert!(scene.submit(&host, "key").await.is_err());
        host.killed().await;
        let photo = only_photo(scene.data()).await;
        let away = scene.data().join("away");
        std::fs::rename(&photo, &away).unwrap();
        std::fs::create_dir(&photo).unwrap();
        scene.start(Some(point)).await.killed().await;
        std::fs::remove_dir(&photo).unwrap();
        std::fs::rename(&away, &photo).unwrap();
        scene.recover("key", point).await;
    }
    println!("inference: killed at {} points", INFERENCE.len() + INFERENCE_MAP.len() + INFERENCE_RETRY.len());
}

/// Leases and waits of an hour, so that nothing is taken up because its time is over.
const AN_HOUR: [(&str, &str); 3] =
    [("LEASE_SECONDS", "900"), ("REDISPATCH_SECONDS", "3600"), ("BACKOFF_SECONDS", "3600")];

#[tokio::test(flavor = "multi_thread")]
async fn what_a_kill_cut_off_is_taken_up_at_the_next_start_and_not_when_its_lease_runs_out() {
    let cut_off = [Point::InferenceClaimed, Point::EnrichmentClaimed];
    for (point, at_start) in cut_off.into_iter().flat_map(|point| {
        std::iter::once((point, None)).chain(START.iter().map(move |at_start| (point, Some(*at_start))))
    }) {
        let scene = Scene::new([]).await;
        let mut host = scene.start_with(Some(point), &AN_HOUR).await.expect("the host died before it listened");
        let _ = scene.submit(&host, "key").await;
        host.killed().await;
        if let Some(at_start) = at_start
            && let Some(mut host) = scene.start_with(Some(at_start), &AN_HOUR).await
        {
            host.killed().await;
        }
        let host = scene.start_with(None, &AN_HOUR).await.unwrap();
        let id = scene.submit(&host, "key").await.unwrap();
        assert_eq!(ended(&scene.http, &host.url, &id).await["status"], "completed", "{}", point.name());
        let store = SqliteJobStore::open(&scene.data().join("jobs.sqlite")).unwrap();
        let Some(Record::Job(job)) = store.get(id.parse().unwrap()).await.unwrap() else { panic!() };
        let attempts = (job.attempts.inference, job.attempts.enrichment);
        let expected = if point == Point::InferenceClaimed { (2, 1) } else { (1, 2) };
        assert_eq!(attempts, expected, "{}: what was cut off counts, once", point.name());
        scene.settled(host, &[id], point).await;
        assert_eq!(scene.llm.calls(), 1, "{}", point.name());
    }
}

/// Opens a WebSocket, asks under a key, and reads to the end; `None` where the host is gone before.
async fn ask_over_socket(http: &Client, url: &str, key: &str) -> Option<(Told, serde_json::Value)> {
    let ticket = ticket(http, url, "").await.ok()?;
    let mut socket = open_socket(url, ticket["url"].as_str()?, &[]).await.ok()?;
    socket.send(serde_json::json!({"action": "ask", "prompt": "What is a naevus?", "idempotency_key": key})).await;
    let mut told = Told::default();
    loop {
        let frame = socket.next().await?;
        match frame["type"].as_str()? {
            "text" => told.add(&frame),
            "accepted" | "status" => {}
            _ => return Some((told, frame)),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_steps_of_a_websocket_loses_and_doubles_nothing() {
    const ANSWER: &str = "A growth of pigment cells.";
    for &point in SOCKET {
        let scene = Scene::new([]).await;
        scene.llm.behave(Behaviour::Answer(ANSWER.into()));
        let mut host = scene.start(Some(point)).await;
        // The end of the connection may come before or after the kill.
        let _ = ask_over_socket(&scene.http, &host.url, "key").await;
        host.killed().await;
        // A client comes again, and asks again under its key.
        let host = scene.start(None).await;
        let (_, frame) = ask_over_socket(&scene.http, &host.url, "key").await.unwrap();
        let shown = (&frame["type"], &frame["result"]["content"]);
        assert_eq!(shown, (&serde_json::json!("result"), &serde_json::json!(ANSWER)), "{}: {frame}", point.name());
        let id = frame["request_id"].as_str().unwrap().to_owned();
        // From the record on enrichment works beside, and its answer may be cut off.
        let before =
            [Point::SocketTicketWritten, Point::SocketTicketTaken, Point::SocketOpened, Point::SubmitPromptStored];
        let again = if before.contains(&point) { 1..=1 } else { 1..=2 };
        assert!(again.contains(&scene.llm.calls()), "{}: {} calls", point.name(), scene.llm.calls());
        scene.settled(host, &[id], point).await;
    }
    println!("sockets: killed at {} points", SOCKET.len());
}

/// Whether the end of the one job was told, and its record says so.
fn is_delivered(data: &Path) -> bool {
    let jobs = rusqlite::Connection::open(data.join("jobs.sqlite")).unwrap();
    let sql = "SELECT json_extract(record, '$.callback.delivery.outcome') FROM jobs";
    jobs.query_row(sql, [], |row| row.get::<_, Option<String>>(0)).unwrap().is_some_and(|it| it == "delivered")
}

/// Lets the hours pass that lie between two tries, and counts them all but the last.
fn hurry_webhook(data: &Path, tries: u32) {
    hurry(data);
    let past = Utc::now() - TimeDelta::hours(1);
    let jobs = rusqlite::Connection::open(data.join("jobs.sqlite")).unwrap();
    let text = past.to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
    let delivery = "$.callback.delivery";
    let record = format!("json_replace(record, '{delivery}.not_before', '{text}', '{delivery}.tries', {tries})");
    assert_eq!(jobs.execute(&format!("UPDATE jobs SET record = {record}"), []).unwrap(), 1);
    let queue = rusqlite::Connection::open(data.join("webhooks.sqlite")).unwrap();
    let sql = format!("UPDATE messages SET visible_at = {}", past.timestamp_millis());
    assert_eq!(queue.execute(&sql, []).unwrap(), 1, "the message was not there any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_steps_of_a_webhook_tells_the_receiver_under_one_id() {
    for &point in [WEBHOOK, WEBHOOK_RETRY, WEBHOOK_LAST].iter().copied().flatten() {
        let scene = Scene::new([]).await;
        let fails = !WEBHOOK.contains(&point);
        let receiver = Receiver::start(if fails { 503 } else { 200 }).await;
        let host = receiver.host();
        let told = variables(&host);
        let armed = [&told[..], &[("CRASH_AT", point.name())]].concat();
        let submit =
            async |host: &Process| submit_told(&scene.http, &host.url, mole(), &receiver.url(), Some("key")).await;
        let mut killed = scene.start_with(None, &armed).await.unwrap();
        let _ = submit(&killed).await;
        if WEBHOOK_LAST.contains(&point) {
            eventually("it has failed once", async || !receiver.received().is_empty()).await;
            // Behind its answer the try is written down and the message hidden.
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            killed.kill().await;
            hurry_webhook(scene.data(), webhook::MAX_TRIES - 1);
            killed = scene.start_with(None, &armed).await.unwrap();
        }
        killed.killed().await;
        let before = receiver.received().len();
        receiver.answer(200);
        let host = scene.start_with(None, &told).await.unwrap();
        let id = submit(&host).await.unwrap();
        assert_eq!(ended(&scene.http, &host.url, &id).await["status"], "completed", "{}", point.name());
        if WEBHOOK_LAST.contains(&point) {
            // What was cut off was the last try: its dead letter is there.
            let redrive = format!("{}/admin/dead-letters/redrive", host.url);
            eventually("an operator finds the dead letter", async || {
                let answer = scene.http.post(&redrive).json(&serde_json::json!({})).send().await.unwrap();
                // Two, where sweep has sent a second message meanwhile, and that one has failed as well.
                answer.json::<serde_json::Value>().await.unwrap()["redriven"].as_u64().unwrap() > 0
            })
            .await;
        }
        eventually(&format!("{}: the receiver is told", point.name()), async || is_delivered(scene.data())).await;
        let received = receiver.received();
        let first = received[0].id().to_owned();
        assert!(first.starts_with(&format!("msg_{id}_")), "{first}");
        assert!(received.iter().all(|it| it.id() == first && it.body == received[0].body), "{}", point.name());
        match point {
            // The record says that the receiver has it: it is not told again.
            Point::WebhookSettled => assert_eq!(received.len(), before, "{}", point.name()),
            // An answer that nobody has written down is as none.
            Point::WebhookAnswered => assert!(received.len() > before, "{}", point.name()),
            _ if fails => assert!(received.len() > before, "{}", point.name()),
            _ => assert!(!received.is_empty(), "{}", point.name()),
        }
        scene.settled(host, &[id], point).await;
    }
    println!("webhooks: killed at {} points", WEBHOOK.len() + WEBHOOK_RETRY.len() + WEBHOOK_LAST.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_while_sweep_gives_a_delivery_up_leaves_a_dead_letter_of_it() {
    for &point in WEBHOOK_SWEPT {
        let scene = Scene::new([]).await;
        let receiver = Receiver::start(503).await;
        let host = receiver.host();
        let told = variables(&host);
        let killed = scene.start_with(None, &told).await.unwrap();
        let id = submit_told(&scene.http, &killed.url, mole(), &receiver.url(), Some("key")).await.unwrap();
        eventually("it has failed once", async || !receiver.received().is_empty()).await;
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        killed.kill().await;
        hurry_webhook(scene.data(), 1);
        let text = (Utc::now() - TimeDelta::hours(1)).to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
        let jobs = rusqlite::Connection::open(scene.data().join("jobs.sqlite")).unwrap();
        let sql = format!("UPDATE jobs SET record = json_replace(record, '$.callback.delivery.until', '{text}')");
        assert_eq!(jobs.execute(&sql, []).unwrap(), 1);
        drop(jobs);
        // Its message was lost.
        let queue = rusqlite::Connection::open(scene.data().join("webhooks.sqlite")).unwrap();
        assert_eq!(queue.execute("DELETE FROM messages", []).unwrap(), 1);
        drop(queue);
        let armed = [&told[..], &[("CRASH_AT", point.name())]].concat();
        // Sweep meets it at once; the host may be dead before it listens.
        if let Some(mut host) = scene.start_with(None, &armed).await {
            host.killed().await;
        }
        receiver.answer(200);
        let host = scene.start_with(None, &told).await.unwrap();
        let redrive = format!("{}/admin/dead-letters/redrive", host.url);
        eventually("an operator finds the dead letter", async || {
            let answer = scene.http.post(&redrive).json(&serde_json::json!({})).send().await.unwrap();
            answer.json::<serde_json::Value>().await.unwrap()["redriven"].as_u64().unwrap() > 0
        })
        .await;
        eventually(&format!("{}: the receiver is told", point.name()), async || is_delivered(scene.data())).await;
        // The second of it, where there is one, does nothing.
        scene.http.post(&redrive).json(&serde_json::json!({})).send().await.unwrap();
        scene.settled(host, &[id], point).await;
    }
    println!("given up by sweep: killed at {} points", WEBHOOK_SWEPT.len());
}

async fn only_photo(data: &Path) -> std::path::PathBuf {
    let entry = std::fs::read_dir(data.join("blobs/jobs")).unwrap().next().unwrap().unwrap();
    entry.path().join("photo")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_enrichment_loses_and_doubles_nothing() {
    for &point in ENRICHMENT {
        let scene = Scene::new([]).await;
        let mut host = scene.start(Some(point)).await;
        let _ = scene.submit(&host, "key").await;
        host.killed().await;
        scene.recover("key", point).await;
        // Only an answer whose commit was cut off is asked for again.
        let expected = if point == Point::EnrichmentAnswered { 2 } else { 1 };
        assert_eq!(scene.llm.calls(), expected, "{}", point.name());
    }
    for &point in ENRICHMENT_RETRY {
        let scene = Scene::new([const { Behaviour::Status(503, Some(30)) }]).await;
        let mut host = scene.start(Some(point)).await;
        let _ = scene.submit(&host, "key").await;
        host.killed().await;
        // The server's 30 s are up in the record, not in this test.
        hurry(scene.data());
        scene.recover("key", point).await;
        assert_eq!(scene.llm.calls(), 2, "{}", point.name());
    }
    println!("enrichment: killed at {} points", ENRICHMENT.len() + ENRICHMENT_RETRY.len());
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
async fn a_kill_between_any_two_writes_of_a_delete_leaves_nothing_behind() {
    for &point in RESULT {
        let scene = Scene::new([]).await;
        let host = scene.start(None).await;
        let id = scene.submit(&host, "key").await.unwrap();
        ended(&scene.http, &host.url, &id).await;
        host.kill().await;
        let mut host = scene.start(Some(point)).await;
        // The order to erase the cache may be worked, and the host killed, after the answer.
        let _ = scene.http.delete(format!("{}/result/{id}", host.url)).send().await;
        host.killed().await;
        assert_erased(&scene, &id, point).await;
    }
    println!("result: killed at {} points", RESULT.len());
}

/// Waits until sweep has erased a deleted job for good.
async fn assert_erased(scene: &Scene, id: &str, point: Point) {
    let host = scene.start(None).await;
    let gone = scene.http.get(format!("{}/result/{id}", host.url)).send().await.unwrap();
    assert_eq!(gone.status().as_u16(), 404, "{}", point.name());
    eventually(&format!("{}: the tombstone is settled", point.name()), async || {
        let jobs = rusqlite::Connection::open(scene.data().join("jobs.sqlite")).unwrap();
        jobs.query_row("SELECT count(*) FROM jobs WHERE due_at IS NOT NULL", [], |row| row.get::<_, u32>(0)).unwrap()
            == 0
    })
    .await;
    scene.settled(host, &[], point).await;
    let host = open(scene.data(), Clock::System, &[]).await;
    let id: Uuid = id.parse().unwrap();
    assert!(matches!(host.store.get(id).await.unwrap(), Some(Record::Tombstone(_))), "{}", point.name());
    assert_eq!(host.blobs.get(&photo_key(id)).await.unwrap(), None, "{}", point.name());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_sweep_loses_and_doubles_nothing() {
    for &point in SWEEP {
        let scene = Scene::new([]).await;
        let mut host = scene.start(Some(Point::SubmitRecordWritten)).await;
        assert!(scene.submit(&host, "key").await.is_err());
        host.killed().await;
        scene.start(Some(point)).await.killed().await;
        scene.recover("key", point).await;
        assert_eq!(scene.llm.calls(), 1, "{}", point.name());
    }
    for &point in SWEEP_TOMBSTONE {
        let scene = Scene::new([]).await;
        let host = scene.start(None).await;
        let id = scene.submit(&host, "key").await.unwrap();
        ended(&scene.http, &host.url, &id).await;
        host.kill().await;
        let mut host = scene.start(Some(point)).await;
        let deleted = scene.http.delete(format!("{}/result/{id}", host.url)).send().await.unwrap();
        assert_eq!(deleted.status().as_u16(), 204);
        host.killed().await;
        assert_erased(&scene, &id, point).await;
    }
    for &point in SWEEP_ORPHAN {
        let scene = Scene::new([]).await;
        let orphan = shared::job::new_id(Utc::now() - TimeDelta::hours(3));
        let folder = scene.data().join("blobs/jobs").join(orphan.to_string());
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("photo"), b"x").unwrap();
        if let Some(mut host) = Process::start(scene.data(), &[("CRASH_AT", point.name())]).await {
            host.killed().await;
        }
        assert!(!folder.exists());
        scene.recover("key", point).await;
    }
    println!("sweep: killed at {} points", SWEEP.len() + SWEEP_TOMBSTONE.len() + SWEEP_ORPHAN.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_after_a_key_was_written_or_revoked_leaves_keys_that_can_be_listed_and_revoked() {
    let folder = tempfile::tempdir().unwrap();
    let key = crate::support::keyed::init(folder.path(), false).await.unwrap();
    let http = client();
    for &point in ADMIN_KEYS {
        let mut host = Process::start(folder.path(), &[("CRASH_AT", point.name())]).await.unwrap();
        let call = async |host: &Process| {
            let url = format!("{}/admin/keys", host.url);
            match point {
                Point::AdminKeyWritten => http.post(url).json(&serde_json::json!({"caller": "ward"})),
                _ => http.delete(format!("{url}/{}", only_key_of_ward(folder.path()))),
            }
            .bearer_auth(&key)
            .send()
            .await
        };
        assert!(call(&host).await.is_err(), "{}: the answer came before the kill", point.name());
        host.killed().await;
        let host = Process::start(folder.path(), &[]).await.unwrap();
        let answer = http.get(format!("{}/admin/keys", host.url)).bearer_auth(&key).send().await.unwrap();
        let listed: serde_json::Value = answer.json().await.unwrap();
        let of_ward = listed["keys"].as_array().unwrap().iter().find(|key| key["caller"] == "ward").unwrap();
        assert_eq!(of_ward["revoked_at"].is_string(), point == Point::AdminKeyRevoked, "{}", point.name());
        // Repeated, a revocation changes nothing. A key is made anew: nobody has the first one's secret.
        if point == Point::AdminKeyRevoked {
            assert_eq!(call(&host).await.unwrap().status().as_u16(), 204);
            let answer = http.get(format!("{}/admin/keys", host.url)).bearer_auth(&key).send().await.unwrap();
            assert_eq!(answer.json::<serde_json::Value>().await.unwrap(), listed);
        }
        host.kill().await;
    }
    println!("keys: killed at {} points", ADMIN_KEYS.len());
}

fn only_key_of_ward(data: &Path) -> String {
    let keys = rusqlite::Connection::open(data.join("callers.sqlite")).unwrap();
    keys.query_row("SELECT id FROM keys WHERE caller = 'ward'", [], |row| row.get(0)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_a_redrive_loses_and_doubles_nothing() {
    for &point in ADMIN_JOB {
        let scene = Scene::new([]).await;
        let id = crate::admin::failed_job(scene.data()).await.to_string();
        let redrive = async |host: &Process| {
            scene.http.post(format!("{}/admin/jobs/{id}/redrive", host.url)).send().await.map(|answer| answer.status())
        };
        let mut host = scene.start(Some(point)).await;
        assert!(redrive(&host).await.is_err(), "{}: the answer came before the kill", point.name());
        host.killed().await;
        let host = scene.start(None).await;
        // Repeated: the job has moved on, and is not sent round twice.
        assert_eq!(redrive(&host).await.unwrap().as_u16(), 409, "{}", point.name());
        assert_eq!(ended(&scene.http, &host.url, &id).await["status"], "completed", "{}", point.name());
        scene.settled(host, std::slice::from_ref(&id), point).await;
        assert_eq!(scene.llm.calls(), 1, "{}", point.name());
    }
    println!("redrive: killed at {} points", ADMIN_JOB.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_after_dead_letters_were_moved_loses_and_doubles_nothing() {
    for &point in ADMIN_DEAD_LETTERS {
        let scene = Scene::new([]).await;
        let id = crate::admin::dead_letter(scene.data()).await.to_string();
        let redrive = async |host: &Process| {
            let request = scene.http.post(format!("{}/admin/dead-letters/redrive", host.url));
            request.json(&serde_json::json!({})).send().await
        };
        // So long that nobody but the dead letter brings the job back.
        let extra = [("REDISPATCH_SECONDS", "3600"), ("CRASH_AT", point.name())];
        let mut host = Process::start(scene.data(), &extra).await.unwrap();
        assert!(redrive(&host).await.is_err(), "{}: the answer came before the kill", point.name());
        host.killed().await;
        let host = Process::start(scene.data(), &extra[..1]).await.unwrap();
        let repeated: serde_json::Value = redrive(&host).await.unwrap().json().await.unwrap();
        assert_eq!(repeated, serde_json::json!({"redriven": 0}), "{}", point.name());
        assert_eq!(ended(&scene.http, &host.url, &id).await["status"], "completed", "{}", point.name());
        scene.settled(host, &[id], point).await;
    }
    println!("dead letters: killed at {} points", ADMIN_DEAD_LETTERS.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_around_a_completion_leaves_what_it_took_or_a_reservation_that_falls_due() {
    for &point in CHAT {
        let scene = Scene::new([]).await;
        let admin = crate::support::keyed::init(scene.data(), false).await.unwrap();
        let id = admin.split('_').nth(1).unwrap();
        let mut host = scene.start(Some(point)).await;
        let body = serde_json::json!({"model": "m", "messages": [], "max_tokens": 20});
        let request = scene.http.post(format!("{}/v1/chat/completions", host.url)).bearer_auth(&admin).json(&body);
        // The answer may be there before its settlement.
        let _ = request.send().await;
        host.killed().await;
        let host = scene.start(None).await;
        let usage = scene.http.get(format!("{}/admin/keys/{id}/usage", host.url)).bearer_auth(&admin).send().await;
        let usage: serde_json::Value = usage.unwrap().json().await.unwrap();
        host.kill().await;
        let callers = SqliteCallers::open(&scene.data().join("callers.sqlite")).unwrap();
        let mut account = callers.find_account(id).await.unwrap();
        account.refill(&KeyLimits::default(), Utc::now() + TimeDelta::minutes(21));
        let month = *account.months.values().next().unwrap();
        let (calls, under_way, estimated, completion_tokens) = match point {
            Point::ChatReserved => (0, 1, 1, 20),
            _ => (1, 0, 0, 10),
        };
        assert_eq!((scene.llm.calls(), usage["under_way"].as_u64()), (calls, Some(under_way)), "{}", point.name());
        assert_eq!((month.requests, month.estimated_requests), (1, estimated), "{}", point.name());
        assert_eq!((month.completion_tokens, account.under_way()), (completion_tokens, 0), "{}", point.name());
    }
    println!("chat: killed at {} points", CHAT.len());
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
