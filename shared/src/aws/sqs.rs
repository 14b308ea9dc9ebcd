//! The queue in SQS. Lambda receives and acknowledges by itself; what is left to the code is
//! sending, hiding a message for longer, and what an admin does with dead letters.

use std::collections::BTreeMap;

use aws_config::SdkConfig;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_sqs::operation::change_message_visibility::ChangeMessageVisibilityError;
use aws_sdk_sqs::types::{Message as SqsMessage, MessageSystemAttributeName};

use crate::clock::from_millis;
use crate::crash::{self, Point};
use crate::error::Error;
use crate::message::Message;
use crate::ports::{DeadLetter, JobQueue};

const WHAT: &str = "the queue";
/// The longest that SQS hides a message, in seconds.
const MAX_VISIBILITY: u32 = 12 * 60 * 60;

/// Dead letters received at once: as many as SQS gives.
const PAGE: i32 = 10;
/// How long a dead letter is hidden while somebody looks at it, in seconds. Who is killed then shows
/// it again after this.
const LOOKED_AT: i32 = 30;
/// Dead letters that one call moves at most, and a page more: some seconds' work, of the 29 that API Gateway waits for
/// two queues.
const MOST_REDRIVEN: u64 = 500;
/// Asked of all of SQS's servers, where a shorter wait asks some and may find nothing.
const LONG_POLL: i32 = 1;

/// One SQS queue, and for who has to do with them the one of its dead letters.
#[derive(Debug, Clone)]
pub struct SqsJobQueue {
    client: Client,
    url: String,
    dead_letters_url: Option<String>,
}

impl SqsJobQueue {
    #[must_use]
    pub fn new(config: &SdkConfig, url: String, dead_letters_url: Option<String>) -> Self {
        Self { client: Client::new(config), url, dead_letters_url }
    }

    /// Some dead letters, by their ids; each is hidden for a while.
    async fn receive_dead_letters(&self) -> Result<Vec<(String, Received)>, Error> {
        let receive = self.client.receive_message().queue_url(self.dead_letters_url()?);
        let receive = receive
            .max_number_of_messages(PAGE)
            .visibility_timeout(LOOKED_AT)
            .wait_time_seconds(LONG_POLL)
            .message_system_attribute_names(MessageSystemAttributeName::SentTimestamp)
            .message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount);
        let received = receive.send().await.map_err(unavailable)?.messages.unwrap_or_default();
        crash::here(Point::AdminLettersReceived);
        let with_id = received.into_iter().filter_map(|message| {
            let receipt = message.receipt_handle.clone()?;
            Some((message.message_id.clone()?, Received { message, receipt }))
        });
        Ok(with_id.collect())
    }

    async fn redrive(&self, letter: Received) -> Result<(), Error> {
        // Sent first: a message in both queues is worked once more, one in neither is lost.
        let body = letter.message.body.unwrap_or_default();
        self.client.send_message().queue_url(&self.url).message_body(body).send().await.map_err(unavailable)?;
        crash::here(Point::AdminLetterSent);
        let delete = self.client.delete_message().queue_url(self.dead_letters_url()?);
        delete.receipt_handle(letter.receipt).send().await.map(|_| ()).map_err(unavailable)
    }

    async fn show_dead_letter_again(&self, receipt: &str) -> Result<(), Error> {
        let change = self.client.change_message_visibility().queue_url(self.dead_letters_url()?);
        match change.receipt_handle(receipt).visibility_timeout(0).send().await {
            Ok(_) => Ok(()),
            // It is shown already, or gone.
            Err(SdkError::ServiceError(error)) if is_stale(error.err()) => Ok(()),
            Err(error) => Err(unavailable(error)),
        }
    }

    fn dead_letters_url(&self) -> Result<&str, Error> {
        self.dead_letters_url.as_deref().ok_or_else(|| Error::internal("this function knows no dead letters"))
    }
}

/// A dead letter in hand.
struct Received {
    message: SqsMessage,
    receipt: String,
}

impl Received {
    fn attribute(&self, name: &MessageSystemAttributeName) -> Option<i64> {
        self.message.attributes()?.get(name)?.parse().ok()
    }

