//! API keys and their accounts in SQLite, and the count of requests in memory: a restart begins a new window.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::de::DeserializeOwned;
use uuid::Uuid;

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
#[derive(Clone)]
pub struct SqliteCallers {
    sqlite: Sqlite,
    known: Arc<Mutex<Known>>,
    counted: Arc<Mutex<Window>>,
}

/// What was read or written before, as it stands in the file: nobody else writes there, since the folder is this
/// process's alone. What a request needs of it is not read again for each.
#[derive(Default)]
struct Known {
    keys: HashMap<String, ApiKey>,
    accounts: HashMap<String, Account>,
}

#[derive(Default)]
struct Window {
    number: i64,
    requests: HashMap<String, u32>,
}

/// A key that is looked up anew once this is dropped. It goes along with the write's result: should its caller
/// have gone by then, it is dropped with that, behind the commit all the same.
struct Forgotten {
    known: Arc<Mutex<Known>>,
    id: String,
}

impl Drop for Forgotten {
    fn drop(&mut self) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).keys.remove(&self.id);
    }
}

impl SqliteCallers {
    /// # Errors
    /// Where the file cannot be opened or is of another version.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let sqlite = Sqlite::open_upgraded(path, "the key store", VERSION, SCHEMA, &[SINCE_1, SINCE_2])?;
        Ok(Self { sqlite, known: Arc::default(), counted: Arc::default() })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut known = self.known();
        if let Some(key) = known.keys.get(id) {
            return Ok(Some(key.clone()));
        }
        let sql = format!("SELECT {COLUMNS} FROM keys WHERE id = ?1");
        let found = self.sqlite.read(|db| db.prepare_cached(&sql)?.query_row([id], key).optional())?;
        if let Some(key) = &found {
            known.keys.insert(id.to_owned(), key.clone());
        }
        Ok(found)
    }

    async fn keys(&self) -> Result<Vec<ApiKey>, Error> {
        let sql = format!("SELECT {COLUMNS} FROM keys ORDER BY created_at, id");
        self.sqlite.read(|db| db.prepare_cached(&sql)?.query_map([], key)?.collect())
    }

    async fn revoke_key(&self, id: &str, now: Timestamp) -> Result<bool, Error> {
        let revoked = Forgotten { known: Arc::clone(&self.known), id: id.to_owned() };
        let sql = "UPDATE keys SET revoked_at = coalesce(revoked_at, ?1) WHERE id = ?2";
        let update = move |db: &Connection| {
            let found = db.prepare_cached(sql)?.execute(params![now.timestamp_millis(), revoked.id])?;
            Ok((found, revoked))
        };
        let (found, _revoked) = self.sqlite.call(update).await?;
        Ok(found == 1)
    }

    async fn find_account(&self, key_id: &str) -> Result<Account, Error> {
        if let Some(account) = self.known().accounts.get(key_id) {
            return Ok(account.clone());
        }
        self.sqlite.read(|db| {
            // Both as of one write.
            let snapshot = db.unchecked_transaction()?;
            let sql = "SELECT account FROM accounts WHERE key_id = ?1";
            let found = snapshot.prepare_cached(sql)?.query_row([key_id], json::<0, Account>).optional()?;
            let mut account = found.unwrap_or_default();
            let sql = "SELECT id, reservation FROM reservations WHERE key_id = ?1";
            let mut statement = snapshot.prepare_cached(sql)?;
            for row in statement.query_map([key_id], |row| Ok((uuid(row)?, json::<1, _>(row)?)))? {
                let (id, reservation) = row?;
                account.reservations.insert(id, reservation);
            }
            Ok(account)
        })
    }

    async fn replace_account(&self, key_id: &str, version: u64, after: &Account) -> Result<bool, Error> {
        // Where it is not known what the file has, all of it is written anew.
        let before = self.known().accounts.remove(key_id).filter(|account| account.version == version);
        let change = AccountChange::of(before.as_ref(), after).map_err(Error::internal)?;
        let key = key_id.to_owned();
        // Each request of a model waits for two of these. What a power cut may undo are the last ones.
        let is_written = self.sqlite.call_kept(Kept::InFile, move |db| change.write(db, &key, version)).await?;
        if is_written {
            let mut known = self.known();
            // Another write may be known by now.
            if known.accounts.get(key_id).is_none_or(|account| account.version < after.version) {
                known.accounts.insert(key_id.to_owned(), after.clone());
            }
        }
        Ok(is_written)
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

/// What is written of an account: all that changes with every request, and the reservations that came or went.
struct AccountChange {
    version: u64,
    account: String,
    /// Whether all reservations go first.
    anew: bool,
    gone: Vec<Uuid>,
    new: Vec<(Uuid, String)>,
}

impl AccountChange {
    fn of(before: Option<&Account>, after: &Account) -> serde_json::Result<Self> {
        let has = |account: Option<&Account>, id| account.is_some_and(|account| account.reservations.contains_key(id));
        let new = after.reservations.iter().filter(|(id, _)| !has(before, id));
        let gone = before.iter().flat_map(|account| account.reservations.keys()).filter(|id| !has(Some(after), id));
        Ok(Self {
            version: after.version,
            account: serde_json::to_string(&after.without_reservations())?,
            anew: before.is_none(),
            gone: gone.copied().collect(),
            new: new
                .map(|(id, reservation)| Ok((*id, serde_json::to_string(reservation)?)))
                .collect::<Result<_, _>>()?,
        })
    }

    /// `false` where the account does not stand at `version`.
    fn write(&self, db: &Connection, key_id: &str, version: u64) -> rusqlite::Result<bool> {
        let written = match version {
            0 => db
                .prepare_cached(
                    "INSERT INTO accounts (key_id, account, version) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING",
                )?
                .execute(params![key_id, self.account, self.version])?,
            version => db
                .prepare_cached("UPDATE accounts SET account = ?2, version = ?3 WHERE key_id = ?1 AND version = ?4")?
                .execute(params![key_id, self.account, self.version, version])?,
        };
        if written == 0 {
            return Ok(false);
        }
        if self.anew {
            db.prepare_cached("DELETE FROM reservations WHERE key_id = ?1")?.execute([key_id])?;
        }
        let mut delete = db.prepare_cached("DELETE FROM reservations WHERE key_id = ?1 AND id = ?2")?;
        for id in &self.gone {
            delete.execute(params![key_id, id.to_string()])?;
        }
        let mut insert = db.prepare_cached("INSERT INTO reservations VALUES (?1, ?2, ?3)")?;
        for (id, reservation) in &self.new {
            insert.execute(params![key_id, id.to_string(), reservation])?;
        }
        Ok(true)
    }
}

fn uuid(row: &Row<'_>) -> rusqlite::Result<Uuid> {
    let text: String = row.get(0)?;
    text.parse().map_err(|error: uuid::Error| rusqlite::Error::FromSqlConversionFailure(0, Type::Text, error.into()))
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
    use futures_util::FutureExt;

    use super::*;
    use crate::account::{Ask, Used};
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

    const ASK: Ask = Ask { prompt_tokens: 1, completion_tokens: 2, cost_pico: 3 };
    const USED: Used = Used { prompt_tokens: 1, completion_tokens: 1, cost_pico: 2, estimated: false };

    fn admit(account: &Account, number: u128) -> Account {
        let mut after = account.clone();
        after.admit(Uuid::from_u128(number), &KeyLimits::default(), ASK, from_millis(7)).unwrap();
        after
    }

    fn settle(account: &Account, number: u128) -> Account {
        let mut after = account.clone();
        assert!(after.settle(Uuid::from_u128(number), USED, &KeyLimits::default(), from_millis(8)));
        after
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
        callers.create_key(&key("one")).await.unwrap();
        assert_eq!(callers.find_key("one").await.unwrap().unwrap().info.revoked_at, None);
        // Begun, and left alone.
        assert!(callers.revoke_key("one", from_millis(5)).now_or_never().is_none());
        // The writes are done in turn.
        callers.create_key(&key("two")).await.unwrap();
        assert_eq!(callers.find_key("one").await.unwrap().unwrap().info.revoked_at, Some(from_millis(5)));
    }

    #[tokio::test]
    async fn an_account_is_in_the_file_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("callers.sqlite");
        let (callers, mut account) = (SqliteCallers::open(&path).unwrap(), Account::default());
        for number in 0..8 {
            let mut next = vec![admit(&account, number)];
            if number % 3 == 2 {
                next.push(settle(&next[0], number - 1));
            }
            for after in next {
                assert!(callers.replace_account("key", account.version, &after).await.unwrap());
                // Whoever opens the file has nothing but the file.
                let read = SqliteCallers::open(&path).unwrap().find_account("key").await.unwrap();
                assert_eq!((&read, &callers.find_account("key").await.unwrap()), (&after, &after));
                account = after;
            }
        }
        assert_eq!(account.under_way(), 6);
    }

    #[tokio::test]
    async fn an_account_that_another_has_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("callers.sqlite");
        let (one, other) = (SqliteCallers::open(&path).unwrap(), SqliteCallers::open(&path).unwrap());
        let first = admit(&Account::default(), 1);
        assert!(one.replace_account("key", 0, &first).await.unwrap());
        let second = settle(&first, 1);
        assert!(other.replace_account("key", first.version, &second).await.unwrap());
        // It still knows the first, and finds out when it writes.
        assert!(!one.replace_account("key", first.version, &admit(&first, 2)).await.unwrap());
        assert_eq!(one.find_account("key").await.unwrap(), second);
        let third = admit(&second, 3);
        assert!(one.replace_account("key", second.version, &third).await.unwrap());
        assert_eq!(SqliteCallers::open(&path).unwrap().find_account("key").await.unwrap(), third);
    }

    #[tokio::test]
    async fn an_account_from_before_reservations_had_rows_is_taken_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("callers.sqlite");
        let account = admit(&admit(&Account::default(), 1), 2);
        let old = format!(
            "CREATE TABLE keys (id TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
            CREATE TABLE accounts (key_id TEXT PRIMARY KEY, version INTEGER NOT NULL, account TEXT NOT NULL)
            STRICT, WITHOUT ROWID;
            INSERT INTO accounts VALUES ('key', {}, '{}');
            PRAGMA user_version = 2;",
            account.version,
            serde_json::to_string(&account).unwrap()
        );
        Connection::open(&path).unwrap().execute_batch(&old).unwrap();
        let callers = SqliteCallers::open(&path).unwrap();
        assert_eq!(callers.find_account("key").await.unwrap(), account);
        let after = settle(&account, 1);
        assert!(callers.replace_account("key", account.version, &after).await.unwrap());
        assert_eq!(SqliteCallers::open(&path).unwrap().find_account("key").await.unwrap(), after);
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
