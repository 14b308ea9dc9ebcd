//! Blobs in S3.

use std::pin::pin;

use aws_config::SdkConfig;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::get_object::{GetObjectError, GetObjectOutput};
use aws_sdk_s3::presigning::PresigningConfig;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use futures_util::stream::{self, StreamExt};

use crate::clock::{Clock, Timestamp};
use crate::error::Error;
use crate::ports::{BlobStore, GetTerms, PresignedPut, PutTerms};

const WHAT: &str = "the photo store";
/// What one request fetches: a model comes in many, a few at a time, as one alone is slow.
const PIECE: u64 = 8 * 1024 * 1024;
const AT_ONCE: usize = 8;
/// The most keys that one request deletes.
const DELETE_BATCH: i32 = 1000;

/// Blobs in one bucket.
#[derive(Debug, Clone)]
pub struct S3BlobStore {
    client: Client,
    bucket: String,
    clock: Clock,
}

impl S3BlobStore {
    /// `path_style` for an emulator whose buckets have no names of their own.
    #[must_use]
    pub fn new(config: &SdkConfig, bucket: String, path_style: bool, clock: Clock) -> Self {
        let config = aws_sdk_s3::config::Builder::from(config).force_path_style(path_style).build();
        Self { client: Client::from_conf(config), bucket, clock }
    }

    fn until(&self, expires_at: Timestamp) -> Result<PresigningConfig, Error> {
        let ttl = (expires_at - self.clock.now()).to_std().map_err(Error::internal)?;
        PresigningConfig::expires_in(ttl).map_err(Error::internal)
    }

    /// The piece that begins at `start`.
    async fn range(
        &self,
        key: &str,
        start: u64,
        etag: Option<&str>,
    ) -> Result<GetObjectOutput, SdkError<GetObjectError, HttpResponse>> {
        let get = self.client.get_object().bucket(&self.bucket).key(key).set_if_match(etag.map(str::to_owned));
        get.range(format!("bytes={start}-{}", start + PIECE - 1)).send().await
    }

    /// Deletes one blob; one that is not there is deleted already.
    ///
    /// # Errors
    /// Where S3 cannot be reached.
    pub async fn delete(&self, key: &str) -> Result<(), Error> {
        let delete = self.client.delete_object().bucket(&self.bucket).key(key);
        delete.send().await.map(|_| ()).map_err(unavailable)
    }

    /// One page of the keys under `prefix`.
    async fn keys(&self, prefix: &str) -> Result<Vec<String>, Error> {
        let page = self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix).max_keys(DELETE_BATCH);
        let page = page.send().await.map_err(unavailable)?;
        Ok(page.contents().iter().filter_map(|object| object.key().map(str::to_owned)).collect())
    }
}

impl BlobStore for S3BlobStore {
    async fn presign_put(&self, key: &str, terms: &PutTerms) -> Result<PresignedPut, Error> {
        let put = self.client.put_object().bucket(&self.bucket).key(key);
        let put = put
            .content_type(&terms.content_type)
            .content_length(i64::try_from(terms.size_bytes).map_err(Error::internal)?)
            // Its own header, which the bucket's CORS lets pages send; another would name the algorithm.
            .checksum_sha256(&terms.checksum_sha256);
        let signed = put.presigned(self.until(terms.expires_at)?).await.map_err(unavailable)?;
        let headers = signed.headers().filter(|(name, _)| !name.eq_ignore_ascii_case("content-length"));
        Ok(PresignedPut {
            url: signed.uri().to_owned(),
            headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        })
    }

    async fn presign_get(&self, key: &str, terms: &GetTerms) -> Result<String, Error> {
        let get = self.client.get_object().bucket(&self.bucket).key(key);
        // Blobs are put without a type.
        let get = get.response_content_type(&terms.content_type).response_cache_control("no-store");
        let signed = get.presigned(self.until(terms.expires_at)?).await.map_err(unavailable)?;
        Ok(signed.uri().to_owned())
    }

    async fn put(&self, key: &str, bytes: Vec<u8>) -> Result<(), Error> {
        let put = self.client.put_object().bucket(&self.bucket).key(key).body(ByteStream::from(bytes));
        put.send().await.map(|_| ()).map_err(unavailable)
    }

    async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        let first = match self.range(key, 0, None).await {
            Ok(first) => first,
            Err(SdkError::ServiceError(error)) if error.err().is_no_such_key() => return Ok(None),
            // Nothing has no first piece.
            Err(SdkError::ServiceError(error)) if error.err().code() == Some("InvalidRange") => {
                return Ok(Some(vec![]));
            }
            Err(error) => return Err(unavailable(error)),
        };
        let total = first.content_range().and_then(|range| range.rsplit_once('/')?.1.parse().ok());
        let total: u64 = total.ok_or_else(|| Error::unavailable(WHAT, "a piece without its place"))?;
        let etag = first.e_tag().map(str::to_owned);
        let mut bytes = Vec::with_capacity(usize::try_from(total).map_err(Error::internal)?);
        bytes.extend_from_slice(&first.body.collect().await.map_err(unavailable)?.into_bytes());
        let piece = async |start: u64| {
            // Of the same object: it may have been replaced meanwhile.
            let piece = self.range(key, start, etag.as_deref()).await.map_err(unavailable)?;
            piece.body.collect().await.map_err(unavailable)
        };
        let starts = (1..total.div_ceil(PIECE)).map(|number| piece(number * PIECE));
        let mut pieces = pin!(stream::iter(starts).buffered(AT_ONCE));
        while let Some(piece) = pieces.next().await {
            bytes.extend_from_slice(&piece?.into_bytes());
        }
        if bytes.len() as u64 == total { Ok(Some(bytes)) } else { Err(Error::unavailable(WHAT, "a blob came short")) }
    }

    async fn delete_prefix(&self, prefix: &str) -> Result<(), Error> {
        loop {
            let keys = self.keys(prefix).await?;
            if keys.is_empty() {
                return Ok(());
            }
            let objects = keys.into_iter().map(|key| ObjectIdentifier::builder().key(key).build());
            let objects = objects.collect::<Result<Vec<_>, _>>().map_err(Error::internal)?;
            let delete = Delete::builder().set_objects(Some(objects)).quiet(true).build().map_err(Error::internal)?;
            let deleted = self.client.delete_objects().bucket(&self.bucket).delete(delete).send().await;
            // A key that could not be deleted would come with the next page for ever.
            if let Some(error) = deleted.map_err(unavailable)?.errors().first() {
                return Err(Error::unavailable(WHAT, error.code().unwrap_or("not deleted").to_owned()));
            }
        }
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: u32) -> Result<Vec<String>, Error> {
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let page = self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix).delimiter("/").max_keys(limit);
        // Behind everything that begins with the name: `0` is what follows `/`.
        let page = page.set_start_after(after.map(|after| format!("{prefix}{after}0")));
        let page = page.send().await.map_err(unavailable)?;
        let names = page.common_prefixes().iter().filter_map(|common| common.prefix()?.strip_prefix(prefix));
        Ok(names.map(|name| name.trim_end_matches('/').to_owned()).collect())
    }
}

fn unavailable(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::unavailable(WHAT, error)
}
