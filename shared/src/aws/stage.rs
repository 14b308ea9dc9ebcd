//! What Terraform tells a function of its stage, and the ports that follow from it.

use std::sync::Arc;

use aws_config::SdkConfig;

use super::{
    DynamoCallers, DynamoConnections, DynamoJobStore, Emf, GatewayPush, S3BlobStore, Secrets, SqsJobQueue, sdk_config,
};
use crate::auth::{Access, Checks, Limits, Tokens};
use crate::cache::PredictionCache;
use crate::clock::Clock;
use crate::config::{self, ConfigError, Env};
use crate::job::Policy;
use crate::llm::Llm;

/// The stage that this process serves; each port names its variables.
pub struct Stage {
    pub env: Env,
    pub clock: Clock,
    pub policy: Policy,
    pub metrics: Emf,
    sdk: SdkConfig,
}

impl Stage {
    /// Reads the environment, starts logging, and counts the start of `function`. `STAGE` is the stage
    /// whose metrics these are.
    ///
    /// # Errors
    /// [`ConfigError`] for the first variable that is not right.
    pub async fn open(function: &'static str) -> Result<Self, ConfigError> {
        let env = Env::of_process();
        crate::telemetry::init(&env)?;
        #[cfg(debug_assertions)]
        crate::crash::arm(&env)?;
        // Whoever speaks TLS beside the SDK takes the process's provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let policy = config::policy(&env)?;
        let name = env.text("STAGE")?.ok_or_else(|| ConfigError::new("STAGE", "is not set; Terraform sets it"))?;
        let metrics = Emf::start(name)?;
        crate::metrics::cold_start(function);
        Ok(Self { env, clock: Clock::System, policy, metrics, sdk: sdk_config().await })
    }

    /// `TABLE_NAME`.
    ///
    /// # Errors
    /// [`ConfigError`] where it is missing.
    pub fn jobs(&self) -> Result<DynamoJobStore, ConfigError> {
        Ok(DynamoJobStore::new(&self.sdk, self.needed("TABLE_NAME")?))
    }

    /// `QUEUE_URL`, and for admins `DEAD_LETTER_QUEUE_URL`.
    ///
    /// # Errors
    /// [`ConfigError`] where the first is missing.
    pub fn queue(&self) -> Result<SqsJobQueue, ConfigError> {
        let dead_letters = self.env.text("DEAD_LETTER_QUEUE_URL")?.map(str::to_owned);
        Ok(SqsJobQueue::new(&self.sdk, self.needed("QUEUE_URL")?, dead_letters))
    }

    /// `WEBHOOK_QUEUE_URL`, and for all but notify `WEBHOOK_DEAD_LETTER_QUEUE_URL`.
    ///
    /// # Errors
    /// [`ConfigError`] where the first is missing.
    pub fn webhooks(&self) -> Result<SqsJobQueue, ConfigError> {
        let dead_letters = self.env.text("WEBHOOK_DEAD_LETTER_QUEUE_URL")?.map(str::to_owned);
        Ok(SqsJobQueue::new(&self.sdk, self.needed("WEBHOOK_QUEUE_URL")?, dead_letters))
    }

    /// `PROMPT_QUEUE_URL`.
    ///
    /// # Errors
    /// [`ConfigError`] where it is missing.
    pub fn prompts(&self) -> Result<SqsJobQueue, ConfigError> {
        Ok(SqsJobQueue::new(&self.sdk, self.needed("PROMPT_QUEUE_URL")?, None))
    }

    /// `BUCKET`; `S3_PATH_STYLE` for an emulator whose buckets have no names of their own.
    ///
    /// # Errors
    /// [`ConfigError`] where the first is missing.
    pub fn blobs(&self) -> Result<S3BlobStore, ConfigError> {
        let path_style = self.env.flag("S3_PATH_STYLE")?;
        Ok(S3BlobStore::new(&self.sdk, self.needed("BUCKET")?, path_style, self.clock.clone()))
    }

    /// `CALLERS_TABLE_NAME`.
    ///
    /// # Errors
    /// [`ConfigError`] where it is missing.
    pub fn callers(&self) -> Result<DynamoCallers, ConfigError> {
        Ok(DynamoCallers::new(&self.sdk, self.needed("CALLERS_TABLE_NAME")?))
    }

    /// `CONNECTIONS_TABLE_NAME`.
    ///
    /// # Errors
    /// [`ConfigError`] where it is missing.
    pub fn connections(&self) -> Result<DynamoConnections, ConfigError> {
        Ok(DynamoConnections::new(&self.sdk, self.needed("CONNECTIONS_TABLE_NAME")?))
    }

    /// `SOCKET_API_URL`, where frames are sent.
    ///
    /// # Errors
    /// [`ConfigError`] where it is missing.
    pub fn push(&self) -> Result<GatewayPush, ConfigError> {
        Ok(GatewayPush::new(&self.sdk, &self.needed("SOCKET_API_URL")?))
    }

    /// `SOCKET_URL`, where clients open WebSockets.
    ///
    /// # Errors
    /// [`ConfigError`] where it is missing.
    pub fn socket_url(&self) -> Result<String, ConfigError> {
        self.needed("SOCKET_URL")
    }

    /// Who is let in: never anybody without being asked, as there is no loopback here.
    ///
    /// # Errors
    /// [`ConfigError`] for the first variable that is not right.
    pub fn access(&self) -> Result<Arc<Access<DynamoCallers>>, ConfigError> {
        Ok(Arc::new(Access::Checked(Box::new(Checks {
            callers: self.callers()?,
            tokens: Tokens::from_env(&self.env, self.clock.clone())?,
            limits: Limits::from_env(&self.env)?,
            clock: self.clock.clone(),
        }))))
    }

    /// Who answers: the agent of `BEDROCK_AGENT_ID`, or the server of `LLM_BASE_URL` with the key of the
    /// stage's secret.
    ///
    /// # Errors
    /// [`ConfigError`] for the first variable that is not right.
    pub fn llm(&self) -> Result<Llm, ConfigError> {
        Ok(Llm::with_agents(&self.env, &self.sdk)?.with_secrets(self.secrets()?))
    }

    /// `SECRET_ARN`.
    ///
    /// # Errors
    /// [`ConfigError`] where it is missing.
    pub fn secrets(&self) -> Result<Secrets, ConfigError> {
        Ok(Secrets::new(&self.sdk, self.needed("SECRET_ARN")?))
    }

    /// `CACHE`: `none` (the default), `s3`, or `redis`, which needs `REDIS_URL`. Never this process's
    /// memory: other instances of the function would keep what a delete has erased here.
    ///
    /// # Errors
    /// [`ConfigError`] where it is another, or `REDIS_URL` is missing or wrong.
    pub fn cache(&self) -> Result<PredictionCache, ConfigError> {
        match self.env.text("CACHE")? {
            None | Some("none") => Ok(PredictionCache::Off),
            Some("s3") => Ok(PredictionCache::S3(self.blobs()?)),
            Some("redis") => {
                self.needed("REDIS_URL")?;
                PredictionCache::from_env(&self.env)
            }
            Some(_) => Err(ConfigError::new("CACHE", "must be none, s3 or redis")),
        }
    }

    fn needed(&self, name: &str) -> Result<String, ConfigError> {
        let value = self.env.text(name)?.map(str::to_owned);
        value.ok_or_else(|| ConfigError::new(name, "is not set; Terraform sets it"))
    }
}
