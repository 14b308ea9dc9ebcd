//! What an operator does with what was given up.

use std::path::Path;

use chrono::{TimeDelta, Utc};
use reqwest::Method;
use serde_json::{Value, json};
use shared::clock::Clock;
use shared::http::Caller;
use shared::job::{Failure, FailureCode, Job, Policy, Record, Stage, Status};
use shared::message::Message;
use shared::ports::{JobQueue, JobStore};
use submit::Submission;
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::keyed::{Keyed, init};
use crate::support::{mole, open};

/// Leaves a job of the caller `local` in a folder whose attempts at inference are used up.
pub async fn failed_job(folder: &Path) -> Uuid {
    failed_job_of("local", folder).await
}

async fn failed_job_of(caller: &str, folder: &Path) -> Uuid {
    let host = open(folder, Clock::manual(Utc::now()), &[]).await;
    let submission = Submission { image: mole(), describe: true, callback_url: None };
    let id = host.submit.accept(&Caller(caller.into()), None, submission).await.unwrap();
    let Some(Record::Job(job)) = host.store.get(id).await.unwrap() else { panic!() };
    let (now, policy) = (host.clock.now(), Policy { max_attempts: 1, ..host.config.policy });
    let claimed = job.claim_inference(now, now + policy.lease, &policy).unwrap();
    let failed = claimed.release_inference(claimed.claim, now, &policy).unwrap();
    assert_eq!(failed.status, Status::Failed);
    assert!(host.store.replace(job.fence(), &Record::Job(claimed.clone())).await.unwrap());
    assert!(host.store.replace(claimed.fence(), &Record::Job(failed)).await.unwrap());
    let delivery = host.queue.receive(TimeDelta::seconds(1)).await.unwrap().unwrap();
    host.queue.acknowledge(&delivery.receipt).await.unwrap();
    id
}

/// Leaves a pending job of the caller `local` in a folder whose message is a dead letter.
pub async fn dead_letter(folder: &Path) -> Uuid {
    let clock = Clock::manual(Utc::now());
    let host = open(folder, clock.clone(), &[("REDISPATCH_SECONDS", "3600")]).await;
    let submission = Submission { image: mole(), describe: true, callback_url: None };
    let id = host.submit.accept(&Caller("local".into()), None, submission).await.unwrap();
    bury_all(&host, &clock).await;
    id
}

/// Leaves a dead letter of a webhook whose job is gone.
pub async fn dead_webhook(folder: &Path) {
    let host = open(folder, Clock::System, &[]).await;
    host.webhooks.bury(Message::Deliver { id: Uuid::from_u128(7) }.encode()).await.unwrap();
}

/// Receives every message so often that it is given up.
async fn bury_all(host: &local::Host, clock: &Clock) {
    for _ in 0..100 {
        clock.advance(TimeDelta::milliseconds(2));
        if host.queue.depth().await.unwrap().0 == 0 {
            return;
        }
        host.queue.receive(TimeDelta::milliseconds(1)).await.unwrap();
    }
    panic!("a message would not die");
}

#[tokio::test]
async fn a_failed_job_of_any_caller_is_sent_round_again_once() {
    let folder = tempfile::tempdir().unwrap();
    let id = failed_job_of("ward", folder.path()).await;
    let admin = init(folder.path(), false).await.unwrap();
    let host = Keyed::on(folder, admin, &[]).await;
    let ward = host.key_of("ward").await;
    let result: Value = host.get(&format!("/result/{id}"), &ward).await.json().await.unwrap();
    assert_eq!((&result["status"], &result["error"]["retryable"]), (&json!("failed"), &json!(true)));
    let redrive = async |id: &str| {
        let response =
            host.request(Method::POST, &format!("/admin/jobs/{id}/redrive"), &host.admin).send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    let (status, body) = redrive(&id.to_string()).await;
    assert_eq!((status, body), (202, json!({"request_id": id, "status": "pending"})));
    let path = format!("/result/{id}?wait=20");
    let result: Value = host.get(&path, &ward).await.json().await.unwrap();
    assert_eq!((&result["status"], &result["error"]), (&json!("completed"), &Value::Null));
    let (status, body) = redrive(&id.to_string()).await;
    assert_eq!((status, &body["error"]["code"]), (409, &json!("not_redrivable")));
    let again: Value = host.get(&path, &ward).await.json().await.unwrap();
    assert_eq!(again, result, "a completed job is left alone");
    for unknown in ["00000000-0000-7000-8000-000000000000", "42", "%ff"] {
        assert_eq!(redrive(unknown).await.0, 404, "{unknown}");
    }
    host.request(Method::DELETE, &format!("/result/{id}"), &ward).send().await.unwrap();
    assert_eq!(redrive(&id.to_string()).await.0, 404, "what was deleted stays deleted");
}

/// Leaves a job of the caller `local` in a folder that was read and whose description was given up.
pub async fn undescribed_job(folder: &Path) -> Uuid {
    // Nobody is asked here, but who is to be.
    let llm = [("LLM_BASE_URL", "http://127.0.0.1:1"), ("LLM_MODEL", "m")];
    let host = open(folder, Clock::System, &[&llm[..], &[("INFERENCE_WORKERS", "1")]].concat()).await;
    let submission = Submission { image: mole(), describe: true, callback_url: None };
    let id = host.submit.accept(&Caller("local".into()), None, submission).await.unwrap();
    let deadline = host.clock.now() + host.config.policy.lease;
    assert_eq!(host.inference.process(Message::Infer { id }, deadline, None).await, inference::Outcome::Acknowledge);
    let Some(Record::Job(job)) = host.store.get(id).await.unwrap() else { panic!() };
    assert_eq!(job.status, Status::AwaitingDescription);
    let failure = Failure { stage: Stage::Enrichment, code: FailureCode::AttemptsExhausted, retryable: true };
    let (status, version) = (Status::Failed, job.version + 1);
    let failed = Job { status, version, failure: Some(failure), due_at: None, dispatch: None, ..job.clone() };
    assert!(host.store.replace(job.fence(), &Record::Job(failed)).await.unwrap());
    let delivery = host.queue.receive(TimeDelta::seconds(1)).await.unwrap().unwrap();
    host.queue.acknowledge(&delivery.receipt).await.unwrap();
    id
}

#[tokio::test]
async fn a_job_whose_photo_has_expired_is_not_sent_round() {
    let folder = tempfile::tempdir().unwrap();
    let id = failed_job(folder.path()).await;
    let admin = init(folder.path(), false).await.unwrap();
    let host = Keyed::on(folder, admin, &[]).await;
    host.clock.advance(TimeDelta::days(8));
    let path = format!("/admin/jobs/{id}/redrive");
    let response = host.request(Method::POST, &path, &host.admin).send().await.unwrap();
    assert_eq!(response.status().as_u16(), 409);
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], "not_redrivable");
    assert!(body["error"]["message"].as_str().unwrap().contains("photo has expired"), "{body}");
    let result: Value = host.get(&format!("/result/{id}"), &host.admin).await.json().await.unwrap();
    assert_eq!(result["status"], "failed");
}

