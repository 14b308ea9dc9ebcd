//! Writes the seeds of every target into `corpus/`. Drawn and written here: no photo of anybody.
//!
//! `cargo run -p tests --example fuzz-seeds`; what a fuzzer found lies beside them under the name of
//! its SHA-1.

#![allow(clippy::expect_used)]

use std::io::Cursor;
use std::path::Path;

use image::{DynamicImage, ImageFormat, RgbImage};

fn main() -> std::io::Result<()> {
    photos()?;
    bodies()?;
    streams()?;
    texts()
}

fn write(target: &str, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join(name), bytes)
}

fn encoded(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).expect("a drawn picture can be written");
    bytes.into_inner()
}

/// A little-endian TIFF block: orientation 6, as in EXIF 2.32.
const EXIF: &[u8] = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";

fn photos() -> std::io::Result<()> {
    let pixel = |x: u32, y: u32| image::Rgb([(x * 5) as u8, (y * 7) as u8, ((x * y) % 251) as u8]);
    let drawn = DynamicImage::ImageRgb8(RgbImage::from_fn(24, 16, pixel));
    let kinds = [
        ("rgb", drawn.clone()),
        ("grey", DynamicImage::ImageLuma8(drawn.to_luma8())),
        ("alpha", DynamicImage::ImageRgba8(drawn.to_rgba8())),
        ("deep", DynamicImage::ImageRgb16(drawn.to_rgb16())),
    ];
    for (kind, picture) in &kinds {
        write("photo", &format!("{kind}.png"), &encoded(picture, ImageFormat::Png))?;
    }
    for (kind, picture) in &kinds[..3] {
        write("photo", &format!("{kind}.webp"), &encoded(picture, ImageFormat::WebP))?;
    }
    for (kind, picture) in &kinds[..2] {
        write("photo", &format!("{kind}.jpg"), &encoded(picture, ImageFormat::Jpeg))?;
        write("jpeg", &format!("{kind}.jpg"), &encoded(picture, ImageFormat::Jpeg))?;
    }
    let plain = encoded(&drawn, ImageFormat::Jpeg);
    let exif = [b"\xFF\xE1\0\x22Exif\0\0", EXIF].concat();
    write("photo", "exif.jpg", &[&plain[..2], &exif, b"\xFF\xFE\0\x06text", &plain[2..], b"behind"].concat())?;
    let webp = encoded(&drawn, ImageFormat::WebP);
    let canvas = b"VP8X\x0a\0\0\0\x08\0\0\0\x17\0\0\x0f\0\0";
    let chunk = [b"EXIF\x1a\0\0\0", EXIF].concat();
    let chunks = [b"WEBP", &canvas[..], &webp[12..], &chunk].concat();
    write("photo", "exif.webp", &[b"RIFF", &(chunks.len() as u32).to_le_bytes()[..], &chunks].concat())
}

fn bodies() -> std::io::Result<()> {
    const PNG: &str = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg==";
    let form = "--b\r\nContent-Disposition: form-data; name=\"image\"; filename=\"a.png\"\r\nContent-Type: image/png\r\n\r\n\
        \u{7f}PNG\r\n\r\n--b\r\nContent-Disposition: form-data; name=\"describe\"\r\n\r\nfalse\r\n--b--\r\n";
    // A query is only taken with raw bodies; the letter behind it is the length of the pieces.
    for (name, text) in [
        ("json", format!("application/json\n\n~{{\"image\": \"{PNG}\", \"describe\": true}}")),
        (
            "json-data-url",
            format!("application/json; charset=utf-8\n\n {{\"image\": \"data:image/png;base64,{PNG}\"}}"),
        ),
        ("json-lines", "application/json\n\n\t{\"image\": \"iVBO\\r\\nRw0K\"}".to_owned()),
        ("raw", "image/png\ndescribe=false\n!some bytes".to_owned()),
        ("raw-unnamed", "application/octet-stream\n\n!some bytes".to_owned()),
        ("form", format!("multipart/form-data; boundary=b\n\n\x10{form}")),
        ("form-whole", format!("multipart/form-data; boundary=\"b\"\n\n~{form}")),
        ("prompt", "application/json\n\n~{\"prompt\": \"Hi\", \"system\": \"Be short.\", \"max_tokens\": 7}".to_owned()),
        (
            "messages",
            r#"application/json||~{"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "format": "json"}"#
                .replace("||", "\n\n"),
        ),
        ("other", "text/plain\n\n!words".to_owned()),
    ] {
        write("body", name, text.as_bytes())?;
    }
    Ok(())
}

