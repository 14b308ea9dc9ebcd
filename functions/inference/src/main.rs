//! inference as a Lambda behind the queue. Library and model are loaded while it starts, which AWS
//! counts as its init phase.

use std::path::PathBuf;
use std::sync::Arc;

use aws_lambda_events::event::sqs::SqsEvent;
use inference::Inference;
use inference::bundle::Bundle;
use inference::config::{self, beside_executable};
use inference::model::{self, Model};
use inference::room::Room;
use lambda_runtime::{Error, LambdaEvent, service_fn};
use secrecy::ExposeSecret;
use shared::aws::Stage;
use shared::cache::PredictionCache;
use shared::clock;
use shared::config::ConfigError;

/// Lambda gives each instance one batch at a time, and a batch here is one message.
const AT_ONCE: usize = 1;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let stage = Stage::open(env!("CARGO_PKG_NAME")).await?;
    let starting = model::start(config::ort_library(&stage.env)?);
    let cache = stage.cache()?;
    let cache_secret = match cache {
        // What it keys is then written nowhere but into records, where it must tell nothing.
        PredictionCache::Off => uuid::Uuid::new_v4().into_bytes().to_vec(),
        _ => cache_secret(&stage).await?,
    };
    let inference = Inference {
        jobs: stage.jobs()?,
        queue: stage.queue()?,
        blobs: stage.blobs()?,
        cache,
        cache_secret,
        model: Arc::new(model(&stage).await?),
        template_describes: !shared::config::has_llm(&stage.env)?,
        room: Room::new(AT_ONCE)?,
        clock: stage.clock.clone(),
        policy: stage.policy,
    };
    drop(starting);
    let (inference, metrics) = (&inference, &stage.metrics);
    lambda_runtime::run(service_fn(async move |event: LambdaEvent<SqsEvent>| {
        let deadline = clock::from_millis(i64::try_from(event.context.deadline)?);
        let response = inference.handle(event.payload, deadline, None).await;
        metrics.flush();
        Ok::<_, Error>(response)
    }))
    .await
}

/// The bundle of `MODEL_DIGEST`, from where `MODEL_URI` says: `s3`, below `models/` in the stage's
/// bucket, or `package`, in the folder `model` beside this executable.
async fn model(stage: &Stage) -> Result<Model, Error> {
    let digest = config::model_digest(&stage.env)?;
    let digest = digest.ok_or_else(|| ConfigError::new("MODEL_DIGEST", "is not set; Terraform sets it"))?;
    let bundle = match stage.env.text("MODEL_URI")? {
        Some("package") => Bundle::from_directory(&beside_executable("model"), Some(&digest))?,
        Some("s3") | None => {
            let cache = PathBuf::from(stage.env.text("TMPDIR")?.unwrap_or("/tmp")).join("lesion-models");
            Bundle::fetch(&stage.blobs()?, &digest, &cache).await?
        }
        Some(_) => return Err(ConfigError::new("MODEL_URI", "must be s3 or package").into()),
    };
    Ok(Model::load(bundle, &config::ort_library(&stage.env)?, AT_ONCE)?)
}

/// `CACHE_KEY` in the stage's secret.
async fn cache_secret(stage: &Stage) -> Result<Vec<u8>, Error> {
    let secret = stage.secrets()?.get("CACHE_KEY").await?;
    let secret = secret.filter(|secret| secret.expose_secret().len() >= 16);
    let missing =
        || ConfigError::new("CACHE_KEY", "is not in the stage's secret, or too short; scripts/deploy makes it");
    Ok(secret.ok_or_else(missing)?.expose_secret().as_bytes().to_vec())
}
