//! Random damage, from a fixed seed: whatever arrives, nothing panics and nothing is answered 500.

use std::panic::{AssertUnwindSafe, catch_unwind};

use image::{DynamicImage, ImageFormat};
use inference::picture;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use shared::clock::Clock;
use shared::message::Message;
use submit::Submission;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::fuzz::targets;
use crate::support::memory::{MIB, is_alone, peak};
use crate::support::{mole, open, root};

const PHOTOS: u32 = 60_000;
const BODIES: u32 = 20_000;
const MESSAGES: u32 = 20_000;
const STREAMS: u32 = 20_000;

/// Requests whose address and headers are damaged.
const HEADS: u32 = 10_000;
/// What the work on any of these may hold, this test and its host included; docs/ARCHITECTURE.md
/// names it.
const CAP: u64 = 160 * MIB;

fn assert_peak() {
    let peak = peak("self");
    println!("peak {} MiB", peak / MIB);
    assert!(peak <= CAP, "{} MiB", peak / MIB);
}

/// Flips, overwrites, cuts, doubles or drops some bytes.
fn mutate(random: &mut SmallRng, seed: &[u8]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..random.random_range(1..=6) {
        if bytes.is_empty() {
            return bytes;
        }
        let at = random.random_range(0..bytes.len());
        let end = (at + random.random_range(1..=16)).min(bytes.len());
        match random.random_range(0..8) {
            // Headers are short and matter most.
            0 | 1 => {
                let at = random.random_range(0..bytes.len().min(200));
                bytes[at] = random.random();
            }
            2 => bytes[at] ^= 1 << random.random_range(0..8),
            3 => bytes[at..end].fill(*[0, 0xFF, 0x7F, 0x80].get(random.random_range(0..4)).unwrap()),
            4 => bytes.truncate(at),
            5 => drop(bytes.drain(at..end)),
            6 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            _ => bytes[at..end].iter_mut().for_each(|byte| *byte = random.random()),
        }
    }
    bytes
}

/// Small photos of every kind: the damage is to be met, not the size.
fn photos() -> Vec<Vec<u8>> {
    let small = image::load_from_memory(&mole()).unwrap().thumbnail(48, 36);
    let kinds = [small.clone(), DynamicImage::ImageLuma8(small.to_luma8()), DynamicImage::ImageRgba8(small.to_rgba8())];
    let formats = [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP];
    let mut photos = Vec::new();
    for (kind, format) in kinds.iter().flat_map(|kind| formats.map(|format| (kind, format))) {
        let mut bytes = std::io::Cursor::new(Vec::new());
        // JPEG has no alpha.
        if kind.write_to(&mut bytes, format).is_ok() {
            photos.push(bytes.into_inner());
        }
    }
    photos
}

