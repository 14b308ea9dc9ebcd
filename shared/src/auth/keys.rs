//! API keys: `lesion_<id>_<secret>`. The id finds the record, the secret proves the key.
//!
//! Triggered by a request that carries one, and by whoever makes one. Reads and writes nothing by
//! itself.

use std::ops::RangeInclusive;

use secrecy::SecretString;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::api::admin::{KeyInfo, KeyLimits, NewKey};
use crate::auth::GUEST;
use crate::clock::Timestamp;
use crate::error::{Code, Error};

const PREFIX: &str = "lesion_";
const ID_BYTES: usize = 6;
const SECRET_BYTES: usize = 32;
const MAX_NAME_CHARS: usize = 100;
/// Requests or tokens a minute.
const LIMITS: RangeInclusive<u32> = 1..=1_000_000_000;

/// A key as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiKey {
    pub info: KeyInfo,
    /// SHA-256 of the secret as it is written in the key. A slow, salted hash is for passwords,
    /// which can be guessed; 256 random bits cannot, however fast the hash.
    pub secret_sha256: Vec<u8>,
}

impl ApiKey {
    /// A new key, and the only copy of its text.
    ///
    /// # Errors
    /// [`Code::InvalidRequest`] where a field is not right; [`Code::Internal`] where the system
    /// gives no random numbers.
    pub fn make(new: NewKey, now: Timestamp) -> Result<(Self, SecretString), Error> {
        check(&new, now)?;
        let (id, secret) = (random_hex::<ID_BYTES>()?, random_hex::<SECRET_BYTES>()?);
        let mut scopes = new.scopes;
        scopes.sort_unstable_by_key(|scope| scope.as_str());
        scopes.dedup();
        let text = SecretString::from(format!("{PREFIX}{id}_{secret}"));
        let info = KeyInfo {
            id,
            caller: new.caller,
            name: new.name,
            scopes,
            created_at: now,
            expires_at: new.expires_at,
            revoked_at: None,
            limits: KeyLimits {
                models: new.models,
                requests_per_minute: new.requests_per_minute,
                tokens_per_minute: new.tokens_per_minute,
                budget_usd_per_month: new.budget_usd_per_month,
            },
        };
        Ok((Self { info, secret_sha256: hash(&secret) }, text))
    }

    /// Whether `secret` is this key's, in a time that does not depend on where they differ.
    #[must_use]
    pub fn proves(&self, secret: &str) -> bool {
        hash(secret).ct_eq(&self.secret_sha256).into()
    }

    #[must_use]
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.info.revoked_at.is_none() && self.info.expires_at.is_none_or(|end| now < end)
    }
}

/// Whether `text` claims to be a key, right or wrong.
pub(super) fn is_key(text: &str) -> bool {
    text.starts_with(PREFIX)
}

