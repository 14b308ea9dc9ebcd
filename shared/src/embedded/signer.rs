//! Signs what a URL permits, and tells whether a URL was signed here. The key is the host's secret.

use std::collections::BTreeMap;

use axum::http::header;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::error::Error;
use crate::ports::{GetTerms, PresignedPut, PutTerms};

/// S3's name of the header that carries the body's SHA-256.
pub(super) const CHECKSUM: &str = "x-amz-checksum-sha256";

/// Signs the terms of a PUT or a GET.
#[derive(Clone)]
pub(super) struct Signer(Hmac<Sha256>);

impl Signer {
    pub(super) fn new(secret: &[u8]) -> Result<Self, Error> {
        Hmac::new_from_slice(secret).map(Self).map_err(Error::internal)
    }

    pub(super) fn presign_put(&self, key: &str, terms: &PutTerms) -> PresignedPut {
        let signature = self.signature(&put_text(key, terms));
        let expires = terms.expires_at.timestamp();
        let headers = [(header::CONTENT_TYPE.as_str(), &terms.content_type), (CHECKSUM, &terms.checksum_sha256)];
        PresignedPut {
            url: format!("/uploads/{key}?expires={expires}&signature={signature}"),
            headers: BTreeMap::from(headers.map(|(name, value)| (name.to_owned(), value.clone()))),
        }
    }

    /// The type must be one that needs no escaping in a URL, as `image/png`.
    pub(super) fn presign_get(&self, key: &str, terms: &GetTerms) -> String {
        let signature = self.signature(&get_text(key, terms));
        let (content_type, expires) = (&terms.content_type, terms.expires_at.timestamp());
        format!("/downloads/{key}?type={content_type}&expires={expires}&signature={signature}")
    }

    pub(super) fn allows_put(&self, key: &str, terms: &PutTerms, signature: &str) -> bool {
        self.signed(&put_text(key, terms), signature)
    }

    pub(super) fn allows_get(&self, key: &str, terms: &GetTerms, signature: &str) -> bool {
        self.signed(&get_text(key, terms), signature)
    }

    fn signature(&self, text: &str) -> String {
        URL_SAFE_NO_PAD.encode(self.0.clone().chain_update(text).finalize().into_bytes())
    }

    fn signed(&self, text: &str, signature: &str) -> bool {
        let signature = URL_SAFE_NO_PAD.decode(signature);
        signature.is_ok_and(|signature| self.0.clone().chain_update(text).verify_slice(&signature).is_ok())
    }
}

/// Everything that the client may not choose, each part closed by a line feed, which none of them
/// can contain.
fn put_text(key: &str, terms: &PutTerms) -> String {
    let PutTerms { content_type, size_bytes, checksum_sha256, expires_at } = terms;
    let expires = expires_at.timestamp();
    format!("PUT\n{key}\n{content_type}\n{size_bytes}\n{checksum_sha256}\n{expires}\n")
}

fn get_text(key: &str, terms: &GetTerms) -> String {
    let GetTerms { content_type, expires_at } = terms;
    format!("GET\n{key}\n{content_type}\n{}\n", expires_at.timestamp())
}
