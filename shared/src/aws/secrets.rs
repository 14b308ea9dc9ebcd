//! One secret of Secrets Manager: a JSON object of strings, kept in memory until one of them turns
//! out to be no longer right.

use std::collections::HashMap;
use std::sync::Arc;

use aws_config::SdkConfig;
use aws_sdk_secretsmanager::Client;
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::Mutex;

use crate::error::Error;

const WHAT: &str = "the secret store";

type Values = HashMap<String, SecretString>;

/// The stage's secret.
#[derive(Debug, Clone)]
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
        Ok(kept.insert(values).get(name).cloned())
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
        let value = values.get(name).cloned();
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
        Ok(values.into_iter().map(|(name, value)| (name, SecretString::from(value))).collect())
    }
}
