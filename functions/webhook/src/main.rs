//! webhook as a Lambda behind its own SQS queue.

use aws_lambda_events::event::sqs::SqsEvent;
use lambda_runtime::{Error, LambdaEvent, service_fn};
use shared::aws::Stage;
use webhook::Webhook;
use webhook::courier::Courier;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let stage = Stage::open(env!("CARGO_PKG_NAME")).await?;
    let webhook = Webhook {
        jobs: stage.jobs()?,
        queue: stage.webhooks()?,
        courier: Courier::with_secrets(&stage.env, stage.secrets()?)?,
        clock: stage.clock.clone(),
        policy: stage.policy,
    };
    let (webhook, metrics) = (&webhook, &stage.metrics);
    lambda_runtime::run(service_fn(async move |event: LambdaEvent<SqsEvent>| {
        let response = webhook.handle(event.payload).await;
        metrics.flush();
        Ok::<_, Error>(response)
    }))
    .await
}
