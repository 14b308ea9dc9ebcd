//! Measures live results: the release binary as a process, clients with a WebSocket and a job each, and
//! how long after a job's end its client knows.
//!
//! `scripts/bench sockets` builds the binary and calls this. Ends with 0 whatever the times are; a client
//! that is not told the end of its job, or told of it out of order, ends it with a panic. Clients run on
//! the same processors as the host. Every figure is the median of its rounds.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../../pipeline/support/mod.rs"]
#[allow(dead_code, reason = "the pipeline's tests need the rest of it")]
mod support;

use std::time::Instant;

use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use support::process::Process;
use support::websocket::Socket;
use support::{client, numbered_mole, submit};

const CLIENTS: usize = 500;
/// As in production: nothing becomes due while it is measured.
const SETTINGS: [(&str, &str); 2] = [("LEASE_SECONDS", "120"), ("REDISPATCH_SECONDS", "3600")];

/// Of one round.
struct Figures {
    /// Milliseconds for a ticket and the connection, all clients at once.
    connecting: f64,
    /// Seconds from the first submission until every client knows.
    all_told: f64,
    /// Milliseconds from the write that ends a job to its client, in order.
    late: Vec<f64>,
    frames: usize,
    peak_mb: f64,
}

#[tokio::main]
async fn main() {
    let rounds = if std::env::args().any(|argument| argument == "--quick") { 1 } else { 5 };
    let mut figures = Vec::new();
    for number in 0..rounds {
        eprintln!("round {} of {rounds}", number + 1);
        figures.push(round().await);
    }
    let print = |what: &str, digits: usize, of: &dyn Fn(&Figures) -> f64| {
        let mut values: Vec<f64> = figures.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        println!("{what:<52}{:>10.digits$}", values[values.len() / 2]);
    };
    println!(
        "{CLIENTS} clients with a WebSocket and a job each, medians of {rounds} rounds; none was told out of order"
    );
    print("ticket and connection, all at once, ms a client", 2, &|round| round.connecting);
    print("first submission to the last client told, s", 1, &|round| round.all_told);
    print("frames, of jobs that end with their fifth version", 0, &|round| round.frames as f64);
    for (share, name) in [(50, "median"), (99, "99th percentile"), (100, "worst")] {
        let at = |round: &Figures| round.late[(round.late.len() * share / 100).min(round.late.len() - 1)];
        print(&format!("a job's end to its client, {name}, ms"), 0, &at);
    }
    print("peak memory of the host, MB", 0, &|round| round.peak_mb);
}

async fn round() -> Figures {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (host, http) = (Process::start(folder.path(), &SETTINGS).await.unwrap(), client());
    let url = host.url.as_str();
    let started = Instant::now();
    let sockets = join_all((0..CLIENTS).map(|_| Socket::connect(&http, url, ""))).await;
    let connecting = started.elapsed().as_secs_f64() * 1e3 / CLIENTS as f64;
    let photos: Vec<_> = (0..CLIENTS).map(numbered_mole).collect();
    let started = Instant::now();
    let told = join_all(sockets.into_iter().zip(&photos).map(async |(mut socket, photo)| {
        let id = submit(&http, url, photo, None).await.unwrap();
        socket.subscribe(&id).await;
        let (frame, came) = socket.until_ended(&id).await.expect("the connection ended before the job");
        let now = Utc::now();
        assert_eq!(frame["status"], "completed", "{frame}");
        assert!(came.is_sorted(), "{came:?}");
        let ended: DateTime<Utc> = frame["result"]["updated_at"].as_str().unwrap().parse().unwrap();
        // The connection stays open until all have been told.
        (socket, (now - ended).as_seconds_f64() * 1e3, came.len())
    }))
    .await;
    let all_told = started.elapsed().as_secs_f64();
    let mut late: Vec<f64> = told.iter().map(|(_, late, _)| *late).collect();
    late.sort_by(f64::total_cmp);
    let frames = told.iter().map(|(.., frames)| frames).sum();
    let status = host.proc("status");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_mb = peak.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0 / 1e6;
    drop(told);
    assert!(host.terminate().await.success());
    Figures { connecting, all_told, late, frames, peak_mb }
}
