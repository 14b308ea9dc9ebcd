//! A delete races the telling of a job's end: from the change to the queue, and from there to the receiver.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use axum::extract::State;
use axum::http::StatusCode;
use axum::{Json, Router};
use chrono::TimeDelta;
use notify::Notify;
use serde_json::Value;
use shared::config::Env;
use shared::embedded::Hub;
use shared::job::{Dispatch, Job, Record, Status};
use shared::ports::{JobQueue, JobStore};
use tokio::net::TcpListener;
use uuid::Uuid;
use webhook::courier::Courier;
use webhook::{MAX_TRIES, Webhook};

use super::{Bench, Jobs, Queue, Stage};
use crate::support::backlog::JOBS;
use crate::support::interrupt::Interrupted;
use crate::support::llm_server::LlmServer;
use crate::webhooks::{event, variables};

/// What a delete races.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// From the change to the queue.
    Notify,
    /// From the queue to a receiver that answers so.
    Deliver(u16),
    /// The same, by the last try, which the receiver does not take.
    Last,
}

/// Each with the moments of it, two a call: get, send; get, the receiver's look, write; the same and hide; get, look,
/// bury, write.
const STEPS: [(Step, usize); 4] =
    [(Step::Notify, 4), (Step::Deliver(200), 6), (Step::Deliver(503), 8), (Step::Last, 8)];

/// Looks a job up while it is told of it, over the bench's ports: a delete may come then.
#[derive(Clone)]
struct Receiver {
    jobs: Jobs,
    /// What it answers.
    status: Arc<AtomicU16>,
    /// The jobs that it was told of.
    told: Arc<Mutex<Vec<Uuid>>>,
}

async fn take(State(receiver): State<Receiver>, Json(event): Json<Value>) -> StatusCode {
    let id: Uuid = event["data"]["request_id"].as_str().unwrap().parse().unwrap();
    receiver.told.lock().unwrap().push(id);
    receiver.jobs.get(id).await.unwrap();
    StatusCode::from_u16(receiver.status.load(Ordering::SeqCst)).unwrap()
}

/// The bench with what tells, and who is told.
struct Scene {
    bench: Bench,
    notify: Notify<Jobs, Hub, Hub, Queue>,
    webhook: Webhook<Jobs, Queue>,
    receiver: Receiver,
    callback_url: String,
}

