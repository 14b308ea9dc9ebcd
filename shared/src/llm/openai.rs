//! `POST {LLM_BASE_URL}/chat/completions` as OpenAI, Mistral, Ollama, vLLM and others serve it.
//!
//! Wire format: OpenAI's API reference, "Create chat completion".

use std::time::Duration;

use axum::body::Bytes;
use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::key::Key;
use super::sse::Parser;
use super::{Answer, Format, Live, LlmError, MAX_ANSWER_BYTES, Prompt, finally, retryable};
#[cfg(feature = "aws")]
use crate::aws::Secrets;
use crate::config::{ConfigError, Env};
use crate::error::Error;

/// A server that speaks OpenAI's protocol.
pub struct OpenAi {
    client: Client,
    url: reqwest::Url,
    model: String,
    key: Key,
    max_tokens: u32,
    temperature: f64,
}

/// How long a server may take to say what comes behind the end of its answer: the usage, and that it is done.
const LAST_BYTES: Duration = Duration::from_secs(5);
/// Under which the stage's secret holds the key.
#[cfg(feature = "aws")]
const SECRET_NAME: &str = "LLM_API_KEY";

impl OpenAi {
    /// `LLM_BASE_URL` (such as `https://api.openai.com/v1`), `LLM_MODEL`, `LLM_API_KEY`,
    /// `LLM_MAX_TOKENS`, `LLM_TEMPERATURE`; `None` where there is no base URL.
    ///
    /// # Errors
    /// [`ConfigError`] where one does not parse, or the model is missing.
    pub fn from_env(env: &Env) -> Result<Option<Self>, ConfigError> {
        let Some(base) = env.text("LLM_BASE_URL")? else { return Ok(None) };
        let url = format!("{}/chat/completions", base.trim_end_matches('/'));
        let url: reqwest::Url =
            url.parse().map_err(|_| ConfigError::new("LLM_BASE_URL", "is no URL such as https://api.openai.com/v1"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(ConfigError::new("LLM_BASE_URL", "must begin with http:// or https://"));
        }
        let model =
            env.text("LLM_MODEL")?.ok_or_else(|| ConfigError::new("LLM_MODEL", "is needed with LLM_BASE_URL"))?;
        let key = Key::fixed("LLM_API_KEY", env.secret("LLM_API_KEY")?)?;
        let client = super::http_client("LLM_BASE_URL")?;
        Ok(Some(Self {
            client,
            url,
            model: model.to_owned(),
            key,
            max_tokens: env.number("LLM_MAX_TOKENS", 500, 1, 100_000)?,
            temperature: env.number("LLM_TEMPERATURE", 0.7, 0.0, 2.0)?,
        }))
    }

    /// `LLM_MODEL`.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    fn body(&self, prompt: &Prompt, is_live: bool) -> Value {
        let messages = prompt.messages.iter().map(|message| json!({"role": message.role, "content": message.content}));
        let mut body = json!({
            "model": self.model,
            "max_tokens": prompt.max_tokens.unwrap_or(self.max_tokens),
            "temperature": prompt.temperature.unwrap_or(self.temperature),
            "messages": messages.collect::<Vec<_>>(),
        });
        if is_live {
            body["stream"] = true.into();
            body["stream_options"] = json!({"include_usage": true});
        }
        match &prompt.format {
            Format::Text => {}
            Format::Json => body["response_format"] = json!({"type": "json_object"}),
            Format::Schema { name, schema } => {
                body["response_format"] =
                    json!({"type": "json_schema", "json_schema": {"name": name, "strict": true, "schema": schema}});
            }
        }
        body
    }

    async fn send(&self, body: &Value, key: Option<&SecretString>) -> Result<Response, LlmError> {
        let mut request = self.client.post(self.url.clone()).json(body);
        if let Some(key) = key {
            request = request.bearer_auth(key.expose_secret());
        }
        request.send().await.map_err(|_| retryable("llm_unavailable"))
    }

    /// The key comes from the stage's secret, and is read again where it was refused.
    #[cfg(feature = "aws")]
    pub(super) fn with_secrets(self, secrets: Secrets) -> Self {
        Self { key: Key::Stage { secrets, name: SECRET_NAME.to_owned() }, ..self }
    }

