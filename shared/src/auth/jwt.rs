//! Tokens (JWT, RFC 7519) of the stage's issuer, such as Cognito.
//!
//! Triggered by a request that carries one. Reads the issuer's public keys ([`super::jwks`]).

use jsonwebtoken::{Validation, decode, decode_header};
use serde::Deserialize;

use super::jwks::{Jwks, trusted_url};
use super::{refused, signature};
use crate::clock::{Clock, Timestamp, from_millis};
use crate::config::{ConfigError, Env};
use crate::error::Error;

/// In the year 9999: what a number can say, a date need not.
const LAST_MILLIS: f64 = 253_370_764_800_000.0;
/// How far the issuer's clock may be from ours.
const LEEWAY_SECONDS: f64 = 60.0;
/// OpenID Connect Core 1.0, section 2: a subject has at most 255 ASCII characters.
const MAX_SUBJECT_CHARS: usize = 255;

/// Verifies tokens of one issuer.
pub struct Tokens {
    issuer: String,
    audience: String,
    keys: Jwks,
    clock: Clock,
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    /// Seconds since the epoch, perhaps with a fraction.
    exp: f64,
    nbf: Option<f64>,
    aud: Option<Audience>,
    /// Cognito's access tokens name the app's client here and have no `aud`.
    client_id: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

impl Tokens {
    /// `JWT_ISSUER` and `JWT_AUDIENCE`; `None` where neither is set. Nothing is fetched yet: an
    /// issuer that is down must not keep keys from working.
    ///
    /// # Errors
    /// [`ConfigError`] where one is missing, or the issuer is no https URL.
    pub fn from_env(env: &Env, clock: Clock) -> Result<Option<Self>, ConfigError> {
        let (issuer, audience) = match (env.text("JWT_ISSUER")?, env.text("JWT_AUDIENCE")?) {
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(ConfigError::new("JWT_AUDIENCE", "is needed with JWT_ISSUER")),
            (None, Some(_)) => return Err(ConfigError::new("JWT_ISSUER", "is needed with JWT_AUDIENCE")),
            (Some(issuer), Some(audience)) => (issuer, audience),
        };
        let is_plain = trusted_url(issuer).is_some_and(|url| url.query().is_none() && url.fragment().is_none());
        if !is_plain {
            let problem =
                "must be an https URL such as https://cognito-idp.eu-central-1.amazonaws.com/eu-central-1_Example";
            return Err(ConfigError::new("JWT_ISSUER", problem));
        }
        signature::install();
        let keys = Jwks::new(issuer.to_owned(), clock.clone())
            .map_err(|_| ConfigError::new("JWT_ISSUER", "the HTTP client could not be set up"))?;
        Ok(Some(Self { issuer: issuer.to_owned(), audience: audience.to_owned(), keys, clock }))
    }

    /// The caller that a token speaks for, `user:<sub>`, which no key's caller can be, and the token's end.
    ///
    /// # Errors
    /// 401 where the token is not good, 503 where that cannot be known.
    pub(super) async fn verify(&self, token: &str) -> Result<(String, Timestamp), Error> {
        let invalid = |reason| refused(reason, "This token is not valid here.");
        // An algorithm that is not in the crate's list, `none` among them, fails here.
        let header = decode_header(token).map_err(|_| invalid("unreadable"))?;
        // RFC 7515, 4.1.11: what must be understood and is not.
        if header.crit.is_some() {
            return Err(invalid("crit"));
        }
        let kid = header.kid.as_deref().ok_or_else(|| invalid("no_kid"))?;
        let key = self.keys.find(kid).await?.ok_or_else(|| invalid("unknown_kid"))?;
        if !key.algorithms.contains(&header.alg) {
            return Err(invalid("algorithm"));
        }
        let mut validation = Validation::new(header.alg);
        // The crate would ask the system what time it is; all claims are checked below.
        validation.validate_exp = false;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        let verified = decode::<Claims>(token, &key.decoding, &validation);
        let claims = verified.map_err(|_| invalid("signature_or_claims"))?.claims;
        self.check(&claims).map_err(invalid)?;
        let end = (claims.exp * 1000.0).clamp(0.0, LAST_MILLIS) as i64;
        Ok((format!("user:{}", claims.sub), from_millis(end)))
    }

    fn check(&self, claims: &Claims) -> Result<(), &'static str> {
        let now = self.clock.now().timestamp_millis() as f64 / 1000.0;
        let is_for_us = match (&claims.aud, &claims.client_id) {
            (Some(Audience::One(audience)), _) | (None, Some(audience)) => *audience == self.audience,
            (Some(Audience::Many(audiences)), _) => audiences.contains(&self.audience),
            (None, None) => false,
        };
        let is_subject = !claims.sub.is_empty()
            && claims.sub.len() <= MAX_SUBJECT_CHARS
            && claims.sub.bytes().all(|byte| byte.is_ascii_graphic());
        if claims.iss != self.issuer {
            Err("issuer")
        } else if !is_for_us {
            Err("audience")
        } else if now > claims.exp + LEEWAY_SECONDS {
            Err("expired")
        } else if claims.nbf.is_some_and(|start| now + LEEWAY_SECONDS < start) {
            Err("not_yet_valid")
        } else if !is_subject {
            Err("subject")
        } else {
            Ok(())
        }
    }
}
