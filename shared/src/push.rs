//! What is told to whom of a job, unasked: the frames of a WebSocket, the event of a webhook, and the one
//! place that decides who gets which. Pure, no clock, no I/O.
//!
//! Every frame is JSON of at most [`MAX_FRAME_BYTES`] with `v` and `type`. Delivery is at least once
//! and in no promised order: what is about a job carries its version as `seq`, and a client drops what is older than what it has. The number is that of [`Job::seq`], so that what is written about a
//! delivery is no news.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::api::JobResult;
use crate::clock::Timestamp;
use crate::error::{Code, Error};
use crate::job::{AnswerContent, DeliveryOutcome, Job, Record, Status};

/// The version of the frames; a client refuses one that it does not know.
pub const VERSION: u32 = 1;
/// The largest frame, either way. API Gateway takes messages of 128 KB, in frames of 32 KB.
pub const MAX_FRAME_BYTES: usize = 32 * 1024;
/// Text that certainly fits into a frame: JSON writes a byte as six at most (`\u0000`).
const MAX_TEXT_BYTES: usize = 5 * 1024;
/// The largest event of a webhook: Standard Webhooks recommends to stay below 20 kB.
pub const MAX_EVENT_BYTES: usize = 20_000;
/// The most jobs that one connection may be subscribed to.
pub const MAX_SUBSCRIPTIONS: usize = 500;

/// A frame to a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Frame {
    /// An open job has moved.
    Status { request_id: Uuid, seq: u64, status: Status },
    /// The job has ended; `result` is what `GET /result/{request_id}` answers, but without the link to a map.
    Result { request_id: Uuid, seq: u64, status: Status, result: Box<JobResult> },
    /// The job has ended, and its result is too large for a frame.
    ResultElsewhere { request_id: Uuid, seq: u64, status: Status, location: String },
    /// The job was deleted.
    Deleted { request_id: Uuid, seq: u64 },
    /// A part of the LLM's answer as it is written. A client cuts what it has of this claim at
    /// `offset` and appends; a higher claim begins anew, a lower one is dropped.
    Text {
        request_id: Uuid,
        claim: u64,
        /// UTF-16 code units before this text, as JavaScript, Kotlin, Swift and Dart count.
        offset: u64,
        text: String,
    },
    /// The answer to `ask`.
    Accepted {
        request_id: Uuid,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tag: Option<String>,
    },
    /// The answer to `ping`.
    Pong {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tag: Option<String>,
    },
    /// The answer to what was not understood or is not allowed.
    Error {
        code: Code,
        message: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        request_id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tag: Option<String>,
    },
}

#[derive(Serialize)]
struct Tagged<'a> {
    v: u32,
    #[serde(flatten)]
    frame: &'a Frame,
}

impl Frame {
    /// As it goes over the wire.
    ///
    /// # Errors
    /// [`Code::Internal`] where it cannot be written.
    pub fn to_json(&self) -> Result<String, Error> {
        serde_json::to_string(&Tagged { v: VERSION, frame: self }).map_err(Error::internal)
    }

    /// How a record stands, as its caller is told; `None` where there is nothing to tell.
    #[must_use]
    pub fn of(record: &Record) -> Option<Self> {
        match record {
            Record::Job(job) if job.status.is_open() => {
                Some(Self::Status { request_id: job.id, seq: job.version, status: job.status })
            }
            Record::Job(job) => Some(Self::ended(job)),
            Record::Tombstone(tombstone) => Some(Self::Deleted { request_id: tombstone.id, seq: tombstone.version }),
            Record::Upload(_) => None,
        }
    }

    fn ended(job: &Job) -> Self {
        let (request_id, seq, status) = (job.id, job.seq(), job.status);
        if let Some(result) = result(job) {
            let frame = Self::Result { request_id, seq, status, result };
            if frame.to_json().is_ok_and(|json| json.len() <= MAX_FRAME_BYTES) {
                return frame;
            }
        }
        Self::ResultElsewhere { request_id, seq, status, location: location(job) }
    }
}

