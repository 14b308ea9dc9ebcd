//! The queue in SQLite, with SQS's rules: a received message is hidden for a while and comes back
//! unless it is acknowledged; one that was received too often becomes a dead letter.
//!
//! Nothing here waits for the disk but dead letters: after a power cut a message comes twice, which
//! changes nothing, or is gone, which sweep makes good, since the job's record is due.

use std::path::Path;
use std::sync::Arc;

use chrono::TimeDelta;
use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::Notify;
use uuid::Uuid;

use super::sqlite::{Kept, Sqlite};
use crate::clock::{Clock, Timestamp, from_millis};
use crate::error::Error;
use crate::message::Message;
use crate::ports::{DeadLetter, JobQueue};

const VERSION: u32 = 1;
const SCHEMA: &str = "
    CREATE TABLE messages (
        id TEXT PRIMARY KEY,
        body TEXT NOT NULL,
        visible_at INTEGER NOT NULL,    -- milliseconds since the epoch, as all times here
        receive_count INTEGER NOT NULL DEFAULT 0,
        receipt TEXT UNIQUE,
        sent_at INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX messages_visible ON messages (visible_at);
    CREATE TABLE dead_letters (
        id TEXT PRIMARY KEY,
        body TEXT NOT NULL,
        receive_count INTEGER NOT NULL,
        sent_at INTEGER NOT NULL,
        died_at INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
";

/// A received message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    pub id: String,
    pub body: String,
    /// Valid until the message becomes visible again.
    pub receipt: String,
    pub receive_count: u32,
}

/// A queue in one SQLite file.
#[derive(Clone)]
pub struct SqliteJobQueue {
    sqlite: Sqlite,
    clock: Clock,
    max_receive_count: u32,
    sent: Arc<Notify>,
}

impl SqliteJobQueue {
    /// `max_receive_count` must exceed `MAX_ATTEMPTS`, or jobs die in the queue before their
    /// attempts are used up.
    ///
    /// # Errors
    /// Where the file cannot be opened or is of another version.
    pub fn open(path: &Path, clock: Clock, max_receive_count: u32) -> Result<Self, Error> {
        let sqlite = Sqlite::open(path, "the queue", VERSION, SCHEMA)?;
        Ok(Self { sqlite, clock, max_receive_count, sent: Arc::new(Notify::new()) })
    }

    /// Completes when a message was sent since the last call.
    pub async fn sent(&self) {
        self.sent.notified().await;
    }

    /// The visible message that has waited longest, hidden for `visibility` from now.
    ///
    /// # Errors
    /// Where the queue cannot be reached.
    pub async fn receive(&self, visibility: TimeDelta) -> Result<Option<Delivery>, Error> {
        let now = self.clock.now();
        let max = self.max_receive_count;
        let (delivery, buried) = self
            .sqlite
            .call_kept(Kept::InFile, move |db| {
                let mut buried = 0;
                while let Some((id, receive_count)) = first_visible(db, now)? {
                    if receive_count < max {
                        return Ok((Some(hide(db, &id, now + visibility)?), buried));
                    }
                    bury(db, &id, now)?;
                    buried += 1;
                }
                Ok((None, buried))
            })
            .await?;
        if buried > 0 {
            tracing::error!(
                error.code = "dead_letter",
                count = buried,
                "messages were received too often and given up"
            );
        }
        Ok(delivery)
    }

    /// Deletes a received message; a receipt that is no longer valid is ignored, as SQS does.
    ///
    /// # Errors
    /// Where the queue cannot be reached.
    pub async fn acknowledge(&self, receipt: &str) -> Result<(), Error> {
        let receipt = receipt.to_owned();
        self.sqlite
            .call_kept(Kept::InFile, move |db| {
                db.prepare_cached("DELETE FROM messages WHERE receipt = ?1")?.execute([receipt])
            })
            .await?;
        Ok(())
    }

    /// Gives a received message back unworked: it is shown again after `delay`, and counts as not received.
    ///
    /// # Errors
    /// Where the queue cannot be reached.
    pub async fn put_back(&self, receipt: &str, delay: TimeDelta) -> Result<(), Error> {
        let visible_at = (self.clock.now() + delay).timestamp_millis();
        let receipt = receipt.to_owned();
        let sql = "UPDATE messages SET visible_at = ?1, receipt = NULL, receive_count = receive_count - 1
            WHERE receipt = ?2";
        let update = move |db: &Connection| db.prepare_cached(sql)?.execute(params![visible_at, receipt]);
        self.sqlite.call_kept(Kept::InFile, update).await?;
        Ok(())
    }

    /// Makes every message visible that somebody was working, for a start at which nobody can be. One that was
    /// hidden on purpose waits on; how often each was received stands. Returns how many there were.
    ///
    /// # Errors
    /// Where the queue cannot be reached.
    pub async fn show_received(&self) -> Result<usize, Error> {
        let now = self.clock.now().timestamp_millis();
        let sql = "UPDATE messages SET visible_at = ?1, receipt = NULL WHERE receipt IS NOT NULL";
        self.sqlite.call_kept(Kept::InFile, move |db| db.prepare_cached(sql)?.execute([now])).await
    }

    /// How many messages wait, hidden ones included, and how many are dead letters.
    ///
    /// # Errors
    /// Where the queue cannot be reached.
    pub async fn depth(&self) -> Result<(u64, u64), Error> {
        let sql = "SELECT (SELECT count(*) FROM messages), (SELECT count(*) FROM dead_letters)";
        self.sqlite.read(|db| db.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?))))
    }

    /// Sends any text, as another build or an operator might.
    ///
    /// # Errors
    /// Where the queue cannot be reached.
    pub async fn send_body(&self, body: String) -> Result<(), Error> {
        let now: Timestamp = self.clock.now();
        let sql = "INSERT INTO messages (id, body, visible_at, sent_at) VALUES (?1, ?2, ?3, ?3)";
        let id = Uuid::now_v7().to_string();
        let insert = move |db: &Connection| db.prepare_cached(sql)?.execute(params![id, body, now.timestamp_millis()]);
        self.sqlite.call_kept(Kept::InFile, insert).await?;
        self.sent.notify_one();
        Ok(())
    }
}

