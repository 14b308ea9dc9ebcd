//! One secret of Secrets Manager: a JSON object of strings, kept in memory until one of them turns
//! out to be no longer right.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use aws_config::SdkConfig;
use aws_sdk_secretsmanager::Client;
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::error::Error;

const WHAT: &str = "the secret store";

/// How long a value may have changed before those hear of it whom nobody turns away.
const RECENT: Duration = Duration::from_secs(5 * 60);

struct Values {
    by_name: HashMap<String, SecretString>,
    read_at: Instant,
}

/// The stage's secret.
#[derive(Clone)]
pub struct Secrets {
    client: Client,
    arn: String,
    /// Read at first use. Who finds it being read waits and takes what comes of it.
    kept: Arc<Mutex<Option<Values>>>,
}

impl Secrets {
    #[must_use]
    pub fn new(config: &SdkConfig, arn: String) -> Self {
        Self { client: Client::new(config), arn, kept: Arc::default() }
    }

    /// The value under `name`; `None` where the secret has none.
    ///
    /// # Errors
    /// Where the secret cannot be read, or is no JSON object of strings.
    pub async fn get(&self, name: &str) -> Result<Option<SecretString>, Error> {
        let mut kept = self.kept.lock().await;
        let values = match kept.take() {
            Some(values) => values,
            None => self.read().await?,
        };
        Ok(kept.insert(values).by_name.get(name).cloned())
    }

    /// The value under `name` as it was at most five minutes ago; `None` where the secret has none now. Where it
    /// cannot be read, what is kept goes on.
    ///
    /// # Errors
    /// As [`Secrets::get`], where nothing is kept.
    pub async fn recent(&self, name: &str) -> Result<Option<SecretString>, Error> {
        let mut kept = self.kept.lock().await;
        let known = kept.as_ref().and_then(|values| values.by_name.get(name).cloned());
        let is_recent = kept.as_ref().is_some_and(|values| values.read_at.elapsed() < RECENT);
        if known.is_some() && is_recent {
            return Ok(known);
        }
        match (self.read().await, known) {
            (Ok(values), _) => Ok(kept.insert(values).by_name.get(name).cloned()),
            (Err(error), Some(known)) => {
                tracing::warn!(
                    error.code = error.code().as_str(),
                    error.chain = error.chain(),
                    "secret not read again"
                );
                Ok(Some(known))
            }
            (Err(error), None) => Err(error),
        }
    }

    /// The value under `name` as it is now, where it is another than `refused`, which somebody was
    /// turned away with: `None` for whom the secret had none.
    ///
    /// # Errors
    /// As [`Secrets::get`].
    pub async fn renewed(&self, name: &str, refused: Option<&SecretString>) -> Result<Option<SecretString>, Error> {
        let is_new =
            |value: &SecretString| refused.is_none_or(|refused| value.expose_secret() != refused.expose_secret());
        // Somebody else may have been turned away first.
        if let Some(value) = self.get(name).await?.filter(is_new) {
            return Ok(Some(value));
        }
        let values = self.read().await?;
        let value = values.by_name.get(name).cloned();
        *self.kept.lock().await = Some(values);
        Ok(value.filter(is_new))
    }

    async fn read(&self) -> Result<Values, Error> {
        let read = self.client.get_secret_value().secret_id(&self.arn).send().await;
        let read = read.map_err(|error| Error::unavailable(WHAT, error))?;
        let text = SecretString::from(read.secret_string.unwrap_or_default());
        // serde's own message may repeat a value.
        let values: HashMap<String, String> = serde_json::from_str(text.expose_secret())
            .map_err(|_| Error::unavailable(WHAT, "the stage's secret is no JSON object of strings"))?;
        let by_name = values.into_iter().map(|(name, value)| (name, SecretString::from(value))).collect();
        Ok(Values { by_name, read_at: Instant::now() })
    }
}
