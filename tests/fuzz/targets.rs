//! What a fuzzer, or a test that replays its corpus, does with some bytes: one function a target.
//!
//! Each hands the bytes to the product where they would come from outside, and holds what comes
//! back against what was promised. It panics where a promise is broken. Reads and writes nothing.

use std::net::IpAddr;
use std::sync::LazyLock;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Request, Uri, header};
use enrichment::guard;
use inference::manifest::{Element, Input, Layout, Manifest, Resize};
use inference::quality::Thresholds;
use inference::{gate, jpeg as walk, picture};
use shared::llm::sse::{Event, Parser};
use shared::message::Message;
use shared::photo::{Accepted, accept};
use submit::body::Asked;

/// A target: some bytes go in, a panic comes out where a promise is broken.
pub type Target = fn(&[u8]);

/// Every target, under the name of its folder in `corpus/`.
pub const TARGETS: [(&str, Target); 8] = [
    ("address", address),
    ("body", body),
    ("explanation", explanation),
    ("jpeg", jpeg),
    ("manifest", manifest),
    ("message", message),
    ("photo", photo),
    ("sse", sse),
];

/// Larger pictures are decoded as smaller ones are, and slowly.
const MAX_PIXELS: u32 = 1 << 18;

/// From a received photo to the network's input.
pub fn photo(data: &[u8]) {
    let accepted = match accept(data) {
        Ok(accepted) => accepted,
        Err(error) => {
            assert!(matches!(error.http_status(), 413 | 415 | 422), "{error}");
            return;
        }
    };
    assert!((1..=8).contains(&accepted.orientation));
    // What was stripped has nothing left to strip.
    let again = accept(&accepted.bytes).expect("a stripped photo is a photo");
    assert_eq!(again.bytes, accepted.bytes);
    assert_eq!((again.width, again.height, again.orientation), (accepted.width, accepted.height, 1));
    if accepted.width.saturating_mul(accepted.height) <= MAX_PIXELS {
        pixels(&accepted);
    }
}

fn pixels(accepted: &Accepted) {
    let Ok(picture) = picture::decode(&accepted.bytes, accepted.orientation) else { return };
    let (mut sides, mut upright) = ([accepted.width, accepted.height], [picture.width(), picture.height()]);
    sides.sort_unstable();
    upright.sort_unstable();
    assert_eq!(sides, upright);
    let thresholds = Thresholds {
        min_side_px: 32,
        min_sharpness: 0.4,
        min_brightness: 40.0,
        max_brightness: 250.0,
        min_contrast: 20.0,
    };
    let quality = gate(&picture, upright[0], &thresholds).expect("a decoded picture can be measured");
    assert!(quality.measures.values().all(|measure| measure.is_finite()), "{:?}", quality.measures);
    picture::tensor(&picture, &input()).expect("a decoded picture can be resized");
    if let Ok(Some(quarter)) = walk::check_and_reduce(&accepted.bytes, walk::Least { longer: 1, shorter: 1 }) {
        let mut quarters = [quarter.pixels.width(), quarter.pixels.height()];
        quarters.sort_unstable();
        assert_eq!((quarters, quarter.side_px), (sides.map(|side| side / 4), sides[0]));
    }
}

fn input() -> Input {
    Input {
        name: "input".to_owned(),
        layout: Layout::Nchw,
        element: Element::Float32,
        width: 16,
        height: 16,
        resize: Resize::Bilinear,
        scale: 1.0 / 255.0,
        mean: [0.5; 3],
        std: [0.25; 3],
    }
}

/// What the walk over a JPEG's codes lets through, the decoder takes.
pub fn jpeg(data: &[u8]) {
    // The walk's memory is bounded by the frame header: the dimensions come first, as in the pipeline.
    let Ok(accepted) = accept(data) else { return };
    if accepted.width.saturating_mul(accepted.height) > MAX_PIXELS || walk::check(&accepted.bytes).is_err() {
        return;
    }
    if let Ok(picture) = picture::decode(&accepted.bytes, 1) {
        assert_eq!(picture.dimensions(), (accepted.width, accepted.height));
    }
}

