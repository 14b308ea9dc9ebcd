//! A delete races every stage: afterwards nothing of the job is readable or on the disk, whatever a
//! worker writes late, and the others end.

mod hundreds;
mod submissions;
mod told;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use chrono::{TimeDelta, Utc};
use enrichment::Enrichment;
use futures_util::future::BoxFuture;
use inference::room::Room;
use inference::{Inference, Outcome};
use local::Host;
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
use uuid::Uuid;

use crate::kill::long_answer;
use crate::support::backlog::{self, PATIENCE};
use crate::support::interrupt::{Interrupt, Interrupted};
use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::{numbered_mole, open, within};

type Jobs = Interrupted<SqliteJobStore>;
type Queue = Interrupted<SqliteJobQueue>;
type Blobs = Interrupted<DirBlobStore>;

/// The handlers over interrupted ports, beside an ordinary host.
struct Bench {
    host: Host,
    interrupt: Interrupt,
    jobs: Jobs,
    queue: Queue,
    blobs: Blobs,
    inference: Arc<Inference<Jobs, Queue, Blobs>>,
    enrichment: Enrichment<Jobs, Blobs, Hub, Queue>,
    /// Where no LLM is set.
    offline: Enrichment<Jobs, Blobs, Hub, Queue>,
    sweep: Sweep<Jobs, Queue, Blobs>,
    photos: usize,
}

/// What a delete races.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Inference,
    /// Inference that describes by the template, in the same write.
    Describing,
    /// Inference of a photo that cannot be read: the claim is released.
    Release,
    Enrichment,
    /// Enrichment by the template, in one write.
    Offline,
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

const STAGES: [Stage; 10] = [
    Stage::Inference,
    Stage::Describing,
    Stage::Release,
    Stage::Enrichment,
    Stage::Offline,
    Stage::Defer,
    Stage::Answer,
    Stage::Refuse,
    Stage::SweepPending,
    Stage::SweepAwaiting,
];

impl Bench {
    async fn new(folder: &Path, llm: &LlmServer) -> Self {
        Self::with(folder, llm, &[]).await
    }

    async fn with(folder: &Path, llm: &LlmServer, extra: &[(&str, &str)]) -> Self {
        let base_url = llm.base_url();
        let llm_at = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")];
        let host = open(folder, Clock::manual(Utc::now()), &[&llm_at[..], extra].concat()).await;
        let interrupt = Interrupt::default();
        let jobs = Interrupted(host.store.clone(), interrupt.clone());
        let queue = Interrupted(host.queue.clone(), interrupt.clone());
        let blobs = Interrupted(host.blobs.clone(), interrupt.clone());
        let (clock, policy) = (host.clock.clone(), host.config.policy);
        let inference = Arc::new(Inference {
            jobs: jobs.clone(),
            queue: queue.clone(),
            blobs: blobs.clone(),
            cache: PredictionCache::memory(),
            cache_secret: vec![7; 32],
            model: Arc::clone(&host.model),
            template_describes: false,
            room: Room::new(1).unwrap(),
            clock: clock.clone(),
            policy,
        });
        let asking = |variables: &[(&str, &str)]| Enrichment {
            jobs: jobs.clone(),
            blobs: blobs.clone(),
            llm: Arc::new(Llm::from_env(&Env::of(variables.iter().copied())).unwrap()),
            push: Hub::default(),
            prompts: None,
            clock: clock.clone(),
            policy,
        };
        let (enrichment, offline) = (asking(&llm_at), asking(&[]));
        let sweep = Sweep::new(jobs.clone(), [queue.clone(), queue.clone()], blobs.clone(), clock.clone(), policy);
        Self { host, interrupt, jobs, queue, blobs, inference, enrichment, offline, sweep, photos: 0 }
    }

    async fn submit(&mut self) -> Job {
        self.submit_told(None).await
    }

    /// A photo whose end is to be told.
    async fn submit_told(&mut self, callback_url: Option<String>) -> Job {
        let submission = Submission { image: numbered_mole(self.photos), describe: true, callback_url };
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
        self.inference.process(Message::Infer { id }, until, None).await;
    }

    async fn describe(&self, id: Uuid) {
        let until = self.host.clock.now() + self.host.config.policy.lease;
        self.enrichment.process(id, until, None).await.unwrap();
    }

