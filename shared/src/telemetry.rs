//! JSON logs on standard error. Nothing leaves the process; photos, prompts, completions and keys
//! are never logged: not by us, not by the libraries below us, and not by a panic.

use tracing::field::display;
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata, Span};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use uuid::Uuid;

use crate::config::{ConfigError, Env};

/// The crates whose log lines are written here, with these rules in mind.
const OWN_CRATES: &[&str] = &[
    "shared",
    "submit",
    "inference",
    "enrichment",
    "result",
    "sweep",
    "admin",
    "chat",
    "socket",
    "notify",
    "webhook",
    "local",
];
/// What libraries may say, whatever `LOG_LEVEL` asks for: below it they tell of headers, addresses
/// with passwords, and bodies.
const LIBRARIES: Level = Level::INFO;

/// Starts logging at `LOG_LEVEL` (default `info`; `tracing`'s directives such as
/// `inference=debug,info` work too). Libraries are never heard below `info`, and of a panic its
/// place is logged without its message, which may quote what was being worked on.
///
/// # Errors
/// [`ConfigError`] where `LOG_LEVEL` is no filter.
pub fn init(env: &Env) -> Result<(), ConfigError> {
    let filter = env.text("LOG_LEVEL")?.unwrap_or("info");
    let filter = EnvFilter::try_new(filter).map_err(|_| ConfigError::new("LOG_LEVEL", "is no log filter"))?;
    let lines = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        .with_writer(std::io::stderr)
        // Our spans say whose line it is, which no `LOG_LEVEL` is to take away.
        .with_filter(
            filter.or(filter_fn(is_own_span)).and(filter_fn(may_speak).with_max_level_hint(LevelFilter::TRACE)),
        );
    // A second call, as in tests, keeps the first subscriber.
    let _ = tracing_subscriber::registry().with(lines).try_init();
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(error.code = "panic", panic.place = place, "panicked");
    }));
    Ok(())
}

fn may_speak(line: &Metadata<'_>) -> bool {
    is_own(line) || *line.level() <= LIBRARIES
}

fn is_own(line: &Metadata<'_>) -> bool {
    OWN_CRATES.contains(&line.target().split("::").next().unwrap_or_default())
}

fn is_own_span(line: &Metadata<'_>) -> bool {
    line.is_span() && is_own(line)
}

/// The work on one job: every line in it carries the job's id and that of its trace.
#[must_use]
pub fn job_span(id: Uuid, trace_id: &str) -> Span {
    tracing::error_span!("job", job.id = %id, trace.id = trace_id)
}

/// The request at hand is about this job, and every line of it from here on says so.
pub fn about_job(id: Uuid, trace_id: &str) {
    Span::current().record("job.id", display(id)).record("trace.id", trace_id);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crate_that_serves_may_speak() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let functions = std::fs::read_dir(root.join("functions")).unwrap();
        for function in functions.map(|entry| entry.unwrap().file_name().into_string().unwrap()) {
            assert!(OWN_CRATES.contains(&function.as_str()), "{function}");
        }
    }
}
