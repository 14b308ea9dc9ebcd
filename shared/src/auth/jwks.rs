//! The issuer's public keys, by OIDC discovery, kept in memory.
//!
//! Triggered by a token whose key is not at hand. Reads
//! `{issuer}/.well-known/openid-configuration` and the `jwks_uri` that it names (RFC 8414, RFC 7517).

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use chrono::TimeDelta;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use reqwest::{Client, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::Mutex;

use crate::clock::{Clock, Timestamp};
use crate::error::Error;
use crate::http::is_loopback_authority;

/// After this the keys are fetched again.
const FRESH: TimeDelta = TimeDelta::hours(1);
/// For this long old keys do where no new ones can be fetched.
const KEPT: TimeDelta = TimeDelta::days(1);
/// However many unknown key ids come: one fetch in this time.
const FETCH_INTERVAL: TimeDelta = TimeDelta::seconds(30);
/// For both requests of a fetch together.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BODY_BYTES: usize = 256 * 1024;

const RSA: &[Algorithm] =
    &[Algorithm::RS256, Algorithm::RS384, Algorithm::RS512, Algorithm::PS256, Algorithm::PS384, Algorithm::PS512];

/// A public key and the algorithms that its own type allows.
pub(super) struct Key {
    pub decoding: DecodingKey,
    pub algorithms: Vec<Algorithm>,
}

struct Fetched {
    keys: HashMap<String, Arc<Key>>,
    at: Timestamp,
}

#[derive(Default)]
struct LastFetch {
    at: Option<Timestamp>,
    failed: bool,
}

pub(super) struct Jwks {
    issuer: String,
    client: Client,
    clock: Clock,
    fetched: RwLock<Option<Fetched>>,
    /// Held while fetching: one fetch at a time.
    last: Mutex<LastFetch>,
}

impl Jwks {
    pub(super) fn new(issuer: String, clock: Clock) -> reqwest::Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            // Whoever answers decides who is let in: the issuer itself, no proxy, nobody it points to.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(Self { issuer, client, clock, fetched: RwLock::default(), last: Mutex::default() })
    }

    /// The key of this id; `None` where the issuer has none.
    ///
    /// # Errors
    /// 503 where that cannot be known at the moment.
    pub(super) async fn find(&self, kid: &str) -> Result<Option<Arc<Key>>, Error> {
        if let Some(key) = self.known(kid, FRESH) {
            return Ok(Some(key));
        }
        let mut last = match self.known(kid, KEPT) {
            None => self.last.lock().await,
            // An issuer that hangs must not hold up tokens of a key that is known.
            Some(key) => match self.last.try_lock() {
                Ok(last) => last,
                Err(_) => return Ok(Some(key)),
            },
        };
        // Whoever waited may find it fetched.
        if let Some(key) = self.known(kid, FRESH) {
            return Ok(Some(key));
        }
        let now = self.clock.now();
        if last.at.is_none_or(|at| (now - at).abs() >= FETCH_INTERVAL) {
            // Before the fetch: a client that hangs up in the middle of it must not cause the next one.
            *last = LastFetch { at: Some(now), failed: true };
            match tokio::time::timeout(FETCH_TIMEOUT, self.fetch()).await.unwrap_or(Err("timeout")) {
                Ok(keys) => {
                    *self.fetched.write().unwrap_or_else(PoisonError::into_inner) = Some(Fetched { keys, at: now });
                    last.failed = false;
                }
                Err(reason) => {
                    tracing::warn!(error.code = "jwks_unavailable", auth.reason = reason, "issuer's keys not fetched");
                }
            }
        }
        match self.known(kid, KEPT) {
            None if last.failed => {
                let wait = last.at.map_or(FETCH_INTERVAL, |at| FETCH_INTERVAL - (now - at));
                let seconds = wait.num_seconds().clamp(1, FETCH_INTERVAL.num_seconds());
                let error = Error::unavailable("the issuer of the tokens", "its keys could not be fetched");
                Err(error.retry_after(u32::try_from(seconds).unwrap_or(30)))
            }
            known => Ok(known),
        }
    }

    fn known(&self, kid: &str, max_age: TimeDelta) -> Option<Arc<Key>> {
        let fetched = self.fetched.read().unwrap_or_else(PoisonError::into_inner);
        let fetched = fetched.as_ref()?;
        // A clock that was set back makes keys old, not young.
        let is_young = (self.clock.now() - fetched.at).abs() < max_age;
        fetched.keys.get(kid).filter(|_| is_young).cloned()
    }

    async fn fetch(&self) -> Result<HashMap<String, Arc<Key>>, &'static str> {
        #[derive(Deserialize)]
        struct Discovery {
            issuer: String,
            jwks_uri: String,
        }
        #[derive(Deserialize)]
        struct Set {
            // One key of a kind that this build does not know must not spoil the others.
            keys: Vec<serde_json::Value>,
        }
        let address = format!("{}/.well-known/openid-configuration", self.issuer.trim_end_matches('/'));
        let discovery: Discovery = self.get(&address).await?;
        if discovery.issuer != self.issuer {
            return Err("another_issuer");
        }
        let set: Set = self.get(&discovery.jwks_uri).await?;
        let keys: HashMap<_, _> = set.keys.into_iter().filter_map(usable).collect();
        if keys.is_empty() { Err("no_usable_key") } else { Ok(keys) }
    }

    async fn get<T: DeserializeOwned>(&self, address: &str) -> Result<T, &'static str> {
        let url = trusted_url(address).ok_or("address_not_https")?;
        let mut response = self.client.get(url).send().await.map_err(|_| "unreachable")?;
        if response.status() != reqwest::StatusCode::OK {
            return Err("status");
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|_| "cut_off")? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MAX_BODY_BYTES {
                return Err("too_large");
            }
        }
        serde_json::from_slice(&bytes).map_err(|_| "not_understood")
    }
}

/// An address whose answer can be trusted: https, or http to this machine.
pub(super) fn trusted_url(address: &str) -> Option<Url> {
    let url: Url = address.parse().ok()?;
    let is_trusted = match url.scheme() {
        "https" => true,
        "http" => url.host_str().is_some_and(is_loopback_authority),
        _ => false,
    };
    is_trusted.then_some(url)
}

/// A key for signatures, with its id and what it may be used with.
fn usable(json: serde_json::Value) -> Option<(String, Arc<Key>)> {
    let jwk: Jwk = serde_json::from_value(json).ok()?;
    if jwk.common.public_key_use.as_ref().is_some_and(|purpose| *purpose != PublicKeyUse::Signature) {
        return None;
    }
    let mut algorithms = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => RSA.to_vec(),
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => vec![Algorithm::ES256],
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P384 => vec![Algorithm::ES384],
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => vec![Algorithm::EdDSA],
        _ => return None,
    };
    if let Some(named) = jwk.common.key_algorithm {
        algorithms.retain(|algorithm| named.to_string() == format!("{algorithm:?}"));
    }
    let key = Key { decoding: DecodingKey::from_jwk(&jwk).ok()?, algorithms };
    jwk.common.key_id.map(|id| (id, Arc::new(key)))
}
