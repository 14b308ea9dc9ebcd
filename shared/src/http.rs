//! What every HTTP function needs around its routes: who is calling, the id of the exchange, and
//! the one shape of an error.

pub mod body;

use std::future::{Future, poll_fn};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use tracing::Instrument;
use tracing::field::Empty;
use uuid::Uuid;

use crate::api::admin::Scope;
use crate::auth::{self, Access, Identity};
use crate::error::{Code, Error, ErrorBody, ErrorDetail, OpenAiErrorBody};
use crate::ports::Callers;

/// Below this, errors have the shape that OpenAI's clients read.
const OPENAI_PATHS: &str = "/v1/";

/// The HTTP exchange that a task works on.
#[derive(Clone, Default)]
struct Exchange {
    id: String,
    /// Whether errors are written as OpenAI's API writes them.
    is_openai: bool,
}

tokio::task_local! {
    static EXCHANGE: Exchange;
}

/// The id of the HTTP exchange that this task works on.
#[must_use]
pub fn request_id() -> String {
    EXCHANGE.try_with(|exchange| exchange.id.clone()).unwrap_or_default()
}

/// Whose jobs a request is about. [`auth::authenticate`] puts the identity into the request; without
/// one the answer is 401, without the scope `jobs` it is 403.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        let identity = Identity::of(&parts.extensions, Scope::Jobs)?;
        Ok(Self(identity.caller.clone()))
    }
}

impl Caller {
    /// All requests without credentials are this one caller, where a host admits them.
    #[must_use]
    pub fn is_guest(&self) -> bool {
        self.0 == auth::GUEST
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        if self.http_status() >= 500 {
            tracing::error!(error.code = self.code().as_str(), error.chain = self.chain(), "request failed");
        }
        answer(&self, &EXCHANGE.try_with(Clone::clone).unwrap_or_default())
    }
}

