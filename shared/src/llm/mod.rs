//! The one LLM client: an OpenAI-compatible server, an agent of Bedrock, or none (then the template
//! describes).
//!
//! Prompts, answers and keys are never logged.

#[cfg(feature = "aws")]
pub mod bedrock;
mod key;
pub mod models;
pub mod openai;
pub mod parts;
pub mod sse;
pub mod template;
mod terms;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use reqwest::Client;
use reqwest::redirect::Policy;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc::UnboundedSender;

use crate::api::chat::Role;
use crate::config::{ConfigError, Env};

#[cfg(feature = "aws")]
use bedrock::BedrockAgent;
use openai::OpenAi;
use terms::Terms;

/// An answer larger than this is not read on. A million characters of content fit; written into the
/// answer of a Lambda, which escapes it once more, it stays below the 6 MB that Lambda takes.
const MAX_ANSWER_BYTES: usize = 5 * 1024 * 1024 / 2;
/// The first pause between two tries; doubles, with full jitter.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Tries within one call of [`Llm::complete`].
const MAX_TRIES: u32 = 3;

/// Who writes descriptions, and answers.
pub struct Llm {
    provider: Provider,
    terms: Terms,
}

#[allow(clippy::large_enum_variant, reason = "there is one of them in a process")]
enum Provider {
    /// Nobody: the template describes.
    Offline,
    OpenAi(OpenAi),
    #[cfg(feature = "aws")]
    Bedrock(BedrockAgent),
}

/// One request, as every provider understands it.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Oldest first.
    pub messages: Vec<Message>,
    /// 1–100,000; `None` takes `LLM_MAX_TOKENS`.
    pub max_tokens: Option<u32>,
    /// 0–2; `None` takes `LLM_TEMPERATURE`.
    pub temperature: Option<f64>,
    pub format: Format,
    /// Where an agent remembers what was said before, from [`session_of`]; `None` is a session of its
    /// own.
    pub session: Option<String>,
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

/// Where the text of an answer goes while it is written.
#[derive(Debug)]
pub struct Live {
    sender: UnboundedSender<String>,
    begun: AtomicBool,
}

impl Live {
    #[must_use]
    pub fn to(sender: UnboundedSender<String>) -> Self {
        Self { sender, begun: AtomicBool::new(false) }
    }

    fn tell(&self, text: &str) {
        if !text.is_empty() {
            self.begun.store(true, Ordering::Relaxed);
            // Whoever listens may have gone; the answer is read to its end all the same.
            let _ = self.sender.send(text.to_owned());
        }
    }
}

/// Why there is no complete answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}")]
pub struct LlmError {
    /// For the ledger and the log: `llm_rate_limited`, `llm_unavailable`, `llm_timeout`, `llm_denied` (the operator's
    /// key, rights or model), `llm_refused` (the request), `llm_invalid_response`, `llm_not_configured`.
    pub code: &'static str,
    /// Whether another try may succeed.
    pub retryable: bool,
    /// How long the server asked us to wait.
    pub retry_after: Option<Duration>,
}

impl LlmError {
    /// Whether who wrote the request has to change it; the rest is the LLM's fault or the operator's.
    #[must_use]
    pub fn is_of_the_request(&self) -> bool {
        self.code == "llm_refused"
    }

    /// [`Self::retry_after`] as the state machine wants it.
    #[must_use]
    pub fn wait(&self) -> Option<TimeDelta> {
        self.retry_after.and_then(|wait| TimeDelta::from_std(wait).ok())
    }
}

