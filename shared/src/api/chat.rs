//! The bodies of `POST /chat`, and what the proxy below `/v1/` says of itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The longest body, in bytes.
pub const MAX_BODY_BYTES: usize = 1024 * 1024;
/// The most messages of a conversation.
pub const MAX_MESSAGES: usize = 100;
/// The most tokens that an answer may be asked to have.
pub const MAX_TOKENS: u32 = 100_000;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    System,
    User,
    Assistant,
}

/// `POST /chat`: a conversation that the LLM is to go on with.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatBody {
    /// Oldest first, 1 to 100, at least one of the role `user`.
    #[schema(min_items = 1, max_items = 100)]
    pub messages: Vec<ChatMessage>,
    /// 0 (always the likeliest word) to 2; unset takes `LLM_TEMPERATURE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// The longest answer, in tokens; unset takes `LLM_MAX_TOKENS`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100000)]
    pub max_tokens: Option<u32>,
}

/// What somebody said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    pub role: Role,
    /// Text, and not only white space.
    #[schema(min_length = 1, pattern = r"\S")]
    pub content: String,
}

/// What holds of every conversation, over `/chat` and `/submit`.
///
/// # Errors
/// A sentence that says what is wrong, and repeats nothing of the conversation.
pub fn check(messages: &[ChatMessage], temperature: Option<f64>, max_tokens: Option<u32>) -> Result<(), String> {
    if !(1..=MAX_MESSAGES).contains(&messages.len()) {
        return Err(format!("\"messages\" must be 1 to {MAX_MESSAGES}."));
    }
    if let Some(at) = messages.iter().position(|message| message.content.trim().is_empty()) {
        return Err(format!("\"messages[{at}].content\" is empty."));
    }
    if messages.iter().all(|message| message.role != Role::User) {
        return Err("\"messages\" holds nothing of the role \"user\".".to_owned());
    }
    if temperature.is_some_and(|temperature| !(0.0..=2.0).contains(&temperature)) {
        return Err("\"temperature\" must be 0 to 2.".to_owned());
    }
    if max_tokens.is_some_and(|tokens| !(1..=MAX_TOKENS).contains(&tokens)) {
        return Err(format!("\"max_tokens\" must be 1 to {MAX_TOKENS}."));
    }
    Ok(())
}

/// The answer to `POST /chat`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ChatAnswer {
    /// The completion's id, as the LLM gave it.
    pub id: String,
    /// The model that answered, as it calls itself.
    pub model: String,
    /// What the LLM said. No prediction and no diagnosis.
    pub content: String,
    /// Why it ended, in the LLM's words: `stop`, `length` where `max_tokens` cut it off.
    pub finish_reason: Option<String>,
    pub usage: TokenUsage,
    /// From the request to the whole answer, tries that failed included.
    pub latency_ms: u64,
    /// Names this HTTP exchange in the log; also the `x-request-id` header.
    pub request_id: String,
}

/// What an answer took; null where the LLM does not say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenUsage {
    pub prompt_tokens: Option<u64>,
    pub completion_tokens: Option<u64>,
}

/// `GET /v1/models`, as OpenAI's API reference has it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    pub object: String,
    pub data: Vec<ModelInfo>,
}

/// A model that may be asked for.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ModelInfo {
    /// What a request calls it.
    pub id: String,
    /// `model`.
    pub object: String,
    /// 0: nobody keeps it.
    pub created: u64,
    pub owned_by: String,
}
