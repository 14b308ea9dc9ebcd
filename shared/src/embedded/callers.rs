//! API keys and their accounts in SQLite, and the count of requests in memory: a restart begins a new window.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::types::Type;
use rusqlite::{OptionalExtension, Row, params};
use serde::de::DeserializeOwned;

use super::sqlite::{Kept, Sqlite};
use crate::account::Account;
use crate::api::admin::{KeyInfo, Scope};
use crate::auth::keys::ApiKey;
use crate::clock::{Timestamp, from_millis};
use crate::error::Error;
use crate::ports::Callers;

const VERSION: u32 = 2;
const SCHEMA: &str = "
    CREATE TABLE keys (
        id TEXT PRIMARY KEY,
        caller TEXT NOT NULL,
        name TEXT NOT NULL,
        scopes TEXT NOT NULL,           -- JSON
        secret_sha256 BLOB NOT NULL,
        created_at INTEGER NOT NULL,    -- milliseconds since the epoch, as all times here
        expires_at INTEGER,
        revoked_at INTEGER,
        limits TEXT NOT NULL DEFAULT '{}'   -- JSON
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE accounts (
        key_id TEXT PRIMARY KEY,
        version INTEGER NOT NULL,
        account TEXT NOT NULL           -- JSON
    ) STRICT, WITHOUT ROWID;
";
/// What a file lacks that was made before keys had limits.
const SINCE_1: &str = "
    ALTER TABLE keys ADD COLUMN limits TEXT NOT NULL DEFAULT '{}';
    CREATE TABLE accounts (key_id TEXT PRIMARY KEY, version INTEGER NOT NULL, account TEXT NOT NULL)
        STRICT, WITHOUT ROWID;
";
const COLUMNS: &str = "id, caller, name, scopes, secret_sha256, created_at, expires_at, revoked_at, limits";

/// Callers counted apart in one window; those beyond share a count.
const MAX_COUNTED: usize = 100_000;

/// The key store in one SQLite file.
#[derive(Clone)]
pub struct SqliteCallers {
    sqlite: Sqlite,
    counted: Arc<Mutex<Window>>,
}

#[derive(Default)]
struct Window {
    number: i64,
    requests: HashMap<String, u32>,
}

impl SqliteCallers {
    /// # Errors
    /// Where the file cannot be opened or is of another version.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let sqlite = Sqlite::open_upgraded(path, "the key store", VERSION, SCHEMA, &[SINCE_1])?;
        Ok(Self { sqlite, counted: Arc::default() })
    }
}

impl Callers for SqliteCallers {
    async fn create_key(&self, key: &ApiKey) -> Result<bool, Error> {
        let key = key.clone();
        let scopes = serde_json::to_string(&key.info.scopes).map_err(Error::internal)?;
        let limits = serde_json::to_string(&key.info.limits).map_err(Error::internal)?;
        let sql =
            format!("INSERT INTO keys ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) ON CONFLICT DO NOTHING");
        let written = self.sqlite.call(move |db| {
            let info = &key.info;
            db.prepare_cached(&sql)?.execute(params![
                info.id,
                info.caller,
                info.name,
                scopes,
                key.secret_sha256,
                info.created_at.timestamp_millis(),
                info.expires_at.map(|moment| moment.timestamp_millis()),
                info.revoked_at.map(|moment| moment.timestamp_millis()),
                limits,
            ])
        });
        Ok(written.await? == 1)
    }

    async fn find_key(&self, id: &str) -> Result<Option<ApiKey>, Error> {
        let sql = format!("SELECT {COLUMNS} FROM keys WHERE id = ?1");
        self.sqlite.read(|db| db.prepare_cached(&sql)?.query_row([id], key).optional())
    }

    async fn keys(&self) -> Result<Vec<ApiKey>, Error> {
        let sql = format!("SELECT {COLUMNS} FROM keys ORDER BY created_at, id");
        self.sqlite.read(|db| db.prepare_cached(&sql)?.query_map([], key)?.collect())
    }

    async fn revoke_key(&self, id: &str, now: Timestamp) -> Result<bool, Error> {
        let id = id.to_owned();
        let sql = "UPDATE keys SET revoked_at = coalesce(revoked_at, ?1) WHERE id = ?2";
        let found =
            self.sqlite.call(move |db| db.prepare_cached(sql)?.execute(params![now.timestamp_millis(), id])).await?;
        Ok(found == 1)
    }

