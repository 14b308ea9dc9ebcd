//! What becomes of a photo: every end of the state machine, and the ways there.

use std::time::Duration;

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use chrono::TimeDelta;
use futures_util::FutureExt;
use image::{ImageFormat, RgbImage};
use serde_json::Value;
use shared::clock::Clock;
use shared::http::Caller;
use shared::job::{Job, Record, Status, blob_prefix, photo_key};
use shared::message::Message;
use shared::ports::{BlobStore, JobStore};
use submit::Submission;
use uuid::Uuid;

use crate::support::llm_server::LlmServer;
use crate::support::{Running, eventually, mole, open, sample, standing};
use crate::sweeping::stuck_job;

fn png(picture: &RgbImage) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn jpeg(picture: &RgbImage) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Jpeg).unwrap();
    bytes.into_inner()
}

fn drawn() -> RgbImage {
    image::load_from_memory(&mole()).unwrap().into_rgb8()
}

#[tokio::test]
async fn a_blurred_photo_is_sent_back_before_any_model_or_llm() {
    let host = Running::start(&[]).await;
    let result = host.run(&sample("blurred.png")).await;
    assert_eq!(result["status"], "needs_retake", "{result}");
    assert_eq!(result["quality"]["reasons"], serde_json::json!(["blurred"]));
    assert_eq!(result["quality"]["accepted"], false);
    assert_eq!(result["predictions"], serde_json::json!([]));
    assert!(result["timings_ms"]["inference"].is_null() && result["description"].is_null(), "{result}");
}

#[tokio::test]
async fn a_picture_of_something_else_gets_no_label_and_no_description() {
    let host = Running::start(&[]).await;
    let result = host.run(&sample("not-a-lesion.png")).await;
    assert_eq!(result["status"], "completed", "{result}");
    assert!(result["abstained"]["reason"].is_string(), "{result}");
    assert_eq!(result["predictions"], serde_json::json!([]));
    assert!(result["description"].is_null(), "an abstention reassures nobody: {result}");
}

/// Where a JPEG's first scan begins.
fn scan_start(jpeg: &[u8]) -> usize {
    let marker = jpeg.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap();
    marker + 2 + usize::from(u16::from_be_bytes([jpeg[marker + 2], jpeg[marker + 3]]))
}

#[tokio::test]
async fn damaged_pixels_fail_for_good_and_say_so() {
    let host = Running::start(&[]).await;
    let (jpeg, png) = (jpeg(&drawn()), mole());
    let (start, end) = (scan_start(&jpeg), jpeg.len() - 2);
    let third = (end - start) / 3;
    let mut zeroed = jpeg.clone();
    zeroed[start + third..start + 2 * third].fill(0);
    let cut_out = [&jpeg[..start + third], &jpeg[start + 2 * third..]].concat();
    let cut_off = [&jpeg[..start + third], &[0xFF, 0xD9]].concat();
    let mut flipped = png.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0xFF;
    for (name, damaged) in [("zeroed", zeroed), ("cut out", cut_out), ("cut off", cut_off), ("flipped", flipped)] {
        let result = host.run(&damaged).await;
        assert_eq!(result["status"], "failed", "{name}: {result}");
        assert_eq!(result["error"]["code"], "photo_unreadable", "{name}: {result}");
        assert_eq!(result["error"]["retryable"], false, "{name}: {result}");
        assert_eq!(result["predictions"], serde_json::json!([]), "{name}");
    }
}

#[tokio::test]
async fn without_a_description_the_job_ends_after_inference() {
    let host = Running::start(&[]).await;
    let response =
        host.http.post(format!("{}/submit?describe=false", host.url)).header("content-type", "image/png").body(mole());
    let body: Value = response.send().await.unwrap().json().await.unwrap();
    let result = host.ended(body["request_id"].as_str().unwrap()).await;
    assert_eq!(result["status"], "completed");
    assert!(result["description"].is_null());
    assert_eq!(result["predictions"].as_array().unwrap().len(), 7);
}

/// A JPEG with an EXIF block that holds nothing but an orientation (TIFF 6.0).
fn with_orientation(jpeg: &[u8], orientation: u8) -> Vec<u8> {
    let mut exif = b"\xFF\xE1\0\x22Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
    exif.extend_from_slice(&[orientation, 0, 0, 0, 0, 0, 0, 0]);
    [&jpeg[..2], &exif, &jpeg[2..]].concat()
}

