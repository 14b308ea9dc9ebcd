//! What the embedded host is told by its environment.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use directories::ProjectDirs;
use shared::auth::Limits;
use shared::config::{self, ConfigError, Env};
use shared::job::Policy;

/// The host's settings; each field names its variable.
#[derive(Debug, Clone)]
pub struct Config {
    /// `LISTEN_ADDR`: loopback only where there are neither keys nor an issuer. Port 0 takes a free one.
    pub listen_addr: SocketAddr,
    /// `DATA_DIR`: records, queue, photos, models.
    pub data_dir: PathBuf,
    /// `MODEL_DIR`: a folder with `manifest.json` and the network beside it.
    pub model_dir: PathBuf,
    /// `MODEL_DIGEST`: SHA-256 of the manifest; unset takes whatever bundle lies in `MODEL_DIR`.
    pub model_digest: Option<String>,
    /// `ORT_DYLIB_PATH`: the ONNX Runtime shared library.
    pub ort_library: PathBuf,
    /// `TMPDIR`: where the model is unpacked.
    pub temporary_dir: PathBuf,
    /// `INFERENCE_WORKERS`: photos worked at the same time.
    pub inference_workers: usize,
    /// `MAX_QUEUED_MB`: photos and prompts that one caller may have waiting, in bytes.
    pub max_queued_bytes: u64,
    /// `SWEEP_INTERVAL_SECONDS`.
    pub sweep_interval: Duration,
    /// What callers may do in a minute; of no effect where no credentials are asked for.
    pub limits: Limits,
    pub policy: Policy,
}

impl Config {
    /// # Errors
    /// [`ConfigError`] for the first variable that is not right.
    pub fn from_env(env: &Env) -> Result<Self, ConfigError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            listen_addr: env.parse("LISTEN_ADDR")?.unwrap_or(([127, 0, 0, 1], 8080).into()),
            data_dir: data_dir(env)?,
            model_dir: env.text("MODEL_DIR")?.unwrap_or("model").into(),
            model_digest: inference::config::model_digest(env)?,
            ort_library: inference::config::ort_library(env)?,
            temporary_dir: env.text("TMPDIR")?.unwrap_or("/tmp").into(),
            inference_workers: env.number("INFERENCE_WORKERS", cores.min(8), 1, 64)?,
            max_queued_bytes: config::max_queued_bytes(env)?,
            sweep_interval: Duration::from_secs(env.number("SWEEP_INTERVAL_SECONDS", 60, 1, 3600)?),
            limits: Limits::from_env(env)?,
            policy: config::policy(env)?,
        })
    }

    /// Whether what was configured can be answered for without keys.
    pub(crate) fn check_keyless(&self) -> Result<(), ConfigError> {
        if !self.listen_addr.ip().is_loopback() {
            let problem = "must be a loopback address such as 127.0.0.1:8080 for as long as there are no keys; \
                `local init` makes the first";
            return Err(ConfigError::new("LISTEN_ADDR", problem));
        }
        if self.limits.admit_guests {
            let problem = "is of no use where nobody is asked for a key; `local init` makes the first";
            return Err(ConfigError::new("ADMIT_GUESTS", problem));
        }
        Ok(())
    }
}

/// `DATA_DIR`.
pub(crate) fn data_dir(env: &Env) -> Result<PathBuf, ConfigError> {
    if let Some(path) = env.text("DATA_DIR")? {
        return Ok(path.into());
    }
    let folders = ProjectDirs::from("", "", "lesion");
    let missing = || ConfigError::new("DATA_DIR", "must be set where there is no home folder");
    folders.map(|folders| folders.data_local_dir().to_owned()).ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_values_refuse_to_start_and_name_the_variable() {
        for (name, value) in [
            ("LISTEN_ADDR", "8080"),
            ("ADMIT_GUESTS", "yes"),
            ("REQUESTS_PER_MINUTE", "0"),
            ("MODEL_DIGEST", "latest"),
            ("INFERENCE_WORKERS", "0"),
            ("INFERENCE_WORKERS", "many"),
            ("SWEEP_INTERVAL_SECONDS", "1.5"),
            ("MAX_ATTEMPTS", "-1"),
        ] {
            let error = Config::from_env(&Env::of([("DATA_DIR", "x"), (name, value)])).unwrap_err();
            assert_eq!(error.name, name, "{value}");
        }
    }

    #[test]
    fn the_defaults_listen_on_loopback() {
        let config = Config::from_env(&Env::of([("DATA_DIR", "x")])).unwrap();
        assert_eq!(config.listen_addr.to_string(), "127.0.0.1:8080");
    }
}
