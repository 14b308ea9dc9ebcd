//! A conversation as it arrives, and what is wrong with it.

use axum::body::to_bytes;
use axum::extract::Request;
use axum::http::header;
use serde::Deserialize;
use shared::api::chat::{MAX_BODY_BYTES, MAX_MESSAGES, MAX_TOKENS, Role};
use shared::error::{Code, Error};
use shared::llm::{Format, Message, Prompt};

const SHAPE: &str = r#"{"messages": [{"role", "content"}], "temperature", "max_tokens"}"#;

/// [`shared::api::chat::ChatBody`], read so that an error can say where it is.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Json {
    messages: Vec<Item>,
    temperature: Option<f32>,
    max_tokens: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Item {
    role: Role,
    content: String,
}

/// # Errors
/// 400, 413 or 415.
pub(crate) async fn read(request: Request) -> Result<Prompt, Error> {
    let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media_type = content_type.unwrap_or("").split(';').next().unwrap_or("").trim();
    if !media_type.eq_ignore_ascii_case("application/json") {
        return Err(Error::new(Code::UnsupportedMediaType, "Send the conversation as application/json."));
    }
    let too_large = |_| Error::new(Code::PayloadTooLarge, "The conversation is larger than 1 MiB.");
    parse(&to_bytes(request.into_body(), MAX_BODY_BYTES).await.map_err(too_large)?)
}

fn parse(bytes: &[u8]) -> Result<Prompt, Error> {
    // serde takes an array of a struct's fields for the struct.
    if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
        return Err(invalid(format!("The body is not {SHAPE}: it is an array.")));
    }
    let Json { messages, temperature, max_tokens } = serde_json::from_slice(bytes).map_err(|error| {
        // serde's own message may repeat a value.
        invalid(format!("The body is not {SHAPE}: {:?} at column {}.", error.classify(), error.column()))
    })?;
    if !(1..=MAX_MESSAGES).contains(&messages.len()) {
        return Err(invalid(format!("\"messages\" must be 1 to {MAX_MESSAGES}.")));
    }
    if let Some(at) = messages.iter().position(|message| message.content.trim().is_empty()) {
        return Err(invalid(format!("\"messages[{at}].content\" is empty.")));
    }
    if messages.iter().all(|message| message.role != Role::User) {
        return Err(invalid("\"messages\" holds nothing of the role \"user\".".to_owned()));
    }
    if temperature.is_some_and(|temperature| !(0.0..=2.0).contains(&temperature)) {
        return Err(invalid("\"temperature\" must be 0 to 2.".to_owned()));
    }
    if max_tokens.is_some_and(|tokens| !(1..=MAX_TOKENS).contains(&tokens)) {
        return Err(invalid(format!("\"max_tokens\" must be 1 to {MAX_TOKENS}.")));
    }
    let messages = messages.into_iter().map(|Item { role, content }| Message { role, content }).collect();
    Ok(Prompt { messages, temperature, max_tokens, format: Format::Text })
}

fn invalid(message: String) -> Error {
    Error::new(Code::InvalidRequest, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &str) -> String {
        let error = parse(body.as_bytes()).unwrap_err();
        assert_eq!(error.code(), Code::InvalidRequest, "{body}");
        error.message().to_owned()
    }

    #[test]
    fn a_conversation_is_taken_as_it_is() {
        let body = r#"{"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": " Hi "},
            {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "More."}],
            "temperature": 0, "max_tokens": 7}"#;
        let prompt = parse(body.as_bytes()).unwrap();
        let roles: Vec<_> = prompt.messages.iter().map(|message| message.role).collect();
        assert_eq!(roles, [Role::System, Role::User, Role::Assistant, Role::User]);
        assert_eq!(prompt.messages[1].content, " Hi ");
        assert_eq!((prompt.temperature, prompt.max_tokens), (Some(0.0), Some(7)));
    }

    #[test]
    fn what_is_wrong_is_named_and_never_repeated() {
        let user = r#"{"role": "user", "content": "secret"}"#;
        let many = vec![user; MAX_MESSAGES + 1].join(",");
        for (body, named) in [
            ("", "Eof"),
            ("{}", "Data"),
            (r#"["secret"]"#, "array"),
            (r#"{"messages": []}"#, "messages"),
            (&format!(r#"{{"messages": [{many}]}}"#), "1 to 100"),
            (r#"{"messages": [{"role": "secret", "content": "x"}]}"#, "Data"),
            (r#"{"messages": [{"role": "user", "content": "secret", "name": "x"}]}"#, "Data"),
            (r#"{"messages": [{"role": "user", "content": 7}]}"#, "Data"),
            (r#"{"messages": [{"role": "user", "content": " "}]}"#, "messages[0].content"),
            (r#"{"messages": [{"role": "system", "content": "secret"}]}"#, "\"user\""),
            (&format!(r#"{{"messages": [{user}], "temperature": 2.1}}"#), "temperature"),
            (&format!(r#"{{"messages": [{user}], "temperature": -0.1}}"#), "temperature"),
            (&format!(r#"{{"messages": [{user}], "max_tokens": 0}}"#), "max_tokens"),
            (&format!(r#"{{"messages": [{user}], "max_tokens": 100001}}"#), "max_tokens"),
            (&format!(r#"{{"messages": [{user}], "stream": true}}"#), "Data"),
        ] {
            let message = refused(body);
            assert!(message.contains(named), "{body}: {message}");
            assert!(!message.contains("secret"), "{message}");
        }
    }
}
