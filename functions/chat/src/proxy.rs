//! `POST /v1/chat/completions` and `GET /v1/models`: what clients of OpenAI's API take for that API,
//! in front of any server that speaks it.
//!
//! Triggered by HTTP. The request goes to the model's server and its answer to the client, as they
//! came but for the model's name and the usage of streams; the account of the caller's key is written.
//!
//! Wire format: OpenAI's API reference, "Create chat completion" and "Streaming".

mod answer;
pub(crate) mod cache;
mod carried;
mod fields;
pub(crate) mod meter;
mod relay;
mod request;
#[cfg(test)]
mod splice_tests;
mod upstream;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use futures_util::StreamExt;
use futures_util::stream::poll_fn;
use shared::account::{Ask, Lefts, Refused, Taken, Used};
use shared::api::chat::{ModelInfo, ModelList};
use shared::auth::Identity;
use shared::error::{Code, Error, OpenAiErrorBody};
use shared::http::body::{bytes, media_type};
use shared::http::{self, Caller};
use shared::llm::models::{Model, Models};
use shared::metrics::{self, Completion};
use shared::ports::Callers;
use tokio::sync::oneshot;
use tracing::Instrument;
use utoipa::ToSchema;

use self::carried::Carried;
use self::meter::{Closed, Meter};
use self::relay::{Answer, End, Head, Outcome, Relay};
use self::request::{Asked, CACHE, MOST_TOKENS, Wish};
use self::upstream::{Failure, Kind};
use crate::Chat;

/// The longest body: what a Lambda takes. Pictures in messages fit.
pub const MAX_BODY_BYTES: usize = 6 * 1024 * 1024;

/// What OpenAI's API reference has; each of its fields may be given, and others.
#[derive(ToSchema)]
#[allow(dead_code, reason = "the description alone")]
pub(crate) struct CompletionBody {
    /// A name of `GET /v1/models`.
    model: String,
}

/// An error, [`OpenAiErrorBody`] where it is this API's own; or what the model's server says.
#[derive(ToSchema)]
#[allow(dead_code, reason = "the description alone")]
pub(crate) struct UpstreamErrorBody {
    error: UpstreamErrorDetail,
}

/// What all servers say of an error.
#[derive(ToSchema)]
#[allow(dead_code, reason = "the description alone")]
pub(crate) struct UpstreamErrorDetail {
    message: String,
}

