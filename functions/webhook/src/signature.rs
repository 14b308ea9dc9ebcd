//! The signature of Standard Webhooks 1.0.0 (<https://www.standardwebhooks.com>, "Signature scheme"):
//! HMAC-SHA256 over `id.timestamp.body`, once for each key that a receiver may know.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use reqwest::Url;
use secrecy::{ExposeSecret, SecretString};
use sha2::Sha256;
use shared::clock::Timestamp;

const PREFIX: &str = "whsec_";
/// What the specification allows a secret to have, in bytes.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// The keys of `WEBHOOK_SECRET`: secrets with white space between, each for all receivers or, as
/// `host=whsec_…`, for one alone.
pub struct Keyring {
    keys: Vec<(Option<String>, SigningKey)>,
}

impl Keyring {
    /// `None` where it holds none, or anything else.
    #[must_use]
    pub fn read(secret: &SecretString) -> Option<Self> {
        let entries = secret.expose_secret().split_ascii_whitespace();
        let keys: Option<Vec<_>> = entries.map(Self::entry).collect();
        keys.filter(|keys| !keys.is_empty()).map(|keys| Self { keys })
    }

    fn entry(text: &str) -> Option<(Option<String>, SigningKey)> {
        // Base64 may end in equals signs itself.
        let (host, secret) = match text.split_once('=') {
            Some((host, secret)) if !text.starts_with(PREFIX) => (Some(host.to_ascii_lowercase()), secret),
            _ => (None, text),
        };
        (host.as_deref() != Some("")).then_some(())?;
        Some((host, SigningKey::read(&SecretString::from(secret))?))
    }

    /// `webhook-signature` of a body that is sent to this URL at `now`: by the receiver's own keys where it has
    /// some, and otherwise by those of all. `None` where there is no key for it.
    #[must_use]
    pub fn sign(&self, url: &Url, id: &str, now: Timestamp, body: &str) -> Option<String> {
        let host = url.host_str().unwrap_or("");
        let with_port = format!("{host}:{}", url.port_or_known_default().unwrap_or(0));
        let is_own = |of: &Option<String>| of.as_ref().is_some_and(|of| of == host || *of == with_port);
        let has_own = self.keys.iter().any(|(of, _)| is_own(of));
        let keys = self.keys.iter().filter(|(of, _)| if has_own { is_own(of) } else { of.is_none() });
        let signatures: Vec<_> = keys.map(|(_, key)| key.sign(id, now, body)).collect();
        (!signatures.is_empty()).then(|| signatures.join(" "))
    }
}

/// What a delivery is signed with.
pub struct SigningKey {
    bytes: secrecy::SecretBox<[u8]>,
}

impl SigningKey {
    /// `whsec_` and 24 to 64 bytes in standard base64; `None` for anything else.
    #[must_use]
    pub fn read(secret: &SecretString) -> Option<Self> {
        let bytes = STANDARD.decode(secret.expose_secret().strip_prefix(PREFIX)?).ok()?;
        KEY_BYTES.contains(&bytes.len()).then(|| Self { bytes: bytes.into_boxed_slice().into() })
    }

    /// `webhook-signature` of a body that is sent at `now`.
    #[must_use]
    pub fn sign(&self, id: &str, now: Timestamp, body: &str) -> String {
        // HMAC takes keys of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(self.bytes.expose_secret()) else { return String::new() };
        mac.update(format!("{id}.{}.{body}", now.timestamp()).as_bytes());
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use shared::clock::from_millis;

    use super::*;

    /// The example that the reference libraries of Standard Webhooks are tested with.
    #[test]
    fn a_signature_is_that_of_the_specifications_reference_libraries() {
        let key = SigningKey::read(&"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".into()).unwrap();
        let signature =
            key.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", from_millis(1_614_265_330_000), r#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn each_receiver_is_signed_to_by_its_own_keys_old_and_new() {
        let [all, old, own] = [1, 2, 3].map(|byte| format!("{PREFIX}{}", STANDARD.encode([byte; 32])));
        let signed = |keys: &str, url: &str| {
            Keyring::read(&keys.into()).unwrap().sign(&Url::parse(url).unwrap(), "msg", from_millis(0), "{}")
        };
        let by = |secret: &str| SigningKey::read(&secret.into()).unwrap().sign("msg", from_millis(0), "{}");
        let (a, b) = ("https://a.example/hook", "https://b.example:8443/");
        assert_eq!(signed(&all, a), Some(by(&all)));
        // While a receiver takes the new one in it knows one of the two.
        assert_eq!(signed(&format!("{all} {old}"), a), Some(format!("{} {}", by(&all), by(&old))));
        // What is signed for one receiver proves nothing to another.
        for of in ["a.example", "A.example:443"] {
            let keys = format!("{all}\n{of}={own}");
            assert_eq!((signed(&keys, a), signed(&keys, b)), (Some(by(&own)), Some(by(&all))));
        }
        let keys = format!("b.example:8443={own} b.example:8443={old}");
        assert_eq!((signed(&keys, a), signed(&keys, b)), (None, Some(format!("{} {}", by(&own), by(&old)))));
        for wrong in
            ["", " ", "a.example", "a.example=", &format!("={own}"), &format!("{all},{old}"), &format!("{all} x")]
        {
            assert!(Keyring::read(&wrong.into()).is_none(), "{wrong}");
        }
    }

    #[test]
    fn what_is_no_secret_of_the_specification_is_refused() {
        let encoded = |length: usize| format!("{PREFIX}{}", STANDARD.encode(vec![7; length]));
        assert!(SigningKey::read(&encoded(24).into()).is_some() && SigningKey::read(&encoded(64).into()).is_some());
        let bare = STANDARD.encode([7; 32]);
        for secret in
            [encoded(23), encoded(65), bare.clone(), format!("whpk_{bare}"), format!("{PREFIX}?"), String::new()]
        {
            assert!(SigningKey::read(&secret.into()).is_none());
        }
    }
}