#[tokio::test]
async fn a_photo_taken_sideways_is_turned_before_it_is_read() {
    let host = Running::start(&[]).await;
    let sideways = image::imageops::rotate270(&drawn());
    // Orientation 6: the camera was turned, the picture must be turned by 90° clockwise.
    let mut encoded = std::io::Cursor::new(Vec::new());
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut encoded, 100).encode_image(&sideways).unwrap();
    let turned = host.run(&with_orientation(encoded.get_ref(), 6)).await;
    // The same pixels, by a file that says nothing of orientation.
    let decoded = image::load_from_memory(encoded.get_ref()).unwrap().into_rgb8();
    let upright = host.run(&png(&image::imageops::rotate90(&decoded))).await;
    assert_eq!(turned["predictions"], upright["predictions"]);
    assert_ne!(turned["predictions"], host.run(&png(&decoded)).await["predictions"], "turning matters");
}

#[tokio::test]
async fn the_same_photo_of_the_same_caller_is_run_once() {
    let host = Running::start(&[]).await;
    let first = host.run(&mole()).await;
    let second = host.run(&mole()).await;
    assert!(first["timings_ms"]["inference"].is_number());
    assert!(second["timings_ms"]["inference"].is_null(), "{second}");
    assert_eq!(first["predictions"], second["predictions"]);
}

async fn make_job(host: &local::Host, photo: Vec<u8>) -> Uuid {
    let submission = Submission { image: photo, describe: true, callback_url: None };
    host.submit.accept(&Caller("local".into()), None, submission).await.unwrap()
}

async fn job(host: &local::Host, id: Uuid) -> Job {
    host.store.get(id).await.unwrap().and_then(Record::into_job).unwrap()
}

fn schedule() -> EventBridgeEvent {
    EventBridgeEvent::default()
}

#[tokio::test]
async fn a_message_that_was_never_sent_is_sent_by_sweep() {
    let (_folder, clock, host) = standing(&[]).await;
    let id = stuck_job(&host).await;
    assert_eq!(host.sweep.handle(schedule()).await.unwrap(), sweep::Report::default(), "nothing is due yet");
    clock.advance(TimeDelta::seconds(121));
    assert_eq!(host.sweep.handle(schedule()).await.unwrap().sent, 1);
    assert_eq!(host.queue.depth().await.unwrap(), (1, 0));
    assert_eq!(job(&host, id).await.status, Status::Pending);
}

#[tokio::test]
async fn a_photo_is_not_claimed_before_its_turn() {
    let (_folder, clock, host) = standing(&[("INFERENCE_WORKERS", "1")]).await;
    let id = make_job(&host, mole()).await;
    let mut turns = Vec::new();
    while let Some(turn) = host.inference.room.turn().now_or_never() {
        turns.push(turn.unwrap());
    }
    let deadline = clock.now() + TimeDelta::seconds(60);
    let mut waiting = std::pin::pin!(host.inference.process(Message::Infer { id }, deadline, None));
    assert!(tokio::time::timeout(Duration::from_millis(200), &mut waiting).await.is_err());
    let before = job(&host, id).await;
    assert_eq!((before.status, before.attempts.inference, before.lease_until), (Status::Pending, 0, None));
    turns.pop();
    assert_eq!(waiting.await, inference::Outcome::Acknowledge);
    assert_eq!(job(&host, id).await.attempts.inference, 1);
}

#[tokio::test]
async fn a_photo_that_cannot_be_read_for_now_is_tried_again_and_then_given_up() {
    let (folder, clock, host) = standing(&[("MAX_ATTEMPTS", "2")]).await;
    let id = make_job(&host, mole()).await;
    // A folder in the photo's place: the store answers with an error, not with "nothing there".
    let photo = folder.path().join("blobs").join(photo_key(id));
    std::fs::remove_file(&photo).unwrap();
    std::fs::create_dir(&photo).unwrap();
    let deadline = clock.now() + TimeDelta::seconds(60);
    let outcome = host.inference.process(Message::Infer { id }, deadline, None).await;
    assert_eq!(outcome, inference::Outcome::Retry(TimeDelta::seconds(5)));
    assert_eq!(job(&host, id).await.status, Status::Pending);
    let outcome = host.inference.process(Message::Infer { id }, deadline, None).await;
    assert_eq!(outcome, inference::Outcome::Acknowledge);
    let failed = job(&host, id).await;
    assert_eq!(failed.status, Status::Failed);
    assert!(failed.failure.unwrap().retryable);
}

