//! notify as a Lambda behind the table's stream.

use lambda_runtime::{Error, LambdaEvent, service_fn};
use notify::Notify;
use shared::aws::Stage;
use shared::stream::Event;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let stage = Stage::open(env!("CARGO_PKG_NAME")).await?;
    let (jobs, connections, push) = (stage.jobs()?, stage.connections()?, stage.push()?);
    let notify = Notify { jobs, connections, push, webhooks: stage.webhooks()? };
    let (notify, metrics) = (&notify, &stage.metrics);
    lambda_runtime::run(service_fn(async move |event: LambdaEvent<Event>| {
        let response = notify.handle(event.payload).await;
        metrics.flush();
        Ok::<_, Error>(response)
    }))
    .await
}
