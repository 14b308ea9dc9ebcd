//! One SQLite file behind one thread, which commits what has piled up in one transaction: many
//! callers share the price of one fsync. Where nobody in a batch needs one there is none: SIGKILL
//! loses nothing of it, a power cut may (<https://www.sqlite.org/pragma.html#pragma_synchronous>).
//!
//! What is deleted is overwritten: its row and its place in the log at once. Where a page was split or
//! merged before, SQLite may have left a copy of the row between the page's cells, which `secure_delete`
//! does not reach: those go when the file is written anew, soon after and whenever it is closed.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, Transaction, TransactionBehavior};
use tokio::sync::oneshot;

use crate::error::Error;

/// Calls that share one commit, at most.
const MAX_BATCH: usize = 64;
/// Prepared statements that are kept.
const STATEMENTS: usize = 64;
/// How long another process may hold the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// From one rewriting of the file to the next, at least.
const REWRITE_EVERY: Duration = Duration::from_secs(60);
/// Nor is it rewritten for more than one part in this many of the time: 10,000 jobs take a quarter of a second.
const REWRITE_SHARE: u32 = 100;

/// What a caller needs to be sure of when it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    /// The write stands after a power cut.
    OnDisk,
    /// After a power cut the write may be undone, with all that came after it: for what is then
    /// done once more without harm.
    InFile,
}

impl Kept {
    /// SQLite's name of it, in WAL mode.
    fn synchronous(self) -> &'static str {
        match self {
            Self::OnDisk => "FULL",
            Self::InFile => "NORMAL",
        }
    }
}

/// Answers its caller once it is known whether the batch was committed.
type Reply = Box<dyn FnOnce(Result<(), &str>) + Send>;
/// Runs inside the batch's transaction.
type Work = Box<dyn FnOnce(&Connection) -> Reply + Send>;

struct Call {
    work: Work,
    kept: Kept,
}

/// A handle to the file and its thread, which end with the last handle.
#[derive(Clone)]
pub(super) struct Sqlite {
    /// Sees what is committed, without a way to the thread and back. In WAL mode it neither waits
    /// for writers nor holds them up. Closed before the thread's connection, which as the last one
    /// empties the log and deletes it.
    reader: Arc<Mutex<Connection>>,
    thread: Arc<Thread>,
    what: &'static str,
    /// Set where the log must be emptied after the next commit.
    scrub: Arc<AtomicBool>,
}

struct Thread {
    /// `None` once it is told to end.
    calls: Option<Sender<Call>>,
    running: Option<JoinHandle<()>>,
}

impl Drop for Thread {
    /// Waits until the file is closed, or the process might end before that.
    fn drop(&mut self) {
        self.calls = None;
        if let Some(running) = self.running.take() {
            // A panic there has been told to whoever called.
            let _ = running.join();
        }
    }
}

impl Sqlite {
    /// Opens or creates the file. `schema` is run where the file is new; a file of another
    /// `version` is refused.
    pub(super) fn open(path: &Path, what: &'static str, version: u32, schema: &str) -> Result<Self, Error> {
        Self::open_upgraded(path, what, version, schema, &[])
    }

    /// As [`Sqlite::open`], where a file of an earlier version is brought to this one by the last of
    /// `changes`, one a version.
    pub(super) fn open_upgraded(
        path: &Path,
        what: &'static str,
        version: u32,
        schema: &str,
        changes: &[&str],
    ) -> Result<Self, Error> {
        let unavailable = |error| Error::unavailable(what, error);
        // Whoever closes the file last deletes its log: one that is left comes from a kill.
        let mut log = path.as_os_str().to_owned();
        log.push("-wal");
        let was_killed = Path::new(&log).exists();
        let connection = connect(path, version, schema, changes).map_err(unavailable)?;
        let reader = Arc::new(Mutex::new(connect_reader(path).map_err(unavailable)?));
        let (calls, inbox) = channel();
        let scrub = Arc::new(AtomicBool::new(was_killed));
        let scrub_due = Arc::clone(&scrub);
        let running = std::thread::Builder::new()
            .name(what.to_owned())
            .spawn(move || serve(connection, &inbox, &scrub_due, was_killed))
            .map_err(|error| Error::unavailable(what, error))?;
        let thread = Arc::new(Thread { calls: Some(calls), running: Some(running) });
        Ok(Self { reader, thread, what, scrub })
    }

