//! JSON logs on standard error. Nothing leaves the process; photos, prompts, completions and keys
//! are never logged.

use tracing_subscriber::EnvFilter;

use crate::config::{ConfigError, Env};

/// Starts logging at `LOG_LEVEL` (default `info`; `tracing`'s directives such as
/// `inference=debug,info` work too).
///
/// # Errors
/// [`ConfigError`] where `LOG_LEVEL` is no filter.
pub fn init(env: &Env) -> Result<(), ConfigError> {
    let filter = env.text("LOG_LEVEL")?.unwrap_or("info");
    let filter = EnvFilter::try_new(filter).map_err(|_| ConfigError::new("LOG_LEVEL", "is no log filter"))?;
    let subscriber = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A second call, as in tests, keeps the first subscriber.
    let _ = subscriber.try_init();
    Ok(())
}
