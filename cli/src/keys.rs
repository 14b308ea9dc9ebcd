//! `lesion keys`: make, list and revoke API keys.

use chrono::TimeDelta;
use clap::{Subcommand, value_parser};
use shared::api::admin::{KeyInfo, NewKey, Scope};
use shared::clock::Clock;

use crate::client::Client;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Make a key and print it, this once.
    ///
    /// Keys of one caller see the same jobs: to replace a key, make another for the same caller,
    /// hand it over, and revoke the old one.
    Create {
        /// Whose jobs the key opens: a-z, 0-9, dot, dash, underscore.
        #[arg(long)]
        caller: String,
        /// For people, such as the device that holds the key.
        #[arg(long, default_value = "")]
        name: String,
        /// What the key may do; given twice for both.
        #[arg(long, value_name = "jobs|admin", value_parser = scope, default_value = "jobs")]
        scope: Vec<Scope>,
        /// How long the key works, such as 90d or 12h; for ever without.
        #[arg(long, value_parser = lifetime)]
        expires: Option<TimeDelta>,
        /// A model below /v1/ that the key may ask, given once for each; all without.
        #[arg(long, value_name = "NAME")]
        model: Vec<String>,
        /// Requests to models, so many at once and then evenly as many a minute.
        #[arg(long, value_parser = value_parser!(u32).range(1..))]
        requests_per_minute: Option<u32>,
        /// Tokens of prompts and answers together.
        #[arg(long, value_parser = value_parser!(u32).range(1..))]
        tokens_per_minute: Option<u32>,
        /// What the key may spend on models in a month of the calendar, in USD.
        #[arg(long, value_name = "USD")]
        budget_per_month: Option<f64>,
    },
    /// List the keys, oldest first, without their secrets.
    List,
    /// Revoke keys; they stop working at once.
    Revoke {
        /// As `keys list` shows them.
        #[arg(required = true, value_parser = id)]
        ids: Vec<String>,
    },
}

pub(crate) async fn run(client: &Client, command: Command, json: bool) -> anyhow::Result<u8> {
    match command {
        Command::Create {
            caller,
            name,
            scope,
            expires,
            model,
            requests_per_minute,
            tokens_per_minute,
            budget_per_month,
        } => {
            let new = NewKey {
                expires_at: expires.map(|lifetime| Clock::System.now() + lifetime),
                models: (!model.is_empty()).then_some(model),
                requests_per_minute,
                tokens_per_minute,
                budget_usd_per_month: budget_per_month,
                ..NewKey::plain(caller, name, scope)
            };
            let created = client.create_key(&new).await?;
            if json {
                say!("{}", serde_json::to_string(&created)?);
            } else {
                eprintln!("The key, shown this once and kept nowhere in clear:");
                say!("{}", created.key);
            }
        }
        Command::List => {
            for key in client.keys().await?.keys {
                if json { say!("{}", serde_json::to_string(&key)?) } else { say!("{}", line(&key)) }
            }
        }
        Command::Revoke { ids } => {
            for id in ids {
                client.revoke_key(&id).await?;
                if !json {
                    say!("{id} revoked");
                }
            }
        }
    }
    Ok(0)
}

fn line(key: &KeyInfo) -> String {
    let scopes: Vec<_> = key.scopes.iter().map(|scope| scope.as_str()).collect();
    let until = match (key.revoked_at, key.expires_at) {
        (Some(moment), _) => format!("revoked {}", moment.format("%Y-%m-%d %H:%M")),
        (None, Some(moment)) => format!("expires {}", moment.format("%Y-%m-%d %H:%M")),
        (None, None) => "no end".to_owned(),
    };
    let created = key.created_at.format("%Y-%m-%d %H:%M");
    format!("{} {created} {:<24} {:<16} {:<10} {}", key.id, until, key.caller, scopes.join("+"), key.name)
}

fn scope(text: &str) -> Result<Scope, String> {
    [Scope::Jobs, Scope::Admin].into_iter().find(|scope| scope.as_str() == text).ok_or("jobs or admin".to_owned())
}

/// Only an id goes into the address, which is logged: a whole key is cut down to its id.
fn id(text: &str) -> Result<String, String> {
    let id = text.strip_prefix("lesion_").map_or(text, |rest| rest.split('_').next().unwrap_or(rest));
    let is_id = id.len() == 12 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_id { Ok(id.to_owned()) } else { Err("12 hex digits, as `lesion keys list` shows them".to_owned()) }
}

/// `90d` or `12h`.
fn lifetime(text: &str) -> Result<TimeDelta, String> {
    let wrong = || "a number of days or hours, such as 90d or 12h".to_owned();
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let number: u16 = number.parse().map_err(|_| wrong())?;
    match unit {
        "d" if number > 0 => Ok(TimeDelta::days(number.into())),
        "h" if number > 0 => Ok(TimeDelta::hours(number.into())),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_key_is_cut_down_to_its_id() {
        assert_eq!(id("0123456789ab").unwrap(), "0123456789ab");
        assert_eq!(id("lesion_0123456789ab_secret").unwrap(), "0123456789ab");
        for text in ["", "x", "../../result", "lesion_", "0123456789ab_secret"] {
            assert!(id(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_lifetime_is_a_number_of_days_or_hours() {
        assert_eq!(lifetime("90d"), Ok(TimeDelta::days(90)));
        assert_eq!(lifetime("12h"), Ok(TimeDelta::hours(12)));
        for text in ["", "d", "90", "0d", "-1d", "1w", "1.5d", "99999d", "9é"] {
            assert!(lifetime(text).is_err(), "{text}");
        }
    }
}
