//! A delete races every stage: afterwards nothing of the job is readable or on the disk, whatever a
//! worker writes late, and the others end.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use chrono::{TimeDelta, Utc};
use enrichment::Enrichment;
use inference::Inference;
use inference::room::Room;
use local::Host;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use shared::api::chat::{ChatMessage, Role};
use shared::api::prompt::{AnswerFormat, PromptRequest};
use shared::cache::PredictionCache;
use shared::clock::Clock;
use shared::config::Env;
use shared::embedded::{DirBlobStore, Hub, SqliteJobQueue, SqliteJobStore};
use shared::http::Caller;
use shared::job::{Job, Record, blob_prefix};
use shared::llm::Llm;
use shared::message::Message;
use shared::ports::JobStore;
use submit::Submission;
use sweep::Sweep;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::kill::long_answer;
use crate::support::backlog::{self, JOBS, PATIENCE};
use crate::support::interrupt::{Interrupt, Interrupted};
use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::Process;
use crate::support::redis_server::Redis;
use crate::support::{client, numbered_mole, open, submit, within};

/// The handlers over interrupted ports, beside an ordinary host.
struct Bench {
    host: Host,
    interrupt: Interrupt,
    inference: Inference<Interrupted<SqliteJobStore>, Interrupted<SqliteJobQueue>, Interrupted<DirBlobStore>>,
    enrichment: Enrichment<Interrupted<SqliteJobStore>, Interrupted<DirBlobStore>, Hub>,
    sweep: Sweep<Interrupted<SqliteJobStore>, Interrupted<SqliteJobQueue>, Interrupted<DirBlobStore>>,
    photos: usize,
}

/// What a delete races.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Inference,
    /// Inference of a photo that cannot be read: the claim is released.
    Release,
    Enrichment,
    /// An LLM that is down: the claim is deferred.
    Defer,
    /// Enrichment of a prompt, whose answer is a blob.
    Answer,
    /// The same, and the LLM refuses.
    Refuse,
    /// Sweep that sends a lost message again.
    SweepPending,
    /// Sweep that marks for the feed again.
    SweepAwaiting,
}

const STAGES: [Stage; 8] = [
    Stage::Inference,
    Stage::Release,
    Stage::Enrichment,
    Stage::Defer,
    Stage::Answer,
    Stage::Refuse,
    Stage::SweepPending,
    Stage::SweepAwaiting,
];

impl Bench {
    async fn new(folder: &Path, llm: &LlmServer) -> Self {
        let base_url = llm.base_url();
        let settings = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")];
        let host = open(folder, Clock::manual(Utc::now()), &settings).await;
        let interrupt = Interrupt::default();
        let jobs = Interrupted(host.store.clone(), interrupt.clone());
        let queue = Interrupted(host.queue.clone(), interrupt.clone());
        let blobs = Interrupted(host.blobs.clone(), interrupt.clone());
        let (clock, policy) = (host.clock.clone(), host.config.policy);
        let inference = Inference {
            jobs: jobs.clone(),
            queue: queue.clone(),
            blobs: blobs.clone(),
            cache: PredictionCache::memory(),
            cache_secret: vec![7; 32],
            model: Arc::clone(&host.model),
            room: Room::new(1).unwrap(),
            clock: clock.clone(),
            policy,
        };
        let env = Env::of(settings);
        let llm = Llm::from_env(&env).unwrap().into();
        let enrichment = Enrichment {
            jobs: jobs.clone(),
            blobs: blobs.clone(),
            llm,
            push: Hub::default(),
            clock: clock.clone(),
            policy,
        };
        let sweep = Sweep::new(jobs, [queue.clone(), queue], blobs, clock, policy);
        Self { host, interrupt, inference, enrichment, sweep, photos: 0 }
    }

