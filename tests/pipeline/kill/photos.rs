//! Photos: submitted, uploaded, read and described.

use std::path::Path;

use shared::crash::Point;
use shared::embedded::SqliteJobStore;
use shared::job::Record;
use shared::ports::JobStore;

use super::{
    ENRICHMENT, ENRICHMENT_OFFLINE, ENRICHMENT_RETRY, INFERENCE, INFERENCE_MAP, INFERENCE_RETRY, START, SUBMIT,
    SWEEP_UPLOAD, Scene, UPLOAD, hurry,
};
use crate::support::llm_server::Behaviour;
use crate::support::network::Network;
use crate::support::process::Process;
use crate::support::{ended, mole};
use crate::uploads;

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_submit_loses_and_doubles_nothing() {
    for &point in SUBMIT {
        let scene = Scene::new([]).await;
        // The first start of all writes the model bundle into the blob store.
        scene.start(None).await.kill().await;
        let mut host = scene.start(Some(point)).await;
        assert!(scene.submit(&host, "key").await.is_err(), "{}: the answer came before the kill", point.name());
        host.killed().await;
        scene.recover("key", point).await;
        assert_eq!(scene.llm.calls(), 1, "{}", point.name());
    }
    println!("submit: killed at {} points", SUBMIT.len());
}

