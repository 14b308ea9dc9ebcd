//! sweep as a Lambda behind a schedule.

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use lambda_runtime::{Error, LambdaEvent, service_fn};
use shared::aws::Stage;
use sweep::Sweep;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let stage = Stage::open(env!("CARGO_PKG_NAME")).await?;
    let queues = [stage.queue()?, stage.webhooks()?];
    let sweep = Sweep::new(stage.jobs()?, queues, stage.blobs()?, stage.clock.clone(), stage.policy);
    let (sweep, metrics) = (&sweep, &stage.metrics);
    lambda_runtime::run(service_fn(async move |event: LambdaEvent<EventBridgeEvent>| {
        let report = sweep.handle(event.payload).await;
        metrics.flush();
        Ok::<_, Error>(report?)
    }))
    .await
}
