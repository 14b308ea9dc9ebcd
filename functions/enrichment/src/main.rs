//! enrichment as a Lambda behind the table's stream.

use enrichment::Enrichment;
use lambda_runtime::{Error, LambdaEvent, service_fn};
use shared::aws::Stage;
use shared::clock;
use shared::stream::Event;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let stage = Stage::open(env!("CARGO_PKG_NAME")).await?;
    let enrichment = Enrichment {
        jobs: stage.jobs()?,
        blobs: stage.blobs()?,
        llm: stage.llm()?.into(),
        push: stage.push()?,
        clock: stage.clock.clone(),
        policy: stage.policy,
    };
    let (enrichment, metrics) = (&enrichment, &stage.metrics);
    lambda_runtime::run(service_fn(async move |event: LambdaEvent<Event>| {
        let deadline = clock::from_millis(i64::try_from(event.context.deadline)?);
        let response = enrichment.handle(event.payload, deadline).await;
        metrics.flush();
        Ok::<_, Error>(response)
    }))
    .await
}
