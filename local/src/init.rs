//! `local init`: the first admin key.
//!
//! Triggered by whoever can read the data folder, who owns what is in it anyway. Takes the folder's
//! lock, so no host runs beside. Writes one key.

use anyhow::bail;
use secrecy::SecretString;
use shared::api::admin::{NewKey, Scope};
use shared::auth::LOCAL;
use shared::auth::keys::ApiKey;
use shared::clock::Clock;
use shared::config::Env;
use shared::crash::{self, Point};
use shared::ports::Callers;

use crate::{config, data};

/// Makes an admin key of the caller `local`, who owns what was submitted without keys.
///
/// # Errors
/// Where keys exist already and `another` was not asked for, or the folder cannot be used.
pub async fn init(env: &Env, clock: &Clock, another: bool) -> anyhow::Result<SecretString> {
    let data_dir = config::data_dir(env)?;
    let _lock = data::open(&data_dir)?;
    let callers = data::callers(&data_dir)?;
    let count = callers.keys().await?.len();
    if count > 0 && !another {
        bail!(
            "{} has keys already ({count}). Make more with `lesion keys create`; where no admin key is at hand, \
             `local init --another` makes one",
            data_dir.display()
        );
    }
    let name = "made by local init".to_owned();
    let new = NewKey::plain(LOCAL.to_owned(), name, vec![Scope::Jobs, Scope::Admin]);
    let (key, text) = ApiKey::make(new, clock.now())?;
    if !callers.create_key(&key).await? {
        bail!("the new key's id is taken; try again");
    }
    crash::here(Point::InitKeyWritten);
    Ok(text)
}
