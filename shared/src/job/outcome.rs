//! What a job comes to: a reading with its quality and its description, or a failure.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Stage;
use crate::clock::Timestamp;

/// Why a new photo is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RetakeReason {
    TooSmall,
    Blurred,
    TooDark,
    TooBright,
    LowContrast,
}

/// One class and its calibrated probability.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Prediction {
    /// The class's code in the model's manifest.
    #[schema(example = "nv")]
    pub label: String,
    #[schema(example = "Melanocytic nevus")]
    pub name: String,
    /// Calibrated, 0–1; all classes add up to 1.
    pub probability: f64,
    /// Whether the manifest counts the class among the malignant or pre-malignant ones.
    pub malignant: bool,
}

/// Why the model gives no label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AbstainReason {
    /// The highest calibrated probability is below the manifest's threshold.
    LowConfidence,
    /// The picture does not look like what the model was trained on.
    OutOfDistribution,
}

/// The model gives no label for this photo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Abstention {
    pub reason: AbstainReason,
}

/// What the model said: predictions, or an abstention and none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reading {
    /// SHA-256 of the bundle's manifest, in hex.
    pub model_digest: String,
    /// Highest first; empty where the model abstained.
    pub predictions: Vec<Prediction>,
    pub abstained: Option<Abstention>,
    /// Whether an overlay of the class activation map lies under [`map_key`]; in no record of
    /// earlier builds.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub has_map: bool,
}

/// Measures of the photo, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Quality {
    /// Whether the photo went on to the model.
    pub accepted: bool,
    /// Empty where accepted.
    pub reasons: Vec<RetakeReason>,
    /// The measures behind the reasons, by name; units in `docs/API.md`.
    #[schema(value_type = std::collections::BTreeMap<String, f64>)]
    pub measures: std::collections::BTreeMap<String, f64>,
}

/// Who wrote a description.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DescriptionSource {
    Llm,
    /// The offline template; `fallback` says why where an LLM had been asked.
    Template,
}

/// A plain-language text about the predictions, disclaimer included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Description {
    pub text: String,
    pub source: DescriptionSource,
    /// Version of the prompt or of the template.
    #[schema(example = "describe-v1")]
    pub version: String,
    /// The code of what kept the LLM's text out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
}

/// One call to the LLM, for the ledger, begun with the claim and settled with its end. No prompt and no answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LlmCall {
    pub claim: u64,
    pub at: Timestamp,
    pub latency_ms: u64,
    /// Requests that the call took; all but the last failed.
    pub tries: u32,
    /// `ok`, or the code of what went wrong; `unknown` until it is settled, and for good where the worker was lost:
    /// then it may have been made or not.
    pub outcome: String,
    pub finish_reason: Option<String>,
    pub prompt_tokens: Option<u64>,
    pub completion_tokens: Option<u64>,
    /// By the prices that were set; absent where none are.
    pub cost_usd: Option<f64>,
}

impl LlmCall {
    /// The [`Self::outcome`] of one that is not settled.
    pub const UNKNOWN: &str = "unknown";

    #[must_use]
    pub fn begun(claim: u64, at: Timestamp) -> Self {
        Self {
            claim,
            at,
            latency_ms: 0,
            tries: 0,
            outcome: Self::UNKNOWN.to_owned(),
            finish_reason: None,
            prompt_tokens: None,
            completion_tokens: None,
            cost_usd: None,
        }
    }

    #[must_use]
    pub fn is_unknown(&self) -> bool {
        self.outcome == Self::UNKNOWN
    }
}

/// How a job ended badly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    pub stage: Stage,
    pub code: FailureCode,
    /// Whether an operator may send the job round again.
    pub retryable: bool,
}

/// Why a job failed. The names are part of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The header was right, the pixels are damaged.
    PhotoUnreadable,
    /// The stored photo is gone.
    PhotoMissing,
    /// The network gave something that is no probability.
    ModelError,
    /// Workers died or were refused `MAX_ATTEMPTS` times.
    AttemptsExhausted,
    /// The job was open for longer than its deadline.
    DeadlineExceeded,
    /// The stored prompt is gone.
    PromptMissing,
    /// The host has no LLM any more.
    LlmNotConfigured,
    /// The LLM refused the request.
    LlmRefused,
    /// What the LLM's server answered is no completion.
    LlmInvalidResponse,
    /// JSON was asked for, and the answer is none.
    LlmInvalidJson,
    /// The LLM takes no more requests, `MAX_ATTEMPTS` times.
    LlmRateLimited,
    /// The LLM took too long, `MAX_ATTEMPTS` times.
    LlmTimeout,
    /// The LLM could not be reached or failed, `MAX_ATTEMPTS` times.
    LlmUnavailable,
}

impl FailureCode {
    /// A sentence for the person who reads the result.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            Self::PhotoUnreadable => "The photo is damaged and cannot be decoded. Send it again.",
            Self::PhotoMissing => "The stored photo is gone. Send it again.",
            Self::ModelError => "The model gave no usable answer for this photo.",
            Self::AttemptsExhausted => "The request could not be processed after several attempts.",
            Self::DeadlineExceeded => "The request could not be processed in time.",
            Self::PromptMissing => "The stored prompt is gone. Send it again.",
            Self::LlmNotConfigured => "This host has no LLM; its operator sets LLM_BASE_URL.",
            Self::LlmRefused => "The LLM refused the request.",
            Self::LlmInvalidResponse => "The LLM answered something that is no completion.",
            Self::LlmInvalidJson => "The LLM's answer is not the JSON that was asked for.",
            Self::LlmRateLimited => "The LLM took no more requests, several times.",
            Self::LlmTimeout => "The LLM took too long, several times.",
            Self::LlmUnavailable => "The LLM was not available, several times.",
        }
    }
}
