//! Hosts to test against, photos to send, and how to wait.

pub mod backlog;
pub mod interrupt;
pub mod issuer;
pub mod keyed;
pub mod leaks;
pub mod llm_server;
pub mod memory;
pub mod metadata;
#[allow(dead_code, reason = "the tests' alone")]
pub mod network;
pub mod process;
pub mod receiver;
pub mod redis_server;
pub mod reference;
pub mod websocket;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use chrono::Utc;
use local::{Config, Host};
use reqwest::{Client, Response};
use serde_json::Value;
use shared::clock::Clock;
use shared::config::Env;
use shared::embedded::Hub;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use self::llm_server::LlmServer;

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The folder beside the repository that holds real photos and a reference model, where there is one.
pub fn shared_folder() -> Option<PathBuf> {
    let folder = root().parent()?.join("shared");
    folder.join("data/ham10000/labels.csv").is_file().then_some(folder)
}

/// Every real photo, in a fixed order; empty where there is no folder of them.
pub fn real_photos() -> Vec<PathBuf> {
    let Some(folder) = shared_folder() else {
        eprintln!("no real photos beside the repository: this part is not tested here");
        return Vec::new();
    };
    let entries = std::fs::read_dir(folder.join("data/ham10000/images")).unwrap();
    let mut photos: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    photos.sort();
    photos
}

/// Where `scripts/onnxruntime` puts the library, unless `ORT_DYLIB_PATH` names another.
pub fn ort_library() -> PathBuf {
    let named = Env::of_process().text("ORT_DYLIB_PATH").unwrap().map(PathBuf::from);
    let library = named.unwrap_or_else(|| root().join(".cache/onnxruntime-1.28.0/libonnxruntime.so.1.28.0"));
    assert!(library.is_file(), "{} is missing: run scripts/test, or scripts/onnxruntime first", library.display());
    library
}

/// A sample of `model/samples`.
pub fn sample(name: &str) -> Vec<u8> {
    std::fs::read(root().join("model/samples").join(name)).unwrap()
}

/// A drawn photo that passes the gate and gets a label.
pub fn mole() -> Vec<u8> {
    sample("mole-drawn.png")
}

/// The drawn mole in small, as the JPEG of its own number: no two are the same photo to the cache.
pub fn numbered_mole(number: usize) -> Vec<u8> {
    static SMALL: OnceLock<image::RgbImage> = OnceLock::new();
    let small = SMALL.get_or_init(|| {
        let drawn = image::load_from_memory(&mole()).unwrap().into_rgb8();
        image::imageops::resize(&drawn, 300, 225, image::imageops::FilterType::Triangle)
    });
    let mut picture = small.clone();
    // A corner in one of 4,096 colours; JPEG's blocks are 16 pixels wide where colour is halved.
    let colour = [number % 16, number / 16 % 16, number / 256 % 16].map(|part| 60 + 8 * u8::try_from(part).unwrap());
    (0..256).for_each(|pixel| picture.put_pixel(pixel % 16, pixel / 16, image::Rgb(colour)));
    let mut bytes = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 90).encode_image(&picture).unwrap();
    bytes
}

/// Prints a line that is seen when the test passes as well: the harness holds back what `println!`
/// prints.
pub fn report(line: &str) {
    std::io::stdout().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// The environment of a test host: this machine's library and model, nothing of the tester's.
pub fn settings<'a>(data_dir: &'a str, library: &'a str, model: &'a str) -> Vec<(&'a str, &'a str)> {
    vec![
        ("DATA_DIR", data_dir),
        ("LISTEN_ADDR", "127.0.0.1:0"),
        ("ORT_DYLIB_PATH", library),
        ("MODEL_DIR", model),
        ("SWEEP_INTERVAL_SECONDS", "1"),
    ]
}

/// Opens a host that is not running, on a folder.
pub async fn open(data_dir: &Path, clock: Clock, extra: &[(&str, &str)]) -> Host {
    let (library, model) = (ort_library(), root().join("model"));
    let mut variables = settings(data_dir.to_str().unwrap(), library.to_str().unwrap(), model.to_str().unwrap());
    variables.extend_from_slice(extra);
    let env = Env::of(variables);
    Host::open(Config::from_env(&env).unwrap(), &env, clock).await.unwrap()
}

