//! What the record keeps of a prompt and of its answer. The prompt itself is a blob, and so is an
//! answer that is too large for a record.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::FailureCode;
use crate::clock::Timestamp;

/// The largest answer that a record holds, in bytes of JSON: DynamoDB takes items of 400 KB.
const MAX_INLINE_BYTES: usize = 256 * 1024;

/// What is known of the stored prompt, which lies in the blob store under [`prompt_key`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredPrompt {
    pub size_bytes: u64,
    /// When the prompt may be gone; a redrive after it is refused.
    pub expires_at: Timestamp,
    /// The connection that asked (`push.rs`), which is told the text as it comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<String>,
}

/// What the LLM answered to a prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LlmAnswer {
    pub content: AnswerContent,
    /// In the LLM's words.
    pub finish_reason: Option<String>,
    pub prompt_tokens: Option<u64>,
    pub completion_tokens: Option<u64>,
    /// From the request to the whole answer, tries that failed included.
    pub latency_ms: u64,
    /// By the prices that were set; absent where none are.
    pub cost_usd: Option<f64>,
}

/// Where an answer's text is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerContent {
    Text(String),
    /// In the blob store.
    Blob {
        key: String,
    },
}

impl AnswerContent {
    /// Where the answer to `claim` of a job goes.
    #[must_use]
    pub fn of(text: &str, id: Uuid, claim: u64) -> Self {
        let fits = serde_json::to_string(text).is_ok_and(|json| json.len() <= MAX_INLINE_BYTES);
        if fits { Self::Text(text.to_owned()) } else { Self::Blob { key: answer_key(id, claim) } }
    }
}

/// Why a claim on a prompt got no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LlmTrouble {
    pub code: FailureCode,
    /// Whether another attempt may cure it.
    pub passing: bool,
    /// Whether an operator may send the job round again, once it has failed by this.
    pub redrivable: bool,
}

/// Where a job's prompt lies.
#[must_use]
pub fn prompt_key(id: Uuid) -> String {
    format!("jobs/{id}/prompt.json")
}

/// Where the large answer to one claim lies. A stale worker's does not take the place of another's.
#[must_use]
pub fn answer_key(id: Uuid, claim: u64) -> String {
    format!("jobs/{id}/answer-{claim}")
}
