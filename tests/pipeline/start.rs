//! How the host starts, what it refuses, and what it writes to its log.

use std::process::Output;
use std::time::Duration;

use tokio::process::Command;

use crate::support::llm_server::{HONEST, LlmServer};
use crate::support::process::{Process, binary};
use crate::support::{client, ended, mole, ort_library, root, settings, submit};

async fn start(extra: &[(&str, &str)]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let (library, model) = (ort_library(), root().join("model"));
    let mut variables = settings(folder.path().to_str().unwrap(), library.to_str().unwrap(), model.to_str().unwrap());
    variables.extend_from_slice(extra);
    let command = Command::new(binary("local")).env_clear().envs(variables).kill_on_drop(true).output();
    tokio::time::timeout(Duration::from_secs(20), command).await.expect("it started").unwrap()
}

#[tokio::test]
async fn bad_configuration_refuses_to_start_and_names_the_variable() {
    let cases: &[(&str, &[(&str, &str)])] = &[
        ("LISTEN_ADDR", &[("LISTEN_ADDR", "everywhere")]),
        ("LISTEN_ADDR", &[("LISTEN_ADDR", "0.0.0.0:0")]),
        ("ADMIT_GUESTS", &[("ADMIT_GUESTS", "perhaps")]),
        ("ADMIT_GUESTS", &[("ADMIT_GUESTS", "true")]),
        ("REQUESTS_PER_MINUTE", &[("REQUESTS_PER_MINUTE", "0")]),
        ("GUEST_REQUESTS_PER_MINUTE", &[("GUEST_REQUESTS_PER_MINUTE", "few")]),
        ("JWT_ISSUER", &[("JWT_AUDIENCE", "app")]),
        ("JWT_AUDIENCE", &[("JWT_ISSUER", "https://issuer.example")]),
        ("JWT_ISSUER", &[("JWT_ISSUER", "http://issuer.example"), ("JWT_AUDIENCE", "app")]),
        ("JWT_ISSUER", &[("JWT_ISSUER", "https://issuer.example?a=b"), ("JWT_AUDIENCE", "app")]),
        ("DATA_DIR", &[("DATA_DIR", "/dev/null/x")]),
        ("MODEL_DIR", &[("MODEL_DIR", "/nowhere")]),
        ("MODEL_DIGEST", &[("MODEL_DIGEST", "latest")]),
        ("MODEL_DIGEST", &[("MODEL_DIGEST", "0000000000000000000000000000000000000000000000000000000000000000")]),
        ("ORT_DYLIB_PATH", &[("ORT_DYLIB_PATH", "/nowhere/libonnxruntime.so")]),
        ("INFERENCE_WORKERS", &[("INFERENCE_WORKERS", "none")]),
        ("REDIS_URL", &[("REDIS_URL", "not a url")]),
        ("LLM_BASE_URL", &[("LLM_BASE_URL", "ftp://x"), ("LLM_MODEL", "m")]),
        ("LLM_MODEL", &[("LLM_MODEL", "m")]),
        ("LLM_API_KEY", &[("LLM_API_KEY", "sk-x")]),
        (
            "LLM_API_KEY",
            &[("LLM_BASE_URL", "http://127.0.0.1:1/v1"), ("LLM_MODEL", "m"), ("LLM_API_KEY", "two\nlines")],
        ),
        (
            "LLM_TEMPERATURE",
            &[("LLM_BASE_URL", "http://127.0.0.1:1/v1"), ("LLM_MODEL", "m"), ("LLM_TEMPERATURE", "NaN")],
        ),
        ("LLM_MODEL", &[("LLM_BASE_URL", "http://127.0.0.1:1/v1")]),
        (
            "LLM_TEMPERATURE",
            &[("LLM_BASE_URL", "http://127.0.0.1:1/v1"), ("LLM_MODEL", "m"), ("LLM_TEMPERATURE", "hot")],
        ),
        ("MAX_ATTEMPTS", &[("MAX_ATTEMPTS", "0")]),
        ("PHOTO_TTL_DAYS", &[("PHOTO_TTL_DAYS", "31")]),
        ("LOG_LEVEL", &[("LOG_LEVEL", "=loud=")]),
        ("CRASH_AT", &[("CRASH_AT", "nowhere")]),
    ];
    for (variable, extra) in cases {
        let output = start(extra).await;
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{variable}: {complaint}");
        assert!(complaint.lines().count() == 1 && complaint.contains(variable), "{variable}: {complaint}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_on_the_machine_can_read_the_data() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let host = crate::support::open(folder.path(), shared::clock::Clock::System, &[]).await;
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(folder.path()), 0o700);
    for file in ["jobs.sqlite", "jobs.sqlite-wal", "queue.sqlite", "callers.sqlite", "secret.key", "lock"] {
        assert_eq!(mode(&folder.path().join(file)), 0o600, "{file}");
    }
    drop(host);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_holds_neither_photo_prompt_completion_nor_key() {
    const KEY: &str = "sk-test-9876543210";
    let folder = tempfile::tempdir().unwrap();
    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let settings =
        [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("LLM_API_KEY", KEY), ("LOG_LEVEL", "trace")];
    let host = Process::start(folder.path(), &settings).await.unwrap();
    let id = submit(&client(), &host.url, &mole(), Some("my-idempotency-key")).await.unwrap();
    let result = ended(&client(), &host.url, &id).await;
    assert_eq!(result["description"]["source"], "llm");
    let refused = client()
        .post(format!("{}/submit", host.url))
        .json(&serde_json::json!({"image": "SECRET!"}))
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status().as_u16(), 400);
    let log = host.whole_log().await;
    assert!(log.contains(&id), "the log tells of the job");
    let prompt = &llm.requests()[0].1["messages"];
    let secrets = [
        KEY,
        HONEST,
        "SECRET",
        "my-idempotency-key",
        "IHDR",
        "You help to explain",
        prompt[1]["content"].as_str().unwrap(),
    ];
    for secret in secrets {
        assert!(!log.contains(secret), "{secret}");
    }
}
