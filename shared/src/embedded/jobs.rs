//! The records in SQLite, and their change feed: a row in `changes` per write, in the write's own
//! transaction, with a durable cursor per consumer.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::{Connection, OptionalExtension, Row, named_params, params};
use tokio::sync::Notify;
use uuid::Uuid;

use super::sqlite::{Kept, Sqlite};
use crate::clock::{Timestamp, from_millis};
use crate::error::Error;
use crate::job::{Fence, Job, Record, Tombstone, Upload};
use crate::ports::{Created, Creation, Idempotency, JobStore};

const VERSION: u32 = 2;
const SCHEMA: &str = "
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY,
        caller TEXT NOT NULL,
        version INTEGER NOT NULL,
        claim INTEGER NOT NULL,
        status TEXT,                -- NULL: a tombstone or an upload
        due_at INTEGER,             -- milliseconds since the epoch, as all times here
        expires_at INTEGER NOT NULL,
        record TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX jobs_due ON jobs (due_at) WHERE due_at IS NOT NULL;
    CREATE INDEX jobs_expiry ON jobs (expires_at);
    CREATE INDEX jobs_caller ON jobs (caller, id) WHERE status IS NOT NULL;
    CREATE TABLE idempotency (
        caller TEXT NOT NULL,
        key TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        id TEXT NOT NULL,
        expires_at INTEGER NOT NULL,
        PRIMARY KEY (caller, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX idempotency_expiry ON idempotency (expires_at);
    -- The sum of what a caller's records count, kept in their own transactions.
    CREATE TABLE usage (caller TEXT PRIMARY KEY, queued_bytes INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE changes (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL,
        version INTEGER NOT NULL,
        dispatch TEXT
    ) STRICT;
    CREATE TABLE cursors (consumer TEXT PRIMARY KEY, seq INTEGER NOT NULL) STRICT, WITHOUT ROWID;
";

/// One write to one record: what the feed's filters look at, and no health data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub seq: i64,
    pub id: Uuid,
    pub version: u64,
    pub dispatch: Option<String>,
}

/// One look at the feed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    pub matching: Vec<Change>,
    /// The consumer's position.
    pub cursor: i64,
    /// The position up to which the feed was read.
    pub end: i64,
}

/// Jobs in one SQLite file.
#[derive(Clone)]
pub struct SqliteJobStore {
    sqlite: Sqlite,
    /// Rung after every write, so that the feed's consumers need not wait for their next look.
    changed: Arc<Notify>,
    written: Arc<Written>,
}

/// What each record that was written since somebody asked is to start, if anything.
pub type Writes = BTreeMap<Uuid, Option<&'static str>>;

/// A second feed, in memory. Who is told of jobs over a connection needs the latest state of each alone, and
/// is gone when the process is; a delivery that is lost with it is due in its record.
#[derive(Default)]
struct Written {
    records: Mutex<Writes>,
    rung: Notify,
}

/// Notes a record as written when it is dropped. It goes along with the write's result: should its caller have
/// gone by then, it is dropped with that, behind the commit all the same.
struct Note {
    written: Arc<Written>,
    id: Uuid,
    dispatch: Option<&'static str>,
}

impl Drop for Note {
    fn drop(&mut self) {
        let mut records = self.written.records.lock().unwrap_or_else(PoisonError::into_inner);
        let dispatch = records.entry(self.id).or_default();
        // A marker stands until somebody has seen it.
        *dispatch = self.dispatch.or(*dispatch);
        drop(records);
        self.written.rung.notify_one();
    }
}

impl SqliteJobStore {
    /// # Errors
    /// Where the file cannot be opened or is of another version.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let sqlite = Sqlite::open(path, "the job store", VERSION, SCHEMA)?;
        Ok(Self { sqlite, changed: Arc::new(Notify::new()), written: Arc::default() })
    }

    fn note(&self, id: Uuid, dispatch: Option<&'static str>) -> Note {
        Note { written: Arc::clone(&self.written), id, dispatch }
    }

    /// Completes when something was written since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Waits until a record was written since the last call, and gives all that were. A record that was
    /// written twice is there once.
    pub async fn written(&self) -> Writes {
        loop {
            let records = std::mem::take(&mut *self.written.records.lock().unwrap_or_else(PoisonError::into_inner));
            if !records.is_empty() {
                return records;
            }
            self.written.rung.notified().await;
        }
    }

    /// The changes behind the consumer's cursor that match `dispatch`.
    ///
    /// # Errors
    /// Where the store cannot be reached.
    pub async fn changes(&self, consumer: &'static str, dispatch: &'static str, limit: u32) -> Result<Changes, Error> {
        self.changes_behind(consumer, 0, dispatch, limit).await
    }

    /// As [`SqliteJobStore::changes`], from `read_to` on where the consumer has read further than its
    /// cursor says.
    ///
    /// # Errors
    /// Where the store cannot be reached.
    pub async fn changes_behind(
        &self,
        consumer: &'static str,
        read_to: i64,
        dispatch: &'static str,
        limit: u32,
    ) -> Result<Changes, Error> {
        self.sqlite.read(|db| {
            // One state of the file for all three reads: a change between them would be passed by.
            let snapshot = db.unchecked_transaction()?;
            let cursor = cursor(&snapshot, consumer)?;
            let from = cursor.max(read_to);
            let sql = "SELECT seq, id, version, dispatch FROM changes WHERE seq > ?1 AND dispatch = ?2
                ORDER BY seq LIMIT ?3";
            let mut statement = snapshot.prepare_cached(sql)?;
            let matching = statement.query_map(params![from, dispatch, limit], change)?;
            let matching = matching.collect::<Result<Vec<_>, _>>()?;
            let full = matching.len() as u64 == u64::from(limit);
            let newest = "SELECT coalesce(max(seq), ?1) FROM changes";
            let end = match matching.last() {
                Some(last) if full => last.seq,
                _ => snapshot.prepare_cached(newest)?.query_row([from], |row| row.get(0))?,
            };
            Ok(Changes { matching, cursor, end })
        })
    }

    /// Moves the consumer's cursor. With one consumer, what lies behind it is of no more use and is
    /// deleted.
    ///
    /// # Errors
    /// Where the store cannot be reached.
    pub async fn advance(&self, consumer: &'static str, seq: i64) -> Result<(), Error> {
        self.sqlite
            // Changes that are read again find their jobs claimed, or unclaimed as they are.
            .call_kept(Kept::InFile, move |db| {
                if seq <= cursor(db, consumer)? {
                    return Ok(());
                }
                let sql = "INSERT INTO cursors VALUES (?1, ?2) ON CONFLICT (consumer) DO UPDATE SET seq = excluded.seq";
                db.prepare_cached(sql)?.execute(params![consumer, seq])?;
                let sql = "DELETE FROM changes WHERE seq <= (SELECT min(seq) FROM cursors)";
                db.prepare_cached(sql)?.execute([])?;
                Ok(())
            })
            .await
    }

    /// The jobs that a worker holds, or held when it died.
    ///
    /// # Errors
    /// Where the store cannot be reached.
    pub async fn leased(&self) -> Result<Vec<Job>, Error> {
        let sql = "SELECT record FROM jobs
            WHERE due_at IS NOT NULL AND json_extract(record, '$.lease_until') IS NOT NULL";
        let found = self.sqlite.read(|db| records(db, sql, []))?;
        Ok(readable(&found).into_iter().filter_map(Record::into_job).collect())
    }

    /// Deletes expired records and idempotency items, as DynamoDB's TTL does. Returns how many
    /// records went.
    ///
    /// # Errors
    /// Where the store cannot be reached.
    pub async fn remove_expired(&self, now: Timestamp) -> Result<usize, Error> {
        let now = now.timestamp_millis();
        self.sqlite
            .scrub(move |db| {
                db.execute("DELETE FROM idempotency WHERE expires_at <= ?1", [now])?;
                // A record that is still due is swept first.
                db.execute("DELETE FROM jobs WHERE expires_at <= ?1 AND due_at IS NULL", [now])
            })
            .await
    }
}

