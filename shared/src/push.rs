//! What is told to whom of a job, unasked: the frames of a WebSocket, and the one place that decides
//! who gets which. Pure, no clock, no I/O.
//!
//! Every frame is JSON of at most [`MAX_FRAME_BYTES`] with `v` and `type`. Delivery is at least once
//! and in no promised order: what is about a job carries the record's version as `seq`, and a client
//! drops what is older than what it has.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::api::JobResult;
use crate::error::{Code, Error};
use crate::job::{AnswerContent, Job, Record, Status};

/// The version of the frames; a client refuses one that it does not know.
pub const VERSION: u32 = 1;
/// The largest frame, either way. API Gateway takes messages of 128 KB, in frames of 32 KB.
pub const MAX_FRAME_BYTES: usize = 32 * 1024;
/// Text that certainly fits into a frame: JSON writes a byte as six at most (`\u0000`).
const MAX_TEXT_BYTES: usize = 5 * 1024;
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
        let (request_id, seq, status) = (job.id, job.version, job.status);
        let text = match job.answer.as_ref().map(|answer| &answer.content) {
            None => None,
            Some(AnswerContent::Text(text)) => Some(text.clone()),
            // A blob is larger than any frame.
            Some(AnswerContent::Blob { .. }) => return Self::elsewhere(job),
        };
        let result = Box::new(JobResult::from(job).with_content(text));
        let frame = Self::Result { request_id, seq, status, result };
        match frame.to_json() {
            Ok(json) if json.len() <= MAX_FRAME_BYTES => frame,
            _ => Self::elsewhere(job),
        }
    }

    fn elsewhere(job: &Job) -> Self {
        let location = format!("/result/{}", job.id);
        Self::ResultElsewhere { request_id: job.id, seq: job.version, status: job.status, location }
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

/// What a change of `record` means to those who have subscribed to it.
#[must_use]
pub fn deliveries(record: &Record, subscribers: Vec<Subscriber>) -> Vec<(Subscriber, Frame)> {
    let Some(frame) = Frame::of(record) else { return Vec::new() };
    let own = subscribers.into_iter().filter(|subscriber| subscriber.caller == record.caller());
    own.map(|subscriber| (subscriber, frame.clone())).collect()
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
    use crate::job::{Input, LlmAnswer, NewJob, Policy, StoredPrompt};

    fn prompt() -> Job {
        let now = from_millis(1_700_000_000_000);
        let stored = StoredPrompt { size_bytes: 1, expires_at: now + TimeDelta::days(7), connection: None };
        let new = NewJob {
            id: Uuid::nil(),
            caller: "ward".into(),
            trace_id: String::new(),
            describe: false,
            idempotency_key: None,
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
        let connections: Vec<_> = told.iter().map(|(to, _)| to.connection.as_str()).collect();
        assert_eq!(connections, ["a", "c"]);
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
