//! The key of an LLM's server: it goes to that server, and nowhere else.

use reqwest::header::HeaderValue;
use secrecy::{ExposeSecret, SecretString};

#[cfg(feature = "aws")]
use crate::aws::Secrets;
use crate::config::ConfigError;
use crate::error::Error;

/// Where the key comes from.
pub(super) enum Key {
    /// A variable of the environment, for the life of the process.
    Fixed(Option<SecretString>),
    /// The stage's secret, under this name; a key that was refused is read again.
    #[cfg(feature = "aws")]
    Stage { secrets: Secrets, name: String },
}

impl Key {
    /// What the variable `name` holds; none is sent where it is unset.
    ///
    /// # Errors
    /// [`ConfigError`] where it cannot be a key.
    pub(super) fn fixed(name: &str, key: Option<SecretString>) -> Result<Self, ConfigError> {
        if key.as_ref().is_some_and(|key| HeaderValue::from_str(key.expose_secret()).is_err()) {
            return Err(ConfigError::new(name, "holds characters that no key has"));
        }
        Ok(Self::Fixed(key))
    }

    pub(super) async fn current(&self) -> Result<Option<SecretString>, Error> {
        match self {
            Self::Fixed(key) => Ok(key.clone()),
            #[cfg(feature = "aws")]
            Self::Stage { secrets, name } => secrets.get(name).await,
        }
    }

    /// Another key than the one that was refused, or than none, where there is one now.
    pub(super) async fn renewed(&self, refused: Option<&SecretString>) -> Result<Option<SecretString>, Error> {
        #[cfg(feature = "aws")]
        if let Self::Stage { secrets, name } = self {
            return secrets.renewed(name, refused).await;
        }
        // A key of the environment's is the only one that there is.
        let _ = refused;
        Ok(None)
    }
}