impl JobStore for SqliteJobStore {
    async fn create(&self, creation: Creation) -> Result<Created, Error> {
        let now = creation.job.created_at;
        let job = NewRow::of(&Record::Job(creation.job))?;
        let used = match &creation.upload {
            None => None,
            Some(upload) => {
                let used = NewRow::of(&Record::Upload(upload.used(now)))?;
                Some((Record::Upload(upload.clone()).fence(), used))
            }
        };
        let (now, max_queued_bytes) = (now.timestamp_millis(), creation.max_queued_bytes);
        let created = self
            .sqlite
            .call(move |db| {
                if let Some(item) = &creation.idempotency
                    && let Some(taken) = find_idempotency(db, &item.caller, &item.key, now)?
                {
                    return Ok(Created::KeyTaken(taken));
                }
                match &used {
                    // It was let in when its room was reserved.
                    Some((fence, used)) if used.write(db, *fence)? => {}
                    Some(_) => return Ok(Created::UploadTaken),
                    None if queued_bytes(db, &job.caller)? + job.queued_bytes > max_queued_bytes => {
                        return Ok(Created::QueueFull);
                    }
                    None => {}
                }
                if let Some(item) = &creation.idempotency {
                    put_idempotency(db, item)?;
                }
                job.insert(db)?;
                Ok(Created::New)
            })
            .await?;
        // Nobody can be waiting to hear of it: nobody knows its id yet.
        self.changed.notify_one();
        Ok(created)
    }

