//! Every function is killed (SIGKILL) between any two of its writes on AWS, goes on, and every job must
//! end exactly once, with nothing left behind.
//!
//! Takes debug packages, in which the crash points exist, and shorter times than the stage `local` has;
//! `scripts/emulator --debug` brings both. One scene at a time: a function is armed for all its callers.

use std::io::Write;
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::types::AttributeValue;
use chrono::{TimeDelta, Utc};
use futures_util::StreamExt;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use shared::account::Month;
use shared::api::admin::{KeyLimits, Scope};
use shared::auth::Identity;
use shared::aws::{DynamoCallers, DynamoConnections, DynamoJobStore, S3BlobStore, SqsJobQueue};
use shared::clock::Clock;
use shared::crash::Point;
use shared::job::{Callback, Policy, Record, Status, new_id, photo_key};
use shared::message::Message;
use shared::ports::{BlobStore, Callers, Connection, Connections, JobStore, Subscribed};
use sweep::Sweep;
use uuid::Uuid;

use crate::lambda::Lambda;
use crate::llm_server::{Behaviour, HONEST, LlmServer, explanation};
use crate::pipeline::{User, record};
use crate::support::{hex_sha256, llm, of_stage, receiver, sample, sdk, within};
use crate::webhooks;
use crate::websocket::{Socket, open as open_socket, ticket};

/// What a scene is about; its points are those of one function, which their names begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Submit,
    Upload,
    Inference,
    InferenceRetry,
    Enrichment,
    EnrichmentRetry,
    SubmitPrompt,
    Prompt,
    Delete,
    Sweep,
    SweepTombstone,
    SweepUpload,
    SweepOrphan,
    Key,
    Redrive,
    DeadLetters,
    Socket,
    SocketText,
    Notify,
    Webhook,
    WebhookRetry,
    WebhookLast,
    Completion,
    /// Days later, where no try was left.
    WebhookSwept,
}

const SCENES: &[(Kind, &[Point])] = &[
    (Kind::Completion, &[Point::ChatReserved, Point::ChatSettled]),
    (Kind::Submit, &[Point::SubmitPhotoStored, Point::SubmitRecordWritten, Point::SubmitMessageSent]),
    (
        Kind::Upload,
        &[
            Point::SubmitUploadReserved,
            Point::SubmitPhotoStored,
            Point::SubmitRecordWritten,
            Point::SubmitMessageSent,
            Point::SubmitOriginalErased,
        ],
    ),
    (
        Kind::Inference,
        &[Point::InferenceClaimed, Point::InferenceMapStored, Point::InferenceFinished, Point::InferenceCached],
    ),
    (Kind::InferenceRetry, &[Point::InferenceReleased, Point::InferenceHidden]),
    (Kind::Enrichment, &[Point::EnrichmentClaimed, Point::EnrichmentAnswered, Point::EnrichmentFinished]),
    (Kind::EnrichmentRetry, &[Point::EnrichmentDeferred]),
    (Kind::SubmitPrompt, &[Point::SubmitPromptStored, Point::SubmitRecordWritten]),
    (
        Kind::Prompt,
        &[
            Point::EnrichmentClaimed,
            Point::EnrichmentAnswered,
            Point::EnrichmentAnswerStored,
            Point::EnrichmentFinished,
            Point::EnrichmentDeferred,
        ],
    ),
    (
        Kind::Socket,
        &[
            Point::SocketTicketWritten,
            Point::SocketTicketTaken,
            Point::SocketOpened,
            Point::SocketSubscribed,
            Point::SocketAnswered,
            Point::SocketClosed,
        ],
    ),
    (Kind::SocketText, &[Point::EnrichmentTextPushed]),
    (Kind::Notify, &[Point::NotifyPushed, Point::NotifyClosed]),
    (Kind::Webhook, &[Point::NotifyQueued, Point::WebhookAnswered, Point::WebhookSettled]),
    (Kind::WebhookRetry, &[Point::WebhookPostponed, Point::WebhookHidden]),
    (Kind::WebhookLast, &[Point::WebhookBuried, Point::WebhookGivenUp]),
    (Kind::WebhookSwept, &[Point::SweepBuried]),
    (
        Kind::Delete,
        &[Point::ResultTombstoned, Point::ResultBlobsErased, Point::ResultForgetSent, Point::InferenceForgotten],
    ),
    (Kind::Sweep, &[Point::SweepWritten, Point::SweepSent]),
    (Kind::SweepTombstone, &[Point::SweepErased, Point::SweepTombstoneSettled, Point::SweepForgetSent]),
    (Kind::SweepUpload, &[Point::SweepUploadErased, Point::SweepUploadSettled]),
    (Kind::SweepOrphan, &[Point::SweepOrphanErased]),
    (Kind::Key, &[Point::AdminKeyWritten, Point::AdminKeyRevoked]),
    (Kind::Redrive, &[Point::AdminJobRedriven, Point::AdminMessageSent]),
    (Kind::DeadLetters, &[Point::AdminLettersReceived, Point::AdminLetterSent, Point::AdminDeadLettersMoved]),
];

