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
