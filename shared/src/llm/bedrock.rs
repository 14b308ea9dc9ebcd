//! An agent of Amazon Bedrock behind an alias: `InvokeAgent`, which answers in an event stream.
//!
//! Of a prompt the agent gets the text alone: model, instructions and temperature are its own. What
//! was said before it remembers itself, in a session that is the caller's.
//!
//! Wire format: Amazon Bedrock API reference, "InvokeAgent".

use aws_config::SdkConfig;
use aws_sdk_bedrockagentruntime::Client;
use aws_sdk_bedrockagentruntime::config::Builder;
use aws_sdk_bedrockagentruntime::config::retry::RetryConfig;
use aws_sdk_bedrockagentruntime::error::SdkError;
use aws_sdk_bedrockagentruntime::operation::invoke_agent::InvokeAgentError;
use aws_sdk_bedrockagentruntime::types::error::ResponseStreamError;
use aws_sdk_bedrockagentruntime::types::{
    Metadata, OrchestrationTrace, PostProcessingTrace, PreProcessingTrace, ResponseStream, RoutingClassifierTrace,
    Trace, TracePart,
};
use uuid::Uuid;

use super::{Answer, Format, Live, LlmError, MAX_ANSWER_BYTES, Prompt, finally, retryable};
use crate::api::chat::Role;
use crate::config::{ConfigError, Env};

/// An agent that may be invoked.
pub struct BedrockAgent {
    client: Client,
    agent_id: String,
    alias_id: String,
    has_memory: bool,
    /// `agent/alias`, where others have the name of a model.
    name: String,
}

impl BedrockAgent {
    /// `BEDROCK_AGENT_ID` and `BEDROCK_AGENT_ALIAS_ID`; `BEDROCK_AGENT_MEMORY` where the agent has one.
    /// `None` where the first is not set.
    ///
    /// # Errors
    /// [`ConfigError`] where one does not parse, or the alias is missing.
    pub fn from_env(env: &Env, sdk: &SdkConfig) -> Result<Option<Self>, ConfigError> {
        let Some(agent_id) = id("BEDROCK_AGENT_ID", env.text("BEDROCK_AGENT_ID")?)? else { return Ok(None) };
        let alias_id = id("BEDROCK_AGENT_ALIAS_ID", env.text("BEDROCK_AGENT_ALIAS_ID")?)?
            .ok_or_else(|| ConfigError::new("BEDROCK_AGENT_ALIAS_ID", "is needed with BEDROCK_AGENT_ID"))?;
        let has_memory = env.flag("BEDROCK_AGENT_MEMORY")?;
        // Tries are counted and spaced by `Llm::complete`.
        let client = Client::from_conf(Builder::from(sdk).retry_config(RetryConfig::disabled()).build());
        let name = format!("{agent_id}/{alias_id}");
        Ok(Some(Self { client, agent_id, alias_id, has_memory, name }))
    }

    /// `agent/alias`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) async fn attempt(&self, prompt: &Prompt, live: Option<&Live>) -> Result<Answer, LlmError> {
        let session = prompt.session.clone().unwrap_or_else(|| Uuid::new_v4().simple().to_string());
        let invoke = self
            .client
            .invoke_agent()
            .agent_id(&self.agent_id)
            .agent_alias_id(&self.alias_id)
            .set_memory_id(prompt.session.clone().filter(|_| self.has_memory))
            .session_id(session)
            .input_text(text(prompt))
            // The only place that says how many tokens it took.
            .enable_trace(true);
        let mut stream = invoke.send().await.map_err(refused)?.completion;
        let (mut bytes, mut told, mut usage) = (Vec::new(), 0, None);
        while let Some(event) = stream.recv().await.map_err(broken_off)? {
            match event {
                ResponseStream::Chunk(part) => {
                    bytes.extend(part.bytes.map(|part| part.into_inner()).unwrap_or_default());
                    if let Some(live) = live {
                        // A letter may be cut in two.
                        let whole = bytes[told..].utf8_chunks().next().map_or("", |chunk| chunk.valid());
                        live.tell(whole);
                        told += whole.len();
                    }
                }
                ResponseStream::Trace(part) => add(&mut usage, &part),
                // It waits for a tool of the caller's, and there is none.
                ResponseStream::ReturnControl(_) => return Err(finally("llm_invalid_response")),
                _ => {}
            }
            if bytes.len() > MAX_ANSWER_BYTES {
                return Err(finally("llm_invalid_response"));
            }
        }
        let text = String::from_utf8(bytes).map_err(|_| finally("llm_invalid_response"))?;
        Ok(Answer {
            id: None,
            model: Some(self.name.clone()),
            text,
            finish_reason: None,
            prompt_tokens: usage.map(|(prompt, _)| prompt),
            completion_tokens: usage.map(|(_, completion)| completion),
        })
    }
}