    /// Runs `work`, which only reads: what was answered before is seen. It takes microseconds, less
    /// than handing it to another thread would.
    pub(super) fn read<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, Error> {
        let reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        work(&reader).map_err(|error| Error::unavailable(self.what, error))
    }

    /// Runs `work` and returns when what it wrote is on the disk. Where `work` fails, what it
    /// wrote is undone, and nothing else of the batch.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        self.call_kept(Kept::OnDisk, work).await
    }

    /// As [`Sqlite::call`], where the caller may need less.
    pub(super) async fn call_kept<T: Send + 'static>(
        &self,
        kept: Kept,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let (sender, receiver) = oneshot::channel();
        let work: Work = Box::new(move |connection| {
            let result = savepoint(connection, work);
            Box::new(move |committed| {
                let result = committed.map_err(str::to_owned).and_then(|()| result.map_err(|error| error.to_string()));
                // The caller may have gone; the write stands all the same.
                let _ = sender.send(result);
            })
        });
        let sent = self.thread.calls.as_ref().is_some_and(|calls| calls.send(Call { work, kept }).is_ok());
        if !sent {
            return Err(Error::unavailable(self.what, "its thread has ended"));
        }
        let unavailable = |cause: String| Error::unavailable(self.what, cause);
        receiver.await.map_err(|_| unavailable("no transaction could be begun".into()))?.map_err(unavailable)
    }

    /// As [`Sqlite::call`], for work that deletes: what it overwrote must not stay readable in the
    /// write-ahead log either, nor between the cells of a page.
    pub(super) async fn scrub<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let due = Arc::clone(&self.scrub);
        self.call(move |connection| {
            due.store(true, Ordering::SeqCst);
            work(connection)
        })
        .await
    }
}

fn connect(path: &Path, version: u32, schema: &str, changes: &[&str]) -> rusqlite::Result<Connection> {
    create_private(path)?;
    let mut connection = Connection::open(path)?;
    keep_temporary_files_beside(&connection, path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    keep_statements(&connection)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", Kept::OnDisk.synchronous())?;
    // Deleted health data is overwritten, not only forgotten.
    connection.pragma_update(None, "secure_delete", "ON")?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let found: u32 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    if found == 0 {
        transaction.execute_batch(schema)?;
        transaction.pragma_update(None, "user_version", version)?;
    } else if let Some(missing @ 1..) = version.checked_sub(found)
        && let Some(from) = changes.len().checked_sub(missing as usize)
    {
        changes[from..].iter().try_for_each(|change| transaction.execute_batch(change))?;
        transaction.pragma_update(None, "user_version", version)?;
    } else if found != version {
        let message = format!("the file has schema version {found}, this build reads {version}");
        return Err(rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(1), Some(message)));
    }
    transaction.commit()?;
    Ok(connection)
}

/// SQLite's temporary files hold pages of the database, and VACUUM's all of them: they belong where that lies, which
/// may be encrypted, and not into `/var/tmp`.
///
/// The setting is the process's, and must not change while another connection works: the first one makes it.
fn keep_temporary_files_beside(connection: &Connection, path: &Path) -> rusqlite::Result<()> {
    static SET: Mutex<bool> = Mutex::new(false);
    let mut is_set = SET.lock().unwrap_or_else(PoisonError::into_inner);
    if !*is_set && let Some(folder) = path.parent().and_then(Path::to_str).filter(|folder| !folder.is_empty()) {
        // Deprecated for being the process's; SQLITE_TMPDIR is as well, and nobody may set that here.
        connection.pragma_update(None, "temp_store_directory", folder)?;
        *is_set = true;
    }
    Ok(())
}

fn connect_reader(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    keep_statements(&connection)?;
    connection.pragma_update(None, "query_only", "ON")?;
    Ok(connection)
}

/// Every statement that a file's calls use is parsed once. Without the "query planner stability guarantee" SQLite
/// would parse each that has a `LIMIT ?` again whenever it is given a value.
fn keep_statements(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true).map(drop)
}

/// SQLite gives its log the permissions of the file: the owner's alone.
fn create_private(path: &Path) -> rusqlite::Result<()> {
    let made = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    made.map(|_| ()).map_err(|error| {
        rusqlite::Error::SqliteFailure(
            rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CANTOPEN),
            Some(error.to_string()),
        )
    })
}

