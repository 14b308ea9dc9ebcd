//! One packaged function and, in Lambda's place, a test that hands it events: as much of the Runtime
//! API as it takes.
//!
//! Wire format: Lambda developer guide, "Using the Lambda runtime API for custom runtimes"; of what is streamed, API
//! Gateway's, "Set up a Lambda proxy integration with payload response streaming in API Gateway".

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::Value;
use shared::config::Env;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::{Mutex, mpsc};

use crate::support::{of_stage, root, within};

/// Longer than any invocation here may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Behind the status and the headers of an answer that a function streams.
const PRELUDE_END: [u8; 8] = [0; 8];

struct Api {
    events: Mutex<mpsc::Receiver<Value>>,
    answers: mpsc::Sender<Result<Value, Value>>,
}

/// A function's package, unpacked and started.
pub struct Process {
    pub folder: TempDir,
    child: Child,
}

impl Process {
    /// Starts it in the stage that `scripts/emulator` has made, with some of its settings others. It asks
    /// `runtime_api` for events.
    pub fn start(name: &str, runtime_api: &str, settings: &[(&str, &str)]) -> Self {
        let packages = Env::of_process().text("PACKAGES_DIR").unwrap().map(PathBuf::from);
        let package = packages.unwrap_or_else(|| root().join("target/lambda")).join(format!("{name}.zip"));
        let folder = tempfile::tempdir().unwrap();
        let unpack = std::process::Command::new("python3")
            .args(["-m", "zipfile", "-e"])
            .args([package.as_path(), folder.path()])
            .status();
        assert!(unpack.unwrap().success(), "{}", package.display());
        let bootstrap = folder.path().join("bootstrap");
        std::fs::set_permissions(&bootstrap, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();

        let mut variables: HashMap<String, String> = [
            "AWS_ENDPOINT_URL",
            "AWS_REGION",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "TABLE_NAME",
            "CALLERS_TABLE_NAME",
            "CONNECTIONS_TABLE_NAME",
            "QUEUE_URL",
            "DEAD_LETTER_QUEUE_URL",
            "PROMPT_QUEUE_URL",
            "WEBHOOK_QUEUE_URL",
            "WEBHOOK_DEAD_LETTER_QUEUE_URL",
            "BUCKET",
            "SECRET_ARN",
        ]
        .map(|name| (name.to_owned(), of_stage(name)))
        .into();
        let manifest = std::fs::read(root().join("model/manifest.json")).unwrap();
        variables.insert("MODEL_DIGEST".to_owned(), crate::support::hex_sha256(&manifest));
        let fixed = [
            ("AWS_LAMBDA_RUNTIME_API", runtime_api),
            ("AWS_LAMBDA_FUNCTION_NAME", "function"),
            ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "1024"),
            ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST"),
            ("AWS_LAMBDA_LOG_STREAM_NAME", "stream"),
            ("AWS_LAMBDA_LOG_GROUP_NAME", "group"),
            ("S3_PATH_STYLE", "true"),
            // Nobody is connected.
            ("SOCKET_API_URL", "http://127.0.0.1:9/live"),
            ("SOCKET_URL", "ws://127.0.0.1:9/live"),
            ("STAGE", "events"),
            ("TMPDIR", folder.path().to_str().unwrap()),
        ];
        variables.extend(fixed.iter().chain(settings).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let output = |name| Stdio::from(std::fs::File::create(folder.path().join(name)).unwrap());
        let child = Command::new(&bootstrap)
            .env_clear()
            .envs(variables)
            .stdout(output("stdout"))
            .stderr(output("stderr"))
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { folder, child }
    }

    /// What it has printed to `stdout` or `stderr` so far.
    pub fn printed(&self, stream: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(stream)).unwrap()
    }
}

/// A process that the test itself hands events to.
pub struct Function {
    events: mpsc::Sender<Value>,
    answers: mpsc::Receiver<Result<Value, Value>>,
    pub process: Process,
}

impl Function {
    /// As [`Process::start`].
    pub async fn start(name: &str, settings: &[(&str, &str)]) -> Self {
        let ((events, queued), (answers, answered)) = (mpsc::channel(1), mpsc::channel(1));
        let api = Arc::new(Api { events: Mutex::new(queued), answers });
        let router = Router::new()
            .route("/2018-06-01/runtime/invocation/next", get(next))
            .route("/2018-06-01/runtime/invocation/{id}/{how}", post(answer))
            .with_state(api);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { events, answers: answered, process: Process::start(name, &address, settings) }
    }

    /// What the function answers to an event; `Err` where it reports a failure.
    pub async fn invoke(&mut self, event: &Value) -> Result<Value, Value> {
        self.events.send(event.clone()).await.unwrap();
        match tokio::time::timeout(PATIENCE, self.answers.recv()).await {
            Ok(answer) => answer.unwrap(),
            Err(_) => panic!("no answer: {}{}", self.printed("stdout"), self.printed("stderr")),
        }
    }

    /// Hands it an event, and kills it (SIGKILL) in the middle of that, once `holds`.
    pub async fn killed_over(&mut self, event: &Value, what: &str, holds: impl AsyncFnMut() -> bool) {
        self.events.send(event.clone()).await.unwrap();
        within(what, holds).await;
        self.process.child.kill().await.unwrap();
        assert!(self.answers.try_recv().is_err(), "{what}, and it has answered");
    }

    /// What it has printed once it has ended, which it did badly.
    pub async fn ended(&mut self) -> String {
        let status = tokio::time::timeout(PATIENCE, self.process.child.wait()).await.unwrap().unwrap();
        assert!(!status.success());
        self.printed("stdout") + &self.printed("stderr")
    }

    /// As [`Process::printed`].
    pub fn printed(&self, stream: &str) -> String {
        self.process.printed(stream)
    }
}

async fn next(State(api): State<Arc<Api>>) -> impl IntoResponse {
    let Some(event) = api.events.lock().await.recv().await else { std::future::pending().await };
    let deadline = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + PATIENCE;
    let headers = [
        ("lambda-runtime-aws-request-id", uuid::Uuid::new_v4().to_string()),
        ("lambda-runtime-deadline-ms", deadline.as_millis().to_string()),
        ("lambda-runtime-invoked-function-arn", "arn:aws:lambda:us-east-1:000000000000:function:function".to_owned()),
        ("lambda-runtime-trace-id", "Root=1-5e9f0c65-1de4d666d4dd26aced652b6c".to_owned()),
    ];
    (headers, Json(event))
}

async fn answer(State(api): State<Arc<Api>>, Path((_, how)): Path<(String, String)>, body: Bytes) -> StatusCode {
    let body = read(&body);
    let answer = if how == "response" { Ok(body) } else { Err(body) };
    api.answers.send(answer).await.unwrap();
    StatusCode::ACCEPTED
}

/// JSON, though its type is not always said. What is streamed becomes the answer that a function would give whole.
fn read(body: &[u8]) -> Value {
    let Some(end) = body.windows(PRELUDE_END.len()).position(|window| window == PRELUDE_END) else {
        return serde_json::from_slice(body).unwrap();
    };
    let mut answer: Value = serde_json::from_slice(&body[..end]).unwrap();
    answer["body"] = std::str::from_utf8(&body[end + PRELUDE_END.len()..]).unwrap().into();
    answer
}