/// Ask a model, as OpenAI's clients do
///
/// Any field of OpenAI's API is taken and passed on to the model's server; `model` is a name of
/// `GET /v1/models`. With `"stream": true` the answer comes as server-sent events as it is made, with
/// comments while the model is silent. Nothing of it is written to a disk or a log. The answer is the model's
/// own: unlike a description it is held against no prediction, so show it as what it is.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "llm",
    request_body(content = CompletionBody, description = "As OpenAI's API reference has it."),
    responses(
        (status = 200, description = "The answer of the model's server: JSON, or an event stream.",
            content((Object = "application/json"), (serde_json::Value = "text/event-stream"))),
        (status = 400, description = "The body is not valid.", body = UpstreamErrorBody),
        (status = 401, description = "No credentials.", body = OpenAiErrorBody),
        (status = 403, description = "Without the scope jobs, or a guest; or not addressed to a loopback name.", body = OpenAiErrorBody),
        (status = 404, description = "There is no such model for this caller.", body = UpstreamErrorBody),
        (status = 413, description = "More than 6 MiB.", body = UpstreamErrorBody),
        (status = 415, description = "Not JSON.", body = UpstreamErrorBody),
        (status = 429, description = "Too many requests, here or at the model's server.", body = UpstreamErrorBody),
        (status = "4XX", description = "The model's server refuses the request, in its own words.", body = UpstreamErrorBody),
        (status = 502, description = "The model's server is not reachable, or answered something else than a completion.", body = UpstreamErrorBody),
        (status = 503, description = "A store is not available.", body = UpstreamErrorBody),
        (status = 504, description = "The model took too long.", body = UpstreamErrorBody),
        (status = "5XX", description = "The model's server has failed, in its own words.", body = UpstreamErrorBody),
    )
)]
pub(crate) async fn completions<C: Callers>(
    State(chat): State<Arc<Chat<C>>>,
    caller: Caller,
    Extension(identity): Extension<Identity>,
    request: Request,
) -> Result<Response, Error> {
    not_for_guests(&caller)?;
    if media_type(request.headers()) != "application/json" {
        return Err(Error::new(Code::UnsupportedMediaType, "Send the request as application/json."));
    }
    let too_long = || Error::new(Code::PayloadTooLarge, "The body is longer than 6 MiB.");
    let wish = Wish::of(request.headers());
    let asked = Asked::read(bytes(request.into_body(), MAX_BODY_BYTES, too_long).await?)?;
    let model = chat.models.get(&asked.model).filter(|_| identity.limits.allow(&asked.model)).ok_or_else(no_model)?;
    let cached = asked.key(&caller.0, wish);
    if let Some(answer) = cached.and_then(|key| chat.cache.get(key, chat.meter.now())) {
        metrics::completion_cached();
        tracing::info!(llm.model = model.alias, "completion taken from the cache");
        return Ok(whole(answer, Some("hit")));
    }
    let ask = most(&chat.models, model, &asked);
    let relay = Relay {
        models: Arc::clone(&chat.models),
        model: Arc::clone(model),
        asked,
        on_leave: chat.on_leave,
        request_id: http::request_id(),
    };
    let ((entry, entered), (head, answer)) = (oneshot::channel(), oneshot::channel());
    let work = work(Arc::clone(&chat.meter), identity, ask, relay, entry, head).in_current_span();
    let mut carried = Carried::new(work);
    let ended = |_| Error::internal("a completion has ended without an answer");
    let (mut response, lefts) = match carried.until(entered).await.map_err(ended)? {
        Ok(lefts) => {
            let answer = carried.until(answer).await.map_err(ended)?;
            if let (Some(key), Ok(Answer::Whole(body))) = (cached, &answer) {
                chat.cache.put(key, body, chat.meter.now());
            }
            (answered(answer, cached.map(|_| "miss"), carried), lefts)
        }
        Err(Closed::Limit(refused, lefts)) => (closed(refused), lefts),
        Err(Closed::Store(error)) => return Err(error),
    };
    meter::write(lefts, response.headers_mut());
    Ok(response)
}

/// One request from the entry to the settlement. Without a key there is no account.
async fn work<C: Callers>(
    meter: Arc<Meter<C>>,
    identity: Identity,
    ask: Ask,
    relay: Relay,
    entry: oneshot::Sender<Result<Lefts, Closed>>,
    head: oneshot::Sender<Head>,
) {
    let admitted = match &identity.key_id {
        None => None,
        Some(key_id) => match meter.admit(key_id, &identity.limits, ask).await {
            Ok(admitted) => Some(admitted),
            Err(closed) => {
                let _ = entry.send(Err(closed));
                return;
            }
        },
    };
    // Who has left by now is found to have left when the answer is to go out.
    let _ = entry.send(Ok(admitted.as_ref().map(|admitted| admitted.lefts).unwrap_or_default()));
    let (started, streamed) = (Instant::now(), relay.asked.stream);
    let mut outcome = relay.run(head).await;
    let settlement = async move {
        let used = outcome.used();
        if let Some(admitted) = admitted {
            meter.settle(&admitted, used).await;
        }
        tell(&outcome, used, started, streamed);
        outcome.release();
    };
    // A task of its own: the account that it holds while it writes must not wait for a client that reads slowly.
    tokio::spawn(settlement.in_current_span());
}

/// The most that a request can take, with the model or with the one that stands in.
fn most(models: &Models, model: &Model, asked: &Asked) -> Ask {
    let fallback = model.fallback.as_deref().and_then(|alias| models.get(alias));
    let either = || std::iter::once(model).chain(fallback.map(AsRef::as_ref));
    let bound = |model: &Model| model.max_completion_tokens.saturating_mul(asked.choices);
    let prompt_tokens = asked.most_prompt_tokens;
    let completion_tokens = asked.max_completion_tokens.or_else(|| either().map(bound).max()).unwrap_or(0);
    let completion_tokens = completion_tokens.min(MOST_TOKENS);
    let costs = either().map(|model| model.cost_pico(prompt_tokens, completion_tokens));
    Ask { prompt_tokens, completion_tokens, cost_pico: costs.max().unwrap_or(0) }
}

