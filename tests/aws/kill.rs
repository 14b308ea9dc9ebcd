//! Every function is killed (SIGKILL) between any two of its writes on AWS, goes on, and every job must
//! end exactly once, with nothing left behind.
//!
//! Takes debug packages, in which the crash points exist, and shorter times than the stage `local` has;
//! `scripts/emulator --debug` brings both. One scene at a time: a function is armed for all its callers.

mod admin;
mod photos;
mod prompts;
mod told;

use std::io::Write;
use std::time::Instant;

use aws_sdk_dynamodb::types::AttributeValue;
use chrono::{TimeDelta, Utc};
use reqwest::Method;
use serde_json::Value;
use shared::aws::{DynamoJobStore, S3BlobStore, SqsJobQueue};
use shared::clock::Clock;
use shared::crash::Point;
use shared::job::{Policy, Record, Status};
use shared::ports::{BlobStore, JobStore};
use sweep::Sweep;
use uuid::Uuid;

use crate::lambda::Lambda;
use crate::llm_server::{Behaviour, HONEST, LlmServer, explanation};
use crate::pipeline::{User, record};
use crate::support::{llm, of_stage, sample, sdk, within};

/// What a scene is about; its points are those of one function, which their names begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Submit,
    Upload,
    Inference,
    InferenceRetry,
    Enrichment,
    /// By the template.
    Offline,
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
    /// What is no message.
    WebhookUnreadable,
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
    (Kind::Offline, &[Point::EnrichmentFinished]),
    (Kind::EnrichmentRetry, &[Point::EnrichmentDeferred]),
    (Kind::SubmitPrompt, &[Point::SubmitPromptStored, Point::SubmitRecordWritten]),
    (
        Kind::Prompt,
        &[
            Point::EnrichmentQueued,
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
    (Kind::WebhookUnreadable, &[Point::WebhookUnreadableBuried]),
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
    (
        Kind::DeadLetters,
        &[
            Point::AdminLettersReceived,
            Point::AdminLetterSent,
            Point::AdminPhotoLettersMoved,
            Point::AdminDeadLettersMoved,
        ],
    ),
];

/// Between writes of the embedded adapters and of the embedded host's start, its queue, its feed and its
/// housekeeping: on AWS the services do that, and Terraform.
const EMBEDDED_ALONE: &[Point] = &[
    Point::BlobWritten,
    Point::QueueReceived,
    Point::QueueBeforeAck,
    Point::FeedBeforeRemoval,
    Point::HousekeepingRecordsRemoved,
    Point::HousekeepingPhotosRemoved,
    Point::StartSecretWritten,
    Point::InitKeyWritten,
    Point::StartLeaseEnded,
    Point::StartPhotosShown,
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
            Kind::Enrichment | Kind::Offline | Kind::EnrichmentRetry => self.while_describing(usual).await,
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
            Kind::WebhookUnreadable => self.while_putting_aside().await,
        };
        self.settled(&ids, &expected).await;
        let end = match self.kind {
            Kind::Delete | Kind::SweepTombstone => "gone",
            Kind::Key => "listed",
            Kind::WebhookUnreadable => "put aside",
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
        self.jobs.list(&self.caller, None, 2).await.unwrap().records[0].id
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

    async fn sweep_until_killed(&self) {
        within(&format!("{}: sweep has something to do", self.caller), async || !self.lambda.sweep().await).await;
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

        let jobs = self.jobs.list(&self.caller, None, 100).await.unwrap().records;
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
    let queues = [
        "QUEUE_URL",
        "DEAD_LETTER_QUEUE_URL",
        "PROMPT_QUEUE_URL",
        "WEBHOOK_QUEUE_URL",
        "WEBHOOK_DEAD_LETTER_QUEUE_URL",
    ]
    .map(of_stage);
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
