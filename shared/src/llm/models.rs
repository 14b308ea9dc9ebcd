//! The models that the proxy knows: what a client calls one, which server answers, what it costs.
//!
//! Read once at start from JSON, which `LLM_MODELS` holds or a file that `LLM_MODELS_FILE` names; without
//! either the model of `LLM_BASE_URL` is the only one. It holds no keys, only where to find them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Body, Client, RequestBuilder, Response, StatusCode, Url, header};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use super::key::Key;
use super::parts::Parts;
use super::terms::{self, Prices};
#[cfg(feature = "aws")]
use crate::aws::Secrets;
use crate::config::{ConfigError, Env};
use crate::error::Error;

/// The variable with the models, where there is no file to name.
const TEXT: &str = "LLM_MODELS";
const FILE: &str = "LLM_MODELS_FILE";
const DEFAULT_TIMEOUT_SECONDS: u64 = 120;
/// What is reserved for an answer whose length nobody has bounded.
const DEFAULT_MAX_COMPLETION_TOKENS: u64 = 4096;

/// Every model by its alias.
#[derive(Default)]
pub struct Models(BTreeMap<String, Arc<Model>>);

/// One model.
pub struct Model {
    /// What clients call it.
    pub alias: String,
    /// What its server calls it; may be empty, as Predibase's is.
    pub name: String,
    /// The alias of the one that stands in, before anything of an answer has come.
    pub fallback: Option<String>,
    /// For a whole answer, or for the silence between two pieces of a stream.
    pub timeout: Duration,
    /// What is reserved for an answer where the request sets no bound, in tokens.
    pub max_completion_tokens: u64,
    prices: Option<Prices>,
    url: Url,
    key: Key,
    client: Client,
}

/// What the models are said to be, and the variable that says it.
struct Said {
    variable: &'static str,
    json: String,
}

