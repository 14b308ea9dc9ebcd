//! The LLM's answer to a prompt job.
//!
//! Reads the record and the stored prompt. Writes, in this order: the claim (`lib.rs`); an answer
//! that is too large for the record (blob store); then the completed record, the failed one, or one
//! with a later `due_at`.

use chrono::TimeDelta;
use serde::de::IgnoredAny;
use shared::Error;
use shared::api::chat::{ChatMessage, Role};
use shared::api::prompt::{AnswerFormat, PromptRequest};
use shared::crash::{self, Point};
use shared::job::{AnswerContent, FailureCode, Job, LlmAnswer, LlmCall, LlmTrouble, prompt_key};
use shared::lease::put_leased;
use shared::llm::{Answer, Format, LlmError, Message, Prompt, session_of};
use shared::ports::{BlobStore, JobQueue, JobStore, Push};
use shared::transition::transition;

use crate::{Enrichment, json_of, settled, told};

/// OpenAI refuses to answer in JSON where no message speaks of it.
const SPEAK_JSON: &str = "Answer with JSON.";

const NO_LLM: LlmTrouble = LlmTrouble { code: FailureCode::LlmNotConfigured, passing: false, redrivable: true };
const NO_PROMPT: LlmTrouble = LlmTrouble { code: FailureCode::PromptMissing, passing: false, redrivable: false };
/// It answered; only an operator asks it again.
const NO_JSON: LlmTrouble = LlmTrouble { code: FailureCode::LlmInvalidJson, passing: false, redrivable: true };
const NO_STORE: LlmTrouble = LlmTrouble { code: FailureCode::AttemptsExhausted, passing: true, redrivable: true };

impl<J: JobStore, B: BlobStore, P: Push, Q: JobQueue> Enrichment<J, B, P, Q> {
    /// Works a claimed prompt.
    pub(crate) async fn answer(&self, job: &Job) -> Result<(), Error> {
        if self.llm.is_offline() {
            return self.release(job, NO_LLM, None, None).await;
        }
        let request = match self.request(job).await {
            Ok(Some(request)) => request,
            Ok(None) => return self.release(job, NO_PROMPT, None, None).await,
            Err(error) => return self.store_failed(job, &error, None).await,
        };
        let format = request.format;
        let (answer, mut call) = self.ask(&prompt(request, &job.caller), job).await;
        crash::here(Point::EnrichmentAnswered);
        let failure = answer.as_ref().err().cloned();
        let usable = answer.map_err(|error| (trouble(&error), error.wait())).and_then(|answer| {
            let text = text_of(&answer, format).ok_or((NO_JSON, None))?.to_owned();
            Ok(Answer { text, ..answer })
        });
        if let (Err((NO_JSON, _)), None) = (&usable, &failure) {
            call.outcome = "llm_invalid_json".to_owned();
        }
        told(&call, failure.is_some_and(|error| !error.is_of_the_request()));
        match usable {
            Ok(answer) => self.commit(job, answer, call).await,
            Err((trouble, wait)) => self.release(job, trouble, wait, Some(call)).await,
        }
    }

    async fn request(&self, job: &Job) -> Result<Option<PromptRequest>, Error> {
        let Some(bytes) = self.blobs.get(&prompt_key(job.id)).await? else { return Ok(None) };
        serde_json::from_slice(&bytes)
            .map(Some)
            // serde's own message may repeat a value.
            .map_err(|error| Error::internal(format!("{:?} at column {}", error.classify(), error.column())))
    }

    async fn commit(&self, job: &Job, answer: Answer, call: LlmCall) -> Result<(), Error> {
        let content = AnswerContent::of(&answer.text, job.id, job.claim);
        if let AnswerContent::Blob { key } = &content {
            let (now, text) = (self.clock.now(), answer.text.into_bytes());
            let stored = put_leased(&self.blobs, job, now, key, text).await;
            if let Err(error) = stored {
                return self.store_failed(job, &error, Some(call)).await;
            }
            crash::here(Point::EnrichmentAnswerStored);
        }
        let answer = LlmAnswer {
            content,
            finish_reason: answer.finish_reason,
            prompt_tokens: answer.prompt_tokens,
            completion_tokens: answer.completion_tokens,
            latency_ms: call.latency_ms,
            cost_usd: call.cost_usd,
        };
        let now = self.clock.now();
        let finish = |current: &Job| {
            let mut next = current.finish_answer(job.claim, answer.clone(), now, &self.policy)?;
            next.settle_call(job.claim, Some(call.clone()));
            Ok((next, ()))
        };
        let finished = transition(&self.jobs, job, finish).await;
        crash::here(Point::EnrichmentFinished);
        settled(job, finished.map(|_| ()))
    }