    async fn submit(&mut self) -> Job {
        let submission = Submission { image: numbered_mole(self.photos), describe: true, callback_url: None };
        let key = key_of(self.photos);
        self.photos += 1;
        let id = self.host.submit.accept(&Caller("local".into()), Some(key), submission).await.unwrap();
        self.job(id).await.unwrap()
    }

    async fn ask(&mut self) -> Job {
        let message = ChatMessage { role: Role::User, content: "What is a naevus?".into() };
        let (max_tokens, temperature, format) = (None, None, AnswerFormat::Text);
        let request = PromptRequest { messages: vec![message], max_tokens, temperature, format };
        let key = key_of(self.photos);
        self.photos += 1;
        let id = self.host.submit.accept_prompt(&Caller("local".into()), Some(key), &request, None).await.unwrap();
        self.job(id).await.unwrap()
    }

    async fn job(&self, id: Uuid) -> Option<Job> {
        self.host.store.get(id).await.unwrap().and_then(Record::into_job)
    }

    async fn infer(&self, id: Uuid) {
        let until = self.host.clock.now() + self.host.config.policy.lease;
        self.inference.process(Message::Infer { id }, until).await;
    }

    async fn describe(&self, id: Uuid) {
        let until = self.host.clock.now() + self.host.config.policy.lease;
        self.enrichment.process(id, until).await.unwrap();
    }

    /// A job that `stage` is about to work.
    async fn prepare(&mut self, stage: Stage) -> Job {
        if matches!(stage, Stage::Answer | Stage::Refuse) {
            return self.ask().await;
        }
        let job = self.submit().await;
        match stage {
            Stage::Inference | Stage::Answer | Stage::Refuse => {}
            Stage::Release => {
                let photo = self.host.config.data_dir.join("blobs").join(blob_prefix(job.id)).join("photo");
                std::fs::remove_file(&photo).unwrap();
                std::fs::create_dir(&photo).unwrap();
            }
            Stage::Enrichment | Stage::Defer => self.infer(job.id).await,
            Stage::SweepPending => self.host.clock.advance(TimeDelta::seconds(121)),
            Stage::SweepAwaiting => {
                self.infer(job.id).await;
                self.host.clock.advance(TimeDelta::seconds(121));
            }
        }
        job
    }

    async fn work(&self, stage: Stage, id: Uuid) {
        match stage {
            Stage::Inference | Stage::Release => self.infer(id).await,
            Stage::Enrichment | Stage::Defer | Stage::Answer | Stage::Refuse => self.describe(id).await,
            Stage::SweepPending | Stage::SweepAwaiting => {
                self.sweep.handle(EventBridgeEvent::default()).await.unwrap();
            }
        }
    }

    /// Everything that is still under way, late messages and changes included, and the sweeps behind
    /// the delete.
    async fn settle(&self, id: Uuid) {
        for _ in 0..4 {
            self.infer(id).await;
            self.describe(id).await;
            self.host.clock.advance(TimeDelta::minutes(10));
            self.host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
            while let Some(delivery) = self.host.queue.receive(TimeDelta::seconds(30)).await.unwrap() {
                let until = self.host.clock.now() + self.host.config.policy.lease;
                self.inference.process(Message::decode(&delivery.body).unwrap(), until).await;
                self.host.queue.acknowledge(&delivery.receipt).await.unwrap();
            }
        }
    }

    /// Nothing of the job is readable, on the disk, in the cache, or still to be done.
    async fn assert_gone(&self, job: &Job, what: &str) {
        let Some(Record::Tombstone(tombstone)) = self.host.store.get(job.id).await.unwrap() else {
            panic!("{what}: the job is back")
        };
        assert_eq!((tombstone.due_at, tombstone.cache_key), (None, None), "{what}: not settled");
        assert!(!self.host.config.data_dir.join("blobs").join(blob_prefix(job.id)).exists(), "{what}: photo");
        let PredictionCache::Memory(entries) = &self.inference.cache else { panic!() };
        assert!(entries.lock().unwrap().is_empty(), "{what}: cache");
        assert_unreadable(&self.host.config.data_dir, &[job.idempotency_key.clone().unwrap()], what);
    }
}

