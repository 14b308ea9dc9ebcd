//! `POST /chat`: one answer of the LLM to a conversation; and `/v1/…`, which clients of OpenAI's API
//! take for that API.
//!
//! Triggered by HTTP. The conversation goes to the LLM and its answer to the caller; neither is kept.
//! Below `/v1/` the account of the caller's key is read and written. A caller who leaves `/chat` ends
//! the call.

mod body;
mod proxy;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use shared::api::chat::{ChatAnswer, ChatBody, TokenUsage};
use shared::auth::Identity;
use shared::error::{Code, Error, ErrorBody, OpenAiErrorBody};
use shared::http::{self, Caller};
use shared::llm::models::Models;
use shared::llm::{Answer, Llm, LlmError, Prompt};
use shared::metrics::{self, Completion};
use shared::ports::Callers;
use utoipa::OpenApi;
use uuid::Uuid;

/// The longest that a request is held open, tries and pauses included.
const TIME: Duration = Duration::from_secs(120);

pub use proxy::MAX_BODY_BYTES;
pub use proxy::cache::Cache;
pub use proxy::meter::{Admitted, Closed, Meter};

/// What chat works with.
pub struct Chat<C> {
    pub llm: Arc<Llm>,
    /// The models of the proxy.
    pub models: Arc<Models>,
    pub meter: Arc<Meter<C>>,
    pub cache: Cache,
    pub on_leave: OnLeave,
}

/// What happens to a completion whose client has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLeave {
    /// It is ended, and what it took is estimated.
    Cancel,
    /// It is read to its end, for its usage: a Lambda goes on anyway.
    Drain,
}

/// This function's part of the API's description.
#[derive(OpenApi)]
#[openapi(
    paths(chat, proxy::completions, proxy::models, proxy::model),
    components(schemas(ChatBody, ChatAnswer, ErrorBody, OpenAiErrorBody))
)]
pub struct Api;

/// This function's routes.
pub fn router<C: Callers>(chat: Arc<Chat<C>>) -> Router {
    Router::new()
        .route("/chat", post(self::chat::<C>))
        .route("/v1/chat/completions", post(proxy::completions::<C>))
        .route("/v1/models", get(proxy::models::<C>))
        .route("/v1/models/{model}", get(proxy::model::<C>))
        .with_state(chat)
}

/// Ask the LLM
///
/// Sends the conversation to the server in `LLM_BASE_URL` and answers what it says, whole. Nothing
/// of it is stored or logged. The answer is the LLM's own: unlike a description it is held against
/// no prediction, so show it as what it is.
#[utoipa::path(
    post,
    path = "/chat",
    tag = "llm",
    request_body = ChatBody,
    responses(
        (status = 200, description = "The answer.", body = ChatAnswer),
        (status = 400, description = "The body is not valid.", body = ErrorBody),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope jobs, with limits, or a guest; or not addressed to a loopback name.", body = ErrorBody),
        (status = 404, description = "This host has no LLM.", body = ErrorBody),
        (status = 413, description = "More than 1 MiB.", body = ErrorBody),
        (status = 415, description = "Not JSON.", body = ErrorBody),
        (status = 429, description = "Too many requests.", body = ErrorBody),
        (status = 502, description = "The LLM refused, is not reachable, or answered something else than a completion.", body = ErrorBody),
        (status = 503, description = "A store is not available.", body = ErrorBody),
        (status = 504, description = "The LLM took too long.", body = ErrorBody),
    )
)]
async fn chat<C: Callers>(
    State(chat): State<Arc<Chat<C>>>,
    caller: Caller,
    Extension(identity): Extension<Identity>,
    request: Request,
) -> Result<Json<ChatAnswer>, Error> {
    if caller.is_guest() {
        return Err(Error::new(Code::Forbidden, "The LLM answers to callers with credentials."));
    }
    identity.without_limits()?;
    chat.answer(body::read(request, &caller).await?).await.map(Json)
}

impl<C> Chat<C> {
    async fn answer(&self, prompt: Prompt) -> Result<ChatAnswer, Error> {
        if self.llm.is_offline() {
            return Err(Error::new(Code::LlmNotConfigured, "This host has no LLM; its operator sets LLM_BASE_URL."));
        }
        let mut call = Call::begun();
        let (answer, tries) = self.llm.complete(&prompt, call.started + TIME).await;
        call.end(&self.llm, &answer, tries);
        let answer = answer.map_err(trouble)?;
        Ok(ChatAnswer {
            id: answer.id.unwrap_or_else(|| format!("chatcmpl-{}", Uuid::new_v4().simple())),
            model: answer.model.unwrap_or_else(|| self.llm.model().to_owned()),
            content: answer.text,
            finish_reason: answer.finish_reason,
            usage: TokenUsage { prompt_tokens: answer.prompt_tokens, completion_tokens: answer.completion_tokens },
            latency_ms: millis(call.started.elapsed()),
            request_id: http::request_id(),
        })
    }
}

/// A call to the LLM. One line, neither prompt nor answer, and its metrics when it goes out of scope: ended, or
/// dropped because the caller has left.
struct Call {
    started: Instant,
    outcome: &'static str,
    /// By the LLM's fault or the operator's.
    failed: bool,
    tries: Option<u32>,
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    cost_usd: Option<f64>,
}

impl Call {
    fn begun() -> Self {
        Self {
            started: Instant::now(),
            outcome: "left",
            failed: false,
            tries: None,
            prompt_tokens: None,
            completion_tokens: None,
            cost_usd: None,
        }
    }

    fn end(&mut self, llm: &Llm, answer: &Result<Answer, LlmError>, tries: u32) {
        self.tries = Some(tries);
        match answer {
            Ok(answer) => {
                self.outcome = "ok";
                self.prompt_tokens = answer.prompt_tokens;
                self.completion_tokens = answer.completion_tokens;
                self.cost_usd = llm.cost_usd(answer);
            }
            Err(error) => (self.outcome, self.failed) = (error.code, !error.is_of_the_request()),
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let duration = self.started.elapsed();
        metrics::completion_relayed(&Completion {
            failed: self.failed,
            prompt_tokens: self.prompt_tokens.unwrap_or(0),
            completion_tokens: self.completion_tokens.unwrap_or(0),
            cost_usd: self.cost_usd,
            duration,
            // It comes whole.
            first_byte: None,
        });
        tracing::info!(
            llm.outcome = self.outcome,
            llm.latency_ms = millis(duration),
            llm.tries = self.tries,
            llm.prompt_tokens = self.prompt_tokens,
            llm.completion_tokens = self.completion_tokens,
            "llm called"
        );
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What the caller is told of an LLM that gave no answer.
fn trouble(error: LlmError) -> Error {
    let (code, message) = match error.code {
        "llm_timeout" => (Code::LlmTimeout, "The LLM took too long. Ask for less, or try again."),
        "llm_rate_limited" => (Code::LlmRateLimited, "The LLM takes no more requests at the moment. Try again."),
        "llm_denied" => (Code::LlmRefused, "The LLM does not take this host's key or model."),
        "llm_refused" => (Code::LlmRefused, "The LLM refused the request."),
        "llm_invalid_response" => (Code::LlmInvalidResponse, "The LLM answered something that is no completion."),
        _ => (Code::LlmUnavailable, "The LLM is not available at the moment. Try again."),
    };
    let told = Error::new(code, message);
    match error.retry_after {
        Some(wait) => told.retry_after(u32::try_from(wait.as_secs()).unwrap_or(u32::MAX)),
        None => told,
    }
}
