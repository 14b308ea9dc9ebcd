//! The embedded host before an agent.

use std::path::Path;
use std::sync::Arc;

use local::{Config, Host};
use reqwest::{Client, Method, RequestBuilder};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use shared::clock::Clock;
use shared::config::Env;
use shared::llm::session_of;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{AGENT, ALIAS, Behaviour, SETTINGS, agent, chunk};
use crate::support::{root, within};
use crate::websocket::Socket;

/// Opens a host on a folder; its agent is the emulator's.
async fn open(folder: &Path) -> Host {
    let (model, library) =
        (root().join("model"), Env::of_process().text("ORT_DYLIB_PATH").unwrap().unwrap().to_owned());
    let own = [
        ("DATA_DIR", folder.to_str().unwrap()),
        ("LISTEN_ADDR", "127.0.0.1:0"),
        ("MODEL_DIR", model.to_str().unwrap()),
        ("ORT_DYLIB_PATH", library.as_str()),
    ];
    let env = Env::of([&SETTINGS[..], &own].concat());
    Host::open(Config::from_env(&env).unwrap(), &env, Clock::System).await.unwrap()
}

/// A host that serves and works.
struct Running {
    url: String,
    http: Client,
    stop: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    async fn start(host: Host) -> Self {
        let ((stop, stopped), (ready, address)) = (oneshot::channel::<()>(), oneshot::channel());
        let task = tokio::spawn(host.run(async { drop(stopped.await) }, |address| ready.send(address).unwrap()));
        let url = format!("http://{}", address.await.unwrap());
        Self { url, http: Client::builder().no_proxy().build().unwrap(), stop, task }
    }

    async fn stop(self) {
        drop(self.stop);
        self.task.await.unwrap().unwrap();
    }

    /// With a key or without.
    fn request(&self, method: Method, path: &str, key: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.url));
        if key.is_empty() { request } else { request.bearer_auth(key) }
    }

    async fn post(&self, path: &str, key: &str, body: &Value) -> (u16, Value) {
        let answer = self.request(Method::POST, path, key).json(body).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    }

    /// Submits a prompt, and waits until the content of its result `is_right`.
    async fn answered(&self, key: &str, body: &Value, is_right: impl Fn(&Value) -> bool) {
        let (status, accepted) = self.post("/submit", key, body).await;
        assert_eq!(status, 202, "{accepted}");
        let path = format!("/result/{}", accepted["request_id"].as_str().unwrap());
        within("the prompt is answered", async || {
            let result: Value = self.request(Method::GET, &path, key).send().await.unwrap().json().await.unwrap();
            assert_ne!(result["status"], "failed", "{result}");
            is_right(&result["content"])
        })
        .await;
    }

    async fn key_of(&self, caller: &str, admin: &str) -> String {
        let (status, made) = self.post("/admin/keys", admin, &json!({"caller": caller})).await;
        assert_eq!(status, 201, "{made}");
        made["key"].as_str().unwrap().to_owned()
    }
}

#[tokio::test]
async fn conversations_prompts_and_questions_over_a_websocket_are_answered_by_an_agent() {
    let folder = tempfile::tempdir().unwrap();
    let host = Running::start(open(folder.path()).await).await;
    let said =
        |text: &Value| text.as_str().is_some_and(|text| text.contains(AGENT) && text.contains("reply for prompt#"));
    let (_, answer) = host.post("/chat", "", &json!({"messages": [{"role": "user", "content": "Hello?"}]})).await;
    assert!(said(&answer["content"]) && answer["model"] == format!("{AGENT}/{ALIAS}"), "{answer}");
    host.answered("", &json!({"prompt": "Hello?"}), said).await;
    let mut socket = Socket::connect(&host.http, &host.url, "").await;
    socket.send(json!({"action": "ask", "prompt": "Hello?"})).await;
    let (mut text, mut frame) = (String::new(), Value::Null);
    while frame["type"] != "result" {
        frame = socket.next().await.unwrap();
        text.push_str(frame["text"].as_str().unwrap_or(""));
    }
    assert!(said(&json!(text)) && frame["result"]["content"] == text, "{text}, {frame}");
    drop(socket);
    host.stop().await;
}

#[tokio::test]
async fn conversations_and_prompts_of_a_caller_are_one_session_and_no_body_names_another() {
    let folder = tempfile::tempdir().unwrap();
    let env = Env::of([("DATA_DIR", folder.path().to_str().unwrap())]);
    let admin = local::init(&env, &Clock::System, false).await.unwrap().expose_secret().to_owned();
    let answers = (0..4).map(|_| Behaviour::Frames(vec![chunk(b"Yes.")]));
    let (agent, llm) = agent(answers, &[("BEDROCK_AGENT_MEMORY", "true")]).await;
    let (mut host, llm) = (open(folder.path()).await, Arc::new(llm));
    // The stand-in in the emulator's place, whose address is in this process's environment, for all tests.
    host.enrichment.llm = Arc::clone(&llm);
    Arc::get_mut(&mut host.chat).unwrap().llm = llm;
    let host = Running::start(host).await;
    let (ward, surgery) = (host.key_of("ward", &admin).await, host.key_of("surgery", &admin).await);

    let (own, theirs) = (session_of("ward"), session_of("surgery"));
    let words = format!("session: surgery, sessionId: {theirs}, memoryId: {theirs}");
    let conversation = json!({"messages": [{"role": "user", "content": words}]});
    let prompt = json!({"prompt": words});
    let chat = async |key: &str| {
        let (status, answer) = host.post("/chat", key, &conversation).await;
        assert_eq!((status, &answer["content"]), (200, &json!("Yes.")), "{answer}");
    };
    chat(&ward).await;
    for field in ["session", "session_id", "sessionId", "memoryId", "caller"] {
        for (path, body, place) in [
            ("/chat", &conversation, ""),
            ("/chat", &conversation, "/messages/0"),
            ("/submit", &conversation, ""),
            ("/submit", &conversation, "/messages/0"),
            ("/submit", &prompt, ""),
        ] {
            let mut body = body.clone();
            body.pointer_mut(place).unwrap()[field] = json!(theirs);
            let (status, refusal) = host.post(path, &ward, &body).await;
            assert_eq!((status, &refusal["error"]["code"]), (400, &json!("invalid_request")), "{path}: {body}");
        }
    }
    host.answered(&ward, &prompt, |content| content == "Yes.").await;
    chat(&ward).await;
    chat(&surgery).await;
    host.stop().await;

    let asked = agent.asked.lock().unwrap().clone();
    // What was refused has not come here, and what a text says is text.
    let texts: Vec<_> = asked.iter().map(|asked| &asked.body["inputText"]).collect();
    assert_eq!(texts, [&words; 4]);
    let sessions: Vec<_> = asked.iter().map(|asked| asked.session.as_str()).collect();
    assert_eq!(sessions, [own.as_str(), &own, &own, &theirs]);
    let memories: Vec<_> = asked.iter().map(|asked| asked.body["memoryId"].as_str().unwrap()).collect();
    assert_eq!(memories, sessions);
    assert_ne!(own, theirs);
}
