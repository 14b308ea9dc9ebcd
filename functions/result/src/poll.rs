//! Long polling and the headers that spare it.

use std::future::Future;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, header};
use shared::Error;
use shared::clock::Timestamp;
use shared::job::Job;
use tokio::time::Instant;

/// The first pause between two looks at the record; grows by half each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Reads until the job has ended, or is no longer what the client knows, or `wait` is over.
pub(crate) async fn until_settled<F: Future<Output = Result<Job, Error>>>(
    wait: Duration,
    known: Option<&str>,
    read: impl Fn() -> F,
) -> Result<Job, Error> {
    let deadline = Instant::now() + wait;
    let mut pause = FIRST_PAUSE;
    loop {
        let job = read().await?;
        let news = known.is_some_and(|known| !matches(known, &job));
        let left = deadline.saturating_duration_since(Instant::now());
        if !job.status.is_open() || news || left.is_zero() {
            return Ok(job);
        }
        tokio::time::sleep(pause.min(left)).await;
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
}

/// The client's `If-None-Match`.
pub(crate) fn known_version(headers: &HeaderMap) -> Option<String> {
    headers.get(header::IF_NONE_MATCH)?.to_str().ok().map(str::to_owned)
}

/// Whether one of the entity tags in `known` is the job's (RFC 9110, weak comparison).
pub(crate) fn matches(known: &str, job: &Job) -> bool {
    let own = etag(job);
    known.trim() == "*" || known.split(',').any(|tag| tag.trim().trim_start_matches("W/") == own)
}

fn etag(job: &Job) -> String {
    format!("\"{}\"", job.seq())
}

/// `ETag`; while the job is open, `Retry-After`, longer for older jobs; no cache keeps health data.
pub(crate) fn headers(job: &Job, now: Timestamp) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if let Ok(tag) = HeaderValue::from_str(&etag(job)) {
        headers.insert(header::ETAG, tag);
    }
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if job.status.is_open() {
        let seconds = match (now - job.created_at).num_seconds() {
            ..10 => "1",
            10..60 => "3",
            60.. => "10",
        };
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static(seconds));
    }
    headers
}
