//! Writes the description of a finished prediction and completes the job; or the answer to a prompt
//! (`answer.rs`).
//!
//! Triggered by the change feed where a record carries the marker `dispatch = "enrichment"`, and on AWS by
//! a queue of prompts, which it fills from the feed itself. Reads the record. Writes, in this order: the
//! claim, which takes the marker off; then the completed record, or the record with a later `due_at`; or,
//! for a prompt in the feed on AWS, its message. An LLM failure is never a batch failure: sweep marks the
//! job again. Where no LLM is set inference describes; a photo that was read for one that is gone is
//! described here, by the completed record at once.

mod answer;
pub mod guard;
mod live;

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lambda_events::event::sqs::{BatchItemFailure, SqsBatchResponse, SqsEvent, SqsMessage};
use aws_lambda_events::event::streams::{DynamoDbBatchItemFailure, DynamoDbEventResponse};
use futures_util::future::join_all;
use serde::Deserialize;
use serde_json::json;
use shared::Error;
use shared::api::chat::Role;
use shared::clock::{Clock, Timestamp};
use shared::crash::{self, Point};
use shared::job::{Description, DescriptionSource, Dispatch, Input, Job, LlmCall, Policy, Reading, Record, Refused};
use shared::llm::{self, Answer, Format, Llm, LlmError, Prompt, template};
use shared::message::Message;
use shared::metrics;
use shared::ports::{BlobStore, JobQueue, JobStore, Push};
use shared::stream::{Event, EventRecord};
use shared::telemetry;
use shared::transition::{NotMoved, transition};
use tracing::Instrument;
use uuid::Uuid;

const PROMPT: &str = include_str!("../prompts/describe-v1.txt");
const PROMPT_VERSION: &str = "describe-v1";
/// Kept from the lease for the last write, at most a quarter of it.
const MARGIN: Duration = Duration::from_secs(3);

/// What enrichment works with.
pub struct Enrichment<J, B, P, Q> {
    pub jobs: J,
    pub blobs: B,
    pub llm: Arc<Llm>,
    /// To who has asked over a connection.
    pub push: P,
    /// Where prompts wait, so that none holds up what is behind it in the feed. Without it a prompt is answered
    /// as the feed hands it over: that is for a feed in which only prompts wait for prompts.
    pub prompts: Option<Q>,
    pub clock: Clock,
    pub policy: Policy,
}

/// The schema of the LLM's answer.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Explanation {
    explanation: String,
}

impl<J: JobStore, B: BlobStore, P: Push, Q: JobQueue> Enrichment<J, B, P, Q> {
    /// Works a batch of the feed, all records at once. `deadline` is the invocation's end; no lease taken here is
    /// longer. Only a store that cannot be reached fails a record.
    pub async fn handle(&self, event: Event, deadline: Timestamp) -> DynamoDbEventResponse {
        let worked = join_all(event.records.iter().map(|record| self.settle(record, deadline))).await;
        let mut response = DynamoDbEventResponse::default();
        for (record, worked) in event.records.iter().zip(worked) {
            if !worked {
                let mut failure = DynamoDbBatchItemFailure::default();
                failure.item_identifier = record.sequence_number().map(str::to_owned);
                response.batch_item_failures.push(failure);
            }
        }
        response
    }

    /// Works one record of the feed; `false` where it must come back.
    async fn settle(&self, record: &EventRecord, deadline: Timestamp) -> bool {
        let Some(id) = record.id() else {
            // Coming back would not make it readable; sweep finds the job by its due time.
            tracing::error!(error.code = "unreadable_change", event.id = record.event_id, "change without a job's key");
            return true;
        };
        match self.process(id, deadline, self.prompts.as_ref()).await {
            Ok(()) => true,
            // A record that this build cannot read would hold the feed up for ever.
            Err(error) => !error.is_retryable(),
        }
    }

    /// Works a batch of the queue of prompts, all messages at once, otherwise as [`Enrichment::handle`]. What
    /// is no message of its own is reported as well, and ends as a dead letter.
    pub async fn handle_prompts(&self, event: SqsEvent, deadline: Timestamp) -> SqsBatchResponse {
        let worked = join_all(event.records.iter().map(|message| self.settle_prompt(message, deadline))).await;
        let mut response = SqsBatchResponse::default();
        for (message, worked) in event.records.into_iter().zip(worked) {
            if !worked {
                let mut failure = BatchItemFailure::default();
                failure.item_identifier = message.message_id.unwrap_or_default();
                response.batch_item_failures.push(failure);
            }
        }
        response
    }

    /// Works one message; `false` where it must come back.
    async fn settle_prompt(&self, message: &SqsMessage, deadline: Timestamp) -> bool {
        let why = match Message::decode(message.body.as_deref().unwrap_or("")) {
            Ok(Message::Answer { id }) => return self.process(id, deadline, None).await.is_ok(),
            Ok(_) => "a message of another queue".to_owned(),
            Err(error) => error.to_string(),
        };
        let message_id = message.message_id.as_deref().unwrap_or("");
        tracing::error!(
            message.id = message_id,
            error.code = "unreadable_message",
            error.chain = why,
            "message not read"
        );
        false
    }

