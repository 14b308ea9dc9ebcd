//! A clock that is set back an hour delays jobs and loses none.

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use chrono::{TimeDelta, Utc};
use shared::clock::Clock;
use shared::http::Caller;
use shared::job::{Record, Status};
use shared::message::Message;
use shared::ports::JobStore;
use submit::Submission;

use crate::support::backlog::{self, JOBS, PATIENCE};
use crate::support::llm_server::LlmServer;
use crate::support::{mole, numbered_mole, open, standing, within};

#[tokio::test]
async fn a_clock_set_back_an_hour_delays_and_loses_nothing() {
    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let (_folder, clock, host) = standing(&[("LLM_BASE_URL", &base_url), ("LLM_MODEL", "m")]).await;
    let submission = || Submission { image: mole(), describe: true, callback_url: None };
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
            host.inference.process(message, deadline, None).await;
            host.queue.acknowledge(&delivery.receipt).await.unwrap();
        }
        for id in [lost, abandoned, later] {
            host.enrichment.process(id, clock.now() + host.config.policy.lease, None).await.unwrap();
        }
    }
    for (name, id) in [("lost", lost), ("abandoned", abandoned), ("later", later)] {
        let Some(Record::Job(job)) = host.store.get(id).await.unwrap() else { panic!() };
        assert_eq!(job.status, Status::Completed, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_set_back_in_the_middle_of_500_jobs_ends_each_once() {
    let folder = tempfile::tempdir().unwrap();
    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let clock = Clock::manual(Utc::now());
    let host = open(folder.path(), clock.clone(), &[("LLM_BASE_URL", &base_url), ("LLM_MODEL", "m")]).await;
    let mut ids = backlog::accept(&host, JOBS - 100).await;
    let (submit, store, data) = (host.submit.clone(), host.store.clone(), folder.path());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(host.run(async { stopped.await.unwrap_or(()) }, |_| {}));
    let completed = async |at_least: usize| {
        let enough = async || backlog::in_state(data, Status::Completed) >= at_least;
        within(PATIENCE, &format!("{at_least} are completed"), enough).await;
    };
    completed(100).await;
    clock.advance(TimeDelta::hours(-1));
    // Who comes after the jump is not held up by who came before it.
    for number in ids.len()..JOBS {
        let submission = Submission { image: numbered_mole(number), describe: true, callback_url: None };
        ids.push(submit.accept(&Caller("local".into()), None, submission).await.unwrap());
    }
    let later = ids[JOBS - 100..].to_vec();
    within(PATIENCE, "the later ones are completed", async || {
        let jobs = store.list("local", None, 1000).await.unwrap().records;
        jobs.iter().filter(|job| job.status == Status::Completed && later.contains(&job.id)).count() == later.len()
    })
    .await;
    // The hour comes round again; what waits is seen when it is over.
    for _ in 0..6 {
        clock.advance(TimeDelta::minutes(10));
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
    completed(JOBS).await;
    within(PATIENCE, "nothing is left to do", async || backlog::is_quiet(data)).await;
    drop(stop);
    running.await.unwrap().unwrap();
    let jobs = backlog::ended_once(data, ids, "the clock set back").await;
    assert!(jobs.iter().all(|job| (job.attempts.inference, job.attempts.enrichment) == (1, 1)));
    assert_eq!(llm.calls(), JOBS);
}
