//! The one LLM client: an OpenAI-compatible server, or none (then the template describes).
//!
//! Prompts, answers and keys are never logged.

mod key;
pub mod models;
pub mod openai;
pub mod sse;
pub mod template;

use std::time::Duration;

use chrono::TimeDelta;

use crate::api::chat::Role;
use crate::config::{ConfigError, Env};

pub use openai::OpenAi;

/// Who writes descriptions.
#[allow(clippy::large_enum_variant, reason = "there is one of them in a process")]
pub enum Llm {
    /// Nobody: the template does.
    Offline,
    OpenAi(OpenAi),
}

/// One request, as every provider understands it.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Oldest first.
    pub messages: Vec<Message>,
    /// 1–100,000; `None` takes `LLM_MAX_TOKENS`.
    pub max_tokens: Option<u32>,
    /// 0–2; `None` takes `LLM_TEMPERATURE`.
    pub temperature: Option<f32>,
    pub format: Format,
}

/// What somebody said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub role: Role,
    pub content: String,
}

/// What the answer must look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    Text,
    /// JSON, whatever is in it.
    Json,
    /// JSON that satisfies a schema.
    Schema {
        name: &'static str,
        schema: serde_json::Value,
    },
}

/// A complete answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The completion's id and the model's name, where the server gives them.
    pub id: Option<String>,
    pub model: Option<String>,
    pub text: String,
    pub finish_reason: Option<String>,
    pub prompt_tokens: Option<u64>,
    pub completion_tokens: Option<u64>,
}

/// Why there is no complete answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}")]
pub struct LlmError {
    /// For the ledger and the log: `llm_rate_limited`, `llm_unavailable`, `llm_timeout`,
    /// `llm_refused`, `llm_invalid_response`.
    pub code: &'static str,
    /// Whether another try may succeed.
    pub retryable: bool,
    /// How long the server asked us to wait.
    pub retry_after: Option<Duration>,
}

impl LlmError {
    /// [`Self::retry_after`] as the state machine wants it.
    #[must_use]
    pub fn wait(&self) -> Option<TimeDelta> {
        self.retry_after.and_then(|wait| TimeDelta::from_std(wait).ok())
    }
}

impl Llm {
    /// `LLM_BASE_URL` set: that server; unset: offline.
    ///
    /// # Errors
    /// [`ConfigError`] where a variable does not parse or one without the others makes no sense.
    pub fn from_env(env: &Env) -> Result<Self, ConfigError> {
        Ok(OpenAi::from_env(env)?.map_or(Self::Offline, Self::OpenAi))
    }

    /// With the key of the stage's secret.
    #[cfg(feature = "aws")]
    #[must_use]
    pub fn with_secrets(self, secrets: crate::aws::Secrets) -> Self {
        match self {
            Self::Offline => Self::Offline,
            Self::OpenAi(server) => Self::OpenAi(server.with_secrets(secrets)),
        }
    }
}
