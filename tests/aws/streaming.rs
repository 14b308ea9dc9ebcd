//! The packaged chat behind the function URL of `cargo lambda watch`, which hands an answer on piece by piece,
//! as Lambda does and the emulator does not. Tables and secret are the emulator's.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use reqwest::{Response, StatusCode};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::chat::ledger;
use crate::llm_server::{Behaviour, LlmServer};
use crate::metrics::read;
use crate::pipeline::User;
use crate::runtime::Process;
use crate::support::{root, within};

/// Of seven words, which come in eleven pieces.
const ANSWER: &str = "A growth made of many pigment cells.";
const PAUSE: Duration = Duration::from_millis(250);

/// The function, and somebody with a key of their own.
struct Streaming {
    user: User,
    address: SocketAddr,
    llm: LlmServer,
    process: Process,
    _watch: Child,
}

impl Streaming {
    async fn start(caller: &str) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let port = address.port().to_string();
        let options = ["--only-lambda-apis", "--invoke-address", "127.0.0.1", "--invoke-port", &port];
        let watch = Command::new(cargo_lambda())
            .args(["lambda", "watch"])
            .args(options)
            .current_dir(root())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        within("cargo lambda watch listens", async || TcpStream::connect(address).is_ok()).await;
        let llm = LlmServer::start([]).await;
        llm.behave(Behaviour::Slow(PAUSE, ANSWER.into()));
        // The one model of a stage that names no others.
        let base_url = llm.base_url();
        let settings = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")];
        let process = Process::start("chat", &format!("http://{address}/.rt"), &settings);
        Self { user: User::new(caller).await, address, llm, process, _watch: watch }
    }

    async fn ask(&self) -> Response {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": "?"}], "stream": true});
        let request = self.user.http.post(format!("http://{}/v1/chat/completions", self.address));
        let answer = request.bearer_auth(&self.user.key).json(&body).send().await.unwrap();
        let printed = || self.process.printed("stdout") + &self.process.printed("stderr");
        assert_eq!(answer.status(), StatusCode::OK, "{}", printed());
        assert_eq!(answer.headers()["content-type"], "text/event-stream; charset=utf-8");
        answer
    }

    /// The ledger once nothing is under way.
    async fn ledger(&self) -> Value {
        ledger(&self.user, self.user.key.split('_').nth(1).unwrap()).await
    }
}

/// What `scripts/package` has installed.
fn cargo_lambda() -> PathBuf {
    let installed = std::fs::read_dir(root().join(".cache")).unwrap().map(|entry| entry.unwrap().path());
    let mut found = installed.map(|folder| folder.join("bin/cargo-lambda")).filter(|binary| binary.exists());
    found.next().expect("run scripts/package first, which installs cargo-lambda")
}

/// What has come with each piece, and when.
async fn pieces(mut answer: Response, most: usize) -> Vec<(Duration, String)> {
    let (started, mut pieces) = (Instant::now(), Vec::new());
    while pieces.len() < most
        && let Some(piece) = answer.chunk().await.unwrap()
    {
        pieces.push((started.elapsed(), String::from_utf8(piece.to_vec()).unwrap()));
    }
    pieces
}

#[tokio::test]
async fn a_function_hands_an_answer_on_as_it_comes() {
    let scene = Streaming::start("ursula").await;
    let pieces = pieces(scene.ask().await, usize::MAX).await;
    let text: String = pieces.iter().map(|(_, piece)| piece.as_str()).collect();
    assert!(text.ends_with("data: [DONE]\n\n") && text.matches("\"content\"").count() == 8, "{text}");
    // Word by word, but for what a busy machine makes one piece of.
    let words: Vec<_> = pieces.iter().filter(|(_, piece)| piece.contains("\"content\"")).collect();
    assert!(words.len() >= 5, "{pieces:?}");
    let took = words.last().unwrap().0.saturating_sub(words[0].0);
    assert!(took > PAUSE * 5, "all at once: {pieces:?}");
    let month = scene.ledger().await;
    let took = (&month["requests"], &month["prompt_tokens"], &month["completion_tokens"], &month["estimated_requests"]);
    assert_eq!(took, (&json!(1), &json!(19), &json!(10), &json!(0)));
    let key = scene.llm.requests()[0].0["authorization"].clone();
    assert_eq!(key, "Bearer a-key-of-the-emulator");
}

#[tokio::test]
async fn a_function_lets_hear_of_itself_while_the_model_is_silent() {
    let scene = Streaming::start("victor").await;
    scene.llm.behave(Behaviour::Late(Duration::from_secs(12), ANSWER.into()));
    let pieces = pieces(scene.ask().await, usize::MAX).await;
    // On its own, two seconds before the answer, and not together with it.
    assert_eq!(pieces[0].1, ": waiting for the model\n\n");
    assert!(pieces[1].0 - pieces[0].0 > Duration::from_millis(200), "{pieces:?}");
    assert!(pieces.last().unwrap().1.ends_with("data: [DONE]\n\n"), "{pieces:?}");
}

#[tokio::test]
async fn a_function_whose_client_leaves_in_the_middle_reads_the_answer_to_its_end_and_counts_it_exactly() {
    let scene = Streaming::start("walter").await;
    let begun = pieces(scene.ask().await, 2).await;
    assert!(begun.iter().all(|(_, piece)| !piece.contains("[DONE]")), "{begun:?}");
    let month = scene.ledger().await;
    let took = (&month["requests"], &month["prompt_tokens"], &month["completion_tokens"], &month["estimated_requests"]);
    assert_eq!(took, (&json!(1), &json!(19), &json!(10), &json!(0)), "{month}");
    let log = scene.process.printed("stderr");
    assert!(log.contains(r#""llm.client_left":true"#), "{log}");
    // And goes on with the next.
    let whole = pieces(scene.ask().await, usize::MAX).await;
    assert!(whole.last().unwrap().1.ends_with("data: [DONE]\n\n"), "{whole:?}");
}

#[tokio::test]
async fn a_functions_metrics_of_a_stream_are_printed_at_its_end_and_not_with_the_next_request() {
    let scene = Streaming::start("xenia").await;
    let whole = pieces(scene.ask().await, usize::MAX).await;
    assert!(whole.last().unwrap().1.ends_with("data: [DONE]\n\n"), "{whole:?}");
    let printed = || read(&scene.process.printed("stdout"), "events");
    within("its metrics are printed", async || printed().contains_key("LlmPromptTokens")).await;
    let printed = printed();
    assert_eq!(printed["LlmPromptTokens"], [19.0]);
    assert_eq!(printed["LlmCompletionTokens"], [10.0]);
    let (first_byte, duration) = (&printed["LlmFirstByteDuration"], &printed["LlmDuration"]);
    assert_eq!((first_byte.len(), duration.len()), (1, 1), "{printed:?}");
    // All its pieces but the first come in between.
    assert!(duration[0] - first_byte[0] > PAUSE.as_secs_f64() * 1e3 * 5.0, "{printed:?}");
}
