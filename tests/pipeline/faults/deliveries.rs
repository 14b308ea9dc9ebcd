//! At least once and in no order: what queue and feed promise, and no more.

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::TimeDelta;
use enrichment::Enrichment;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use shared::clock::Clock;
use shared::config::Env;
use shared::job::Attempts;
use shared::llm::Llm;
use shared::message::Message;
use shared::ports::JobQueue;
use tokio::task::JoinSet;

use crate::support::backlog::{self, JOBS, PATIENCE};
use crate::support::llm_server::LlmServer;
use crate::support::{Running, eventually, mole, open, within};

/// Reads the feed as a consumer of its own and delivers every change twice more, in another order,
/// while the host works the same changes.
async fn deliver_again(host: &local::Host, variables: &[(&str, &str)]) -> JoinSet<()> {
    let (store, clock, policy) = (host.store.clone(), host.clock.clone(), host.config.policy);
    let llm = Llm::from_env(&Env::of(variables.iter().copied())).unwrap().into();
    let enrichment = Arc::new(Enrichment {
        jobs: store.clone(),
        blobs: host.blobs.clone(),
        llm,
        push: host.hub.clone(),
        clock: clock.clone(),
        policy,
    });
    // With a cursor of its own the changes stay until it has read them too.
    store.advance("again", 1).await.unwrap();
    let mut task = JoinSet::new();
    task.spawn(async move {
        let mut random = SmallRng::seed_from_u64(4);
        loop {
            let changes = store.changes("again", "enrichment", 50).await.unwrap();
            let mut twice = [changes.matching.clone(), changes.matching].concat();
            twice.shuffle(&mut random);
            let mut deliveries = JoinSet::new();
            for change in twice {
                let (enrichment, until) = (Arc::clone(&enrichment), clock.now() + policy.lease);
                deliveries.spawn(async move { enrichment.process(change.id, until).await.unwrap() });
            }
            deliveries.join_all().await;
            store.advance("again", changes.end).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
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
    while let Some(first) = host.queue.receive(TimeDelta::seconds(30)).await.unwrap() {
        host.queue.acknowledge(&first.receipt).await.unwrap();
    }
    let mut messages = [&ids[..], &ids, &ids[..JOBS / 5]].concat();
    messages.shuffle(&mut SmallRng::seed_from_u64(3));
    for &id in &messages {
        host.queue.send(Message::Infer { id }).await.unwrap();
    }
    let again = deliver_again(&host, &extra[..2]).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn the_feed_drops_what_concerns_nobody() {
    let host = Running::start(&[]).await;
    for _ in 0..60 {
        let request = host.http.post(format!("{}/submit?describe=false", host.url)).header("content-type", "image/png");
        assert_eq!(request.body(mole()).send().await.unwrap().status().as_u16(), 202);
    }
    let jobs = rusqlite::Connection::open(host.folder.path().join("jobs.sqlite")).unwrap();
    let count = |sql: &str| jobs.query_row(sql, [], |row| row.get::<_, u32>(0)).unwrap();
    eventually("all sixty are completed", async || count("SELECT count(*) FROM jobs WHERE status = 'completed'") == 60)
        .await;
    // Three writes a job, of which none asks for a description.
    eventually("the changes are passed by", async || count("SELECT count(*) FROM changes") < 100).await;
}