/// Between writes of the embedded adapters and of the embedded host's start, its queue and its feed:
/// on AWS the services do that.
const EMBEDDED_ALONE: &[Point] = &[
    Point::BlobWritten,
    Point::QueueBeforeAck,
    Point::FeedBeforeCursor,
    Point::StartLeaseEnded,
    Point::StartMessagesShown,
];

#[test]
fn every_crash_point_of_aws_is_in_a_scene() {
    let scenes = SCENES.iter().flat_map(|(_, points)| *points).chain(EMBEDDED_ALONE);
    let mut tested: Vec<_> = scenes.map(|point| point.name()).collect();
    let mut all: Vec<_> = Point::ALL.iter().map(|point| point.name()).collect();
    tested.sort_unstable();
    tested.dedup();
    all.sort_unstable();
    assert_eq!(tested, all);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes debug packages: scripts/package --debug && scripts/emulator --debug"]
async fn a_kill_between_any_two_writes_of_a_function_loses_and_doubles_nothing() {
    let lambda = Lambda::new();
    lambda.stop_schedule().await;
    report(&format!(
        "\n{:<30} {:<16} {:>9} {:>7} {:>7} {:>8} {:>8}",
        "killed at", "while", "ends as", "claims", "calls", "orphans", "seconds"
    ));
    let mut killed = 0;
    for (kind, points) in SCENES {
        for &point in *points {
            report(&Scene::new(&lambda, *kind, point).await.play().await);
            killed += 1;
        }
    }
    empty_queues().await;
    report(&format!("{killed} kills, {} points on the embedded host alone\n", EMBEDDED_ALONE.len()));
}

/// Past the harness, which shows nothing of a test that passes.
fn report(line: &str) {
    std::io::stdout().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// What a job must come to.
#[derive(Debug, PartialEq, Eq)]
struct Expected {
    /// Claims by inference and by enrichment.
    claims: (u32, u32),
    /// Calls of the LLM.
    calls: usize,
    /// Photos that no job was made of; sweep takes them an hour later.
    orphans: u32,
}

/// One kill, with a caller of its own.
struct Scene<'a> {
    lambda: &'a Lambda,
    llm: &'static LlmServer,
    kind: Kind,
    point: Point,
    caller: String,
    user: User,
    jobs: DynamoJobStore,
    blobs: S3BlobStore,
    calls_before: usize,
    started: Instant,
}

impl<'a> Scene<'a> {
    async fn new(lambda: &'a Lambda, kind: Kind, point: Point) -> Self {
        let caller = format!("{kind:?}-{}", point.name()).to_lowercase();
        let sdk = sdk().await;
        llm().behave(Behaviour::Answer(explanation(HONEST)));
        Self {
            lambda,
            llm: llm(),
            kind,
            point,
            user: User::new(&caller).await,
            caller,
            jobs: DynamoJobStore::new(&sdk, of_stage("TABLE_NAME")),
            blobs: S3BlobStore::new(&sdk, of_stage("BUCKET"), true, Clock::System),
            calls_before: llm().calls(),
            started: Instant::now(),
        }
    }

    /// Kills the function that the point belongs to while `act` asks something of it.
    async fn kill(&self, act: impl AsyncFnOnce()) {
        let (function, _) = self.point.name().split_once('.').unwrap();
        self.lambda.killed(function, self.point, &[], act).await;
    }

    async fn play(&self) -> String {
        let usual = Expected { claims: (1, 1), calls: 1, orphans: 0 };
        let (ids, expected) = match self.kind {
            Kind::Submit => self.while_submitting(usual).await,
            Kind::Upload => self.while_uploading(usual).await,
            Kind::Inference | Kind::InferenceRetry => self.while_inferring(usual).await,
            Kind::Enrichment | Kind::EnrichmentRetry => self.while_describing(usual).await,
            Kind::SubmitPrompt | Kind::Prompt => self.while_asking().await,
            Kind::Delete | Kind::SweepTombstone => self.while_deleting(usual).await,
            Kind::Sweep | Kind::SweepUpload | Kind::SweepOrphan => self.while_sweeping(usual).await,
            Kind::Key => self.while_keeping_keys().await,
            Kind::Redrive => self.while_redriving(usual).await,
            Kind::DeadLetters => self.while_moving_dead_letters(usual).await,
            Kind::Socket | Kind::SocketText => self.while_asking_over_a_socket().await,
            Kind::Notify => self.while_notifying(usual).await,
            Kind::Completion => self.while_completing().await,
            Kind::Webhook | Kind::WebhookRetry | Kind::WebhookLast | Kind::WebhookSwept => {
                self.while_calling_back(usual).await
            }
        };
        self.settled(&ids, &expected).await;
        let end = match self.kind {
            Kind::Delete | Kind::SweepTombstone => "gone",
            Kind::Key => "listed",
            Kind::Completion => "counted",
            _ => "completed",
        };
        let claims = format!("{} + {}", expected.claims.0, expected.claims.1);
        let kind = format!("{:?}", self.kind).to_lowercase();
        format!(
            "{:<30} {kind:<16} {end:>9} {claims:>7} {:>7} {:>8} {:>8.1}",
            self.point.name(),
            expected.calls,
            expected.orphans,
            self.started.elapsed().as_secs_f64()
        )
    }

    /// Submits a photo under one `Idempotency-Key`, as an app would again and again; `None` where no
    /// answer came.
    async fn submit(&self) -> Option<String> {
        let request = self.user.request(Method::POST, "/submit").header("content-type", "image/png");
        let answer = request.header("idempotency-key", "key").body(sample("mole-drawn.png")).send().await.unwrap();
        id_of(answer).await
    }

    /// A job that is written and that nobody was told of.
    async fn pending(&self) -> Uuid {
        let submit = async || assert_eq!(self.submit().await, None);
        self.lambda.killed("submit", Point::SubmitRecordWritten, &[], submit).await;
        self.jobs.list(&self.caller, None, 2).await.unwrap()[0].id
    }

    /// The result once the job has ended; sweep comes more often than by its schedule.
    async fn ended(&self, id: &str) -> Value {
        within(&format!("{}: {id} ends", self.caller), async || {
            self.lambda.sweep().await;
            let answer = self.user.request(Method::GET, &format!("/result/{id}")).send().await.unwrap();
            let result: Value = answer.json().await.unwrap();
            ["completed", "failed"].contains(&result["status"].as_str().unwrap())
        })
        .await;
        self.user.ended(id).await
    }

    /// Submits once more and waits for the end.
    async fn recover(&self) -> Vec<Uuid> {
        let id = self.submit().await.expect("the function goes on");
        self.ended(&id).await;
        vec![id.parse().unwrap()]
    }

    async fn while_submitting(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        self.kill(async || assert_eq!(self.submit().await, None)).await;
        // What the second try stores lies under another id.
        let orphans = u32::from(self.point == Point::SubmitPhotoStored);
        (self.recover().await, Expected { orphans, ..usual })
    }

    async fn while_uploading(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        let mut image_key = None;
        self.kill(async || assert_eq!(self.upload_and_submit(&mut image_key).await, None)).await;
        let id = self.upload_and_submit(&mut image_key).await.expect("the function goes on");
        self.ended(&id).await;
        let orphans = u32::from(self.point == Point::SubmitPhotoStored);
        (vec![id.parse().unwrap()], Expected { orphans, ..usual })
    }

    /// Uploads and submits as an app does: whatever step fails is begun again.
    async fn upload_and_submit(&self, image_key: &mut Option<String>) -> Option<String> {
        if image_key.is_none() {
            *image_key = Some(self.upload().await?);
        }
        let request = self.user.request(Method::POST, "/submit").json(&json!({"image_key": image_key}));
        id_of(request.send().await.unwrap()).await
    }

    async fn upload(&self) -> Option<String> {
        let photo = sample("mole-drawn.png");
        let body = json!({"content_type": "image/png", "size_bytes": photo.len(), "sha256": hex_sha256(&photo)});
        let answer = self.user.request(Method::POST, "/uploads").json(&body).send().await.unwrap();
        let permit: Value = answered(answer)?.json().await.unwrap();
        let headers = permit["headers"].as_object().unwrap().iter();
        let put = self.user.http.put(permit["url"].as_str().unwrap()).body(photo);
        let put = headers.fold(put, |put, (name, value)| put.header(name, value.as_str().unwrap()));
        assert_eq!(put.send().await.unwrap().status(), StatusCode::OK);
        Some(permit["image_key"].as_str().unwrap().to_owned())
    }

    async fn while_inferring(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        // Photos that cannot be fetched, for as long as it is armed.
        let other: &[_] = if self.kind == Kind::InferenceRetry { &[("BUCKET", "lesion-of-nobody")] } else { &[] };
        let submit = async || assert!(self.submit().await.is_some());
        self.lambda.killed("inference", self.point, other, submit).await;
        // Once the record is written nothing is read again.
        let read = [Point::InferenceFinished, Point::InferenceCached].contains(&self.point);
        (self.recover().await, Expected { claims: (if read { 1 } else { 2 }, 1), ..usual })
    }

    async fn while_describing(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        if self.kind == Kind::EnrichmentRetry {
            // Longer than a lease, so that the function waits no second try out.
            self.llm.behave(Behaviour::Status(503, Some(8)));
        }
        self.kill(async || assert!(self.submit().await.is_some())).await;
        self.llm.behave(Behaviour::Answer(explanation(HONEST)));
        // Only an answer whose commit was cut off is asked for again, and one that never came.
        let asked_again = [Point::EnrichmentAnswered, Point::EnrichmentDeferred].contains(&self.point);
        let described = self.point == Point::EnrichmentFinished;
        let claims = (1, if described { 1 } else { 2 });
        (self.recover().await, Expected { claims, calls: if asked_again { 2 } else { 1 }, ..usual })
    }

    /// Submits a prompt under one `Idempotency-Key`; `None` where no answer came.
    async fn ask(&self) -> Option<String> {
        let request = self.user.request(Method::POST, "/submit").header("idempotency-key", "key");
        id_of(request.json(&json!({"prompt": "What is a naevus?"})).send().await.unwrap()).await
    }

    async fn while_asking(&self) -> (Vec<Uuid>, Expected) {
        // Too large for a record.
        let answer = "A growth of pigment cells. ".repeat(10_000);
        self.llm.behave(match self.point {
            Point::EnrichmentDeferred => Behaviour::Status(503, Some(8)),
            _ => Behaviour::Answer(answer.clone()),
        });
        let submitting = self.kind == Kind::SubmitPrompt;
        self.kill(async || assert_eq!(self.ask().await.is_none(), submitting)).await;
        self.llm.behave(Behaviour::Answer(answer.clone()));
        let id = self.ask().await.expect("the function goes on");
        let result = self.ended(&id).await;
        assert!(result["content"] == answer, "{}: not the answer", self.caller);
        // Only an answer whose commit was cut off is asked for again, and one that never came.
        let asked_again = [Point::EnrichmentAnswered, Point::EnrichmentAnswerStored, Point::EnrichmentDeferred];
        let calls = if asked_again.contains(&self.point) { 2 } else { 1 };
        let once = submitting || self.point == Point::EnrichmentFinished;
        let orphans = u32::from(self.point == Point::SubmitPromptStored);
        (vec![id.parse().unwrap()], Expected { claims: (0, if once { 1 } else { 2 }), calls, orphans })
    }

    async fn while_deleting(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        let ids = self.recover().await;
        let id = ids[0];
        let Some(Record::Job(job)) = record(&id.to_string()).await else { panic!("{}", self.caller) };
        let cached = format!("cache/{}", job.cache_key.unwrap());
        assert!(self.blobs.get(&cached).await.unwrap().is_some(), "{}: the outputs are cached", self.caller);
        let path = format!("/result/{id}");
        let delete = async || answered(self.user.request(Method::DELETE, &path).send().await.unwrap()).is_some();
        match self.point {
            Point::ResultTombstoned | Point::ResultBlobsErased | Point::ResultForgetSent => {
                self.kill(async || assert!(!delete().await)).await;
            }
            Point::InferenceForgotten => self.kill(async || assert!(delete().await)).await,
            _ => {
                assert!(delete().await);
                self.kill(async || self.sweep_until_killed().await).await;
            }
        }
        let gone = self.user.request(Method::GET, &path).send().await.unwrap().status();
        assert_eq!(gone, StatusCode::NOT_FOUND, "{}", self.caller);
        within(&format!("{}: the tombstone is settled", self.caller), async || {
            self.lambda.sweep().await;
            match record(&id.to_string()).await {
                Some(Record::Tombstone(tombstone)) => tombstone.due_at.is_none() && tombstone.cache_key.is_none(),
                other => panic!("{}: {other:?}", self.caller),
            }
        })
        .await;
        assert_eq!(self.blobs.get(&photo_key(id)).await.unwrap(), None, "{}", self.caller);
        assert_eq!(self.blobs.get(&cached).await.unwrap(), None, "{}", self.caller);
        (vec![], usual)
    }

    async fn sweep_until_killed(&self) {
        within(&format!("{}: sweep has something to do", self.caller), async || !self.lambda.sweep().await).await;
    }

    async fn while_sweeping(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        match self.kind {
            Kind::Sweep => drop(self.pending().await),
            Kind::SweepUpload => {
                let image_key = self.upload().await.unwrap();
                let id = image_key.rsplit('/').nth(1).unwrap();
                let Some(Record::Upload(upload)) = record(id).await else { panic!("{}", self.caller) };
                let fence = Record::Upload(upload.clone()).fence();
                // Its hour is over.
                let due = shared::job::Upload { version: upload.version + 1, due_at: Some(Utc::now()), ..upload };
                assert!(self.jobs.replace(fence, &Record::Upload(due)).await.unwrap());
            }
            _ => {
                let orphan = photo_key(new_id(Utc::now() - TimeDelta::hours(3)));
                self.blobs.put(&orphan, b"x".to_vec()).await.unwrap();
            }
        }
        self.kill(async || self.sweep_until_killed().await).await;
        (self.recover().await, usual)
    }

    async fn while_keeping_keys(&self) -> (Vec<Uuid>, Expected) {
        let keys = async || {
            let answer = self.user.request(Method::GET, "/admin/keys").send().await.unwrap();
            let listed: Value = answer.json().await.unwrap();
            let of_ward = |key: &&Value| key["caller"] == format!("ward-of-{}", self.caller);
            listed["keys"].as_array().unwrap().iter().filter(of_ward).cloned().collect::<Vec<_>>()
        };
        let create = async || {
            let body = json!({"caller": format!("ward-of-{}", self.caller)});
            answered(self.user.request(Method::POST, "/admin/keys").json(&body).send().await.unwrap()).is_some()
        };
        if self.point == Point::AdminKeyWritten {
            self.kill(async || assert!(!create().await)).await;
        } else {
            assert!(create().await);
        }
        let made = keys().await;
        assert_eq!(made.len(), 1, "{}", self.caller);
        let path = format!("/admin/keys/{}", made[0]["id"].as_str().unwrap());
        let revoke = async || answered(self.user.request(Method::DELETE, &path).send().await.unwrap()).is_some();
        if self.point == Point::AdminKeyRevoked {
            self.kill(async || assert!(!revoke().await)).await;
        } else {
            assert!(revoke().await);
        }
        let revoked = keys().await;
        assert!(revoked[0]["revoked_at"].is_string(), "{}", self.caller);
        // Repeated, a revocation changes nothing.
        assert!(revoke().await);
        assert_eq!(keys().await, revoked, "{}", self.caller);
        (vec![], Expected { claims: (0, 0), calls: 0, orphans: 0 })
    }

    async fn while_redriving(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        let id = self.pending().await;
        let Some(Record::Job(job)) = record(&id.to_string()).await else { panic!("{}", self.caller) };
        let (now, policy) = (Utc::now(), Policy { max_attempts: 1, ..Policy::default() });
        let claimed = job.claim_inference(now, now + policy.lease, &policy).unwrap();
        let failed = claimed.release_inference(claimed.claim, now, &policy).unwrap();
        assert!(self.jobs.replace(job.fence(), &Record::Job(claimed.clone())).await.unwrap());
        assert!(self.jobs.replace(claimed.fence(), &Record::Job(failed)).await.unwrap());
        let path = format!("/admin/jobs/{id}/redrive");
        let redrive = async || self.user.request(Method::POST, &path).send().await.unwrap().status();
        self.kill(async || assert!(redrive().await.is_server_error())).await;
        // Repeated: the job has moved on, and is not sent round twice.
        assert_eq!(redrive().await, StatusCode::CONFLICT, "{}", self.caller);
        (self.recover().await, usual)
    }

    async fn while_moving_dead_letters(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        let id = self.pending().await;
        let sqs = aws_sdk_sqs::Client::new(&sdk().await);
        let letter = sqs.send_message().queue_url(of_stage("DEAD_LETTER_QUEUE_URL"));
        letter.message_body(Message::Infer { id }.encode()).send().await.unwrap();
        let redrive = async || {
            let request = self.user.request(Method::POST, "/admin/dead-letters/redrive").json(&json!({}));
            answered(request.send().await.unwrap())?.json::<Value>().await.unwrap()["redriven"].as_u64()
        };
        self.kill(async || assert_eq!(redrive().await, None)).await;
        if self.point == Point::AdminDeadLettersMoved {
            assert_eq!(redrive().await, Some(0), "{}", self.caller);
        } else {
            // Whom the kill left hidden is seen again half a minute later.
            within(&format!("{}: the letter is moved", self.caller), async || redrive().await == Some(1)).await;
        }
        (self.recover().await, usual)
    }

    /// Opens a WebSocket and asks under the key of [`Scene::ask`], for as long as anybody would wait.
    async fn ask_over_a_socket(&self) {
        let url = of_stage("API_URL");
        let ask = async {
            let ticket = ticket(&self.user.http, &url, &self.user.key).await.ok()?;
            let mut socket = open_socket(&url, ticket["url"].as_str()?, &[]).await.ok()?;
            socket.send(json!({"action": "ask", "prompt": "What is a naevus?", "idempotency_key": "key"})).await;
            // Where the function dies the gateway says so, in words of its own.
            let ours = |text: &str| text.contains(r#""v":1"#) && !text.contains(r#""type":"result""#);
            while socket.0.next().await?.ok()?.to_text().is_ok_and(ours) {}
            Some(())
        };
        let _ = tokio::time::timeout(Duration::from_secs(8), ask).await;
    }

    async fn while_asking_over_a_socket(&self) -> (Vec<Uuid>, Expected) {
        self.llm.behave(Behaviour::Answer("A growth.".to_owned()));
        let (function, _) = self.point.name().split_once('.').unwrap();
        self.lambda.killed_at_least_once(function, self.point, async || self.ask_over_a_socket().await).await;
        // The same key and prompt by HTTP: the same job, whatever became of the connection.
        let id = self.ask().await.expect("the function goes on");
        self.ended(&id).await;
        let mut socket = Socket::connect(&self.user.http, &of_stage("API_URL"), &self.user.key).await;
        socket.subscribe(&id).await;
        let (frame, _) = socket.until_ended(&id).await.unwrap();
        assert_eq!(frame["result"]["content"], "A growth.", "{}: {frame}", self.caller);
        // A text that was cut off is not gone on with under the same claim.
        let again = self.kind == Kind::SocketText;
        let (claims, calls) = if again { ((0, 2), 2) } else { ((0, 1), 1) };
        (vec![id.parse().unwrap()], Expected { claims, calls, orphans: 0 })
    }

    async fn while_notifying(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        let id = self.pending().await;
        let connections = DynamoConnections::new(&sdk().await, of_stage("CONNECTIONS_TABLE_NAME"));
        let mut socket = Socket::connect(&self.user.http, &of_stage("API_URL"), &self.user.key).await;
        if self.point == Point::NotifyClosed {
            // Somebody who has gone, and whose end nobody was told of.
            let identity = Identity {
                caller: self.caller.clone(),
                scopes: vec![Scope::Jobs],
                key_id: None,
                limits: KeyLimits::default(),
                expires_at: None,
            };
            let gone = Connection { id: self.caller.clone(), identity, expires_at: Utc::now() + TimeDelta::hours(1) };
            connections.open(&gone).await.unwrap();
            assert_eq!(connections.subscribe(&gone, id).await.unwrap(), Subscribed::Done);
        } else {
            socket.subscribe(&id.to_string()).await;
            assert_eq!(socket.next().await.unwrap()["type"], "status", "{}", self.caller);
        }
        let moved = async || {
            within(&format!("{}: sweep sends", self.caller), async || {
                self.lambda.sweep().await;
                let Some(Record::Job(job)) = record(&id.to_string()).await else { panic!("{}", self.caller) };
                job.version > 1
            })
            .await;
        };
        self.lambda.killed_at_least_once("notify", self.point, moved).await;
        let ids = self.recover().await;
        // What was cut off comes again, and whoever is there is told of the end.
        socket.subscribe(&id.to_string()).await;
        let (frame, _) = socket.until_ended(&id.to_string()).await.unwrap();
        assert_eq!(frame["status"], "completed", "{}: {frame}", self.caller);
        let left = connections.subscribers(id).await.unwrap();
        assert!(left.iter().all(|it| it.connection != self.caller), "{}: who is gone is forgotten", self.caller);
        (ids, usual)
    }

    async fn while_calling_back(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        let fails = self.kind != Kind::Webhook;
        receiver().answer(if fails { 503 } else { 200 });
        let submit = async || id_of(webhooks::submit(&self.user, "key").await).await;
        match self.point {
            Point::NotifyQueued => {
                let act = async || assert!(submit().await.is_some());
                self.lambda.killed_at_least_once("notify", self.point, act).await;
            }
            Point::SweepBuried => {
                let id = submit().await.unwrap();
                self.once_it_has_failed(&id, |job, delivery| {
                    job.due_at = Some(job.updated_at);
                    delivery.until = job.updated_at;
                })
                .await;
                self.kill(async || self.sweep_until_killed().await).await;
            }
            _ if self.kind == Kind::WebhookLast => {
                self.kill(async || self.try_for_the_last_time(&submit().await.unwrap()).await).await
            }
            _ => self.kill(async || assert!(submit().await.is_some())).await,
        }
        let id = submit().await.expect("the function goes on");
        let before = webhooks::told(&id).len();
        receiver().answer(200);
        self.ended(&id).await;
        if [Kind::WebhookLast, Kind::WebhookSwept].contains(&self.kind) {
            let request = self.user.request(Method::POST, "/admin/dead-letters/redrive").json(&json!({}));
            let redriven: Value = answered(request.send().await.unwrap()).unwrap().json().await.unwrap();
            assert!(redriven["redriven"].as_u64().unwrap() > 0, "{}: no dead letter", self.caller);
        }
        within(&format!("{}: the receiver is told", self.caller), async || {
            self.lambda.sweep().await;
            webhooks::is_delivered(&id).await
        })
        .await;
        let told = webhooks::told(&id);
        assert!(told.iter().all(|it| it.id() == told[0].id() && it.body == told[0].body), "{}", self.caller);
        assert!(told[0].id().starts_with(&format!("msg_{id}_")), "{}", self.caller);
        if self.point == Point::WebhookSettled {
            assert_eq!(told.len(), before, "{}: the receiver has it", self.caller);
        } else if self.point != Point::NotifyQueued {
            assert!(told.len() > 1, "{}: told again, or for the first time with success", self.caller);
        }
        (vec![id.parse().unwrap()], usual)
    }

    /// Changes a delivery once its first try has failed and its hours are over, but nobody has come yet.
    async fn once_it_has_failed(&self, id: &str, change: impl Fn(&mut shared::job::Job, &mut shared::job::Delivery)) {
        within(&format!("{}: the first try has failed", self.caller), async || {
            self.lambda.sweep().await;
            let Some(Record::Job(job)) = record(id).await else { panic!("{}", self.caller) };
            let Some(delivery) = job.delivery().filter(|delivery| delivery.not_before > job.updated_at) else {
                return false;
            };
            let mut delivery = shared::job::Delivery { not_before: job.updated_at, ..delivery.clone() };
            let mut due = shared::job::Job { version: job.version + 1, ..job.clone() };
            change(&mut due, &mut delivery);
            due.callback = job.callback.clone().map(|it| Callback { delivery: Some(delivery), ..it });
            self.jobs.replace(job.fence(), &Record::Job(due)).await.unwrap()
        })
        .await;
    }

    /// Hands webhook a message for a delivery that has failed seven times.
    async fn try_for_the_last_time(&self, id: &str) {
        self.once_it_has_failed(id, |_, delivery| delivery.tries = webhook::MAX_TRIES - 1).await;
        let body = Message::Deliver { id: id.parse().unwrap() }.encode();
        let message = json!({
            "messageId": "by hand",
            "receiptHandle": "by hand",
            "body": body,
            "attributes": {"ApproximateReceiveCount": "1"},
            "messageAttributes": {},
            "eventSource": "aws:sqs",
            "awsRegion": "us-east-1",
        });
        assert!(!self.lambda.invoke("webhook", &json!({"Records": [message]})).await, "{}: it goes on", self.caller);
    }

    /// Asks the proxy twice, the first time to its function's end, and reads what the key has had.
    async fn while_completing(&self) -> (Vec<Uuid>, Expected) {
        let url = format!("{}/v1/chat/completions", of_stage("CHAT_URL"));
        let body = json!({"model": "stand-in", "messages": [], "max_tokens": 20});
        let ask = async || {
            let request = self.user.http.post(&url).bearer_auth(&self.user.key).json(&body);
            answered(request.send().await.unwrap())?.json::<Value>().await.unwrap()["usage"]["total_tokens"].as_u64()
        };
        // The answer goes out behind its settlement: whoever dies in between has told nobody.
        self.kill(async || assert_eq!(ask().await, None)).await;
        let settled = self.point == Point::ChatSettled;
        let calls = usize::from(settled);
        assert_eq!(self.llm.calls() - self.calls_before, calls, "{}", self.caller);

        let callers = DynamoCallers::new(&sdk().await, of_stage("CALLERS_TABLE_NAME"));
        let id = self.user.key.split('_').nth(1).unwrap();
        let reserved = usize::from(!settled);
        // What is under way, and once it has fallen due: requests, estimated ones, tokens of the answers.
        let ledger = async || {
            let mut account = callers.find_account(id).await.unwrap();
            let under_way = account.under_way();
            account.refill(&KeyLimits::default(), Utc::now() + TimeDelta::minutes(21));
            assert_eq!(account.under_way(), 0, "{}", self.caller);
            let sum = |of: fn(&Month) -> u64| account.months.values().map(of).sum::<u64>();
            let months = (sum(|it| it.requests), sum(|it| it.estimated_requests), sum(|it| it.completion_tokens));
            (under_way, months)
        };
        let took = if settled { (1, 0, 10) } else { (1, 1, 20) };
        assert_eq!(ledger().await, (reserved, took), "{}", self.caller);
        assert_eq!(ask().await, Some(29), "{}: the key goes on", self.caller);
        assert_eq!(ledger().await, (reserved, (took.0 + 1, took.1, took.2 + 10)), "{}", self.caller);
        (vec![], Expected { claims: (0, 0), calls: calls + 1, orphans: 0 })
    }

    /// Nothing is open, counted or left over; the listed jobs are all there are.
    async fn settled(&self, ids: &[Uuid], expected: &Expected) {
        let sdk = sdk().await;
        let queues = ["QUEUE_URL", "WEBHOOK_QUEUE_URL"].map(|name| SqsJobQueue::new(&sdk, of_stage(name), None));
        // Two hours later orphans and unused uploads go, nothing else is due.
        let later = Clock::manual(Utc::now() + TimeDelta::hours(2));
        let sweep = Sweep::new(self.jobs.clone(), queues, self.blobs.clone(), later, Policy::default());
        let report = sweep.handle(aws_lambda_events::event::eventbridge::EventBridgeEvent::default()).await.unwrap();
        let open = (report.sent, report.marked, report.ended, report.erased, report.undelivered, report.failed);
        assert_eq!((open, report.orphans), ((0, 0, 0, 0, 0, 0), expected.orphans), "{}: {report:?}", self.caller);

        let jobs = self.jobs.list(&self.caller, None, 100).await.unwrap();
        assert_eq!(jobs.iter().map(|job| job.id).collect::<Vec<_>>(), ids, "{}", self.caller);
        for job in &jobs {
            assert_eq!(job.status, Status::Completed, "{}: {job:?}", self.caller);
            assert!(job.description.is_some() || job.answer.is_some(), "{}: {job:?}", self.caller);
            assert_eq!((job.attempts.inference, job.attempts.enrichment), expected.claims, "{}: {job:?}", self.caller);
        }
        assert_eq!(self.llm.calls() - self.calls_before, expected.calls, "{}", self.caller);
        for id in self.blobs.list("jobs/", None, 1000).await.unwrap() {
            assert!(matches!(record(&id).await, Some(Record::Job(_))), "{}: a photo without its job", self.caller);
        }
        assert_eq!(self.blobs.list("incoming/", None, 100).await.unwrap(), [] as [&str; 0], "{}", self.caller);
        let usage = aws_sdk_dynamodb::Client::new(&sdk).get_item().table_name(of_stage("TABLE_NAME"));
        let usage = usage.key("id", AttributeValue::S(format!("usage#{}", self.caller))).send().await.unwrap().item;
        let queued = usage.and_then(|item| item.get("queued_bytes")?.as_n().ok().cloned());
        assert!(queued.is_none_or(|bytes| bytes == "0"), "{}: nothing is counted as queued", self.caller);
    }
}

/// An answer that is no error; `None` where the function died over it.
fn answered(answer: reqwest::Response) -> Option<reqwest::Response> {
    if answer.status().is_server_error() {
        return None;
    }
    assert!(answer.status().is_success(), "{}", answer.status());
    Some(answer)
}

async fn id_of(answer: reqwest::Response) -> Option<String> {
    let body: Value = answered(answer)?.json().await.unwrap();
    Some(body["request_id"].as_str().unwrap().to_owned())
}

/// What was cut off comes back once its visibility timeout is over, and is acknowledged.
async fn empty_queues() {
    let sqs = aws_sdk_sqs::Client::new(&sdk().await);
    let failures = sqs.get_queue_url().queue_name("lesion-local-enrichment-failures").send().await.unwrap();
    let queues =
        ["QUEUE_URL", "DEAD_LETTER_QUEUE_URL", "WEBHOOK_QUEUE_URL", "WEBHOOK_DEAD_LETTER_QUEUE_URL"].map(of_stage);
    for url in queues.into_iter().chain(failures.queue_url) {
        within(&format!("{url} is empty"), async || {
            let asked = sqs.get_queue_attributes().queue_url(&url);
            let asked = asked.attribute_names(aws_sdk_sqs::types::QueueAttributeName::All).send().await.unwrap();
            let attributes = asked.attributes.unwrap();
            let depths = attributes.iter().filter(|(name, _)| name.as_str().starts_with("ApproximateNumberOf"));
            depths.map(|(_, depth)| depth.parse::<u32>().unwrap()).sum::<u32>() == 0
        })
        .await;
    }
}
