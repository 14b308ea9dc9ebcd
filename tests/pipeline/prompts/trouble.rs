//! What gets in a prompt's way: an LLM that goes, workers that overtake each other or die, other prompts.

use std::time::Duration;

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use serde_json::json;
use shared::clock::Clock;
use shared::job::{AnswerContent, Status};

use super::{ANSWER, QUESTION, accept, accepted, ask, job, question};
use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::Process;
use crate::support::{Running, client, ended, eventually, mole, open};

#[tokio::test]
async fn a_job_whose_llm_was_taken_away_fails_and_can_be_redriven_when_it_is_back() {
    let llm = LlmServer::start([Behaviour::Status(503, Some(600))]).await;
    let first = Running::asking(&llm, &[]).await;
    let id = ask(&first, &question()).await;
    let calls = async || job(first.folder.path(), &id).await.llm_calls;
    eventually("the LLM was asked in vain", async || calls().await.iter().any(|call| !call.is_unknown())).await;
    let folder = first.stop().await;
    // The server's ten minutes are over.
    let later = Clock::manual(chrono::Utc::now() + chrono::TimeDelta::minutes(11));
    let second = Running::on(folder, later.clone(), &[]).await;
    let result = second.ended(&id).await;
    assert_eq!((&result["status"], &result["error"]["code"]), (&json!("failed"), &json!("llm_not_configured")));
    let base_url = llm.base_url();
    let third = Running::on(second.stop().await, later, &[("LLM_BASE_URL", &base_url), ("LLM_MODEL", "m")]).await;
    let redrive = async || {
        let request = third.http.post(format!("{}/admin/jobs/{id}/redrive", third.url));
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(redrive().await, 202);
    assert_eq!(third.ended(&id).await["status"], "completed");
    assert_eq!(redrive().await, 409);
    assert_eq!(llm.calls(), 2);
}

#[tokio::test]
async fn a_second_delivery_of_a_prompts_change_finds_nothing_to_do() {
    let llm = LlmServer::start([Behaviour::Late(Duration::from_secs(1), ANSWER.into())]).await;
    let base_url = llm.base_url();
    let folder = tempfile::tempdir().unwrap();
    let host = open(folder.path(), Clock::System, &[("LLM_BASE_URL", &base_url), ("LLM_MODEL", "m")]).await;
    let id = accept(&host, QUESTION).await;
    let until = || host.clock.now() + chrono::TimeDelta::minutes(10);
    // At the same time, and once more when it has ended.
    let deliveries = (0..3).map(|_| host.enrichment.process(id, until(), None));
    futures_util::future::join_all(deliveries).await.into_iter().for_each(Result::unwrap);
    let ended = job(folder.path(), &id.to_string()).await;
    host.enrichment.process(id, until(), None).await.unwrap();
    assert_eq!(job(folder.path(), &id.to_string()).await, ended);
    assert_eq!((ended.status, ended.attempts.enrichment, llm.calls()), (Status::Completed, 1, 1));
}

#[tokio::test]
async fn the_answer_of_a_worker_whose_lease_ran_out_takes_nobodys_place() {
    let (late, long) = ("late ".repeat(100_000), "in time ".repeat(100_000));
    let script = [Behaviour::Late(Duration::from_secs(2), late), Behaviour::Answer(long.clone())];
    let llm = LlmServer::start(script).await;
    let (base_url, clock) = (llm.base_url(), Clock::manual(chrono::Utc::now()));
    let folder = tempfile::tempdir().unwrap();
    let host = open(folder.path(), clock.clone(), &[("LLM_BASE_URL", &base_url), ("LLM_MODEL", "m")]).await;
    let id = accept(&host, QUESTION).await;
    let until = || host.clock.now() + chrono::TimeDelta::minutes(10);
    let overtaken = async {
        eventually("the first worker asks", async || llm.calls() == 1).await;
        clock.advance(chrono::TimeDelta::minutes(10));
        host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
        host.enrichment.process(id, until(), None).await.unwrap();
        job(folder.path(), &id.to_string()).await
    };
    let (stale, ended) = tokio::join!(host.enrichment.process(id, until(), None), overtaken);
    stale.unwrap();
    assert_eq!((ended.status, ended.attempts.enrichment, llm.calls()), (Status::Completed, 2, 2));
    assert_eq!(job(folder.path(), &id.to_string()).await, ended, "the stale worker wrote");
    let AnswerContent::Blob { key } = ended.answer.unwrap().content else { panic!("the answer is in the record") };
    assert!(std::fs::read(folder.path().join("blobs").join(key)).unwrap() == long.as_bytes(), "not the answer");
}

#[tokio::test]
async fn a_prompt_has_its_own_time_and_holds_up_no_description() {
    let llm = LlmServer::start([Behaviour::Late(Duration::from_secs(6), ANSWER.into())]).await;
    // Four seconds more than a try for a description and the lease of one would give it.
    let host = Running::asking(&llm, &[("LLM_TIMEOUT_SECONDS", "1"), ("LEASE_SECONDS", "2")]).await;
    let prompt = ask(&host, &question()).await;
    eventually("the LLM is asked", async || llm.calls() == 1).await;
    let photo = host.run(&mole()).await;
    assert_eq!((&photo["status"], &photo["description"]["source"]), (&json!("completed"), &json!("llm")), "{photo}");
    assert_eq!(host.result(&prompt).await["status"], "awaiting_description", "the photo was described meanwhile");
    let result = host.ended(&prompt).await;
    assert_eq!((&result["status"], &result["content"]), (&json!("completed"), &json!(ANSWER)), "{result}");
    assert_eq!(llm.calls(), 2);
}

#[tokio::test]
async fn more_prompts_than_anybody_reads_ahead_hold_up_no_description() {
    let llm = LlmServer::start([]).await;
    llm.behave(Behaviour::Late(Duration::from_secs(600), ANSWER.into()));
    let host = Running::asking(&llm, &[]).await;
    for _ in 0..1100 {
        ask(&host, &question()).await;
    }
    eventually("prompts wait behind others", async || llm.calls() == 10).await;
    llm.behave(Behaviour::After(Duration::ZERO));
    let photo = host.run(&mole()).await;
    assert_eq!((&photo["status"], &photo["description"]["source"]), (&json!("completed"), &json!("llm")), "{photo}");
    assert_eq!(llm.calls(), 11);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_while_the_llm_answers_costs_one_more_call_and_no_lease() {
    let (folder, http) = (tempfile::tempdir().unwrap(), client());
    let slow = Behaviour::Late(Duration::from_secs(60), "from before the kill".into());
    let llm = LlmServer::start([slow, Behaviour::Answer(ANSWER.into())]).await;
    let base_url = llm.base_url();
    // Leases of ten minutes: what is taken up at the start is not waited for.
    let settings = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("LEASE_SECONDS", "600")];
    let host = Process::start(folder.path(), &settings).await.unwrap();
    let id = accepted(http.post(format!("{}/submit", host.url)).json(&question()).send().await.unwrap()).await;
    eventually("the LLM is asked", async || llm.calls() == 1).await;
    host.kill().await;
    let host = Process::start(folder.path(), &settings).await.unwrap();
    let result = ended(&http, &host.url, &id).await;
    assert_eq!((&result["status"], &result["content"]), (&json!("completed"), &json!(ANSWER)), "{result}");
    assert_eq!(llm.calls(), 2);
    assert_eq!(job(folder.path(), &id).await.attempts.enrichment, 2);
}
