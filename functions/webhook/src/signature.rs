//! The signature of Standard Webhooks 1.0.0 (<https://www.standardwebhooks.com>, "Signature scheme"):
//! HMAC-SHA256 over `id.timestamp.body`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use secrecy::{ExposeSecret, SecretString};
use sha2::Sha256;
use shared::clock::Timestamp;

const PREFIX: &str = "whsec_";
/// What the specification allows a secret to have, in bytes.
const KEY_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

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
