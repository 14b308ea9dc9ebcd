//! Another process holds a database: calls fail or wait, and nothing is lost.

use std::collections::BTreeSet;

use base64::Engine;
use reqwest::Method;
use serde_json::{Value, json};
use shared::job::Status;

use crate::support::backlog::{self, JOBS, PATIENCE};
use crate::support::keyed::Keyed;
use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::Process;
use crate::support::receiver::Receiver;
use crate::support::{Running, client, eventually, mole, numbered_mole, within};
use crate::webhooks::variables;

#[tokio::test(flavor = "multi_thread")]
async fn a_database_locked_by_another_process_delays_and_loses_nothing() {
    // Where the lock falls between its claim and its end the job is taken up when its lease has run out.
    let host = Running::start(&[("LEASE_SECONDS", "15")]).await;
    let before = host.submit(&mole()).await;
    let other = rusqlite::Connection::open(host.folder.path().join("jobs.sqlite")).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let refused = host.http.post(format!("{}/submit", host.url)).header("content-type", "image/png").body(mole());
    assert_eq!(refused.send().await.unwrap().status().as_u16(), 503);
    other.execute_batch("ROLLBACK").unwrap();
    assert_eq!(host.ended(&before).await["status"], "completed");
    assert_eq!(host.run(&mole()).await["status"], "completed");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_locked_by_another_process_cost_no_job_no_money_and_let_nobody_in_or_out() {
    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let host = Keyed::start(&[("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")]).await;
    let made = host.make(json!({"caller": "ward", "tokens_per_minute": 1000})).await;
    let (id, ward) = (made["id"].as_str().unwrap(), made["key"].as_str().unwrap());
    let ask = async || {
        let messages = json!([{"role": "user", "content": "What is a naevus?"}]);
        let body = json!({"model": "m", "messages": messages, "max_tokens": 10});
        let request = host.request(Method::POST, "/v1/chat/completions", ward).json(&body);
        request.send().await.unwrap().status().as_u16()
    };
    let other = rusqlite::Connection::open(host.host.folder.path().join("callers.sqlite")).unwrap();
    other.execute_batch("BEGIN EXCLUSIVE").unwrap();
    // What it would take cannot be written down: it is not asked for.
    assert_eq!((ask().await, llm.calls()), (503, 0));
    let create = host.request(Method::POST, "/admin/keys", &host.admin).json(&json!({"caller": "x"}));
    assert_eq!(create.send().await.unwrap().status().as_u16(), 503);
    assert_eq!(host.status(Method::DELETE, &format!("/admin/keys/{id}"), &host.admin).await, 503);
    assert_eq!(host.get("/results", "lesion_nobody_0").await.status().as_u16(), 401);
    let answer = host.submit(ward).await;
    assert_eq!(answer.status().as_u16(), 202, "photos need nothing of it but their caller's key");
    let body: Value = answer.json().await.unwrap();
    let path = format!("/result/{}?wait=20", body["request_id"].as_str().unwrap());
    other.execute_batch("ROLLBACK").unwrap();
    let result: Value = host.get(&path, ward).await.json().await.unwrap();
    assert_eq!(result["status"], "completed");
    eventually("it is asked again", async || ask().await == 200).await;
    // What it took is written down behind its answer.
    eventually("it is entered once", async || {
        let usage: Value = host.get(&format!("/admin/keys/{id}/usage"), &host.admin).await.json().await.unwrap();
        (&usage["under_way"], &usage["months"][0]["requests"]) == (&json!(0), &json!(1))
    })
    .await;
    let keys: Value = host.get("/admin/keys", &host.admin).await.json().await.unwrap();
    let revoked = keys["keys"].as_array().unwrap().iter().filter(|key| key["revoked_at"].is_string()).count();
    assert_eq!((keys["keys"].as_array().unwrap().len(), revoked), (2, 0), "what was refused was not done: {keys}");
}

/// Longer than the host waits for a lock, and shorter. The first outlasts what waits behind what
/// waits, so that a submission fails as well.
const HOLDS_MS: [u64; 4] = [11_000, 300, 6_500, 1_000];

#[tokio::test(flavor = "multi_thread")]
async fn databases_locked_again_and_again_lose_none_of_500_jobs() {
    let folder = tempfile::tempdir().unwrap();
    let llm = LlmServer::start([]).await;
    llm.behave(Behaviour::After(std::time::Duration::from_millis(100)));
    let base_url = llm.base_url();
    // What could not be written under a lock is taken up when its lease has run out. What only waits for its turn,
    // long on a busy machine, is not to be sent again meanwhile: each time is a line in the log.
    let llm_at = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")];
    let receiver = Receiver::start(200).await;
    let receiver_at = receiver.host();
    let times = [("LEASE_SECONDS", "15"), ("REDISPATCH_SECONDS", "20")];
    let extra = [&llm_at[..], &variables(&receiver_at), &times].concat();
    let host = Process::start(folder.path(), &extra).await.unwrap();
    let submitting = tokio::spawn(submit_until_all_are_accepted(host.url.clone(), receiver.url()));
    for (turn, hold) in HOLDS_MS.into_iter().enumerate() {
        // Each time with more of the work done.
        let done = (turn + 1) * JOBS / 8;
        within(PATIENCE, "some are completed", async || backlog::in_state(folder.path(), Status::Completed) >= done)
            .await;
        for file in ["jobs.sqlite", "queue.sqlite", "webhooks.sqlite"] {
            let other = rusqlite::Connection::open(folder.path().join(file)).unwrap();
            other.busy_timeout(PATIENCE).unwrap();
            other.execute_batch("BEGIN EXCLUSIVE").unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(hold)).await;
            other.execute_batch("ROLLBACK").unwrap();
        }
    }
    let (accepted, refused) = submitting.await.unwrap();
    assert!(refused > 0, "no submission met a lock");
    within(PATIENCE, "nothing is left to do", async || backlog::is_quiet(folder.path())).await;
    let locked = host.log().iter().filter(|line| line.contains("\"sqlite.busy\":true")).count();
    assert!(locked >= 4, "only {locked} batches met a lock");
    assert!(host.log().len() < 2_000, "{} lines logged", host.log().len());
    assert!(host.terminate().await.success());
    // What was answered 503 may have become a job all the same: it ends as well.
    let found: Vec<_> = backlog::standing(folder.path()).await.into_keys().collect();
    assert!(accepted.iter().all(|id| found.contains(id)), "an accepted job is gone");
    assert!(found.len() <= JOBS + refused, "{} jobs of {JOBS} accepted and {refused} refused", found.len());
    let jobs = backlog::ended_once(folder.path(), found, "locked").await;
    // Each end was told; again where that could not be written down.
    let told: BTreeSet<String> = receiver.received().iter().map(|received| received.id().to_owned()).collect();
    let ends: BTreeSet<String> = jobs.iter().map(|job| format!("msg_{}_{}", job.id, job.seq())).collect();
    assert_eq!(told, ends);
    // An answer is asked for again only where it could not be committed, and the ledger then does not know of it.
    let lost = jobs.iter().flat_map(|job| &job.llm_calls).filter(|call| call.is_unknown()).count();
    let calls = llm.calls();
    assert!((jobs.len()..=jobs.len() + lost).contains(&calls), "{calls} calls for {} jobs, {lost} lost", jobs.len());
}

/// Submits until 500 photos are accepted; returns their ids, and how often the answer was 503.
async fn submit_until_all_are_accepted(url: String, callback_url: String) -> (Vec<uuid::Uuid>, usize) {
    let (http, mut accepted, mut refused) = (client(), Vec::new(), 0);
    while accepted.len() < JOBS {
        let image = base64::engine::general_purpose::STANDARD.encode(numbered_mole(accepted.len()));
        let request = http.post(format!("{url}/submit"));
        let request = request.json(&json!({"image": image, "callback_url": callback_url}));
        let answer = request.send().await.unwrap();
        match answer.status().as_u16() {
            202 => {
                let body: serde_json::Value = answer.json().await.unwrap();
                accepted.push(body["request_id"].as_str().unwrap().parse().unwrap());
            }
            503 => refused += 1,
            other => panic!("answered {other}"),
        }
    }
    (accepted, refused)
}
