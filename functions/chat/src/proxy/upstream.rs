//! Gets an answer to begin: tries, pauses, and the model that stands in. From the first byte of an
//! answer on nothing is tried again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use reqwest::Response;
use shared::account::Taken;
use shared::llm::models::{Model, Models, SendError};
use shared::llm::openai::retry_after;
use shared::llm::sse::{Event, Parser};
use tokio::time::timeout;

use super::answer::{self, Seen, Usage};
use super::request::{Asked, TOKEN_BYTES};

/// Tries with one model.
const MAX_TRIES: u32 = 2;
/// The longest pause between the tries, where the server asks for none.
const PAUSE: Duration = Duration::from_millis(400);
/// A server that asks for a longer pause than this is not waited for: its client is told.
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// An answer larger than this is not read on.
const MAX_ANSWER_BYTES: usize = 32 * 1024 * 1024;
/// Of a refusal, as much is read.
const MAX_REFUSAL_BYTES: usize = 64 * 1024;

/// An answer that has begun.
pub(crate) enum Begun {
    Whole { body: Bytes, usage: Option<Usage> },
    Stream(Stream),
}

/// A stream whose first events have come.
pub(crate) struct Stream {
    pub(crate) response: Response,
    pub(crate) parser: Parser,
    pub(crate) events: Vec<Event>,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) struct Failure {
    /// For the log and, where the server has said nothing that can be passed on, for the client.
    pub(crate) kind: Kind,
    /// The server's status and body, where it has answered with a refusal that clients may see.
    pub(crate) said: Option<(u16, Bytes)>,
    pub(crate) status: Option<u16>,
    pub(crate) retry_after: Option<Duration>,
    /// The server may have worked, and may want to be paid for it.
    pub(crate) may_be_billed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    RateLimited,
    Unavailable,
    Timeout,
    /// The server does not take the proxy's key.
    Denied,
    /// The server does not take the request.
    Refused,
    InvalidResponse,
}

impl Failure {
    pub(crate) fn new(kind: Kind, may_be_billed: bool) -> Self {
        Self { kind, said: None, status: None, retry_after: None, may_be_billed }
    }

    fn is_retryable(&self) -> bool {
        matches!(self.kind, Kind::RateLimited | Kind::Unavailable | Kind::Timeout)
    }
}

/// How it went, beside the answer.
#[derive(Default)]
pub(crate) struct Effort {
    pub(crate) tries: u32,
    /// The model that is asked, or was last.
    pub(crate) model: Option<Arc<Model>>,
    /// Since when a try is under way.
    since: Option<Instant>,
    /// For tries that gave nothing, and that the server may have worked for all the same, each at the price of its
    /// model.
    pub(crate) perhaps_billed: Taken,
    pub(crate) status: Option<u16>,
    /// When the answer began to come.
    pub(crate) first_byte: Option<Instant>,
    /// What has come of an answer in one piece.
    bytes: usize,
}

impl Effort {
    fn begin_try(&mut self) {
        self.tries += 1;
        self.since = Some(Instant::now());
        (self.first_byte, self.bytes) = (None, 0);
    }

    /// Enters the try that is under way, if one is.
    pub(crate) fn perhaps_billed(&mut self, asked: &Asked) {
        let (Some(model), Some(since)) = (&self.model, self.since.take()) else { return };
        let prompt_tokens = asked.about_prompt_tokens();
        let come = self.bytes as u64 / TOKEN_BYTES;
        let completion_tokens = asked.about_unseen_tokens(since.elapsed()).max(come);
        let cost_pico = model.cost_pico(prompt_tokens, completion_tokens);
        self.perhaps_billed = self.perhaps_billed.and(Taken { prompt_tokens, completion_tokens, cost_pico });
    }
}

/// Asks the model, and the one that stands in for it, until an answer begins or `deadline` is near.
/// The model that is returned is the last one asked.
pub(crate) async fn begin(
    models: &Models,
    model: &Arc<Model>,
    asked: &Asked,
    deadline: Instant,
    effort: &mut Effort,
) -> (Arc<Model>, Result<Begun, Failure>) {
    let fallback = model.fallback.as_deref().and_then(|alias| models.get(alias));
    let first = with_tries(model, asked, deadline, effort).await;
    match (first, fallback) {
        (Err(failure), Some(other)) if failure.is_retryable() && Instant::now() < deadline => {
            tracing::warn!(llm.model = model.alias, llm.fallback = other.alias, llm.outcome = ?failure.kind, "fallback taken");
            (Arc::clone(other), with_tries(other, asked, deadline, effort).await)
        }
        (result, _) => (Arc::clone(model), result),
    }
}

