//! `lesion` as a person or a script calls it.

use std::process::{Output, Stdio};
use std::time::Instant;

use axum::Router;
use axum::http::StatusCode;
use serde_json::Value;
use shared::embedded::SqliteJobStore;
use shared::job::Record;
use shared::ports::JobStore;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;

use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::binary;
use crate::support::{Running, root};

fn lesion_command(url: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary("lesion"));
    command.env_clear().args(["--api", url]).args(arguments).current_dir(root().join("model/samples"));
    command
}

async fn lesion(url: &str, arguments: &[&str]) -> Output {
    lesion_command(url, arguments).output().await.unwrap()
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
    let mut unread =
        lesion_command(&host.url, &["list"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(unread.stdout.take());
    let output = unread.wait_with_output().await.unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""), "as behind `| head`");
    // What is to be done is done, whoever reads.
    let another = lesion(&host.url, &["submit", "--json", "mole-drawn.png"]).await;
    let another: Value = serde_json::from_slice(&another.stdout).unwrap();
    let another = another["request_id"].as_str().unwrap();
    let mut unread = lesion_command(&host.url, &["delete", another, id]).stdout(Stdio::piped()).spawn().unwrap();
    drop(unread.stdout.take());
    assert_eq!(unread.wait().await.unwrap().code(), Some(0));
    let output = lesion(&host.url, &["result", id]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("not_found"), "{}", text(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_is_answered_on_standard_output_and_what_goes_wrong_is_said_beside_it() {
    let script = [
        Behaviour::Answer("A growth of pigment cells.\nMostly harmless.".into()),
        Behaviour::Answer("{}".into()),
        Behaviour::Ended("A grow".into(), "length"),
        Behaviour::Status(400, None),
    ];
    let llm = LlmServer::start(script).await;
    let base_url = llm.base_url();
    let host = Running::start(&[("LLM_BASE_URL", &base_url), ("LLM_MODEL", "m")]).await;
    let output = lesion(&host.url, &["ask", "--system", "Be short.", "--max-tokens", "7", "What is a naevus?"]).await;
    assert_eq!(text(&output.stdout), "A growth of pigment cells.\nMostly harmless.\n");
    assert_eq!(output.status.code(), Some(0));
    let sent = llm.requests().remove(0).1;
    assert_eq!((&sent["max_tokens"], &sent["messages"][0]["content"]), (&7.into(), &"Be short.".into()));

    let output = lesion(&host.url, &["ask", "--format", "json", "--no-wait", "JSON, please"]).await;
    let id = text(&output.stdout).trim().to_owned();
    let output = lesion(&host.url, &["result", &id, "--wait"]).await;
    for part in ["completed", "answer       {}", "ended by     stop", "19 in, 10 out"] {
        assert!(text(&output.stdout).contains(part), "{part}: {}", text(&output.stdout));
    }
    assert!(text(&lesion(&host.url, &["list"]).await.stdout).contains("answered"));

    let output = lesion(&host.url, &["ask", "More"]).await;
    assert_eq!((text(&output.stdout), output.status.code()), ("A grow\n", Some(0)));
    assert!(text(&output.stderr).contains("cut off"), "{}", text(&output.stderr));
    let output = lesion(&host.url, &["ask", "--json", "Still more"]).await;
    let failed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&failed["error"]["code"], output.status.code()), (&"llm_refused".into(), Some(4)));
    let output = lesion(&host.url, &["ask", " "]).await;
    assert_eq!((text(&output.stdout), output.status.code()), ("", Some(1)));
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
    let for_ever = u64::MAX.to_string();
    assert_eq!(code(&["submit", "--wait", "--timeout", &for_ever, "mole-drawn.png"]).await, Some(2));
    assert_eq!(lesion("http://127.0.0.1:1", &["list"]).await.status.code(), Some(1));
    let output = lesion("127.0.0.1:1", &["result", &uuid::Uuid::nil().to_string(), "--wait"]).await;
    assert!(output.status.code() == Some(1) && text(&output.stderr).contains("no URL"), "{}", text(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_makes_lists_and_revokes_keys() {
    let keyed = crate::support::keyed::Keyed::start(&[]).await;
    let url = keyed.host.url.clone();
    let as_key = async |key: &str, arguments: &[&str]| {
        let mut command = Command::new(binary("lesion"));
        command.env_clear().env("LESION_API_URL", &url).env("LESION_API_KEY", key);
        command.args(arguments).current_dir(root().join("model/samples")).output().await.unwrap()
    };
    let made =
        as_key(&keyed.admin, &["keys", "create", "--caller", "ward", "--name", "door", "--expires", "90d"]).await;
    let key = text(&made.stdout).trim().to_owned();
    assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
    assert!(key.starts_with("lesion_") && key.lines().count() == 1 && !text(&made.stderr).contains(&key));
    let json =
        as_key(&keyed.admin, &["keys", "create", "--caller", "ward", "--scope", "jobs", "--scope", "admin", "--json"]);
    let json: Value = serde_json::from_slice(&json.await.stdout).unwrap();
    assert_eq!((&json["scopes"], &json["expires_at"]), (&serde_json::json!(["admin", "jobs"]), &Value::Null));

    let submitted = as_key(&key, &["submit", "--wait", "mole-drawn.png"]).await;
    assert_eq!(submitted.status.code(), Some(0), "{}", text(&submitted.stderr));
    let refused = as_key(&key, &["keys", "list"]).await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("scope \"admin\""), "{}", text(&refused.stderr));
    for (nobody, said) in [("", "LESION_API_KEY"), ("lesion_0_0", "LESION_API_KEY"), ("two\nlines", "LESION_API_KEY")] {
        let refused = as_key(nobody, &["list"]).await;
        assert_eq!(refused.status.code(), Some(1));
        assert!(text(&refused.stderr).contains(said), "{}", text(&refused.stderr));
    }
    let listed = as_key(&keyed.admin, &["keys", "list"]).await;
    let listed = text(&listed.stdout);
    assert_eq!(listed.lines().count(), 3, "{listed}");
    assert!(listed.contains("door") && listed.contains("admin+jobs") && !listed.contains(&key), "{listed}");
    // A whole key in the place of its id is not sent.
    assert_eq!(as_key(&keyed.admin, &["keys", "revoke", &key]).await.status.code(), Some(0));
    assert_eq!(as_key(&key, &["list"]).await.status.code(), Some(1));
    assert_eq!(as_key(&keyed.admin, &["keys", "revoke", "../results"]).await.status.code(), Some(2));
    let help = as_key("lesion_top_secret", &["--help"]).await;
    assert!(text(&help.stdout).contains("LESION_API_KEY") && !text(&help.stdout).contains("top_secret"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_sends_what_was_given_up_round_again() {
    let folder = tempfile::tempdir().unwrap();
    let dead = crate::admin::dead_letter(folder.path()).await.to_string();
    crate::admin::dead_webhook(folder.path()).await;
    let failed = crate::admin::failed_job(folder.path()).await.to_string();
    let undescribed = crate::admin::undescribed_job(folder.path()).await.to_string();
    let store = SqliteJobStore::open(&folder.path().join("jobs.sqlite")).unwrap();
    let host = Running::on(folder, shared::clock::Clock::System, &[("REDISPATCH_SECONDS", "3600")]).await;
    let listed = lesion(&host.url, &["dead-letters", "list"]).await;
    assert!(text(&listed.stdout).contains(&format!("infer {dead}")), "{}", text(&listed.stdout));
    let listed = lesion(&host.url, &["dead-letters", "list", "--json"]).await;
    let mut letters = text(&listed.stdout).lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let letter = letters.find(|letter| letter["job_id"] == *dead).unwrap();
    // By its id it goes alone; the other letter is left to a call for all.
    let redriven = lesion(&host.url, &["dead-letters", "redrive", letter["id"].as_str().unwrap()]).await;
    assert_eq!(text(&redriven.stdout), "1 back in the queue\n");
    let redriven = lesion(&host.url, &["dead-letters", "redrive"]).await;
    assert_eq!(text(&redriven.stdout), "1 back in the queue\n");
    assert_eq!(host.ended(&dead).await["status"], "completed");
    let redriven = lesion(&host.url, &["redrive", &failed]).await;
    assert_eq!(text(&redriven.stdout), format!("{failed} pending\n"));
    assert_eq!(host.ended(&failed).await["status"], "completed");
    let redriven = lesion(&host.url, &["redrive", &undescribed]).await;
    assert_eq!(text(&redriven.stdout), format!("{undescribed} awaiting_description\n"));
    let result = host.ended(&undescribed).await;
    assert_eq!(result["status"], "completed");
    assert!(result["description"]["text"].is_string(), "{result}");
    let Some(Record::Job(job)) = store.get(undescribed.parse().unwrap()).await.unwrap() else { panic!() };
    assert_eq!((job.attempts.inference, job.attempts.enrichment), (0, 1), "only the description was made anew");
    let again = lesion(&host.url, &["redrive", &failed]).await;
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("not_redrivable"), "{}", text(&again.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_waited_for_while_its_host_is_away_and_no_longer_than_was_said() {
    let host = Running::start(&[]).await;
    let output = lesion(&host.url, &["submit", "--json", "mole-drawn.png"]).await;
    let submitted: Value = serde_json::from_slice(&output.stdout).unwrap();
    let id = submitted["request_id"].as_str().unwrap();
    // Away for more tries than one look has.
    let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (url, behind) = (format!("http://{}", door.local_addr().unwrap()), host.url.replace("http://", ""));
    tokio::spawn(async move {
        for knock in 0.. {
            let (mut client, _) = door.accept().await.unwrap();
            if knock >= 5 {
                let mut server = TcpStream::connect(&behind).await.unwrap();
                tokio::spawn(async move { copy_bidirectional(&mut client, &mut server).await });
            }
        }
    });
    let output = lesion(&url, &["result", id, "--wait"]).await;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("cannot be reached"), "{}", text(&output.stderr));

    // One that is never back, and one that asks for pauses longer than the time there is.
    let busy = || async { (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "60")]) };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(busy)).await });
    for url in ["http://127.0.0.1:1", url.as_str()] {
        let started = Instant::now();
        let output = lesion(url, &["result", id, "--wait", "--timeout", "2"]).await;
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        assert!((2..30).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_beyond_its_limit_is_told_and_waited_for() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    async fn busy_once() -> axum::response::Response {
        use axum::response::IntoResponse;
        match CALLS.fetch_add(1, Ordering::SeqCst) {
            0 => (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "1")]).into_response(),
            _ => axum::Json(serde_json::json!({"results": [], "next_cursor": null})).into_response(),
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().route("/results", axum::routing::get(busy_once));
    tokio::spawn(async move { axum::serve(listener, router).await });
    let output = lesion(&url, &["list"]).await;
    assert_eq!((output.status.code(), CALLS.load(Ordering::SeqCst)), (Some(0), 2));
    assert!(text(&output.stderr).contains("waiting 1 s"), "{}", text(&output.stderr));
}
