//! At least once and in no order: what queue and feed promise, and no more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use chrono::{TimeDelta, Utc};
use enrichment::Enrichment;
use inference::Outcome;
use local::Host;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use shared::clock::Clock;
use shared::config::Env;
use shared::embedded::SqliteJobQueue;
use shared::http::Caller;
use shared::job::{Attempts, Record, Tombstone};
use shared::llm::Llm;
use shared::message::Message;
use shared::ports::{JobQueue, JobStore};
use submit::Submission;
use sweep::Report;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::backlog::{self, JOBS, PATIENCE};
use crate::support::llm_server::LlmServer;
use crate::support::{Running, eventually, mole, numbered_mole, open, standing, within};

/// Delivers the change of every job again and again, twice a round and in another order, before it is due and
/// while the host works it.
fn deliver_again(host: &Host, ids: &[Uuid], variables: &[(&str, &str)]) -> JoinSet<()> {
    let (store, clock, policy) = (host.store.clone(), host.clock.clone(), host.config.policy);
    let llm = Llm::from_env(&Env::of(variables.iter().copied())).unwrap().into();
    let enrichment = Enrichment {
        jobs: store,
        blobs: host.blobs.clone(),
        llm,
        push: host.hub.clone(),
        prompts: None::<SqliteJobQueue>,
        clock: clock.clone(),
        policy,
    };
    let mut twice = [ids, ids].concat();
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut random = SmallRng::seed_from_u64(4);
        loop {
            twice.shuffle(&mut random);
            for some in twice.chunks(100) {
                let until = clock.now() + policy.lease;
                let deliveries = some.iter().map(|&id| enrichment.process(id, until, None));
                for delivered in futures_util::future::join_all(deliveries).await {
                    delivered.unwrap();
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
    });
    task
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_and_changes_doubled_and_shuffled_end_every_job_once() {
    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let folder = tempfile::tempdir().unwrap();
    let extra = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("INFERENCE_WORKERS", "4")];
    let host = open(folder.path(), Clock::System, &extra).await;
    let ids = backlog::accept(&host, JOBS).await;
    // Out of order: the first messages go, and all come back shuffled, each twice, some thrice.
    taken(&host).await;
    let mut messages = [&ids[..], &ids, &ids[..JOBS / 5]].concat();
    messages.shuffle(&mut SmallRng::seed_from_u64(3));
    for &id in &messages {
        host.queue.send(Message::Infer { id }).await.unwrap();
    }
    let again = deliver_again(&host, &ids, &extra[..2]);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(host.run(async { stopped.await.unwrap_or(()) }, |_| {}));
    within(PATIENCE, "nothing is left to do", async || backlog::is_quiet(folder.path())).await;
    drop(again);
    drop(stop);
    running.await.unwrap().unwrap();

    let jobs = backlog::ended_once(folder.path(), ids, "doubled and shuffled").await;
    let mut claimed = BTreeMap::new();
    for job in &jobs {
        assert_eq!(job.attempts, Attempts { inference: 1, enrichment: 1 }, "{}", job.id);
        // Created, claimed, read, claimed, described: no write more.
        assert_eq!((job.version, job.llm_calls.len()), (5, 1), "{}", job.id);
        claimed.insert(job.timings_ms.queued.unwrap().to_bits(), job.id);
    }
    assert!(!claimed.values().is_sorted(), "the messages came in order");
    assert_eq!(llm.calls(), JOBS, "nothing was described twice");
}

/// Takes the bodies out of the queue, in their own order; nobody works them.
async fn taken(host: &Host) -> Vec<String> {
    let mut bodies = Vec::new();
    while let Some(delivery) = host.queue.receive(TimeDelta::seconds(30)).await.unwrap() {
        host.queue.acknowledge(&delivery.receipt).await.unwrap();
        bodies.push(delivery.body);
    }
    bodies.sort();
    bodies
}

/// Delivers each of these to inference twice, in no order and all at once.
async fn deliver_twice(host: &Arc<Host>, messages: &[Message], random: &mut SmallRng) {
    let mut twice = [messages, messages].concat();
    twice.shuffle(random);
    let mut deliveries = JoinSet::new();
    for message in twice {
        let (host, until) = (Arc::clone(host), host.clock.now() + host.config.policy.lease);
        deliveries.spawn(async move {
            assert_eq!(host.inference.process(message, until, None).await, Outcome::Acknowledge, "{message:?}");
        });
    }
    deliveries.join_all().await;
}

async fn tombstone(host: &Host, id: Uuid) -> Tombstone {
    let Some(Record::Tombstone(tombstone)) = host.store.get(id).await.unwrap() else { panic!("{id} is back") };
    tombstone
}

/// Jobs on the same photo of the same caller share an entry: it goes with the first of them that is deleted, and what
/// the others say is in their records.
#[tokio::test(flavor = "multi_thread")]
async fn orders_to_forget_doubled_and_shuffled_erase_what_was_deleted_and_nothing_else() {
    let (folder, clock) = (tempfile::tempdir().unwrap(), Clock::manual(Utc::now()));
    let host = Arc::new(open(folder.path(), clock.clone(), &[("INFERENCE_WORKERS", "4")]).await);
    let (caller, lease, mut random) = (Caller("local".into()), host.config.policy.lease, SmallRng::seed_from_u64(6));
    let submit = async |photo: usize| {
        let submission = Submission { image: numbered_mole(photo), describe: true, callback_url: None };
        host.submit.accept(&caller, None, submission).await.unwrap()
    };
    let cache_key = async |id: Uuid| {
        let job = host.store.get(id).await.unwrap().and_then(Record::into_job);
        job.and_then(|job| job.cache_key)
    };
    let is_cached = async |key: &str| host.inference.cache.get(key).await.is_some();
    let sweep = async || host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
    // Two jobs on each photo, of which one in four is not read yet when the deletes come.
    let is_read = |photo: &usize| !photo.is_multiple_of(4);
    let mut pairs: Vec<[Uuid; 2]> = Vec::new();
    for photo in 0..JOBS / 2 {
        pairs.push([submit(photo).await, submit(photo).await]);
    }
    taken(&host).await;
    let read = (0..pairs.len()).filter(is_read).flat_map(|photo| pairs[photo]).map(|id| Message::Infer { id });
    deliver_twice(&host, &read.collect::<Vec<_>>(), &mut random).await;
    let mut keys = BTreeMap::new();
    for photo in (0..pairs.len()).filter(is_read) {
        let key = cache_key(pairs[photo][0]).await.unwrap();
        assert_eq!(cache_key(pairs[photo][1]).await.as_ref(), Some(&key), "photo {photo}: an entry for each job");
        keys.insert(photo, key);
    }
    assert_eq!(keys.values().collect::<BTreeSet<_>>().len(), keys.len(), "an entry for several photos");

    // Of each pair none is deleted, the first, or both.
    let (mut buried, mut kept) = (Vec::new(), Vec::new());
    for (photo, pair) in pairs.iter().enumerate() {
        let (deleted, left) = pair.split_at(photo % 3);
        for &id in deleted {
            host.results.delete(&caller, &id.to_string()).await.unwrap();
            buried.push(tombstone(&host, id).await);
        }
        kept.extend_from_slice(left);
    }
    let named: BTreeSet<Uuid> = buried.iter().filter(|it| it.cache_key.is_some()).map(|it| it.id).collect();
    let orders: Vec<String> = named.iter().map(|&id| Message::Forget { id }.encode()).collect();
    assert_eq!(taken(&host).await, orders, "one order for each job that was read");
    // Before, among and behind all messages of all jobs; also about jobs that are there.
    let ids = pairs.iter().flatten();
    let messages: Vec<_> = ids.flat_map(|&id| [Message::Infer { id }, Message::Forget { id }]).collect();
    deliver_twice(&host, &messages, &mut random).await;

    // A lease later, when no worker can put an entry back any more, it is all done once more, and confirmed.
    clock.advance(lease);
    assert_eq!(sweep().await, Report { erased: buried.len() as u32, ..Report::default() });
    assert_eq!(taken(&host).await, orders, "one more order each");
    deliver_twice(&host, &messages, &mut random).await;
    assert_eq!(sweep().await, Report { erased: named.len() as u32, ..Report::default() });
    deliver_twice(&host, &messages, &mut random).await;
    assert_eq!((sweep().await, taken(&host).await), (Report::default(), Vec::new()), "it was not the end of it");
    for before in &buried {
        let after = tombstone(&host, before.id).await;
        assert_eq!((after.due_at, after.cache_key), (None, None), "{}", before.id);
        // Swept; where there was an entry also confirmed, and swept once more.
        let writes = if named.contains(&before.id) { 3 } else { 1 };
        assert_eq!(after.version - before.version, writes, "{}: settled more than once", before.id);
    }
    for (photo, pair) in pairs.iter().enumerate() {
        // Whoever was not read before the delete of its twin has made an entry since.
        let is_kept = photo % 3 == 0 || (photo % 3 == 1 && !is_read(&photo));
        let key = cache_key(pair[1]).await.or_else(|| keys.get(&photo).cloned());
        let Some(key) = key else { continue };
        assert_eq!(is_cached(&key).await, is_kept, "photo {photo}");
    }

    // The same photo is run again, and no late order reaches its new entry.
    for photo in (0..pairs.len()).filter(is_read).filter(|photo| photo % 3 == 1) {
        let id = submit(photo).await;
        for message in [Message::Infer { id }, Message::Forget { id: pairs[photo][0] }, Message::Forget { id }] {
            assert_eq!(host.inference.process(message, clock.now() + lease, None).await, Outcome::Acknowledge);
        }
        assert!(is_cached(&keys[&photo]).await, "photo {photo}: the entry of another job is gone");
        kept.push(id);
    }
    taken(&host).await;
    drop(host);
    let jobs = backlog::ended_once(folder.path(), kept, "orders to forget").await;
    assert!(jobs.iter().all(|job| job.attempts == Attempts { inference: 1, enrichment: 0 }));
}

#[tokio::test]
async fn an_order_to_forget_reaches_no_other_callers_entry_of_the_same_photo() {
    let (_folder, clock, host) = standing(&[]).await;
    let lease = host.config.policy.lease;
    let mut entries = Vec::new();
    for caller in ["local", "ward"] {
        let submission = Submission { image: mole(), describe: true, callback_url: None };
        let id = host.submit.accept(&Caller(caller.into()), None, submission).await.unwrap();
        host.inference.process(Message::Infer { id }, clock.now() + lease, None).await;
        let job = host.store.get(id).await.unwrap().and_then(Record::into_job);
        entries.push((id, job.unwrap().cache_key.unwrap()));
    }
    let (id, key) = entries.remove(0);
    host.results.delete(&Caller("local".into()), &id.to_string()).await.unwrap();
    for _ in 0..3 {
        let outcome = host.inference.process(Message::Forget { id }, clock.now() + lease, None).await;
        assert_eq!(outcome, Outcome::Acknowledge);
        clock.advance(lease);
    }
    assert!(host.inference.cache.get(&key).await.is_none());
    assert!(host.inference.cache.get(&entries[0].1).await.is_some(), "another caller's entry is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_a_description_is_not_in_the_feed() {
    let llm = LlmServer::start([]).await;
    let host = Running::asking(&llm, &[]).await;
    for _ in 0..3 {
        let request = host.http.post(format!("{}/submit?describe=false", host.url)).header("content-type", "image/png");
        assert_eq!(request.body(mole()).send().await.unwrap().status().as_u16(), 202);
    }
    let jobs = rusqlite::Connection::open(host.folder.path().join("jobs.sqlite")).unwrap();
    let count = |sql: &str| jobs.query_row(sql, [], |row| row.get::<_, u32>(0)).unwrap();
    eventually("all three are completed", async || count("SELECT count(*) FROM jobs WHERE status = 'completed'") == 3)
        .await;
    assert_eq!(count("SELECT count(*) FROM changes") + count("SELECT count(*) FROM sqlite_sequence"), 0);
}