#[tokio::test]
async fn a_photo_that_is_gone_fails_the_job() {
    let (_folder, clock, host) = standing(&[]).await;
    let id = make_job(&host, mole()).await;
    host.blobs.delete_prefix(&blob_prefix(id)).await.unwrap();
    host.inference.process(Message::Infer { id }, clock.now() + TimeDelta::seconds(60), None).await;
    let failure = job(&host, id).await.failure.unwrap();
    assert_eq!(failure.code, shared::job::FailureCode::PhotoMissing);
}

#[tokio::test]
async fn a_second_delivery_and_a_late_worker_change_nothing() {
    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let (_folder, clock, host) = standing(&[("LLM_BASE_URL", &base_url), ("LLM_MODEL", "m")]).await;
    let id = make_job(&host, mole()).await;
    let deadline = clock.now() + TimeDelta::seconds(60);
    host.inference.process(Message::Infer { id }, deadline, None).await;
    let after_first = job(&host, id).await;
    host.inference.process(Message::Infer { id }, deadline, None).await;
    assert_eq!(job(&host, id).await, after_first);
    host.enrichment.process(id, deadline, None).await.unwrap();
    let completed = job(&host, id).await;
    assert_eq!(completed.status, Status::Completed);
    host.enrichment.process(id, deadline, None).await.unwrap();
    host.inference.process(Message::Infer { id }, deadline, None).await;
    assert_eq!(job(&host, id).await, completed);
}

#[tokio::test]
async fn a_delete_while_a_worker_holds_the_job_wins() {
    let (_folder, clock, host) = standing(&[]).await;
    let id = make_job(&host, mole()).await;
    let caller = Caller("local".into());
    let pending = job(&host, id).await;
    let claimed =
        pending.claim_inference(clock.now(), clock.now() + TimeDelta::seconds(60), &host.config.policy).unwrap();
    assert!(host.store.replace(pending.fence(), &Record::Job(claimed.clone())).await.unwrap());
    host.results.delete(&caller, &id.to_string()).await.unwrap();
    let late = Record::Job(claimed.release_inference(1, clock.now(), &host.config.policy).unwrap());
    assert!(!host.store.replace(claimed.fence(), &late).await.unwrap(), "a stale worker wrote over a tombstone");
    // A worker may have written a blob after the delete: sweep erases once more, a lease later.
    host.blobs.put(&photo_key(id), b"late".to_vec()).await.unwrap();
    clock.advance(TimeDelta::seconds(121));
    assert_eq!(host.sweep.handle(schedule()).await.unwrap().erased, 1);
    assert_eq!(host.blobs.get(&photo_key(id)).await.unwrap(), None);
    assert_eq!(host.sweep.handle(schedule()).await.unwrap(), sweep::Report::default());
    clock.advance(TimeDelta::days(16));
    assert_eq!(host.store.remove_expired(clock.now()).await.unwrap(), 1);
    assert_eq!(host.store.get(id).await.unwrap(), None);
}

#[tokio::test]
async fn a_deleted_photos_words_are_in_no_file_and_its_key_may_come_again() {
    let (folder, clock, host) = standing(&[]).await;
    let caller = Caller("local".into());
    let submission = || Submission { image: mole(), describe: true, callback_url: None };
    let id = host.submit.accept(&caller, Some("key".into()), submission()).await.unwrap();
    let deadline = clock.now() + TimeDelta::seconds(60);
    host.inference.process(Message::Infer { id }, deadline, None).await;
    let holds = |text: &str| {
        ["jobs.sqlite", "jobs.sqlite-wal"].iter().any(|file| {
            let bytes = std::fs::read(folder.path().join(file)).unwrap_or_default();
            bytes.windows(text.len()).any(|window| window == text.as_bytes())
        })
    };
    assert!(holds("predictions"), "the test must be able to find it");
    host.results.delete(&caller, &id.to_string()).await.unwrap();
    assert!(!holds("predictions") && !holds("gives the highest probability"));
    let again = host.submit.accept(&caller, Some("key".into()), submission()).await.unwrap();
    assert_ne!(again, id, "the key of a deleted job must not answer with it");
}

