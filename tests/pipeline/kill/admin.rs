//! What an operator does.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use shared::crash::Point;

use super::{ADMIN_DEAD_LETTERS, ADMIN_JOB, ADMIN_KEYS, FIRST, Scene};
use crate::support::process::{Process, binary};
use crate::support::{client, ended};

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_after_a_key_was_written_or_revoked_leaves_keys_that_can_be_listed_and_revoked() {
    let folder = tempfile::tempdir().unwrap();
    let key = crate::support::keyed::init(folder.path(), false).await.unwrap();
    let http = client();
    for &point in ADMIN_KEYS {
        let mut host = Process::start(folder.path(), &[("CRASH_AT", point.name())]).await.unwrap();
        let call = async |host: &Process| {
            let url = format!("{}/admin/keys", host.url);
            match point {
                Point::AdminKeyWritten => http.post(url).json(&serde_json::json!({"caller": "ward"})),
                _ => http.delete(format!("{url}/{}", only_key_of_ward(folder.path()))),
            }
            .bearer_auth(&key)
            .send()
            .await
        };
        assert!(call(&host).await.is_err(), "{}: the answer came before the kill", point.name());
        host.killed().await;
        let host = Process::start(folder.path(), &[]).await.unwrap();
        let answer = http.get(format!("{}/admin/keys", host.url)).bearer_auth(&key).send().await.unwrap();
        let listed: serde_json::Value = answer.json().await.unwrap();
        let of_ward = listed["keys"].as_array().unwrap().iter().find(|key| key["caller"] == "ward").unwrap();
        assert_eq!(of_ward["revoked_at"].is_string(), point == Point::AdminKeyRevoked, "{}", point.name());
        // Repeated, a revocation changes nothing. A key is made anew: nobody has the first one's secret.
        if point == Point::AdminKeyRevoked {
            assert_eq!(call(&host).await.unwrap().status().as_u16(), 204);
            let answer = http.get(format!("{}/admin/keys", host.url)).bearer_auth(&key).send().await.unwrap();
            assert_eq!(answer.json::<serde_json::Value>().await.unwrap(), listed);
        }
        host.kill().await;
    }
    println!("keys: killed at {} points", ADMIN_KEYS.len());
}

fn only_key_of_ward(data: &Path) -> String {
    let keys = rusqlite::Connection::open(data.join("callers.sqlite")).unwrap();
    keys.query_row("SELECT id FROM keys WHERE caller = 'ward'", [], |row| row.get(0)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_a_redrive_loses_and_doubles_nothing() {
    for &point in ADMIN_JOB {
        let scene = Scene::new([]).await;
        let id = crate::admin::failed_job(scene.data()).await.to_string();
        let redrive = async |host: &Process| {
            scene.http.post(format!("{}/admin/jobs/{id}/redrive", host.url)).send().await.map(|answer| answer.status())
        };
        let mut host = scene.start(Some(point)).await;
        assert!(redrive(&host).await.is_err(), "{}: the answer came before the kill", point.name());
        host.killed().await;
        let host = scene.start(None).await;
        // Repeated: the job has moved on, and is not sent round twice.
        assert_eq!(redrive(&host).await.unwrap().as_u16(), 409, "{}", point.name());
        assert_eq!(ended(&scene.http, &host.url, &id).await["status"], "completed", "{}", point.name());
        scene.settled(host, std::slice::from_ref(&id), point).await;
        assert_eq!(scene.llm.calls(), 1, "{}", point.name());
    }
    println!("redrive: killed at {} points", ADMIN_JOB.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_after_dead_letters_were_moved_loses_and_doubles_nothing() {
    for &point in ADMIN_DEAD_LETTERS {
        let scene = Scene::new([]).await;
        let id = crate::admin::dead_letter(scene.data()).await.to_string();
        crate::admin::dead_webhook(scene.data()).await;
        let redrive = async |host: &Process| {
            let request = scene.http.post(format!("{}/admin/dead-letters/redrive", host.url));
            request.json(&serde_json::json!({})).send().await
        };
        // So long that nobody but the dead letter brings the job back.
        let extra = [("REDISPATCH_SECONDS", "3600"), ("CRASH_AT", point.name())];
        let mut host = Process::start(scene.data(), &extra).await.unwrap();
        assert!(redrive(&host).await.is_err(), "{}: the answer came before the kill", point.name());
        host.killed().await;
        let host = Process::start(scene.data(), &extra[..1]).await.unwrap();
        let repeated: serde_json::Value = redrive(&host).await.unwrap().json().await.unwrap();
        let left = u32::from(point == Point::AdminPhotoLettersMoved);
        assert_eq!(repeated, serde_json::json!({"redriven": left}), "{}", point.name());
        assert_eq!(ended(&scene.http, &host.url, &id).await["status"], "completed", "{}", point.name());
        scene.settled(host, &[id], point).await;
    }
    println!("dead letters: killed at {} points", ADMIN_DEAD_LETTERS.len());
}

/// Runs `local init`, which is killed where a point is given.
async fn init(data: &Path, another: bool, crash_at: Option<Point>) -> std::process::Output {
    let mut command = tokio::process::Command::new(binary("local"));
    command.arg("init").args(another.then_some("--another")).env_clear().env("DATA_DIR", data);
    command.envs(crash_at.map(|point| ("CRASH_AT", point.name()))).output().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_in_the_first_start_or_in_init_leaves_a_folder_that_the_next_one_takes() {
    for point in [Point::StartSecretWritten, Point::BlobWritten] {
        let scene = Scene::new([]).await;
        assert!(scene.start_with(Some(point), &[]).await.is_none(), "{}", point.name());
        assert_eq!(scene.data().join("secret.key").exists(), point == Point::BlobWritten);
        scene.recover("key", point).await;
    }

    let folder = tempfile::tempdir().unwrap();
    let killed = init(folder.path(), false, Some(Point::InitKeyWritten)).await;
    assert_eq!((killed.status.signal(), killed.stdout.len()), (Some(9), 0));
    // Nobody has seen the key, and nobody is let in without one: the complaint says what to do.
    let refused = init(folder.path(), false, None).await;
    assert_eq!(refused.status.code(), Some(1));
    let complaint = String::from_utf8(refused.stderr).unwrap();
    assert!(complaint.contains("local init --another"), "{complaint}");
    let made = init(folder.path(), true, None).await;
    assert!(made.status.success());
    let key = String::from_utf8(made.stdout).unwrap();
    let host = Process::start(folder.path(), &[]).await.unwrap();
    let answer = client().get(format!("{}/admin/keys", host.url)).bearer_auth(key.trim()).send().await.unwrap();
    let listed: serde_json::Value = answer.json().await.unwrap();
    assert_eq!(listed["keys"].as_array().unwrap().len(), 2, "the one that nobody has can be revoked: {listed}");
    println!("first start: killed at {} points", FIRST.len());
}