    async fn find_account(&self, key_id: &str) -> Result<Account, Error> {
        let sql = "SELECT account FROM accounts WHERE key_id = ?1";
        let found = self.sqlite.read(|db| db.prepare_cached(sql)?.query_row([key_id], json::<0, _>).optional())?;
        Ok(found.unwrap_or_default())
    }

    async fn replace_account(&self, key_id: &str, version: u64, after: &Account) -> Result<bool, Error> {
        let text = serde_json::to_string(after).map_err(Error::internal)?;
        let (key_id, after) = (key_id.to_owned(), after.version);
        let sql = match version {
            0 => "INSERT INTO accounts (key_id, account, version) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING",
            _ => "UPDATE accounts SET account = ?2, version = ?3 WHERE key_id = ?1 AND version = ?4",
        };
        // Each request of a model waits for two of these. What a power cut may undo are the last ones.
        let written = self.sqlite.call_kept(Kept::InFile, move |db| {
            let mut statement = db.prepare_cached(sql)?;
            match version {
                0 => statement.execute(params![key_id, text, after]),
                version => statement.execute(params![key_id, text, after, version]),
            }
        });
        Ok(written.await? == 1)
    }

    async fn count_request(&self, caller: &str, window: i64) -> Result<u32, Error> {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        if counted.number != window {
            *counted = Window { number: window, requests: HashMap::new() };
        }
        let is_full = counted.requests.len() >= MAX_COUNTED && !counted.requests.contains_key(caller);
        let count = counted.requests.entry(if is_full { String::new() } else { caller.to_owned() }).or_default();
        *count = count.saturating_add(1);
        Ok(*count)
    }
}

fn key(row: &Row<'_>) -> rusqlite::Result<ApiKey> {
    let moment = |column: usize| row.get::<_, Option<i64>>(column).map(|millis| millis.map(from_millis));
    let info = KeyInfo {
        id: row.get(0)?,
        caller: row.get(1)?,
        name: row.get(2)?,
        scopes: json::<3, Vec<Scope>>(row)?,
        created_at: from_millis(row.get(5)?),
        expires_at: moment(6)?,
        revoked_at: moment(7)?,
        limits: json::<8, _>(row)?,
    };
    Ok(ApiKey { info, secret_sha256: row.get(4)? })
}

/// What a column holds as JSON.
fn json<const COLUMN: usize, T: DeserializeOwned>(row: &Row<'_>) -> rusqlite::Result<T> {
    let text: String = row.get(COLUMN)?;
    serde_json::from_str(&text)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(COLUMN, Type::Text, error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_from_before_keys_had_limits_is_taken_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("callers.sqlite");
        let old =
            "CREATE TABLE keys (id TEXT PRIMARY KEY, caller TEXT NOT NULL, name TEXT NOT NULL, scopes TEXT NOT NULL,
            secret_sha256 BLOB NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER, revoked_at INTEGER)
            STRICT, WITHOUT ROWID;
            INSERT INTO keys VALUES ('0123456789ab', 'ward', '', '[\"jobs\"]', x'00', 1, NULL, NULL);
            PRAGMA user_version = 1;";
        rusqlite::Connection::open(&path).unwrap().execute_batch(old).unwrap();
        for _ in 0..2 {
            let callers = SqliteCallers::open(&path).unwrap();
            let key = callers.find_key("0123456789ab").await.unwrap().unwrap();
            assert_eq!((key.info.caller.as_str(), key.info.limits), ("ward", Default::default()));
            assert_eq!(callers.find_account("0123456789ab").await.unwrap(), Account::default());
        }
    }

    #[tokio::test]
    async fn callers_beyond_the_bound_share_a_count_and_a_new_window_forgets_them() {
        let folder = tempfile::tempdir().unwrap();
        let callers = SqliteCallers::open(&folder.path().join("callers.sqlite")).unwrap();
        for number in 0..MAX_COUNTED {
            assert_eq!(callers.count_request(&number.to_string(), 1).await.unwrap(), 1);
        }
        assert_eq!(callers.count_request("a", 1).await.unwrap(), 1);
        assert_eq!(callers.count_request("b", 1).await.unwrap(), 2);
        assert_eq!(callers.count_request("0", 1).await.unwrap(), 2);
        assert_eq!(callers.counted.lock().unwrap().requests.len(), MAX_COUNTED + 1);
        assert_eq!(callers.count_request("b", 2).await.unwrap(), 1);
        assert_eq!(callers.counted.lock().unwrap().requests.len(), 1);
    }
}