/// An id as it stands in an ARN.
fn id(name: &str, id: Option<&str>) -> Result<Option<String>, ConfigError> {
    if id.is_some_and(|id| id.len() > 10 || !id.bytes().all(|byte| byte.is_ascii_alphanumeric())) {
        return Err(ConfigError::new(name, "is at most 10 letters and digits, such as AJBHXXILZN"));
    }
    Ok(id.map(str::to_owned))
}

/// What the agent is told: the instructions, and the last that the user has said.
fn text(prompt: &Prompt) -> String {
    let said = |role| prompt.messages.iter().filter(move |message| message.role == role);
    let mut parts: Vec<&str> = said(Role::System).map(|message| message.content.as_str()).collect();
    parts.extend(said(Role::User).next_back().map(|message| message.content.as_str()));
    let mut text = parts.join("\n\n");
    if let Format::Schema { schema, .. } = &prompt.format {
        text.push_str(&format!("\n\nAnswer with nothing but JSON of this JSON Schema: {schema}"));
    }
    text
}

/// Each model that the agent asks says what it took; one answer may be several.
fn add(usage: &mut Option<(u64, u64)>, part: &TracePart) {
    let metadata: Option<&Metadata> = match &part.trace {
        Some(Trace::PreProcessingTrace(PreProcessingTrace::ModelInvocationOutput(output))) => output.metadata.as_ref(),
        Some(Trace::OrchestrationTrace(OrchestrationTrace::ModelInvocationOutput(output))) => output.metadata.as_ref(),
        Some(Trace::PostProcessingTrace(PostProcessingTrace::ModelInvocationOutput(output))) => {
            output.metadata.as_ref()
        }
        Some(Trace::RoutingClassifierTrace(RoutingClassifierTrace::ModelInvocationOutput(output))) => {
            output.metadata.as_ref()
        }
        _ => None,
    };
    let Some(found) = metadata.and_then(|metadata| metadata.usage.as_ref()) else { return };
    let tokens = |tokens: Option<i32>| u64::try_from(tokens.unwrap_or(0)).unwrap_or(0);
    let (prompt, completion) = usage.unwrap_or_default();
    *usage = Some((prompt + tokens(found.input_tokens), completion + tokens(found.output_tokens)));
}

/// Why there is no stream.
fn refused(error: SdkError<InvokeAgentError>) -> LlmError {
    error.as_service_error().map_or(trouble(false, false, false), |error| {
        trouble(
            error.is_throttling_exception() || error.is_service_quota_exceeded_exception(),
            error.is_access_denied_exception() || error.is_resource_not_found_exception(),
            error.is_validation_exception(),
        )
    })
}

/// What ended a stream too early. The same exceptions, of another type.
fn broken_off<R>(error: SdkError<ResponseStreamError, R>) -> LlmError {
    error.as_service_error().map_or(trouble(false, false, false), |error| {
        trouble(
            error.is_throttling_exception() || error.is_service_quota_exceeded_exception(),
            error.is_access_denied_exception() || error.is_resource_not_found_exception(),
            error.is_validation_exception(),
        )
    })
}

/// The same codes as those of other providers.
fn trouble(is_throttled: bool, is_denied: bool, is_invalid: bool) -> LlmError {
    match (is_throttled, is_denied, is_invalid) {
        (true, ..) => retryable("llm_rate_limited"),
        (_, true, _) => finally("llm_denied"),
        (.., true) => finally("llm_refused"),
        _ => retryable("llm_unavailable"),
    }
}
