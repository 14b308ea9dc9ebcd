//! Promise 6, of the LLM's callers: nothing of what the proxy and `/chat` carry is in a log or a file, however it
//! ends.

use std::process::Stdio;

use serde_json::{Value, json};
use tokio::process::Command;

use crate::leaks::{libraries_below_info, secret};
use crate::support::keyed::init;
use crate::support::leaks::Leaks;
use crate::support::llm_server::{Behaviour, Ending, LlmServer, chunks};
use crate::support::process::{Process, binary};
use crate::support::{client, eventually};

/// What stands in bodies that go to a model, come from it or are refused: one marker each.
struct Words {
    prompt: String,
    answer: String,
    error: String,
}

/// Neither is a completion.
const PAGE: &str = "<html><body>quolfrimbentor</body></html>";
const MISTYPED: &str = r#"{"choices": "quolfrimbentor", "usage": "quolfrimbentor"}"#;

const COMPLETIONS: &str = "/v1/chat/completions";

impl Words {
    /// Where a request goes, whether it is to be streamed, what its server does, and what its client is answered:
    /// the status and a word.
    fn exchanges(&self) -> Vec<(&'static str, bool, Behaviour, u16, &str)> {
        let (answer, error) = (self.answer.as_str(), self.error.as_str());
        let good = || Behaviour::Answer(answer.to_owned());
        let refusal = |status| Behaviour::Refuse(status, error.to_owned());
        let half = || {
            let begun = format!(r#"{{"choices": [{{"message": {{"content": "{answer}"#);
            Behaviour::Stream(vec![begun], Ending::CutOff)
        };
        let begun = || chunks(answer)[..2].to_vec();
        let event = format!("data: {}\n\n", json!({"error": {"message": error, "code": "odd"}}));
        vec![
            (COMPLETIONS, false, good(), 200, answer),
            (COMPLETIONS, true, good(), 200, answer),
            (COMPLETIONS, false, refusal(400), 400, error),
            (COMPLETIONS, true, refusal(400), 400, error),
            (COMPLETIONS, false, refusal(500), 500, error),
            (COMPLETIONS, false, refusal(401), 502, "llm_refused"),
            (COMPLETIONS, true, Behaviour::Stream(begun(), Ending::CutOff), 200, answer),
            (COMPLETIONS, true, Behaviour::Stream([begun(), vec![event]].concat(), Ending::Close), 200, error),
            (COMPLETIONS, false, half(), 502, "llm_unavailable"),
            (COMPLETIONS, false, Behaviour::Body(PAGE), 502, "llm_invalid_response"),
            (COMPLETIONS, true, Behaviour::Body(PAGE), 502, "llm_"),
            (COMPLETIONS, false, Behaviour::Body(MISTYPED), 502, "llm_invalid_response"),
            ("/chat", false, good(), 200, answer),
            ("/chat", false, refusal(400), 502, "llm_refused"),
            ("/chat", false, refusal(500), 502, "llm_unavailable"),
            ("/chat", false, half(), 502, "llm_unavailable"),
            ("/chat", false, Behaviour::Body(PAGE), 502, "llm_invalid_response"),
            ("/chat", false, Behaviour::Body(MISTYPED), 502, "llm_invalid_response"),
        ]
    }

    /// What is refused before any server is asked.
    fn mistakes(&self) -> Vec<(&'static str, String)> {
        let prompt = &self.prompt;
        let of = |body: Value| [(COMPLETIONS, body.to_string()), ("/chat", body.to_string())];
        let messages = json!([{"role": prompt, "content": prompt}]);
        let bodies = [
            json!({"model": "fast", "messages": prompt, "stream": prompt}),
            json!({"model": prompt, "messages": messages}),
            json!([prompt]),
        ];
        let broken = format!(r#"{{"model": "fast", "messages": "{prompt}"#);
        let broken = [(COMPLETIONS, broken.clone()), ("/chat", broken)];
        bodies.into_iter().flat_map(of).chain(broken).collect()
    }
}

/// A request with the prompt, as its path wants it.
fn conversation(path: &str, prompt: &str, streamed: bool) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": prompt}], "temperature": 0});
    if path == COMPLETIONS {
        (body["model"], body["stream"]) = (json!("fast"), json!(streamed));
    }
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn no_word_to_or_from_a_model_is_in_a_file_or_a_log_line() {
    let (data, temporary) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let log_file = tempfile::NamedTempFile::new().unwrap();
    let admin = init(data.path(), false).await.unwrap();
    let llm = LlmServer::start([]).await;
    let (base_url, llm_key) = (llm.base_url(), secret("sk-test"));
    let models =
        json!({"models": {"fast": {"base_url": base_url, "api_key_name": "UPSTREAM_KEY", "timeout_seconds": 10}}});
    let models = models.to_string();
    let settings = [
        ("TMPDIR", temporary.path().to_str().unwrap()),
        ("LOG_LEVEL", "trace"),
        ("LLM_MODELS", models.as_str()),
        ("UPSTREAM_KEY", llm_key.as_str()),
        ("LLM_BASE_URL", base_url.as_str()),
        ("LLM_MODEL", "m"),
        ("LLM_API_KEY", llm_key.as_str()),
        ("REQUESTS_PER_MINUTE", "1000"),
    ];
    let stderr = Stdio::from(log_file.reopen().unwrap());
    let host = Process::start_as(Command::new(binary("local")), stderr, data.path(), &settings).await.unwrap();
    let http = client();
    // A key with an account, which every completion writes.
    let made = http.post(format!("{}/admin/keys", host.url)).bearer_auth(&admin).json(&json!({"caller": "ward"}));
    let made: Value = made.send().await.unwrap().json().await.unwrap();
    let key = made["key"].as_str().unwrap();

    let words = Words { prompt: secret("prompt"), answer: secret("answer"), error: secret("error") };
    let mut leaks = Leaks::default();
    leaks.watch("prompt", words.prompt.as_bytes());
    leaks.watch("answer", words.answer.as_bytes());
    leaks.watch("error of the server", words.error.as_bytes());
    leaks.watch("what is no completion", b"quolfrimbentor");
    leaks.watch("LLM key", llm_key.as_bytes());
    for key in [key, admin.as_str()] {
        leaks.watch("key", key.rsplit('_').next().unwrap().as_bytes());
    }

    let ask = async |path: &str, body: String| {
        let request = http.post(format!("{}{path}", host.url)).bearer_auth(key);
        let response = request.header("content-type", "application/json").body(body).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    let exchanges = words.exchanges();
    for (number, &(path, streamed, ref behaviour, status, word)) in exchanges.iter().enumerate() {
        llm.behave(behaviour.clone());
        // Each is another to the cache.
        let body = conversation(path, &format!("{} {number}", words.prompt), streamed);
        let (told, text) = ask(path, body.to_string()).await;
        assert!(told == status && text.contains(word), "{path}, {behaviour:?}: {told} {text}");
    }
    // All that is to be found nowhere was there.
    assert!(llm.requests().iter().all(|(headers, body)| {
        headers["authorization"] == format!("Bearer {llm_key}") && body.to_string().contains(&words.prompt)
    }));
    let calls = llm.calls();
    let (path, streamed, ..) = exchanges[0];
    let body = conversation(path, &format!("{} 0", words.prompt), streamed);
    let (told, text) = ask(path, body.to_string()).await;
    assert!(told == 200 && text.contains(&words.answer), "from the cache: {told} {text}");
    for (path, body) in words.mistakes() {
        let (told, text) = ask(path, body.clone()).await;
        assert!([400, 404].contains(&told), "{path}, {body}: {told} {text}");
    }
    assert_eq!(llm.calls(), calls, "neither what is in the cache nor a mistake goes to the server");

    let log = || std::fs::read_to_string(log_file.path()).unwrap();
    let relayed = exchanges.iter().filter(|(path, ..)| *path == COMPLETIONS).count();
    for (line, times) in [
        ("completion relayed", relayed),
        ("completion taken from the cache", 1),
        ("llm called", exchanges.len() - relayed),
    ] {
        eventually(line, async || log().matches(line).count() == times).await;
    }
    let (mut found, files) = leaks.found_below(data.path());
    assert!(files > 5, "{files} files");
    found.extend(leaks.found_below(temporary.path()).0);
    assert!(host.terminate().await.success());
    for folder in [data.path(), temporary.path()] {
        found.extend(leaks.found_below(folder).0);
    }
    let log = log().into_bytes();
    found.extend(leaks.found_in("the log", &log));
    assert!(found.is_empty(), "{found:#?}");
    assert_eq!(libraries_below_info(&log), Vec::<String>::new());
}
