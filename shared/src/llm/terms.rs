//! How long one try may take and what tokens cost, whoever answers.

use std::time::Duration;

use super::Answer;
use crate::config::{ConfigError, Env};

/// What [`Terms`] are read from.
pub(super) const VARIABLES: [&str; 3] =
    ["LLM_TIMEOUT_SECONDS", "LLM_PROMPT_USD_PER_MILLION", "LLM_COMPLETION_USD_PER_MILLION"];

pub(super) struct Terms {
    /// For one try, from connect to the last byte.
    pub(super) attempt_timeout: Duration,
    prices: Option<Prices>,
}

/// What a million tokens cost, in USD.
#[derive(Debug, Clone, Copy)]
pub(super) struct Prices {
    pub(super) prompt: f64,
    pub(super) completion: f64,
}

impl Terms {
    pub(super) fn from_env(env: &Env) -> Result<Self, ConfigError> {
        let attempt_timeout = Duration::from_secs(env.number("LLM_TIMEOUT_SECONDS", 30, 1, 600)?);
        Ok(Self { attempt_timeout, prices: prices(env)? })
    }

    pub(super) fn cost_usd(&self, answer: &Answer) -> Option<f64> {
        let prices = self.prices?;
        let (prompt, completion) = (answer.prompt_tokens? as f64, answer.completion_tokens? as f64);
        Some((prompt * prices.prompt + completion * prices.completion) / 1e6)
    }
}

/// `LLM_PROMPT_USD_PER_MILLION` and `LLM_COMPLETION_USD_PER_MILLION`; without them nobody counts money.
pub(super) fn prices(env: &Env) -> Result<Option<Prices>, ConfigError> {
    let (prompt, completion) = ("LLM_PROMPT_USD_PER_MILLION", "LLM_COMPLETION_USD_PER_MILLION");
    let prices = (env.parse("LLM_PROMPT_USD_PER_MILLION")?, env.parse("LLM_COMPLETION_USD_PER_MILLION")?);
    let in_bounds = |name: &str, price: f64| {
        // Written so that NaN is refused as well.
        let wrong = || ConfigError::new(name, "must lie between 0 and 10000");
        (0.0..=10_000.0).contains(&price).then_some(price).ok_or_else(wrong)
    };
    match prices {
        (None, None) => Ok(None),
        (Some(a), Some(b)) => Ok(Some(Prices { prompt: in_bounds(prompt, a)?, completion: in_bounds(completion, b)? })),
        (Some(_), None) => Err(ConfigError::new(completion, format!("is needed with {prompt}"))),
        (None, Some(_)) => Err(ConfigError::new(prompt, format!("is needed with {completion}"))),
    }
}
