//! A batch of the table's stream, as DynamoDB Streams hands it to a function, as far as it is read
//! here. The embedded host's feeds hand over the same.

use serde::Deserialize;
use uuid::Uuid;

/// DynamoDB's reference calls every field of a record optional, where the type in
/// `aws_lambda_events` demands some: one record without would fail the batch.
#[derive(Debug, Clone, Deserialize)]
pub struct Event {
    #[serde(rename = "Records")]
    pub records: Vec<EventRecord>,
}

/// One write to one item.
#[derive(Debug, Clone, Deserialize)]
pub struct EventRecord {
    #[serde(rename = "eventID")]
    pub event_id: Option<String>,
    #[serde(rename = "dynamodb", default)]
    change: Change,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Change {
    #[serde(rename = "Keys", default)]
    keys: Keys,
    #[serde(rename = "SequenceNumber")]
    sequence_number: Option<String>,
    /// The item as written; there are no other images.
    #[serde(rename = "NewImage", default)]
    image: Image,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Image {
    dispatch: Option<Attribute>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Keys {
    id: Option<Attribute>,
}

#[derive(Debug, Clone, Deserialize)]
struct Attribute {
    #[serde(rename = "S")]
    text: Option<String>,
}

impl EventRecord {
    /// The record that was written; `None` where it is another item of the table.
    #[must_use]
    pub fn id(&self) -> Option<Uuid> {
        let text = self.change.keys.id.as_ref()?.text.as_ref()?;
        Uuid::parse_str(text).ok()
    }

    /// What the write asks the feed to start ([`crate::job::Dispatch`]).
    #[must_use]
    pub fn dispatch(&self) -> Option<&str> {
        self.change.image.dispatch.as_ref()?.text.as_deref()
    }

    /// What a failure is reported by.
    #[must_use]
    pub fn sequence_number(&self) -> Option<&str> {
        self.change.sequence_number.as_deref()
    }
}
