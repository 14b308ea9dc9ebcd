//! Raw outputs of the model by the key of what went in, so that the same photo of the same caller
//! is not run twice. Losing the cache costs time and nothing else: no error leaves this module.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use redis::AsyncCommands;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};

#[cfg(feature = "aws")]
use crate::aws::S3BlobStore;
use crate::bounded::Bounded;
use crate::config::{ConfigError, Env};
#[cfg(feature = "aws")]
use crate::error::Error;
#[cfg(feature = "aws")]
use crate::ports::BlobStore;

/// An outage must not slow the pipeline: a cache that takes longer than this is not there.
const TIMEOUT: Duration = Duration::from_millis(250);
/// All that is kept in memory. The outputs of the model in this repository take 2 KB, most of it the map.
const MEMORY_BYTES: usize = 4 * 1024 * 1024;

/// Where the outputs are kept.
pub enum PredictionCache {
    /// Nowhere.
    Off,
    /// In this process, until it ends.
    Memory(Mutex<Bounded<String, Instant>>),
    /// Redis or Valkey (`REDIS_URL`).
    Redis(ConnectionManager),
    /// The stage's bucket, whose lifecycle deletes what is old.
    #[cfg(feature = "aws")]
    S3(S3BlobStore),
}

impl PredictionCache {
    /// Redis where `REDIS_URL` is set, memory where it is not. The connection is made at first
    /// use, so that Redis may come later than we do.
    ///
    /// # Errors
    /// [`ConfigError`] where `REDIS_URL` is no Redis URL.
    pub fn from_env(env: &Env) -> Result<Self, ConfigError> {
        let Some(url) = env.text("REDIS_URL")? else { return Ok(Self::memory()) };
        let wrong = |error: redis::RedisError| ConfigError::new("REDIS_URL", error.category().to_owned());
        let client = redis::Client::open(url).map_err(wrong)?;
        let config = ConnectionManagerConfig::new()
            .set_number_of_retries(1)
            .set_connection_timeout(Some(TIMEOUT))
            .set_response_timeout(Some(TIMEOUT));
        ConnectionManager::new_lazy_with_config(client, config).map(Self::Redis).map_err(wrong)
    }

    #[must_use]
    pub fn memory() -> Self {
        Self::Memory(Mutex::new(Bounded::new(MEMORY_BYTES)))
    }

    /// What is kept under `key`; `None` also where the cache cannot be reached.
    pub async fn get(&self, key: &str) -> Option<Vec<u8>> {
        match self {
            Self::Off => None,
            Self::Memory(kept) => locked(kept).get(key, Instant::now()).map(Vec::from),
            Self::Redis(manager) => logged("get", manager.clone().get(key).await.map_err(category)).flatten(),
            #[cfg(feature = "aws")]
            Self::S3(blobs) => logged("get", in_time(blobs.get(&blob_key(key))).await).flatten(),
        }
    }

    /// Keeps `value` for `ttl`.
    pub async fn put(&self, key: &str, value: Vec<u8>, ttl: Duration) {
        match self {
            Self::Off => {}
            Self::Memory(kept) => {
                // A copy has no room to spare.
                let value = Bytes::copy_from_slice(&value);
                locked(kept).put(key.to_owned(), value, Instant::now() + ttl);
            }
            Self::Redis(manager) => {
                let seconds = ttl.as_secs().max(1);
                logged::<()>("put", manager.clone().set_ex(key, value, seconds).await.map_err(category));
            }
            #[cfg(feature = "aws")]
            Self::S3(blobs) => drop(logged("put", in_time(blobs.put(&blob_key(key), value)).await)),
        }
    }

    /// Erases what is kept under `key`; `false` where the cache could not be reached.
    pub async fn remove(&self, key: &str) -> bool {
        match self {
            Self::Off => true,
            Self::Memory(kept) => {
                locked(kept).remove(key);
                true
            }
            Self::Redis(manager) => logged::<()>("remove", manager.clone().del(key).await.map_err(category)).is_some(),
            #[cfg(feature = "aws")]
            Self::S3(blobs) => {
                logged("remove", blobs.delete(&blob_key(key)).await.map_err(|error| error.chain())).is_some()
            }
        }
    }
}

fn locked<T>(kept: &Mutex<T>) -> MutexGuard<'_, T> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

fn logged<T>(operation: &str, result: Result<T, impl std::fmt::Display>) -> Option<T> {
    result
        .inspect_err(|error| tracing::warn!(cache.operation = operation, error.kind = %error, "cache not reached"))
        .ok()
}

fn category(error: redis::RedisError) -> String {
    error.category().to_owned()
}

#[cfg(feature = "aws")]
fn blob_key(key: &str) -> String {
    format!("cache/{key}")
}

#[cfg(feature = "aws")]
async fn in_time<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, String> {
    let done = tokio::time::timeout(TIMEOUT, work).await;
    done.map_err(|_| "timeout".to_owned())?.map_err(|error| error.chain())
}
