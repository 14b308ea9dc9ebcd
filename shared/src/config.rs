//! The one place that reads the environment.
//!
//! A variable that is unset or empty takes its default; one that cannot be parsed stops the start
//! and is named. Values are never repeated in the error: one of them may be a key.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt::Display;
use std::str::FromStr;

use chrono::TimeDelta;
use secrecy::SecretString;

use crate::job::Policy;

/// A variable that keeps the process from starting.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {problem}")]
pub struct ConfigError {
    pub name: String,
    pub problem: String,
}

impl ConfigError {
    pub fn new(name: &str, problem: impl Into<String>) -> Self {
        Self { name: name.to_owned(), problem: problem.into() }
    }
}

/// The environment, read once.
#[derive(Default)]
pub struct Env(HashMap<String, OsString>);

impl Env {
    /// This process's environment.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    pub fn of_process() -> Self {
        Self(std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value))).collect())
    }

    /// An environment that a test makes up.
    pub fn of<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect())
    }

    /// The text of a variable; `None` where it is unset or empty.
    ///
    /// # Errors
    /// [`ConfigError`] where it is not UTF-8.
    pub fn text(&self, name: &str) -> Result<Option<&str>, ConfigError> {
        match self.0.get(name).map(|value| value.to_str()) {
            None | Some(Some("")) => Ok(None),
            Some(Some(text)) => Ok(Some(text)),
            Some(None) => Err(ConfigError::new(name, "is not UTF-8")),
        }
    }

    /// The parsed value of a variable.
    ///
    /// # Errors
    /// [`ConfigError`] where it does not parse.
    pub fn parse<T: FromStr<Err: Display>>(&self, name: &str) -> Result<Option<T>, ConfigError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        text.parse().map(Some).map_err(|error: T::Err| ConfigError::new(name, error.to_string()))
    }

    /// A number between `least` and `most`, or the default.
    ///
    /// # Errors
    /// [`ConfigError`] where it is no such number.
    pub fn number<T>(&self, name: &str, default: T, least: T, most: T) -> Result<T, ConfigError>
    where
        T: FromStr<Err: Display> + PartialOrd + Display + Copy,
    {
        let value = self.parse(name)?.unwrap_or(default);
        // Written so that NaN is refused as well.
        if !(least..=most).contains(&value) {
            return Err(ConfigError::new(name, format!("must lie between {least} and {most}")));
        }
        Ok(value)
    }

    /// `true` or `false`; unset is false.
    ///
    /// # Errors
    /// [`ConfigError`] where it is neither.
    pub fn flag(&self, name: &str) -> Result<bool, ConfigError> {
        match self.text(name)? {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(ConfigError::new(name, "must be true or false")),
        }
    }

    /// That none of some variables is set.
    ///
    /// # Errors
    /// [`ConfigError`] for the first that is, and `why` it may not be.
    pub fn none_of(&self, names: &[&str], why: &str) -> Result<(), ConfigError> {
        for name in names {
            if self.text(name)?.is_some() {
                return Err(ConfigError::new(name, why));
            }
        }
        Ok(())
    }

    /// A value that must never be printed.
    ///
    /// # Errors
    /// [`ConfigError`] where it is not UTF-8.
    pub fn secret(&self, name: &str) -> Result<Option<SecretString>, ConfigError> {
        Ok(self.text(name)?.map(SecretString::from))
    }
}

/// `MAX_ATTEMPTS`, `LEASE_SECONDS`, `PROMPT_LEASE_SECONDS`, `REDISPATCH_SECONDS`, `BACKOFF_SECONDS`, `DEADLINE_HOURS`,
/// `PHOTO_TTL_DAYS`, `RESULT_TTL_DAYS`.
///
/// # Errors
/// [`ConfigError`] where one of them is out of range.
pub fn policy(env: &Env) -> Result<Policy, ConfigError> {
    let policy = Policy {
        max_attempts: env.number("MAX_ATTEMPTS", 5, 1, 100)?,
        lease: TimeDelta::seconds(env.number("LEASE_SECONDS", 120, 1, 900)?),
        prompt_lease: TimeDelta::seconds(env.number("PROMPT_LEASE_SECONDS", 600, 1, 900)?),
        redispatch: TimeDelta::seconds(env.number("REDISPATCH_SECONDS", 120, 1, 3600)?),
        backoff: TimeDelta::seconds(env.number("BACKOFF_SECONDS", 5, 1, 3600)?),
        deadline: TimeDelta::hours(env.number("DEADLINE_HOURS", 24, 1, 168)?),
        photo_ttl: TimeDelta::days(env.number("PHOTO_TTL_DAYS", 7, 1, 3650)?),
        result_ttl: TimeDelta::days(env.number("RESULT_TTL_DAYS", 30, 1, 3650)?),
        ..Policy::default()
    };
    if policy.photo_ttl > policy.result_ttl {
        return Err(ConfigError::new(
            "PHOTO_TTL_DAYS",
            "must not exceed RESULT_TTL_DAYS: photos go sooner than results",
        ));
    }
    if policy.deadline > policy.photo_ttl {
        return Err(ConfigError::new("DEADLINE_HOURS", "must not exceed PHOTO_TTL_DAYS: an open job needs its photo"));
    }
    Ok(policy)
}

/// `MAX_QUEUED_MB`: photos and prompts that one caller may have waiting, in bytes.
///
/// # Errors
/// [`ConfigError`] where it is out of range.
pub fn max_queued_bytes(env: &Env) -> Result<u64, ConfigError> {
    Ok(env.number("MAX_QUEUED_MB", 4096, 1, 1_000_000)? * 1_000_000)
}

/// Whether `LLM_BASE_URL` or `BEDROCK_AGENT_ID` is set, for a function that does not call the LLM itself.
///
/// # Errors
/// [`ConfigError`] where one is not UTF-8.
pub fn has_llm(env: &Env) -> Result<bool, ConfigError> {
    Ok(env.text("LLM_BASE_URL")?.is_some() || env.text("BEDROCK_AGENT_ID")?.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unset_and_empty_variables_take_the_default() {
        assert_eq!(policy(&Env::of([])).unwrap(), Policy::default());
        assert_eq!(policy(&Env::of([("MAX_ATTEMPTS", "")])).unwrap(), Policy::default());
    }

    #[test]
    fn what_does_not_parse_or_is_out_of_range_is_refused_by_name() {
        for (name, value) in [
            ("MAX_ATTEMPTS", "five"),
            ("MAX_ATTEMPTS", "0"),
            ("LEASE_SECONDS", "-1"),
            ("PROMPT_LEASE_SECONDS", "901"),
            ("PHOTO_TTL_DAYS", "60"),
        ] {
            let error = policy(&Env::of([(name, value)])).unwrap_err();
            assert_eq!(error.name, name);
            assert!(error.to_string().starts_with(name), "{error}");
        }
    }

    #[test]
    fn an_error_never_repeats_the_value() {
        let error = policy(&Env::of([("MAX_ATTEMPTS", "sk-secret")])).unwrap_err();
        assert!(!error.to_string().contains("sk-secret"), "{error}");
    }
}
