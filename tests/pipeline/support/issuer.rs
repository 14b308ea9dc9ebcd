//! An issuer of tokens on loopback: OIDC discovery, a key set, and keys to sign with.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::rsa::{KeyPairComponents, PublicKeyComponents};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RSA_PSS_SHA256,
    RsaKeyPair,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// The key of RFC 7515, appendix A.2, which everybody knows: ring makes no RSA keys.
const RFC_7515_A2: &str = include_str!("rfc7515-a2.json");

/// How the issuer answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Well,
    Down,
    /// Sends the client on to somebody else.
    Redirecting,
    /// A key set above every bound.
    Huge,
    /// Its discovery document names another issuer.
    Impostor,
    /// Never answers.
    Hanging,
}

struct Inner {
    address: SocketAddr,
    mood: Mutex<Mood>,
    keys: Mutex<Vec<Value>>,
    fetches: Mutex<usize>,
}

/// The running issuer; it ends with the test's runtime.
#[derive(Clone)]
pub struct Issuer(Arc<Inner>);

impl Issuer {
    pub async fn start(keys: &[&SigningKey]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let inner = Inner {
            address: listener.local_addr().unwrap(),
            mood: Mutex::new(Mood::Well),
            keys: Mutex::default(),
            fetches: Mutex::new(0),
        };
        let issuer = Self(Arc::new(inner));
        issuer.set_keys(keys.iter().map(|key| key.jwk()));
        let router = Router::new()
            .route("/pool/.well-known/openid-configuration", get(discovery))
            .route("/keys", get(keys_of))
            .with_state(issuer.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        issuer
    }

    pub fn url(&self) -> String {
        format!("http://{}/pool", self.0.address)
    }

    pub fn set_keys(&self, keys: impl IntoIterator<Item = Value>) {
        *self.0.keys.lock().unwrap() = keys.into_iter().collect();
    }

    pub fn set_mood(&self, mood: Mood) {
        *self.0.mood.lock().unwrap() = mood;
    }

    /// How often somebody came for the keys.
    pub fn fetches(&self) -> usize {
        *self.0.fetches.lock().unwrap()
    }
}

async fn discovery(State(issuer): State<Issuer>) -> Response {
    *issuer.0.fetches.lock().unwrap() += 1;
    let mood = *issuer.0.mood.lock().unwrap();
    match mood {
        Mood::Down => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Mood::Redirecting => Redirect::temporary("/keys").into_response(),
        Mood::Hanging => std::future::pending().await,
        Mood::Well | Mood::Huge | Mood::Impostor => {
            let name = if mood == Mood::Impostor { "http://127.0.0.1:1/pool".to_owned() } else { issuer.url() };
            Json(json!({"issuer": name, "jwks_uri": format!("http://{}/keys", issuer.0.address)})).into_response()
        }
    }
}

async fn keys_of(State(issuer): State<Issuer>) -> Response {
    let mut set = json!({"keys": *issuer.0.keys.lock().unwrap()});
    if *issuer.0.mood.lock().unwrap() == Mood::Huge {
        set["padding"] = "x".repeat(1024 * 1024).into();
    }
    Json(set).into_response()
}

enum Pair {
    Rsa(Box<RsaKeyPair>),
    P256(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

/// A private key, and what the issuer publishes of it.
pub struct SigningKey {
    pub kid: String,
    pair: Pair,
}

impl SigningKey {
    /// The one RSA key there is.
    pub fn rsa(kid: &str) -> Self {
        let jwk: Value = serde_json::from_str(RFC_7515_A2).unwrap();
        let part = |name: &str| URL_SAFE_NO_PAD.decode(jwk[name].as_str().unwrap()).unwrap();
        let components = KeyPairComponents {
            public_key: PublicKeyComponents { n: part("n"), e: part("e") },
            d: part("d"),
            p: part("p"),
            q: part("q"),
            dP: part("dp"),
            dQ: part("dq"),
            qInv: part("qi"),
        };
        Self { kid: kid.to_owned(), pair: Pair::Rsa(Box::new(RsaKeyPair::from_components(&components).unwrap())) }
    }

    /// A new key on P-256.
    pub fn p256(kid: &str) -> Self {
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).unwrap();
        Self { kid: kid.to_owned(), pair: Pair::P256(pair) }
    }

    /// A new Ed25519 key.
    pub fn ed25519(kid: &str) -> Self {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Self { kid: kid.to_owned(), pair: Pair::Ed25519(Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap()) }
    }

    /// The public half (RFC 7517).
    pub fn jwk(&self) -> Value {
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let mut jwk = match &self.pair {
            Pair::Rsa(pair) => {
                let public = PublicKeyComponents::<Vec<u8>>::from(pair.public());
                json!({"kty": "RSA", "alg": "RS256", "n": text(&public.n), "e": text(&public.e)})
            }
            Pair::P256(pair) => {
                let point = pair.public_key().as_ref();
                json!({"kty": "EC", "crv": "P-256", "x": text(&point[1..33]), "y": text(&point[33..])})
            }
            Pair::Ed25519(pair) => json!({"kty": "OKP", "crv": "Ed25519", "x": text(pair.public_key().as_ref())}),
        };
        jwk["use"] = "sig".into();
        jwk["kid"] = self.kid.as_str().into();
        jwk
    }

    pub fn algorithm(&self) -> &'static str {
        match self.pair {
            Pair::Rsa(_) => "RS256",
            Pair::P256(_) => "ES256",
            Pair::Ed25519(_) => "EdDSA",
        }
    }

    /// A token with these claims.
    pub fn token(&self, claims: &Value) -> String {
        self.token_with(&json!({"alg": self.algorithm(), "kid": self.kid, "typ": "JWT"}), claims)
    }

    /// A token with any header, true or not.
    pub fn token_with(&self, header: &Value, claims: &Value) -> String {
        let message = unsigned(header, claims);
        let signature = match &self.pair {
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                let padding: &'static dyn ring::signature::RsaEncoding =
                    if header["alg"] == "PS256" { &RSA_PSS_SHA256 } else { &RSA_PKCS1_SHA256 };
                pair.sign(padding, &SystemRandom::new(), message.as_bytes(), &mut signature).unwrap();
                signature
            }
            Pair::P256(pair) => pair.sign(&SystemRandom::new(), message.as_bytes()).unwrap().as_ref().to_vec(),
            Pair::Ed25519(pair) => pair.sign(message.as_bytes()).as_ref().to_vec(),
        };
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    /// A token that takes the public key for a shared secret, as HS256 would.
    pub fn token_by_confusion(&self, claims: &Value) -> String {
        let message = unsigned(&json!({"alg": "HS256", "kid": self.kid, "typ": "JWT"}), claims);
        let public = match &self.pair {
            Pair::Rsa(pair) => pair.public_key().as_ref(),
            Pair::P256(pair) => pair.public_key().as_ref(),
            Pair::Ed25519(pair) => pair.public_key().as_ref(),
        };
        let secret = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, public);
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(ring::hmac::sign(&secret, message.as_bytes())))
    }
}

/// The part of a token that is signed.
pub fn unsigned(header: &Value, claims: &Value) -> String {
    let part = |json: &Value| URL_SAFE_NO_PAD.encode(json.to_string());
    format!("{}.{}", part(header), part(claims))
}
