//! Signatures of tokens, checked by ring, which TLS uses already.
//!
//! HMAC is in no table here, and the key's own type chooses the table: a public key can never be
//! taken for a shared secret.

use jsonwebtoken::crypto::{CryptoProvider, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{Error, ErrorKind};
use jsonwebtoken::signature::{self, Verifier};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind};
use ring::signature as checks;

struct RingVerifier {
    algorithm: Algorithm,
    key: DecodingKey,
}

impl Verifier<Vec<u8>> for RingVerifier {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        let checked = match self.key.kind() {
            DecodingKeyKind::RsaModulusExponent { n, e } => rsa(self.algorithm)
                .map(|parameters| checks::RsaPublicKeyComponents { n, e }.verify(parameters, message, signature)),
            DecodingKeyKind::SecretOrDer(point) => curve(self.algorithm)
                .map(|algorithm| checks::UnparsedPublicKey::new(algorithm, point).verify(message, signature)),
        };
        checked.and_then(Result::ok).ok_or_else(signature::Error::new)
    }
}

impl JwtVerifier for RingVerifier {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

fn rsa(algorithm: Algorithm) -> Option<&'static checks::RsaParameters> {
    Some(match algorithm {
        Algorithm::RS256 => &checks::RSA_PKCS1_2048_8192_SHA256,
        Algorithm::RS384 => &checks::RSA_PKCS1_2048_8192_SHA384,
        Algorithm::RS512 => &checks::RSA_PKCS1_2048_8192_SHA512,
        Algorithm::PS256 => &checks::RSA_PSS_2048_8192_SHA256,
        Algorithm::PS384 => &checks::RSA_PSS_2048_8192_SHA384,
        Algorithm::PS512 => &checks::RSA_PSS_2048_8192_SHA512,
        _ => return None,
    })
}

fn curve(algorithm: Algorithm) -> Option<&'static dyn checks::VerificationAlgorithm> {
    Some(match algorithm {
        Algorithm::ES256 => &checks::ECDSA_P256_SHA256_FIXED,
        Algorithm::ES384 => &checks::ECDSA_P384_SHA384_FIXED,
        Algorithm::EdDSA => &checks::ED25519,
        _ => return None,
    })
}

static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |_, _| Err(Error::from(ErrorKind::UnsupportedAlgorithm)),
    verifier_factory: |algorithm, key| Ok(Box::new(RingVerifier { algorithm: *algorithm, key: key.clone() })),
    // For making JWKs, which nobody does here.
    key_utils: KeyUtils::new_unimplemented(),
};

/// Must run before the first token is checked; again does nothing.
pub(super) fn install() {
    let _ = PROVIDER.install_default();
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::crypto::verify;
    use jsonwebtoken::jwk::Jwk;

    use super::*;

    /// RFC 7515 A.2 and A.3, RFC 8037 A.4: key, signed part, signature.
    const EXAMPLES: [(Algorithm, &str, &str, &str); 3] = [
        (
            Algorithm::RS256,
            r#"{"kty":"RSA","e":"AQAB","n":"ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"}"#,
            "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ",
            "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw",
        ),
        (
            Algorithm::ES256,
            r#"{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}"#,
            "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ",
            "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
        ),
        (
            Algorithm::EdDSA,
            r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#,
            "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc",
            "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg",
        ),
    ];

    #[test]
    fn the_standards_own_examples_pass_and_one_letter_less_does_not() {
        install();
        for (algorithm, jwk, message, signature) in EXAMPLES {
            let jwk: Jwk = serde_json::from_str(jwk).unwrap();
            let key = DecodingKey::from_jwk(&jwk).unwrap();
            let check = |message: &str, algorithm| verify(signature, message.as_bytes(), &key, algorithm).unwrap();
            assert!(check(message, algorithm), "{algorithm:?}");
            assert!(!check(&message[..message.len() - 1], algorithm), "{algorithm:?}");
            for other in [Algorithm::RS256, Algorithm::PS256, Algorithm::ES256, Algorithm::EdDSA, Algorithm::HS256] {
                assert_eq!(check(message, other), other == algorithm, "{algorithm:?} as {other:?}");
            }
        }
    }
}
