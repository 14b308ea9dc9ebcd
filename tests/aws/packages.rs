//! What `scripts/package` has made, started as Lambda starts it.

use axum::http::HeaderMap;
use serde_json::{Value, json};
use shared::job::{AnswerContent, Attempts, DescriptionSource, Job, Record, Status};
use shared::ports::JobStore;
use uuid::Uuid;

use crate::events::{Functions, message};
use crate::llm_server::{Behaviour, HONEST, LlmServer, explanation};
use crate::runtime::Function;
use crate::support::sdk;

#[tokio::test]
async fn inference_starts_with_the_bundle_in_its_package_and_asks_the_bucket_for_none() {
    let mut functions = Functions::start("oona", &[]).await;
    let settings = [("TABLE_NAME", functions.table.as_str()), ("MODEL_URI", "package")];
    functions.inference = Function::start("inference-with-model", &settings).await;
    let job = functions.run("mole-drawn.png").await;
    assert_eq!(job.status, Status::Completed);
    assert!(!job.reading.unwrap().predictions.is_empty());
    // Created, claimed, ended: no LLM is set, so enrichment has nothing to do.
    assert_eq!((job.version, job.attempts), (3, Attempts { inference: 1, enrichment: 0 }));
    assert_eq!(job.description.unwrap().source, DescriptionSource::Template);
    assert!(!functions.inference.process.folder.path().join("lesion-models").exists(), "nothing was fetched");
}

#[tokio::test]
async fn inference_without_a_bundle_in_its_package_does_not_start_and_names_what_is_missing() {
    let mut function = Function::start("inference", &[("MODEL_URI", "package")]).await;
    let said = function.ended().await;
    assert!(said.contains("manifest.json"), "{said}");
}

/// A secret of a test's own, and what puts another value in.
async fn secret(values: &Value) -> (aws_sdk_secretsmanager::Client, String) {
    let secrets = aws_sdk_secretsmanager::Client::new(&sdk().await);
    let create = secrets.create_secret().name(format!("of-a-test-{}", Uuid::new_v4()));
    let arn = create.secret_string(values.to_string()).send().await.unwrap().arn.unwrap();
    (secrets, arn)
}

/// The keys that a server was sent.
fn keys(llm: &LlmServer) -> Vec<String> {
    let key = |headers: &HeaderMap| headers.get("authorization").map_or("", |it| it.to_str().unwrap()).to_owned();
    llm.requests().iter().map(|(headers, _)| key(headers)).collect()
}

#[tokio::test]
async fn a_key_that_the_llm_refuses_is_read_again_and_the_job_is_described_with_the_new_one() {
    let value = |key: &str| json!({"LLM_API_KEY": key});
    let (secrets, arn) = secret(&value("an-old-key")).await;
    let answer = || Behaviour::Answer(explanation(HONEST));
    let llm = LlmServer::start([answer(), Behaviour::Status(401, None), answer(), answer()]).await;
    let base_url = llm.base_url();
    let settings = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("SECRET_ARN", arn.as_str())];
    let mut functions = Functions::start("pete", &settings).await;
    functions.run("mole-drawn.png").await;
    let new = value("a-new-key").to_string();
    secrets.put_secret_value().secret_id(&arn).secret_string(new).send().await.unwrap();
    for _ in 0..2 {
        let job = functions.run("mole-drawn.png").await;
        assert_eq!(job.description.unwrap().source, DescriptionSource::Llm);
        assert_eq!((job.attempts.enrichment, job.llm_calls.len()), (1, 1));
    }
    // The second job was refused once; the third knew.
    assert_eq!(keys(&llm), ["Bearer an-old-key", "Bearer an-old-key", "Bearer a-new-key", "Bearer a-new-key"]);
    let printed = functions.enrichment.printed("stdout") + &functions.enrichment.printed("stderr");
    assert!(!printed.contains("an-old-key") && !printed.contains("a-new-key"));
}

#[tokio::test]
async fn a_key_that_comes_into_the_secret_behind_a_functions_start_is_found_when_it_is_missed() {
    let (secrets, arn) = secret(&json!({})).await;
    let answer = || Behaviour::Answer(explanation(HONEST));
    let llm = LlmServer::start([answer(), Behaviour::Status(401, None), answer()]).await;
    let base_url = llm.base_url();
    let settings = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("SECRET_ARN", arn.as_str())];
    let mut functions = Functions::start("paula", &settings).await;
    functions.run("mole-drawn.png").await;
    let new = json!({"LLM_API_KEY": "a-late-key"}).to_string();
    secrets.put_secret_value().secret_id(&arn).secret_string(new).send().await.unwrap();
    let job = functions.run("mole-drawn.png").await;
    assert_eq!(job.description.unwrap().source, DescriptionSource::Llm);
    assert_eq!(keys(&llm), ["", "", "Bearer a-late-key"]);
}

#[tokio::test]
async fn a_kill_while_the_llm_answers_a_prompt_costs_one_more_call_once_its_lease_is_over() {
    let text = "A growth of pigment cells.";
    let llm = LlmServer::start([Behaviour::Stall, Behaviour::Answer(text.into())]).await;
    let base_url = llm.base_url();
    let settings = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")];
    let mut functions = Functions::start("piers", &settings).await;
    let id = functions.ask(&json!({"prompt": "What is a naevus?"})).await;
    functions.enrichment.killed_over(&message(id), "the LLM is asked", async || llm.calls() == 1).await;
    let claimed = functions.job(id).await;
    let state = (claimed.status, claimed.attempts.enrichment, claimed.answer.is_some());
    assert_eq!(state, (Status::AwaitingDescription, 1, false));

    let own = [("TABLE_NAME", functions.table.as_str())];
    functions.enrichment = Function::start("enrichment", &[&own[..], &settings[..]].concat()).await;
    assert_eq!(functions.answer(id).await, claimed, "it may still be at work");
    // As when its lease has run out.
    let past = Some(claimed.updated_at);
    let lapsed = Job { version: claimed.version + 1, lease_until: past, due_at: past, ..claimed.clone() };
    assert!(functions.store.replace(claimed.fence(), &Record::Job(lapsed)).await.unwrap());
    assert_eq!(functions.sweep().await["marked"], 1);
    assert_eq!(llm.calls(), 1);

    let ended = functions.answer(id).await;
    assert_eq!((ended.status, ended.attempts.enrichment, llm.calls()), (Status::Completed, 2, 2));
    assert_eq!(ended.answer.as_ref().unwrap().content, AnswerContent::Text(text.to_owned()));
    assert_eq!(functions.answer(id).await, ended);
    assert_eq!(llm.calls(), 2, "a third delivery has asked");
}
