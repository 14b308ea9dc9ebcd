//! Faults that are no crash: doubled and shuffled deliveries, a locked database, a clock that jumps.

use std::collections::BTreeSet;

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use chrono::{TimeDelta, Utc};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use shared::clock::Clock;
use shared::http::Caller;
use shared::job::{Record, Status};
use shared::message::Message;
use shared::ports::{JobQueue, JobStore};
use submit::Submission;
use uuid::Uuid;

use crate::support::llm_server::LlmServer;
use crate::support::{Running, eventually, mole, open};

const JOBS: usize = 500;

#[tokio::test(flavor = "multi_thread")]
async fn messages_doubled_and_shuffled_end_every_job_once() {
    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let folder = tempfile::tempdir().unwrap();
    let extra = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")];
    let host = open(folder.path(), Clock::System, &extra).await;
    let mut ids: Vec<Uuid> = Vec::new();
    for _ in 0..JOBS {
        let submission = Submission { image: mole(), describe: true };
        ids.push(host.submit.accept(&Caller("local".into()), None, submission).await.unwrap());
    }
    // Each message once more, in another order, and some a third time.
    let mut again = [ids.clone(), ids[..JOBS / 5].to_vec()].concat();
    again.shuffle(&mut SmallRng::seed_from_u64(3));
    for id in again {
        host.queue.send(Message::Infer { id }).await.unwrap();
    }
    let (store, queue) = (host.store.clone(), host.queue.clone());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(host.run(async { stopped.await.unwrap_or(()) }, |_| {}));
    for _ in 0..60 {
        if queue.depth().await.unwrap() == (0, 0) && llm.calls() >= JOBS {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
    eventually("every job is completed", async || {
        let jobs = store.list("local", None, 1000).await.unwrap();
        jobs.len() == JOBS && jobs.iter().all(|job| job.status == Status::Completed)
    })
    .await;
    drop(stop);
    running.await.unwrap().unwrap();
    let jobs = store.list("local", None, 1000).await.unwrap();
    let found: BTreeSet<Uuid> = jobs.iter().map(|job| job.id).collect();
    assert_eq!(found, ids.into_iter().collect());
    assert!(jobs.iter().all(|job| (job.attempts.inference, job.attempts.enrichment, job.claim) == (1, 1, 2)));
    assert_eq!(llm.calls(), JOBS, "nothing was described twice");
    assert_eq!(queue.depth().await.unwrap(), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_locked_by_another_process_delays_and_loses_nothing() {
    let host = Running::start(&[]).await;
    let before = host.submit(&mole()).await;
    let other = rusqlite::Connection::open(host.folder.path().join("jobs.sqlite")).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let refused = host.http.post(format!("{}/submit", host.url)).header("content-type", "image/png").body(mole());
    assert_eq!(refused.send().await.unwrap().status().as_u16(), 503);
    other.execute_batch("ROLLBACK").unwrap();
    assert_eq!(host.ended(&before).await["status"], "completed");
    assert_eq!(host.run(&mole()).await["status"], "completed");
}

#[tokio::test]
async fn a_clock_set_back_an_hour_delays_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Clock::manual(Utc::now());
    let host = open(folder.path(), clock.clone(), &[]).await;
    let submission = || Submission { image: mole(), describe: true };
    let caller = Caller("local".into());
    let lost = host.submit.accept(&caller, None, submission()).await.unwrap();
    let abandoned = host.submit.accept(&caller, None, submission()).await.unwrap();
    // One message is lost, the other's worker has died with the claim.
    let Some(Record::Job(pending)) = host.store.get(abandoned).await.unwrap() else { panic!() };
    let until = clock.now() + host.config.policy.lease;
    let claimed = pending.claim_inference(clock.now(), until, &host.config.policy).unwrap();
    assert!(host.store.replace(pending.fence(), &Record::Job(claimed)).await.unwrap());
    clock.advance(TimeDelta::hours(-1));
    let later = host.submit.accept(&caller, None, submission()).await.unwrap();
    for _ in 0..70 {
        clock.advance(TimeDelta::minutes(1));
        host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
        while let Some(delivery) = host.queue.receive(TimeDelta::seconds(30)).await.unwrap() {
            let deadline = clock.now() + host.config.policy.lease;
            let message = Message::decode(&delivery.body).unwrap();
            // The first message of the lost job is the one that never comes.
            if message == (Message::Infer { id: lost })
                && delivery.receive_count == 1
                && clock.now() < pending.created_at
            {
                host.queue.acknowledge(&delivery.receipt).await.unwrap();
                continue;
            }
            host.inference.process(message, deadline).await;
            host.queue.acknowledge(&delivery.receipt).await.unwrap();
        }
        for id in [lost, abandoned, later] {
            host.enrichment.process(id, clock.now() + host.config.policy.lease).await.unwrap();
        }
    }
    for (name, id) in [("lost", lost), ("abandoned", abandoned), ("later", later)] {
        let Some(Record::Job(job)) = host.store.get(id).await.unwrap() else { panic!() };
        assert_eq!(job.status, Status::Completed, "{name}");
    }
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
