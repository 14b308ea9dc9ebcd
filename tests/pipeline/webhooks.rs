//! The end of a job told by a webhook: who is told what, how often, and what keeps nobody waiting.

use std::path::Path;
use std::time::Duration;

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use aws_lambda_events::event::sqs::{SqsEvent, SqsMessage};
use chrono::{TimeDelta, Utc};
use local::Host;
use reqwest::Client;
use serde_json::{Value, json};
use shared::clock::Clock;
use shared::embedded::Delivery;
use shared::http::Caller;
use shared::job::{DeliveryOutcome, Dispatch, Job, Record};
use shared::message::Message;
use shared::ports::{JobQueue, JobStore};
use submit::Submission;
use tempfile::TempDir;
use uuid::Uuid;
use webhook::MAX_TRIES;

use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::Process;
use crate::support::receiver::{Received, Receiver, SECRET};
use crate::support::{Running, client, eventually, mole, open, sample, within};

/// What a host is told so that it calls this receiver.
pub fn variables(host: &str) -> [(&str, &str); 2] {
    [("WEBHOOK_HOSTS", host), ("WEBHOOK_SECRET", SECRET)]
}

async fn running(receiver: &Receiver) -> Running {
    Running::start(&variables(&receiver.host())).await
}

/// Submits a photo whose end is to be told, and returns its id.
async fn submit(host: &Running, receiver: &Receiver, photo: Vec<u8>) -> String {
    submit_told(&host.http, &host.url, photo, &receiver.url(), None).await.unwrap()
}

/// As [`crate::support::submit`], for a photo whose end is to be told.
pub async fn submit_told(
    http: &Client,
    url: &str,
    photo: Vec<u8>,
    callback_url: &str,
    key: Option<&str>,
) -> reqwest::Result<String> {
    let mut request = http.post(format!("{url}/submit")).header("content-type", "image/png");
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    let answer = request.query_pair("callback_url", callback_url).body(photo).send().await?;
    let (status, body) = (answer.status(), answer.json::<Value>().await?);
    assert_eq!(status.as_u16(), 202, "{body}");
    Ok(body["request_id"].as_str().unwrap().to_owned())
}

/// reqwest is built here without its own.
trait QueryPair {
    fn query_pair(self, name: &str, value: &str) -> Self;
}

impl QueryPair for reqwest::RequestBuilder {
    fn query_pair(self, name: &str, value: &str) -> Self {
        let (client, request) = self.build_split();
        let mut request = request.unwrap();
        request.url_mut().query_pairs_mut().append_pair(name, value);
        reqwest::RequestBuilder::from_parts(client, request)
    }
}

