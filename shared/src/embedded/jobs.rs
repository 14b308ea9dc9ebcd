//! The records in SQLite, and their change feed: a row in `changes` per write that marks a job for
//! enrichment, in the write's own transaction, until enrichment has worked it.

mod rows;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::{OptionalExtension, params};
use tokio::sync::Notify;
use uuid::Uuid;

use self::rows::{
    NewRow, change, decode, due_rows, find_idempotency, listed_rows, put_idempotency, queued_bytes, readable, records,
};
use super::sqlite::{Kept, Sqlite};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::job::{Dispatch, Fence, Job, Record, Tombstone, Upload};
use crate::ports::{Created, Creation, Idempotency, JobStore, Page};

const VERSION: u32 = 4;
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
        work TEXT NOT NULL,
        id TEXT NOT NULL
    ) STRICT;
    CREATE INDEX changes_work ON changes (work);
";
/// From version 2, whose feed had every write.
const SINCE_2: &str = "
    DELETE FROM changes WHERE dispatch IS NOT 'enrichment';
    ALTER TABLE changes DROP COLUMN version;
    ALTER TABLE changes DROP COLUMN dispatch;
";
/// From version 3, whose feed was one, with a cursor behind what was worked.
const SINCE_3: &str = "
    ALTER TABLE changes RENAME TO changes_3;
    CREATE TABLE changes (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        work TEXT NOT NULL,
        id TEXT NOT NULL
    ) STRICT;
    CREATE INDEX changes_work ON changes (work);
    INSERT INTO changes
        SELECT seq, iif(json_extract(record, '$.prompt') IS NULL, 'description', 'prompt'), id
        FROM changes_3 JOIN jobs USING (id) WHERE seq > coalesce((SELECT max(seq) FROM cursors), 0);
    DROP TABLE changes_3;
    DROP TABLE cursors;
";

/// What enrichment is to do. Each kind has its own feed: a prompt may take minutes, and many may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Description,
    Prompt,
}

impl Work {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Description => "description",
            Self::Prompt => "prompt",
        }
    }

    /// What the job is marked for, if for anything.
    fn marked(job: &Job) -> Option<Self> {
        let work = if job.is_prompt() { Self::Prompt } else { Self::Description };
        (job.dispatch == Some(Dispatch::Enrichment)).then_some(work)
    }
}

/// One write to one record, without health data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub seq: i64,
    pub id: Uuid,
}

/// A place in the order of what is due.
#[derive(Debug, Clone)]
pub struct DuePosition {
    due_at: i64,
    id: String,
}

/// Jobs in one SQLite file.
#[derive(Clone)]
pub struct SqliteJobStore {
    sqlite: Sqlite,
    /// Rung when a feed has grown, so that its reader need not wait for its next look.
    changed: Arc<[Notify; 2]>,
    written: Arc<Written>,
}

/// What each record that was written since somebody asked is to start, if anything.
pub type Writes = BTreeMap<Uuid, Option<&'static str>>;