/// The session of a caller with an agent: it shows nothing of the name, and nobody else's is the same.
#[must_use]
pub fn session_of(caller: &str) -> String {
    Sha256::digest(caller).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Llm {
    /// `LLM_BASE_URL` set: that server; unset: offline. `LLM_TIMEOUT_SECONDS` and the prices of tokens
    /// go with either.
    ///
    /// # Errors
    /// [`ConfigError`] where a variable does not parse or one without the others makes no sense.
    pub fn from_env(env: &Env) -> Result<Self, ConfigError> {
        if env.text("BEDROCK_AGENT_ID")?.is_some() {
            let needed = "needs a build with AWS's SDK: cargo build --release -p local --features bedrock";
            return Err(ConfigError::new("BEDROCK_AGENT_ID", needed));
        }
        Self::of(env, None)
    }

    /// As [`Llm::from_env`], or the agent of `BEDROCK_AGENT_ID`.
    ///
    /// # Errors
    /// Those of [`Llm::from_env`], and where both are set.
    #[cfg(feature = "aws")]
    pub fn with_agents(env: &Env, sdk: &aws_config::SdkConfig) -> Result<Self, ConfigError> {
        Self::of(env, BedrockAgent::from_env(env, sdk)?.map(Provider::Bedrock))
    }

    fn of(env: &Env, agent: Option<Provider>) -> Result<Self, ConfigError> {
        let of_servers = ["LLM_MODEL", "LLM_API_KEY", "LLM_MAX_TOKENS", "LLM_TEMPERATURE"];
        let provider = match (agent, OpenAi::from_env(env)?) {
            (Some(_), Some(_)) => {
                return Err(ConfigError::new("BEDROCK_AGENT_ID", "and LLM_BASE_URL are two LLMs; set one"));
            }
            (None, Some(server)) => Provider::OpenAi(server),
            (Some(agent), None) => {
                env.none_of(&of_servers, "is of no use without LLM_BASE_URL: an agent has its own")?;
                agent
            }
            (None, None) => {
                env.none_of(&of_servers, "is of no use without LLM_BASE_URL")?;
                env.none_of(&terms::VARIABLES, "is of no use without an LLM")?;
                Provider::Offline
            }
        };
        Ok(Self { provider, terms: Terms::from_env(env)? })
    }

    /// With the key of the stage's secret.
    #[cfg(feature = "aws")]
    #[must_use]
    pub fn with_secrets(self, secrets: crate::aws::Secrets) -> Self {
        let provider = match self.provider {
            Provider::OpenAi(server) => Provider::OpenAi(server.with_secrets(secrets)),
            other => other,
        };
        Self { provider, ..self }
    }

    /// Whether there is nobody to ask.
    #[must_use]
    pub fn is_offline(&self) -> bool {
        matches!(self.provider, Provider::Offline)
    }

    /// `LLM_MODEL`, or the agent.
    #[must_use]
    pub fn model(&self) -> &str {
        match &self.provider {
            Provider::Offline => "",
            Provider::OpenAi(server) => server.model(),
            #[cfg(feature = "aws")]
            Provider::Bedrock(agent) => agent.name(),
        }
    }

    /// What an answer cost, where prices are set and the provider says what it has used.
    #[must_use]
    pub fn cost_usd(&self, answer: &Answer) -> Option<f64> {
        self.terms.cost_usd(answer)
    }

    /// Asks, and asks again where that may help, until `deadline`. Gives the answer, or the error
    /// of the last try, and how many tries it took.
    pub async fn complete(&self, prompt: &Prompt, deadline: Instant) -> (Result<Answer, LlmError>, u32) {
        self.complete_within(self.terms.attempt_timeout, prompt, deadline, None).await
    }

    /// As [`Llm::complete`], for whoever waits longer: one try may take all the time that is left. With
    /// `live` the text is told as it comes; once it was, there is no other try.
    pub async fn complete_at_length(
        &self,
        prompt: &Prompt,
        deadline: Instant,
        live: Option<&Live>,
    ) -> (Result<Answer, LlmError>, u32) {
        self.complete_within(Duration::MAX, prompt, deadline, live).await
    }

    async fn complete_within(
        &self,
        attempt_timeout: Duration,
        prompt: &Prompt,
        deadline: Instant,
        live: Option<&Live>,
    ) -> (Result<Answer, LlmError>, u32) {
        let mut tries = 1;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let error = match tokio::time::timeout(left.min(attempt_timeout), self.attempt(prompt, live)).await {
                Ok(Ok(answer)) => return (Ok(answer), tries),
                Ok(Err(error)) => error,
                Err(_) => retryable("llm_timeout"),
            };
            let jitter = FIRST_PAUSE.mul_f64(f64::from(1 << (tries - 1)) * rand::random_range(0.5..1.0));
            let pause = error.retry_after.unwrap_or(jitter);
            let left = deadline.saturating_duration_since(Instant::now());
            let has_begun = live.is_some_and(|live| live.begun.load(Ordering::Relaxed));
            if !error.retryable || has_begun || tries == MAX_TRIES || pause >= left {
                return (Err(error), tries);
            }
            tokio::time::sleep(pause).await;
            tries += 1;
        }
    }

    async fn attempt(&self, prompt: &Prompt, live: Option<&Live>) -> Result<Answer, LlmError> {
        match &self.provider {
            Provider::Offline => Err(finally("llm_not_configured")),
            Provider::OpenAi(server) => server.attempt(prompt, live).await,
            #[cfg(feature = "aws")]
            Provider::Bedrock(agent) => agent.attempt(prompt, live).await,
        }
    }
}

/// What speaks to servers that the variable `of` names.
fn http_client(of: &str) -> Result<Client, ConfigError> {
    // Another part of the process may have installed a provider before; either will do.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::builder()
        // Prompts and keys go to these servers and nowhere else, whatever HTTP_PROXY says.
        .no_proxy()
        .connect_timeout(Duration::from_secs(5))
        // Minutes may pass before the first byte; what lies between forgets silent connections.
        .tcp_keepalive(Duration::from_secs(30))
        // A redirect would send both to somebody else.
        .redirect(Policy::none())
        .build();
    client.map_err(|_| ConfigError::new(of, "the HTTP client could not be set up"))
}

fn retryable(code: &'static str) -> LlmError {
    LlmError { code, retryable: true, retry_after: None }
}

fn finally(code: &'static str) -> LlmError {
    LlmError { code, retryable: false, retry_after: None }
}
