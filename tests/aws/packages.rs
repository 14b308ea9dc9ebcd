//! What `scripts/package` has made, started as Lambda starts it.

use serde_json::json;
use shared::job::{DescriptionSource, Status};
use uuid::Uuid;

use crate::events::Functions;
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
    assert!(!functions.inference.folder.path().join("lesion-models").exists(), "nothing was fetched");
}

#[tokio::test]
async fn inference_without_a_bundle_in_its_package_does_not_start_and_names_what_is_missing() {
    let mut function = Function::start("inference", &[("MODEL_URI", "package")]).await;
    let said = function.ended().await;
    assert!(said.contains("manifest.json"), "{said}");
}

#[tokio::test]
async fn a_key_that_the_llm_refuses_is_read_again_and_the_job_is_described_with_the_new_one() {
    let secrets = aws_sdk_secretsmanager::Client::new(&sdk().await);
    let value = |key: &str| json!({"LLM_API_KEY": key}).to_string();
    let create = secrets.create_secret().name(format!("of-a-test-{}", Uuid::new_v4()));
    let arn = create.secret_string(value("an-old-key")).send().await.unwrap().arn.unwrap();
    let answer = || Behaviour::Answer(explanation(HONEST));
    let llm = LlmServer::start([answer(), Behaviour::Status(401, None), answer(), answer()]).await;
    let base_url = llm.base_url();
    let settings = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("SECRET_ARN", arn.as_str())];
    let mut functions = Functions::start("pete", &settings).await;
    functions.run("mole-drawn.png").await;
    secrets.put_secret_value().secret_id(&arn).secret_string(value("a-new-key")).send().await.unwrap();
    for _ in 0..2 {
        let job = functions.run("mole-drawn.png").await;
        assert_eq!(job.description.unwrap().source, DescriptionSource::Llm);
        assert_eq!((job.attempts.enrichment, job.llm_calls.len()), (1, 1));
    }
    let keys: Vec<_> = llm.requests().iter().map(|(headers, _)| headers["authorization"].clone()).collect();
    // The second job was refused once; the third knew.
    assert_eq!(keys, ["Bearer an-old-key", "Bearer an-old-key", "Bearer a-new-key", "Bearer a-new-key"]);
    let printed = functions.enrichment.printed("stdout") + &functions.enrichment.printed("stderr");
    assert!(!printed.contains("an-old-key") && !printed.contains("a-new-key"));
}