#[test]
fn no_damaged_photo_panics() {
    if !is_alone("mutations::no_damaged_photo_panics") {
        return;
    }
    let photos = photos();
    let threads = 2;
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let photos = &photos;
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(thread);
                for round in 0..PHOTOS / threads as u32 {
                    let bytes = mutate(&mut random, &photos[round as usize % photos.len()]);
                    let work = || {
                        let Ok(accepted) = shared::photo::accept(&bytes) else { return };
                        let _ = picture::decode(&accepted.bytes, accepted.orientation);
                    };
                    if catch_unwind(AssertUnwindSafe(work)).is_err() {
                        let file = std::env::temp_dir().join(format!("panics-{thread}-{round}"));
                        std::fs::write(&file, &bytes).unwrap();
                        panic!("seed {thread}, round {round}: kept as {}", file.display());
                    }
                }
            });
        }
    });
    assert_peak();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_damaged_body_is_answered_500() {
    if !is_alone("mutations::no_damaged_body_is_answered_500") {
        return;
    }
    let host = crate::support::Running::start(&[("LOG_LEVEL", "warn")]).await;
    let address = host.url.strip_prefix("http://").unwrap().to_owned();
    let json = br#"{"image": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg==", "describe": true}"#;
    let form = b"--b\r\nContent-Disposition: form-data; name=\"image\"; filename=\"a.png\"\r\nContent-Type: image/png\r\n\r\n\x89PNG\r\n\r\n--b\r\nContent-Disposition: form-data; name=\"describe\"\r\n\r\nfalse\r\n--b--\r\n";
    let seeds: [(&str, &[u8]); 2] = [("application/json", json), ("multipart/form-data; boundary=b", form)];
    let mut random = SmallRng::seed_from_u64(7);
    let mut statuses = std::collections::BTreeMap::new();
    for round in 0..BODIES {
        let (content_type, seed) = seeds[round as usize % 2];
        let request = host.http.post(format!("http://{address}/submit")).header("content-type", content_type);
        let response = request.body(mutate(&mut random, seed)).send().await.unwrap();
        *statuses.entry(response.status().as_u16()).or_insert(0) += 1;
        assert!(response.status().as_u16() < 500, "round {round}: {}", response.status());
    }
    println!("{statuses:?}");
    assert_peak();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_damaged_address_or_header_is_answered_500() {
    if !is_alone("mutations::no_damaged_address_or_header_is_answered_500") {
        return;
    }
    let host = crate::support::Running::start(&[("LOG_LEVEL", "warn")]).await;
    let id = host.submit(&mole()).await;
    host.ended(&id).await;
    let address = host.url.strip_prefix("http://").unwrap();
    let end = "Host: localhost\r\nConnection: close\r\n\r\n";
    let seeds = [
        format!("GET /result/{id}?wait=0 HTTP/1.1\r\nIf-None-Match: W/\"3\", \"4\"\r\n{end}"),
        format!("GET /result?request_id={id}&wait=0 HTTP/1.1\r\nIf-None-Match: *\r\n{end}"),
        format!("GET /results?limit=2&cursor={id} HTTP/1.1\r\nOrigin: http://localhost\r\n{end}"),
        format!(
            "POST /submit?describe=false HTTP/1.1\r\nIdempotency-Key: k\r\nContent-Type: image/png\r\nContent-Length: 4\r\n{end}\u{7f}PNG"
        ),
    ];
    let mut random = SmallRng::seed_from_u64(13);
    let mut statuses = std::collections::BTreeMap::new();
    for round in 0..HEADS {
        let request = mutate(&mut random, seeds[round as usize % seeds.len()].as_bytes());
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut answer = Vec::new();
        // The host may hang up before it has heard everything.
        let _ = stream.write_all(&request).await;
        let _ = stream.shutdown().await;
        let _ = stream.read_to_end(&mut answer).await;
        let line = String::from_utf8_lossy(&answer);
        let status: u16 = line.split_whitespace().nth(1).map_or(0, |status| status.parse().unwrap());
        *statuses.entry(status).or_insert(0) += 1;
        assert!(status < 500, "round {round}: {line}");
    }
    println!("{statuses:?}");
    assert_peak();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_damaged_message_stops_the_queue_or_touches_a_job() {
    if !is_alone("mutations::no_damaged_message_stops_the_queue_or_touches_a_job") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let clock = Clock::manual(chrono::Utc::now());
    let host = open(folder.path(), clock.clone(), &[]).await;
    let caller = shared::http::Caller("local".into());
    let id: Uuid = host
        .submit
        .accept(&caller, None, Submission { image: mole(), describe: true, callback_url: None })
        .await
        .unwrap();
    let seed = Message::Infer { id }.encode();
    let mut random = SmallRng::seed_from_u64(11);
    let mut readable = 0;
    for _ in 0..MESSAGES {
        let body = String::from_utf8_lossy(&mutate(&mut random, seed.as_bytes())).into_owned();
        let mut message = aws_lambda_events::event::sqs::SqsMessage::default();
        message.message_id = Some("m".to_owned());
        message.receipt_handle = Some("r".to_owned());
        message.body = Some(body.clone());
        let mut event = aws_lambda_events::event::sqs::SqsEvent::default();
        event.records.push(message);
        let response = host.inference.handle(event, clock.now() + chrono::TimeDelta::seconds(60)).await;
        let is_readable = Message::decode(&body).is_ok();
        readable += u32::from(is_readable);
        assert_eq!(response.batch_item_failures.len(), usize::from(!is_readable), "{body}");
    }
    println!("{readable} of {MESSAGES} were still readable");
    assert_peak();
}

#[test]
fn no_damaged_event_stream_is_read_in_two_ways() {
    let folder = root().join("tests/fuzz/corpus/sse");
    let seeds: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    let seeds: Vec<_> = seeds.iter().map(|seed| std::fs::read(seed).unwrap()).collect();
    let mut random = SmallRng::seed_from_u64(17);
    for round in 0..STREAMS {
        let stream = mutate(&mut random, &seeds[round as usize % seeds.len()]);
        assert!(catch_unwind(|| targets::sse(&stream)).is_ok(), "round {round}: {stream:?}");
    }
}