async fn with_tries(
    model: &Arc<Model>,
    asked: &Asked,
    deadline: Instant,
    effort: &mut Effort,
) -> Result<Begun, Failure> {
    effort.model = Some(Arc::clone(model));
    for tried in 1.. {
        effort.begin_try();
        let left = deadline.saturating_duration_since(Instant::now());
        let attempt = timeout(left.min(model.timeout), attempt(model, asked, effort)).await;
        let failure = match attempt.unwrap_or_else(|_| Err(Failure::new(Kind::Timeout, true))) {
            Ok(begun) => {
                effort.status = Some(200);
                return Ok(begun);
            }
            Err(failure) => failure,
        };
        effort.status = failure.status;
        if failure.may_be_billed {
            effort.perhaps_billed(asked);
        }
        effort.since = None;
        let left = deadline.saturating_duration_since(Instant::now());
        let Some(pause) = pause_before_next(&failure, tried, left) else { return Err(failure) };
        tokio::time::sleep(pause).await;
    }
    Err(Failure::new(Kind::Timeout, false))
}

/// How long to wait for another try behind `tried` of them, with so much time left; `None` where there is to be none.
fn pause_before_next(failure: &Failure, tried: u32, left: Duration) -> Option<Duration> {
    let jitter = PAUSE.mul_f64(rand::random_range(0.5..1.0));
    let pause = failure.retry_after.unwrap_or(jitter);
    (failure.is_retryable() && tried < MAX_TRIES && pause <= MAX_PAUSE && pause < left).then_some(pause)
}

async fn attempt(model: &Model, asked: &Asked, effort: &mut Effort) -> Result<Begun, Failure> {
    let mut response = model.send(asked.body_for(&model.name)).await.map_err(not_sent)?;
    if !response.status().is_success() {
        return Err(refusal(model, response).await);
    }
    let content_type = response.headers().get("content-type").and_then(|value| value.to_str().ok()).unwrap_or("");
    if asked.stream && !content_type.starts_with("application/json") {
        let stream = stream(response).await?;
        effort.first_byte = Some(Instant::now());
        return Ok(Begun::Stream(stream));
    }
    let cut_off = |_| Failure::new(Kind::Unavailable, true);
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(cut_off)? {
        effort.first_byte.get_or_insert_with(Instant::now);
        body.extend_from_slice(&chunk);
        effort.bytes = body.len();
        if body.len() > MAX_ANSWER_BYTES {
            return Err(Failure::new(Kind::InvalidResponse, true));
        }
    }
    let usage = answer::usage_of(&body).ok_or_else(|| Failure::new(Kind::InvalidResponse, true))?;
    Ok(Begun::Whole { body: body.into(), usage })
}

/// Waits for the first events: a stream that breaks off before them has not begun.
async fn stream(mut response: Response) -> Result<Stream, Failure> {
    let mut parser = Parser::default();
    loop {
        let chunk = response.chunk().await.ok().flatten().ok_or_else(|| Failure::new(Kind::Unavailable, true))?;
        let events = parser.feed(&chunk).map_err(|_| Failure::new(Kind::InvalidResponse, true))?;
        if events.first().is_some_and(|event| answer::look(event) == Seen::Error) {
            return Err(Failure::new(Kind::Unavailable, true));
        }
        if !events.is_empty() {
            return Ok(Stream { response, parser, events });
        }
    }
}

fn not_sent(error: SendError) -> Failure {
    match error {
        // Nobody was there to work.
        SendError::Http(error) => Failure::new(Kind::Unavailable, !error.is_connect()),
        SendError::Key(error) => {
            let (code, chain) = (error.code().as_str(), error.chain());
            tracing::warn!(error.code = code, error.chain = chain, "key of the LLM not read");
            Failure::new(Kind::Unavailable, false)
        }
    }
}

