//! `POST /v1/chat/completions` and `GET /v1/models`: what clients of OpenAI's API take for that API,
//! in front of any server that speaks it.
//!
//! Triggered by HTTP. The request goes to the model's server and its answer to the client, as they
//! came but for the model's name and the usage of streams. Wire format: OpenAI's API reference, "Create
//! chat completion" and "Streaming".

mod answer;
mod relay;
mod request;
mod upstream;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::poll_fn;
use shared::api::chat::{ModelInfo, ModelList};
use shared::error::{Code, Error, OpenAiErrorBody};
use shared::http::body::{bytes, media_type};
use shared::http::{self, Caller};
use shared::llm::models::Model;
use tokio::sync::oneshot;
use tracing::Instrument;

use self::relay::{Answer, Outcome, Relay};
use self::request::Asked;
use self::upstream::{Failure, Kind};
use crate::Chat;

/// The longest body: what a Lambda takes. Pictures in messages fit.
const MAX_BODY_BYTES: usize = 6 * 1024 * 1024;

/// Ask a model, as OpenAI's clients do
///
/// Any field of OpenAI's API is taken and passed on to the model's server; `model` is a name of
/// `GET /v1/models`. With `"stream": true` the answer comes as server-sent events as it is made, with
/// comments while the model is silent. Nothing of it is stored or logged. The answer is the model's
/// own: unlike a description it is held against no prediction, so show it as what it is.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "llm",
    request_body(content = Object, description = "As OpenAI's API reference has it."),
    responses(
        (status = 200, description = "The answer of the model's server: JSON, or an event stream.", body = Object),
        (status = 400, description = "The body is not valid.", body = OpenAiErrorBody),
        (status = 401, description = "No credentials.", body = OpenAiErrorBody),
        (status = 403, description = "Without the scope jobs, or a guest; or not addressed to a loopback name.", body = OpenAiErrorBody),
        (status = 404, description = "There is no such model for this caller.", body = OpenAiErrorBody),
        (status = 413, description = "More than 6 MiB.", body = OpenAiErrorBody),
        (status = 415, description = "Not JSON.", body = OpenAiErrorBody),
        (status = 429, description = "Too many requests, here or at the model's server.", body = OpenAiErrorBody),
        (status = "4XX", description = "The model's server refuses the request, in its own words.", body = OpenAiErrorBody),
        (status = 502, description = "The model's server is not reachable, or answered something else than a completion.", body = OpenAiErrorBody),
        (status = 503, description = "A store is not available.", body = OpenAiErrorBody),
        (status = 504, description = "The model took too long.", body = OpenAiErrorBody),
        (status = "5XX", description = "The model's server has failed, in its own words.", body = OpenAiErrorBody),
    )
)]
pub(crate) async fn completions(
    State(chat): State<Arc<Chat>>,
    caller: Caller,
    request: Request,
) -> Result<Response, Error> {
    not_for_guests(&caller)?;
    if media_type(request.headers()) != "application/json" {
        return Err(Error::new(Code::UnsupportedMediaType, "Send the request as application/json."));
    }
    let too_long = || Error::new(Code::PayloadTooLarge, "The body is longer than 6 MiB.");
    let asked = Asked::read(bytes(request.into_body(), MAX_BODY_BYTES, too_long).await?)?;
    let model = chat.models.get(&asked.model).ok_or_else(no_model)?;
    let relay = Relay {
        models: Arc::clone(&chat.models),
        model: Arc::clone(model),
        asked,
        on_leave: chat.on_leave,
        request_id: http::request_id(),
    };
    let (head, answer) = oneshot::channel();
    let work = async move {
        let (started, streamed) = (Instant::now(), relay.asked.stream);
        let outcome = relay.run(head).await;
        log(&outcome, started, streamed);
    };
    tokio::spawn(work.in_current_span());
    match answer.await {
        Ok(Ok(Answer::Whole(body))) => Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response()),
        Ok(Ok(Answer::Stream(mut pieces))) => {
            let pieces = poll_fn(move |context| pieces.poll_recv(context)).map(Ok::<_, Infallible>);
            let headers = [
                (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
                (header::CACHE_CONTROL, "no-cache"),
                // nginx would collect it.
                (header::HeaderName::from_static("x-accel-buffering"), "no"),
            ];
            Ok((headers, Body::from_stream(pieces)).into_response())
        }
        Ok(Err(failure)) => Ok(refusal(failure)),
        Err(_) => Err(Error::internal("the task of a completion has ended without an answer")),
    }
}