/// Id and secret, where the text has the form of a key.
pub(super) fn split(text: &str) -> Option<(&str, &str)> {
    let (id, secret) = text.strip_prefix(PREFIX)?.split_once('_')?;
    let is_hex = |text: &str, bytes: usize| {
        text.len() == 2 * bytes && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    (is_hex(id, ID_BYTES) && is_hex(secret, SECRET_BYTES)).then_some((id, secret))
}

fn check(new: &NewKey, now: Timestamp) -> Result<(), Error> {
    let problem = if !is_caller(&new.caller) {
        "\"caller\" is 1 to 64 of a-z, 0-9, dot, dash and underscore, and begins with a letter or digit."
    } else if new.caller == GUEST {
        "\"guest\" is the caller of requests without credentials; take another name."
    } else if new.name.chars().count() > MAX_NAME_CHARS || new.name.chars().any(char::is_control) {
        "\"name\" is at most 100 characters in one line."
    } else if new.scopes.is_empty() {
        "\"scopes\" names at least one of jobs and admin."
    } else if new.expires_at.is_some_and(|end| end <= now) {
        "\"expires_at\" has passed."
    } else if new.models.as_ref().is_some_and(|models| !are_models(models)) {
        "\"models\" is 1 to 100 names of GET /v1/models, each of at most 200 characters."
    } else if [new.requests_per_minute, new.tokens_per_minute].iter().flatten().any(|limit| !LIMITS.contains(limit)) {
        "\"requests_per_minute\" and \"tokens_per_minute\" are 1 to 1000000000."
    } else if new.budget_usd_per_month.is_some_and(|budget| !(0.0..=1e6).contains(&budget)) {
        "\"budget_usd_per_month\" is 0 to 1000000."
    } else {
        return Ok(());
    };
    Err(Error::new(Code::InvalidRequest, problem))
}

fn are_models(names: &[String]) -> bool {
    (1..=100).contains(&names.len()) && names.iter().all(|name| !name.is_empty() && name.chars().count() <= 200)
}

fn is_caller(name: &str) -> bool {
    let may_begin = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9');
    name.len() <= 64
        && name.as_bytes().first().is_some_and(may_begin)
        && name.bytes().all(|byte| may_begin(&byte) || matches!(byte, b'.' | b'_' | b'-'))
}

pub(super) fn hash(secret: &str) -> Vec<u8> {
    Sha256::digest(secret.as_bytes()).to_vec()
}

pub(super) fn random_hex<const N: usize>() -> Result<String, Error> {
    let bytes: [u8; N] = ring::rand::generate(&ring::rand::SystemRandom::new())
        .map_err(|_| Error::internal("no random numbers"))?
        .expose();
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use secrecy::ExposeSecret;

    use super::*;
    use crate::api::admin::Scope;
    use crate::clock::from_millis;

    fn new(caller: &str) -> NewKey {
        NewKey::plain(caller.into(), String::new(), vec![Scope::Jobs])
    }

    #[test]
    fn a_key_proves_itself_and_no_other_does() {
        let now = from_millis(1_700_000_000_000);
        let (key, text) = ApiKey::make(new("ward-3"), now).unwrap();
        let (other, _) = ApiKey::make(new("ward-3"), now).unwrap();
        let (id, secret) = split(text.expose_secret()).unwrap();
        assert_eq!(id, key.info.id);
        assert!(key.proves(secret));
        assert!(!other.proves(secret));
        let mut wrong = secret.to_owned();
        wrong.replace_range(63.., if secret.ends_with('0') { "1" } else { "0" });
        assert!(!key.proves(&wrong));
        assert!(!format!("{key:?}").contains(secret));
    }

    #[test]
    fn what_has_not_the_form_of_a_key_is_none() {
        let (_, text) = ApiKey::make(new("a"), from_millis(0)).unwrap();
        let text = text.expose_secret();
        let wrong = [
            &text[..text.len() - 1],
            &format!("{text}0"),
            &text.to_uppercase(),
            "lesion_",
            "lesion__",
            "",
            "lesion_é_",
        ];
        for text in wrong {
            assert_eq!(split(text), None, "{text}");
        }
    }

    #[test]
    fn a_caller_has_a_plain_name_that_no_token_can_have() {
        for name in ["a", "ward-3", "0", "dr.no_1", &"a".repeat(64)] {
            assert!(ApiKey::make(new(name), from_millis(0)).is_ok(), "{name}");
        }
        for name in ["", "Ward", "-a", ".a", "a b", "user:1", "é", "a\n", "guest", &"a".repeat(65)] {
            assert!(ApiKey::make(new(name), from_millis(0)).is_err(), "{name}");
        }
    }

    #[test]
    fn a_key_lives_until_it_expires_or_is_revoked() {
        let now = from_millis(1_700_000_000_000);
        let end = now + TimeDelta::days(1);
        let (key, _) = ApiKey::make(NewKey { expires_at: Some(end), ..new("a") }, now).unwrap();
        assert!(key.is_live(end - TimeDelta::milliseconds(1)));
        assert!(!key.is_live(end));
        let info = KeyInfo { revoked_at: Some(now), ..key.info.clone() };
        assert!(!ApiKey { info, ..key }.is_live(now));
        assert!(ApiKey::make(NewKey { expires_at: Some(now), ..new("a") }, now).is_err());
    }
}