#[tokio::test]
async fn a_record_that_cannot_be_read_holds_up_no_other() {
    let (folder, clock, host) = standing(&[]).await;
    let older = make_job(&host, mole()).await;
    clock.advance(TimeDelta::milliseconds(2));
    let spoilt = make_job(&host, mole()).await;
    clock.advance(TimeDelta::milliseconds(2));
    let newer = make_job(&host, mole()).await;
    let jobs = rusqlite::Connection::open(folder.path().join("jobs.sqlite")).unwrap();
    let sql = "UPDATE jobs SET record = replace(record, '\"pending\"', '\"dancing\"') WHERE id = ?1";
    assert_eq!(jobs.execute(sql, [spoilt.to_string()]).unwrap(), 1);
    clock.advance(TimeDelta::seconds(121));
    assert_eq!(host.sweep.handle(schedule()).await.unwrap().sent, 2);
    let (mut listed, mut cursor) = (Vec::new(), None);
    loop {
        let page = host.store.list("local", cursor, 2).await.unwrap();
        listed.push(page.records.iter().map(|job| job.id).collect::<Vec<_>>());
        cursor = page.next;
        if cursor.is_none() {
            break;
        }
    }
    assert_eq!(listed, [[newer], [older]], "the page that it is on is not the last");
    // The feed gives it up as well, rather than meet it again for ever.
    let feed = serde_json::json!({"Records": [{
        "awsRegion": "local", "eventID": "1", "eventName": "MODIFY",
        "dynamodb": {"Keys": {"id": {"S": spoilt}}, "SequenceNumber": "1", "ApproximateCreationDateTime": 0, "SizeBytes": 0},
    }]});
    let response = host.enrichment.handle(serde_json::from_value(feed).unwrap(), clock.now()).await;
    assert!(response.batch_item_failures.is_empty());
}

#[tokio::test]
async fn an_order_to_erase_outlives_a_cache_that_is_away() {
    let (_folder, clock, host) = standing(&[("REDIS_URL", "redis://127.0.0.1:1")]).await;
    let id = make_job(&host, mole()).await;
    let deadline = clock.now() + TimeDelta::seconds(60);
    host.inference.process(Message::Infer { id }, deadline, None).await;
    host.results.delete(&Caller("local".into()), &id.to_string()).await.unwrap();
    for _ in 0..20 {
        clock.advance(TimeDelta::hours(1));
        assert_eq!(host.inference.process(Message::Forget { id }, deadline, None).await, inference::Outcome::Again);
        assert_eq!(host.sweep.handle(schedule()).await.unwrap().erased, 1, "still due, order sent again");
    }
}

#[tokio::test]
async fn anothers_job_cannot_be_told_from_no_job() {
    let folder = tempfile::tempdir().unwrap();
    let host = open(folder.path(), Clock::System, &[]).await;
    let id = make_job(&host, mole()).await;
    let stranger = Caller("stranger".into());
    let denied = host.results.delete(&stranger, &id.to_string()).await.unwrap_err();
    let missing = host.results.delete(&stranger, &Uuid::now_v7().to_string()).await.unwrap_err();
    assert_eq!(denied.to_string(), missing.to_string());
    assert_eq!(job(&host, id).await.status, Status::Pending);
    assert!(host.store.list("stranger", None, 10).await.unwrap().records.is_empty());
}

#[tokio::test]
async fn a_message_that_cannot_be_read_becomes_a_dead_letter_and_holds_nothing_up() {
    let (_folder, clock, host) = standing(&[("MAX_ATTEMPTS", "1")]).await;
    host.queue.send_body("no message of ours".into()).await.unwrap();
    let mut received = 0;
    while let Some(delivery) = host.queue.receive(TimeDelta::seconds(30)).await.unwrap() {
        received += 1;
        assert_eq!(delivery.receive_count, received);
        clock.advance(TimeDelta::seconds(31));
    }
    assert_eq!(received, 7, "twice MAX_ATTEMPTS and five");
    assert_eq!(host.queue.depth().await.unwrap(), (0, 1));
}