/// What came about this job, once something has.
async fn told(receiver: &Receiver, id: &str) -> Vec<Received> {
    let about = || -> Vec<Received> {
        receiver.received().into_iter().filter(|it| it.event()["data"]["request_id"] == id).collect()
    };
    eventually("the receiver is told", async || !about().is_empty()).await;
    about()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_is_told_of_every_end_and_what_get_says_of_it() {
    let receiver = Receiver::start(204).await;
    let host = running(&receiver).await;
    for (photo, kind) in [("mole-drawn.png", "job.completed"), ("blurred.png", "job.needs_retake")] {
        let id = submit(&host, &receiver, sample(photo)).await;
        let mut result = host.ended(&id).await;
        if result["map"].is_object() {
            // A link is made for who asks for it.
            result["map"] = Value::Null;
        }
        let [received] = told(&receiver, &id).await.try_into().unwrap();
        let event = received.event();
        assert_eq!((&event["type"], &event["data"]), (&json!(kind), &result));
        assert_eq!(event["timestamp"], result["updated_at"]);
        assert_eq!(event["caller"], "local");
        assert!(received.id().starts_with(&format!("msg_{id}_")), "{}", received.id());
        assert_eq!(received.uri.to_string(), "/hook?token=mine");
        // Nothing of it shows, and nothing that a caller reads has changed.
        eventually("the delivery is settled", async || due(host.folder.path()) == 0).await;
        let mut after = host.result(&id).await;
        after["map"] = Value::Null;
        result["map"] = Value::Null;
        assert_eq!(after, result);
    }
    assert_eq!(receiver.received().len(), 2);
    // Who gave no URL is told nothing.
    host.run(&mole()).await;
    assert_eq!(receiver.received().len(), 2);
}

fn due(data: &Path) -> u32 {
    let jobs = rusqlite::Connection::open(data.join("jobs.sqlite")).unwrap();
    jobs.query_row("SELECT count(*) FROM jobs WHERE due_at IS NOT NULL", [], |row| row.get(0)).unwrap()
}

/// By hand: ring's HMAC over what the specification says is signed.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_verifies_as_the_specification_says_and_nothing_else_does() {
    let receiver = Receiver::start(200).await;
    let host = running(&receiver).await;
    let id = submit(&host, &receiver, mole()).await;
    let [received] = told(&receiver, &id).await.try_into().unwrap();
    let signature = received.header("webhook-signature").strip_prefix("v1,").unwrap();
    let [key, signature] = [&SECRET[6..], signature].map(|text| {
        use base64::Engine;
        base64::engine::general_purpose::STANDARD.decode(text).unwrap()
    });
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key);
    let signed = format!("{}.{}.{}", received.id(), received.header("webhook-timestamp"), received.body);
    assert!(ring::hmac::verify(&key, signed.as_bytes(), &signature).is_ok());
    let altered = signed.replace("job.completed", "job.failed");
    assert!(altered != signed && ring::hmac::verify(&key, altered.as_bytes(), &signature).is_err());
    // Receivers refuse what is older than five minutes.
    let sent: i64 = received.header("webhook-timestamp").parse().unwrap();
    assert!((Utc::now().timestamp() - sent).abs() < 300);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_a_prompt_is_told_and_a_long_one_is_said_where_it_is() {
    let receiver = Receiver::start(200).await;
    let llm = LlmServer::start([]).await;
    let host = Running::asking(&llm, &variables(&receiver.host())).await;
    let ask = async || {
        let body = json!({"prompt": "What is a naevus?", "callback_url": receiver.url()});
        let answer = host.http.post(format!("{}/submit", host.url)).json(&body).send().await.unwrap();
        answer.json::<Value>().await.unwrap()["request_id"].as_str().unwrap().to_owned()
    };
    llm.behave(Behaviour::Answer("A growth.".into()));
    let id = ask().await;
    assert_eq!(told(&receiver, &id).await[0].event()["data"]["content"], "A growth.");
    llm.behave(Behaviour::Answer("x".repeat(20_000)));
    let id = ask().await;
    let event = told(&receiver, &id).await[0].event();
    assert_eq!(event["data"], json!({"request_id": id, "status": "completed", "location": format!("/result/{id}")}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_that_may_not_be_called_makes_no_job() {
    let receiver = Receiver::start(200).await;
    let host = running(&receiver).await;
    let submit = format!("{}/submit", host.url);
    let png = || host.http.post(&submit).header("content-type", "image/png");
    for url in ["http://169.254.169.254/latest", "https://hooks.example/", "http://127.0.0.1:1/", "here", ""] {
        let form = reqwest::multipart::Form::new()
            .part("image", reqwest::multipart::Part::bytes(mole()))
            .text("callback_url", url);
        for request in [
            png().query_pair("callback_url", url).body(mole()),
            host.http.post(&submit).json(&json!({"image": "iVBORw0KGgo=", "callback_url": url})),
            host.http.post(&submit).json(&json!({"image_key": "incoming/a/b/photo", "callback_url": url})),
            host.http.post(&submit).json(&json!({"prompt": "What is a naevus?", "callback_url": url})),
            host.http.post(&submit).multipart(form),
        ] {
            let answer = request.send().await.unwrap();
            let (status, body) = (answer.status().as_u16(), answer.json::<Value>().await.unwrap());
            assert_eq!((status, &body["error"]["code"]), (422, &json!("callback_not_allowed")), "{url}: {body}");
        }
    }
    let jobs: Value = host.get("/results").await.json().await.unwrap();
    assert_eq!(jobs["results"], json!([]));
    // Without a list nobody is called, and the answer says what to do about it.
    let bare = Running::start(&[]).await;
    let request = bare.http.post(format!("{}/submit", bare.url)).header("content-type", "image/png");
    let answer = request.query_pair("callback_url", &receiver.url()).body(mole()).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 422);
    assert!(answer.text().await.unwrap().contains("WEBHOOK_HOSTS"));
    assert_eq!(receiver.received().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_url_under_the_same_key_is_another_request() {
    let receiver = Receiver::start(200).await;
    let host = running(&receiver).await;
    let submit = async |url: &str| {
        let request = host.http.post(format!("{}/submit?describe=false", host.url)).header("idempotency-key", "k");
        let request = request.header("content-type", "image/png").body(mole());
        let request = if url.is_empty() { request } else { request.query_pair("callback_url", url) };
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(submit(&receiver.url()).await, 202);
    assert_eq!(submit(&receiver.url()).await, 202);
    assert_eq!(submit("").await, 409);
    assert_eq!(submit(&format!("{}2", receiver.url())).await, 409);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_takes_its_time_holds_up_no_photo_and_no_other_receiver() {
    let (silent, quick) = (Receiver::start(0).await, Receiver::start(200).await);
    let hosts = format!("{},{}", silent.host(), quick.host());
    let host = Running::start(&variables(&hosts)).await;
    let began = std::time::Instant::now();
    for number in 0..20 {
        submit(&host, &silent, crate::support::numbered_mole(number)).await;
    }
    // On a busy machine the first have given up by then, and others wait.
    eventually("two wait for it", async || silent.received().len() >= 2).await;
    let id = submit(&host, &quick, mole()).await;
    told(&quick, &id).await;
    assert_eq!(host.run(&mole()).await["status"], "completed");
    // Ten seconds are what one request may take; before that nobody else is sent there.
    if began.elapsed() < Duration::from_secs(10) {
        assert_eq!(silent.received().len(), 2, "more than two at once");
    }
    // Who waited for a place is not counted as tried, and comes.
    silent.answer(200);
    within(Duration::from_secs(60), "all are told", async || due(host.folder.path()) == 0).await;
}

/// A host that does nothing by itself, by a clock that stands, with one job that has just ended.
struct Still {
    host: Host,
    clock: Clock,
    receiver: Receiver,
    id: Uuid,
    _folder: TempDir,
}

impl Still {
    async fn new(status: u16) -> Self {
        let (folder, clock) = (tempfile::tempdir().unwrap(), Clock::manual(Utc::now()));
        let receiver = Receiver::start(status).await;
        let host = open(folder.path(), clock.clone(), &variables(&receiver.host())).await;
        let callback_url = Some(host.submit.destinations.check(&receiver.url()).unwrap().into());
        let submission = Submission { image: mole(), describe: false, callback_url };
        let id = host.submit.accept(&Caller("local".into()), None, submission).await.unwrap();
        let deadline = clock.now() + host.config.policy.lease;
        host.inference.process(Message::Infer { id }, deadline, None).await;
        let it = Self { host, clock, receiver, id, _folder: folder };
        assert_eq!(it.job().await.dispatch, Some(Dispatch::Webhook));
        it
    }

    async fn job(&self) -> Job {
        let Some(Record::Job(job)) = self.host.store.get(self.id).await.unwrap() else { panic!("no job") };
        job
    }

    /// Until the next try.
    async fn wait(&self) -> TimeDelta {
        self.job().await.delivery().unwrap().not_before - self.clock.now()
    }

    async fn outcome(&self) -> Option<DeliveryOutcome> {
        self.job().await.delivery().unwrap().outcome
    }

    /// What the change feed does.
    async fn notify(&self) {
        self.host.notify.process(self.id, true).await.unwrap();
    }

    /// What the queue does with the next message, if one is visible; whether it was acknowledged.
    async fn work(&self) -> Option<bool> {
        let delivery = self.host.webhooks.receive(TimeDelta::minutes(1)).await.unwrap()?;
        let failures = self.host.webhook.handle(event(&delivery)).await.batch_item_failures;
        if failures.is_empty() {
            self.host.webhooks.acknowledge(&delivery.receipt).await.unwrap();
        }
        Some(failures.is_empty())
    }

    fn requests(&self) -> usize {
        self.receiver.received().len()
    }
}

/// As Lambda hands a message to the function.
pub fn event(delivery: &Delivery) -> SqsEvent {
    let mut message = SqsMessage::default();
    message.message_id = Some(delivery.id.clone());
    message.receipt_handle = Some(delivery.receipt.clone());
    message.body = Some(delivery.body.clone());
    message.attributes.insert("ApproximateReceiveCount".to_owned(), delivery.receive_count.to_string());
    let mut event = SqsEvent::default();
    event.records.push(message);
    event
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_fails_is_tried_for_a_day_under_one_id_and_then_becomes_a_dead_letter() {
    let it = Still::new(503).await;
    it.notify().await;
    let waits = [5, 300, 1800, 7200, 18_000, 36_000, 36_000];
    for (tries, wait) in (1..).zip(waits) {
        assert_eq!((it.work().await, it.requests()), (Some(false), tries));
        let left = it.wait().await;
        assert!((wait..=wait + wait / 10).contains(&left.num_seconds()), "{left} after try {tries}");
        // Not sooner, and nobody sends a second message meanwhile.
        it.clock.advance(left - TimeDelta::seconds(1));
        assert_eq!(it.work().await, None);
        let report = it.host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
        assert_eq!((report.marked, report.undelivered), (0, 0));
        it.clock.advance(TimeDelta::seconds(2));
    }
    assert_eq!(it.outcome().await, None);
    assert_eq!((it.work().await, it.requests()), (Some(true), MAX_TRIES as usize));
    assert_eq!((it.outcome().await, it.job().await.due_at), (Some(DeliveryOutcome::GivenUp), None));
    assert_eq!(it.work().await, None);
    assert_eq!(it.host.webhooks.depth().await.unwrap(), (0, 1));
    let received = it.receiver.received();
    assert!(received.iter().all(|it| it.id() == received[0].id() && it.body == received[0].body));
    let signatures: std::collections::BTreeSet<_> = received.iter().map(|it| it.header("webhook-signature")).collect();
    assert_eq!(signatures.len(), MAX_TRIES as usize, "each try is signed with its own time");
    // The receiver is back, and an operator sends the dead letter round.
    it.receiver.answer(200);
    assert_eq!(it.host.webhooks.redrive_dead_letters(None).await.unwrap(), 1);
    assert_eq!((it.work().await, it.outcome().await), (Some(true), Some(DeliveryOutcome::Delivered)));
    assert_eq!(it.receiver.received().last().unwrap().id(), received[0].id());
    assert_eq!(it.host.webhooks.depth().await.unwrap(), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn restarts_during_the_waits_change_nothing_of_the_schedule() {
    let it = Still::new(503).await;
    it.notify().await;
    for tries in 1..MAX_TRIES as usize {
        assert_eq!((it.work().await, it.requests()), (Some(false), tries));
        // As at every start of a host.
        for _ in 0..5 {
            it.host.webhooks.show_received().await.unwrap();
            assert_eq!(it.work().await, None, "after try {tries}");
        }
        it.clock.advance(it.wait().await + TimeDelta::seconds(1));
    }
    assert_eq!((it.work().await, it.requests()), (Some(true), MAX_TRIES as usize));
    assert_eq!((it.outcome().await, it.host.webhooks.depth().await.unwrap()), (Some(DeliveryOutcome::GivenUp), (0, 1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_comes_before_its_time_waits_for_the_rest_of_it() {
    let it = Still::new(503).await;
    it.notify().await;
    let delivery = it.host.webhooks.receive(TimeDelta::minutes(1)).await.unwrap().unwrap();
    // As from a queue that could not be told to hide it, or by a clock that is behind.
    for _ in 0..2 {
        let failures = it.host.webhook.handle(event(&delivery)).await.batch_item_failures;
        assert_eq!((failures.len(), it.requests()), (1, 1), "acknowledged, and gone");
    }
    it.receiver.answer(200);
    it.clock.advance(it.wait().await + TimeDelta::seconds(1));
    assert_eq!((it.work().await, it.outcome().await), (Some(true), Some(DeliveryOutcome::Delivered)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_says_when_to_come_again_and_that_nobody_need_come() {
    let it = Still::new(503).await;
    it.notify().await;
    // Sooner than it would be anyway, later, and later than anybody waits.
    for (said, least, most) in [("1", 5, 6), ("600", 600, 660), ("86400", 3600, 3960), ("Fri, 01 Jan 2100", 7200, 7920)]
    {
        it.receiver.ask_to_wait(said);
        assert_eq!(it.work().await, Some(false));
        let wait = it.wait().await.num_seconds();
        assert!((least..=most).contains(&wait), "{said}: {wait}");
        it.clock.advance(TimeDelta::seconds(wait + 1));
    }
    it.receiver.answer(410);
    assert_eq!((it.work().await, it.outcome().await), (Some(true), Some(DeliveryOutcome::GivenUp)));
    assert_eq!((it.job().await.due_at, it.host.webhooks.depth().await.unwrap()), (None, (0, 0)), "it wants no more");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_feed_lost_sweep_has_sent_and_a_second_message_sends_nothing() {
    let it = Still::new(200).await;
    it.clock.advance(it.host.config.policy.redispatch);
    assert_eq!(it.host.sweep.handle(EventBridgeEvent::default()).await.unwrap().marked, 1);
    it.notify().await;
    it.notify().await;
    assert_eq!(it.host.webhooks.depth().await.unwrap(), (2, 0));
    assert_eq!((it.work().await, it.requests()), (Some(true), 1));
    assert_eq!((it.work().await, it.requests()), (Some(true), 1), "a receiver that has it is not told again");
    // Nor does a late change send anything.
    it.notify().await;
    assert_eq!(it.work().await, None);
    assert_eq!(it.job().await.due_at, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_message_does_not_try_what_has_just_failed() {
    let it = Still::new(500).await;
    it.notify().await;
    it.notify().await;
    assert_eq!((it.work().await, it.requests()), (Some(false), 1));
    assert_eq!((it.work().await, it.requests()), (Some(true), 1));
    it.receiver.answer(200);
    it.clock.advance(TimeDelta::seconds(7));
    assert_eq!((it.work().await, it.requests()), (Some(true), 2));
    assert_eq!(it.outcome().await, Some(DeliveryOutcome::Delivered));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delivery_that_nobody_makes_is_given_up_after_three_days() {
    let it = Still::new(200).await;
    it.clock.advance(TimeDelta::days(3));
    let report = it.host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
    assert_eq!((report.undelivered, report.ended, report.marked), (1, 0, 0));
    assert_eq!((it.outcome().await, it.requests()), (Some(DeliveryOutcome::GivenUp), 0));
    // An operator finds it as any other that was given up, and sends it round.
    assert_eq!(it.host.webhooks.depth().await.unwrap(), (0, 1));
    assert_eq!(it.host.webhooks.redrive_dead_letters(None).await.unwrap(), 1);
    assert_eq!((it.work().await, it.outcome().await), (Some(true), Some(DeliveryOutcome::Delivered)));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_told_of_a_job_that_was_deleted() {
    let it = Still::new(200).await;
    it.notify().await;
    it.host.results.delete(&Caller("local".into()), &it.id.to_string()).await.unwrap();
    assert_eq!((it.work().await, it.requests()), (Some(true), 0));
    it.host.notify.process(it.id, true).await.unwrap();
    assert_eq!(it.work().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_of_another_queue_or_of_none_becomes_a_dead_letter() {
    let it = Still::new(200).await;
    it.host.webhooks.send(Message::Infer { id: it.id }).await.unwrap();
    it.host.webhooks.send_body("no message".into()).await.unwrap();
    // At once: no later look would make sense of it.
    assert_eq!((it.work().await, it.work().await), (Some(true), Some(true)));
    assert_eq!(it.work().await, None);
    assert_eq!((it.host.webhooks.depth().await.unwrap(), it.requests()), ((0, 2), 0));
    // And a delivery is none of inference's.
    let deadline = it.clock.now() + TimeDelta::minutes(1);
    let outcome = it.host.inference.process(Message::Deliver { id: it.id }, deadline, None).await;
    assert_eq!((outcome, it.requests()), (inference::Outcome::Again, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_the_url_nor_the_key_is_logged_and_no_proxy_is_asked() {
    let receiver = Receiver::start(500).await;
    let (folder, http, host) = (tempfile::tempdir().unwrap(), client(), receiver.host());
    let mut extra =
        vec![("LOG_LEVEL", "debug"), ("HTTP_PROXY", "http://127.0.0.1:1"), ("ALL_PROXY", "http://127.0.0.1:1")];
    extra.extend(variables(&host));
    let process = Process::start(folder.path(), &extra).await.unwrap();
    let request = http.post(format!("{}/submit", process.url)).header("content-type", "image/png");
    let answer = request.query_pair("callback_url", &receiver.url()).body(mole()).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 202);
    eventually("it was refused and is tried again", async || receiver.received().len() > 1).await;
    let log = process.log().join("\n");
    assert!(log.contains("webhook not delivered"), "{log}");
    for secret in ["token=mine", "/hook", &SECRET[6..]] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}
