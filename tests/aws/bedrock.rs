//! Agents of Bedrock: a stand-in whose frames AWS's own library writes, held against what AWS has sent, for what
//! an agent may do wrong; and the emulator's, which answers in one piece.

mod host;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aws_config::SdkConfig;
use aws_smithy_eventstream::frame::write_message_to;
use aws_smithy_types::event_stream::{Header, HeaderValue, Message as Frame};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use shared::api::chat::Role;
use shared::config::Env;
use shared::job::{AnswerContent, FailureCode, Status};
use shared::llm::{Answer, Format, Llm, LlmError, Message, Prompt, session_of};
use tokio::net::TcpListener;

use crate::events::Functions;
use crate::runtime::Function;
use crate::support::sdk;

const AGENT: &str = "AGENT12345";
const ALIAS: &str = "TSTALIASID";
const SETTINGS: [(&str, &str); 4] = [
    ("BEDROCK_AGENT_ID", AGENT),
    ("BEDROCK_AGENT_ALIAS_ID", ALIAS),
    ("LLM_PROMPT_USD_PER_MILLION", "1"),
    ("LLM_COMPLETION_USD_PER_MILLION", "4"),
];

/// Where the frames of AWS itself begin: lengths, their checksum, and headers. Of a chunk whose payload has 1,552
/// bytes, and of a trace's with 562. Recorded on 2025-05-30 by the tests of DataDog/dd-trace-py
/// (`tests/contrib/botocore/bedrock_cassettes/agent_invoke_trace_disabled.yaml` and `agent_invoke.yaml`).
const RECORDED: [&[u8]; 2] = [
    b"\x00\x00\x06\x6b\x00\x00\x00\x4b\xbc\x97\xe2\x30\x0b:event-type\x07\x00\x05chunk\
      \x0d:content-type\x07\x00\x10application/json\x0d:message-type\x07\x00\x05event",
    b"\x00\x00\x02\x8d\x00\x00\x00\x4b\x80\x92\x92\x59\x0b:event-type\x07\x00\x05trace\
      \x0d:content-type\x07\x00\x10application/json\x0d:message-type\x07\x00\x05event",
];

/// What the stand-in does with one call.
enum Behaviour {
    /// Frames, and then the end of the stream.
    Frames(Vec<Vec<u8>>),
    /// Frames, and then the connection breaks.
    CutOff(Vec<Vec<u8>>),
    /// A status, and the exception's name.
    Exception(u16, &'static str),
}

/// What an agent was asked.
#[derive(Clone)]
struct Asked {
    agent: String,
    alias: String,
    session: String,
    body: Value,
}

struct Agent {
    script: Mutex<VecDeque<Behaviour>>,
    asked: Mutex<Vec<Asked>>,
}

/// The stand-in, and its address.
async fn stand_in(script: impl IntoIterator<Item = Behaviour>) -> (Arc<Agent>, String) {
    let agent = Arc::new(Agent { script: Mutex::new(script.into_iter().collect()), asked: Mutex::default() });
    let path = "/agents/{agent}/agentAliases/{alias}/sessions/{session}/text";
    let router = Router::new().route(path, post(invoke)).with_state(Arc::clone(&agent));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (agent, url)
}

/// The stand-in, and a client of it.
async fn agent(script: impl IntoIterator<Item = Behaviour>, extra: &[(&str, &str)]) -> (Arc<Agent>, Llm) {
    let (agent, url) = stand_in(script).await;
    // Not the loaded configuration with another address: the environment's would win.
    let loaded = sdk().await;
    let mut config = SdkConfig::builder().endpoint_url(url).region(loaded.region().cloned());
    config
        .set_behavior_version(loaded.behavior_version())
        .set_credentials_provider(loaded.credentials_provider())
        .set_http_client(loaded.http_client())
        .set_sleep_impl(loaded.sleep_impl());
    let config = config.build();
    let llm = Llm::with_agents(&Env::of([&SETTINGS, extra].concat()), &config).unwrap();
    (agent, llm)
}

async fn invoke(
    State(state): State<Arc<Agent>>,
    Path((agent, alias, session)): Path<(String, String, String)>,
    body: axum::body::Bytes,
) -> Response {
    let body = serde_json::from_slice(&body).unwrap();
    state.asked.lock().unwrap().push(Asked { agent, alias, session, body });
    let next = state.script.lock().unwrap().pop_front();
    let stream = [
        ("content-type", "application/vnd.amazon.eventstream"),
        ("x-amzn-bedrock-agent-content-type", "application/json"),
        ("x-amz-bedrock-agent-session-id", "s"),
    ];
    match next.unwrap() {
        Behaviour::Frames(frames) => (stream, frames.concat()).into_response(),
        Behaviour::CutOff(frames) => {
            let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
            let parts = frames.into_iter().map(Ok).chain([Err(broken)]);
            (stream, Body::from_stream(futures_util::stream::iter(parts))).into_response()
        }
        Behaviour::Exception(status, name) => {
            let status = StatusCode::from_u16(status).unwrap();
            (status, [("x-amzn-errortype", name)], "{\"message\": \"secret\"}").into_response()
        }
    }
}

/// A frame of a `kind` (`event` or `exception`), its headers in AWS's order.
fn frame(kind: &'static str, [type_header, name]: [&'static str; 2], payload: &Value) -> Vec<u8> {
    let mut message = Frame::new(payload.to_string().into_bytes());
    for (header, value) in [(type_header, name), (":content-type", "application/json"), (":message-type", kind)] {
        message = message.add_header(Header::new(header, HeaderValue::String(value.into())));
    }
    let mut bytes = Vec::new();
    write_message_to(&message, &mut bytes).unwrap();
    bytes
}

