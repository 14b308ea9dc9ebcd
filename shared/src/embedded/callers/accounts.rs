//! Accounts in SQLite: a row with all that changes with every request, and a row for each reservation, so that as
//! much is written however many requests are under way.

use rusqlite::{Connection, OptionalExtension, params};
use uuid::Uuid;

use super::super::columns::{json, uuid};
use crate::account::Account;

/// The account of a key; a new one where there is none.
pub(super) fn find(db: &Connection, key_id: &str) -> rusqlite::Result<Account> {
    // Both as of one write.
    let snapshot = db.unchecked_transaction()?;
    let sql = "SELECT account FROM accounts WHERE key_id = ?1";
    let found = snapshot.prepare_cached(sql)?.query_row([key_id], json::<0, Account>).optional()?;
    let sql = "SELECT id, reservation FROM reservations WHERE key_id = ?1";
    let mut statement = snapshot.prepare_cached(sql)?;
    let rows = statement.query_map([key_id], |row| Ok((uuid(row, 0)?, json::<1, _>(row)?)))?;
    Ok(found.unwrap_or_default().with_reservations(rows.collect::<Result<Vec<_>, _>>()?))
}

/// What is written of an account: all that changes with every request, and the reservations that came or went.
pub(super) struct Change {
    version: u64,
    account: String,
    /// Whether all reservations go first.
    anew: bool,
    gone: Vec<Uuid>,
    new: Vec<(Uuid, String)>,
}

impl Change {
    pub(super) fn of(before: Option<&Account>, after: &Account) -> serde_json::Result<Self> {
        let has =
            |account: Option<&Account>, id| account.is_some_and(|account| account.reservations().contains_key(id));
        let new = after.reservations().iter().filter(|(id, _)| !has(before, id));
        let gone = before.iter().flat_map(|account| account.reservations().keys()).filter(|id| !has(Some(after), id));
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
    pub(super) fn write(&self, db: &Connection, key_id: &str, version: u64) -> rusqlite::Result<bool> {
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

#[cfg(test)]
mod tests {
    use super::super::SqliteCallers;
    use super::*;
    use crate::account::{Ask, Taken};
    use crate::api::admin::KeyLimits;
    use crate::clock::from_millis;
    use crate::ports::Callers;

    const ASK: Ask = Ask { prompt_tokens: 1, completion_tokens: 2, cost_pico: 3 };
    const USED: Taken = Taken { prompt_tokens: 1, completion_tokens: 1, cost_pico: 2 };

    fn admit(account: &Account, number: u128) -> Account {
        let mut after = account.clone();
        after.admit(Uuid::from_u128(number), &KeyLimits::default(), ASK, from_millis(7)).unwrap();
        after
    }

    fn settle(account: &Account, number: u128) -> Account {
        let mut after = account.clone();
        assert!(after.settle(Uuid::from_u128(number), USED.into(), &KeyLimits::default(), from_millis(8)));
        after
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

    #[test]
    fn a_write_takes_along_what_came_and_what_went() {
        let nine = (0..9).fold(Account::default(), |account, number| admit(&account, number));
        let change = Change::of(Some(&nine), &admit(&settle(&nine, 4), 9)).unwrap();
        let new: Vec<_> = change.new.iter().map(|(id, _)| *id).collect();
        assert_eq!((change.anew, change.gone, new), (false, vec![Uuid::from_u128(4)], vec![Uuid::from_u128(9)]));
        assert!(!change.account.contains("due_at"), "{}", change.account);
    }

    #[tokio::test]
    async fn what_it_knows_of_an_earlier_version_is_no_part_of_a_write() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("callers.sqlite");
        let (one, other) = (SqliteCallers::open(&path).unwrap(), SqliteCallers::open(&path).unwrap());
        let first = admit(&Account::default(), 1);
        assert!(one.replace_account("key", 0, &first).await.unwrap());
        let second = admit(&first, 2);
        assert!(other.replace_account("key", first.version, &second).await.unwrap());
        let third = admit(&second, 3);
        assert!(one.replace_account("key", second.version, &third).await.unwrap());
        assert_eq!(SqliteCallers::open(&path).unwrap().find_account("key").await.unwrap(), third);
    }

    #[tokio::test]
    async fn an_account_from_before_reservations_had_rows_is_taken_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("callers.sqlite");
        // As version 2 has written it.
        let json = r#"{"version":2,"requests":{"taken":2.0,"at":"1970-01-01T00:00:00.007Z"},"tokens":{"taken":6.0,"at":"1970-01-01T00:00:00.007Z"},"months":{},"reservations":{"00000000-0000-0000-0000-000000000001":{"prompt_tokens":1,"completion_tokens":2,"cost_pico":3,"month":"1970-01","due_at":"1970-01-01T00:20:00.007Z"},"00000000-0000-0000-0000-000000000002":{"prompt_tokens":1,"completion_tokens":2,"cost_pico":3,"month":"1970-01","due_at":"1970-01-01T00:20:00.007Z"}}}"#;
        let account = admit(&admit(&Account::default(), 1), 2);
        let old = format!(
            "CREATE TABLE keys (id TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
            CREATE TABLE accounts (key_id TEXT PRIMARY KEY, version INTEGER NOT NULL, account TEXT NOT NULL)
            STRICT, WITHOUT ROWID;
            INSERT INTO accounts VALUES ('key', 2, '{json}');
            PRAGMA user_version = 2;"
        );
        Connection::open(&path).unwrap().execute_batch(&old).unwrap();
        let callers = SqliteCallers::open(&path).unwrap();
        assert_eq!(callers.find_account("key").await.unwrap(), account);
        let after = settle(&account, 1);
        assert!(callers.replace_account("key", account.version, &after).await.unwrap());
        assert_eq!(SqliteCallers::open(&path).unwrap().find_account("key").await.unwrap(), after);
    }
}
