//! What S3 does with a presigned GET: gives whoever holds the URL one blob until the URL expires.
//!
//! Triggered by `GET /downloads/{key}`. Reads one blob, writes nothing. The signature is the
//! credential: no caller is asked for.

use axum::Router;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;

use super::DirBlobStore;
use crate::clock::{Clock, Timestamp};
use crate::error::{Code, Error};
use crate::ports::{BlobStore, GetTerms};

#[derive(Clone)]
struct Downloads {
    blobs: DirBlobStore,
    clock: Clock,
}

#[derive(Deserialize)]
struct Signed {
    #[serde(rename = "type")]
    content_type: String,
    expires: i64,
    signature: String,
}

/// The route that honours [`BlobStore::presign_get`].
pub fn router(blobs: DirBlobStore, clock: Clock) -> Router {
    Router::new().route("/downloads/{*key}", get(download)).with_state(Downloads { blobs, clock })
}

async fn download(
    State(downloads): State<Downloads>,
    key: Result<Path<String>, PathRejection>,
    signed: Result<Query<Signed>, QueryRejection>,
) -> Result<Response, Error> {
    let (Ok(Path(key)), Ok(Query(signed))) = (key, signed) else { return Err(refused()) };
    let expires_at = Timestamp::from_timestamp(signed.expires, 0).ok_or_else(refused)?;
    let terms = GetTerms { content_type: signed.content_type, expires_at };
    if !downloads.blobs.signer().allows_get(&key, &terms, &signed.signature) || downloads.clock.now() >= expires_at {
        return Err(refused());
    }
    // Deleted or expired since the URL was signed.
    let bytes = downloads.blobs.get(&key).await?.ok_or_else(Error::not_found)?;
    let headers = [(header::CONTENT_TYPE, terms.content_type.as_str()), (header::CACHE_CONTROL, "no-store")];
    Ok((headers, bytes).into_response())
}

fn refused() -> Error {
    let message = "The link has expired or is not the one that was signed. Get the result again for a new one.";
    Error::new(Code::Forbidden, message)
}