    /// A job that `stage` is about to work.
    async fn prepare(&mut self, stage: Stage) -> Job {
        if matches!(stage, Stage::Answer | Stage::Refuse) {
            return self.ask().await;
        }
        let job = self.submit().await;
        match stage {
            Stage::Inference | Stage::Describing | Stage::Answer | Stage::Refuse => {}
            Stage::Release => {
                let photo = self.host.config.data_dir.join("blobs").join(blob_prefix(job.id)).join("photo");
                std::fs::remove_file(&photo).unwrap();
                std::fs::create_dir(&photo).unwrap();
            }
            Stage::Enrichment | Stage::Offline | Stage::Defer => self.infer(job.id).await,
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
            Stage::Inference | Stage::Describing | Stage::Release => self.infer(id).await,
            Stage::Enrichment | Stage::Defer | Stage::Answer | Stage::Refuse => self.describe(id).await,
            Stage::Offline => {
                let until = self.host.clock.now() + self.host.config.policy.lease;
                self.offline.process(id, until, None).await.unwrap();
            }
            Stage::SweepPending | Stage::SweepAwaiting => {
                self.sweep.handle(EventBridgeEvent::default()).await.unwrap();
            }
        }
    }

    fn delete(&self, id: Uuid) -> BoxFuture<'static, ()> {
        let results = Arc::clone(&self.host.results);
        Box::pin(async move {
            results.delete(&Caller("local".into()), &id.to_string()).await.unwrap();
        })
    }

    /// Works, and deletes the job at this moment of it, or behind it; and whether it was meanwhile.
    async fn race<T>(&self, id: Uuid, moment: usize, work: impl Future<Output = T>) -> (T, bool) {
        self.interrupt.arm(moment, self.delete(id));
        let done = work.await;
        let is_over = self.interrupt.disarm();
        if is_over {
            self.delete(id).await;
        }
        (done, !is_over)
    }

    /// Everything that is still under way, late messages and changes included, and the sweeps behind
    /// the deletes.
    async fn settle(&self, ids: &[Uuid]) {
        for _ in 0..4 {
            for &id in ids {
                self.infer(id).await;
                self.describe(id).await;
            }
            self.host.clock.advance(TimeDelta::minutes(10));
            let report = self.host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
            assert_eq!(report.failed, 0, "{report:?}");
            while let Some(delivery) = self.host.queue.receive(TimeDelta::seconds(30)).await.unwrap() {
                let until = self.host.clock.now() + self.host.config.policy.lease;
                let outcome = self.inference.process(Message::decode(&delivery.body).unwrap(), until, None).await;
                assert_eq!(outcome, Outcome::Acknowledge, "{}", delivery.body);
                self.host.queue.acknowledge(&delivery.receipt).await.unwrap();
            }
        }
    }

    fn is_cache_empty(&self) -> bool {
        let PredictionCache::Memory(entries) = &self.inference.cache else { panic!() };
        entries.lock().unwrap().is_empty()
    }

    /// Nothing of the job is readable, on the disk, in the cache, or still to be done.
    async fn assert_gone(&self, job: &Job, what: &str) {
        self.assert_erased(job.id, what).await;
        assert!(self.is_cache_empty(), "{what}: cache");
        assert_eq!(self.host.queue.depth().await.unwrap(), (0, 0), "{what}: messages and dead letters");
        assert_unreadable(&self.host.config.data_dir, &[job.idempotency_key.clone().unwrap()], what);
    }

    /// The job is a tombstone with nothing ahead of it, and has no blobs.
    async fn assert_erased(&self, id: Uuid, what: &str) {
        let Some(Record::Tombstone(tombstone)) = self.host.store.get(id).await.unwrap() else {
            panic!("{what}: the job is back")
        };
        assert_eq!((tombstone.due_at, tombstone.cache_key), (None, None), "{what}: not settled");
        assert!(!self.host.config.data_dir.join("blobs").join(blob_prefix(id)).exists(), "{what}: photo");
    }

    /// Of hundreds that have settled nothing is left of those that were deleted, and the others have ended. Returns
    /// the others.
    async fn assert_only(self, deleted: &[Uuid], kept: Vec<Uuid>, what: &str) -> Vec<Job> {
        for &id in deleted {
            self.assert_erased(id, what).await;
        }
        for &id in &kept {
            let job = self.job(id).await.unwrap();
            self.inference.cache.remove(&job.cache_key.unwrap_or_default()).await;
        }
        assert!(self.is_cache_empty(), "{what}: the cache holds more than what was kept");
        assert_eq!(self.host.webhooks.depth().await.unwrap(), (0, 0), "{what}: messages and dead letters of webhooks");
        let data = self.host.config.data_dir.clone();
        drop(self);
        let jobs = rusqlite::Connection::open(data.join("jobs.sqlite")).unwrap();
        let count = |sql: &str| jobs.query_row(sql, [], |row| row.get::<_, usize>(0)).unwrap();
        assert_eq!(count("SELECT count(*) FROM idempotency"), kept.len(), "{what}: keys");
        backlog::ended_once(&data, kept, what).await
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
    let mut races = Vec::new();
    for stage in STAGES {
        Arc::get_mut(&mut bench.inference).unwrap().template_describes = stage == Stage::Describing;
        llm.behave(match stage {
            Stage::Defer => Behaviour::Status(503, Some(600)),
            Stage::Answer => Behaviour::Answer(long_answer()),
            Stage::Refuse => Behaviour::Status(400, None),
            _ => Behaviour::After(Duration::ZERO),
        });
        for moment in 0.. {
            let what = format!("{stage:?}, moment {moment}");
            let job = bench.prepare(stage).await;
            let ((), meanwhile) = bench.race(job.id, moment, bench.work(stage, job.id)).await;
            assert!(bench.job(job.id).await.is_none(), "{what}: a stale worker wrote over the tombstone");
            bench.settle(&[job.id]).await;
            bench.assert_gone(&job, &what).await;
            if !meanwhile {
                // The stage was over before: that was the delete behind it.
                races.push((stage, moment));
                break;
            }
        }
    }
    // Two moments a call: get, claim, photo, finish; get, claim, finish; get, finish; get, claim, prompt,
    // answer, finish; due, write, send, list.
    let moments = |stage| races.iter().find(|(raced, _)| *raced == stage).unwrap().1;
    assert!(moments(Stage::Inference) >= 8 && moments(Stage::Describing) == moments(Stage::Inference));
    assert!(moments(Stage::Enrichment) >= 6 && moments(Stage::SweepPending) >= 8);
    assert!(moments(Stage::Answer) >= 10 && moments(Stage::Refuse) >= 8 && moments(Stage::Offline) >= 4);
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
        bench.delete(job.id).await;
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
        bench.settle(&[job.id]).await;
    }
    assert!(ordered > 0, "the order was never seen");
}