/// A host without workers, by a clock that stands; its folder must live as long.
pub async fn standing(extra: &[(&str, &str)]) -> (TempDir, Clock, Host) {
    let (folder, clock) = (tempfile::tempdir().unwrap(), Clock::manual(Utc::now()));
    let host = open(folder.path(), clock.clone(), extra).await;
    (folder, clock, host)
}

/// The key of a host's LLM.
pub const LLM_KEY: &str = "sk-test-0123456789";

/// A host in this process that serves and works.
pub struct Running {
    pub url: String,
    pub http: Client,
    pub folder: TempDir,
    /// Who is connected.
    pub hub: Hub,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    pub async fn start(extra: &[(&str, &str)]) -> Self {
        Self::on(tempfile::tempdir().unwrap(), Clock::System, extra).await
    }

    /// Starts with this LLM, which knows the host by [`LLM_KEY`].
    pub async fn asking(llm: &LlmServer, extra: &[(&str, &str)]) -> Self {
        let base_url = llm.base_url();
        let mut settings = vec![
            ("LLM_BASE_URL", base_url.as_str()),
            ("LLM_MODEL", "tiny"),
            ("LLM_API_KEY", LLM_KEY),
            ("BACKOFF_SECONDS", "1"),
        ];
        settings.extend_from_slice(extra);
        Self::start(&settings).await
    }

    /// Starts on a folder that may hold something, by a clock that may stand.
    pub async fn on(folder: TempDir, clock: Clock, extra: &[(&str, &str)]) -> Self {
        let host = open(folder.path(), clock, extra).await;
        let hub = host.hub.clone();
        let (stop, stopped) = oneshot::channel();
        let (ready, address) = oneshot::channel();
        let stop_signal = async {
            let _ = stopped.await;
        };
        let task = tokio::spawn(host.run(stop_signal, |address| ready.send(address).unwrap()));
        let url = format!("http://{}", address.await.unwrap());
        Self { url, http: client(), folder, hub, stop: Some(stop), task }
    }

    /// Stops as SIGTERM does and returns the data folder.
    pub async fn stop(mut self) -> TempDir {
        drop(self.stop.take());
        self.task.await.unwrap().unwrap();
        self.folder
    }

    pub async fn submit(&self, photo: &[u8]) -> String {
        submit(&self.http, &self.url, photo, None).await.unwrap()
    }

    pub async fn get(&self, path: &str) -> Response {
        self.http.get(format!("{}{path}", self.url)).send().await.unwrap()
    }

    pub async fn result(&self, id: &str) -> Value {
        self.get(&format!("/result/{id}")).await.json().await.unwrap()
    }

    /// The result once the job has ended.
    pub async fn ended(&self, id: &str) -> Value {
        ended(&self.http, &self.url, id).await
    }

    /// Submits, waits for the end.
    pub async fn run(&self, photo: &[u8]) -> Value {
        let id = self.submit(photo).await;
        self.ended(&id).await
    }
}

pub fn client() -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder().timeout(Duration::from_secs(60)).build().unwrap()
}

/// Submits a photo and returns its id; an error where the host is gone.
pub async fn submit(http: &Client, url: &str, photo: &[u8], key: Option<&str>) -> reqwest::Result<String> {
    let mut request = http.post(format!("{url}/submit")).header("content-type", "image/png").body(photo.to_vec());
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    let response = request.send().await?;
    let status = response.status();
    let body: Value = response.json().await?;
    assert_eq!(status.as_u16(), 202, "{body}");
    Ok(body["request_id"].as_str().unwrap().to_owned())
}

/// Long-polls until the job has ended; gives up after a minute.
pub async fn ended(http: &Client, url: &str, id: &str) -> Value {
    for _ in 0..30 {
        let response = http.get(format!("{url}/result/{id}?wait=2")).send().await.unwrap();
        let result: Value = response.json().await.unwrap();
        if !["pending", "processing", "awaiting_description"].contains(&result["status"].as_str().unwrap_or("")) {
            return result;
        }
    }
    panic!("job {id} is still open after a minute");
}

/// Looks again and again until `holds`; gives up after 20 s.
pub async fn eventually(what: &str, holds: impl AsyncFnMut() -> bool) {
    within(Duration::from_secs(20), what, holds).await;
}

/// Looks again and again until `holds`; gives up after `limit`.
pub async fn within(limit: Duration, what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let started = std::time::Instant::now();
    while !holds().await {
        assert!(started.elapsed() < limit, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