impl Said {
    fn read(env: &Env) -> Result<Option<Self>, ConfigError> {
        match (env.text("LLM_MODELS")?, env.text("LLM_MODELS_FILE")?) {
            (Some(_), Some(_)) => Err(ConfigError::new(FILE, format!("is set, and so is {TEXT}: set one"))),
            (Some(json), None) => Ok(Some(Self { variable: TEXT, json: json.to_owned() })),
            (None, Some(path)) => {
                // The cause may be told: no path is a secret.
                let json = std::fs::read_to_string(path)
                    .map_err(|error| ConfigError::new(FILE, format!("cannot be read: {error}")))?;
                Ok(Some(Self { variable: FILE, json }))
            }
            (None, None) => Ok(None),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct All {
    models: BTreeMap<String, Settings>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    base_url: String,
    /// The alias where it is unset.
    model: Option<String>,
    /// The variable with the key, or its name in the stage's secret.
    api_key_name: Option<String>,
    prompt_usd_per_million: Option<f64>,
    completion_usd_per_million: Option<f64>,
    fallback: Option<String>,
    timeout_seconds: Option<u64>,
    max_completion_tokens: Option<u64>,
}

impl Models {
    /// The models of `LLM_MODELS` or `LLM_MODELS_FILE`, or the one of the other `LLM_…` variables, or none.
    ///
    /// # Errors
    /// [`ConfigError`] where the file cannot be read, or they cannot be what they are said to be.
    pub fn from_env(env: &Env) -> Result<Self, ConfigError> {
        let Some(said) = Said::read(env)? else {
            return Self::of_variables(env, Key::fixed("LLM_API_KEY", env.secret("LLM_API_KEY")?)?);
        };
        Self::of(&said, |name| {
            let key = env.secret(name)?;
            if key.is_none() {
                return Err(ConfigError::new(name, format!("is unset, and {} names it for a key", said.variable)));
            }
            Key::fixed(name, key)
        })
    }

    /// As [`Models::from_env`], with the keys of the stage's secret.
    ///
    /// # Errors
    /// As [`Models::from_env`].
    #[cfg(feature = "aws")]
    pub fn with_secrets(env: &Env, secrets: &Secrets) -> Result<Self, ConfigError> {
        let stage = |name: &str| Key::Stage { secrets: secrets.clone(), name: name.to_owned() };
        match Said::read(env)? {
            Some(said) => Self::of(&said, |name| Ok(stage(name))),
            None => Self::of_variables(env, stage("LLM_API_KEY")),
        }
    }

    fn of(said: &Said, key: impl Fn(&str) -> Result<Key, ConfigError>) -> Result<Self, ConfigError> {
        let client = super::http_client(said.variable)?;
        // The cause may be told: settings hold no secret.
        let wrong = |problem: String| ConfigError::new(said.variable, problem);
        let all: All = serde_json::from_str(&said.json).map_err(|error| wrong(error.to_string()))?;
        for (alias, settings) in &all.models {
            if let Some(fallback) = &settings.fallback
                && (fallback == alias || !all.models.contains_key(fallback))
            {
                return Err(wrong(format!("{alias:?}: \"fallback\" must name another of the models")));
            }
        }
        if all.models.is_empty() || all.models.keys().any(|alias| alias.is_empty()) {
            return Err(wrong("must name at least one model, and none with an empty name".to_owned()));
        }
        let models = all.models.into_iter().map(|(alias, settings)| {
            let key = settings.api_key_name.as_deref().map_or_else(|| Key::fixed(said.variable, None), &key)?;
            let model = settings.model(alias.clone(), key, client.clone());
            let model = model.map_err(|problem| wrong(format!("{alias:?}: {problem}")))?;
            Ok((alias, Arc::new(model)))
        });
        models.collect::<Result<_, _>>().map(Self)
    }

    fn of_variables(env: &Env, key: Key) -> Result<Self, ConfigError> {
        let (Some(base_url), Some(alias)) = (env.text("LLM_BASE_URL")?, env.text("LLM_MODEL")?) else {
            return Ok(Self::default());
        };
        let settings = Settings {
            base_url: base_url.to_owned(),
            model: None,
            api_key_name: None,
            prompt_usd_per_million: None,
            completion_usd_per_million: None,
            fallback: None,
            timeout_seconds: None,
            max_completion_tokens: None,
        };
        let mut model = settings
            .model(alias.to_owned(), key, super::http_client("LLM_BASE_URL")?)
            .map_err(|problem| ConfigError::new("LLM_BASE_URL", problem))?;
        model.prices = terms::prices(env)?;
        Ok(Self(BTreeMap::from([(alias.to_owned(), Arc::new(model))])))
    }

    #[must_use]
    pub fn get(&self, alias: &str) -> Option<&Arc<Model>> {
        self.0.get(alias)
    }

    /// In the order of their aliases.
    pub fn iter(&self) -> impl Iterator<Item = &Model> {
        self.0.values().map(AsRef::as_ref)
    }
}

impl Settings {
    fn model(self, alias: String, key: Key, client: Client) -> Result<Model, &'static str> {
        let url = format!("{}/chat/completions", self.base_url.trim_end_matches('/'));
        let url: Url = url.parse().map_err(|_| "\"base_url\" is no URL such as https://api.openai.com/v1")?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err("\"base_url\" must begin with http:// or https://");
        }
        let prices = match (self.prompt_usd_per_million, self.completion_usd_per_million) {
            (None, None) => None,
            (Some(prompt), Some(completion)) => Some(Prices { prompt, completion }),
            _ => return Err("\"prompt_usd_per_million\" and \"completion_usd_per_million\" are set together"),
        };
        if prices.is_some_and(|prices| {
            [prices.prompt, prices.completion].iter().any(|price| !(0.0..=10_000.0).contains(price))
        }) {
            return Err("prices must lie between 0 and 10000");
        }
        let timeout = self.timeout_seconds.unwrap_or(DEFAULT_TIMEOUT_SECONDS);
        let max_completion_tokens = self.max_completion_tokens.unwrap_or(DEFAULT_MAX_COMPLETION_TOKENS);
        if !(1..=900).contains(&timeout) {
            return Err("\"timeout_seconds\" must lie between 1 and 900");
        }
        if !(1..=10_000_000).contains(&max_completion_tokens) {
            return Err("\"max_completion_tokens\" must lie between 1 and 10000000");
        }
        Ok(Model {
            name: self.model.unwrap_or_else(|| alias.clone()),
            alias,
            fallback: self.fallback,
            timeout: Duration::from_secs(timeout),
            max_completion_tokens,
            prices,
            url,
            key,
            client,
        })
    }
}

impl Model {
    /// Sends a body to the model's server and gives its answer with the head alone read. A key that
    /// is refused is read again.
    ///
    /// # Errors
    /// Where there is no way to the server, or the key cannot be read.
    pub async fn send(&self, body: Parts) -> Result<Response, SendError> {
        let key = self.key.current().await?;
        let response = self.request(body.clone(), key.as_ref()).send().await?;
        if response.status() == StatusCode::UNAUTHORIZED
            && let Some(renewed) = self.key.renewed(key.as_ref()).await?
        {
            return Ok(self.request(body, Some(&renewed)).send().await?);
        }
        Ok(response)
    }

