//! enrichment as a Lambda behind the table's stream and the queue of prompts.

use enrichment::Enrichment;
use lambda_runtime::{Error, LambdaEvent, service_fn};
use serde_json::{Value, from_value, to_value};
use shared::aws::Stage;
use shared::clock;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let stage = Stage::open(env!("CARGO_PKG_NAME")).await?;
    let enrichment = Enrichment {
        jobs: stage.jobs()?,
        blobs: stage.blobs()?,
        llm: stage.llm()?.into(),
        push: stage.push()?,
        prompts: Some(stage.prompts()?),
        clock: stage.clock.clone(),
        policy: stage.policy,
    };
    let (enrichment, metrics) = (&enrichment, &stage.metrics);
    lambda_runtime::run(service_fn(async move |event: LambdaEvent<Value>| {
        let deadline = clock::from_millis(i64::try_from(event.context.deadline)?);
        // A batch is of one source, and of these two a change alone has this.
        let response = match event.payload.pointer("/Records/0/dynamodb") {
            Some(_) => to_value(enrichment.handle(from_value(event.payload)?, deadline).await)?,
            None => to_value(enrichment.handle_prompts(from_value(event.payload)?, deadline).await)?,
        };
        metrics.flush();
        Ok::<_, Error>(response)
    }))
    .await
}
