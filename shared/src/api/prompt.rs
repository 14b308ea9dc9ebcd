//! The bodies of `POST /submit` for a prompt, and what is stored of one.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::chat::{ChatMessage, Role};

/// What the answer must be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AnswerFormat {
    #[default]
    Text,
    /// JSON. The LLM is told so; say in the prompt as well what is to be in it.
    Json,
}

/// `POST /submit`: a question to the LLM.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PromptBody {
    /// Text, and not only white space.
    #[schema(min_length = 1, pattern = r"\S", example = "What is a naevus?")]
    pub prompt: String,
    /// How the LLM is to behave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, pattern = r"\S")]
    pub system: Option<String>,
    /// The longest answer, in tokens; unset takes `LLM_MAX_TOKENS`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100000)]
    pub max_tokens: Option<u32>,
    /// 0 (always the likeliest word) to 2; unset takes `LLM_TEMPERATURE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    #[serde(default)]
    pub format: AnswerFormat,
    /// Where to tell of the end over HTTP: a URL of a host that the operator allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 2048, example = "https://hooks.example/lesion")]
    pub callback_url: Option<String>,
}

/// `POST /submit`: a conversation that the LLM is to go on with.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConversationBody {
    /// Oldest first, 1 to 100 (`system` counts), at least one of the role `user`.
    #[schema(min_items = 1, max_items = 100)]
    pub messages: Vec<ChatMessage>,
    /// How the LLM is to behave; goes before the messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, pattern = r"\S")]
    pub system: Option<String>,
    /// The longest answer, in tokens; unset takes `LLM_MAX_TOKENS`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100000)]
    pub max_tokens: Option<u32>,
    /// 0 (always the likeliest word) to 2; unset takes `LLM_TEMPERATURE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    #[serde(default)]
    pub format: AnswerFormat,
    /// Where to tell of the end over HTTP: a URL of a host that the operator allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 2048, example = "https://hooks.example/lesion")]
    pub callback_url: Option<String>,
}

/// A checked prompt as it lies in the blob store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptRequest {
    /// Oldest first; a `system` of the body is the first of them.
    pub messages: Vec<ChatMessage>,
    pub max_tokens: Option<u32>,
    pub temperature: Option<f64>,
    pub format: AnswerFormat,
}

impl PromptRequest {
    /// With `system` before the messages.
    #[must_use]
    pub fn with_system(mut self, system: Option<String>) -> Self {
        let system = system.map(|content| ChatMessage { role: Role::System, content });
        self.messages.splice(0..0, system);
        self
    }
}