/// Uploads and submits as an app does: whatever step fails is begun again.
async fn upload_and_submit(scene: &Scene, host: &Process, known: &mut Option<String>) -> reqwest::Result<String> {
    let photo = mole();
    let image_key = match known {
        Some(image_key) => image_key.clone(),
        None => {
            let permit = uploads::permit(&scene.http, &host.url, &photo).await?;
            assert_eq!(uploads::put(&scene.http, &host.url, &permit, &photo).await?.status().as_u16(), 200);
            known.insert(permit["image_key"].as_str().unwrap().to_owned()).clone()
        }
    };
    let response = uploads::submit_key(&scene.http, &host.url, &image_key).await?;
    assert_eq!(response.status().as_u16(), 202);
    let body: serde_json::Value = response.json().await?;
    Ok(body["request_id"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_an_upload_loses_and_doubles_nothing() {
    for &point in UPLOAD {
        let scene = Scene::new([]).await;
        scene.start(None).await.kill().await;
        let mut host = scene.start(Some(point)).await;
        let mut image_key = None;
        assert!(upload_and_submit(&scene, &host, &mut image_key).await.is_err(), "{}", point.name());
        host.killed().await;
        let host = scene.start(None).await;
        let id = upload_and_submit(&scene, &host, &mut image_key).await.unwrap();
        assert_eq!(ended(&scene.http, &host.url, &id).await["status"], "completed", "{}", point.name());
        scene.settled(host, &[id], point).await;
    }
    for &point in SWEEP_UPLOAD {
        let scene = Scene::new([]).await;
        let host = scene.start(None).await;
        let photo = mole();
        let permit = uploads::permit(&scene.http, &host.url, &photo).await.unwrap();
        assert_eq!(uploads::put(&scene.http, &host.url, &permit, &photo).await.unwrap().status().as_u16(), 200);
        host.kill().await;
        hurry(scene.data());
        // Sweep meets it at once; the host may be dead before it listens.
        if let Some(mut host) = Process::start(scene.data(), &[("CRASH_AT", point.name())]).await {
            host.killed().await;
        }
        scene.recover("key", point).await;
    }
    println!("uploads: killed at {} points", UPLOAD.len() + SWEEP_UPLOAD.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_inference_loses_and_doubles_nothing() {
    for &point in INFERENCE {
        let scene = Scene::new([]).await;
        let mut host = scene.start(Some(point)).await;
        // The host may be dead before it has answered: the key makes the second try the same job.
        let _ = scene.submit(&host, "key").await;
        host.killed().await;
        scene.recover("key", point).await;
        // Once the record is written enrichment works beside, and its answer may be killed as well.
        let calls = if [Point::QueueReceived, Point::InferenceClaimed].contains(&point) { 1..=1 } else { 1..=2 };
        assert!(calls.contains(&scene.llm.calls()), "{}: {} calls", point.name(), scene.llm.calls());
    }
    for &point in INFERENCE {
        let scene = Scene::new([]).await;
        let mut host = Process::start(scene.data(), &[("CRASH_AT", point.name())]).await.unwrap();
        let _ = scene.submit(&host, "key").await;
        host.killed().await;
        scene.recover("key", point).await;
        // A host with an LLM finds nothing to ask where the template was before it.
        let calls = usize::from([Point::QueueReceived, Point::InferenceClaimed].contains(&point));
        assert_eq!(scene.llm.calls(), calls, "{}", point.name());
    }
    let model = tempfile::tempdir().unwrap();
    Network::default().write(model.path());
    for &point in INFERENCE_MAP {
        let scene = Scene::new([]).await.with_model(model.path());
        let mut host = scene.start(Some(point)).await;
        let _ = scene.submit(&host, "key").await;
        host.killed().await;
        let left = std::fs::read_dir(only_photo(scene.data()).await.parent().unwrap()).unwrap();
        assert_eq!(left.count(), 2, "the map lies beside the photo, and no record names it");
        let host = scene.start(None).await;
        let id = scene.submit(&host, "key").await.unwrap();
        let result = ended(&scene.http, &host.url, &id).await;
        let url = format!("{}{}", host.url, result["map"]["url"].as_str().unwrap());
        assert_eq!(scene.http.get(url).send().await.unwrap().status().as_u16(), 200);
        let left = std::fs::read_dir(only_photo(scene.data()).await.parent().unwrap()).unwrap();
        assert_eq!(left.count(), 2, "it was written again under the same key");
        scene.settled(host, &[id], point).await;
        assert_eq!(scene.llm.calls(), 1);
    }
    for &point in INFERENCE_RETRY {
        let scene = Scene::new([]).await;
        let mut host = scene.start(Some(Point::SubmitRecordWritten)).await;
        assert!(scene.submit(&host, "key").await.is_err());
        host.killed().await;
        let photo = only_photo(scene.data()).await;
        let away = scene.data().join("away");
        std::fs::rename(&photo, &away).unwrap();
        std::fs::create_dir(&photo).unwrap();
        scene.start(Some(point)).await.killed().await;
        std::fs::remove_dir(&photo).unwrap();
        std::fs::rename(&away, &photo).unwrap();
        scene.recover("key", point).await;
    }
    println!("inference: killed at {} points", 2 * INFERENCE.len() + INFERENCE_MAP.len() + INFERENCE_RETRY.len());
}

/// Leases and waits of an hour, so that nothing is taken up because its time is over.
const AN_HOUR: [(&str, &str); 3] =
    [("LEASE_SECONDS", "900"), ("REDISPATCH_SECONDS", "3600"), ("BACKOFF_SECONDS", "3600")];

#[tokio::test(flavor = "multi_thread")]
async fn what_a_kill_cut_off_is_taken_up_at_the_next_start_and_not_when_its_lease_runs_out() {
    let cut_off = [Point::InferenceClaimed, Point::EnrichmentClaimed];
    for (point, at_start) in cut_off.into_iter().flat_map(|point| {
        std::iter::once((point, None)).chain(START.iter().map(move |at_start| (point, Some(*at_start))))
    }) {
        let scene = Scene::new([]).await;
        let mut host = scene.start_with(Some(point), &AN_HOUR).await.expect("the host died before it listened");
        let _ = scene.submit(&host, "key").await;
        host.killed().await;
        if let Some(at_start) = at_start
            && let Some(mut host) = scene.start_with(Some(at_start), &AN_HOUR).await
        {
            host.killed().await;
        }
        let host = scene.start_with(None, &AN_HOUR).await.unwrap();
        let id = scene.submit(&host, "key").await.unwrap();
        assert_eq!(ended(&scene.http, &host.url, &id).await["status"], "completed", "{}", point.name());
        let store = SqliteJobStore::open(&scene.data().join("jobs.sqlite")).unwrap();
        let Some(Record::Job(job)) = store.get(id.parse().unwrap()).await.unwrap() else { panic!() };
        let attempts = (job.attempts.inference, job.attempts.enrichment);
        let expected = if point == Point::InferenceClaimed { (2, 1) } else { (1, 2) };
        assert_eq!(attempts, expected, "{}: what was cut off counts, once", point.name());
        scene.settled(host, &[id], point).await;
        assert_eq!(scene.llm.calls(), 1, "{}", point.name());
    }
}

async fn only_photo(data: &Path) -> std::path::PathBuf {
    let entry = std::fs::read_dir(data.join("blobs/jobs")).unwrap().next().unwrap().unwrap();
    entry.path().join("photo")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_enrichment_loses_and_doubles_nothing() {
    for &point in ENRICHMENT {
        let scene = Scene::new([]).await;
        let mut host = scene.start(Some(point)).await;
        let _ = scene.submit(&host, "key").await;
        host.killed().await;
        scene.recover("key", point).await;
        // Only an answer whose commit was cut off is asked for again.
        let expected = if point == Point::EnrichmentAnswered { 2 } else { 1 };
        assert_eq!(scene.llm.calls(), expected, "{}", point.name());
    }
    for &point in ENRICHMENT_OFFLINE {
        // Read for an LLM that is then taken away.
        let scene = Scene::new([const { Behaviour::Status(503, Some(30)) }]).await;
        let mut host = scene.start(Some(Point::EnrichmentDeferred)).await;
        let _ = scene.submit(&host, "key").await;
        host.killed().await;
        hurry(scene.data());
        if let Some(mut host) = Process::start(scene.data(), &[("CRASH_AT", point.name())]).await {
            host.killed().await;
        }
        // A host with an LLM finds nothing to ask.
        scene.recover("key", point).await;
        assert_eq!(scene.llm.calls(), 1, "{}", point.name());
    }
    for &point in ENRICHMENT_RETRY {
        let scene = Scene::new([const { Behaviour::Status(503, Some(30)) }]).await;
        let mut host = scene.start(Some(point)).await;
        let _ = scene.submit(&host, "key").await;
        host.killed().await;
        // The server's 30 s are up in the record, not in this test.
        hurry(scene.data());
        scene.recover("key", point).await;
        assert_eq!(scene.llm.calls(), 2, "{}", point.name());
    }
    let points = [ENRICHMENT, ENRICHMENT_OFFLINE, ENRICHMENT_RETRY].concat();
    println!("enrichment: killed at {} points", points.len());
}