fn savepoint<T>(connection: &Connection, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
    let run = |sql| connection.prepare_cached(sql)?.execute([]);
    run("SAVEPOINT one")?;
    let result = work(connection);
    if result.is_err() {
        run("ROLLBACK TO one")?;
    }
    run("RELEASE one")?;
    result
}

fn serve(mut connection: Connection, inbox: &Receiver<Call>, scrub: &AtomicBool, was_killed: bool) {
    let mut set = Kept::OnDisk;
    let mut rewrite = Rewrite { is_due: was_killed, not_before: Instant::now() + REWRITE_EVERY };
    loop {
        let pause = rewrite.pause();
        if pause.is_some_and(|pause| pause.is_zero()) {
            rewrite.run(&connection);
            continue;
        }
        let first = match pause {
            Some(pause) => inbox.recv_timeout(pause),
            None => inbox.recv().map_err(RecvTimeoutError::from),
        };
        let first = match first {
            Ok(first) => first,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => break,
        };
        let calls: Vec<Call> = std::iter::once(first).chain(inbox.try_iter().take(MAX_BATCH - 1)).collect();
        let kept = if calls.iter().any(|call| call.kept == Kept::OnDisk) { Kept::OnDisk } else { Kept::InFile };
        if kept != set {
            if let Err(error) = connection.pragma_update(None, "synchronous", kept.synchronous()) {
                // As below: every caller is told.
                tracing::warn!(error.code = "sqlite_synchronous", error.chain = %error, "batch not begun");
                continue;
            }
            set = kept;
        }
        let replies = serve_batch(&mut connection, calls);
        if scrub.swap(false, Ordering::SeqCst) {
            // Not emptied while another process reads: then after the next batch.
            scrub.store(!empty_log(&connection).unwrap_or(false), Ordering::SeqCst);
            rewrite.is_due = true;
        }
        replies.into_iter().for_each(|reply| reply());
    }
    if rewrite.is_due {
        rewrite.run(&connection);
    }
}

/// Whether all of the log is in the file now, and nothing in the log.
fn empty_log(connection: &Connection) -> rusqlite::Result<bool> {
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, bool>(0)).map(|is_busy| !is_busy)
}

/// When the file is written anew (<https://www.sqlite.org/lang_vacuum.html>).
struct Rewrite {
    is_due: bool,
    not_before: Instant,
}

impl Rewrite {
    /// How long calls may still be waited for; `None`: for ever.
    fn pause(&self) -> Option<Duration> {
        self.is_due.then(|| self.not_before.saturating_duration_since(Instant::now()))
    }

    fn run(&mut self, connection: &Connection) {
        let start = Instant::now();
        let done = connection.execute_batch("VACUUM").and_then(|()| empty_log(connection));
        if let Err(error) = &done {
            tracing::warn!(error.code = "sqlite_vacuum", error.chain = %error, "file not rewritten");
        }
        self.is_due = !done.unwrap_or(false);
        self.not_before = Instant::now() + REWRITE_EVERY.max(start.elapsed() * REWRITE_SHARE);
    }
}

/// Runs and commits a batch, and returns the answers to give.
fn serve_batch(connection: &mut Connection, calls: Vec<Call>) -> Vec<Box<dyn FnOnce()>> {
    let transaction = match connection.transaction_with_behavior(TransactionBehavior::Immediate) {
        Ok(transaction) => transaction,
        Err(error) => {
            let busy = error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy);
            tracing::warn!(error.code = "sqlite_begin", sqlite.busy = busy, error.chain = %error, "batch not begun");
            // Dropping the calls drops their reply channels: every caller is told.
            return Vec::new();
        }
    };
    let replies: Vec<Reply> = calls.into_iter().map(|call| (call.work)(&transaction)).collect();
    let committed = commit(transaction);
    let answer = |reply: Reply| -> Box<dyn FnOnce()> {
        let committed = committed.clone();
        Box::new(move || reply(committed.as_ref().map(|&()| ()).map_err(String::as_str)))
    };
    replies.into_iter().map(answer).collect()
}

fn commit(transaction: Transaction<'_>) -> Result<(), String> {
    transaction.commit().map_err(|error| format!("commit failed: {error}"))
}

#[cfg(test)]
mod tests;
