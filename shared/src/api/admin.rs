//! The bodies of `/admin/…`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::clock::Timestamp;
use crate::job::Status;

/// What a key or a token may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Submit photos, read, list and delete the caller's own jobs.
    Jobs,
    /// Make and revoke keys, send what has failed round again.
    Admin,
}

impl Scope {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Jobs => "jobs",
            Self::Admin => "admin",
        }
    }
}

/// `POST /admin/keys`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewKey {
    /// Whose jobs the key opens. Keys of one caller see the same jobs.
    #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,63}$", example = "ward-3")]
    pub caller: String,
    /// For people, such as the device that holds the key.
    #[serde(default)]
    #[schema(max_length = 100, pattern = "^[^\\u0000-\\u001f\\u007f-\\u009f]*$", example = "tablet at the door")]
    pub name: String,
    #[serde(default = "jobs")]
    #[schema(min_items = 1)]
    pub scopes: Vec<Scope>,
    /// In the future; absent for a key that does not expire.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires_at: Option<Timestamp>,
    /// As in [`KeyLimits`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_items = 1, max_items = 100, value_type = Option<Vec<ModelName>>)]
    pub models: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1000000000)]
    pub requests_per_minute: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1000000000)]
    pub tokens_per_minute: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 1000000)]
    pub budget_usd_per_month: Option<f64>,
}

/// A model, by the name that clients use.
#[derive(ToSchema)]
#[schema(min_length = 1, max_length = 200)]
pub struct ModelName(pub String);

impl NewKey {
    /// A key without an end and without limits.
    #[must_use]
    pub fn plain(caller: String, name: String, scopes: Vec<Scope>) -> Self {
        Self {
            caller,
            name,
            scopes,
            expires_at: None,
            models: None,
            requests_per_minute: None,
            tokens_per_minute: None,
            budget_usd_per_month: None,
        }
    }
}

/// What a key may ask of the models below `/v1/`; absent is unlimited.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct KeyLimits {
    /// The models that the key may ask, by the names that clients use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
    /// So many at once, and then evenly as many a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Of prompts and answers together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u32>,
    /// By the month of the calendar, in UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_usd_per_month: Option<f64>,
}

impl KeyLimits {
    /// Whether the key may ask this model.
    #[must_use]
    pub fn allow(&self, model: &str) -> bool {
        self.models.as_ref().is_none_or(|models| models.iter().any(|allowed| allowed == model))
    }
}

fn jobs() -> Vec<Scope> {
    vec![Scope::Jobs]
}

/// A key as it may be shown again and again: without its secret.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct KeyInfo {
    /// The part of the key between its underscores; no secret.
    pub id: String,
    pub caller: String,
    pub name: String,
    pub scopes: Vec<Scope>,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires_at: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub revoked_at: Option<Timestamp>,
    #[serde(flatten)]
    pub limits: KeyLimits,
}

/// The answer to `POST /admin/keys`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CreatedKey {
    /// Shown this once; only its hash is kept.
    pub key: String,
    #[serde(flatten)]
    pub info: KeyInfo,
}

/// `GET /admin/keys`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct KeyList {
    /// Oldest first, revoked and expired ones included.
    pub keys: Vec<KeyInfo>,
}

/// `GET /admin/keys/{id}/usage`: what a key has had of the models.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct KeyUsage {
    /// Requests that are under way, each with its reservation.
    pub under_way: u64,
    /// Oldest first; a month without requests is absent.
    pub months: Vec<MonthUsage>,
}

/// One month's ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MonthUsage {
    /// In UTC.
    #[schema(example = "2026-11")]
    pub month: String,
    /// Those that have ended, the estimated ones included.
    pub requests: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// 0 where the models have no prices.
    pub cost_usd: f64,
    /// Requests whose usage no server has told: their clients left, or their servers broke off.
    pub estimated_requests: u64,
    /// Of the tokens above.
    pub estimated_tokens: u64,
    /// Of the cost above.
    pub estimated_cost_usd: f64,
}

/// A message that was received too often and given up.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct DeadLetterInfo {
    pub id: String,
    #[schema(value_type = String, format = DateTime)]
    pub sent_at: Timestamp,
    /// Absent where the queue does not tell.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub given_up_at: Option<Timestamp>,
    pub receive_count: u32,
    /// `infer`, `forget`, `deliver` or `answer`; absent where the message cannot be read.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// The job that the message is about; absent where it cannot be read.
    pub job_id: Option<Uuid>,
    /// Of the body, which is not shown.
    pub size_bytes: u64,
}

/// `GET /admin/dead-letters`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct DeadLetterList {
    /// At most 100, longest dead first.
    pub dead_letters: Vec<DeadLetterInfo>,
}

/// `POST /admin/dead-letters/redrive`.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RedriveDeadLetters {
    /// Absent: all.
    #[serde(default)]
    #[schema(max_items = 1000)]
    pub ids: Option<Vec<String>>,
}

/// How many dead letters went back into the queue.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct RedrivenDeadLetters {
    pub redriven: u64,
}

/// The answer to `POST /admin/jobs/{request_id}/redrive`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct RedrivenJob {
    pub request_id: Uuid,
    pub status: Status,
}
