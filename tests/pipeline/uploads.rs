//! Photos that go to the blob store first: by exactly the PUT that was signed, and never for long.

use std::path::Path;

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chrono::{TimeDelta, Utc};
use image::ImageFormat;
use reqwest::{Client, Response};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use shared::api::{MAX_PHOTO_BYTES, MAX_UPLOAD_BYTES, UploadBody};
use shared::clock::Clock;
use shared::embedded::{DirBlobStore, uploads};
use shared::error::Code;
use shared::http::Caller;
use shared::ports::{BlobStore, PutTerms};
use submit::Submission;
use submit::body::ImageKey;

use crate::support::{Running, client, eventually, mole, open, standing};

const SECRET_PLACE: &str = "48.8584N-2.2945E-where-she-lives";

/// A JPEG of more than [`MAX_PHOTO_BYTES`], most of it comments that name a place.
pub fn large_photo() -> Vec<u8> {
    padded(MAX_PHOTO_BYTES + 60_000)
}

/// A JPEG of so many bytes, most of them comments that name a place.
fn padded(size: usize) -> Vec<u8> {
    let mut jpeg = std::io::Cursor::new(Vec::new());
    image::load_from_memory(&mole()).unwrap().to_rgb8().write_to(&mut jpeg, ImageFormat::Jpeg).unwrap();
    let jpeg = jpeg.into_inner();
    let text = SECRET_PLACE.repeat(60_000 / SECRET_PLACE.len());
    let comment =
        |text: &[u8]| [&[0xFF, 0xFE], &u16::try_from(text.len() + 2).unwrap().to_be_bytes()[..], text].concat();
    let whole = comment(text.as_bytes());
    let mut comments = whole.repeat((size - jpeg.len()) / whole.len() - 1);
    // The rest in two, neither of which is too short or too long to be one.
    let rest = size - jpeg.len() - comments.len();
    for part in [rest / 2, rest - rest / 2] {
        comments.extend(comment(&text.as_bytes()[..part - 4]));
    }
    [&jpeg[..2], &comments, &jpeg[2..]].concat()
}

fn hex_digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn announced(photo: &[u8]) -> Value {
    json!({"content_type": "image/jpeg", "size_bytes": photo.len(), "sha256": hex_digest(photo)})
}

/// Asks for permission.
pub async fn permit(http: &Client, url: &str, photo: &[u8]) -> reqwest::Result<Value> {
    let response = http.post(format!("{url}/uploads")).json(&announced(photo)).send().await?;
    assert_eq!(response.status().as_u16(), 201);
    response.json().await
}

/// Sends the bytes as the permission says.
pub async fn put(http: &Client, url: &str, permit: &Value, photo: &[u8]) -> reqwest::Result<Response> {
    let mut request = http.put(format!("{url}{}", permit["url"].as_str().unwrap())).body(photo.to_vec());
    for (name, value) in permit["headers"].as_object().unwrap() {
        request = request.header(name, value.as_str().unwrap());
    }
    request.send().await
}

pub async fn submit_key(http: &Client, url: &str, image_key: &str) -> reqwest::Result<Response> {
    http.post(format!("{url}/submit")).json(&json!({"image_key": image_key})).send().await
}