#[tokio::test]
async fn blobs_without_a_record_are_erased_after_an_hour_and_not_before() {
    let (_folder, clock, host) = standing(&[]).await;
    let kept = make_job(&host, mole()).await;
    let orphan = shared::job::new_id(clock.now());
    host.blobs.put(&photo_key(orphan), mole()).await.unwrap();
    clock.advance(TimeDelta::minutes(59));
    host.sweep.handle(schedule()).await.unwrap();
    assert!(host.blobs.get(&photo_key(orphan)).await.unwrap().is_some());
    clock.advance(TimeDelta::minutes(2));
    assert_eq!(host.sweep.handle(schedule()).await.unwrap().orphans, 1);
    assert!(host.blobs.get(&photo_key(orphan)).await.unwrap().is_none());
    assert!(host.blobs.get(&photo_key(kept)).await.unwrap().is_some());
}

#[tokio::test]
async fn photos_expire_before_results_and_results_expire() {
    let (_folder, clock, host) = standing(&[]).await;
    let id = make_job(&host, mole()).await;
    let deadline = clock.now() + TimeDelta::seconds(60);
    host.inference.process(Message::Infer { id }, deadline, None).await;
    host.enrichment.process(id, deadline, None).await.unwrap();
    let in_a_moment = std::time::SystemTime::now() + Duration::from_secs(1);
    assert_eq!(host.blobs.remove_older("jobs/", in_a_moment - Duration::from_secs(3600)).await.unwrap(), 0);
    // The photo and its map.
    assert_eq!(host.blobs.remove_older("jobs/", in_a_moment).await.unwrap(), 2);
    clock.advance(TimeDelta::days(29));
    assert_eq!(host.store.remove_expired(clock.now()).await.unwrap(), 0);
    clock.advance(TimeDelta::days(2));
    assert_eq!(host.store.remove_expired(clock.now()).await.unwrap(), 1);
}

#[tokio::test]
async fn two_hosts_never_share_a_data_folder() {
    let folder = tempfile::tempdir().unwrap();
    let _first = open(folder.path(), Clock::System, &[]).await;
    let library = crate::support::ort_library();
    let model = crate::support::root().join("model");
    let env = shared::config::Env::of(crate::support::settings(
        folder.path().to_str().unwrap(),
        library.to_str().unwrap(),
        model.to_str().unwrap(),
    ));
    let config = local::Config::from_env(&env).unwrap();
    let error = local::Host::open(config, &env, Clock::System).await.err().unwrap();
    assert!(error.to_string().starts_with("DATA_DIR: another host is running"), "{error}");
}

#[tokio::test]
async fn a_lock_that_is_let_go_in_a_moment_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path(), Clock::System, &[]).await);
    // As a child process has it between fork and exec.
    let held = std::fs::File::open(folder.path().join("lock")).unwrap();
    held.lock().unwrap();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(held);
    });
    open(folder.path(), Clock::System, &[]).await;
}

#[tokio::test]
async fn a_stop_finishes_what_is_in_flight_and_a_start_takes_up_the_rest() {
    let host = Running::start(&[("INFERENCE_WORKERS", "1")]).await;
    let mut ids = Vec::new();
    for _ in 0..10 {
        ids.push(host.submit(&mole()).await);
    }
    let folder = host.stop().await;
    let host = open(folder.path(), Clock::System, &[]).await;
    for id in &ids {
        let status = job(&host, id.parse().unwrap()).await.status;
        assert_ne!(status, Status::Processing, "a stop left a job in somebody's hands");
    }
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let store = host.store.clone();
    let running = tokio::spawn(host.run(async { stopped.await.unwrap_or(()) }, |_| {}));
    eventually("all ten are completed", async || {
        let jobs = store.list("local", None, 20).await.unwrap().records;
        jobs.len() == 10 && jobs.iter().all(|job| job.status == Status::Completed)
    })
    .await;
    drop(stop);
    running.await.unwrap().unwrap();
}
