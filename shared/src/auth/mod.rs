//! Who is calling, on all routes and both hosts: an API key, a token of the issuer, or (where the
//! host admits them) nobody in particular.
//!
//! Triggered by every request to a route behind [`authenticate`]. Reads `Authorization`, the key
//! store and the issuer's keys. Writes the caller's count of requests.

mod jwks;
mod jwt;
pub mod keys;
mod signature;
pub mod tickets;

use std::sync::Arc;

use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use serde::{Deserialize, Serialize};

use crate::api::admin::{KeyLimits, Scope};
use crate::clock::{Clock, Timestamp};
use crate::config::{ConfigError, Env};
use crate::error::{Code, Error};
use crate::ports::Callers;

pub use jwt::Tokens;

/// The one caller of a host without keys, and the caller of its first key.
pub const LOCAL: &str = "local";
/// The one caller that all requests without credentials are, where they are admitted.
pub const GUEST: &str = "guest";

/// Above what any issuer sends: a longer one is not looked at.
const MAX_CREDENTIAL_BYTES: usize = 8 * 1024;
/// How long a window of the request count is.
pub(crate) const WINDOW_SECONDS: i64 = 60;

/// Who sent a request, and what for they may.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    pub caller: String,
    pub scopes: Vec<Scope>,
    /// Absent for a token, a guest, and on a host without keys.
    pub key_id: Option<String>,
    /// The key's.
    pub limits: KeyLimits,
    /// The token's end; a key is looked up anew.
    #[serde(default)]
    pub expires_at: Option<Timestamp>,
}

impl Identity {
    /// The identity that [`authenticate`] has put into a request, if it may do this.
    ///
    /// # Errors
    /// 401 where there is none, 403 where it lacks the scope.
    pub(crate) fn of(extensions: &Extensions, scope: Scope) -> Result<&Self, Error> {
        let missing = || Error::new(Code::Unauthorized, "Send an API key or a token: Authorization: Bearer ….");
        let identity = extensions.get::<Self>().ok_or_else(missing)?;
        if identity.scopes.contains(&scope) {
            return Ok(identity);
        }
        Err(Error::new(Code::Forbidden, format!("These credentials do not have the scope \"{}\".", scope.as_str())))
    }

    /// For what asks an LLM without a look at the limits of keys.
    ///
    /// # Errors
    /// 403 for a key that has some.
    pub fn without_limits(&self) -> Result<(), Error> {
        if self.limits == KeyLimits::default() {
            return Ok(());
        }
        Err(Error::new(Code::Forbidden, "This key has limits, which are kept at /v1/chat/completions alone."))
    }

    fn with_jobs(caller: String) -> Self {
        Self { caller, scopes: vec![Scope::Jobs], key_id: None, limits: KeyLimits::default(), expires_at: None }
    }
}

/// A caller with the scope `admin`.
#[derive(Debug, Clone)]
pub struct Admin(pub Identity);

impl<S: Send + Sync> FromRequestParts<S> for Admin {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        Identity::of(&parts.extensions, Scope::Admin).cloned().map(Self)
    }
}

/// What callers may do in a minute, and whether guests may come.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// `REQUESTS_PER_MINUTE`, for each caller.
    pub requests_per_minute: u32,
    /// `GUEST_REQUESTS_PER_MINUTE`, for all guests together.
    pub guest_requests_per_minute: u32,
    /// `ADMIT_GUESTS`: requests without credentials are the caller [`GUEST`].
    pub admit_guests: bool,
}

impl Limits {
    /// # Errors
    /// [`ConfigError`] where a variable does not parse.
    pub fn from_env(env: &Env) -> Result<Self, ConfigError> {
        Ok(Self {
            requests_per_minute: env.number("REQUESTS_PER_MINUTE", 600, 1, 1_000_000)?,
            guest_requests_per_minute: env.number("GUEST_REQUESTS_PER_MINUTE", 60, 1, 1_000_000)?,
            admit_guests: env.flag("ADMIT_GUESTS")?,
        })
    }
}

/// Who is let in; chosen at start, for the life of the host.
pub enum Access<C> {
    /// No key was ever made: everyone who reaches the host is [`LOCAL`]. It must then listen on
    /// loopback only and look at `Host` and `Origin`.
    Keyless,
    /// Credentials are demanded.
    Checked(Box<Checks<C>>),
}

/// What credentials are checked with.
pub struct Checks<C> {
    pub callers: C,
    /// Absent where no issuer is set.
    pub tokens: Option<Tokens>,
    pub limits: Limits,
    pub clock: Clock,
}

/// For axum's `from_fn_with_state`: finds out who is calling, or answers 401, 429 or 503. A route
/// group that is not behind it is open to everyone.
///
/// # Errors
/// The answer to a request that is not let in.
pub async fn authenticate<C: Callers>(
    State(access): State<Arc<Access<C>>>,
    mut request: Request,
    next: Next,
) -> Result<Response, Error> {
    let identity = match &*access {
        Access::Keyless => Identity {
            caller: LOCAL.to_owned(),
            scopes: vec![Scope::Jobs, Scope::Admin],
            key_id: None,
            limits: KeyLimits::default(),
            expires_at: None,
        },
        Access::Checked(checks) => {
            let identity = checks.identify(request.headers()).await?;
            checks.count(&identity).await?;
            identity
        }
    };
    request.extensions_mut().insert(identity);
    Ok(next.run(request).await)
}

