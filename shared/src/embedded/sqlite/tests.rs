use std::collections::BTreeSet;

use super::*;

#[tokio::test]
async fn a_file_is_closed_when_its_last_handle_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("numbers.sqlite");
    let sqlite = Sqlite::open(&path, "the numbers", 1, "CREATE TABLE numbers (number INTEGER) STRICT").unwrap();
    for kept in [Kept::InFile, Kept::OnDisk, Kept::InFile] {
        for number in 0..100 {
            let insert = move |db: &Connection| db.execute("INSERT INTO numbers VALUES (?1)", [number]);
            sqlite.call_kept(kept, insert).await.unwrap();
        }
    }
    let other = sqlite.clone();
    drop(sqlite);
    let count = |db: &Connection| db.query_row("SELECT count(*) FROM numbers", [], |row| row.get::<_, u32>(0));
    assert_eq!(other.read(count).unwrap(), 300);
    drop(other);
    assert!(!folder.path().join("numbers.sqlite-wal").exists(), "what is left in the log");
    assert_eq!(count(&Connection::open(&path).unwrap()).unwrap(), 300);
}

#[test]
fn a_statement_is_parsed_once_whatever_limit_it_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("numbers.sqlite");
    let schema = "CREATE TABLE numbers (number INTEGER) STRICT";
    for connection in [connect(&path, 1, schema, &[]).unwrap(), connect_reader(&path).unwrap()] {
        let mut statement = connection.prepare_cached("SELECT number FROM numbers LIMIT ?1").unwrap();
        for limit in 1..4 {
            assert!(statement.query([limit]).unwrap().next().unwrap().is_none());
        }
        assert_eq!(statement.get_status(rusqlite::StatementStatus::RePrepare), 0);
    }
}

#[test]
fn temporary_files_lie_beside_the_databases() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("numbers.sqlite");
    let connection = connect(&path, 1, "CREATE TABLE numbers (number INTEGER) STRICT", &[]).unwrap();
    let set: String = connection.pragma_query_value(None, "temp_store_directory", |row| row.get(0)).unwrap();
    // Or where the first database of this process was.
    assert!(!set.is_empty() && Path::new(&set).parent() == folder.path().parent(), "{set:?}");
}

const PEOPLE: &str = "CREATE TABLE people (id TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT, WITHOUT ROWID";

fn id(number: usize) -> String {
    // In no order, as the ids of jobs are.
    format!("{:08x}", number.wrapping_mul(2_654_435_761) % 0x1_0000_0000)
}

/// Long enough that pages are split, and again when it grows.
fn record(number: usize, length: usize) -> String {
    format!("record {number:04} {}", "x".repeat(length))
}

/// The even records of which anything is left in the file, and the odd ones.
fn readable(path: &Path) -> (BTreeSet<usize>, BTreeSet<usize>) {
    let bytes = std::fs::read(path).unwrap();
    let number = |window: &[u8]| std::str::from_utf8(window.strip_prefix(b"record ")?).ok()?.parse::<usize>().ok();
    bytes.windows(11).filter_map(number).partition(|number| number % 2 == 0)
}

fn fill(db: &Connection) -> rusqlite::Result<()> {
    for number in 0..500 {
        db.execute("INSERT INTO people VALUES (?1, ?2)", [id(number), record(number, 500)])?;
        let grown = (number * 7) % 500;
        let longer = record(grown, 500 + (number * 131) % 2000);
        db.execute("UPDATE people SET record = ?2 WHERE id = ?1", [id(grown), longer])?;
    }
    Ok(())
}

fn delete(db: &Connection) -> rusqlite::Result<()> {
    (0..500).step_by(2).try_for_each(|number| db.execute("DELETE FROM people WHERE id = ?1", [id(number)]).map(|_| ()))
}

#[tokio::test]
async fn no_copy_of_a_deleted_row_is_left_in_the_file_when_it_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("people.sqlite");
    let sqlite = Sqlite::open(&path, "the people", 1, PEOPLE).unwrap();
    sqlite.call(fill).await.unwrap();
    sqlite.scrub(delete).await.unwrap();
    drop(sqlite);
    let (deleted, kept) = readable(&path);
    assert!(deleted.is_empty() && kept.len() == 250, "{deleted:?} can be read, and {} that were kept", kept.len());
}

#[test]
fn what_a_killed_process_deleted_is_gone_after_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("people.sqlite");
    // Never closed, as by a kill.
    let killed = connect(&path, 1, PEOPLE, &[]).unwrap();
    fill(&killed).unwrap();
    delete(&killed).unwrap();
    assert!(empty_log(&killed).unwrap());
    assert!(!readable(&path).0.is_empty(), "secure_delete reaches it all by itself: this test shows nothing");
    drop(Sqlite::open(&path, "the people", 1, PEOPLE).unwrap());
    assert_eq!(readable(&path).0, BTreeSet::new());
}
