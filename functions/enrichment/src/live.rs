//! The text of an answer, told to the connection that asked while the LLM writes it.
//!
//! Reads the job's connection. Pushes frames with the claim and the text's place in it, so that the
//! text of a second attempt takes the place of the first. Nothing is lost where nobody listens: the
//! record gets the whole answer, and who asks for it is told.

use std::pin::pin;
use std::time::Duration;

use futures_util::future::{Either, select};
use shared::crash::{self, Point};
use shared::job::{Input, Job, Record};
use shared::llm::{Answer, Format, Live, LlmError, Prompt};
use shared::ports::{BlobStore, JobQueue, JobStore, Push, Pushed};
use shared::push::{text_frames, utf16_len};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, timeout, timeout_at};

use crate::Enrichment;

/// What comes within this time goes out together.
const COALESCED: Duration = Duration::from_millis(250);
/// How long the telling may go on when the answer is whole: it must be committed before its lease ends.
const LAST_FRAMES: Duration = Duration::from_secs(1);
/// What comes at once and is longer is not told, or it alone would fill a client's outbox.
const MAX_AT_ONCE: usize = 96 * 1024;

impl<J: JobStore, B: BlobStore, P: Push, Q: JobQueue> Enrichment<J, B, P, Q> {
    /// Asks for a prompt's answer, and tells it as it comes where a connection has asked for text.
    /// JSON is told when it is whole: a part of it parses as nothing.
    pub(crate) async fn complete(
        &self,
        prompt: &Prompt,
        deadline: std::time::Instant,
        job: &Job,
    ) -> (Result<Answer, LlmError>, u32) {
        let connection = match &job.input {
            Input::Prompt(prompt) => prompt.connection.as_deref(),
            Input::Photo(_) => None,
        };
        let Some(connection) = connection.filter(|_| prompt.format == Format::Text) else {
            return self.llm.complete_at_length(prompt, deadline, None).await;
        };
        let (sender, pieces) = unbounded_channel();
        let asked = async {
            // Dropped with the answer, which ends the other half.
            let live = Live::to(sender);
            self.llm.complete_at_length(prompt, deadline, Some(&live)).await
        };
        match select(pin!(asked), pin!(self.tell(connection, job, pieces))).await {
            Either::Left((answer, telling)) => {
                let _ = timeout(LAST_FRAMES, telling).await;
                answer
            }
            Either::Right(((), asked)) => asked.await,
        }
    }

    /// Whether the job is there and its claim is this one: nobody is told of what was deleted meanwhile.
    async fn is_claimed(&self, job: &Job) -> bool {
        match self.jobs.get(job.id).await {
            Ok(Some(Record::Job(now))) => now.claim == job.claim,
            Ok(_) => false,
            // Text is a kindness; the record has the last word.
            Err(_) => true,
        }
    }

    async fn tell(&self, connection: &str, job: &Job, mut pieces: UnboundedReceiver<String>) {
        let mut offset = 0;
        while let Some(mut text) = pieces.recv().await {
            let until = Instant::now() + COALESCED;
            while let Ok(Some(more)) = timeout_at(until, pieces.recv()).await {
                text.push_str(&more);
            }
            if text.len() > MAX_AT_ONCE || !self.is_claimed(job).await {
                return;
            }
            for frame in text_frames(job, &text, offset) {
                let pushed = match frame.to_json() {
                    Ok(json) => self.push.push(connection, json).await,
                    Err(error) => Err(error),
                };
                crash::here(Point::EnrichmentTextPushed);
                match pushed {
                    Ok(Pushed::Sent) => {}
                    Ok(Pushed::Gone) => return,
                    // The client gets the whole text at the end.
                    Err(error) => return tracing::warn!(error.chain = error.chain(), "text not pushed"),
                }
            }
            offset += utf16_len(&text);
        }
    }
}
