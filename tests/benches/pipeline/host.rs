//! Queues that are filled while no worker runs, and the release binary at work on copies of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use rusqlite::{Connection, OpenFlags};
use serde_json::Value;
use shared::clock::Clock;
use shared::http::Caller;
use submit::Submission;
use tempfile::TempDir;

use crate::photos::Photos;
use crate::support::{client, ended, open, process::Process, submit};

/// Times as in production, but what was filled in earlier must not become due while it is measured.
const SETTINGS: [(&str, &str); 4] = [
    ("LEASE_SECONDS", "120"),
    ("REDISPATCH_SECONDS", "3600"),
    ("BACKOFF_SECONDS", "5"),
    ("SWEEP_INTERVAL_SECONDS", "60"),
];
/// Submissions under way at once while a queue is filled.
const FILLERS: usize = 32;
const MB: f64 = 1e6;

/// An empty folder on the disk that holds `target`. A run's folder is kept with its result until all are done:
/// ext4 without a journal makes a file more slowly for minutes after thousands were deleted, since it looks
/// through their inodes first (Linux: `find_inode_bit` in fs/ext4/ialloc.c).
pub fn scratch() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A data folder with `count` jobs in its queue: a host that is open but does not run takes them.
pub async fn fill(photos: &Photos, count: usize, describe: bool) -> TempDir {
    let folder = scratch();
    let host = open(folder.path(), Clock::System, &SETTINGS).await;
    let fill = async |first: usize| {
        for n in (first..count).step_by(FILLERS) {
            let submission = Submission { image: photos.nth(n), describe, callback_url: None };
            host.submit.accept(&Caller("local".into()), None, submission).await.unwrap();
        }
    };
    join_all((0..FILLERS).map(fill)).await;
    folder
}

/// What came of working a queue off.
pub struct Drain {
    pub per_second: f64,
    /// Processor time of the whole process, start included.
    pub processor_ms_per_job: f64,
    /// The process's greatest resident memory, and that a second after the end, in MB.
    pub peak_mb: f64,
    pub after_mb: f64,
    /// Flushes of the whole disk, whoever asked for them.
    pub flushes_per_job: f64,
    /// Writes to a record.
    pub writes_per_job: f64,
    /// Median milliseconds, by stage.
    pub stages: BTreeMap<String, f64>,
    /// Jobs, by how they ended.
    pub ends: BTreeMap<String, usize>,
    _folder: TempDir,
}

/// What came of submitting, one photo after the other.
pub struct Latency {
    /// Median milliseconds.
    pub millis: f64,
    _folder: TempDir,
}

/// Starts the host with the bundle in `model` on a copy of `filled` and waits until every job has
/// ended. Time runs from the moment at which the host says that it listens to the last record's
/// last write.
pub async fn drain(filled: &Path, model: &Path) -> Drain {
    let folder = copy(filled);
    let flushes = disk_flushes();
    let settings = [&SETTINGS[..], &[("MODEL_DIR", model.to_str().unwrap())]].concat();
    let process = Process::start(folder.path(), &settings).await.unwrap();
    let started = Utc::now();
    let records = Connection::open_with_flags(folder.path().join("jobs.sqlite"), OpenFlags::SQLITE_OPEN_READ_ONLY);
    let records = records.unwrap();
    while open_jobs(&records) > 0 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let flushes = disk_flushes() - flushes;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (status, processor_ms) = (process.proc("status"), processor_ms(&process.proc("stat")));
    assert!(process.terminate().await.success());
    let jobs = all_jobs(&records);
    let last = jobs.iter().map(|job| time(&job["updated_at"])).max().unwrap();
    let mut ends = BTreeMap::new();
    for job in &jobs {
        let abstained = if job["reading"]["abstained"].is_object() { ", no label" } else { "" };
        *ends.entry(format!("{}{abstained}", job["status"].as_str().unwrap())).or_default() += 1;
    }
    let count = jobs.len() as f64;
    Drain {
        processor_ms_per_job: processor_ms / count,
        per_second: count / ((last - started).as_seconds_f64()),
        peak_mb: memory_mb(&status, "VmHWM:"),
        after_mb: memory_mb(&status, "VmRSS:"),
        flushes_per_job: flushes as f64 / count,
        writes_per_job: jobs.iter().map(|job| job["version"].as_f64().unwrap()).sum::<f64>() / count,
        stages: stages(&jobs),
        ends,
        _folder: folder,
    }
}

/// Submits with `filled` in the queue and at work, or with nothing queued: then each job ends before the
/// next comes. `first` numbers the photos.
pub async fn submit_latency(filled: Option<&Path>, photos: &Photos, first: usize, count: usize) -> Latency {
    let folder = filled.map_or_else(scratch, copy);
    let process = Process::start(folder.path(), &SETTINGS).await.unwrap();
    let http = client();
    let mut latencies = Vec::new();
    for n in 0..count {
        let photo = photos.nth(first + n);
        let started = Instant::now();
        let id = submit(&http, &process.url, &photo, None).await.unwrap();
        latencies.push(started.elapsed().as_secs_f64() * 1e3);
        match filled {
            Some(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            None => drop(ended(&http, &process.url, &id).await),
        }
    }
    process.kill().await;
    // The first ones find connections and caches cold.
    Latency { millis: median(latencies.split_off(count / 10)), _folder: folder }
}

pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

fn copy(filled: &Path) -> TempDir {
    let folder = scratch();
    let copied = Command::new("cp").arg("-a").arg(filled.join(".")).arg(folder.path()).status().unwrap();
    // What the copy left to write must not be flushed with the first record.
    assert!(copied.success() && Command::new("sync").status().unwrap().success());
    folder
}

fn open_jobs(records: &Connection) -> u64 {
    records.query_row("SELECT count(*) FROM jobs WHERE due_at IS NOT NULL", [], |row| row.get(0)).unwrap()
}

fn all_jobs(records: &Connection) -> Vec<Value> {
    let mut statement = records.prepare("SELECT record FROM jobs").unwrap();
    let rows = statement.query_map([], |row| row.get::<_, String>(0)).unwrap();
    rows.map(|row| serde_json::from_str(&row.unwrap()).unwrap()).collect()
}

fn stages(jobs: &[Value]) -> BTreeMap<String, f64> {
    let mut by_stage: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (stage, millis) in jobs.iter().flat_map(|job| job["timings_ms"].as_object().unwrap()) {
        by_stage.entry(stage.clone()).or_default().push(millis.as_f64().unwrap());
    }
    by_stage.into_iter().map(|(stage, millis)| (stage, median(millis))).collect()
}

fn time(value: &Value) -> DateTime<Utc> {
    value.as_str().unwrap().parse().unwrap()
}

/// A line of `/proc/PID/status`, which is in KiB.
fn memory_mb(status: &str, name: &str) -> f64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0 / MB
}

/// From `/proc/PID/stat` (proc(5)): user and system time in ticks of 10 ms, behind the name.
pub fn processor_ms(stat: &str) -> f64 {
    let fields = stat.rsplit(") ").next().unwrap().split(' ');
    fields.skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap() * 10.0).sum()
}

/// The sixteenth field of the disk's statistics (Linux: Documentation/block/stat.rst); 0 where the
/// folder lies on no disk of its own.
fn disk_flushes() -> u64 {
    use std::os::unix::fs::MetadataExt;
    let device = std::fs::metadata(env!("CARGO_TARGET_TMPDIR")).unwrap().dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let statistics = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).unwrap_or_default();
    statistics.split_whitespace().nth(15).map_or(0, |flushes| flushes.parse().unwrap())
}