    fn request(&self, body: Parts, key: Option<&SecretString>) -> RequestBuilder {
        let body = Body::wrap(body);
        let request = self.client.post(self.url.clone()).header(header::CONTENT_TYPE, "application/json").body(body);
        match key {
            Some(key) => request.bearer_auth(key.expose_secret()),
            None => request,
        }
    }

    /// Whether `text` holds the key of the model's server, as a refusal that quotes it does.
    pub async fn quotes_key(&self, text: &[u8]) -> bool {
        match self.key.current().await {
            Ok(Some(key)) => holds(text, key.expose_secret()),
            Ok(None) => false,
            Err(_) => true,
        }
    }

    /// What tokens cost, in picodollars (10⁻¹² USD); 0 without prices. A price of six decimals is exact.
    #[must_use]
    pub fn cost_pico(&self, prompt_tokens: u64, completion_tokens: u64) -> u64 {
        let Some(prices) = self.prices else { return 0 };
        let of = |tokens: u64, price: f64| tokens.saturating_mul((price * 1e6).round() as u64);
        of(prompt_tokens, prices.prompt).saturating_add(of(completion_tokens, prices.completion))
    }
}

/// What kept a request from its server.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    #[error(transparent)]
    Key(#[from] Error),
}

/// A stage's secret may hold an empty key, which nothing quotes.
fn holds(text: &[u8], key: &str) -> bool {
    !key.is_empty() && text.windows(key.len()).any(|part| part == key.as_bytes())
}

// A file to read takes the embedded host's temporary folders.
#[cfg(test)]
#[cfg(feature = "embedded")]
mod tests {
    use super::*;

    fn read(file: &str, variables: &[(&str, &str)]) -> Result<Models, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("models.json");
        std::fs::write(&path, file).unwrap();
        let named = [("LLM_MODELS_FILE", path.to_str().unwrap())];
        Models::from_env(&Env::of(named.into_iter().chain(variables.iter().copied())))
    }