/// What a worker puts into the cache when the order to forget it has been carried out already.
#[tokio::test]
async fn an_order_to_forget_that_comes_before_the_entry_is_not_the_last() {
    let (folder, llm) = (tempfile::tempdir().unwrap(), LlmServer::start([]).await);
    let mut bench = Bench::new(folder.path(), &llm).await;
    let mut late = 0;
    for moment in 0.. {
        let job = bench.prepare(Stage::Inference).await;
        let (id, delete, inference) = (job.id, bench.delete(job.id), Arc::clone(&bench.inference));
        let until = bench.host.clock.now() + bench.host.config.policy.lease;
        bench.interrupt.arm(moment, async move {
            delete.await;
            assert_eq!(inference.process(Message::Forget { id }, until, None).await, Outcome::Acknowledge);
        });
        bench.infer(id).await;
        if bench.interrupt.disarm() {
            break;
        }
        late += u32::from(!bench.is_cache_empty());
        bench.settle(&[id]).await;
        bench.assert_gone(&job, &format!("moment {moment}")).await;
    }
    assert!(late > 0, "no entry was written behind the order");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_while_the_llm_answers_leaves_nothing_of_the_answer() {
    let (folder, llm) = (tempfile::tempdir().unwrap(), LlmServer::start([]).await);
    let mut bench = Bench::new(folder.path(), &llm).await;
    llm.behave(Behaviour::After(Duration::from_secs(1)));
    let job = bench.prepare(Stage::Enrichment).await;
    let delete = async {
        within(PATIENCE, "the LLM is asked", async || llm.calls() == 1).await;
        bench.delete(job.id).await;
    };
    tokio::join!(bench.describe(job.id), delete);
    bench.settle(&[job.id]).await;
    bench.assert_gone(&job, "while the LLM answers").await;
    assert_eq!(llm.calls(), 1, "a deleted job is described no more");
}

/// So late that the last sweep behind the delete has been before it.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_comes_when_its_lease_is_over_is_not_stored() {
    let (folder, llm) = (tempfile::tempdir().unwrap(), LlmServer::start([]).await);
    let mut bench = Bench::new(folder.path(), &llm).await;
    llm.behave(Behaviour::Late(Duration::from_secs(3), long_answer()));
    let job = bench.prepare(Stage::Answer).await;
    let is_answered = AtomicBool::new(false);
    let describe = async {
        bench.describe(job.id).await;
        is_answered.store(true, Ordering::SeqCst);
    };
    let delete = async {
        within(PATIENCE, "the LLM is asked", async || llm.calls() == 1).await;
        bench.delete(job.id).await;
        bench.settle(&[]).await;
        assert!(!is_answered.load(Ordering::SeqCst), "the answer came before the last sweep");
    };
    tokio::join!(describe, delete);
    bench.assert_gone(&job, "behind the lease").await;
}