    /// One try.
    pub(super) async fn attempt(&self, prompt: &Prompt, live: Option<&Live>) -> Result<Answer, LlmError> {
        let body = &self.body(prompt, live.is_some());
        let key = self.key.current().await.map_err(no_key)?;
        let mut response = self.send(body, key.as_ref()).await?;
        if response.status() == StatusCode::UNAUTHORIZED
            && let Some(renewed) = self.key.renewed(key.as_ref()).await.map_err(no_key)?
        {
            response = self.send(body, Some(&renewed)).await?;
        }
        let status = response.status();
        if !status.is_success() {
            return Err(refusal(status, response.headers()));
        }
        if let Some(live) = live
            && is_stream(response.headers())
        {
            return streamed(response, live).await;
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|_| retryable("llm_unavailable"))? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MAX_ANSWER_BYTES {
                return Err(finally("llm_invalid_response"));
            }
        }
        let completion: Completion = serde_json::from_slice(&bytes).map_err(|_| finally("llm_invalid_response"))?;
        let usage = completion.usage.unwrap_or_default();
        let choice = completion.choices.into_iter().next().ok_or(finally("llm_invalid_response"))?;
        if let (Some(live), Some(text)) = (live, &choice.message.content) {
            live.tell(text);
        }
        Ok(Answer {
            id: completion.id,
            model: completion.model,
            text: choice.message.content.unwrap_or_default(),
            finish_reason: choice.finish_reason,
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
        })
    }
}

/// A server that knows no streams answers in one piece, asked for one or not.
fn is_stream(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"))
}

/// Reads a stream to its end, and tells its text as it comes.
async fn streamed(mut response: Response, live: &Live) -> Result<Answer, LlmError> {
    let (mut parser, mut read) = (Parser::default(), 0);
    let mut answer = Answer {
        id: None,
        model: None,
        text: String::new(),
        finish_reason: None,
        prompt_tokens: None,
        completion_tokens: None,
    };
    // A connection that breaks is an end like any other: the answer is there, or it is not.
    while let Some(piece) = next(&mut response, answer.finish_reason.is_some()).await {
        read += piece.len();
        // Each word of an answer comes with some hundred bytes around it.
        if answer.text.len() > MAX_ANSWER_BYTES || read > 100 * MAX_ANSWER_BYTES {
            return Err(finally("llm_invalid_response"));
        }
        for event in parser.feed(&piece).map_err(|_| finally("llm_invalid_response"))? {
            // Not every server closes what it has ended.
            if event.data == "[DONE]" {
                return Ok(answer);
            }
            let chunk: Chunk = serde_json::from_str(&event.data).map_err(|_| finally("llm_invalid_response"))?;
            if chunk.error.is_some() {
                return Err(retryable("llm_unavailable"));
            }
            chunk.add_to(&mut answer, live);
        }
    }
    // Nor does every server say [DONE].
    if answer.finish_reason.is_some() { Ok(answer) } else { Err(retryable("llm_unavailable")) }
}

/// The next piece of a stream. Behind the end of an answer nothing is waited for long.
async fn next(response: &mut Response, is_whole: bool) -> Option<Bytes> {
    let patience = if is_whole { LAST_BYTES } else { Duration::MAX };
    tokio::time::timeout(patience, response.chunk()).await.ok()?.ok()?
}

fn no_key(error: Error) -> LlmError {
    tracing::warn!(error.code = error.code().as_str(), error.chain = error.chain(), "key of the LLM not read");
    retryable("llm_unavailable")
}

fn refusal(status: StatusCode, headers: &HeaderMap) -> LlmError {
    match status.as_u16() {
        429 => LlmError { retry_after: retry_after(headers), ..retryable("llm_rate_limited") },
        408 | 500..=599 => LlmError { retry_after: retry_after(headers), ..retryable("llm_unavailable") },
        // The key, its rights, or a model that is gone.
        401 | 403 | 404 | 407 => finally("llm_denied"),
        _ => finally("llm_refused"),
    }
}

/// `Retry-After` in seconds; a date is not honoured, the backoff stands in.
#[must_use]
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

#[derive(Deserialize)]
struct Completion {
    id: Option<String>,
    model: Option<String>,
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    message: Content,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Content {
    content: Option<String>,
}

#[derive(Deserialize, Default)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
}

/// One event of a stream: "The chat completion chunk object".
#[derive(Deserialize)]
struct Chunk {
    id: Option<String>,
    model: Option<String>,
    choices: Option<Vec<Delta>>,
    usage: Option<Usage>,
    error: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Delta {
    /// Absent in the last chunk of some servers.
    delta: Option<Content>,
    finish_reason: Option<String>,
}

impl Chunk {
    fn add_to(self, answer: &mut Answer, live: &Live) {
        answer.id = self.id.or(answer.id.take());
        answer.model = self.model.or(answer.model.take());
        if let Some(choice) = self.choices.into_iter().flatten().next() {
            let text = choice.delta.and_then(|delta| delta.content).unwrap_or_default();
            live.tell(&text);
            answer.text.push_str(&text);
            // Some servers send an empty one with every chunk.
            let reason = choice.finish_reason.filter(|reason| !reason.is_empty());
            answer.finish_reason = reason.or(answer.finish_reason.take());
        }
        if let Some(usage) = self.usage {
            (answer.prompt_tokens, answer.completion_tokens) = (usage.prompt_tokens, usage.completion_tokens);
        }
    }
}
