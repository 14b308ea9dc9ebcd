//! A conversation as it arrives, and what is wrong with it.

use axum::extract::Request;
use shared::api::chat::{ChatBody, ChatMessage, MAX_BODY_BYTES, check};
use shared::error::Error;
use shared::http::Caller;
use shared::http::body::{invalid, json};
use shared::llm::{Format, Message, Prompt, session_of};

/// # Errors
/// 400, 413 or 415.
pub(crate) async fn read(request: Request, caller: &Caller) -> Result<Prompt, Error> {
    let shape = r#"{"messages": [{"role", "content"}], "temperature", "max_tokens"}, the last two optional"#;
    prompt(json(request, MAX_BODY_BYTES, shape).await?, caller)
}

fn prompt(body: ChatBody, caller: &Caller) -> Result<Prompt, Error> {
    let ChatBody { messages, temperature, max_tokens } = body;
    check(&messages, temperature, max_tokens).map_err(invalid)?;
    let messages = messages.into_iter().map(|ChatMessage { role, content }| Message { role, content }).collect();
    let session = Some(session_of(&caller.0));
    Ok(Prompt { messages, temperature, max_tokens, format: Format::Text, session })
}

#[cfg(test)]
mod tests {
    use shared::api::chat::{MAX_MESSAGES, Role};
    use shared::error::Code;
    use shared::http::body::object;

    use super::*;

    fn parse(body: &str) -> Result<Prompt, Error> {
        prompt(object(body.as_bytes(), "a conversation")?, &Caller("ward".to_owned()))
    }

    fn refused(body: &str) -> String {
        let error = parse(body).unwrap_err();
        assert_eq!(error.code(), Code::InvalidRequest, "{body}");
        error.message().to_owned()
    }

    #[test]
    fn a_conversation_is_taken_as_it_is() {
        let body = r#"{"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": " Hi "},
            {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "More."}],
            "temperature": 0, "max_tokens": 7}"#;
        let prompt = parse(body).unwrap();
        let roles: Vec<_> = prompt.messages.iter().map(|message| message.role).collect();
        assert_eq!(roles, [Role::System, Role::User, Role::Assistant, Role::User]);
        assert_eq!(prompt.messages[1].content, " Hi ");
        assert_eq!((prompt.temperature, prompt.max_tokens), (Some(0.0), Some(7)));
    }

    #[test]
    fn the_session_is_the_callers_whatever_the_conversation_says() {
        let session = |body: &str, caller: &str| {
            let body = object(body.as_bytes(), "a conversation").unwrap();
            prompt(body, &Caller(caller.to_owned())).unwrap().session
        };
        let plain = r#"{"messages": [{"role": "user", "content": "Hi"}]}"#;
        let odd = r#"{"messages": [{"role": "system", "content": "session: clinic"},
            {"role": "user", "content": "clinic"}], "temperature": 1, "max_tokens": 7}"#;
        for caller in ["ward", "clinic"] {
            for body in [plain, odd] {
                assert_eq!(session(body, caller), Some(session_of(caller)), "{caller}: {body}");
            }
        }
        assert_ne!(session(plain, "ward"), session(plain, "clinic"));
        let named = r#"{"messages": [{"role": "user", "content": "Hi"}], "session": "clinic"}"#;
        assert!(refused(named).contains("Data"), "nobody names a session");
    }

    #[test]
    fn what_is_wrong_is_named_and_never_repeated() {
        let user = r#"{"role": "user", "content": "secret"}"#;
        let many = vec![user; MAX_MESSAGES + 1].join(",");
        for (body, named) in [
            ("{}", "Data"),
            (r#"{"messages": []}"#, "messages"),
            (&format!(r#"{{"messages": [{many}]}}"#), "1 to 100"),
            (r#"{"messages": [{"role": "secret", "content": "x"}]}"#, "Data"),
            (r#"{"messages": [{"role": "user", "content": "secret", "name": "x"}]}"#, "Data"),
            (r#"{"messages": [{"role": "user", "content": 7}]}"#, "Data"),
            (r#"{"messages": [{"role": "user", "content": " "}]}"#, "messages[0].content"),
            (r#"{"messages": [{"role": "system", "content": "secret"}]}"#, "\"user\""),
            (&format!(r#"{{"messages": [{user}], "temperature": 2.1}}"#), "temperature"),
            // Not rounded first.
            (&format!(r#"{{"messages": [{user}], "temperature": 2.00000001}}"#), "temperature"),
            (&format!(r#"{{"messages": [{user}], "temperature": -1.0e-235}}"#), "temperature"),
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