    async fn reserve(&self, upload: &Upload, max_queued_bytes: u64) -> Result<bool, Error> {
        let row = NewRow::of(&Record::Upload(upload.clone()))?;
        self.sqlite
            .call(move |db| {
                if queued_bytes(db, &row.caller)? + row.queued_bytes > max_queued_bytes {
                    return Ok(false);
                }
                row.insert(db)?;
                Ok(true)
            })
            .await
    }

    async fn idempotency(&self, caller: &str, key: &str, now: Timestamp) -> Result<Option<Idempotency>, Error> {
        self.sqlite.read(|db| find_idempotency(db, caller, key, now.timestamp_millis()))
    }

    async fn get(&self, id: Uuid) -> Result<Option<Record>, Error> {
        let sql = "SELECT record FROM jobs WHERE id = ?1";
        let found: Option<String> =
            self.sqlite.read(|db| db.prepare_cached(sql)?.query_row([id.to_string()], |row| row.get(0)).optional())?;
        found.as_deref().map(decode).transpose()
    }

    async fn replace(&self, fence: Fence, after: &Record) -> Result<bool, Error> {
        let row = NewRow::of(after)?;
        // A power cut that undoes a claim ends its worker as well: the job is claimed anew.
        let is_claim = matches!(after, Record::Job(job) if job.lease_until.is_some());
        let kept = if is_claim { Kept::InFile } else { Kept::OnDisk };
        let note = self.note(fence.id, row.dispatch);
        let (written, _note) = self.sqlite.call_kept(kept, move |db| Ok((row.write(db, fence)?, note))).await?;
        self.changed.notify_one();
        Ok(written)
    }

    async fn bury(&self, job: &Job, tombstone: &Tombstone) -> Result<bool, Error> {
        let row = NewRow::of(&Record::Tombstone(tombstone.clone()))?;
        let (fence, caller, key) = (job.fence(), job.caller.clone(), job.idempotency_key.clone());
        let note = self.note(fence.id, row.dispatch);
        let (written, _note) = self
            .sqlite
            .scrub(move |db| {
                let written = row.write(db, fence)?;
                if written && let Some(key) = key {
                    db.execute("DELETE FROM idempotency WHERE caller = ?1 AND key = ?2", [caller, key])?;
                }
                Ok((written, note))
            })
            .await?;
        self.changed.notify_one();
        Ok(written)
    }

