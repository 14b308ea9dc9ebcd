//! What `scripts/emulator` has made.

use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use aws_config::SdkConfig;
use aws_sdk_dynamodb::types::GlobalSecondaryIndex;
use sha2::{Digest, Sha256};
use shared::config::Env;
use uuid::Uuid;

use crate::llm_server::LlmServer;
use crate::receiver::Receiver;

/// Sweep comes every minute, and what it sends needs its time.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// A variable that `scripts/emulator` sets.
pub fn of_stage(name: &str) -> String {
    let value = Env::of_process().text(name).unwrap().map(str::to_owned);
    value.unwrap_or_else(|| panic!("{name} is not set: run this through scripts/emulator"))
}

pub async fn sdk() -> SdkConfig {
    of_stage("AWS_ENDPOINT_URL");
    shared::aws::sdk_config().await
}

/// An empty table with the keys and indexes of the one that Terraform made and a variable names.
pub async fn fresh_table(sdk: &SdkConfig, of: &str) -> String {
    let client = aws_sdk_dynamodb::Client::new(sdk);
    let made = client.describe_table().table_name(of_stage(of)).send().await.unwrap().table.unwrap();
    let name = format!("copy-{}", Uuid::new_v4());
    let indexes = made.global_secondary_indexes().iter().map(|index| {
        GlobalSecondaryIndex::builder()
            .set_index_name(index.index_name.clone())
            .set_key_schema(index.key_schema.clone())
            .set_projection(index.projection.clone())
            .build()
            .unwrap()
    });
    let create = client
        .create_table()
        .table_name(&name)
        .set_key_schema(made.key_schema.clone())
        .set_attribute_definitions(made.attribute_definitions.clone())
        .set_global_secondary_indexes(Some(indexes.collect()))
        .billing_mode(aws_sdk_dynamodb::types::BillingMode::PayPerRequest);
    create.send().await.unwrap();
    name
}

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// A drawn photo of `model/samples`.
pub fn sample(name: &str) -> Vec<u8> {
    std::fs::read(root().join("model/samples").join(name)).unwrap()
}

/// SHA-256 in lower-case hex.
pub fn hex_sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Looks again and again until `holds`.
pub async fn within(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !holds().await {
        assert!(started.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Of webhooks, as [`llm`].
pub fn receiver() -> &'static Receiver {
    static RECEIVER: OnceLock<Receiver> = OnceLock::new();
    RECEIVER.get_or_init(|| on_a_thread(async || Receiver::start_at(&of_stage("WEBHOOK_ADDRESS"), 200).await))
}

/// The stand-in of the stage's LLM. One for all tests, on a thread that outlives each of them.
pub fn llm() -> &'static LlmServer {
    static LLM: OnceLock<LlmServer> = OnceLock::new();
    LLM.get_or_init(|| on_a_thread(async || LlmServer::start_at(&of_stage("LLM_ADDRESS"), []).await))
}

/// Starts a server on a thread of its own, for as long as the process lives.
fn on_a_thread<T: Send + 'static>(start: impl AsyncFnOnce() -> T + Send + 'static) -> T {
    let (sender, server) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            sender.send(start().await).unwrap();
            std::future::pending::<()>().await;
        });
    });
    server.recv().unwrap()
}