/// List the models
///
/// Those that this caller may ask for.
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "llm",
    responses(
        (status = 200, description = "The models.", body = ModelList),
        (status = 401, description = "No credentials.", body = OpenAiErrorBody),
        (status = 403, description = "Without the scope jobs, or a guest; or not addressed to a loopback name.", body = OpenAiErrorBody),
        (status = 429, description = "Too many requests.", body = OpenAiErrorBody),
        (status = 503, description = "A store is not available.", body = OpenAiErrorBody),
    )
)]
pub(crate) async fn models(State(chat): State<Arc<Chat>>, caller: Caller) -> Result<Json<ModelList>, Error> {
    not_for_guests(&caller)?;
    let data = chat.models.iter().map(info).collect();
    Ok(Json(ModelList { object: "list".to_owned(), data }))
}

/// Look at one model
#[utoipa::path(
    get,
    path = "/v1/models/{model}",
    tag = "llm",
    params(("model" = String, Path, description = "Its name.")),
    responses(
        (status = 200, description = "The model.", body = ModelInfo),
        (status = 401, description = "No credentials.", body = OpenAiErrorBody),
        (status = 403, description = "Without the scope jobs, or a guest; or not addressed to a loopback name.", body = OpenAiErrorBody),
        (status = 404, description = "There is no such model for this caller.", body = OpenAiErrorBody),
        (status = 429, description = "Too many requests.", body = OpenAiErrorBody),
        (status = 503, description = "A store is not available.", body = OpenAiErrorBody),
    )
)]
pub(crate) async fn model(
    State(chat): State<Arc<Chat>>,
    caller: Caller,
    alias: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelInfo>, Error> {
    not_for_guests(&caller)?;
    let Path(alias) = alias.map_err(|_| no_model())?;
    chat.models.get(&alias).map(|model| Json(info(model))).ok_or_else(no_model)
}

fn not_for_guests(caller: &Caller) -> Result<(), Error> {
    if caller.is_guest() {
        return Err(Error::new(Code::Forbidden, "The models answer to callers with credentials."));
    }
    Ok(())
}

fn no_model() -> Error {
    Error::new(Code::ModelNotFound, "There is no such model for you; GET /v1/models lists those that there are.")
}

fn info(model: &Model) -> ModelInfo {
    ModelInfo { id: model.alias.clone(), object: "model".to_owned(), created: 0, owned_by: "lesion".to_owned() }
}

/// What the client is told where there is no answer: the server's own words where there are any.
fn refusal(failure: Failure) -> Response {
    let error = told(&failure);
    let retry_after = error.retry_after_seconds();
    let mut response = match failure.said {
        Some((status, body)) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
            (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
        }
        None => error.into_response(),
    };
    if let Some(seconds) = retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// A failure in our words.
fn told(failure: &Failure) -> Error {
    let (code, message) = match failure.kind {
        Kind::RateLimited => (Code::TooManyRequests, "The model's server takes no more requests at the moment."),
        Kind::Unavailable => (Code::LlmUnavailable, "The model's server is not available at the moment. Try again."),
        Kind::Timeout => (Code::LlmTimeout, "The model took too long. Ask for less, or try again."),
        Kind::Denied => (Code::LlmRefused, "The model's server does not take this host's credentials."),
        Kind::Refused if failure.status == Some(413) => {
            (Code::PayloadTooLarge, "The request is larger than the model's server takes.")
        }
        Kind::Refused => (Code::InvalidRequest, "The model's server refused the request."),
        Kind::InvalidResponse => (Code::LlmInvalidResponse, "The model's server answered what is no completion."),
    };
    let error = Error::new(code, message);
    match failure.retry_after {
        Some(wait) => error.retry_after(u32::try_from(wait.as_secs()).unwrap_or(u32::MAX)),
        None => error,
    }
}

/// One line for each request: neither prompt nor answer.
fn log(outcome: &Outcome, started: Instant, streamed: bool) {
    let millis = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    tracing::info!(
        llm.model = outcome.model.alias,
        llm.outcome = ?outcome.end,
        llm.status = outcome.effort.status,
        llm.tries = outcome.effort.tries,
        llm.streamed = streamed,
        llm.client_left = outcome.left,
        llm.prompt_tokens = outcome.usage.map(|usage| usage.prompt_tokens),
        llm.completion_tokens = outcome.usage.map(|usage| usage.completion_tokens),
        llm.first_byte_ms = outcome.first_byte.map(millis),
        llm.latency_ms = millis(started.elapsed()),
        "completion relayed"
    );
}
