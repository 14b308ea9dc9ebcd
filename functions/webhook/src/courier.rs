//! One request to a receiver, and to nobody else: the host is one that the operator has named, and the
//! address that is connected to is a public one.
//!
//! A name is resolved here and its addresses are judged before any of them is connected to, so there is no
//! second answer of a name server that could be another. No redirect is followed, no proxy of the
//! environment asked, and no byte of the answer's body read.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use reqwest::{Client, ClientBuilder, redirect};
use secrecy::SecretString;
#[cfg(feature = "aws")]
use shared::aws::Secrets;
use shared::callback::Destinations;
use shared::clock::Timestamp;
use shared::config::{ConfigError, Env};
use shared::error::Error;
use shared::push::Webhook;

use crate::signature::Keyring;

/// From the first look at the name to the answer's status.
const TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The variable, and under which the stage's secret holds the key.
const SECRET_NAME: &str = "WEBHOOK_SECRET";

/// Why a receiver does not have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// `callback_not_allowed`, `callback_unsigned`, `callback_unreachable` or `callback_refused`.
    pub code: &'static str,
    /// For the log; without the URL, which may hold a secret of the receiver's.
    pub cause: String,
    /// What the receiver answered.
    pub status: Option<u16>,
    /// How long it asks to be left alone (`Retry-After`).
    pub retry_after: Option<TimeDelta>,
}

impl Refusal {
    fn of(code: &'static str, cause: impl Into<String>) -> Self {
        Self { code, cause: cause.into(), status: None, retry_after: None }
    }
}

/// Where the key comes from.
enum Key {
    Fixed(Option<SecretString>),
    #[cfg(feature = "aws")]
    Stage(Secrets),
}

/// What sends.
pub struct Courier {
    destinations: Arc<Destinations>,
    client: Client,
    key: Key,
}

impl Courier {
    /// `WEBHOOK_HOSTS`, and `WEBHOOK_SECRET`, which is needed with it. Names are resolved as this machine
    /// resolves them.
    ///
    /// # Errors
    /// [`ConfigError`] where one is not right.
    pub fn from_env(env: &Env) -> Result<Self, ConfigError> {
        let (destinations, secret) = (Destinations::from_env(env)?, env.secret("WEBHOOK_SECRET")?);
        match &secret {
            None if destinations.is_empty() => {}
            None => return Err(ConfigError::new(SECRET_NAME, "is needed with WEBHOOK_HOSTS")),
            Some(secret) if Keyring::read(secret).is_none() => {
                let words = "must be whsec_ and 24 to 64 bytes in base64, or several with spaces between, each \
                    before host= where it is for one receiver alone";
                return Err(ConfigError::new(SECRET_NAME, words));
            }
            Some(_) => {}
        }
        Self::new(destinations, Key::Fixed(secret), System)
    }

    /// As [`Courier::from_env`], with the key of the stage's secret.
    ///
    /// # Errors
    /// As there.
    #[cfg(feature = "aws")]
    pub fn with_secrets(env: &Env, secrets: Secrets) -> Result<Self, ConfigError> {
        Self::new(Destinations::from_env(env)?, Key::Stage(secrets), System)
    }

    fn new(destinations: Destinations, key: Key, names: impl Resolve + 'static) -> Result<Self, ConfigError> {
        Self::over(Client::builder(), destinations, key, names)
    }

    /// `client` says whose certificates are trusted.
    fn over(
        client: ClientBuilder,
        destinations: Destinations,
        key: Key,
        names: impl Resolve + 'static,
    ) -> Result<Self, ConfigError> {
        // Another part of the process may have installed a provider before; either will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let destinations = Arc::new(destinations);
        let guard = Guard { names: Arc::new(names), destinations: Arc::clone(&destinations) };
        let client = client
            .dns_resolver(Arc::new(guard))
            .redirect(redirect::Policy::none())
            .no_proxy()
            .timeout(TIMEOUT)
            .connect_timeout(CONNECT_TIMEOUT)
            // A connection that is kept would be one whose address was judged long ago.
            .pool_max_idle_per_host(0)
            .user_agent(concat!("lesion/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| ConfigError::new("WEBHOOK_HOSTS", error.to_string()))?;
        Ok(Self { destinations, client, key })
    }

    /// Sends a webhook once. Only an answer of 2xx means that the receiver has it.
    ///
    /// # Errors
    /// Where the event cannot be written; inside, why the receiver does not have it.
    pub async fn send(&self, webhook: &Webhook, now: Timestamp) -> Result<Result<(), Refusal>, Error> {
        // Asked again: the operator may have changed the list.
        let url = match self.destinations.check(&webhook.url) {
            Ok(url) => url,
            Err(error) => {
                return Ok(Err(Refusal::of("callback_not_allowed", error.message())));
            }
        };
        let body = webhook.event.to_json()?;
        // Written down as a try that failed, or it would be tried for ever, and be in no record.
        let signature = match self.keys().await {
            Ok(keys) => keys.sign(&url, &webhook.id, now, &body),
            Err(error) => return Ok(Err(Refusal::of("callback_unsigned", error.chain()))),
        };
        let Some(signature) = signature else {
            return Ok(Err(Refusal::of("callback_unsigned", "WEBHOOK_SECRET has no key for this host")));
        };
        let request = self
            .client
            .post(url)
            .header(CONTENT_TYPE, "application/json")
            .header("webhook-id", &webhook.id)
            .header("webhook-timestamp", now.timestamp())
            .header("webhook-signature", signature)
            .body(body);
        Ok(match request.send().await {
            Ok(answer) if answer.status().is_success() => Ok(()),
            Ok(answer) => {
                let status = answer.status().as_u16();
                let (status, retry_after) = (Some(status), retry_after(answer.headers(), now));
                Err(Refusal {
                    status,
                    retry_after,
                    ..Refusal::of("callback_refused", format!("answered {}", answer.status()))
                })
            }
            Err(error) => {
                let error = Error::internal(error.without_url());
                Err(Refusal::of("callback_unreachable", error.chain()))
            }
        })
    }

    async fn keys(&self) -> Result<Keyring, Error> {
        let secret = match &self.key {
            Key::Fixed(secret) => secret.clone(),
            #[cfg(feature = "aws")]
            // Also what was set since this instance began: no receiver says which key it takes.
            Key::Stage(secrets) => secrets.recent(SECRET_NAME).await?,
        };
        let missing = || Error::unavailable("the key of webhooks", "WEBHOOK_SECRET is missing, or no key");
        secret.as_ref().and_then(Keyring::read).ok_or_else(missing)
    }
}

/// Seconds, or a moment of HTTP's.
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<TimeDelta> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => TimeDelta::try_seconds(seconds),
        Err(_) => Some(DateTime::parse_from_rfc2822(text).ok()?.to_utc() - now),
    }
}

/// Names as this machine resolves them.
struct System;

impl Resolve for System {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// Lets through those addresses of a name that may be connected to.
struct Guard<R> {
    names: Arc<R>,
    destinations: Arc<Destinations>,
}

impl<R: Resolve + 'static> Resolve for Guard<R> {
    fn resolve(&self, name: Name) -> Resolving {
        let host = name.as_str().to_owned();
        let (found, destinations) = (self.names.resolve(name), Arc::clone(&self.destinations));
        Box::pin(async move {
            let found = found.await?.filter(|address| destinations.permits(&host, address.ip()));
            let permitted: Vec<SocketAddr> = found.collect();
            if permitted.is_empty() {
                return Err("the host has no public address".into());
            }
            Ok(Box::new(permitted.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;
