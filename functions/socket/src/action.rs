//! What a client says over an open WebSocket.

use serde::Deserialize;
use shared::api::chat::{ChatMessage, Role};
use shared::api::prompt::{AnswerFormat, PromptRequest};
use shared::create::check_prompt;
use shared::error::{Code, Error};
use shared::http::body::{invalid, object};
use shared::push::MAX_FRAME_BYTES;

/// The longest `tag`, in bytes.
const MAX_TAG_BYTES: usize = 64;
const SHAPE: &str =
    r#"{"action": "subscribe", "request_id"}, {"action": "ask", "prompt" or "messages"} or {"action": "ping"}"#;

/// One message of a client.
#[derive(Debug, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case", deny_unknown_fields)]
pub enum Action {
    /// To be told of a job of the caller's.
    Subscribe {
        request_id: String,
        #[serde(default)]
        tag: Option<String>,
    },
    /// The LLM's answer to a prompt, with the fields of `POST /submit`.
    Ask {
        #[serde(default)]
        prompt: Option<String>,
        #[serde(default)]
        messages: Option<Vec<ChatMessage>>,
        #[serde(default)]
        system: Option<String>,
        #[serde(default)]
        max_tokens: Option<u32>,
        #[serde(default)]
        temperature: Option<f64>,
        #[serde(default)]
        format: AnswerFormat,
        #[serde(default)]
        idempotency_key: Option<String>,
        #[serde(default)]
        tag: Option<String>,
    },
    Ping {
        #[serde(default)]
        tag: Option<String>,
    },
}

impl Action {
    /// # Errors
    /// 400 or 413, in words that repeat nothing of it.
    pub fn read(message: &str) -> Result<Self, Error> {
        if message.len() > MAX_FRAME_BYTES {
            let words = "A message is at most 32 KiB. Send a longer prompt by POST /submit, and subscribe to it.";
            return Err(Error::new(Code::PayloadTooLarge, words));
        }
        let action: Self = object(message.as_bytes(), SHAPE)?;
        let (Self::Subscribe { tag, .. } | Self::Ask { tag, .. } | Self::Ping { tag }) = &action;
        if tag.as_ref().is_some_and(|tag| tag.len() > MAX_TAG_BYTES) {
            return Err(invalid("\"tag\" is at most 64 bytes."));
        }
        Ok(action)
    }

    /// The tag of what was refused, where that much of it can be read.
    #[must_use]
    pub fn tag_of(message: &str) -> Option<String> {
        #[derive(Deserialize)]
        struct Tagged {
            tag: String,
        }
        let Tagged { tag } = object(message.as_bytes(), SHAPE).ok()?;
        (tag.len() <= MAX_TAG_BYTES).then_some(tag)
    }

    /// What the client gave it to know the answer by.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        let (Self::Subscribe { tag, .. } | Self::Ask { tag, .. } | Self::Ping { tag }) = self;
        tag.as_deref()
    }

    /// Its name on the wire.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Subscribe { .. } => "subscribe",
            Self::Ask { .. } => "ask",
            Self::Ping { .. } => "ping",
        }
    }

    /// The prompt of [`Action::Ask`], checked, and its key.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn asked(self) -> Result<(PromptRequest, Option<String>), Error> {
        let Self::Ask { prompt, messages, system, max_tokens, temperature, format, idempotency_key, .. } = self else {
            return Err(Error::internal("no prompt was asked"));
        };
        let messages = match (prompt, messages) {
            (Some(content), None) => vec![ChatMessage { role: Role::User, content }],
            (None, Some(messages)) => messages,
            _ => return Err(invalid("Give \"prompt\" or \"messages\".")),
        };
        let request = PromptRequest { messages, max_tokens, temperature, format }.with_system(system);
        check_prompt(&request)?;
        Ok((request, idempotency_key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_action_is_refused_and_never_repeated() {
        for text in [
            "",
            "secret",
            "[]",
            r#""ping""#,
            "{}",
            r#"{"action": "secret"}"#,
            r#"{"action": "subscribe"}"#,
            r#"{"action": "subscribe", "request_id": 7}"#,
            r#"{"action": "ping", "secret": 1}"#,
            &format!(r#"{{"action": "ping", "tag": "{}"}}"#, "secret".repeat(11)),
        ] {
            let error = Action::read(text).unwrap_err();
            assert_eq!(error.code(), Code::InvalidRequest, "{text}");
            assert!(!error.message().contains("secret"), "{error}");
        }
        let long = format!(r#"{{"action": "ask", "prompt": "{}"}}"#, "x".repeat(MAX_FRAME_BYTES));
        assert_eq!(Action::read(&long).unwrap_err().code(), Code::PayloadTooLarge);
    }

    #[test]
    fn an_action_is_read_with_its_tag() {
        let action = Action::read(r#"{"action": "ask", "prompt": "What is a naevus?", "tag": "7"}"#).unwrap();
        assert_eq!((action.name(), action.tag()), ("ask", Some("7")));
        let (request, key) = action.asked().unwrap();
        assert_eq!((request.messages[0].content.as_str(), key), ("What is a naevus?", None));
        for text in [
            r#"{"action": "ask"}"#,
            r#"{"action": "ask", "prompt": " "}"#,
            r#"{"action": "ask", "prompt": "a", "messages": []}"#,
            r#"{"action": "ask", "prompt": "a", "temperature": 3}"#,
        ] {
            assert_eq!(Action::read(text).unwrap().asked().unwrap_err().code(), Code::InvalidRequest, "{text}");
        }
    }
}
