//! Hundreds of jobs, each deleted at a moment of its own, and the others end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use admin::Admin;
use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use axum::Router;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use shared::http;
use shared::job::DescriptionSource;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::{Bench, Stage, assert_unreadable, key_of};
use crate::support::backlog::{self, JOBS, PATIENCE};
use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::Process;
use crate::support::receiver::Receiver;
use crate::support::redis_server::Redis;
use crate::support::{client, numbered_mole, submit, within};
use crate::webhooks::{submit_told, variables};

/// Serves what an operator may do, over the bench's ports; returns where.
async fn operator(bench: &Bench) -> String {
    let (jobs, queue, clock) = (bench.jobs.clone(), bench.queue.clone(), bench.host.clock.clone());
    let (callers, policy) = (bench.host.admin.callers.clone(), bench.host.config.policy);
    let admin = Arc::new(Admin { jobs, webhooks: queue.clone(), queue, callers, clock, policy });
    let router = http::app(admin::router(admin), Router::new(), Arc::clone(&bench.host.access));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

#[tokio::test]
async fn hundreds_deleted_while_an_operator_redrives_them_stay_deleted_and_the_others_end() {
    let (folder, client, llm) = (tempfile::tempdir().unwrap(), client(), LlmServer::start([]).await);
    let mut bench = Bench::new(folder.path(), &llm).await;
    let mut jobs = Vec::new();
    for number in 0..JOBS {
        jobs.push(if number % 2 == 0 { bench.submit().await } else { bench.ask().await });
    }
    // Nobody works them until their deadline: they fail, and may be redriven.
    bench.host.clock.advance(bench.host.config.policy.deadline);
    let report = bench.host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
    assert_eq!(report.ended as usize, JOBS);

    let url = operator(&bench).await;
    let redrive = async |id: Uuid| {
        let request = client.post(format!("{url}/admin/jobs/{id}/redrive"));
        request.send().await.unwrap().status().as_u16()
    };
    let (mut deleted, mut kept, mut met) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (number, job) in jobs.iter().enumerate() {
        // Two moments a call: get, write, and of a photo send; then behind it, and not at all.
        let moment = number / 2 % 8;
        let what = format!("moment {moment}, prompt: {}", job.is_prompt());
        if moment == 7 {
            assert_eq!(redrive(job.id).await, 202);
            kept.push(job.id);
            continue;
        }
        let (status, meanwhile) = bench.race(job.id, moment, redrive(job.id)).await;
        assert_eq!(status, if moment < 3 { 404 } else { 202 }, "{what}");
        assert_eq!(redrive(job.id).await, 404, "{what}: what was deleted stays deleted");
        if meanwhile {
            met.insert((job.is_prompt(), moment));
        }
        deleted.push(job.id);
    }
    assert!(met.len() >= 10, "{met:?}");
    bench.settle(&[&deleted[..], &kept].concat()).await;
    assert_eq!(llm.calls(), kept.len(), "nobody is asked about what was deleted");
    bench.assert_only(&deleted, kept, "redrives").await;
}

#[tokio::test]
async fn hundreds_deleted_while_the_template_describes_them_are_gone_and_the_others_end() {
    let (folder, llm) = (tempfile::tempdir().unwrap(), LlmServer::start([]).await);
    let mut bench = Bench::new(folder.path(), &llm).await;
    let mut ids = Vec::new();
    for _ in 0..JOBS {
        ids.push(bench.prepare(Stage::Offline).await.id);
    }
    let (mut deleted, mut kept, mut met) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (number, &id) in ids.iter().enumerate() {
        // Two moments a call: get, write; then behind it, and not at all.
        let moment = number % 6;
        let describe = bench.work(Stage::Offline, id);
        if moment == 5 {
            describe.await;
            kept.push(id);
        } else {
            let ((), meanwhile) = bench.race(id, moment, describe).await;
            if meanwhile {
                met.insert(moment);
            }
            deleted.push(id);
        }
        // The change comes again.
        bench.work(Stage::Offline, id).await;
    }
    assert!(met.len() >= 4, "{met:?}");
    bench.settle(&ids).await;
    assert_eq!(llm.calls(), 0);
    for job in bench.assert_only(&deleted, kept, "the template").await {
        assert_eq!((job.attempts.inference, job.attempts.enrichment), (1, 1), "{}", job.id);
        assert_eq!(job.description.unwrap().source, DescriptionSource::Template, "{}", job.id);
    }
}

/// What a race of requests comes to is not known, but what may come of it is.
#[tokio::test(flavor = "multi_thread")]
async fn hundreds_deleted_while_they_are_told_and_submitted_again_are_gone_or_new_jobs_that_end() {
    let (folder, http, receiver) = (tempfile::tempdir().unwrap(), client(), Receiver::start(200).await);
    let (address, callback_url) = (receiver.host(), receiver.url());
    // Without an LLM; and so that sweep is not the one that has somebody told twice.
    let times = [("LEASE_SECONDS", "20"), ("REDISPATCH_SECONDS", "60")];
    let host = Process::start(folder.path(), &[&variables(&address)[..], &times].concat()).await.unwrap();
    let (mut random, mut races) = (SmallRng::seed_from_u64(7), JoinSet::new());
    let mut kept: Vec<Uuid> = Vec::new();
    for number in 0..JOBS {
        let (photo, key) = (numbered_mole(number), key_of(number));
        let id = submit_told(&http, &host.url, photo.clone(), &callback_url, Some(&key)).await.unwrap();
        if random.random_bool(0.2) {
            kept.push(id.parse().unwrap());
            continue;
        }
        // From at once to long after: every stage and what lies between is met; and the same again with it, or behind.
        let pause = Duration::from_millis(if random.random_bool(0.2) { 0 } else { random.random_range(0..8_000) });
        let behind = Duration::from_millis(if random.random_bool(0.5) { 0 } else { random.random_range(0..200) });
        let (http, url, callback_url) = (http.clone(), host.url.clone(), callback_url.clone());
        races.spawn(async move {
            tokio::time::sleep(pause).await;
            let delete = async { http.delete(format!("{url}/result/{id}")).send().await.unwrap().status().as_u16() };
            let again = async {
                tokio::time::sleep(behind).await;
                submit_told(&http, &url, photo, &callback_url, Some(&key)).await.unwrap()
            };
            let (status, again) = tokio::join!(delete, again);
            assert_eq!(status, 204);
            (id, again, key)
        });
    }
    let (mut deleted, mut doomed) = (Vec::new(), Vec::new());
    for (id, again, key) in races.join_all().await {
        if again == id {
            doomed.push(key);
        } else {
            kept.push(again.parse().unwrap());
        }
        deleted.push(id);
    }
    assert!(!doomed.is_empty() && doomed.len() < deleted.len(), "{} of {}", doomed.len(), deleted.len());
    within(PATIENCE, "nothing is left to do", async || backlog::is_quiet(folder.path())).await;
    let letters = http.get(format!("{}/admin/dead-letters", host.url)).send().await.unwrap();
    assert_eq!(letters.json::<Value>().await.unwrap()["dead_letters"], json!([]));
    let log = host.log();
    let errors: Vec<_> = log.iter().filter(|line| line.contains("\"level\":\"ERROR\"")).collect();
    assert!(errors.is_empty(), "{errors:?}");
    assert!(host.terminate().await.success());

    let mut told = BTreeMap::<String, usize>::new();
    for received in receiver.received() {
        *told.entry(received.event()["data"]["request_id"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    assert!(told.values().all(|&times| times == 1), "{told:?}");
    assert!(kept.iter().all(|id| told.contains_key(&id.to_string())), "an end was not told");
    assert_unreadable(folder.path(), &doomed, "told and submitted again");
    let jobs = backlog::ended_once(folder.path(), kept, "told and submitted again").await;
    assert!(jobs.iter().all(|job| (job.attempts.inference, job.attempts.enrichment) == (1, 0)));
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