    #[test]
    fn a_file_names_models_with_their_servers_keys_and_prices() {
        let file = r#"{"models": {
            "fast": {"base_url": "https://llm.example/v1/", "api_key_name": "FAST_KEY", "model": "",
                     "prompt_usd_per_million": 0.15, "completion_usd_per_million": 0.6, "fallback": "slow"},
            "slow": {"base_url": "http://127.0.0.1:11434/v1", "timeout_seconds": 300, "max_completion_tokens": 100}
        }}"#;
        let models = read(file, &[("FAST_KEY", "sk-fast")]).unwrap();
        let fast = models.get("fast").unwrap();
        assert_eq!((fast.name.as_str(), fast.url.as_str()), ("", "https://llm.example/v1/chat/completions"));
        assert_eq!(fast.cost_pico(2, 3), 2 * 150_000 + 3 * 600_000);
        let slow = models.get(fast.fallback.as_deref().unwrap()).unwrap();
        assert_eq!((slow.name.as_str(), slow.timeout.as_secs(), slow.max_completion_tokens), ("slow", 300, 100));
        assert_eq!(slow.cost_pico(5, 5), 0);
        assert!(models.get("").is_none());
    }

    #[test]
    fn the_same_is_said_without_a_file_and_not_twice() {
        let text = r#"{"models": {"a": {"base_url": "http://127.0.0.1/v1", "api_key_name": "A_KEY"}}}"#;
        let models = Models::from_env(&Env::of([("LLM_MODELS", text), ("A_KEY", "sk-a")])).unwrap();
        assert_eq!(models.iter().map(|model| model.alias.as_str()).collect::<Vec<_>>(), ["a"]);
        let error = |variables: &[(&str, &str)]| Models::from_env(&Env::of(variables.iter().copied())).err().unwrap();
        assert_eq!(error(&[("LLM_MODELS", text)]).to_string(), "A_KEY: is unset, and LLM_MODELS names it for a key");
        assert_eq!(error(&[("LLM_MODELS", "models.json")]).name, "LLM_MODELS");
        assert_eq!(read(text, &[("LLM_MODELS", text), ("A_KEY", "sk-a")]).err().unwrap().name, FILE);
    }

    #[test]
    fn without_a_file_the_hosts_llm_is_the_one_model() {
        let variables = [("LLM_BASE_URL", "http://127.0.0.1:1/v1"), ("LLM_MODEL", "tiny")];
        let models = Models::from_env(&Env::of(variables)).unwrap();
        assert_eq!(models.iter().map(|model| model.alias.as_str()).collect::<Vec<_>>(), ["tiny"]);
        assert!(Models::from_env(&Env::of([])).unwrap().iter().next().is_none());
    }

    #[test]
    fn what_cannot_be_keeps_the_host_from_starting_and_is_named() {
        let url = r#""base_url": "http://127.0.0.1/v1""#;
        for (file, named) in [
            (r"{}".to_owned(), "models"),
            (r#"{"models": {}}"#.to_owned(), "at least one"),
            (format!(r#"{{"models": {{"": {{{url}}}}}}}"#), "empty name"),
            (r#"{"models": {"a": {"base_url": "ftp://x"}}}"#.to_owned(), "\"a\": \"base_url\""),
            (format!(r#"{{"models": {{"a": {{{url}, "api_key": "sk-x"}}}}}}"#), "api_key"),
            (format!(r#"{{"models": {{"a": {{{url}, "fallback": "b"}}}}}}"#), "fallback"),
            (format!(r#"{{"models": {{"a": {{{url}, "fallback": "a"}}}}}}"#), "fallback"),
            (format!(r#"{{"models": {{"a": {{{url}, "prompt_usd_per_million": 1}}}}}}"#), "together"),
            (format!(r#"{{"models": {{"a": {{{url}, "timeout_seconds": 0}}}}}}"#), "timeout_seconds"),
        ] {
            let error = read(&file, &[]).err().unwrap();
            assert_eq!(error.name, FILE, "{file}");
            assert!(error.problem.contains(named), "{file}: {error}");
        }
        let keyed = format!(r#"{{"models": {{"a": {{{url}, "api_key_name": "NO_SUCH"}}}}}}"#);
        assert_eq!(read(&keyed, &[]).err().unwrap().name, "NO_SUCH");
        assert_eq!(read(&keyed, &[("NO_SUCH", "sk\n-secret")]).err().unwrap().name, "NO_SUCH");
    }

    #[test]
    fn a_key_is_found_wherever_it_stands_and_an_empty_one_nowhere() {
        assert!(holds(b"Incorrect API key provided: sk-7.", "sk-7"));
        assert!(!holds(b"Incorrect API key provided: sk-*.", "sk-7"));
        assert!(!holds(b"sk", "sk-7"));
        assert!(!holds(b"Incorrect API key provided: .", ""));
    }
}
