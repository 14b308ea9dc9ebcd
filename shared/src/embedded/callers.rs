//! API keys and their accounts in SQLite, and in memory what a request needs of them; the count of requests in
//! memory alone: a restart begins a new window.

mod accounts;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::columns::json;
use super::sqlite::{Kept, Sqlite};
use crate::account::Account;
use crate::api::admin::{KeyInfo, Scope};
use crate::auth::keys::ApiKey;
use crate::clock::{Timestamp, from_millis};
use crate::error::Error;
use crate::ports::Callers;

const VERSION: u32 = 3;
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
        account TEXT NOT NULL           -- JSON, without its reservations
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE reservations (
        key_id TEXT NOT NULL,
        id TEXT NOT NULL,
        reservation TEXT NOT NULL,      -- JSON
        PRIMARY KEY (key_id, id)
    ) STRICT, WITHOUT ROWID;
";
/// What a file lacks that was made before keys had limits.
const SINCE_1: &str = "
    ALTER TABLE keys ADD COLUMN limits TEXT NOT NULL DEFAULT '{}';
    CREATE TABLE accounts (key_id TEXT PRIMARY KEY, version INTEGER NOT NULL, account TEXT NOT NULL)
        STRICT, WITHOUT ROWID;
";
/// And before reservations had rows of their own: those of an account that was written before lie in its JSON until
/// it is written again.
const SINCE_2: &str = "
    CREATE TABLE reservations (key_id TEXT NOT NULL, id TEXT NOT NULL, reservation TEXT NOT NULL,
        PRIMARY KEY (key_id, id)) STRICT, WITHOUT ROWID;
";
const COLUMNS: &str = "id, caller, name, scopes, secret_sha256, created_at, expires_at, revoked_at, limits";

/// Callers counted apart in one window; those beyond share a count.
const MAX_COUNTED: usize = 100_000;

/// The key store in one SQLite file.
///
/// Keys and accounts that were read or written before are remembered as they stand in the file: nobody else writes
/// there, since the folder is this process's alone. They are as many as keys were ever made.
#[derive(Clone)]
pub struct SqliteCallers {
    sqlite: Sqlite,
    keys: Arc<Mutex<HashMap<String, ApiKey>>>,
    /// Shared, so that none is copied while the lock is held.
    accounts: Arc<Mutex<HashMap<String, Arc<Account>>>>,
    counted: Arc<Mutex<Window>>,
}

#[derive(Default)]
struct Window {
    number: i64,
    requests: HashMap<String, u32>,
}

/// A key that is looked up anew once this is dropped. It goes along with the write's result: should its caller
/// have gone by then, it is dropped with that, behind the commit all the same.
struct Forgotten {
    keys: Arc<Mutex<HashMap<String, ApiKey>>>,
    id: String,
}

impl Drop for Forgotten {
    fn drop(&mut self) {
        locked(&self.keys).remove(&self.id);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SqliteCallers {
    /// # Errors
    /// Where the file cannot be opened or is of another version.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let sqlite = Sqlite::open_upgraded(path, "the key store", VERSION, SCHEMA, &[SINCE_1, SINCE_2])?;
        Ok(Self { sqlite, keys: Arc::default(), accounts: Arc::default(), counted: Arc::default() })
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
        // Held while it is read: what is forgotten must not come in behind it.
        let mut known = locked(&self.keys);
        if let Some(key) = known.get(id) {
            return Ok(Some(key.clone()));
        }
        let sql = format!("SELECT {COLUMNS} FROM keys WHERE id = ?1");
        let found = self.sqlite.read(|db| db.prepare_cached(&sql)?.query_row([id], key).optional())?;
        if let Some(key) = &found {
            known.insert(id.to_owned(), key.clone());
        }
        Ok(found)
    }

    async fn keys(&self) -> Result<Vec<ApiKey>, Error> {
        let sql = format!("SELECT {COLUMNS} FROM keys ORDER BY created_at, id");
        self.sqlite.read(|db| db.prepare_cached(&sql)?.query_map([], key)?.collect())
    }

    async fn revoke_key(&self, id: &str, now: Timestamp) -> Result<bool, Error> {
        let revoked = Forgotten { keys: Arc::clone(&self.keys), id: id.to_owned() };
        let sql = "UPDATE keys SET revoked_at = coalesce(revoked_at, ?1) WHERE id = ?2";
        let update = move |db: &Connection| {
            let found = db.prepare_cached(sql)?.execute(params![now.timestamp_millis(), revoked.id])?;
            Ok((found, revoked))
        };
        let (found, _revoked) = self.sqlite.call(update).await?;
        Ok(found == 1)
    }

    async fn find_account(&self, key_id: &str) -> Result<Account, Error> {
        let known = locked(&self.accounts).get(key_id).cloned();
        if let Some(account) = known {
            return Ok(Account::clone(&account));
        }
        self.sqlite.read(|db| accounts::find(db, key_id))
    }

    async fn replace_account(&self, key_id: &str, version: u64, after: &Account) -> Result<bool, Error> {
        // Where it is not known what the file has, all of it is written anew.
        let before = locked(&self.accounts).remove(key_id).filter(|account| account.version == version);
        let change = accounts::Change::of(before.as_deref(), after).map_err(Error::internal)?;
        let key = key_id.to_owned();
        // Each request of a model waits for two of these. What a power cut may undo are the last ones.
        let is_written = self.sqlite.call_kept(Kept::InFile, move |db| change.write(db, &key, version)).await?;
        if is_written {
            let after = Arc::new(after.clone());
            let mut known = locked(&self.accounts);
            // Another write may be known by now.
            if known.get(key_id).is_none_or(|account| account.version < after.version) {
                known.insert(key_id.to_owned(), after);
            }
        }
        Ok(is_written)
    }

    async fn count_request(&self, caller: &str, window: i64) -> Result<u32, Error> {
        let mut counted = locked(&self.counted);
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::api::admin::KeyLimits;

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

    fn key(id: &str) -> ApiKey {
        let info = KeyInfo {
            id: id.to_owned(),
            caller: "ward".to_owned(),
            name: String::new(),
            scopes: vec![Scope::Jobs],
            created_at: from_millis(1),
            expires_at: None,
            revoked_at: None,
            limits: KeyLimits::default(),
        };
        ApiKey { info, secret_sha256: vec![0] }
    }

    #[tokio::test]
    async fn a_key_is_revoked_though_nobody_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let callers = SqliteCallers::open(&folder.path().join("callers.sqlite")).unwrap();
        let revoked_at = async || callers.find_key("one").await.unwrap().unwrap().info.revoked_at;
        callers.create_key(&key("one")).await.unwrap();
        assert_eq!(revoked_at().await, None);
        // No write is done before the word is given.
        let (go, word) = std::sync::mpsc::channel::<()>();
        let hold = move |_: &Connection| Ok(word.recv().is_ok());
        assert!(callers.sqlite.call(hold).now_or_never().is_none());
        // Begun, and left alone; the key is good until it is written.
        assert!(callers.revoke_key("one", from_millis(5)).now_or_never().is_none());
        assert_eq!(revoked_at().await, None);
        go.send(()).unwrap();
        // The writes are done in turn.
        callers.create_key(&key("two")).await.unwrap();
        assert_eq!(revoked_at().await, Some(from_millis(5)));
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
