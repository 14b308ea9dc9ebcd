//! How much memory a test takes: measured in a process of its own, where no other test takes any.

use std::process::{Command, Output};

use shared::config::Env;

use super::process::own_binary;

pub const MIB: u64 = 1024 * 1024;

/// `None` in a process that runs the test `name` and nothing else. Elsewhere runs the test again in
/// such a process and hands on its verdict; what it printed is returned.
pub fn alone(name: &str) -> Option<Output> {
    if Env::of_process().text("TEST_ALONE").unwrap() == Some(name) {
        return None;
    }
    let arguments = ["--exact", name, "--nocapture", "--test-threads=1"];
    let output = Command::new(own_binary()).args(arguments).env("TEST_ALONE", name).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    println!("{printed}");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(printed.contains("1 passed"), "no test has the name {name}");
    Some(output)
}

/// `true` in a process that runs the test `name` and nothing else; elsewhere that process has run
/// and there is nothing left to do.
pub fn is_alone(name: &str) -> bool {
    alone(name).is_none()
}

/// A process's peak of resident memory (`VmHWM`), in bytes.
pub fn peak(process: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// By how many bytes the work lifts this process's peak above what it held before.
pub fn peak_of(work: impl FnOnce()) -> u64 {
    // proc(5): 5 sets the peak back to what is held now.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = peak("self");
    work();
    peak("self") - before
}