/// What `GET /result/{request_id}` answers, but without the link to a map; `None` where it is not all in
/// the record.
fn result(job: &Job) -> Option<Box<JobResult>> {
    let text = match job.answer.as_ref().map(|answer| &answer.content) {
        None => None,
        Some(AnswerContent::Text(text)) => Some(text.clone()),
        // A blob is larger than any frame or event.
        Some(AnswerContent::Blob { .. }) => return None,
    };
    Some(Box::new(JobResult::from(job).with_content(text)))
}

fn location(job: &Job) -> String {
    format!("/result/{}", job.id)
}

/// The body of a webhook, in the shape that Standard Webhooks recommends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// `job.` and the state in which the job has ended.
    #[serde(rename = "type")]
    pub kind: String,
    /// When the job ended.
    pub timestamp: Timestamp,
    /// Whose job it was. One key signs what callers of one host send to any of its receivers.
    pub caller: String,
    pub data: EventData,
}

/// The result, or where it is: with `location` where it is too large for an event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum EventData {
    Elsewhere { request_id: Uuid, status: Status, location: String },
    Result(Box<JobResult>),
}

impl Event {
    fn of(job: &Job) -> Self {
        let (kind, timestamp) = (format!("job.{}", job.status.as_str()), job.updated_at);
        let caller = job.caller.clone();
        if let Some(result) = result(job) {
            let (kind, caller) = (kind.clone(), caller.clone());
            let event = Self { kind, timestamp, caller, data: EventData::Result(result) };
            if event.to_json().is_ok_and(|json| json.len() <= MAX_EVENT_BYTES) {
                return event;
            }
        }
        let data = EventData::Elsewhere { request_id: job.id, status: job.status, location: location(job) };
        Self { kind, timestamp, caller, data }
    }

    /// As it goes over the wire, the same in every try.
    ///
    /// # Errors
    /// [`Code::Internal`] where it cannot be written.
    pub fn to_json(&self) -> Result<String, Error> {
        serde_json::to_string(self).map_err(Error::internal)
    }
}

/// What is to be sent to a job's `callback_url`.
#[derive(Debug, Clone, PartialEq)]
pub struct Webhook {
    pub url: String,
    /// `webhook-id`: the same in every try, another one when the job was sent round again and has ended anew.
    pub id: String,
    /// Names the delivery in its record.
    pub seq: u64,
    pub event: Event,
}

impl Webhook {
    /// What is still to be sent, or was given up.
    fn of(record: &Record) -> Option<Self> {
        let Record::Job(job) = record else { return None };
        let delivery = job.delivery().filter(|it| it.outcome != Some(DeliveryOutcome::Delivered))?;
        let seq = delivery.seq;
        let url = job.callback.as_ref()?.url.clone();
        Some(Self { url, id: format!("msg_{}_{seq}", job.id), seq, event: Event::of(job) })
    }
}

/// Somebody who wants to be told of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscriber {
    /// Whose subscription it is: only a job's own caller is told of it.
    pub caller: String,
    /// Where the frames go.
    pub connection: String,
}

/// Something for somebody.
#[derive(Debug, Clone, PartialEq)]
pub enum Told {
    Frame(Subscriber, Frame),
    Webhook(Webhook),
}

/// What `record`, as it stands, means to those who have subscribed to it and to who gave a `callback_url`.
/// The first are told of every state, the second of the end, until it is known that they have it.
#[must_use]
pub fn deliveries(record: &Record, subscribers: Vec<Subscriber>) -> Vec<Told> {
    let own = subscribers.into_iter().filter(|subscriber| subscriber.caller == record.caller());
    let frame = Frame::of(record);
    let frames = own.filter_map(|subscriber| Some(Told::Frame(subscriber, frame.clone()?)));
    frames.chain(Webhook::of(record).map(Told::Webhook)).collect()
}

