//! The bodies of the HTTP API, as the functions write them and the CLI reads them.

pub mod admin;
pub mod chat;
pub mod prompt;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use uuid::Uuid;

use crate::clock::Timestamp;
use crate::job::{Abstention, Description, FailureCode, Job, Prediction, Quality, Stage, Status, Timings};
use chat::TokenUsage;
use prompt::{ConversationBody, PromptBody};

/// The largest photo that a request may carry, in bytes: what is left of Lambda's 6 MB after base64.
pub const MAX_PHOTO_BYTES: usize = 4 * 1024 * 1024;
/// The largest photo that may be uploaded through `POST /uploads`, in bytes.
pub const MAX_UPLOAD_BYTES: u64 = 25 * 1024 * 1024;
/// The longest that `?wait=` holds a request open, in seconds: below the 29–30 s at which API
/// Gateway gives up.
pub const MAX_WAIT_SECONDS: u32 = 25;
/// Page size of `GET /results`: default and upper bound.
pub const PAGE_DEFAULT: u32 = 20;
pub const PAGE_MAX: u32 = 100;

/// Stands under every prediction that leaves the system.
pub const DISCLAIMER: &str = "Research demonstration, not a medical device: this is no diagnosis and no substitute \
for one. Have any lesion that is new, changing, bleeding or that worries you seen by a doctor, whatever is written here.";

/// Stands beside every class activation map that leaves the system.
pub const MAP_NOTE: &str = "Non-diagnostic: the places of the photo that raised the score of the class that comes \
first. It outlines no lesion, and what it leaves clear is not thereby harmless.";

/// `POST /submit` as JSON: the photo itself, where it was uploaded to, or what the LLM is to answer.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum SubmitBody {
    Photo(PhotoBody),
    Upload(ImageKeyBody),
    Prompt(PromptBody),
    Conversation(ConversationBody),
}

/// A photo in the request.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PhotoBody {
    /// A JPEG, PNG or WebP photo of at most 4 MiB, in standard base64.
    #[schema(
        content_encoding = "base64",
        min_length = 4,
        pattern = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{4}|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=|[A-Za-z0-9+/][AQgw]==)$",
        example = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="
    )]
    pub image: String,
    /// Whether a description is wanted.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub describe: bool,
    /// Where to tell of the end over HTTP: a URL of a host that the operator allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 2048, example = "https://hooks.example/lesion")]
    pub callback_url: Option<String>,
}

/// A photo that was uploaded before.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageKeyBody {
    /// As `POST /uploads` answered it.
    pub image_key: String,
    /// Whether a description is wanted.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub describe: bool,
    /// Where to tell of the end over HTTP: a URL of a host that the operator allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 2048, example = "https://hooks.example/lesion")]
    pub callback_url: Option<String>,
}

/// `POST /uploads`: the photo that is to be uploaded.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UploadBody {
    /// `image/jpeg`, `image/png` or `image/webp`.
    #[schema(pattern = "^image/(jpeg|png|webp)$", example = "image/jpeg")]
    pub content_type: String,
    /// The exact number of bytes, at most 25 MiB.
    #[schema(minimum = 1, maximum = 26214400)]
    pub size_bytes: u64,
    /// SHA-256 of the bytes, 64 hex digits.
    #[schema(
        pattern = "^[0-9a-fA-F]{64}$",
        example = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    )]
    pub sha256: String,
}

/// The answer to `POST /uploads`: send the bytes to `url`, then submit `image_key`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct UploadPermit {
    /// What `POST /submit` takes in the place of the photo.
    pub image_key: String,
    /// `PUT`
    pub method: String,
    /// Absolute, or to be resolved against the address of the API.
    pub url: String,
    /// To be sent with the bytes, exactly as they are.
    pub headers: BTreeMap<String, String>,
    /// Until when the upload may begin.
    #[schema(value_type = String, format = DateTime)]
    pub expires_at: Timestamp,
}

/// The description of the whole API, put together of its functions' parts.
#[must_use]
pub fn describe(parts: impl IntoIterator<Item = OpenApi>) -> OpenApi {
    #[derive(utoipa::OpenApi)]
    #[openapi(info(
        title = "Skin-lesion pipeline",
        description = "Photo in, calibrated class probabilities and a plain-language description out. \
            Research demonstration, not a medical device.",
        license(name = "Apache-2.0 OR MIT"),
    ))]
    struct Whole;
    let mut whole = <Whole as utoipa::OpenApi>::openapi();
    parts.into_iter().for_each(|part| whole.merge(part));
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("An API key, or a token of the host's issuer. A host without keys asks for neither."));
    let components = whole.components.get_or_insert_default();
    components.add_security_scheme("bearer", SecurityScheme::Http(bearer.build()));
    // Either: a host without keys, or with guests, takes requests without.
    whole.security =
        Some(vec![SecurityRequirement::default(), SecurityRequirement::new("bearer", Vec::<String>::new())]);
    whole
}