fn event(name: &'static str, payload: &Value) -> Vec<u8> {
    frame("event", [":event-type", name], payload)
}

fn chunk(bytes: &[u8]) -> Vec<u8> {
    event("chunk", &json!({"bytes": STANDARD.encode(bytes)}))
}

fn exception(name: &'static str) -> Vec<u8> {
    frame("exception", [":exception-type", name], &json!({"message": "secret"}))
}

/// A trace with the fields of those that were recorded, whose `trace` is this.
fn trace(trace: &Value) -> Vec<u8> {
    let caller = json!({"agentAliasArn": "arn:aws:bedrock:us-east-1:000000000000:agent-alias/AGENT12345/TSTALIASID"});
    let payload = json!({"agentAliasId": ALIAS, "agentId": AGENT, "agentVersion": "1", "callerChain": [caller],
        "eventTime": "2026-11-29T09:00:00.251741423Z", "sessionId": "s", "trace": trace});
    event("trace", &payload)
}

fn metadata() -> Value {
    let (start, end) = ("2026-11-29T08:59:59.886678481Z", "2026-11-29T09:00:00.251482518Z");
    json!({"clientRequestId": "c", "startTime": start, "endTime": end, "totalTimeMs": 365})
}

/// What an agent sends of each model that it has asked.
fn usage(stage: &str, prompt: u64, completion: u64) -> Vec<u8> {
    let mut metadata = metadata();
    metadata["usage"] = json!({"inputTokens": prompt, "outputTokens": completion});
    let raw = json!({"content": "{\"secret\":null}"});
    trace(&json!({stage: {"modelInvocationOutput": {"metadata": metadata, "rawResponse": raw, "traceId": "t"}}}))
}

fn prompt(text: &str, session: Option<String>) -> Prompt {
    let said = |role, content: &str| Message { role, content: content.to_owned() };
    let earlier = [said(Role::User, "Earlier."), said(Role::Assistant, "Answered.")];
    let messages = [vec![said(Role::System, "Be short.")], earlier.into(), vec![said(Role::User, text)]].concat();
    Prompt { messages, max_tokens: None, temperature: None, format: Format::Text, session }
}

async fn ask(llm: &Llm) -> (Result<Answer, LlmError>, u32) {
    llm.complete(&prompt("Hello?", Some(session_of("ward"))), Instant::now() + Duration::from_secs(30)).await
}