async fn refusal(model: &Model, mut response: Response) -> Failure {
    let status = response.status().as_u16();
    let kind = match status {
        429 => Kind::RateLimited,
        408 | 500..=599 => Kind::Unavailable,
        401 | 403 | 407 => Kind::Denied,
        _ => Kind::Refused,
    };
    let retry_after = retry_after(response.headers());
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await
        && body.len() + chunk.len() <= MAX_REFUSAL_BYTES
    {
        body.extend_from_slice(&chunk);
    }
    // What the server says of the proxy's key is the operator's business; servers quote it.
    let is_fit = kind != Kind::Denied && is_error(&body) && !model.quotes_key(&body).await;
    let said = is_fit.then(|| (status, Bytes::from(body)));
    // A gateway knows nothing of what the server behind it has done.
    let may_be_billed = matches!(status, 502 | 504);
    Failure { kind, said, status: Some(status), retry_after, may_be_billed }
}

/// OpenAI's shape of an error.
fn is_error(body: &[u8]) -> bool {
    let value = serde_json::from_slice::<serde_json::Value>(body).unwrap_or_default();
    value["error"]["message"].is_string()
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::post;
    use shared::config::Env;
    use tokio::net::TcpListener;

    use super::*;

    /// What a model has at first.
    const LEFT: Duration = Duration::from_secs(870);

    fn failure(kind: Kind, retry_after: Option<u64>) -> Failure {
        Failure { retry_after: retry_after.map(Duration::from_secs), ..Failure::new(kind, false) }
    }

    #[test]
    fn a_pause_that_the_server_asks_for_is_kept_where_it_is_neither_long_nor_ends_behind_the_deadline() {
        for (asked, left, expected) in [
            (0, 870, Some(0)),
            (1, 870, Some(1)),
            (10, 870, Some(10)),
            (11, 870, None),
            (10, 11, Some(10)),
            (10, 10, None),
            (2, 1, None),
        ] {
            let pause = pause_before_next(&failure(Kind::RateLimited, Some(asked)), 1, Duration::from_secs(left));
            assert_eq!(pause, expected.map(Duration::from_secs), "{asked} of {left}");
        }
    }

    #[test]
    fn a_pause_that_nobody_asks_for_is_drawn_between_200_and_400_ms() {
        let draw = |_| pause_before_next(&failure(Kind::Unavailable, None), 1, LEFT).unwrap().as_millis();
        let pauses: Vec<_> = (0..1000).map(draw).collect();
        let (shortest, longest) = (*pauses.iter().min().unwrap(), *pauses.iter().max().unwrap());
        assert!((200..250).contains(&shortest) && (350..=400).contains(&longest), "{shortest} to {longest} ms");
        assert_eq!(pause_before_next(&failure(Kind::Unavailable, None), 1, Duration::from_millis(200)), None);
    }

    #[test]
    fn only_passing_trouble_is_tried_again_and_only_once() {
        for (kind, tried, is_tried_again) in [
            (Kind::RateLimited, 1, true),
            (Kind::Unavailable, 1, true),
            (Kind::Timeout, 1, true),
            (Kind::Timeout, 2, false),
            (Kind::Denied, 1, false),
            (Kind::Refused, 1, false),
            (Kind::InvalidResponse, 1, false),
        ] {
            let pause = pause_before_next(&failure(kind, None), tried, LEFT);
            assert_eq!(pause.is_some(), is_tried_again, "{kind:?} {tried}");
        }
    }

    #[tokio::test]
    async fn a_server_whose_pause_ends_behind_the_deadline_is_not_asked_again() {
        let refuse = || async { (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "9")]) };
        let router = Router::new().route("/chat/completions", post(refuse));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        let models = Models::from_env(&Env::of([("LLM_BASE_URL", url.as_str()), ("LLM_MODEL", "m")])).unwrap();
        let asked = Asked::read(Bytes::from_static(br#"{"model":"m"}"#)).unwrap();
        // The model's own patience is longer.
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut effort = Effort::default();
        let failure = with_tries(models.get("m").unwrap(), &asked, deadline, &mut effort).await.err().unwrap();
        assert_eq!((failure.kind, effort.tries), (Kind::RateLimited, 1));
        assert!(Instant::now() < deadline, "waited all the same");
    }
}