/// What marks a job's record and its idempotency item on the disk.
fn key_of(photo: usize) -> String {
    format!("the key of photo {photo:03}")
}

/// No file holds the deleted keys, and with them any of the records' rows.
fn assert_unreadable(data: &Path, keys: &[String], what: &str) {
    for file in ["jobs.sqlite", "jobs.sqlite-wal", "queue.sqlite", "queue.sqlite-wal"] {
        let bytes = std::fs::read(data.join(file)).unwrap_or_default();
        for key in keys {
            let found = bytes.windows(key.len()).any(|window| window == key.as_bytes());
            assert!(!found, "{what}: {key} is still in {file}");
        }
    }
}

#[tokio::test]
async fn a_delete_at_any_moment_of_any_stage_leaves_nothing_and_nothing_comes_back() {
    let (folder, llm) = (tempfile::tempdir().unwrap(), LlmServer::start([]).await);
    let mut bench = Bench::new(folder.path(), &llm).await;
    let (mut races, results) = (Vec::new(), Arc::clone(&bench.host.results));
    for stage in STAGES {
        llm.behave(match stage {
            Stage::Defer => Behaviour::Status(503, Some(600)),
            Stage::Answer => Behaviour::Answer(long_answer()),
            Stage::Refuse => Behaviour::Status(400, None),
            _ => Behaviour::After(Duration::ZERO),
        });
        for moment in 0.. {
            let what = format!("{stage:?}, moment {moment}");
            let job = bench.prepare(stage).await;
            let (results, id) = (Arc::clone(&results), job.id);
            bench.interrupt.arm(moment, async move {
                results.delete(&Caller("local".into()), &id.to_string()).await.unwrap();
            });
            bench.work(stage, id).await;
            if bench.interrupt.disarm() {
                // The stage was over before: this is the delete behind it.
                bench.host.results.delete(&Caller("local".into()), &id.to_string()).await.unwrap();
                bench.settle(id).await;
                bench.assert_gone(&job, &what).await;
                races.push((stage, moment));
                break;
            }
            assert!(bench.job(id).await.is_none(), "{what}: a stale worker wrote over the tombstone");
            bench.settle(id).await;
            bench.assert_gone(&job, &what).await;
        }
    }
    // Two moments a call: get, claim, photo, finish; get, claim, finish; get, claim, prompt, answer,
    // finish; due, write, send, list.
    let moments = |stage| races.iter().find(|(raced, _)| *raced == stage).unwrap().1;
    assert!(moments(Stage::Inference) >= 8 && moments(Stage::Enrichment) >= 6 && moments(Stage::SweepPending) >= 8);
    assert!(moments(Stage::Answer) >= 10 && moments(Stage::Refuse) >= 8);
    println!("moments of a delete: {races:?}");
}

