//! What the pipeline leans on goes away and comes back: Redis, the LLM.

use std::time::Duration;

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use chrono::{TimeDelta, Utc};
use local::Host;
use shared::api::{JobResult, Outcome};
use shared::clock::Clock;
use shared::embedded::Work;
use shared::job::{DescriptionSource, Job, Policy, Status};
use shared::message::Message;
use shared::ports::JobStore;
use uuid::Uuid;

use crate::support::backlog::{self, JOBS, PATIENCE};
use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::Process;
use crate::support::redis_server::Redis;
use crate::support::{client, numbered_mole, open, submit, within};

#[tokio::test(flavor = "multi_thread")]
async fn redis_gone_and_hanging_and_back_holds_up_none_of_500_jobs() {
    let (folder, http, llm) = (tempfile::tempdir().unwrap(), client(), LlmServer::start([]).await);
    let data = folder.path();
    let mut redis = Redis::start(None);
    let (url, port, base_url) = (redis.url(), redis.port, llm.base_url());
    let settings =
        [("REDIS_URL", url.as_str()), ("LEASE_SECONDS", "30"), ("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")];
    let host = Process::start(data, &settings).await.unwrap();
    let mut ids: Vec<Uuid> = Vec::new();
    let completed = async |at_least: usize| {
        let enough = async || backlog::in_state(data, Status::Completed) >= at_least;
        within(PATIENCE, &format!("{at_least} are completed"), enough).await;
    };
    for number in 0..JOBS {
        let id = submit(&http, &host.url, &numbered_mole(number), None).await.unwrap();
        ids.push(id.parse().unwrap());
        match number {
            150 => {
                completed(100).await;
                drop(redis);
                redis = Redis::start(Some(port));
                redis.hang();
            }
            // With Redis away an attempt at it costs a quarter of a second, twice a job.
            170 => {
                completed(110).await;
                redis.go_on();
            }
            300 => {
                completed(200).await;
                drop(redis);
                completed(260).await;
                redis = Redis::start(Some(port));
            }
            _ => {}
        }
    }
    within(PATIENCE, "nothing is left to do", async || backlog::is_quiet(data)).await;
    assert!(redis.keys().len() > 100, "Redis was not used again: {} keys", redis.keys().len());
    assert!(host.log().len() < 5_000, "{} lines logged", host.log().len());
    assert!(host.terminate().await.success());
    backlog::ended_once(data, ids.clone(), "Redis").await;
    assert_eq!(llm.calls(), JOBS);

    let host = Process::start(data, &settings).await.unwrap();
    // Deleted while Redis hangs: its entries go when it answers again.
    redis.hang();
    for id in &ids {
        let answer = http.delete(format!("{}/result/{id}", host.url)).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 204);
        if ids.iter().position(|other| other == id) == Some(20) {
            redis.go_on();
        }
    }
    within(PATIENCE, "the outputs are erased", async || redis.keys().is_empty()).await;
    assert!(host.log().len() < 5_000, "{} lines logged", host.log().len());
    host.kill().await;
}

/// Does what the host's loops do at this moment of the clock, the feed's records all at once.
async fn work(host: &Host) {
    host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
    let until = || host.clock.now() + host.config.policy.lease;
    while let Some(delivery) = host.queue.receive(host.config.policy.lease).await.unwrap() {
        host.inference.process(Message::decode(&delivery.body).unwrap(), until(), None).await;
        host.queue.acknowledge(&delivery.receipt).await.unwrap();
    }
    let changes = host.store.changes_behind(Work::Description, 0, 1000).await.unwrap();
    let described = changes.iter().map(|change| host.enrichment.process(change.id, until(), None));
    for done in futures_util::future::join_all(described).await {
        done.unwrap();
    }
    host.store.worked(changes.iter().map(|change| change.seq).collect()).await.unwrap();
}

async fn all(host: &Host) -> Vec<Job> {
    host.store.list("local", None, 1000).await.unwrap().records
}

fn predictions(job: &Job) -> usize {
    let Outcome::Photo(outcome) = JobResult::from(job).outcome else { panic!("{job:?}") };
    outcome.predictions.len()
}

/// The claims that the backoff allows in this many minutes, the first one included.
fn allowed(minutes: i64, policy: &Policy) -> u32 {
    let (mut claims, mut at) = (1, TimeDelta::zero());
    while claims < policy.max_attempts {
        at += policy.doubled(policy.backoff, claims - 1);
        if at > TimeDelta::minutes(minutes) {
            break;
        }
        claims += 1;
    }
    claims
}

/// Works 500 jobs through an hour without the LLM, and on until it is back and all have ended.
async fn an_hour_without_the_llm(max_attempts: &str) -> (Vec<Job>, usize) {
    let (folder, clock, llm) = (tempfile::tempdir().unwrap(), Clock::manual(Utc::now()), LlmServer::start([]).await);
    llm.behave(Behaviour::Status(503, None));
    let base_url = llm.base_url();
    let extra = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("MAX_ATTEMPTS", max_attempts)];
    let host = open(folder.path(), clock.clone(), &extra).await;
    let ids = backlog::accept(&host, JOBS).await;
    for minute in 0..60 {
        work(&host).await;
        let jobs = all(&host).await;
        // Promise 2: what the model said is there from the first minute on.
        assert!(jobs.iter().all(|job| predictions(job) == 7), "minute {minute}");
        let most = allowed(minute, &host.config.policy);
        assert!(jobs.iter().all(|job| job.attempts.enrichment <= most), "minute {minute}: more than {most} claims");
        let in_ledger: usize = jobs.iter().flat_map(|job| &job.llm_calls).map(|call| call.tries as usize).sum();
        assert_eq!(llm.calls(), in_ledger, "minute {minute}: every try is in the ledger");
        clock.advance(TimeDelta::minutes(1));
    }
    let before = llm.calls();
    llm.behave(Behaviour::After(Duration::ZERO));
    for _ in 0..60 {
        work(&host).await;
        clock.advance(TimeDelta::minutes(1));
    }
    assert!(all(&host).await.iter().all(|job| job.status == Status::Completed));
    drop(host);
    (backlog::ended_once(folder.path(), ids, "an hour without the LLM").await, llm.calls() - before)
}

#[tokio::test(flavor = "multi_thread")]
async fn after_an_hour_without_the_llm_500_jobs_are_described_by_it() {
    let (jobs, calls) = an_hour_without_the_llm("12").await;
    assert!(jobs.iter().all(|job| job.description.as_ref().unwrap().source == DescriptionSource::Llm));
    assert_eq!(calls, JOBS, "one call each once it is back");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_hour_without_the_llm_ends_500_jobs_by_template_where_attempts_end() {
    let (jobs, calls) = an_hour_without_the_llm("5").await;
    for job in &jobs {
        let description = job.description.as_ref().unwrap();
        assert_eq!(description.source, DescriptionSource::Template);
        assert_eq!(description.fallback.as_deref(), Some("llm_unavailable"));
        assert_eq!((job.attempts.enrichment, job.llm_calls.len()), (5, 5));
    }
    assert_eq!(calls, 0, "nothing is left to ask for");
}