#[test]
fn the_stand_ins_frames_begin_as_those_that_aws_has_sent() {
    let padding = |length: usize| json!({"p": "x".repeat(length - r#"{"p":""}"#.len())});
    for (frame, recorded) in [chunk(&[b'x'; 1153]), event("trace", &padding(562))].iter().zip(RECORDED) {
        assert!(frame.starts_with(recorded), "{}", frame.escape_ascii());
    }
}

#[tokio::test]
async fn chunks_are_one_answer_and_traces_say_what_it_took() {
    let whole = "A naevus \u{2013} a mole.".as_bytes();
    // The dash is three bytes, and comes in two pieces.
    let guardrail = json!({"action": "NONE", "inputAssessments": [{}], "metadata": metadata(), "traceId": "t"});
    let limits = json!({"__type": "com.amazon.bedrock.agent.common.types#InferenceConfiguration", "maximumLength": 2048,
        "stopSequences": ["</answer>"], "temperature": 0.0, "topK": 250, "topP": 1.0});
    let input = json!({"foundationModel": "m", "inferenceConfiguration": limits, "text": "secret", "traceId": "t",
        "type": "ORCHESTRATION"});
    let frames = vec![
        trace(&json!({"guardrailTrace": guardrail})),
        usage("preProcessingTrace", 100, 10),
        chunk(&whole[..10]),
        trace(&json!({"orchestrationTrace": {"modelInvocationInput": input}})),
        trace(&json!({"orchestrationTrace": {"rationale": {"text": "secret", "traceId": "t"}}})),
        chunk(&whole[10..]),
        usage("orchestrationTrace", 20, 5),
    ];
    let (agent, llm) = agent([Behaviour::Frames(frames)], &[]).await;
    let (answer, tries) = ask(&llm).await;
    let answer = answer.unwrap();
    assert_eq!((answer.text.as_bytes(), tries), (whole, 1));
    assert_eq!((answer.prompt_tokens, answer.completion_tokens), (Some(120), Some(15)));
    assert_eq!(llm.cost_usd(&answer), Some((120.0 + 60.0) / 1e6));
    let asked = agent.asked.lock().unwrap()[0].clone();
    assert_eq!((asked.agent.as_str(), asked.alias.as_str()), (AGENT, ALIAS));
    // What was said before it has in its session.
    assert_eq!(asked.body["inputText"], "Be short.\n\nHello?");
    assert!(asked.body.get("memoryId").is_none(), "{}", asked.body);
}

#[tokio::test]
async fn what_breaks_in_the_middle_is_asked_again_and_nothing_of_it_is_kept() {
    let half = || vec![chunk(b"Half an ")];
    let broken = || Behaviour::Frames([half(), vec![exception("dependencyFailedException")]].concat());
    let whole = Behaviour::Frames(vec![chunk(b"Whole.")]);
    let (_, llm) = agent([broken(), Behaviour::CutOff(half()), whole], &[]).await;
    let (answer, tries) = ask(&llm).await;
    assert_eq!((answer.unwrap().text.as_str(), tries), ("Whole.", 3));
    let (_, llm) = agent([broken(), broken(), broken()], &[]).await;
    let (answer, tries) = ask(&llm).await;
    let error = answer.unwrap_err();
    assert_eq!((error.code, error.retryable, tries), ("llm_unavailable", true, 3));
}

#[tokio::test]
async fn each_exception_has_the_code_of_its_kind() {
    for (status, name, code, tries) in [
        (429, "ThrottlingException", "llm_rate_limited", 3),
        (400, "ServiceQuotaExceededException", "llm_rate_limited", 3),
        (403, "AccessDeniedException", "llm_denied", 1),
        (404, "ResourceNotFoundException", "llm_denied", 1),
        (400, "ValidationException", "llm_refused", 1),
        (500, "InternalServerException", "llm_unavailable", 3),
    ] {
        let (agent, llm) = agent((0..tries).map(|_| Behaviour::Exception(status, name)), &[]).await;
        let (answer, tried) = ask(&llm).await;
        assert_eq!((answer.unwrap_err().code, tried), (code, tries), "{name}");
        assert_eq!(agent.asked.lock().unwrap().len(), tries as usize);
    }
    // In the middle of a stream as well.
    let throttled = || Behaviour::Frames(vec![chunk(b"Half"), exception("throttlingException")]);
    let (_, llm) = agent([throttled(), throttled(), throttled()], &[]).await;
    assert_eq!(ask(&llm).await.0.unwrap_err().code, "llm_rate_limited");
}

#[tokio::test]
async fn what_is_no_text_or_too_much_of_it_is_no_answer() {
    let control = event("returnControl", &json!({"invocationId": "i", "invocationInputs": []}));
    for frames in [vec![control], vec![chunk(&[0xC3])], vec![chunk(&[b'x'; 60_000]); 50]] {
        let (_, llm) = agent([Behaviour::Frames(frames)], &[]).await;
        let (answer, tries) = ask(&llm).await;
        assert_eq!((answer.unwrap_err().code, tries), ("llm_invalid_response", 1));
    }
}

#[tokio::test]
async fn a_caller_has_one_session_and_memory_and_nobody_elses() {
    let answers = || (0..4).map(|_| Behaviour::Frames(vec![chunk(b"Yes.")]));
    let (agent, llm) = agent(answers(), &[("BEDROCK_AGENT_MEMORY", "true")]).await;
    let ward = Some(session_of("ward"));
    for session in [ward.clone(), ward, Some(session_of("surgery")), None] {
        llm.complete(&prompt("Hello?", session), Instant::now() + Duration::from_secs(30)).await.0.unwrap();
    }
    let asked = agent.asked.lock().unwrap().clone();
    let sessions: Vec<_> = asked.iter().map(|asked| asked.session.as_str()).collect();
    assert_eq!(sessions[0], sessions[1]);
    assert!(sessions[1] != sessions[2] && sessions[2] != sessions[3] && sessions[3] != sessions[1], "{sessions:?}");
    assert!(sessions.iter().all(|session| !session.contains("ward") && session.len() <= 100), "{sessions:?}");
    let memories: Vec<_> = asked.iter().map(|asked| asked.body["memoryId"].as_str()).collect();
    assert_eq!(memories, [Some(sessions[0]), Some(sessions[0]), Some(sessions[2]), None]);
}

#[tokio::test]
async fn settings_that_make_no_sense_keep_a_function_from_starting() {
    let sdk = sdk().await;
    for (settings, named) in [
        (vec![("BEDROCK_AGENT_ID", AGENT)], "BEDROCK_AGENT_ALIAS_ID"),
        (vec![("BEDROCK_AGENT_ID", "../else"), ("BEDROCK_AGENT_ALIAS_ID", ALIAS)], "BEDROCK_AGENT_ID"),
        ([&SETTINGS[..2], &[("LLM_MODEL", "m")]].concat(), "LLM_MODEL"),
        ([&SETTINGS[..2], &[("LLM_BASE_URL", "http://x/v1"), ("LLM_MODEL", "m")]].concat(), "BEDROCK_AGENT_ID"),
    ] {
        let error = Llm::with_agents(&Env::of(settings), &sdk).err().unwrap();
        assert_eq!(error.name, named, "{error}");
    }
}

#[tokio::test]
async fn enrichment_asks_the_agent_from_its_package_and_does_not_take_every_answer() {
    let mut functions = Functions::start("bea", &SETTINGS).await;
    let job = functions.run("mole-drawn.png").await;
    // The emulator's agent says that it is one, and not what a naevus is.
    assert_eq!(job.description.unwrap().fallback.as_deref(), Some("llm_invalid_answer"));
    assert_eq!(job.llm_calls.iter().map(|call| call.outcome.as_str()).collect::<Vec<_>>(), ["llm_invalid_answer"]);
}

/// The packaged functions, and chat, before the stand-in: the SDK has a variable for the address of each service.
async fn packaged(caller: &str, script: impl IntoIterator<Item = Behaviour>) -> (Arc<Agent>, Functions, Function) {
    let (agent, url) = stand_in(script).await;
    let own = [("AWS_ENDPOINT_URL_BEDROCK_AGENT_RUNTIME", url.as_str()), ("BEDROCK_AGENT_MEMORY", "true")];
    let settings = [&SETTINGS[..], &own].concat();
    let functions = Functions::start(caller, &settings).await;
    (agent, functions, Function::start("chat", &settings).await)
}

/// A conversation with the packaged chat: its status, and what it answers.
async fn converse(chat: &mut Function, functions: &Functions, text: &str) -> (Value, Value) {
    let body = json!({"messages": [{"role": "user", "content": text}]});
    let answer = chat.invoke(&functions.request("/chat", &body)).await.unwrap();
    (answer["statusCode"].clone(), serde_json::from_str(answer["body"].as_str().unwrap()).unwrap())
}

#[tokio::test]
async fn prompts_and_conversations_are_answered_from_their_packages_by_the_agent_in_one_session_of_the_caller() {
    let whole = || Behaviour::Frames(vec![usage("orchestrationTrace", 100, 10), chunk(b"A mole.")]);
    let (agent, mut functions, mut chat) = packaged("berta", [whole(), whole()]).await;
    let id = functions.ask(&json!({"prompt": "A naevus?", "system": "Be short."})).await;
    let job = functions.answer(id).await;
    assert_eq!((job.status, job.attempts.enrichment), (Status::Completed, 1), "{:?}", job.failure);
    let answer = job.answer.unwrap();
    assert_eq!(answer.content, AnswerContent::Text("A mole.".to_owned()));
    assert_eq!((answer.prompt_tokens, answer.completion_tokens), (Some(100), Some(10)));
    assert!((answer.cost_usd.unwrap() - 140e-6).abs() < 1e-12, "{:?}", answer.cost_usd);

    let (status, answer) = converse(&mut chat, &functions, "Another naevus?").await;
    assert_eq!((&status, &answer["content"]), (&json!(200), &json!("A mole.")), "{answer}");
    assert_eq!(answer["model"], format!("{AGENT}/{ALIAS}"));
    assert_eq!(answer["usage"], json!({"prompt_tokens": 100, "completion_tokens": 10}));
    // An agent is no model of the proxy.
    let completion = functions.request("/v1/chat/completions", &json!({"model": AGENT, "messages": []}));
    assert_eq!(chat.invoke(&completion).await.unwrap()["statusCode"], 404);

    let asked = agent.asked.lock().unwrap().clone();
    let texts: Vec<_> = asked.iter().map(|asked| asked.body["inputText"].as_str().unwrap()).collect();
    assert_eq!(texts, ["Be short.\n\nA naevus?", "Another naevus?"]);
    for asked in asked {
        let session = session_of("berta");
        assert_eq!((asked.agent.as_str(), asked.alias.as_str(), &asked.session), (AGENT, ALIAS, &session));
        assert_eq!(asked.body["memoryId"], session);
    }
    for function in [&functions.enrichment, &chat] {
        let printed = function.printed("stdout") + &function.printed("stderr");
        assert!(printed.contains("llm called"), "{printed}");
        assert!(!printed.contains("naevus") && !printed.contains("A mole."), "{printed}");
    }
}

#[tokio::test]
async fn an_agent_that_the_packages_may_not_invoke_is_asked_once_for_each_and_shown_with_none_of_its_words() {
    let denied = || Behaviour::Exception(403, "AccessDeniedException");
    let (agent, mut functions, mut chat) = packaged("bruno", [denied(), denied()]).await;
    let id = functions.ask(&json!({"prompt": "A naevus?"})).await;
    let job = functions.answer(id).await;
    let failure = job.failure.as_ref().unwrap();
    assert_eq!((job.status, failure.code, failure.retryable), (Status::Failed, FailureCode::LlmRefused, false));
    let (status, answer) = converse(&mut chat, &functions, "A naevus?").await;
    assert_eq!((&status, &answer["error"]["code"]), (&json!(502), &json!("llm_refused")), "{answer}");
    assert!(!format!("{job:?}{answer}").contains("secret"), "{job:?}, {answer}");
    assert_eq!(agent.asked.lock().unwrap().len(), 2);
}