/// Every file below `folder`.
fn files(folder: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_photo_as_large_as_may_be_is_taken() {
    let host = Running::start(&[]).await;
    let photo = padded(MAX_UPLOAD_BYTES as usize);
    assert_eq!(photo.len() as u64, MAX_UPLOAD_BYTES);
    let before = Utc::now();
    let permit = permit(&host.http, &host.url, &photo).await.unwrap();
    let expires_at: chrono::DateTime<Utc> = permit["expires_at"].as_str().unwrap().parse().unwrap();
    let minutes = (expires_at - before).num_minutes();
    assert!((1..=15).contains(&minutes), "it holds for {minutes} minutes");
    assert_eq!(put(&host.http, &host.url, &permit, &photo).await.unwrap().status().as_u16(), 200);
    let image_key = permit["image_key"].as_str().unwrap();
    let body: Value = submit_key(&host.http, &host.url, image_key).await.unwrap().json().await.unwrap();
    assert_eq!(host.ended(body["request_id"].as_str().unwrap()).await["status"], "completed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_photo_too_large_for_a_request_is_uploaded_submitted_and_leaves_no_place_behind() {
    let host = Running::start(&[]).await;
    let photo = large_photo();
    let direct =
        host.http.post(format!("{}/submit", host.url)).header("content-type", "image/jpeg").body(photo.clone());
    let refused = direct.send().await.unwrap();
    assert_eq!(refused.status().as_u16(), 413);
    assert!(refused.text().await.unwrap().contains("/uploads"), "the way out is named");

    let permit = permit(&host.http, &host.url, &photo).await.unwrap();
    let image_key = permit["image_key"].as_str().unwrap();
    assert_eq!(
        submit_key(&host.http, &host.url, image_key).await.unwrap().status().as_u16(),
        404,
        "nothing is there yet"
    );
    assert_eq!(put(&host.http, &host.url, &permit, &photo).await.unwrap().status().as_u16(), 200);
    let response = submit_key(&host.http, &host.url, image_key).await.unwrap();
    assert_eq!(response.status().as_u16(), 202);
    // From here on the place is in no file.
    let mut found = Vec::new();
    files(host.folder.path(), &mut found);
    let leaks = found.iter().filter(|file| {
        let bytes = std::fs::read(file).unwrap_or_default();
        bytes.windows(SECRET_PLACE.len()).any(|window| window == SECRET_PLACE.as_bytes())
    });
    assert_eq!(leaks.collect::<Vec<_>>(), [] as [&std::path::PathBuf; 0]);
    let body: Value = response.json().await.unwrap();
    let id = body["request_id"].as_str().unwrap().to_owned();
    assert_eq!(host.ended(&id).await["status"], "completed");

    // The key makes one job, however often it is submitted; with other settings it is a conflict.
    let again: Value = submit_key(&host.http, &host.url, image_key).await.unwrap().json().await.unwrap();
    assert_eq!(again["request_id"], id.as_str());
    let other = json!({"image_key": image_key, "describe": false});
    let other = host.http.post(format!("{}/submit", host.url)).json(&other).send().await.unwrap();
    assert_eq!(other.status().as_u16(), 409);
}

#[tokio::test]
async fn an_upload_is_exactly_what_was_signed_or_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = DirBlobStore::open(folder.path(), b"secret").unwrap();
    let clock = Clock::manual(Utc::now());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let router = uploads::router(blobs.clone(), clock.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    let http = client();
    let body = b"exactly these bytes".to_vec();
    let checksum = |body: &[u8]| STANDARD.encode(Sha256::digest(body));
    let key = "incoming/a/b/photo";
    let terms = PutTerms {
        content_type: "image/jpeg".into(),
        size_bytes: body.len() as u64,
        checksum_sha256: checksum(&body),
        expires_at: clock.now() + TimeDelta::minutes(15),
    };
    let signed = blobs.presign_put(key, &terms).await.unwrap();
    let send = async |path: &str, content_type: &str, checksum: &str, body: &[u8]| {
        let request = http.put(format!("{url}{path}")).header("content-type", content_type);
        let response = request.header("x-amz-checksum-sha256", checksum).body(body.to_vec()).send().await.unwrap();
        response.status().as_u16()
    };
    let good = checksum(&body);
    let other = b"exactly other bytes";
    let elsewhere = signed.url.replace("incoming/a/", "incoming/c/");
    let longer = signed.url.replace("expires=", "expires=9");
    let unsigned = signed.url.split('?').next().unwrap().to_owned();
    for (what, status, path, content_type, checksum, bytes) in [
        ("another type", 403, &signed.url, "image/png", good.as_str(), body.as_slice()),
        ("another checksum", 403, &signed.url, "image/jpeg", checksum(other).as_str(), other),
        ("other bytes under the signed checksum", 400, &signed.url, "image/jpeg", &good, other),
        ("more bytes", 403, &signed.url, "image/jpeg", &good, b"exactly these bytes and more"),
        ("fewer bytes", 403, &signed.url, "image/jpeg", &good, b"exactly"),
        ("another key", 403, &elsewhere, "image/jpeg", &good, &body),
        ("a later expiry", 403, &longer, "image/jpeg", &good, &body),
        ("no signature", 403, &unsigned, "image/jpeg", &good, &body),
    ] {
        assert_eq!(send(path, content_type, checksum, bytes).await, status, "{what}");
        assert_eq!(blobs.get(key).await.unwrap(), None, "{what}");
        assert_eq!(blobs.list("incoming/", None, 10).await.unwrap(), [] as [&str; 0], "{what}");
    }
    let stranger = DirBlobStore::open(folder.path(), b"another").unwrap().presign_put(key, &terms).await.unwrap();
    assert_eq!(send(&stranger.url, "image/jpeg", &good, &body).await, 403, "signed with another secret");
    // A body of unknown length is not the one that was signed.
    let chunked = reqwest::Body::wrap_stream(futures_util::stream::iter([Ok::<_, std::io::Error>(body.clone())]));
    let request = http.put(format!("{url}{}", signed.url)).header("content-type", "image/jpeg");
    let response = request.header("x-amz-checksum-sha256", &good).body(chunked).send().await.unwrap();
    assert_eq!(response.status().as_u16(), 403);
    // One permit is one place on the disk: what is sent beside it is not taken.
    let (sender, pieces) = tokio::sync::mpsc::channel::<Vec<u8>>(1);
    let pieces = futures_util::stream::unfold(pieces, async |mut pieces| Some((pieces.recv().await?, pieces)));
    let slow = reqwest::Body::wrap_stream(futures_util::StreamExt::map(pieces, Ok::<_, std::io::Error>));
    let request = http.put(format!("{url}{}", signed.url)).header("content-type", "image/jpeg");
    let request = request.header("x-amz-checksum-sha256", &good).header("content-length", body.len()).body(slow);
    let first = tokio::spawn(request.send());
    sender.send(body[..3].to_vec()).await.unwrap();
    let is_begun = async || {
        let mut found = Vec::new();
        files(folder.path(), &mut found);
        !found.is_empty()
    };
    eventually("the first is under way", is_begun).await;
    assert_eq!(send(&signed.url, "image/jpeg", &good, &body).await, 429);
    sender.send(body[3..].to_vec()).await.unwrap();
    drop(sender);
    assert_eq!(first.await.unwrap().unwrap().status().as_u16(), 200);
    // As signed, and again: the same bytes.
    assert_eq!(send(&signed.url, "image/jpeg", &good, &body).await, 200);
    assert_eq!(send(&signed.url, "image/jpeg", &good, &body).await, 200);
    assert_eq!(blobs.get(key).await.unwrap(), Some(body.clone()));
    blobs.delete_prefix("incoming/a/").await.unwrap();
    clock.advance(TimeDelta::minutes(15));
    assert_eq!(send(&signed.url, "image/jpeg", &good, &body).await, 403, "expired");
    assert_eq!(blobs.get(key).await.unwrap(), None);
}

#[tokio::test]
async fn what_cannot_be_a_photo_is_not_permitted() {
    let host = Running::start(&[]).await;
    let good = announced(b"x");
    for (field, value, status, code) in [
        ("size_bytes", json!(MAX_UPLOAD_BYTES + 1), 413, "payload_too_large"),
        ("size_bytes", json!(0), 400, "invalid_request"),
        ("size_bytes", json!(-1), 400, "invalid_request"),
        ("content_type", json!("image/heic"), 415, "heic_not_supported"),
        ("content_type", json!("text/html"), 415, "unsupported_media_type"),
        ("content_type", json!("image/png\r\nx: y"), 415, "unsupported_media_type"),
        ("sha256", json!("ff"), 400, "invalid_request"),
        ("sha256", json!("g".repeat(64)), 400, "invalid_request"),
        ("colour", json!("red"), 400, "invalid_request"),
    ] {
        let mut body = good.clone();
        body[field] = value;
        let response = host.http.post(format!("{}/uploads", host.url)).json(&body).send().await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{body}");
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["code"], code, "{body}");
    }
    let in_order = json!([good["content_type"], good["size_bytes"], good["sha256"]]);
    let response = host.http.post(format!("{}/uploads", host.url)).json(&in_order).send().await.unwrap();
    assert_eq!(response.status().as_u16(), 400, "an array of the fields is no object with them");
    for image_key in ["", "incoming", "incoming/x/y/photo", "../../etc/passwd", "models/x/manifest.json"] {
        let response = submit_key(&host.http, &host.url, image_key).await.unwrap();
        assert_eq!(response.status().as_u16(), 404, "{image_key}");
    }
    let both = json!({"image": "eA==", "image_key": "x"});
    let response = host.http.post(format!("{}/submit", host.url)).json(&both).send().await.unwrap();
    assert_eq!(response.status().as_u16(), 400);
}

/// The body of a request to upload `photo`.
pub fn upload_body(photo: &[u8]) -> UploadBody {
    UploadBody { content_type: "image/png".into(), size_bytes: photo.len() as u64, sha256: hex_digest(photo) }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_its_callers_and_makes_one_job() {
    let folder = tempfile::tempdir().unwrap();
    let host = open(folder.path(), Clock::System, &[]).await;
    let (alice, bob) = (Caller("alice".into()), Caller("bob".into()));
    let permit = host.submit.permit(&alice, &upload_body(&mole())).await.unwrap();
    assert!(!permit.image_key.contains("alice"), "who uploads is nobody's business: {}", permit.image_key);
    host.blobs.put(&permit.image_key, mole()).await.unwrap();
    let stolen = host.submit.accept_upload(&bob, None, uploaded(&permit.image_key)).await.unwrap_err();
    assert_eq!(stolen.code(), Code::NotFound);
    // Twenty at once, each under a key of its own.
    let submit = |number: u32| host.submit.accept_upload(&alice, Some(number.to_string()), uploaded(&permit.image_key));
    let answers = futures_util::future::join_all((0..20).map(submit)).await;
    let (accepted, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
    assert_eq!((accepted.len(), refused.len()), (1, 19));
    assert!(
        refused
            .into_iter()
            .all(|error| matches!(error.unwrap_err().code(), Code::IdempotencyConflict | Code::NotFound))
    );
    assert_eq!(host.blobs.list("jobs/", None, 100).await.unwrap().len(), 1, "photos of the refused are gone");
}

/// Sweep leaves what lies there for an hour from now, and then erases it.
async fn assert_erased_after_an_hour(host: &local::Host, clock: &Clock, image_key: &str) {
    clock.advance(TimeDelta::minutes(59));
    host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
    assert!(host.blobs.get(image_key).await.unwrap().is_some());
    clock.advance(TimeDelta::minutes(1));
    host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
    assert_eq!(host.blobs.get(image_key).await.unwrap(), None);
}

#[tokio::test]
async fn what_is_uploaded_once_more_behind_its_submit_is_erased_within_the_hour() {
    let (_folder, clock, host) = standing(&[]).await;
    let caller = Caller("local".into());
    let permit = host.submit.permit(&caller, &upload_body(&mole())).await.unwrap();
    host.blobs.put(&permit.image_key, mole()).await.unwrap();
    host.submit.accept_upload(&caller, None, uploaded(&permit.image_key)).await.unwrap();
    host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
    assert_eq!(host.blobs.get(&permit.image_key).await.unwrap(), None);
    // A client that repeats its PUT, with what the first was signed for.
    host.blobs.put(&permit.image_key, mole()).await.unwrap();
    assert_erased_after_an_hour(&host, &clock, &permit.image_key).await;
}

#[tokio::test]
async fn what_is_uploaded_and_not_submitted_is_erased_after_an_hour() {
    let (_folder, clock, host) = standing(&[("MAX_QUEUED_MB", "1")]).await;
    let caller = Caller("local".into());
    let most = UploadBody { size_bytes: 1_000_000, ..upload_body(&mole()) };
    let permit = host.submit.permit(&caller, &most).await.unwrap();
    host.blobs.put(&permit.image_key, mole()).await.unwrap();
    let refused = host.submit.permit(&caller, &upload_body(&mole())).await.unwrap_err();
    assert_eq!(refused.code(), Code::TooManyRequests, "its room is kept");
    assert_erased_after_an_hour(&host, &clock, &permit.image_key).await;
    let late = host.submit.accept_upload(&caller, None, uploaded(&permit.image_key)).await.unwrap_err();
    assert_eq!(late.code(), Code::IdempotencyConflict);
    host.submit.permit(&caller, &most).await.unwrap();
    // The record goes as well, with what else has expired.
    clock.advance(TimeDelta::hours(1));
    host.sweep.handle(EventBridgeEvent::default()).await.unwrap();
    assert_eq!(host.store.remove_expired(clock.now()).await.unwrap(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_too_much_queued_waits_until_some_of_it_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let host = open(folder.path(), Clock::System, &[("MAX_QUEUED_MB", "1")]).await;
    let caller = Caller("local".into());
    let submit =
        || host.submit.accept(&caller, None, Submission { image: mole(), describe: false, callback_url: None });
    let mut accepted = 0;
    let refused = loop {
        match submit().await {
            Ok(_) => accepted += 1,
            Err(error) => break error,
        }
        assert!(accepted < 1_000, "no end");
    };
    assert_eq!((refused.code(), refused.retry_after_seconds()), (Code::TooManyRequests, Some(30)));
    let stored = host.blobs.list("jobs/", None, 1_000).await.unwrap().len();
    assert_eq!(stored, accepted, "a refused photo is not kept");
    let other = Caller("other".into());
    host.submit.accept(&other, None, Submission { image: mole(), describe: false, callback_url: None }).await.unwrap();
    let (store, submitter) = (host.store.clone(), std::sync::Arc::clone(&host.submit));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(host.run(async { stopped.await.unwrap_or(()) }, |_| {}));
    eventually("all are done", async || {
        use shared::ports::JobStore;
        store.list("local", None, 1_000).await.unwrap().records.iter().all(|job| !job.status.is_open())
    })
    .await;
    submitter.accept(&caller, None, Submission { image: mole(), describe: false, callback_url: None }).await.unwrap();
    drop(stop);
    running.await.unwrap().unwrap();
}

#[tokio::test]
async fn who_has_no_room_left_is_told_over_http_when_to_come_again() {
    let host = Running::start(&[("MAX_QUEUED_MB", "1")]).await;
    // Its room is kept until it comes.
    permit(&host.http, &host.url, &padded(1_000_000)).await.unwrap();
    let upload = host.http.post(format!("{}/uploads", host.url)).json(&announced(&padded(100_000)));
    let photo = host.http.post(format!("{}/submit", host.url)).header("content-type", "image/jpeg");
    for request in [upload, photo.body(padded(100_000))] {
        let refused = request.send().await.unwrap();
        assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (429, &"30".parse().unwrap()));
        let body: Value = refused.json().await.unwrap();
        assert_eq!(body["error"]["code"], "too_many_requests");
    }
}

fn uploaded(image_key: &str) -> ImageKey {
    ImageKey { image_key: image_key.to_owned(), describe: true, callback_url: None }
}