/// The byte before each stream is the length of the pieces less one.
fn streams() -> std::io::Result<()> {
    let chunk = r#"{"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"naïve"}}]}"#;
    let usage = r#"{"choices":[],"usage":{"prompt_tokens":19,"completion_tokens":10}}"#;
    let plain = format!("data: {chunk}\n\ndata: {usage}\n\ndata: [DONE]\n\n");
    let comments = format!("\u{feff}: ping\n\nevent: error\nid: 1\nretry: 5\ndata: {{\ndata: }}\n\n:\n{plain}");
    for (name, step, bytes) in [
        ("plain", 6, plain.clone().into_bytes()),
        ("crlf", 0, plain.replace('\n', "\r\n").into_bytes()),
        ("cr", 64, plain.replace('\n', "\r").into_bytes()),
        ("comments", 2, comments.into_bytes()),
        ("not-utf-8", 1, b"data: a\xffb\r\rdata: \xf0\x9f\xa9\n\n".to_vec()),
        ("no-done", 16, format!("data: {chunk}\n\ndata: {usage}\n\ndata: [DO").into_bytes()),
    ] {
        write("sse", name, &[&[step], bytes.as_slice()].concat())?;
    }
    Ok(())
}

fn texts() -> std::io::Result<()> {
    let id = "00000000-0000-0000-0000-000000000007";
    for (name, text) in [
        ("infer", format!(r#"{{"version":1,"type":"infer","id":"{id}"}}"#)),
        ("forget", format!(r#"{{"version":1,"type":"forget","id":"{id}"}}"#)),
        ("another-version", format!(r#"{{"version":2,"type":"infer","id":"{id}"}}"#)),
    ] {
        write("message", name, text.as_bytes())?;
    }
    // The first byte names classes by their bits: 0x20 the naevus, 0x24 the keratosis too.
    for (name, head, text) in [
        (
            "honest",
            b"\x20\0",
            "A melanocytic naevus is a growth made of pigment cells. It is often round or oval with an even colour.",
        ),
        ("two", b"\x24\0", "Melanocytic naevi and benign keratoses can both have an even brown colour."),
        ("foreign", b"\x20\0", "A melanocytic naevus is a growth of pigment cells, and so is a melanoma."),
        ("number", b"\x20\0", "A melanocytic naevus is a growth that 7 of ten adults have, with an even colour."),
        ("hyphens", b"\x20\0", "A melanocytic naevus is often well-defined,\ndome-shaped and skin-coloured."),
    ] {
        write("explanation", name, &[head, text.as_bytes()].concat())?;
    }
    let words: Vec<u8> = (0_u16..60).flat_map(|number| (number * 997).to_le_bytes()).collect();
    write("explanation", "words", &[b"\x24\x01", &words[..]].concat())?;
    for (name, text) in [
        ("localhost", "localhost:8080\nhttp://localhost:3000"),
        ("v4", "127.0.0.1:8080"),
        ("v6", "[::1]:8080\nhttp://[::1]"),
        ("rebinding", "127.0.0.1.attacker.example\nhttps://attacker.example"),
    ] {
        write("address", name, text.as_bytes())?;
    }
    let shipped = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/manifest.json"))?;
    let mut small: serde_json::Value = serde_json::from_slice(&shipped)?;
    small["golden"]["pictures"] =
        serde_json::json!([{"name": "a", "png_base64": "", "probabilities": [0.1, 0.9], "ood": 0.5}]);
    small["labels"] = serde_json::json!([
        {"code": "a", "name": "A", "malignant": false},
        {"code": "b", "name": "B", "malignant": true},
    ]);
    small["input"]["width"] = 8.into();
    small["input"]["height"] = 8.into();
    write("manifest", "nchw.json", small.to_string().as_bytes())?;
    small["input"]["layout"] = "nhwc".into();
    small["input"]["type"] = "uint8".into();
    write("manifest", "nhwc.json", small.to_string().as_bytes())
}