/// A body of submit: a line with the content type, a line with the query, a byte with the length
/// of the pieces in which it arrives, and the body.
pub fn body(data: &[u8]) {
    let mut parts = data.splitn(3, |byte| *byte == b'\n');
    let (Some(content_type), Some(query), Some([step, body @ ..])) = (parts.next(), parts.next(), parts.next()) else {
        return;
    };
    let uri = format!("/submit?{}", String::from_utf8_lossy(query));
    let Ok(mut request) = Request::post(uri).body(pieces(body, usize::from(*step) + 1)) else { return };
    let Ok(content_type) = HeaderValue::from_bytes(content_type) else { return };
    request.headers_mut().insert(header::CONTENT_TYPE, content_type);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    match runtime.block_on(submit::body::read(request)) {
        Ok(Asked::Photo(photo)) => assert!(!photo.image.is_empty() && photo.image.len() <= body.len()),
        Ok(Asked::Upload(upload)) => assert!(upload.image_key.len() <= body.len()),
        Ok(Asked::Prompt { request: prompt, .. }) => {
            let size: usize = prompt.messages.iter().map(|message| message.content.len()).sum();
            assert!((1..=body.len()).contains(&size));
        }
        Err(error) => {
            assert!(matches!(error.http_status(), 400 | 413 | 415), "{error}");
            assert!(error.message().len() < 200, "{error}");
        }
    }
}

fn pieces(body: &[u8], length: usize) -> Body {
    let pieces: Vec<_> = body.chunks(length).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
    Body::from_stream(futures_util::stream::iter(pieces))
}

/// A message of the queue.
pub fn message(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    match Message::decode(&text) {
        Ok(message) => assert_eq!(Message::decode(&message.encode()).expect("our own message"), message),
        Err(error) => assert!(error.to_string().len() < 100, "{error}"),
    }
}

/// An LLM's event stream: a byte with the length of the pieces in which it arrives, and the stream.
pub fn sse(data: &[u8]) {
    let [step, stream @ ..] = data else { return };
    let read = |length: usize| -> Vec<Event> {
        let mut parser = Parser::default();
        let pieces = stream.chunks(length);
        pieces.flat_map(|piece| parser.feed(piece).expect("no input is as large as an event may be")).collect()
    };
    let events = read(stream.len().max(1));
    assert_eq!(read(usize::from(*step) + 1), events);
    assert_eq!(read(1), events);
    let mut written = Vec::new();
    events.iter().for_each(|event| event.write(&mut written));
    assert_eq!(Parser::default().feed(&written).expect("no larger than before"), events);
}

/// The model's classes, and words that name them too.
const CLASSES: [(&str, &[&str]); 7] = [
    ("Actinic keratosis or intraepithelial carcinoma", &["actinic", "intraepithelial", "bowen", "squamous"]),
    ("Basal cell carcinoma", &["basal cell"]),
    ("Benign keratosis", &["seborrheic", "seborrhoeic", "lentigo"]),
    ("Dermatofibroma", &["dermatofibroma", "histiocytoma"]),
    ("Melanoma", &["melanoma"]),
    ("Melanocytic naevus", &["naevus", "nevus", "naevi", "nevi"]),
    ("Vascular lesion", &["angioma", "haemangioma", "hemangioma"]),
];

/// The guard's vocabulary, and what it must keep out.
static WORDS: LazyLock<Vec<&str>> = LazyLock::new(|| {
    let vocabulary = include_str!("../../functions/enrichment/src/guard/words.txt").lines();
    let foreign = CLASSES.iter().flat_map(|(name, words)| words.iter().copied().chain(name.split(' ')));
    let others = ["7", "70 %", "two", "ninety", ".", ".", ",", ";", "-", "'s", "\n", "NAME", "I", "\u{e9}", "harmless"];
    vocabulary.chain(foreign).chain(others).collect()
});