/// A folder with three dead letters: a job's, one of a job that is not, and one that is unreadable.
async fn dead_letters(folder: &TempDir) -> (Uuid, Uuid) {
    let id = dead_letter(folder.path()).await;
    let clock = Clock::manual(Utc::now() + TimeDelta::seconds(1));
    let host = open(folder.path(), clock.clone(), &[]).await;
    let nobody = Uuid::from_u128(7);
    host.queue.send_body(Message::Forget { id: nobody }.encode()).await.unwrap();
    bury_all(&host, &clock).await;
    host.queue.send_body("somebody's name".to_owned()).await.unwrap();
    bury_all(&host, &clock).await;
    (id, nobody)
}

#[tokio::test]
async fn dead_letters_are_shown_by_what_they_are_about_and_never_by_what_could_not_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let (id, nobody) = dead_letters(&folder).await;
    let admin = init(folder.path(), false).await.unwrap();
    let host = Keyed::on(folder, admin, &[]).await;
    let text = host.get("/admin/dead-letters", &host.admin).await.text().await.unwrap();
    assert!(!text.contains("somebody"), "{text}");
    let list: Value = serde_json::from_str(&text).unwrap();
    let letters = list["dead_letters"].as_array().unwrap();
    let about: Vec<_> = letters.iter().map(|letter| (&letter["type"], &letter["job_id"])).collect();
    assert_eq!(about[0], (&json!("infer"), &json!(id)));
    assert_eq!(about[1], (&json!("forget"), &json!(nobody)));
    assert_eq!((about[2], &letters[2]["size_bytes"]), ((&Value::Null, &Value::Null), &json!(15)));
    assert!(letters.iter().all(|letter| letter["receive_count"].as_u64().unwrap() > 5));
    assert!(letters.iter().all(|letter| letter["given_up_at"].is_string() && letter["sent_at"].is_string()));
}

#[tokio::test]
async fn dead_letters_go_back_by_id_or_all_together() {
    let folder = tempfile::tempdir().unwrap();
    let (id, _) = dead_letters(&folder).await;
    let host = crate::support::Running::on(folder, Clock::System, &[("REDISPATCH_SECONDS", "3600")]).await;
    let redrive = async |body: Value| {
        let request = host.http.post(format!("{}/admin/dead-letters/redrive", host.url)).json(&body);
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    let list: Value = host.get("/admin/dead-letters").await.json().await.unwrap();
    let first = list["dead_letters"][0]["id"].clone();
    for wrong in [json!({"ids": "all"}), json!({"all": true}), json!([]), json!({"ids": vec!["x"; 1001]})] {
        assert_eq!(redrive(wrong.clone()).await.0, 400, "{wrong}");
    }
    assert_eq!(redrive(json!({"ids": ["no such id"]})).await, (200, json!({"redriven": 0})));
    assert_eq!(redrive(json!({"ids": [first, first]})).await, (200, json!({"redriven": 1})));
    assert_eq!(host.ended(&id.to_string()).await["status"], "completed");
    let left: Value = host.get("/admin/dead-letters").await.json().await.unwrap();
    assert_eq!(left["dead_letters"].as_array().unwrap().len(), 2);
    assert_eq!(redrive(json!({})).await, (200, json!({"redriven": 2})));
    assert_eq!(redrive(json!({})).await, (200, json!({"redriven": 0})));
}