/// `cache` is said where the answer might have been in it.
fn whole(body: Bytes, cache: Option<&'static str>) -> Response {
    let mut response = ([(header::CONTENT_TYPE, "application/json")], body).into_response();
    if let Some(cache) = cache {
        response.headers_mut().insert(CACHE, HeaderValue::from_static(cache));
    }
    response
}

fn answered(head: Head, cache: Option<&'static str>, mut carried: Carried) -> Response {
    match head {
        Ok(Answer::Whole(body)) => whole(body, cache),
        Ok(Answer::Stream(mut pieces)) => {
            let pieces = poll_fn(move |context| {
                let piece = pieces.poll_recv(context);
                if piece.is_ready() {
                    return piece;
                }
                carried.poll(context);
                pieces.poll_recv(context)
            });
            let pieces = pieces.map(Ok::<_, Infallible>);
            let headers = [
                (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
                (header::CACHE_CONTROL, "no-cache"),
                // nginx would collect it.
                (HeaderName::from_static("x-accel-buffering"), "no"),
            ];
            (headers, Body::from_stream(pieces)).into_response()
        }
        Err(failure) => refusal(failure),
    }
}

/// A limit that is used up. OpenAI's clients ask again by themselves: not for a month.
fn closed(refused: Refused) -> Response {
    let mut response = meter::told(refused).into_response();
    if matches!(refused, Refused::Budget(_)) {
        response.headers_mut().insert("x-should-retry", HeaderValue::from_static("false"));
    }
    response
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
pub(crate) async fn models<C: Callers>(
    State(chat): State<Arc<Chat<C>>>,
    caller: Caller,
    Extension(identity): Extension<Identity>,
) -> Result<Json<ModelList>, Error> {
    not_for_guests(&caller)?;
    let data = chat.models.iter().filter(|model| identity.limits.allow(&model.alias)).map(info).collect();
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
pub(crate) async fn model<C: Callers>(
    State(chat): State<Arc<Chat<C>>>,
    caller: Caller,
    Extension(identity): Extension<Identity>,
    alias: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelInfo>, Error> {
    not_for_guests(&caller)?;
    let Path(alias) = alias.map_err(|_| no_model())?;
    let model = chat.models.get(&alias).filter(|_| identity.limits.allow(&alias)).ok_or_else(no_model)?;
    Ok(Json(info(model)))
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

/// One line for each request, neither prompt nor answer, and its metrics.
fn tell(outcome: &Outcome, used: Used, started: Instant, streamed: bool) {
    let all = used.told.and(used.estimated);
    metrics::completion_relayed(&Completion {
        // A request that the server refuses is its client's failure.
        failed: matches!(outcome.end, End::Failed(kind) if kind != Kind::Refused),
        prompt_tokens: all.prompt_tokens,
        completion_tokens: all.completion_tokens,
        cost_usd: (all.cost_pico > 0).then_some(all.cost_pico as f64 / 1e12),
        duration: started.elapsed(),
        first_byte: outcome.first_byte,
    });
    let millis = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    tracing::info!(
        llm.model = outcome.model.alias,
        llm.outcome = ?outcome.end,
        llm.status = outcome.effort.status,
        llm.tries = outcome.effort.tries,
        llm.streamed = streamed,
        llm.client_left = outcome.left,
        llm.prompt_tokens = all.prompt_tokens,
        llm.completion_tokens = all.completion_tokens,
        llm.estimated = used.estimated != Taken::default(),
        llm.cost_usd = all.cost_pico as f64 / 1e12,
        llm.first_byte_ms = outcome.first_byte.map(millis),
        llm.latency_ms = millis(started.elapsed()),
        "completion relayed"
    );
}
