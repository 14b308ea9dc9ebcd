//! A host with an admin key, by a clock that stands.

use std::path::Path;

use chrono::Utc;
use reqwest::{Method, RequestBuilder, Response};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use shared::clock::Clock;
use shared::config::Env;
use tempfile::TempDir;

use super::{Running, mole};

/// Makes an admin key as `local init` does.
pub async fn init(folder: &Path, another: bool) -> anyhow::Result<String> {
    let env = Env::of([("DATA_DIR", folder.to_str().unwrap())]);
    Ok(local::init(&env, &Clock::System, another).await?.expose_secret().to_owned())
}

/// A host with one admin key.
pub struct Keyed {
    pub host: Running,
    pub admin: String,
    pub clock: Clock,
}

impl Keyed {
    pub async fn start(extra: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let admin = init(folder.path(), false).await.unwrap();
        Self::on(folder, admin, extra).await
    }

    pub async fn on(folder: TempDir, admin: String, extra: &[(&str, &str)]) -> Self {
        let clock = Clock::manual(Utc::now());
        Self { host: Running::on(folder, clock.clone(), extra).await, admin, clock }
    }

    pub fn request(&self, method: Method, path: &str, key: &str) -> RequestBuilder {
        let request = self.host.http.request(method, format!("{}{path}", self.host.url));
        if key.is_empty() { request } else { request.bearer_auth(key) }
    }

    pub async fn get(&self, path: &str, key: &str) -> Response {
        self.request(Method::GET, path, key).send().await.unwrap()
    }

    pub async fn status(&self, method: Method, path: &str, key: &str) -> u16 {
        self.request(method, path, key).send().await.unwrap().status().as_u16()
    }

    pub async fn submit(&self, key: &str) -> Response {
        self.request(Method::POST, "/submit", key)
            .header("content-type", "image/png")
            .body(mole())
            .send()
            .await
            .unwrap()
    }

    /// Makes a key and returns what the API says of it.
    pub async fn make(&self, new: Value) -> Value {
        let response = self.request(Method::POST, "/admin/keys", &self.admin).json(&new).send().await.unwrap();
        assert_eq!(response.status().as_u16(), 201);
        response.json().await.unwrap()
    }

    pub async fn key_of(&self, caller: &str) -> String {
        self.make(json!({"caller": caller})).await["key"].as_str().unwrap().to_owned()
    }
}