    /// The rule for one job. A prompt is sent to `prompts`, where there are such.
    ///
    /// # Errors
    /// Where the store or the queue cannot be reached.
    pub async fn process(&self, id: Uuid, lease_until: Timestamp, prompts: Option<&Q>) -> Result<(), Error> {
        let found = self.jobs.get(id).await.inspect_err(not_described)?;
        let Some(Record::Job(job)) = found else { return Ok(()) };
        let span = telemetry::job_span(job.id, &job.trace_id);
        let work = async {
            let worked = match prompts {
                Some(prompts) if job.is_prompt() => send_on(&job, prompts).await,
                _ => self.work(&job, lease_until).await,
            };
            worked.inspect_err(not_described)
        };
        work.instrument(span).await
    }

    async fn work(&self, job: &Job, lease_until: Timestamp) -> Result<(), Error> {
        if self.llm.is_offline() && !job.is_prompt() {
            return self.describe_at_once(job).await;
        }
        let now = self.clock.now();
        let claim = |job: &Job| {
            let mut next = job.claim_enrichment(now, lease_until, &self.policy)?;
            // Whoever is killed from here on may have asked.
            next.llm_calls.push(LlmCall::begun(next.claim, now));
            Ok((next, ()))
        };
        let job = match transition(&self.jobs, job, claim).await {
            Ok((job, ())) => job,
            // A second delivery, a job that has moved on, or one that sweep must end.
            Err(NotMoved::Refused(_) | NotMoved::Gone) => return Ok(()),
            Err(NotMoved::Store(error)) => return Err(error),
        };
        crash::here(Point::EnrichmentClaimed);
        match (&job.input, &job.reading) {
            (Input::Prompt(_), _) => self.answer(&job).await,
            (Input::Photo(_), Some(reading)) => self.describe_reading(&job, reading).await,
            (Input::Photo(_), None) => Err(Error::internal("a job awaits a description of nothing")),
        }
    }

    /// By the template, in one write: nobody is asked.
    async fn describe_at_once(&self, job: &Job) -> Result<(), Error> {
        let (now, started) = (self.clock.now(), Instant::now());
        let describe = |current: &Job| {
            let reading = current.reading.as_ref().ok_or(Refused::WrongState)?;
            let mut next = current.describe_at_once(template::describe(reading, None), now, &self.policy)?;
            next.timings_ms.describe = Some(millis(started));
            Ok((next, ()))
        };
        match transition(&self.jobs, job, describe).await {
            Ok((done, ())) => {
                crash::here(Point::EnrichmentFinished);
                metrics::described(&done);
                tracing::info!("described by the template");
                Ok(())
            }
            // A second delivery, a job that has moved on, or one that sweep must end.
            Err(NotMoved::Refused(_) | NotMoved::Gone) => Ok(()),
            Err(NotMoved::Store(error)) => Err(error),
        }
    }

    async fn describe_reading(&self, job: &Job, reading: &Reading) -> Result<(), Error> {
        let started = Instant::now();
        let (described, call) = self.describe(job, reading).await;
        crash::here(Point::EnrichmentAnswered);
        let millis = millis(started);
        match described {
            Ok(description) => self.finish(job, description, call, millis).await,
            Err(error) => self.defer(job, reading, &error, call, millis).await,
        }
    }

    /// A description, and the call to the LLM that it took. Errors are those that a later call may
    /// not meet.
    async fn describe(&self, job: &Job, reading: &Reading) -> (Result<Description, LlmError>, LlmCall) {
        let (answer, mut call) = self.ask(&prompt(reading), job).await;
        let failed = answer.is_err();
        let described = match answer {
            Ok(answer) => Ok(description(reading, &answer).unwrap_or_else(|code| {
                call.outcome = code.to_owned();
                template::describe(reading, Some(code))
            })),
            // What another call would not cure is answered by the template at once.
            Err(error) if !error.retryable => Ok(template::describe(reading, Some(error.code))),
            Err(error) => Err(error),
        };
        told(&call, failed);
        (described, call)
    }

    /// Asks the LLM within the claim's lease. A prompt's answer may take all of it, a description's
    /// as long as `LLM_TIMEOUT_SECONDS` gives each try. The call is for the ledger.
    async fn ask(&self, prompt: &Prompt, job: &Job) -> (Result<Answer, LlmError>, LlmCall) {
        let at = self.clock.now();
        let lease = job.lease_until.and_then(|until| (until - at).to_std().ok()).unwrap_or(Duration::ZERO);
        let started = Instant::now();
        let deadline = started + (lease - MARGIN.min(lease / 4));
        let (answer, tries) = match job.is_prompt() {
            true => self.complete(prompt, deadline, job).await,
            false => self.llm.complete(prompt, deadline).await,
        };
        let answered = answer.as_ref().ok();
        let call = LlmCall {
            claim: job.claim,
            at,
            latency_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            tries,
            outcome: answer.as_ref().map_or_else(|error| error.code, |_| "ok").to_owned(),
            finish_reason: answered.and_then(|answer| answer.finish_reason.clone()),
            prompt_tokens: answered.and_then(|answer| answer.prompt_tokens),
            completion_tokens: answered.and_then(|answer| answer.completion_tokens),
            cost_usd: answered.and_then(|answer| self.llm.cost_usd(answer)),
        };
        (answer, call)
    }

