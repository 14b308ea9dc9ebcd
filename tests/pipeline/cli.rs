//! `lesion` as a person or a script calls it.

use std::process::Output;

use serde_json::Value;
use tokio::process::Command;

use crate::support::process::binary;
use crate::support::{Running, root};

async fn lesion(url: &str, arguments: &[&str]) -> Output {
    let samples = root().join("model/samples");
    Command::new(binary("lesion"))
        .env_clear()
        .args(["--api", url])
        .args(arguments)
        .current_dir(samples)
        .output()
        .await
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn photos_are_submitted_waited_for_listed_and_deleted() {
    let host = Running::start(&[]).await;
    let output = lesion(&host.url, &["submit", "--wait", "mole-drawn.png"]).await;
    let printed = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{printed}{}", text(&output.stderr));
    for part in ["mole-drawn.png", "completed", "█", "by template", "no diagnosis", "inference"] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    assert!(text(&output.stderr).contains("[1/1] mole-drawn.png: completed"), "progress comes as lines in a pipe");
    assert!(!printed.contains('\r') && !text(&output.stderr).contains('\r'));

    let output = lesion(&host.url, &["submit", "--no-describe", "--json", "mole-drawn.png"]).await;
    let submitted: Value = serde_json::from_slice(&output.stdout).unwrap();
    let id = submitted["request_id"].as_str().unwrap();
    let output = lesion(&host.url, &["result", id, "--wait", "--json"]).await;
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&result["status"], &result["description"]), (&"completed".into(), &Value::Null));

    let output = lesion(&host.url, &["list", "--limit", "1"]).await;
    assert!(text(&output.stdout).starts_with(id), "{}", text(&output.stdout));
    assert_eq!(lesion(&host.url, &["delete", id]).await.status.code(), Some(0));
    let output = lesion(&host.url, &["result", id]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("not_found"), "{}", text(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_photo_is_uploaded_without_being_asked() {
    let host = Running::start(&[]).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.jpg");
    std::fs::write(&path, crate::uploads::large_photo()).unwrap();
    let output = lesion(&host.url, &["submit", "--wait", path.to_str().unwrap()]).await;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("completed"));
    // Too large for that as well.
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(shared::api::MAX_UPLOAD_BYTES + 1).unwrap();
    let output = lesion(&host.url, &["submit", path.to_str().unwrap()]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("25 MiB"), "{}", text(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_photo_goes_to_the_api_and_not_through_a_proxy() {
    let host = Running::start(&[]).await;
    let output = Command::new(binary("lesion"))
        .env_clear()
        .env("HTTP_PROXY", "http://127.0.0.1:1")
        .args(["--api", &host.url, "list"])
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_tell_what_happened() {
    let host = Running::start(&[]).await;
    let folder = tempfile::tempdir().unwrap();
    let damaged = folder.path().join("damaged.png");
    let whole = std::fs::read(root().join("model/samples/mole-drawn.png")).unwrap();
    let mut spoilt = whole.clone();
    spoilt[whole.len() / 2] ^= 0xFF;
    std::fs::write(&damaged, spoilt).unwrap();
    let code = async |arguments: &[&str]| lesion(&host.url, arguments).await.status.code();
    assert_eq!(code(&["submit", "--wait", "blurred.png"]).await, Some(3));
    assert_eq!(code(&["submit", "--wait", damaged.to_str().unwrap()]).await, Some(4));
    assert_eq!(code(&["submit", "--wait", "mole-drawn.png", "blurred.png"]).await, Some(3));
    assert_eq!(code(&["submit", "--wait", "no-such-file.png"]).await, Some(1));
    assert_eq!(code(&["submit"]).await, Some(2));
    assert_eq!(code(&["result", "42"]).await, Some(2));
    assert_eq!(lesion("http://127.0.0.1:1", &["list"]).await.status.code(), Some(1));
}