impl JobQueue for SqliteJobQueue {
    async fn send(&self, message: Message) -> Result<(), Error> {
        self.send_body(message.encode()).await
    }

    async fn set_visibility(&self, receipt: &str, seconds: u32) -> Result<(), Error> {
        let visible_at = (self.clock.now() + TimeDelta::seconds(i64::from(seconds))).timestamp_millis();
        let receipt = receipt.to_owned();
        // Whoever hides it is done with it, and a start that finds it has nothing to take up.
        let sql = "UPDATE messages SET visible_at = ?1, receipt = NULL WHERE receipt = ?2";
        let update = move |db: &Connection| db.prepare_cached(sql)?.execute(params![visible_at, receipt]);
        self.sqlite.call_kept(Kept::InFile, update).await?;
        Ok(())
    }

    async fn bury(&self, body: String) -> Result<(), Error> {
        let now = self.clock.now().timestamp_millis();
        let sql = "INSERT INTO dead_letters (id, body, receive_count, sent_at, died_at) VALUES (?1, ?2, 0, ?3, ?3)";
        let id = Uuid::now_v7().to_string();
        self.sqlite.call(move |db| db.prepare_cached(sql)?.execute(params![id, body, now])).await?;
        Ok(())
    }

    async fn dead_letters(&self, limit: u32) -> Result<Vec<DeadLetter>, Error> {
        let sql = "SELECT id, body, receive_count, sent_at, died_at FROM dead_letters ORDER BY died_at, id LIMIT ?1";
        self.sqlite.read(|db| db.prepare_cached(sql)?.query_map([limit], dead_letter)?.collect())
    }

    async fn redrive_dead_letters(&self, ids: Option<&[String]>) -> Result<u64, Error> {
        let (now, ids) = (self.clock.now(), ids.map(<[String]>::to_vec));
        let moved = self.sqlite.call(move |db| revive(db, ids.as_deref(), now)).await?;
        if moved > 0 {
            self.sent.notify_one();
        }
        Ok(moved)
    }
}

fn dead_letter(row: &rusqlite::Row<'_>) -> rusqlite::Result<DeadLetter> {
    Ok(DeadLetter {
        id: row.get(0)?,
        body: row.get(1)?,
        receive_count: row.get(2)?,
        sent_at: from_millis(row.get(3)?),
        given_up_at: Some(from_millis(row.get(4)?)),
    })
}

/// Moves dead letters back, each as a new message, as SQS does. The call is one transaction: no message is in
/// neither table, or in both.
fn revive(db: &Connection, ids: Option<&[String]>, now: Timestamp) -> rusqlite::Result<u64> {
    // json_each takes a list of any length as one parameter; null stands for all.
    let ids = ids.map(|ids| serde_json::Value::from(ids).to_string());
    let chosen = "?1 IS NULL OR id IN (SELECT value FROM json_each(?1))";
    let insert = format!(
        "INSERT INTO messages (id, body, visible_at, sent_at)
        SELECT lower(hex(randomblob(16))), body, ?2, sent_at FROM dead_letters WHERE {chosen}"
    );
    let moved = db.prepare_cached(&insert)?.execute(params![ids, now.timestamp_millis()])?;
    db.prepare_cached(&format!("DELETE FROM dead_letters WHERE {chosen}"))?.execute(params![ids])?;
    Ok(moved as u64)
}

fn first_visible(db: &Connection, now: Timestamp) -> rusqlite::Result<Option<(String, u32)>> {
    let sql = "SELECT id, receive_count FROM messages WHERE visible_at <= ?1 ORDER BY visible_at LIMIT 1";
    let mut statement = db.prepare_cached(sql)?;
    statement.query_row([now.timestamp_millis()], |row| Ok((row.get(0)?, row.get(1)?))).optional()
}

fn hide(db: &Connection, id: &str, until: Timestamp) -> rusqlite::Result<Delivery> {
    let sql = "UPDATE messages SET visible_at = ?1, receipt = ?2, receive_count = receive_count + 1 WHERE id = ?3
        RETURNING id, body, receipt, receive_count";
    let receipt = Uuid::new_v4().to_string();
    db.prepare_cached(sql)?.query_row(params![until.timestamp_millis(), receipt, id], |row| {
        Ok(Delivery { id: row.get(0)?, body: row.get(1)?, receipt: row.get(2)?, receive_count: row.get(3)? })
    })
}

fn bury(db: &Connection, id: &str, now: Timestamp) -> rusqlite::Result<()> {
    let sql = "INSERT INTO dead_letters SELECT id, body, receive_count, sent_at, ?1 FROM messages WHERE id = ?2";
    db.prepare_cached(sql)?.execute(params![now.timestamp_millis(), id])?;
    db.prepare_cached("DELETE FROM messages WHERE id = ?1")?.execute([id])?;
    Ok(())
}
