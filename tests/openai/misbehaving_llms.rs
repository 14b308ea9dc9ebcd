//! Model servers that misbehave, for the clients that `scripts/openai-clients` runs: prints one line of
//! JSON with their base URLs and ends when its standard input is closed.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../pipeline/support/llm_server.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod llm_server;

use std::io::Read;

use llm_server::{Behaviour, Ending, LlmServer, chunks};
use serde_json::{Map, Value};

#[tokio::main]
async fn main() {
    let begun = || chunks("A growth of cells.")[..3].to_vec();
    let mut urls = Map::new();
    let mut servers = Vec::new();
    for (name, behaviour) in [
        // The one that behaves: LiteLLM makes up no streams of tool calls.
        ("calls-a-tool", Behaviour::Stream(tool_call(), Ending::Close)),
        ("stalls", Behaviour::Stall),
        ("stalls-midway", Behaviour::Stream(begun(), Ending::Stall)),
        ("breaks-off", Behaviour::Stream(begun(), Ending::CutOff)),
        ("limited", Behaviour::Status(429, Some(60))),
        ("down", Behaviour::Status(503, None)),
        ("refuses", Behaviour::Refuse(400, "The context is too long.".into())),
        ("denies", Behaviour::Refuse(401, "Incorrect API key provided: sk-upstream-secret.".into())),
    ] {
        let server = LlmServer::start([]).await;
        server.behave(behaviour);
        urls.insert(name.to_owned(), server.base_url().into());
        servers.push(server);
    }
    // Away for what the proxy makes of one request, then back: once for each of the two clients.
    let away = || Behaviour::Refuse(503, "Overloaded.".into());
    let back = || Behaviour::Answer("A growth of pigment cells, often round, with an even colour.".into());
    let server = LlmServer::start([away(), away(), back(), away(), away(), back()]).await;
    urls.insert("comes-back".to_owned(), server.base_url().into());
    servers.push(server);
    println!("{}", Value::Object(urls));
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await.unwrap().unwrap();
}

/// As OpenAI's API reference streams a call of a function: name first, arguments in pieces.
fn tool_call() -> Vec<String> {
    let part = |delta: &str, finish: &str| {
        format!(
            "data: {{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":{finish}}}]}}\n\n"
        )
    };
    let call = |call: &str| part(&format!(r#"{{"tool_calls":[{{"index":0,{call}}}]}}"#), "null");
    vec![
        call(r#""id":"call_1","type":"function","function":{"name":"measure","arguments":""}"#),
        call(r#""function":{"arguments":"{\"unit\":"}"#),
        call(r#""function":{"arguments":" \"mm\"}"}"#),
        part("{}", "\"tool_calls\""),
        "data: [DONE]\n\n".to_owned(),
    ]
}