/// What inference reads when it gets an order, and writes only after sweep has gone on.
#[tokio::test]
async fn sweep_never_takes_the_confirmation_of_its_own_order() {
    let (folder, llm) = (tempfile::tempdir().unwrap(), LlmServer::start([]).await);
    let mut bench = Bench::new(folder.path(), &llm).await;
    let mut ordered = 0;
    for moment in 0.. {
        let job = bench.prepare(Stage::Enrichment).await;
        bench.host.results.delete(&Caller("local".into()), &job.id.to_string()).await.unwrap();
        let (queue, store) = (bench.host.queue.clone(), bench.host.store.clone());
        while let Some(early) = queue.receive(TimeDelta::seconds(30)).await.unwrap() {
            queue.acknowledge(&early.receipt).await.unwrap();
        }
        bench.host.clock.advance(TimeDelta::seconds(121));

        let (sender, read) = std::sync::mpsc::channel();
        bench.interrupt.arm(moment, async move {
            let Some(order) = queue.receive(TimeDelta::seconds(30)).await.unwrap() else { return };
            queue.acknowledge(&order.receipt).await.unwrap();
            let Some(Record::Tombstone(tombstone)) = store.get(job.id).await.unwrap() else { return };
            sender.send(tombstone).unwrap();
        });
        bench.sweep.handle(EventBridgeEvent::default()).await.unwrap();
        if bench.interrupt.disarm() {
            break;
        }
        if let Ok(tombstone) = read.try_recv() {
            let forgotten = tombstone.forgotten(bench.host.clock.now()).unwrap();
            let fence = Record::Tombstone(tombstone).fence();
            let heeded = bench.host.store.replace(fence, &Record::Tombstone(forgotten)).await.unwrap();
            assert!(heeded, "moment {moment}: the order would have to be sent again");
            ordered += 1;
        }
        bench.settle(job.id).await;
    }
    assert!(ordered > 0, "the order was never seen");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_while_the_llm_answers_leaves_nothing_of_the_answer() {
    let (folder, llm) = (tempfile::tempdir().unwrap(), LlmServer::start([]).await);
    let mut bench = Bench::new(folder.path(), &llm).await;
    llm.behave(Behaviour::After(Duration::from_secs(1)));
    let job = bench.prepare(Stage::Enrichment).await;
    let delete = async {
        within(PATIENCE, "the LLM is asked", async || llm.calls() == 1).await;
        bench.host.results.delete(&Caller("local".into()), &job.id.to_string()).await.unwrap();
    };
    tokio::join!(bench.describe(job.id), delete);
    bench.settle(job.id).await;
    bench.assert_gone(&job, "while the LLM answers").await;
    assert_eq!(llm.calls(), 1, "a deleted job is described no more");
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_deleted_at_random_moments_are_gone_and_the_others_end() {
    let (folder, http, llm, redis) =
        (tempfile::tempdir().unwrap(), client(), LlmServer::start([]).await, Redis::start(None));
    llm.behave(Behaviour::After(Duration::from_millis(200)));
    let (base_url, redis_url) = (llm.base_url(), redis.url());
    let extra = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("REDIS_URL", &redis_url)];
    let host = Process::start(folder.path(), &[&extra[..], &[("LEASE_SECONDS", "20")]].concat()).await.unwrap();
    let (mut random, mut deletes) = (SmallRng::seed_from_u64(5), JoinSet::new());
    let (mut deleted, mut kept, mut doomed) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..JOBS {
        let key = key_of(number);
        let id: Uuid = submit(&http, &host.url, &numbered_mole(number), Some(&key)).await.unwrap().parse().unwrap();
        if random.random_bool(0.4) {
            kept.push(id);
            continue;
        }
        // From at once to long after: every stage and what lies between is met.
        let pause = Duration::from_millis(if random.random_bool(0.2) { 0 } else { random.random_range(0..15_000) });
        let (http, url) = (http.clone(), format!("{}/result/{id}", host.url));
        deletes.spawn(async move {
            tokio::time::sleep(pause).await;
            assert_eq!(http.delete(&url).send().await.unwrap().status().as_u16(), 204);
            assert_eq!(http.get(&url).send().await.unwrap().status().as_u16(), 404, "readable after the delete");
        });
        deleted.push(id);
        doomed.push(key);
    }
    assert!(deleted.len() > 200, "{}", deleted.len());
    deletes.join_all().await;
    within(PATIENCE, "nothing is left to do", async || backlog::is_quiet(folder.path())).await;
    assert_eq!(redis.keys().len(), kept.len(), "one cache entry a job that is kept");
    assert!(host.terminate().await.success());
    let jobs = backlog::ended_once(folder.path(), kept, "deletes").await;
    assert!(jobs.iter().all(|job| (job.attempts.inference, job.attempts.enrichment) == (1, 1)));
    assert_unreadable(folder.path(), &doomed, "deletes");
}