    async fn due(&self, now: Timestamp, limit: u32) -> Result<Vec<Record>, Error> {
        let sql = "SELECT record FROM jobs WHERE due_at <= ?1 ORDER BY due_at LIMIT ?2";
        let now = now.timestamp_millis();
        let found = self.sqlite.read(|db| records(db, sql, params![now, limit]))?;
        Ok(readable(&found))
    }

    async fn list(&self, caller: &str, before: Option<Uuid>, limit: u32) -> Result<Vec<Job>, Error> {
        let sql =
            "SELECT record FROM jobs WHERE caller = ?1 AND status IS NOT NULL AND id < ?2 ORDER BY id DESC LIMIT ?3";
        let before = before.unwrap_or(Uuid::max()).to_string();
        let found = self.sqlite.read(|db| records(db, sql, params![caller, before, limit]))?;
        Ok(readable(&found).into_iter().filter_map(Record::into_job).collect())
    }
}

fn records(db: &Connection, sql: &str, values: impl rusqlite::Params) -> rusqlite::Result<Vec<String>> {
    db.prepare_cached(sql)?.query_map(values, |row| row.get(0))?.collect()
}

fn cursor(db: &Connection, consumer: &str) -> rusqlite::Result<i64> {
    let sql = "SELECT seq FROM cursors WHERE consumer = ?1";
    Ok(db.prepare_cached(sql)?.query_row([consumer], |row| row.get(0)).optional()?.unwrap_or(0))
}

fn append_change(db: &Connection, id: Uuid, version: u64, dispatch: Option<&str>) -> rusqlite::Result<()> {
    let sql = "INSERT INTO changes (id, version, dispatch) VALUES (?1, ?2, ?3)";
    db.prepare_cached(sql)?.execute(params![id.to_string(), version, dispatch])?;
    Ok(())
}

fn change(row: &Row<'_>) -> rusqlite::Result<Change> {
    Ok(Change { seq: row.get(0)?, id: id(row, 1)?, version: row.get(2)?, dispatch: row.get(3)? })
}

fn id(row: &Row<'_>, column: usize) -> rusqlite::Result<Uuid> {
    let text: String = row.get(column)?;
    let wrong = |error| rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, Box::new(error));
    Uuid::parse_str(&text).map_err(wrong)
}

fn find_idempotency(db: &Connection, caller: &str, key: &str, now: i64) -> rusqlite::Result<Option<Idempotency>> {
    let sql = "SELECT caller, key, fingerprint, id, expires_at FROM idempotency
        WHERE caller = ?1 AND key = ?2 AND expires_at > ?3";
    let mut statement = db.prepare_cached(sql)?;
    let found = statement.query_row(params![caller, key, now], |row| {
        Ok(Idempotency {
            caller: row.get(0)?,
            key: row.get(1)?,
            fingerprint: row.get(2)?,
            id: id(row, 3)?,
            expires_at: from_millis(row.get(4)?),
        })
    });
    found.optional()
}

/// Keeps an item, in the place of one that has expired.
fn put_idempotency(db: &Connection, item: &Idempotency) -> rusqlite::Result<()> {
    let sql = "INSERT OR REPLACE INTO idempotency VALUES (?1, ?2, ?3, ?4, ?5)";
    let expires_at = item.expires_at.timestamp_millis();
    db.prepare_cached(sql)?.execute(params![
        item.caller,
        item.key,
        item.fingerprint,
        item.id.to_string(),
        expires_at
    ])?;
    Ok(())
}

fn queued_bytes(db: &Connection, caller: &str) -> rusqlite::Result<u64> {
    let sql = "SELECT queued_bytes FROM usage WHERE caller = ?1";
    Ok(db.prepare_cached(sql)?.query_row([caller], |row| row.get(0)).optional()?.unwrap_or(0))
}

