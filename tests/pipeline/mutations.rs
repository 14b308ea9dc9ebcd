//! Random damage, from a fixed seed: whatever arrives, nothing panics and nothing is answered 500.

use std::panic::{AssertUnwindSafe, catch_unwind};

use image::{DynamicImage, ImageFormat};
use inference::bundle::Bundle;
use inference::picture;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use shared::clock::Clock;
use shared::message::Message;
use shared::ports::JobStore;
use submit::Submission;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use uuid::Uuid;

use crate::fuzz::targets;
use crate::support::llm_server::LlmServer;
use crate::support::memory::{MIB, is_alone, peak};
use crate::support::{mole, open, root};

const PHOTOS: u32 = 60_000;
/// One photo in so many is a large one.
const LARGE_EVERY: usize = 50;
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

/// Small photos of every kind: the damage is to be met, not the size. The last one is large enough to be read at a
/// quarter.
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
    let large = small.resize_exact(2304, 1728, image::imageops::FilterType::Triangle).to_rgb8();
    let mut bytes = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, 20).encode_image(&large).unwrap();
    photos.push(bytes);
    photos
}

#[test]
fn no_damaged_photo_panics() {
    if !is_alone("mutations::no_damaged_photo_panics") {
        return;
    }
    let photos = photos();
    let [small @ .., large] = &photos[..] else { panic!("no photos") };
    let input = Bundle::from_directory(&root().join("model"), None).unwrap().manifest.input;
    let reduced = picture::decode_for(large, 1, &input).unwrap();
    assert_eq!((reduced.pixels.width(), reduced.side_px), (2304 / 4, 1728));
    let threads = 2;
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let input = &input;
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(thread);
                for round in 0..PHOTOS / threads as u32 {
                    let round = round as usize;
                    // It takes a hundred times as long as a small one.
                    let seed = if round.is_multiple_of(LARGE_EVERY) { large } else { &small[round % small.len()] };
                    let bytes = mutate(&mut random, seed);
                    let work = || match shared::photo::accept(&bytes) {
                        Ok(accepted) => drop(picture::decode_for(&accepted.bytes, accepted.orientation, input)),
                        Err(error) => assert!(error.http_status() < 500, "{error}"),
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
    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let settings = [("LOG_LEVEL", "warn"), ("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")];
    let host = crate::support::Running::start(&settings).await;
    let json = br#"{"image": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg==", "describe": true}"#;
    let mut png = std::io::Cursor::new(Vec::new());
    DynamicImage::new_rgb8(8, 8).write_to(&mut png, ImageFormat::Png).unwrap();
    let form = [
        b"--b\r\nContent-Disposition: form-data; name=\"image\"; filename=\"a.png\"\r\nContent-Type: image/png\r\n\r\n",
        &png.into_inner()[..],
        b"\r\n--b\r\nContent-Disposition: form-data; name=\"describe\"\r\n\r\nfalse\r\n--b--\r\n",
    ]
    .concat();
    let prompt = br#"{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a naevus?"}], "max_tokens": 5, "temperature": 0.5, "format": "json"}"#;
    let key = br#"{"image_key": "incoming/0123456789abcdef/00000000-0000-7000-8000-000000000000/photo", "describe": false, "callback_url": "https://receiver.example/"}"#;
    let upload = br#"{"content_type": "image/jpeg", "size_bytes": 5, "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}"#;
    let chat =
        br#"{"messages": [{"role": "user", "content": "What is a naevus?"}], "temperature": 0, "max_tokens": 5}"#;
    let completion = br#"{"model": "m", "messages": [{"role": "user", "content": "What is a naevus?"}], "stream": true, "stream_options": {"include_usage": false}, "max_tokens": 5}"#;
    let seeds: [(&str, &str, &[u8]); 8] = [
        ("/submit", "application/json", json),
        ("/submit", "multipart/form-data; boundary=b", &form),
        ("/submit", "application/json", prompt),
        ("/submit", "application/json", key),
        ("/uploads", "application/json", upload),
        ("/chat", "application/json", chat),
        ("/v1/chat/completions", "application/json", completion),
        ("/admin/dead-letters/redrive", "application/json", br#"{"ids": ["0123456789abcdef"]}"#),
    ];
    let mut random = SmallRng::seed_from_u64(7);
    let mut statuses = std::collections::BTreeMap::new();
    for round in 0..BODIES {
        let (path, content_type, seed) = seeds[round as usize % seeds.len()];
        let request = host.http.post(format!("{}{path}", host.url)).header("content-type", content_type);
        let response = request.body(mutate(&mut random, seed)).send().await.unwrap();
        *statuses.entry(response.status().as_u16()).or_insert(0) += 1;
        assert!(response.status().as_u16() < 500, "{path}, round {round}: {}", response.status());
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

/// What else comes is left in the queue, until it is a dead letter.
fn is_for_inference(message: Option<Message>) -> bool {
    matches!(message, Some(Message::Infer { .. } | Message::Forget { .. }))
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
    let seeds = [Message::Infer { id }, Message::Forget { id }, Message::Deliver { id }, Message::Answer { id }];
    let seeds = seeds.map(Message::encode);
    let version = async || match host.store.get(id).await.unwrap() {
        Some(record) => record.fence().version,
        None => panic!("the job is gone"),
    };
    let mut random = SmallRng::seed_from_u64(11);
    let mut readable = 0;
    for round in 0..MESSAGES {
        let seed = &seeds[round as usize % seeds.len()];
        let body = String::from_utf8_lossy(&mutate(&mut random, seed.as_bytes())).into_owned();
        let before = version().await;
        let mut message = aws_lambda_events::event::sqs::SqsMessage::default();
        message.message_id = Some("m".to_owned());
        message.receipt_handle = Some("r".to_owned());
        message.body = Some(body.clone());
        let mut event = aws_lambda_events::event::sqs::SqsEvent::default();
        event.records.push(message);
        let response = host.inference.handle(event, clock.now() + chrono::TimeDelta::seconds(60), None).await;
        let about = Message::decode(&body).ok();
        readable += u32::from(about.is_some());
        assert_eq!(response.batch_item_failures.len(), usize::from(!is_for_inference(about)), "{body}");
        assert!(about == Some(Message::Infer { id }) || version().await == before, "{body}");
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