// That Secrets Manager answers so is tested on the emulator: tests/aws/packages.rs.
#[cfg(test)]
#[cfg(feature = "aws")]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    use aws_config::{BehaviorVersion, Region, SdkConfig};
    use aws_sdk_secretsmanager::config::{Credentials, SharedCredentialsProvider};
    use aws_smithy_http_client::Builder;
    use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
    use axum::body::Bytes;
    use axum::extract::State;
    use axum::http::{HeaderMap, StatusCode};
    use axum::routing::post;
    use axum::{Json, Router};
    use serde_json::{Value, json};
    use tokio::net::TcpListener;

    use super::*;
    use crate::config::Env;
    use crate::llm::models::{Model, Models};
    use crate::llm::{Format, Llm, Prompt};

    /// Under which the secret holds the key.
    const NAME: &str = "LLM_API_KEY";

    /// The store of the stage's secret, and the LLM's server.
    #[derive(Default)]
    struct Servers {
        /// The key that is in the secret now; empty where the secret cannot be read.
        stored: &'static str,
        /// The only one that the LLM's server takes.
        taken: &'static str,
        /// How often the secret was read.
        reads: usize,
        /// The keys that the LLM's server was sent.
        sent: Vec<String>,
    }

    /// Both, and who asks them.
    struct Scene {
        servers: Arc<Mutex<Servers>>,
        secrets: Secrets,
        model: Arc<Model>,
        llm: Llm,
    }

    impl Scene {
        async fn start(stored: &'static str, taken: &'static str) -> Self {
            let servers = Arc::new(Mutex::new(Servers { stored, taken, ..Servers::default() }));
            let router = Router::new().route("/", post(secret)).route("/v1/chat/completions", post(complete));
            let router = router.with_state(Arc::clone(&servers));
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            tokio::spawn(async move { axum::serve(listener, router).await });
            let config = SdkConfig::builder()
                .behavior_version(BehaviorVersion::v2026_01_12())
                .region(Region::new("us-east-1"))
                .credentials_provider(SharedCredentialsProvider::new(Credentials::new("a", "b", None, None, "a test")))
                .http_client(Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https())
                .endpoint_url(url.as_str())
                .build();
            let secrets = Secrets::new(&config, "of-a-test".to_owned());
            let base_url = format!("{url}/v1");
            let env = Env::of([("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")]);
            let models = Models::with_secrets(&env, &secrets).unwrap();
            let model = Arc::clone(models.get("m").unwrap());
            let llm = Llm::from_env(&env).unwrap().with_secrets(secrets.clone());
            Self { servers, secrets, model, llm }
        }

        fn rotate(&self, key: &'static str) {
            let mut servers = self.servers.lock().unwrap();
            (servers.stored, servers.taken) = (key, key);
        }

        /// The status of a call as the proxy makes it.
        async fn call(&self) -> u16 {
            let body = [Bytes::from_static(b"{}")].into_iter().collect();
            self.model.send(body).await.unwrap().status().as_u16()
        }

        /// How often the secret was read, and the keys that were sent.
        fn seen(&self) -> (usize, Vec<String>) {
            let servers = self.servers.lock().unwrap();
            (servers.reads, servers.sent.clone())
        }
    }

    /// Wire format: Secrets Manager API reference, "GetSecretValue".
    async fn secret(State(servers): State<Arc<Mutex<Servers>>>) -> Json<Value> {
        let mut servers = servers.lock().unwrap();
        servers.reads += 1;
        let values = json!({NAME: servers.stored}).to_string();
        Json(json!({"SecretString": if servers.stored.is_empty() { "no JSON" } else { &values }}))
    }

    async fn complete(State(servers): State<Arc<Mutex<Servers>>>, headers: HeaderMap) -> StatusCode {
        let key = headers["authorization"].to_str().unwrap().trim_start_matches("Bearer ").to_owned();
        let mut servers = servers.lock().unwrap();
        let status = if key == servers.taken { StatusCode::OK } else { StatusCode::UNAUTHORIZED };
        servers.sent.push(key);
        status
    }

    fn keys(keys: &[&str]) -> Vec<String> {
        keys.iter().map(|&key| key.to_owned()).collect()
    }

    #[tokio::test]
    async fn a_key_that_is_refused_is_read_again_within_the_call_and_kept_for_those_behind_it() {
        let scene = Scene::start("old", "old").await;
        assert_eq!((scene.call().await, scene.call().await), (200, 200));
        assert_eq!(scene.seen(), (1, keys(&["old", "old"])));
        scene.rotate("new");
        assert_eq!((scene.call().await, scene.call().await), (200, 200));
        assert_eq!(scene.seen(), (2, keys(&["old", "old", "old", "new", "new"])));
        // Who was refused at the same time comes behind the one who has read it.
        let late = scene.secrets.renewed(NAME, Some(&SecretString::from("old"))).await.unwrap();
        assert_eq!((late.unwrap().expose_secret(), scene.seen().0), ("new", 2));
    }

    #[tokio::test]
    async fn what_nobody_refuses_is_read_again_after_five_minutes_and_kept_where_it_cannot_be_read() {
        let scene = Scene::start("old", "old").await;
        let recent = async || scene.secrets.recent(NAME).await.unwrap().unwrap().expose_secret().to_owned();
        let five_minutes = async || {
            tokio::time::pause();
            tokio::time::advance(Duration::from_secs(5 * 60)).await;
            tokio::time::resume();
        };
        assert_eq!((recent().await, scene.seen().0), ("old".to_owned(), 1));
        scene.rotate("new");
        assert_eq!((recent().await, scene.seen().0), ("old".to_owned(), 1));
        five_minutes().await;
        assert_eq!((recent().await, scene.seen().0), ("new".to_owned(), 2));
        scene.rotate("");
        five_minutes().await;
        assert_eq!((recent().await, scene.seen().0), ("new".to_owned(), 3));
        scene.rotate("newer");
        assert_eq!(recent().await, "newer");
    }

    #[tokio::test]
    async fn a_key_that_is_wrong_in_the_secret_too_is_read_once_more_a_call_and_not_sent_again() {
        let scene = Scene::start("wrong", "right").await;
        assert_eq!(scene.call().await, 401);
        assert_eq!(scene.seen(), (2, keys(&["wrong"])), "once to begin with, once behind the refusal");
        assert_eq!(scene.call().await, 401);
        assert_eq!(scene.seen(), (3, keys(&["wrong", "wrong"])));
        let prompt =
            Prompt { messages: Vec::new(), max_tokens: None, temperature: None, format: Format::Text, session: None };
        let (answer, tries) = scene.llm.complete(&prompt, Instant::now() + Duration::from_secs(60)).await;
        assert_eq!((answer.unwrap_err().code, tries), ("llm_denied", 1));
        assert_eq!(scene.seen(), (4, keys(&["wrong", "wrong", "wrong"])));
    }
}