/// `describe` where a request does not say.
#[must_use]
pub fn yes() -> bool {
    true
}

/// The answer to `POST /submit`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Submitted {
    pub request_id: Uuid,
    pub status: Status,
}

/// How a failed job is reported.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResultError {
    pub code: FailureCode,
    pub message: String,
    pub stage: Stage,
    /// Whether an operator may send the job round again.
    pub retryable: bool,
}

/// One job as its caller sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobResult {
    pub request_id: Uuid,
    pub status: Status,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    pub updated_at: Timestamp,
    #[serde(flatten)]
    pub outcome: Outcome,
    pub timings_ms: Timings,
    pub error: Option<ResultError>,
    pub disclaimer: String,
}

/// What came of a job, by what it works on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Outcome {
    Photo(PhotoOutcome),
    Prompt(PromptOutcome),
}

/// What the model said of a photo.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PhotoOutcome {
    /// Highest first; empty until the model has run, and where it abstained.
    pub predictions: Vec<Prediction>,
    /// Set where the model gives no label for this photo.
    pub abstained: Option<Abstention>,
    pub quality: Option<Quality>,
    /// SHA-256 of the model bundle's manifest.
    pub model_digest: Option<String>,
    pub description: Option<Description>,
    /// Null where the model draws none, where it abstained, in lists, and once the photo has expired.
    #[serde(default)]
    pub map: Option<MapLink>,
}

/// Where a class activation map is: an overlay to be laid over the upright photo, stretched to its
/// size. One colour, more opaque where a place of the photo raised the score of the class that comes
/// first more; no pixel of the photo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MapLink {
    /// Gives the PNG to whoever holds it, without other credentials. Absolute, or to be resolved
    /// against the address of the API.
    pub url: String,
    /// Until when; each answer has a new URL.
    #[schema(value_type = String, format = DateTime)]
    pub expires_at: Timestamp,
    /// What it is not. Show it beside the map.
    pub note: String,
}

/// What the LLM answered to a prompt; all null until the job is completed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PromptOutcome {
    /// What the LLM said. No prediction and no diagnosis. Null in lists.
    pub content: Option<String>,
    /// Why it ended, in the LLM's words: `stop`, `length` where `max_tokens` cut it off.
    pub finish_reason: Option<String>,
    pub token_usage: Option<TokenUsage>,
    /// From the request to the whole answer, tries that failed included.
    pub latency_ms: Option<u64>,
    /// By the prices that the operator has set; null where there are none.
    pub cost_usd: Option<f64>,
}

impl Outcome {
    fn of(job: &Job) -> Self {
        if job.is_prompt() {
            let answer = job.answer.as_ref();
            return Self::Prompt(PromptOutcome {
                content: None,
                finish_reason: answer.and_then(|answer| answer.finish_reason.clone()),
                token_usage: answer.map(|answer| TokenUsage {
                    prompt_tokens: answer.prompt_tokens,
                    completion_tokens: answer.completion_tokens,
                }),
                latency_ms: answer.map(|answer| answer.latency_ms),
                cost_usd: answer.and_then(|answer| answer.cost_usd),
            });
        }
        let reading = job.reading.as_ref();
        Self::Photo(PhotoOutcome {
            predictions: reading.map(|reading| reading.predictions.clone()).unwrap_or_default(),
            abstained: reading.and_then(|reading| reading.abstained),
            quality: job.quality.clone(),
            model_digest: reading.map(|reading| reading.model_digest.clone()),
            description: job.description.clone(),
            map: None,
        })
    }
}

impl JobResult {
    /// With the text of a prompt's answer, which may be too large for a list.
    #[must_use]
    pub fn with_content(mut self, text: Option<String>) -> Self {
        if let Outcome::Prompt(outcome) = &mut self.outcome {
            outcome.content = text;
        }
        self
    }

    /// With where a photo's class activation map is, which only who reads one result is told.
    #[must_use]
    pub fn with_map(mut self, map: Option<MapLink>) -> Self {
        if let Outcome::Photo(outcome) = &mut self.outcome {
            outcome.map = map;
        }
        self
    }
}

impl From<&Job> for JobResult {
    fn from(job: &Job) -> Self {
        Self {
            request_id: job.id,
            status: job.status,
            created_at: job.created_at,
            updated_at: job.updated_at,
            outcome: Outcome::of(job),
            timings_ms: job.timings_ms.clone(),
            error: job.failure.as_ref().map(|failure| ResultError {
                code: failure.code,
                message: failure.code.message().to_owned(),
                stage: failure.stage,
                retryable: failure.retryable,
            }),
            disclaimer: DISCLAIMER.to_owned(),
        }
    }
}

/// A page of the caller's jobs.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct JobPage {
    /// Newest first.
    pub results: Vec<JobResult>,
    /// Pass as `?cursor=` for the next page; absent on the last.
    pub next_cursor: Option<String>,
}

/// `GET /healthz`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok`
    pub status: String,
    pub version: String,
}
