//! Every error that our code answers over HTTP, and the only table of statuses.
//!
//! The outer message is for the caller; the cause goes to the log and nowhere else.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// What went wrong, sorted by what the caller does about it. The names are part of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    InvalidRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    IdempotencyConflict,
    NotRedrivable,
    PayloadTooLarge,
    UnsupportedMediaType,
    HeicNotSupported,
    PhotoUnreadable,
    CallbackNotAllowed,
    TooManyRequests,
    Internal,
    LlmNotConfigured,
    ModelNotFound,
    InsufficientQuota,
    LlmRefused,
    LlmRateLimited,
    LlmUnavailable,
    LlmInvalidResponse,
    LlmTimeout,
    Unavailable,
}

impl Code {
    /// The HTTP status that goes with the code.
    #[must_use]
    pub fn http_status(self) -> u16 {
        match self {
            Self::InvalidRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::NotFound | Self::LlmNotConfigured | Self::ModelNotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::IdempotencyConflict | Self::NotRedrivable => 409,
            Self::PayloadTooLarge => 413,
            Self::UnsupportedMediaType | Self::HeicNotSupported => 415,
            Self::PhotoUnreadable | Self::CallbackNotAllowed => 422,
            Self::TooManyRequests | Self::InsufficientQuota => 429,
            Self::Internal => 500,
            Self::LlmRefused | Self::LlmRateLimited | Self::LlmUnavailable | Self::LlmInvalidResponse => 502,
            Self::Unavailable => 503,
            Self::LlmTimeout => 504,
        }
    }

    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::IdempotencyConflict => "idempotency_conflict",
            Self::NotRedrivable => "not_redrivable",
            Self::PayloadTooLarge => "payload_too_large",
            Self::UnsupportedMediaType => "unsupported_media_type",
            Self::HeicNotSupported => "heic_not_supported",
            Self::PhotoUnreadable => "photo_unreadable",
            Self::CallbackNotAllowed => "callback_not_allowed",
            Self::TooManyRequests => "too_many_requests",
            Self::Internal => "internal",
            Self::LlmNotConfigured => "llm_not_configured",
            Self::ModelNotFound => "model_not_found",
            Self::InsufficientQuota => "insufficient_quota",
            Self::LlmRefused => "llm_refused",
            Self::LlmRateLimited => "llm_rate_limited",
            Self::LlmUnavailable => "llm_unavailable",
            Self::LlmInvalidResponse => "llm_invalid_response",
            Self::LlmTimeout => "llm_timeout",
            Self::Unavailable => "unavailable",
        }
    }
}

/// An error with its message for the caller and, apart, its cause for the log.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", code.as_str())]
pub struct Error {
    code: Code,
    message: String,
    #[source]
    source: Option<Source>,
    retry_after_seconds: Option<u32>,
}

/// What a caller is told to wait where nothing better is known.
const RETRY_AFTER_SECONDS: u32 = 5;

impl Error {
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), source: None, retry_after_seconds: None }
    }

    /// A dependency did not do its part; another try may succeed.
    #[must_use]
    pub fn unavailable(what: &'static str, source: impl Into<Source>) -> Self {
        let message = format!("{what} is not available at the moment. Try again.");
        Self { source: Some(source.into()), ..Self::new(Code::Unavailable, message) }
    }

    /// A bug or a broken record; trying again does not help.
    #[must_use]
    pub fn internal(source: impl Into<Source>) -> Self {
        Self { source: Some(source.into()), ..Self::new(Code::Internal, "Something went wrong on our side.") }
    }

    #[must_use]
    pub fn not_found() -> Self {
        Self::new(Code::NotFound, "There is no such request.")
    }

    /// The caller has used up its share of requests or of room.
    #[must_use]
    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        Self::new(Code::TooManyRequests, message).retry_after(retry_after_seconds)
    }

    /// Tells the caller how long to wait.
    #[must_use]
    pub fn retry_after(self, seconds: u32) -> Self {
        Self { retry_after_seconds: Some(seconds), ..self }
    }

    /// The seconds of `Retry-After`; 429 and 503 always carry it.
    #[must_use]
    pub fn retry_after_seconds(&self) -> Option<u32> {
        self.retry_after_seconds.or(self.is_retryable().then_some(RETRY_AFTER_SECONDS))
    }

    #[must_use]
    pub fn code(&self) -> Code {
        self.code
    }

    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    #[must_use]
    pub fn http_status(&self) -> u16 {
        self.code.http_status()
    }

    /// Whether the same call may succeed later.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self.code, Code::Unavailable | Code::TooManyRequests | Code::InsufficientQuota)
    }

    /// The whole chain of causes in one line, for the log.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}

/// The one body shape of every error.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    pub code: Code,
    /// For a person; may change between releases.
    pub message: String,
    /// Names this HTTP exchange in the log; also the `x-request-id` header.
    pub request_id: String,
}

/// The body of an error as OpenAI's clients read it: what is below `/v1/` answers so.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct OpenAiErrorBody {
    pub error: OpenAiErrorDetail,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct OpenAiErrorDetail {
    /// For a person; may change between releases.
    pub message: String,
    /// The kind of error, by its status: `invalid_request_error`, `authentication_error`,
    /// `permission_error`, `rate_limit_error` or `server_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The field that is wrong; the proxy says so in the message.
    pub param: Option<String>,
    pub code: Code,
    /// Names this HTTP exchange in the log; also the `x-request-id` header.
    pub request_id: String,
}

impl OpenAiErrorBody {
    #[must_use]
    pub fn of(error: &Error, request_id: &str) -> Self {
        let kind = match error.http_status() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        let (message, code) = (error.message().to_owned(), error.code());
        let detail = OpenAiErrorDetail { message, kind: kind.into(), param: None, code, request_id: request_id.into() };
        Self { error: detail }
    }
}
