//! sweep as a Lambda behind a schedule.

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use lambda_runtime::{Error, LambdaEvent, service_fn};
use shared::aws::Stage;
use sweep::Sweep;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let stage = Stage::open().await?;
    let sweep = Sweep::new(stage.jobs()?, stage.queue()?, stage.blobs()?, stage.clock.clone(), stage.policy);
    let sweep = &sweep;
    lambda_runtime::run(service_fn(async move |event: LambdaEvent<EventBridgeEvent>| {
        Ok::<_, Error>(sweep.handle(event.payload).await?)
    }))
    .await
}