impl<C: Callers> Access<C> {
    /// Lets a caller that was let in before do one more thing, such as over an open WebSocket: its key
    /// must still be good, and what it does is counted.
    ///
    /// # Errors
    /// 401, 429 or 503, as for a request.
    pub async fn still_admits(&self, identity: &Identity) -> Result<(), Error> {
        let Self::Checked(checks) = self else { return Ok(()) };
        if let Some(id) = &identity.key_id {
            let key = checks.callers.find_key(id).await?;
            if !key.is_some_and(|key| key.is_live(checks.clock.now())) {
                return Err(ended_key());
            }
        }
        if identity.expires_at.is_some_and(|end| end <= checks.clock.now()) {
            return Err(refused("expired", "This connection's token has expired. Open another one."));
        }
        checks.count(identity).await
    }
}

impl<C: Callers> Checks<C> {
    async fn identify(&self, headers: &HeaderMap) -> Result<Identity, Error> {
        let Some(credential) = credential(headers)? else {
            if self.limits.admit_guests {
                return Ok(Identity::with_jobs(GUEST.to_owned()));
            }
            return Err(refused("none", "Send an API key or a token: Authorization: Bearer …."));
        };
        if keys::is_key(credential) {
            return self.key(credential).await;
        }
        match &self.tokens {
            Some(tokens) => {
                let (caller, expires_at) = tokens.verify(credential).await?;
                Ok(Identity { expires_at: Some(expires_at), ..Identity::with_jobs(caller) })
            }
            None => Err(refused("no_key", "This is no API key, and this host takes no tokens.")),
        }
    }

    /// Every request looks its key up, so a revoked one stops working at once.
    async fn key(&self, credential: &str) -> Result<Identity, Error> {
        let invalid = || refused("wrong_key", "This API key is not valid.");
        let (id, secret) = keys::split(credential).ok_or_else(invalid)?;
        let key = self.callers.find_key(id).await?.filter(|key| key.proves(secret)).ok_or_else(invalid)?;
        if !key.is_live(self.clock.now()) {
            return Err(ended_key());
        }
        Ok(Identity {
            caller: key.info.caller,
            scopes: key.info.scopes,
            key_id: Some(key.info.id),
            limits: key.info.limits,
            expires_at: None,
        })
    }

    async fn count(&self, identity: &Identity) -> Result<(), Error> {
        let limit = match identity.caller.as_str() {
            GUEST => self.limits.guest_requests_per_minute,
            _ => self.limits.requests_per_minute,
        };
        let now = self.clock.now().timestamp();
        let made = self.callers.count_request(&identity.caller, now.div_euclid(WINDOW_SECONDS)).await?;
        if made <= limit {
            return Ok(());
        }
        let left = WINDOW_SECONDS - now.rem_euclid(WINDOW_SECONDS);
        let message = format!("More than {limit} requests in this minute. Wait {left} s.");
        Err(Error::too_many_requests(message, u32::try_from(left).unwrap_or(1)))
    }
}

/// What stands behind `Bearer`; `None` where there is no `Authorization` at all. Anything else in
/// the header is refused: who sends credentials does not want to be a guest.
fn credential(headers: &HeaderMap) -> Result<Option<&str>, Error> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let malformed = || refused("malformed", "Send credentials once, as Authorization: Bearer KEY-OR-TOKEN.");
    if values.next().is_some() || value.len() > MAX_CREDENTIAL_BYTES {
        return Err(malformed());
    }
    let (scheme, credential) = value.to_str().ok().and_then(|text| text.split_once(' ')).ok_or_else(malformed)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(Some(credential.trim())) } else { Err(malformed()) }
}

fn ended_key() -> Error {
    refused("ended_key", "This API key has expired or was revoked.")
}

/// A 401. The reason goes to the log, in one line at info: whoever can send requests can make these.
pub fn refused(reason: &'static str, message: &str) -> Error {
    tracing::info!(error.code = Code::Unauthorized.as_str(), auth.reason = reason, "credentials refused");
    Error::new(Code::Unauthorized, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&[u8]]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::AUTHORIZATION, axum::http::HeaderValue::from_bytes(value).unwrap());
        }
        headers
    }

    #[test]
    fn only_one_bearer_header_of_text_is_looked_at() {
        assert_eq!(credential(&headers(&[])).unwrap(), None);
        assert_eq!(credential(&headers(&[b"Bearer x"])).unwrap(), Some("x"));
        assert_eq!(credential(&headers(&[b"bearer  x "])).unwrap(), Some("x"));
        let long = [b"Bearer ".as_slice(), &[b'x'; MAX_CREDENTIAL_BYTES]].concat();
        let wrong: [&[&[u8]]; 8] = [
            &[b""],
            &[b"Bearer"],
            &[b"x"],
            &[b"Basic eDp5"],
            &[b"Bearer\tx"],
            &[b"Bearer \xff"],
            &[b"Bearer x", b"Bearer x"],
            &[&long],
        ];
        for values in wrong {
            let error = credential(&headers(values)).unwrap_err();
            assert_eq!(error.code(), Code::Unauthorized, "{values:?}");
        }
    }
}