/// What an LLM wrote about some of the classes. The first byte says about which; the text that
/// follows is taken as it is, or, where the second byte is odd, as numbers of words.
pub fn explanation(data: &[u8]) {
    let [record, form, text @ ..] = data else { return };
    let text = if form % 2 == 1 { sentence(text, *record) } else { String::from_utf8_lossy(text).into_owned() };
    let (own, foreign): (Vec<_>, Vec<_>) = CLASSES.iter().enumerate().partition(|(place, _)| record >> place & 1 == 1);
    let names: Vec<&str> =
        own.iter().flat_map(|(_, (name, _))| std::iter::once(*name).chain(name.split(" or "))).collect();
    if guard::check(&text, &names).is_err() {
        return;
    }
    assert!(text.is_ascii() && !text.bytes().any(|byte| byte.is_ascii_digit()), "{text:?}");
    let letters: String = text.chars().map(|letter| if letter.is_ascii_alphabetic() { letter } else { ' ' }).collect();
    let words: Vec<String> = letters.split_ascii_whitespace().map(str::to_ascii_lowercase).collect();
    let spoken = format!(" {} ", words.join(" "));
    for (_, (name, others)) in foreign {
        for word in others.iter().map(|word| (*word).to_owned()).chain([name.to_ascii_lowercase()]) {
            assert!(!spoken.contains(&format!(" {word} ")), "{word:?}, about {names:?}: {text:?}");
        }
    }
}

/// Two bytes a word; every fourth is a name of the record, or the fuzzer would seldom write one.
fn sentence(numbers: &[u8], record: u8) -> String {
    let names: Vec<&str> =
        CLASSES.iter().enumerate().filter(|(place, _)| record >> place & 1 == 1).map(|(_, (name, _))| *name).collect();
    let word = |pair: &[u8; 2]| {
        let number = usize::from(u16::from_le_bytes(*pair));
        match names.get(number / 4 % names.len().max(1)) {
            Some(name) if number % 4 == 0 => *name,
            _ => WORDS[number / 4 % WORDS.len()],
        }
    };
    numbers.as_chunks().0.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// A model's manifest, and a picture made as it says.
pub fn manifest(data: &[u8]) {
    let Ok(manifest) = Manifest::parse(data) else { return };
    let written = serde_json::to_vec(&manifest).expect("a manifest can be written");
    let again = Manifest::parse(&written).expect("what was written can be read");
    assert_eq!(again, manifest);
    let sides = manifest.input.width.max(manifest.input.height);
    if sides <= 64 {
        let picture = image::RgbImage::from_fn(9, 7, |x, y| image::Rgb([x as u8 * 20, y as u8 * 30, 128]));
        let tensor = picture::tensor(&picture, &manifest.input).expect("any picture can be resized");
        if let picture::Tensor::Float32(values) = tensor {
            assert!(values.iter().all(|value| value.is_finite()), "{:?}", manifest.input);
        }
        gate(&picture, 7, &manifest.quality).expect("any picture can be measured");
    }
}

/// `Host` and `Origin`, a line each: who is let in as a program of this machine.
pub fn address(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for (name, line) in [header::HOST, header::ORIGIN].into_iter().zip(data.split(|byte| *byte == b'\n')) {
        let Ok(value) = HeaderValue::from_bytes(line) else { return };
        headers.insert(name, value);
    }
    if !shared::http::is_loopback(&headers) {
        return;
    }
    for (name, value) in &headers {
        let text = value.to_str().expect("a loopback name is ASCII").to_ascii_lowercase();
        let origin = text.split_once("://").filter(|_| name == header::ORIGIN);
        let host = origin.map_or(text.as_str(), |(_, host)| host);
        let uri: Uri = format!("http://{host}/").parse().expect("a loopback name is an authority");
        let name = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let is_own = name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        assert!(is_own, "{text:?}");
    }
}