    fn into_dead_letter(self, id: String) -> DeadLetter {
        let receive_count = self.attribute(&MessageSystemAttributeName::ApproximateReceiveCount);
        let sent_at = self.attribute(&MessageSystemAttributeName::SentTimestamp);
        DeadLetter {
            id,
            body: self.message.body.unwrap_or_default(),
            receive_count: receive_count.and_then(|count| u32::try_from(count).ok()).unwrap_or(0),
            sent_at: from_millis(sent_at.unwrap_or(0)),
            given_up_at: None,
        }
    }
}

impl JobQueue for SqsJobQueue {
    async fn send(&self, message: Message) -> Result<(), Error> {
        let sent = self.client.send_message().queue_url(&self.url).message_body(message.encode()).send().await;
        sent.map(|_| ()).map_err(unavailable)
    }

    async fn set_visibility(&self, receipt: &str, seconds: u32) -> Result<(), Error> {
        let seconds = i32::try_from(seconds.min(MAX_VISIBILITY)).unwrap_or(i32::MAX);
        let changed = self.client.change_message_visibility().queue_url(&self.url).receipt_handle(receipt);
        match changed.visibility_timeout(seconds).send().await {
            Ok(_) => Ok(()),
            // The receipt is no longer valid: the message is visible, or gone. As the embedded queue does.
            Err(SdkError::ServiceError(error)) if is_stale(error.err()) => Ok(()),
            Err(error) => Err(unavailable(error)),
        }
    }

    async fn bury(&self, body: String) -> Result<(), Error> {
        let send = self.client.send_message().queue_url(self.dead_letters_url()?).message_body(body);
        send.send().await.map(|_| ()).map_err(unavailable)
    }

    async fn dead_letters(&self, limit: u32) -> Result<Vec<DeadLetter>, Error> {
        let mut found = BTreeMap::new();
        while found.len() < limit as usize {
            let before = found.len();
            found.extend(self.receive_dead_letters().await?);
            if found.len() == before {
                break;
            }
        }
        let mut letters = Vec::new();
        for (id, received) in found {
            self.show_dead_letter_again(&received.receipt).await?;
            letters.push(received.into_dead_letter(id));
        }
        letters.sort_by_key(|letter| letter.sent_at);
        letters.truncate(limit as usize);
        Ok(letters)
    }

    async fn redrive_dead_letters(&self, ids: Option<&[String]>) -> Result<u64, Error> {
        let (mut moved, mut passed_by) = (0, BTreeMap::new());
        loop {
            let before = (moved, passed_by.len());
            for (id, letter) in self.receive_dead_letters().await? {
                if ids.is_none_or(|ids| ids.contains(&id)) {
                    self.redrive(letter).await?;
                    moved += 1;
                } else {
                    passed_by.insert(id, letter.receipt);
                }
            }
            // Nothing is left, or only what was passed by and is seen again. Or the function's time would end.
            if before == (moved, passed_by.len()) || moved >= MOST_REDRIVEN {
                break;
            }
        }
        for receipt in passed_by.values() {
            self.show_dead_letter_again(receipt).await?;
        }
        Ok(moved)
    }
}

fn is_stale(error: &ChangeMessageVisibilityError) -> bool {
    // Of a receipt that was valid once SQS says the last, which its model does not name
    // (https://github.com/aws/aws-sdk-java/issues/1628).
    error.is_message_not_inflight()
        || error.is_receipt_handle_is_invalid()
        || error.code() == Some("InvalidParameterValue")
}

fn unavailable(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::unavailable(WHAT, error)
}

#[cfg(test)]
mod tests {
    use aws_sdk_sqs::error::ErrorMetadata;

    use super::*;

    #[test]
    fn a_receipt_that_was_valid_once_is_stale_and_other_trouble_is_not() {
        let of = |code| ChangeMessageVisibilityError::generic(ErrorMetadata::builder().code(code).build());
        assert!(is_stale(&of("InvalidParameterValue")));
        assert!(!is_stale(&of("AccessDenied")) && !is_stale(&of("RequestThrottled")));
    }
}
