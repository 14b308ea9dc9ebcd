//! What the store reads, and writes inside a transaction that somebody else has begun.

use rusqlite::{Connection, OptionalExtension, Row, named_params, params};
use uuid::Uuid;

use super::super::columns::uuid;
use super::{Change, DuePosition, Work};
use crate::clock::from_millis;
use crate::error::Error;
use crate::job::{Dispatch, Fence, Record};
use crate::ports::Idempotency;

pub(super) fn records(db: &Connection, sql: &str, values: impl rusqlite::Params) -> rusqlite::Result<Vec<String>> {
    db.prepare_cached(sql)?.query_map(values, |row| row.get(0))?.collect()
}

/// What is due at `now` behind `after`, longest due first, each with its place.
pub(super) fn due_rows(
    db: &Connection,
    now: i64,
    after: Option<&DuePosition>,
    limit: u32,
) -> rusqlite::Result<Vec<(DuePosition, String)>> {
    let sql = "SELECT due_at, id, record FROM jobs WHERE due_at <= ?1 AND (due_at, id) > (?2, ?3)
        ORDER BY due_at, id LIMIT ?4";
    let (due_at, id) = after.map_or((i64::MIN, ""), |after| (after.due_at, after.id.as_str()));
    let mut statement = db.prepare_cached(sql)?;
    let found = statement.query_map(params![now, due_at, id, limit], |row| {
        Ok((DuePosition { due_at: row.get(0)?, id: row.get(1)? }, row.get(2)?))
    })?;
    found.collect()
}

/// Ids and records of a caller's live jobs with ids below `before`, newest first.
pub(super) fn listed_rows(
    db: &Connection,
    caller: &str,
    before: Uuid,
    limit: u32,
) -> rusqlite::Result<Vec<(Uuid, String)>> {
    let sql = "SELECT id, record FROM jobs WHERE caller = ?1 AND status IS NOT NULL AND id < ?2
        ORDER BY id DESC LIMIT ?3";
    let mut statement = db.prepare_cached(sql)?;
    let found =
        statement.query_map(params![caller, before.to_string(), limit], |row| Ok((uuid(row, 0)?, row.get(1)?)))?;
    found.collect()
}

pub(super) fn change(row: &Row<'_>) -> rusqlite::Result<Change> {
    Ok(Change { seq: row.get(0)?, id: uuid(row, 1)? })
}

pub(super) fn find_idempotency(
    db: &Connection,
    caller: &str,
    key: &str,
    now: i64,
) -> rusqlite::Result<Option<Idempotency>> {
    let sql = "SELECT caller, key, fingerprint, id, expires_at FROM idempotency
        WHERE caller = ?1 AND key = ?2 AND expires_at > ?3";
    let mut statement = db.prepare_cached(sql)?;
    let found = statement.query_row(params![caller, key, now], |row| {
        Ok(Idempotency {
            caller: row.get(0)?,
            key: row.get(1)?,
            fingerprint: row.get(2)?,
            id: uuid(row, 3)?,
            expires_at: from_millis(row.get(4)?),
        })
    });
    found.optional()
}

/// Keeps an item, in the place of one that has expired.
pub(super) fn put_idempotency(db: &Connection, item: &Idempotency) -> rusqlite::Result<()> {
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

pub(super) fn queued_bytes(db: &Connection, caller: &str) -> rusqlite::Result<u64> {
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
pub(super) struct NewRow {
    pub(super) id: Uuid,
    pub(super) caller: String,
    version: u64,
    claim: u64,
    status: Option<&'static str>,
    due_at: Option<i64>,
    expires_at: i64,
    pub(super) dispatch: Option<Dispatch>,
    /// The feed that its write is of, if of any.
    pub(super) work: Option<Work>,
    pub(super) queued_bytes: u64,
    record: String,
}

impl NewRow {
    pub(super) fn of(record: &Record) -> Result<Self, Error> {
        let (claim, status, dispatch, work) = match record {
            Record::Job(job) => (job.claim, Some(job.status.as_str()), job.dispatch, Work::marked(job)),
            Record::Tombstone(_) | Record::Upload(_) => (0, None, None, None),
        };
        Ok(Self {
            id: record.id(),
            caller: record.caller().to_owned(),
            version: record.fence().version,
            claim,
            status,
            due_at: record.due_at().map(|due| due.timestamp_millis()),
            expires_at: record.expires_at().timestamp_millis(),
            dispatch,
            work,
            queued_bytes: record.queued_bytes(),
            record: encode(record)?,
        })
    }

    /// Writes a new record, and appends to the feed where it is marked.
    pub(super) fn insert(&self, db: &Connection) -> rusqlite::Result<()> {
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
        self.append(db)
    }

    /// Replaces the record that `fence` names, and appends to the feed where it is marked; `false` where it is gone.
    pub(super) fn write(&self, db: &Connection, fence: Fence) -> rusqlite::Result<bool> {
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
        self.append(db)?;
        Ok(true)
    }

    fn append(&self, db: &Connection) -> rusqlite::Result<()> {
        if let Some(work) = self.work {
            let sql = "INSERT INTO changes (work, id) VALUES (?1, ?2)";
            db.prepare_cached(sql)?.execute([work.as_str(), &self.id.to_string()])?;
        }
        Ok(())
    }
}

/// The records that this build can read; one that it cannot, after a rollback perhaps, must not
/// keep the others from being swept and listed.
pub(super) fn readable(found: &[String]) -> Vec<Record> {
    let read = |text: &String| {
        decode(text).inspect_err(|error| tracing::error!(error.chain = error.chain(), "record not read"))
    };
    found.iter().filter_map(|text| read(text).ok()).collect()
}

fn encode(record: &Record) -> Result<String, Error> {
    serde_json::to_string(record).map_err(Error::internal)
}

pub(super) fn decode(text: &str) -> Result<Record, Error> {
    // serde's own message may repeat a value.
    serde_json::from_str(text)
        .map_err(|error| Error::internal(format!("{:?} at column {}", error.classify(), error.column())))
}
