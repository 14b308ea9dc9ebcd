//! The disk fills up in the middle of 500 jobs, more than once, and is freed again.
//!
//! Real: the data folder is a tmpfs of 64 MiB in a mount namespace of its own (`unshare`, which
//! needs no root where user namespaces are allowed). The namespace outlives the host, so that a
//! host can be killed on a full disk and started again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use reqwest::Client;
use serde_json::Value;
use shared::api::JobPage;
use shared::config::Env;
use shared::job::Status;
use tempfile::TempDir;
use tokio::process::Command;
use uuid::Uuid;

use crate::support::backlog::{self, JOBS, PATIENCE};
use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::{Process, binary};
use crate::support::{client, numbered_mole, report, within};

/// A small file system that only a process inside the namespace finds under its own name.
struct SmallDisk {
    holder: Child,
    place: TempDir,
}

impl SmallDisk {
    /// `None` where this machine allows no mount namespace.
    fn mount() -> Option<Self> {
        let place = tempfile::tempdir().unwrap();
        let script = "mount -t tmpfs -o size=64m,mode=700 tmpfs \"$0\" && touch \"$0/mounted\" && exec cat";
        let holder = std::process::Command::new("unshare")
            .args(["-rm", "sh", "-c", script])
            .arg(place.path())
            .stdin(Stdio::piped())
            .spawn()
            .ok()?;
        let mut disk = Self { holder, place };
        let mounted = disk.data().join("mounted");
        while !mounted.exists() {
            if disk.holder.try_wait().unwrap().is_some() {
                return None;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(disk)
    }

    /// The same folder, seen from outside.
    fn data(&self) -> PathBuf {
        let inside = self.place.path().strip_prefix("/").unwrap();
        Path::new("/proc").join(self.holder.id().to_string()).join("root").join(inside)
    }

    /// `None` where the host dies before it listens.
    async fn start(&self, extra: &[(&str, &str)]) -> Option<Process> {
        let mut command = Command::new("nsenter");
        let target = self.holder.id().to_string();
        command.args(["-t", &target, "-U", "-m", "--preserve-credentials", "--"]).arg(binary("local"));
        Process::start_by(command, self.place.path(), extra).await
    }

    /// Takes what is left, to the last byte.
    fn fill(&self) {
        let mut ballast = File::create(self.data().join("ballast")).unwrap();
        for block in [&[0; 65_536][..], &[0; 512]] {
            while ballast.write_all(block).is_ok() {}
        }
    }

    fn free(&self) {
        std::fs::remove_file(self.data().join("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A client that goes on submitting whatever it is answered.
struct Submitter {
    http: Client,
    accepted: Vec<Uuid>,
    refused: usize,
}

impl Submitter {
    async fn submit(&mut self, url: &str) {
        let photo = numbered_mole(self.accepted.len());
        let request = self.http.post(format!("{url}/submit")).header("content-type", "image/jpeg").body(photo);
        let answer = request.send().await.unwrap();
        match answer.status().as_u16() {
            202 => {
                let body: Value = answer.json().await.unwrap();
                self.accepted.push(body["request_id"].as_str().unwrap().parse().unwrap());
            }
            503 => self.refused += 1,
            other => panic!("answered {other}"),
        }
    }
}

/// How many jobs are still open, page by page.
async fn open_jobs(http: &Client, url: &str) -> usize {
    let (mut open, mut cursor) = (0, String::new());
    loop {
        let page = http.get(format!("{url}/results?limit=100{cursor}")).send().await.unwrap();
        let page: JobPage = page.json().await.unwrap();
        open += page.results.iter().filter(|job| job.status.is_open()).count();
        let Some(next) = page.next_cursor else { return open };
        cursor = format!("&cursor={next}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_loses_none_of_500_jobs_and_refuses_new_ones() {
    let Some(disk) = SmallDisk::mount() else {
        let on_ci = Env::of_process().text("CI").unwrap() == Some("true");
        assert!(!on_ci, "no mount namespace to be had: the full disk was not tested");
        report("NOT TESTED: the full disk, since this machine allows no mount namespace (unshare -rm)");
        return;
    };
    let llm = LlmServer::start([]).await;
    // Slower than the submissions, so that jobs of every state are there when the disk is full.
    llm.behave(Behaviour::After(Duration::from_millis(400)));
    let base_url = llm.base_url();
    let extra = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("LEASE_SECONDS", "15")];
    let mut host = disk.start(&extra).await.unwrap();
    let mut client = Submitter { http: client(), accepted: Vec::new(), refused: 0 };
    for (turn, killed) in [false, true, false].into_iter().enumerate() {
        while client.accepted.len() < (turn + 1) * JOBS / 4 {
            client.submit(&host.url).await;
        }
        disk.fill();
        let (refused, logged, since) = (client.refused, host.log().len(), Instant::now());
        // Full for as long as it takes to refuse 100, and for some rounds of everything that polls.
        while client.refused < refused + 100 || since.elapsed() < Duration::from_secs(5) {
            client.submit(&host.url).await;
            assert!(client.accepted.len() < JOBS, "the disk is not full");
        }
        let log = host.log().split_off(logged);
        let (lines, seconds) = (log.len(), since.elapsed().as_secs() as usize + 1);
        let requests = client.refused - refused;
        report(&format!("full disk: {requests} submissions refused and {lines} lines logged in {seconds} s"));
        // A line a refused request, and once a second one of whatever polls and of each record that is due. What goes
        // round without a pause says thousands.
        let mut kinds = BTreeMap::<_, usize>::new();
        for line in &log {
            let line: Value = serde_json::from_str(line).unwrap_or_default();
            *kinds.entry(line["message"].to_string()).or_default() += 1;
        }
        assert!(lines < 2 * requests + (300 + JOBS) * seconds, "{lines} lines in {seconds} s: {kinds:?}");
        if killed {
            host.kill().await;
            // It may start or refuse to, on a full disk; either harms nothing.
            let early = disk.start(&extra).await;
            report(&format!("full disk: a host starts on it: {}", early.is_some()));
            if let Some(early) = early {
                early.kill().await;
            }
            disk.free();
            host = disk.start(&extra).await.unwrap();
        } else {
            disk.free();
        }
        let before = client.accepted.len();
        within(PATIENCE, "submissions are accepted again", async || {
            client.submit(&host.url).await;
            client.accepted.len() > before
        })
        .await;
    }
    while client.accepted.len() < JOBS {
        client.submit(&host.url).await;
    }
    within(PATIENCE, "every job has ended", async || open_jobs(&client.http, &host.url).await == 0).await;
    assert!(host.terminate().await.success());
    // On to a bigger disk, where other tools find it under its name.
    let moved = tempfile::tempdir().unwrap();
    backlog::copy(&disk.data(), moved.path());
    let data = moved.path();
    let host = Process::start(data, &extra).await.unwrap();
    within(PATIENCE, "nothing is left to do", async || backlog::is_quiet(data)).await;
    assert!(host.terminate().await.success());
    // What was answered 503 may have become a job all the same: it ends as well.
    let found: Vec<_> = backlog::standing(data).await.into_iter().collect();
    assert!(found.iter().all(|(_, (status, _))| *status == Status::Completed));
    let found: Vec<_> = found.into_iter().map(|(id, _)| id).collect();
    assert!(client.accepted.iter().all(|id| found.contains(id)), "an accepted job is gone");
    let jobs = backlog::ended_once(data, found, "disk full").await;
    let lost = jobs.iter().flat_map(|job| &job.llm_calls).filter(|call| call.is_unknown()).count();
    let calls = llm.calls();
    assert!((jobs.len()..=jobs.len() + lost).contains(&calls), "{calls} calls for {} jobs, {lost} lost", jobs.len());
}