/// Counts `after` in the place of `before` against the caller; who has nothing queued has no row.
fn settle_usage(db: &Connection, caller: &str, before: u64, after: u64) -> rusqlite::Result<()> {
    if before == after {
        return Ok(());
    }
    let queued = (queued_bytes(db, caller)? + after).saturating_sub(before);
    if queued == 0 {
        db.prepare_cached("DELETE FROM usage WHERE caller = ?1")?.execute([caller])?;
    } else {
        let sql = "INSERT OR REPLACE INTO usage VALUES (?1, ?2)";
        db.prepare_cached(sql)?.execute(params![caller, queued])?;
    }
    Ok(())
}

/// A record's columns.
struct NewRow {
    id: Uuid,
    caller: String,
    version: u64,
    claim: u64,
    status: Option<&'static str>,
    due_at: Option<i64>,
    expires_at: i64,
    dispatch: Option<&'static str>,
    queued_bytes: u64,
    record: String,
}

impl NewRow {
    fn of(record: &Record) -> Result<Self, Error> {
        let (claim, status, dispatch) = match record {
            Record::Job(job) => (job.claim, Some(job.status.as_str()), job.dispatch),
            Record::Tombstone(_) | Record::Upload(_) => (0, None, None),
        };
        Ok(Self {
            id: record.id(),
            caller: record.caller().to_owned(),
            version: record.fence().version,
            claim,
            status,
            due_at: record.due_at().map(|due| due.timestamp_millis()),
            expires_at: record.expires_at().timestamp_millis(),
            dispatch: dispatch.map(crate::job::Dispatch::as_str),
            queued_bytes: record.queued_bytes(),
            record: encode(record)?,
        })
    }

    /// Writes a new record, and appends to the feed.
    fn insert(&self, db: &Connection) -> rusqlite::Result<()> {
        let sql = "INSERT INTO jobs (id, caller, version, claim, status, due_at, expires_at, record)
            VALUES (:id, :caller, :version, :claim, :status, :due_at, :expires_at, :record)";
        db.prepare_cached(sql)?.execute(named_params! {
            ":id": self.id.to_string(),
            ":caller": self.caller,
            ":version": self.version,
            ":claim": self.claim,
            ":status": self.status,
            ":due_at": self.due_at,
            ":expires_at": self.expires_at,
            ":record": self.record,
        })?;
        settle_usage(db, &self.caller, 0, self.queued_bytes)?;
        append_change(db, self.id, self.version, self.dispatch)
    }

    /// Replaces the record that `fence` names, and appends to the feed; `false` where it is gone.
    fn write(&self, db: &Connection, fence: Fence) -> rusqlite::Result<bool> {
        let sql = "UPDATE jobs SET version = :version, claim = :claim, status = :status, due_at = :due_at,
                expires_at = :expires_at, record = :record
            WHERE id = :id AND version = :old_version AND claim = :old_claim AND status IS :old_status";
        let rows = db.prepare_cached(sql)?.execute(named_params! {
            ":version": self.version,
            ":claim": self.claim,
            ":status": self.status,
            ":due_at": self.due_at,
            ":expires_at": self.expires_at,
            ":record": self.record,
            ":id": fence.id.to_string(),
            ":old_version": fence.version,
            ":old_claim": fence.claim,
            ":old_status": fence.status.map(crate::job::Status::as_str),
        })?;
        if rows == 0 {
            return Ok(false);
        }
        settle_usage(db, &self.caller, fence.queued_bytes, self.queued_bytes)?;
        append_change(db, fence.id, self.version, self.dispatch)?;
        Ok(true)
    }
}

/// The records that this build can read; one that it cannot, after a rollback perhaps, must not
/// keep the others from being swept and listed.
fn readable(found: &[String]) -> Vec<Record> {
    let read = |text: &String| {
        decode(text).inspect_err(|error| tracing::error!(error.chain = error.chain(), "record not read"))
    };
    found.iter().filter_map(|text| read(text).ok()).collect()
}

fn encode(record: &Record) -> Result<String, Error> {
    serde_json::to_string(record).map_err(Error::internal)
}

fn decode(text: &str) -> Result<Record, Error> {
    // serde's own message may repeat a value.
    serde_json::from_str(text)
        .map_err(|error| Error::internal(format!("{:?} at column {}", error.classify(), error.column())))
}
