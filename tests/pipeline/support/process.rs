//! The real `local` binary as a process, to be killed.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use super::{ort_library, root, settings};

/// The binary of these tests.
pub fn own_binary() -> PathBuf {
    std::env::current_exe().unwrap()
}

/// A binary of this build, beside this test's own.
pub fn binary(name: &str) -> PathBuf {
    let path = own_binary().parent().unwrap().parent().unwrap().join(name);
    assert!(path.is_file(), "{} is missing: run scripts/test, or cargo build --workspace first", path.display());
    path
}

/// A running `local`; killed when dropped.
pub struct Process {
    pub url: String,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    /// Ends with the log.
    reader: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts the host on a folder and waits for its address. `None` where it is killed before that, as
    /// it may be at a crash point that the start itself meets.
    pub async fn start(data_dir: &Path, extra: &[(&str, &str)]) -> Option<Self> {
        Self::start_by(Command::new(binary("local")), data_dir, extra).await
    }

    /// As [`Process::start`], by a command that runs the binary.
    pub async fn start_by(command: Command, data_dir: &Path, extra: &[(&str, &str)]) -> Option<Self> {
        Self::start_as(command, Stdio::piped(), data_dir, extra).await
    }

    /// As [`Process::start_by`], with its log where the caller wants it.
    pub async fn start_as(
        mut command: Command,
        stderr: Stdio,
        data_dir: &Path,
        extra: &[(&str, &str)],
    ) -> Option<Self> {
        let (library, model) = (ort_library(), root().join("model"));
        let mut variables = settings(data_dir.to_str().unwrap(), library.to_str().unwrap(), model.to_str().unwrap());
        // Short times, or every kill costs a lease of two minutes.
        variables.extend([
            ("LEASE_SECONDS", "3"),
            ("REDISPATCH_SECONDS", "1"),
            ("BACKOFF_SECONDS", "1"),
            ("LOG_LEVEL", "warn"),
        ]);
        variables.extend_from_slice(extra);
        let mut child = command
            .arg("serve")
            .env_clear()
            .envs(variables)
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let Some(line) = lines.next_line().await.unwrap() else {
            let status = child.wait().await.unwrap();
            assert_eq!(status.signal(), Some(9), "the host did not start: {status}");
            return None;
        };
        // Keeps the pipe open: the host prints some more lines.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let log = Arc::new(Mutex::new(Vec::new()));
        let reader = child.stderr.take().map(|stderr| {
            let (mut written, kept) = (BufReader::new(stderr).lines(), Arc::clone(&log));
            tokio::spawn(async move {
                while let Ok(Some(line)) = written.next_line().await {
                    kept.lock().unwrap().push(line);
                }
            })
        });
        let url = line.strip_prefix("listening on ").unwrap().to_owned();
        Some(Self { url, child, log, reader })
    }

    /// The lines that it has logged so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// What the system knows of the process: a file of `/proc/PID`.
    #[allow(dead_code, reason = "the benchmark reads it, the tests do not")]
    pub fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id().unwrap())).unwrap()
    }

    /// Waits until the process has been killed by SIGKILL.
    pub async fn killed(&mut self) {
        let status = tokio::time::timeout(Duration::from_secs(120), self.child.wait()).await;
        let status = status.expect("the crash point was not met within two minutes").unwrap();
        assert_eq!(status.signal(), Some(9), "{status}");
    }

    /// Kills the process now.
    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }

    /// Kills the process now and returns all that it has logged.
    pub async fn whole_log(mut self) -> String {
        self.child.kill().await.unwrap();
        self.reader.take().unwrap().await.unwrap();
        self.log().join("\n")
    }

    /// Ends the process by SIGTERM and returns its exit status.
    pub async fn terminate(mut self) -> std::process::ExitStatus {
        let pid = rustix::process::Pid::from_raw(self.child.id().unwrap().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().await.unwrap()
    }
}
