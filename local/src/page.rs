//! The page for people (`web/`), as any static host would serve it.
//!
//! Triggered by `GET` of one of its files. Reads what was compiled in, and the limits of the photo gate
//! from the model's manifest; writes nothing. Open to everyone: there is nothing in it but the page.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use inference::bundle::sha256;
use inference::quality::Thresholds;
use serde_json::json;

const JAVASCRIPT: &str = "text/javascript; charset=utf-8";
const JSON: &str = "application/json";

macro_rules! file {
    ($path:literal, $name:literal, $content_type:expr) => {
        ($path, $content_type, include_bytes!(concat!("../../web/", $name)).as_slice())
    };
}

/// Where each file is, its type, and what is in it. `config.json` is not among them: the host writes its own.
const FILES: [(&str, &str, &[u8]); 15] = [
    file!("/", "index.html", "text/html; charset=utf-8"),
    file!("/style.css", "style.css", "text/css; charset=utf-8"),
    file!("/icon.svg", "icon.svg", "image/svg+xml"),
    file!("/en.json", "en.json", JSON),
    file!("/de.json", "de.json", JSON),
    file!("/api.js", "api.js", JAVASCRIPT),
    file!("/app.js", "app.js", JAVASCRIPT),
    file!("/ask.js", "ask.js", JAVASCRIPT),
    file!("/dom.js", "dom.js", JAVASCRIPT),
    file!("/history.js", "history.js", JAVASCRIPT),
    file!("/live.js", "live.js", JAVASCRIPT),
    file!("/photo.js", "photo.js", JAVASCRIPT),
    file!("/quality.js", "quality.js", JAVASCRIPT),
    file!("/result.js", "result.js", JAVASCRIPT),
    file!("/text.js", "text.js", JAVASCRIPT),
];

/// The page's routes. `quality` is what the page warns of before a photo is sent.
///
/// # Errors
/// Where `web/headers.json` is not what it should be.
pub(crate) fn router(quality: &Thresholds) -> anyhow::Result<Router> {
    let headers = Arc::new(headers().context("web/headers.json")?);
    let config = serde_json::to_vec(&json!({"api": "", "quality": quality}))?;
    let files = FILES.into_iter().map(|(path, content_type, bytes)| (path, content_type, bytes.to_vec()));
    let mut router = Router::new();
    for (path, content_type, bytes) in files.chain([("/config.json", JSON, config)]) {
        let mut headers = (*headers).clone();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        // Another version of the host brings another page: ask, and be answered 304 where it is the same.
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert(header::ETAG, HeaderValue::from_str(&format!("\"{}\"", sha256(&bytes)))?);
        let file = Arc::new((headers, bytes));
        router = router.route(path, get(move |asked: HeaderMap| async move { answer(&asked, &file) }));
    }
    Ok(router)
}

/// What every file is answered with; Terraform reads the same file.
fn headers() -> anyhow::Result<HeaderMap> {
    let named: BTreeMap<String, String> = serde_json::from_str(include_str!("../../web/headers.json"))?;
    let mut headers = HeaderMap::new();
    for (name, value) in named {
        headers.insert(HeaderName::try_from(name)?, HeaderValue::from_str(&value)?);
    }
    Ok(headers)
}

fn answer(asked: &HeaderMap, (headers, bytes): &(HeaderMap, Vec<u8>)) -> Response {
    let known = asked.get(header::IF_NONE_MATCH);
    if known.is_some() && known == headers.get(header::ETAG) {
        return (StatusCode::NOT_MODIFIED, headers.clone()).into_response();
    }
    (headers.clone(), bytes.clone()).into_response()
}