/// Text in parts that fit into frames, each with its place in UTF-16 code units, from `offset` on.
pub fn text_frames(job: &Job, text: &str, mut offset: u64) -> Vec<Frame> {
    let (mut frames, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let (part, behind) = rest.split_at(rest.floor_char_boundary(MAX_TEXT_BYTES));
        let text = part.to_owned();
        frames.push(Frame::Text { request_id: job.id, claim: job.claim, offset, text });
        offset += utf16_len(part);
        rest = behind;
    }
    frames
}

/// As a client counts a text's length.
#[must_use]
pub fn utf16_len(text: &str) -> u64 {
    text.encode_utf16().count() as u64
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use serde_json::{Value, json};

    use super::*;
    use crate::clock::from_millis;
    use crate::job::{FailedTry, Input, LlmAnswer, NewJob, Policy, StoredPrompt};

    fn prompt() -> Job {
        let now = from_millis(1_700_000_000_000);
        let stored = StoredPrompt { size_bytes: 1, expires_at: now + TimeDelta::days(7), connection: None };
        let new = NewJob {
            id: Uuid::nil(),
            caller: "ward".into(),
            trace_id: String::new(),
            describe: false,
            idempotency_key: None,
            callback_url: Some("https://hooks.example/a".into()),
            input: Input::Prompt(stored),
        };
        Job::new(new, now, &Policy::default())
    }

    fn answered(content: AnswerContent) -> Job {
        let (job, policy) = (prompt(), Policy::default());
        let now = job.created_at;
        let claimed = job.claim_enrichment(now, now + policy.lease, &policy).unwrap();
        let answer = LlmAnswer {
            content,
            finish_reason: None,
            prompt_tokens: None,
            completion_tokens: None,
            latency_ms: 1,
            cost_usd: None,
        };
        claimed.finish_answer(claimed.claim, answer, now, &policy).unwrap()
    }

    fn json(frame: &Frame) -> Value {
        let text = frame.to_json().unwrap();
        assert!(text.len() <= MAX_FRAME_BYTES);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn an_open_job_is_told_by_its_status_and_an_ended_one_with_its_result() {
        let open = Frame::of(&Record::Job(prompt())).unwrap();
        let expected =
            json!({"v": 1, "type": "status", "request_id": Uuid::nil(), "seq": 1, "status": "awaiting_description"});
        assert_eq!(json(&open), expected);
        let job = answered(AnswerContent::Text("A growth.".into()));
        let ended = json(&Frame::of(&Record::Job(job.clone())).unwrap());
        assert_eq!((&ended["type"], &ended["seq"], &ended["v"]), (&json!("result"), &json!(3), &json!(1)));
        assert_eq!(ended["result"]["content"], "A growth.");
        let deleted = Record::Tombstone(job.tombstone(job.updated_at, &Policy::default()));
        let expected = json!({"v": 1, "type": "deleted", "request_id": Uuid::nil(), "seq": 4});
        assert_eq!(json(&Frame::of(&deleted).unwrap()), expected);
    }

    #[test]
    fn a_result_that_does_not_fit_into_a_frame_says_where_it_is() {
        // JSON writes each of these as six bytes.
        let controls = "\u{1}".repeat(MAX_FRAME_BYTES / 6);
        let blob = AnswerContent::Blob { key: "jobs/…/answer-1".into() };
        for content in [AnswerContent::Text(controls), AnswerContent::Text("x".repeat(MAX_FRAME_BYTES)), blob] {
            let frame = json(&Frame::of(&Record::Job(answered(content))).unwrap());
            assert_eq!(frame["type"], "result_elsewhere");
            assert_eq!(frame["location"], format!("/result/{}", Uuid::nil()));
            assert_eq!(frame["status"], "completed");
        }
    }

    #[test]
    fn only_the_caller_of_a_job_is_told_of_it() {
        let subscriber = |caller: &str, connection: &str| Subscriber {
            caller: caller.to_owned(),
            connection: connection.to_owned(),
        };
        let all = vec![subscriber("ward", "a"), subscriber("other", "b"), subscriber("ward", "c")];
        let told = deliveries(&Record::Job(prompt()), all);
        let connection = |told: &Told| match told {
            Told::Frame(to, _) => to.connection.clone(),
            Told::Webhook(webhook) => panic!("{webhook:?}"),
        };
        let connections: Vec<_> = told.iter().map(connection).collect();
        assert_eq!(connections, ["a", "c"]);
    }

    fn webhook(job: &Job) -> Option<Webhook> {
        deliveries(&Record::Job(job.clone()), Vec::new()).into_iter().find_map(|told| match told {
            Told::Webhook(webhook) => Some(webhook),
            Told::Frame(..) => None,
        })
    }

    #[test]
    fn a_callback_is_told_of_the_end_alone_and_until_it_has_it() {
        let (open, policy) = (prompt(), Policy::default());
        assert_eq!(webhook(&open), None);
        let job = answered(AnswerContent::Text("A growth.".into()));
        let first = webhook(&job).unwrap();
        assert_eq!((first.url.as_str(), first.seq), ("https://hooks.example/a", 3));
        assert_eq!(first.id, format!("msg_{}_3", Uuid::nil()));
        let told = serde_json::to_value(&first.event).unwrap();
        assert_eq!((&told["type"], &told["data"]["content"]), (&json!("job.completed"), &json!("A growth.")), "{told}");
        // Neither a failed try nor a given-up delivery changes what is sent, or its id.
        let now = job.updated_at + TimeDelta::hours(1);
        let failed = |failed_before| FailedTry { failed_before, message: "a" };
        let postponed = job.postpone_delivery(3, failed(0), now + TimeDelta::minutes(5), &policy).unwrap();
        assert!(postponed.version > job.version);
        for again in [postponed.clone(), postponed.give_up_delivery(3, failed(1)).unwrap()] {
            let again = webhook(&again).unwrap();
            assert_eq!((again.id, again.event), (first.id.clone(), first.event.clone()));
        }
        assert_eq!(webhook(&postponed.settle_delivery(3).unwrap()), None);
    }

    #[test]
    fn what_is_written_about_a_delivery_is_no_news_to_a_subscriber() {
        let job = answered(AnswerContent::Text("A growth.".into()));
        let settled = job.settle_delivery(3).unwrap();
        assert_eq!(Frame::of(&Record::Job(job)), Frame::of(&Record::Job(settled)));
    }

    #[test]
    fn an_event_stays_small_and_says_where_a_long_answer_is() {
        let long = answered(AnswerContent::Text("x".repeat(MAX_EVENT_BYTES)));
        let blob = answered(AnswerContent::Blob { key: "jobs/…/answer-1".into() });
        for job in [long, blob] {
            let event = webhook(&job).unwrap().event.to_json().unwrap();
            assert!(event.len() <= MAX_EVENT_BYTES);
            let event: Value = serde_json::from_str(&event).unwrap();
            let expected = json!({"request_id": Uuid::nil(), "status": "completed", "location": format!("/result/{}", Uuid::nil())});
            assert_eq!(event["data"], expected);
        }
    }

    #[test]
    fn long_text_goes_in_parts_that_put_together_are_the_text() {
        let text = "é🩺\u{1}\"x".repeat(10_000);
        let units: Vec<u16> = text.encode_utf16().collect();
        let (mut built, mut frames) = (Vec::new(), 0);
        for frame in text_frames(&prompt(), &text, 7) {
            let frame = json(&frame);
            assert_eq!(frame["offset"].as_u64().unwrap(), 7 + built.len() as u64);
            built.extend(frame["text"].as_str().unwrap().encode_utf16());
            frames += 1;
        }
        assert_eq!(built, units);
        assert!(frames > 10);
    }
}
