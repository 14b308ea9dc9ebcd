//! A question to the LLM instead of a photo.
//!
//! Writes, in this order: the prompt (blob store), the record with its idempotency item (one
//! transaction). The record asks the change feed for enrichment, so no message is sent.

use shared::api::chat::{self, MAX_BODY_BYTES};
use shared::api::prompt::PromptRequest;
use shared::crash::{self, Point};
use shared::error::{Code, Error};
use shared::http::Caller;
use shared::http::body::invalid;
use shared::job::{self, Input, StoredPrompt};
use shared::ports::{BlobStore, JobQueue, JobStore};
use uuid::Uuid;

use crate::{Draft, Kind, Submit, idempotency_item, same_content};

/// What is wrong with a prompt, whoever sends it.
pub(crate) fn check(request: &PromptRequest) -> Result<(), Error> {
    chat::check(&request.messages, request.temperature, request.max_tokens).map_err(invalid)?;
    let size: usize = request.messages.iter().map(|message| message.content.len()).sum();
    if size > MAX_BODY_BYTES {
        return Err(Error::new(Code::PayloadTooLarge, "The prompt is larger than 1 MiB. Send less."));
    }
    Ok(())
}

impl<J: JobStore, Q: JobQueue, B: BlobStore> Submit<J, Q, B> {
    /// Makes a job of a checked prompt and returns its id, or the id that the same prompt under the
    /// same key was given before.
    ///
    /// # Errors
    /// 403 for guests, 404 where there is no LLM, and those of [`Submit::accept`].
    pub async fn accept_prompt(
        &self,
        caller: &Caller,
        key: Option<String>,
        request: &PromptRequest,
    ) -> Result<Uuid, Error> {
        if caller.is_guest() {
            return Err(Error::new(Code::Forbidden, "The LLM answers to callers with credentials."));
        }
        if !self.has_llm {
            return Err(Error::new(Code::LlmNotConfigured, "This host has no LLM; its operator sets LLM_BASE_URL."));
        }
        let now = self.clock.now();
        let id = job::new_id(now);
        let bytes = serde_json::to_vec(request).map_err(Error::internal)?;
        let idempotency = key.map(|key| idempotency_item(caller, key, (Kind::Prompt, &bytes), id, now));
        if let Some(item) = &idempotency
            && let Some(earlier) = self.jobs.idempotency(&item.caller, &item.key, now).await?
        {
            return same_content(item, &earlier);
        }
        let stored = StoredPrompt { size_bytes: bytes.len() as u64, expires_at: now + self.policy.photo_ttl };
        self.blobs.put(&job::prompt_key(id), bytes).await?;
        crash::here(Point::SubmitPromptStored);
        self.create(Draft { id, now, caller, describe: false, idempotency, upload: None }, Input::Prompt(stored)).await
    }
}