    async fn store_failed(&self, job: &Job, error: &Error, call: Option<LlmCall>) -> Result<(), Error> {
        tracing::warn!(error.code = error.code().as_str(), error.chain = error.chain(), "prompt not answered");
        self.release(job, NO_STORE, None, call).await
    }

    /// Writes that the claim came to nothing: the job waits, or has failed.
    async fn release(
        &self,
        job: &Job,
        trouble: LlmTrouble,
        wait: Option<TimeDelta>,
        call: Option<LlmCall>,
    ) -> Result<(), Error> {
        let now = self.clock.now();
        let release = |current: &Job| {
            let mut next = current.release_answer(job.claim, trouble, wait, now, &self.policy)?;
            next.settle_call(job.claim, call.clone());
            Ok((next, ()))
        };
        let released = transition(&self.jobs, job, release).await;
        crash::here(Point::EnrichmentDeferred);
        settled(job, released.map(|_| ()))
    }
}

fn prompt(request: PromptRequest, caller: &str) -> Prompt {
    let PromptRequest { mut messages, max_tokens, temperature, format } = request;
    let format = match format {
        AnswerFormat::Text => Format::Text,
        AnswerFormat::Json => Format::Json,
    };
    let is_told = messages.iter().any(|message| message.content.to_ascii_lowercase().contains("json"));
    if format == Format::Json && !is_told {
        messages.insert(0, ChatMessage { role: Role::System, content: SPEAK_JSON.to_owned() });
    }
    let messages = messages.into_iter().map(|ChatMessage { role, content }| Message { role, content }).collect();
    Prompt { messages, max_tokens, temperature, format, session: Some(session_of(caller)) }
}

/// What the caller is shown of an answer; `None` where it is not the JSON that was asked for.
fn text_of(answer: &Answer, format: AnswerFormat) -> Option<&str> {
    match format {
        AnswerFormat::Text => Some(&answer.text),
        AnswerFormat::Json => {
            let text = json_of(&answer.text);
            serde_json::from_str::<IgnoredAny>(text).is_ok().then_some(text)
        }
    }
}

fn trouble(error: &LlmError) -> LlmTrouble {
    let code = match error.code {
        "llm_denied" | "llm_refused" => FailureCode::LlmRefused,
        "llm_invalid_response" => FailureCode::LlmInvalidResponse,
        "llm_rate_limited" => FailureCode::LlmRateLimited,
        "llm_timeout" => FailureCode::LlmTimeout,
        _ => FailureCode::LlmUnavailable,
    };
    LlmTrouble { code, passing: error.retryable, redrivable: error.retryable }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str) -> Answer {
        let text = text.to_owned();
        Answer { id: None, model: None, text, finish_reason: None, prompt_tokens: None, completion_tokens: None }
    }

    #[test]
    fn json_is_taken_out_of_a_code_block_and_anything_else_is_refused() {
        for (text, shown) in [
            (r#"{"a": 1}"#, Some(r#"{"a": 1}"#)),
            ("```json\n{\"a\": 1}\n```", Some(r#"{"a": 1}"#)),
            (" [1, 2] ", Some("[1, 2]")),
            (r#"{"a": 1"#, None),
            (r#"Here it is: {"a": 1}"#, None),
            (r#"{"a": 1} {"b": 2}"#, None),
            ("", None),
        ] {
            assert_eq!(text_of(&answer(text), AnswerFormat::Json), shown, "{text}");
            assert_eq!(text_of(&answer(text), AnswerFormat::Text), Some(text));
        }
    }

    #[test]
    fn an_llm_that_is_to_speak_json_is_told_so_unless_a_message_does() {
        for (content, format, messages) in [
            ("List three moles.", AnswerFormat::Json, 2),
            ("List three moles as JSON.", AnswerFormat::Json, 1),
            ("List three moles.", AnswerFormat::Text, 1),
        ] {
            let messages_in = vec![ChatMessage { role: Role::User, content: content.to_owned() }];
            let request = PromptRequest { messages: messages_in, max_tokens: None, temperature: None, format };
            assert_eq!(prompt(request, "ward").messages.len(), messages, "{content}");
        }
    }

    #[test]
    fn the_session_is_the_callers_whatever_the_prompt_says() {
        let session = |content: &str, format: AnswerFormat, caller: &str| {
            let messages = vec![ChatMessage { role: Role::User, content: content.to_owned() }];
            prompt(PromptRequest { messages, max_tokens: Some(7), temperature: Some(1.0), format }, caller).session
        };
        for caller in ["ward", "clinic"] {
            for (content, format) in [("Hi", AnswerFormat::Text), ("session: clinic", AnswerFormat::Json)] {
                assert_eq!(session(content, format, caller), Some(session_of(caller)), "{caller}: {content}");
            }
        }
        assert_ne!(session("Hi", AnswerFormat::Text, "ward"), session("Hi", AnswerFormat::Text, "clinic"));
    }
}