fn answer(error: &Error, exchange: &Exchange) -> Response {
    let status = StatusCode::from_u16(error.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = match exchange.is_openai {
        true => (status, Json(OpenAiErrorBody::of(error, &exchange.id))).into_response(),
        false => {
            let (code, message, request_id) = (error.code(), error.message().to_owned(), exchange.id.clone());
            (status, Json(ErrorBody { error: ErrorDetail { code, message, request_id } })).into_response()
        }
    };
    if let Some(seconds) = error.retry_after_seconds() {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    if error.code() == Code::Unauthorized {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// Gives the exchange an id, which every line of it carries, answers it in `x-request-id`, and logs one
/// line without query or body.
/// A panic behind it is answered 500; its place was logged where it happened.
pub async fn trace(request: Request, next: Next) -> Response {
    let id = Uuid::new_v4().to_string();
    let started = Instant::now();
    let (method, path) = (request.method().clone(), without_key(request.uri().path()).to_owned());
    // A handler that finds out which job it is about says so (`telemetry::about_job`).
    let span = tracing::error_span!("request", request.id = id, job.id = Empty, trace.id = Empty);
    let exchange = Exchange { id: id.clone(), is_openai: path.starts_with(OPENAI_PATHS) };
    let mut work = pin!(EXCHANGE.scope(exchange.clone(), next.run(request)).instrument(span.clone()));
    // What a handler leaves behind in a panic is dropped with it; what outlives it is behind ports.
    let caught = poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))) {
        Ok(poll) => poll.map(Some),
        Err(_) => Poll::Ready(None),
    });
    let mut response = caught.await.unwrap_or_else(|| answer(&Error::internal("panic"), &exchange));
    let _entered = span.entered();
    tracing::info!(
        http.method = %method,
        http.path = path,
        http.status = response.status().as_u16(),
        duration_ms = started.elapsed().as_secs_f64() * 1e3,
        "request answered"
    );
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

/// Gives work that came over an open connection an id, which every line of it carries.
pub async fn exchanged<F: Future>(work: F) -> F::Output {
    let id = Uuid::new_v4().to_string();
    let span = tracing::error_span!("request", request.id = id, job.id = Empty, trace.id = Empty);
    EXCHANGE.scope(Exchange { id, is_openai: false }, work).instrument(span).await
}

/// The path up to where somebody has put a key, such as a whole one in the place of its id.
fn without_key(path: &str) -> &str {
    path.split_once("lesion").map_or(path, |(before, _)| before)
}

/// A host's routes: those behind the check of credentials, and those open to everyone.
pub fn app<C: Callers>(protected: Router, open: Router, access: Arc<Access<C>>) -> Router {
    let protected = protected.route_layer(middleware::from_fn_with_state(access, auth::authenticate::<C>));
    Router::new().merge(protected).merge(open).fallback(no_route).method_not_allowed_fallback(no_method)
}

/// For axum's fallback: no such route.
async fn no_route() -> Error {
    Error::new(Code::NotFound, "There is nothing at this address; see /openapi.json.")
}

/// For axum's method fallback.
async fn no_method() -> Error {
    Error::new(Code::MethodNotAllowed, "This address does not take that method; see /openapi.json.")
}

/// Whether a request was addressed to this machine by a page or program of this machine: the
/// `Host`, and the `Origin` where a browser sends one, are loopback names. A page elsewhere that
/// has its own name point to 127.0.0.1 (DNS rebinding) fails this.
#[must_use]
pub fn is_loopback(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let origin = headers.get(header::ORIGIN).map(|origin| origin.to_str().unwrap_or(""));
    let origin_host = origin.map(|origin| origin.split_once("://").map_or("", |(_, host)| host));
    host.is_some_and(is_loopback_authority) && origin_host.is_none_or(is_loopback_authority)
}

/// A name or address of this machine and perhaps a port, with nothing behind (RFC 9110, 7.2).
pub(crate) fn is_loopback_authority(authority: &str) -> bool {
    let (is_loopback, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => (address.parse::<Ipv6Addr>().is_ok_and(|ip| ip.is_loopback()), port),
        None => {
            let (name, port) = authority.split_at(authority.find(':').unwrap_or(authority.len()));
            let is_address = name.parse::<Ipv4Addr>().is_ok_and(|ip| ip.is_loopback());
            (is_address || name.eq_ignore_ascii_case("localhost"), port)
        }
    };
    let is_port = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
    is_loopback && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loopback(host: &str, origin: Option<&str>) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, origin.parse().unwrap());
        }
        is_loopback(&headers)
    }

    #[test]
    fn only_loopback_names_pass() {
        assert!(loopback("localhost:8080", None));
        assert!(loopback("127.0.0.1:8080", Some("http://localhost:3000")));
        assert!(loopback("[::1]:8080", Some("http://[::1]")));
        for (host, origin) in [
            ("attacker.example:8080", None),
            ("127.0.0.1.attacker.example", None),
            ("localhost.attacker.example", None),
            ("localhost:80.attacker.example", None),
            ("[::1].attacker.example", None),
            ("[::1", None),
            ("[::1]80", None),
            ("[127.0.0.1]", None),
            ("192.168.0.7:8080", None),
            ("localhost:8080", Some("https://attacker.example")),
            ("localhost:8080", Some("null")),
            ("", None),
        ] {
            assert!(!loopback(host, origin), "{host} {origin:?}");
        }
        assert!(!is_loopback(&HeaderMap::new()));
    }

    async fn within(is_openai: bool, work: impl Future<Output = Response>) -> Response {
        EXCHANGE.scope(Exchange { id: "exchange".to_owned(), is_openai }, work).await
    }

    #[tokio::test]
    async fn an_openai_client_reads_errors_in_the_shape_that_it_knows() {
        let error = async || Error::too_many_requests("Words.", 7).into_response();
        let response = within(true, error()).await;
        assert_eq!(
            (response.status().as_u16(), &response.headers()[header::RETRY_AFTER]),
            (429, &"7".parse().unwrap())
        );
        let body = axum::body::to_bytes(response.into_body(), 1024).await.unwrap();
        let expected = concat!(
            r#"{"error":{"message":"Words.","type":"rate_limit_error","param":null,"code":"too_many_requests","#,
            r#""request_id":"exchange"}}"#
        );
        assert_eq!(body, expected.as_bytes());
    }

    #[tokio::test]
    async fn every_code_has_its_status_and_the_one_body_shape() {
        use Code::*;
        let table = [
            (InvalidRequest, 400),
            (Unauthorized, 401),
            (Forbidden, 403),
            (NotFound, 404),
            (MethodNotAllowed, 405),
            (IdempotencyConflict, 409),
            (NotRedrivable, 409),
            (PayloadTooLarge, 413),
            (UnsupportedMediaType, 415),
            (HeicNotSupported, 415),
            (PhotoUnreadable, 422),
            (TooManyRequests, 429),
            (LlmNotConfigured, 404),
            (ModelNotFound, 404),
            (InsufficientQuota, 429),
            (Internal, 500),
            (LlmRefused, 502),
            (LlmRateLimited, 502),
            (LlmUnavailable, 502),
            (LlmInvalidResponse, 502),
            (LlmTimeout, 504),
            (Unavailable, 503),
        ];
        for (code, status) in table {
            let error = || async move { Error::new(code, "Words.").into_response() };
            let response = within(false, error()).await;
            assert_eq!(response.status().as_u16(), status);
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), matches!(status, 429 | 503));
            assert_eq!(response.headers().contains_key(header::WWW_AUTHENTICATE), status == 401);
            let body = axum::body::to_bytes(response.into_body(), 1024).await.unwrap();
            let expected =
                format!(r#"{{"error":{{"code":"{}","message":"Words.","request_id":"exchange"}}}}"#, code.as_str());
            assert_eq!(body, expected.as_bytes());
        }
    }

    #[tokio::test]
    async fn a_request_without_credentials_is_answered_401() {
        let (mut parts, ()) = axum::http::Request::new(()).into_parts();
        let refused = Caller::from_request_parts(&mut parts, &()).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthorized);
    }

    #[test]
    fn an_error_shows_its_message_and_hides_its_cause() {
        let error = Error::unavailable("the store", "disk full at /secret/path");
        assert!(!error.message().contains("secret"));
        assert!(error.chain().contains("disk full"));
    }
}