    async fn finish(&self, job: &Job, description: Description, call: LlmCall, millis: f64) -> Result<(), Error> {
        let now = self.clock.now();
        let finish = |current: &Job| {
            let mut next = current.finish_description(job.claim, description.clone(), now, &self.policy)?;
            next.settle_call(job.claim, Some(call.clone()));
            next.timings_ms.describe = Some(millis);
            Ok((next, ()))
        };
        let finished = transition(&self.jobs, job, finish).await;
        crash::here(Point::EnrichmentFinished);
        if let Ok((done, ())) = &finished {
            metrics::described(done);
        }
        settled(job, finished.map(|_| ()))
    }

    async fn defer(
        &self,
        job: &Job,
        reading: &Reading,
        error: &LlmError,
        call: LlmCall,
        millis: f64,
    ) -> Result<(), Error> {
        let now = self.clock.now();
        let defer = |current: &Job| {
            let mut next = current.defer_description(job.claim, error.wait(), now, &self.policy)?;
            next.settle_call(job.claim, Some(call.clone()));
            Ok((next, ()))
        };
        let deferred = transition(&self.jobs, job, defer).await;
        crash::here(Point::EnrichmentDeferred);
        match deferred {
            Err(NotMoved::Refused(Refused::Exhausted)) => {
                self.finish(job, template::describe(reading, Some(error.code)), call, millis).await
            }
            deferred => settled(job, deferred.map(|_| ())),
        }
    }
}

/// Sends a prompt that still awaits its claim to its queue; a late change adds no message.
async fn send_on(job: &Job, prompts: &impl JobQueue) -> Result<(), Error> {
    if job.dispatch == Some(Dispatch::Enrichment) {
        prompts.send(Message::Answer { id: job.id }).await?;
        crash::here(Point::EnrichmentQueued);
    }
    Ok(())
}

/// One line and the metrics of a call; `failed` where it gave no answer.
fn told(call: &LlmCall, failed: bool) {
    tracing::info!(
        llm.outcome = call.outcome,
        llm.latency_ms = call.latency_ms,
        llm.prompt_tokens = call.prompt_tokens,
        llm.completion_tokens = call.completion_tokens,
        "llm called"
    );
    metrics::llm_called(call, failed);
}

fn millis(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e4).round() / 10.0
}

fn not_described(error: &Error) {
    tracing::error!(error.code = error.code().as_str(), error.chain = error.chain(), "job not described");
}

fn settled(job: &Job, moved: Result<(), NotMoved>) -> Result<(), Error> {
    match moved {
        Ok(()) => {
            tracing::info!("claim settled");
            Ok(())
        }
        Err(NotMoved::Gone) => Ok(()),
        Err(NotMoved::Refused(refused)) => {
            tracing::warn!(job.claim = job.claim, error.code = "claim_lost", error.chain = %refused, "claim lost");
            Ok(())
        }
        Err(NotMoved::Store(error)) => Err(error),
    }
}

/// Names and bands, nothing else: no number, no photo, no caller.
fn prompt(reading: &Reading) -> Prompt {
    let classes: Vec<_> = template::described(reading)
        .into_iter()
        .map(|class| json!({"name": class.name, "probability": template::band(class.probability)}))
        .collect();
    let schema = json!({
        "type": "object",
        "properties": {"explanation": {"type": "string"}},
        "required": ["explanation"],
        "additionalProperties": false,
    });
    let (system, user) = (PROMPT.to_owned(), json!({"classes": classes}).to_string());
    Prompt {
        messages: vec![
            llm::Message { role: Role::System, content: system },
            llm::Message { role: Role::User, content: user },
        ],
        max_tokens: None,
        temperature: None,
        format: Format::Schema { name: "explanation", schema },
        // Of its own: no description shall know of another.
        session: None,
    }
}

/// Some servers wrap JSON in a code block, schema or not.
fn json_of(text: &str) -> &str {
    text.trim().trim_start_matches("```json").trim_matches('`').trim()
}

/// The description around an answer.
///
/// # Errors
/// The code of what keeps the answer out.
fn description(reading: &Reading, answer: &Answer) -> Result<Description, &'static str> {
    let explanation: Explanation = serde_json::from_str(json_of(&answer.text)).map_err(|_| "llm_invalid_answer")?;
    // Typographic apostrophes are the one harmless thing that models write against the rules.
    let text = explanation.explanation.replace('\u{2019}', "'");
    // "A or B" may be spoken of as A and as B.
    let classes = template::described(reading).into_iter().map(|class| class.name.as_str());
    let names: Vec<&str> = classes.flat_map(|name| std::iter::once(name).chain(name.split(" or "))).collect();
    guard::check(&text, &names).map_err(guard::Refusal::code)?;
    Ok(Description {
        text: template::compose(reading, &text),
        source: DescriptionSource::Llm,
        version: PROMPT_VERSION.to_owned(),
        fallback: None,
    })
}