impl Scene {
    async fn set(folder: &Path, llm: &LlmServer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let allowed = variables(&address);
        let bench = Bench::with(folder, llm, &allowed).await;
        let receiver = Receiver { jobs: bench.jobs.clone(), status: Arc::default(), told: Arc::default() };
        let router = Router::new().fallback(take).with_state(receiver.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        let callback_url = bench.host.submit.destinations.check(&format!("http://{address}/hook")).unwrap().into();
        let queue = Interrupted(bench.host.webhooks.clone(), bench.interrupt.clone());
        let (jobs, hub) = (bench.jobs.clone(), Hub::default());
        let notify = Notify { jobs: jobs.clone(), connections: hub.clone(), push: hub, webhooks: queue.clone() };
        let courier = Courier::from_env(&Env::of(allowed)).unwrap();
        let (clock, policy) = (bench.host.clock.clone(), bench.host.config.policy);
        let webhook = Webhook { jobs, queue, courier, clock, policy };
        Self { bench, notify, webhook, receiver, callback_url }
    }

    /// A job that has ended, and whose end is still to be told.
    async fn ended(&mut self) -> Job {
        let id = self.bench.submit_told(Some(self.callback_url.clone())).await.id;
        self.bench.infer(id).await;
        self.bench.work(Stage::Offline, id).await;
        let job = self.bench.job(id).await.unwrap();
        assert_eq!((job.status, job.dispatch), (Status::Completed, Some(Dispatch::Webhook)));
        job
    }

    /// All is done for this job that comes before the step.
    async fn prepare(&self, step: Step, job: &Job) {
        let status = if step == Step::Deliver(200) { 200 } else { 503 };
        self.receiver.status.store(status, Ordering::SeqCst);
        if step == Step::Last {
            let mut tried = Job { version: job.version + 1, ..job.clone() };
            tried.callback.as_mut().unwrap().delivery.as_mut().unwrap().tries = MAX_TRIES - 1;
            assert!(self.bench.host.store.replace(job.fence(), &Record::Job(tried)).await.unwrap());
        }
        if step != Step::Notify {
            self.change(job.id).await;
        }
    }

    /// What the change feed does with the write that ended the job.
    async fn change(&self, id: Uuid) {
        self.notify.process(id, true).await.unwrap();
    }

    /// Works the next message, if one can be seen; whether it was acknowledged.
    async fn message(&self) -> Option<bool> {
        let queue = &self.bench.host.webhooks;
        let delivery = queue.receive(TimeDelta::minutes(1)).await.unwrap()?;
        let acknowledged = self.webhook.handle(event(&delivery)).await.batch_item_failures.is_empty();
        if acknowledged {
            queue.acknowledge(&delivery.receipt).await.unwrap();
        }
        Some(acknowledged)
    }

    /// Whether nothing of it must come back.
    async fn work(&self, step: Step, id: Uuid) -> bool {
        match step {
            Step::Notify => {
                self.change(id).await;
                true
            }
            Step::Deliver(_) | Step::Last => self.message().await.unwrap(),
        }
    }

    fn told(&self, id: Uuid) -> usize {
        self.receiver.told.lock().unwrap().iter().filter(|told| **told == id).count()
    }
}

#[tokio::test]
async fn of_hundreds_deleted_while_they_are_told_nobody_is_told_twice_or_behind_the_delete() {
    let (folder, llm) = (tempfile::tempdir().unwrap(), LlmServer::start([]).await);
    let mut scene = Scene::set(folder.path(), &llm).await;
    // The last moment of each lies behind it.
    let races = STEPS.iter().flat_map(|&(step, moments)| (0..=moments).map(move |moment| (step, moment)));
    let races: Vec<(Step, usize)> = races.collect();
    let (mut deleted, mut kept) = (Vec::new(), Vec::new());
    let (mut met, mut begun, mut given_up) = (BTreeSet::new(), 0, 0);
    for number in 0..JOBS {
        let job = scene.ended().await;
        let Some(&(step, moment)) = races.get(number % (races.len() + 1)) else {
            scene.prepare(Step::Deliver(200), &job).await;
            assert_eq!((scene.message().await, scene.told(job.id)), (Some(true), 1));
            kept.push(job.id);
            continue;
        };
        let what = format!("{step:?}, moment {moment}");
        scene.prepare(step, &job).await;
        let work = scene.work(step, job.id);
        let (acknowledged, meanwhile) = scene.bench.race(job.id, moment, work).await;
        if meanwhile {
            met.insert((step, moment));
        }
        // What has begun before the delete goes on, once; what it comes to is written nowhere.
        let is_begun = step != Step::Notify && moment > 0;
        let is_postponed = step == Step::Deliver(503) && moment > 4;
        assert_eq!((scene.told(job.id), acknowledged), (usize::from(is_begun), !is_postponed), "{what}");
        begun += usize::from(is_begun);
        given_up += u64::from(is_begun && step == Step::Last);
        // The change comes again, and what it may have sent.
        scene.change(job.id).await;
        while scene.message().await.is_some() {}
        deleted.push(job.id);
    }
    assert!(met.len() >= 26, "{met:?}");
    scene.receiver.status.store(200, Ordering::SeqCst);
    scene.bench.settle(&[&deleted[..], &kept].concat()).await;
    // The last try leaves its dead letter before its end. An operator sends it round, and it does nothing.
    assert_eq!(scene.bench.host.webhooks.redrive_dead_letters(None).await.unwrap(), given_up);
    while let Some(acknowledged) = scene.message().await {
        assert!(acknowledged, "a message of a deleted job comes back");
    }
    let told = scene.receiver.told.lock().unwrap().len();
    assert_eq!((told, llm.calls()), (begun + kept.len(), 0));
    scene.bench.assert_only(&deleted, kept, "told").await;
}
