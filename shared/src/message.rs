//! What travels through the queues: ids only, tagged and versioned, because a deploy meets
//! yesterday's messages.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The version that this build writes and reads.
const VERSION: u8 = 1;

/// A request to the function behind a queue: the first two to inference, then one each to webhook and enrichment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Message {
    /// Run the model on this job's photo.
    Infer { id: Uuid },
    /// Erase what the cache holds of this deleted job.
    Forget { id: Uuid },
    /// Tell who asked for it that this job has ended.
    Deliver { id: Uuid },
    /// Have the LLM answer this prompt.
    Answer { id: Uuid },
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    version: u8,
    #[serde(flatten)]
    message: Message,
}

/// The body is no message of a version that this build reads.
#[derive(Debug, thiserror::Error)]
#[error("unreadable message: {0}")]
pub struct Unreadable(String);

impl Message {
    /// The body as sent: `{"version":1,"type":"infer","id":"…"}`.
    #[must_use]
    pub fn encode(self) -> String {
        let envelope = Envelope { version: VERSION, message: self };
        serde_json::to_string(&envelope).unwrap_or_default()
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`Unreadable`] for anything but a known type of a known version. The error says where the
    /// JSON went wrong and repeats nothing of the body.
    pub fn decode(body: &str) -> Result<Self, Unreadable> {
        let envelope: Envelope = serde_json::from_str(body)
            .map_err(|error| Unreadable(format!("{:?} at column {}", error.classify(), error.column())))?;
        if envelope.version != VERSION {
            return Err(Unreadable(format!("version {} is not {VERSION}", envelope.version)));
        }
        Ok(envelope.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_reads_back_as_it_was_sent() {
        let message = Message::Infer { id: Uuid::from_u128(7) };
        let body = message.encode();
        assert_eq!(body, r#"{"version":1,"type":"infer","id":"00000000-0000-0000-0000-000000000007"}"#);
        assert_eq!(Message::decode(&body).unwrap(), message);
    }

    #[test]
    fn another_version_another_type_and_garbage_are_unreadable() {
        for body in [
            "",
            "{}",
            "null",
            r#"{"version":2,"type":"infer","id":"00000000-0000-0000-0000-000000000007"}"#,
            r#"{"version":1,"type":"dance","id":"00000000-0000-0000-0000-000000000007"}"#,
            r#"{"version":1,"type":"infer","id":"seven"}"#,
        ] {
            assert!(Message::decode(body).is_err(), "{body}");
        }
    }

    #[test]
    fn the_error_repeats_nothing_of_the_body() {
        let error = Message::decode(r#"{"version":1,"type":"patient name"}"#).unwrap_err();
        assert!(!error.to_string().contains("patient"), "{error}");
    }
}
