//! What S3 does with a presigned PUT: lets whoever holds the URL put one blob, of exactly the type,
//! length and content that were signed, until the URL expires.
//!
//! Triggered by `PUT /uploads/{key}`. Writes one blob. The signature is the credential: no caller is
//! asked for.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::put;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use super::DirBlobStore;
use super::signer::CHECKSUM;
use crate::clock::{Clock, Timestamp};
use crate::error::{Code, Error};
use crate::ports::PutTerms;

/// The longest that one body may take to arrive.
const TIMEOUT: Duration = Duration::from_secs(15 * 60);

#[derive(Clone)]
struct Uploads {
    blobs: DirBlobStore,
    clock: Clock,
    /// The keys that are being put. What one permit holds on the disk is what was reserved for it, and no more.
    under_way: Arc<Mutex<HashSet<String>>>,
}

/// A put of a key, the only one until it is dropped.
struct Put<'a> {
    key: &'a str,
    under_way: &'a Mutex<HashSet<String>>,
}

impl<'a> Put<'a> {
    fn begin(key: &'a str, under_way: &'a Mutex<HashSet<String>>) -> Option<Self> {
        let is_new = under_way.lock().unwrap_or_else(PoisonError::into_inner).insert(key.to_owned());
        is_new.then_some(Self { key, under_way })
    }
}

impl Drop for Put<'_> {
    fn drop(&mut self) {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(self.key);
    }
}

#[derive(Deserialize)]
struct Signed {
    expires: i64,
    signature: String,
}

/// The route that honours [`BlobStore::presign_put`](crate::ports::BlobStore::presign_put).
pub fn router(blobs: DirBlobStore, clock: Clock) -> Router {
    Router::new().route("/uploads/{*key}", put(upload)).with_state(Uploads { blobs, clock, under_way: Arc::default() })
}

async fn upload(
    State(uploads): State<Uploads>,
    key: Result<Path<String>, PathRejection>,
    signed: Result<Query<Signed>, QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Error> {
    let (Ok(Path(key)), Ok(Query(signed))) = (key, signed) else { return Err(refused()) };
    // As S3: two credentials are one too many, and this one was not meant for here.
    if headers.contains_key(header::AUTHORIZATION) {
        return Err(invalid("An upload is permitted by its URL: send no Authorization header."));
    }
    let terms = terms(&headers, &signed).ok_or_else(refused)?;
    if !uploads.blobs.signer().allows_put(&key, &terms, &signed.signature) || uploads.clock.now() >= terms.expires_at {
        return Err(refused());
    }
    let busy = || Error::too_many_requests("These bytes are arriving already. Try again when that has ended.", 5);
    let _put = Put::begin(&key, &uploads.under_way).ok_or_else(busy)?;
    let received = tokio::time::timeout(TIMEOUT, receive(&uploads.blobs, &key, &terms, body)).await;
    received.map_err(|_| invalid("The body took too long."))??;
    Ok(StatusCode::OK)
}

/// The terms that the client claims, from its own headers.
fn terms(headers: &HeaderMap, signed: &Signed) -> Option<PutTerms> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::to_owned);
    Some(PutTerms {
        content_type: text(header::CONTENT_TYPE.as_str())?,
        size_bytes: text(header::CONTENT_LENGTH.as_str())?.parse().ok()?,
        checksum_sha256: text(CHECKSUM)?,
        expires_at: Timestamp::from_timestamp(signed.expires, 0)?,
    })
}

/// Writes the body as it comes; the blob appears when it is whole and has the signed checksum.
async fn receive(blobs: &DirBlobStore, key: &str, terms: &PutTerms, body: Body) -> Result<(), Error> {
    let unavailable = |error: std::io::Error| Error::unavailable("the photo store", error);
    let temporary = blobs.temporary().await?;
    let mut file = tokio::fs::File::from_std(temporary.reopen().map_err(unavailable)?);
    let (mut hash, mut size) = (Sha256::new(), 0);
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| invalid("The body ended early."))?;
        size += chunk.len() as u64;
        if size > terms.size_bytes {
            return Err(invalid("The body is longer than announced."));
        }
        hash.update(&chunk);
        file.write_all(&chunk).await.map_err(unavailable)?;
    }
    file.flush().await.map_err(unavailable)?;
    if size != terms.size_bytes || STANDARD.encode(hash.finalize()) != terms.checksum_sha256 {
        return Err(invalid("The body is not the one that was announced: its length or SHA-256 differs."));
    }
    blobs.persist(temporary, key).await
}

/// Says as little as S3 about what exactly did not fit.
fn refused() -> Error {
    let message = "The upload is not permitted: the URL has expired, or the request is not the one that was signed. \
                   Send exactly the given headers and the announced number of bytes.";
    Error::new(Code::Forbidden, message)
}

fn invalid(message: &str) -> Error {
    Error::new(Code::InvalidRequest, message)
}