/// A feed of all writes, in memory. Who is told of jobs over a connection needs the latest state of each alone, and
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
        let sqlite = Sqlite::open_upgraded(path, "the job store", VERSION, SCHEMA, &[SINCE_2, SINCE_3])?;
        Ok(Self { sqlite, changed: Arc::default(), written: Arc::default() })
    }

    fn note(&self, row: &NewRow) -> Note {
        Note { written: Arc::clone(&self.written), id: row.id, dispatch: row.dispatch.map(Dispatch::as_str) }
    }

    /// Completes when this feed has grown since the last call.
    pub async fn changed(&self, work: Work) {
        self.changed[work as usize].notified().await;
    }

    fn ring(&self, work: Option<Work>) {
        if let Some(work) = work {
            self.changed[work as usize].notify_one();
        }
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

    /// The oldest changes of a feed behind `read_to`, where 0 is its beginning.
    ///
    /// # Errors
    /// Where the store cannot be reached.
    pub async fn changes_behind(&self, work: Work, read_to: i64, limit: u32) -> Result<Vec<Change>, Error> {
        let sql = "SELECT seq, id FROM changes WHERE work = ?1 AND seq > ?2 ORDER BY seq LIMIT ?3";
        self.sqlite
            .read(|db| db.prepare_cached(sql)?.query_map(params![work.as_str(), read_to, limit], change)?.collect())
    }

    /// Takes changes out of the feed.
    ///
    /// # Errors
    /// Where the store cannot be reached.
    pub async fn worked(&self, changes: Vec<i64>) -> Result<(), Error> {
        self.sqlite
            // Changes that are read again find their jobs claimed, or unclaimed as they are.
            .call_kept(Kept::InFile, move |db| {
                let mut delete = db.prepare_cached("DELETE FROM changes WHERE seq = ?1")?;
                changes.iter().try_for_each(|seq| delete.execute([seq]).map(drop))
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
    type Position = DuePosition;

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
        let (now, max_queued_bytes, work) = (now.timestamp_millis(), creation.max_queued_bytes, job.work);
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
        self.ring(work);
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
        let (note, work) = (self.note(&row), row.work);
        let (written, _note) = self.sqlite.call_kept(kept, move |db| Ok((row.write(db, fence)?, note))).await?;
        self.ring(work);
        Ok(written)
    }

    async fn bury(&self, job: &Job, tombstone: &Tombstone) -> Result<bool, Error> {
        let row = NewRow::of(&Record::Tombstone(tombstone.clone()))?;
        let (fence, caller, key) = (job.fence(), job.caller.clone(), job.idempotency_key.clone());
        let note = self.note(&row);
        let (written, _note) = self
            .sqlite
            .scrub(move |db| {
                let written = row.write(db, fence)?;
                if written && let Some(key) = key {
                    // Another job's, where the key was used again since.
                    let own = "DELETE FROM idempotency WHERE caller = ?1 AND key = ?2 AND id = ?3";
                    db.execute(own, [caller, key, fence.id.to_string()])?;
                }
                Ok((written, note))
            })
            .await?;
        Ok(written)
    }

    async fn due(
        &self,
        now: Timestamp,
        after: Option<&DuePosition>,
        limit: u32,
    ) -> Result<Page<Record, DuePosition>, Error> {
        let found = self.sqlite.read(|db| due_rows(db, now.timestamp_millis(), after, limit))?;
        let is_full = found.len() == limit as usize;
        let (mut positions, records): (Vec<DuePosition>, Vec<String>) = found.into_iter().unzip();
        let next = if is_full { positions.pop() } else { None };
        Ok(Page { records: readable(&records), next })
    }

    async fn list(&self, caller: &str, before: Option<Uuid>, limit: u32) -> Result<Page<Job, Uuid>, Error> {
        let before = before.unwrap_or(Uuid::max());
        let mut found = self.sqlite.read(|db| listed_rows(db, caller, before, limit + 1))?;
        let follow = found.len() > limit as usize;
        found.truncate(limit as usize);
        let (ids, records): (Vec<Uuid>, Vec<String>) = found.into_iter().unzip();
        let next = ids.last().copied().filter(|_| follow);
        Ok(Page { records: readable(&records).into_iter().filter_map(Record::into_job).collect(), next })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of version 2 with these changes, each with its job's record and its marker.
    fn of_version_2(path: &Path, changes: &[(i64, Uuid, &str, Option<&str>)]) {
        drop(SqliteJobStore::open(path).unwrap());
        let db = rusqlite::Connection::open(path).unwrap();
        let version_2 = "DROP TABLE changes;
            CREATE TABLE changes (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, version INTEGER NOT NULL,
                dispatch TEXT) STRICT;
            CREATE TABLE cursors (consumer TEXT PRIMARY KEY, seq INTEGER NOT NULL) STRICT, WITHOUT ROWID;
            INSERT INTO cursors VALUES ('enrichment', 6);
            PRAGMA user_version = 2;";
        db.execute_batch(version_2).unwrap();
        for (seq, id, record, dispatch) in changes {
            let (id, job) = (id.to_string(), "INSERT OR IGNORE INTO jobs VALUES (?1, 'local', 1, 0, '', NULL, 0, ?2)");
            db.execute(job, [id.as_str(), record]).unwrap();
            db.execute("INSERT INTO changes VALUES (?1, ?2, 1, ?3)", params![seq, id, dispatch]).unwrap();
        }
    }

    #[tokio::test]
    async fn of_one_feed_with_every_write_what_waits_is_left_each_in_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("jobs.sqlite");
        let (passed, photo, prompt) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
        let (a_photo, a_prompt) = (r#"{"photo":{}}"#, r#"{"prompt":{}}"#);
        of_version_2(
            &path,
            &[
                (6, passed, a_photo, Some("enrichment")),
                (7, photo, a_photo, None),
                (8, photo, a_photo, Some("enrichment")),
                (9, prompt, a_prompt, Some("enrichment")),
                (10, photo, a_photo, Some("webhook")),
            ],
        );
        let store = SqliteJobStore::open(&path).unwrap();
        let of = async |work| store.changes_behind(work, 0, 10).await.unwrap();
        assert_eq!(of(Work::Description).await, [Change { seq: 8, id: photo }]);
        assert_eq!(of(Work::Prompt).await, [Change { seq: 9, id: prompt }]);
        store.worked(vec![8]).await.unwrap();
        assert_eq!(of(Work::Description).await, []);
        assert_eq!(of(Work::Prompt).await.len(), 1);
    }
}
