//! What the host asks of the system, seen by strace: it connects to nothing but the LLM that it was
//! given, and writes nothing outside `DATA_DIR` and the temporary directory.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;
use shared::config::Env;
use tokio::process::Command;

use crate::support::llm_server::LlmServer;
use crate::support::process::{Process, binary};
use crate::support::{client, ended, eventually, mole, sample, submit};

/// Calls that change what they name. `open` and `openat` are judged by their flags.
const CHANGES: &[&str] = &[
    "creat",
    "mkdir",
    "mkdirat",
    "mknod",
    "mknodat",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "unlink",
    "unlinkat",
    "rmdir",
    "truncate",
    "chmod",
    "fchmodat",
    "fchmodat2",
    "chown",
    "lchown",
    "fchownat",
    "utime",
    "utimes",
    "utimensat",
    "futimesat",
    "setxattr",
    "lsetxattr",
    "removexattr",
];
/// Threads and standard streams write here; nothing is kept.
const HARMLESS: &[&str] = &["/dev/null", "/dev/tty", "/proc/self/", "/proc/thread-self/"];

/// What a run may do.
struct Allowed<'a> {
    /// Folders to write below.
    folders: &'a [&'a Path],
    /// Whom to connect to, as strace prints it: a port of this machine.
    port: Option<u16>,
    /// A folder that may not even be looked at.
    home: &'a Path,
}

/// Lines of a trace that a run may not have.
fn forbidden(trace: &str, allowed: &Allowed<'_>) -> Vec<String> {
    let is_forbidden = |line: &&str| {
        let Some((call, arguments)) = call(line) else { return false };
        let paths = paths(arguments);
        let opens_to_write = ["open", "openat", "openat2"].contains(&call)
            && ["O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND", "O_TMPFILE"]
                .iter()
                .any(|flag| arguments.contains(flag));
        let may_write = |path: &PathBuf| {
            allowed.folders.iter().any(|folder| path.starts_with(folder))
                || HARMLESS.iter().any(|harmless| path.to_string_lossy().starts_with(harmless))
        };
        let is_outside =
            (opens_to_write || CHANGES.contains(&call)) && (paths.is_empty() || !paths.iter().all(may_write));
        let reaches_out =
            ["connect", "sendto", "sendmsg", "sendmmsg"].contains(&call) && arguments.contains("sa_family=");
        let port = allowed.port.map(|port| format!("sin_port=htons({port}), sin_addr=inet_addr(\"127.0.0.1\")"));
        let is_expected = call == "connect" && port.is_some_and(|port| arguments.contains(&port));
        // Another family than TCP's over IPv4 would be a name service or a watch on the network.
        let is_odd_socket = call == "socket" && !arguments.starts_with("AF_INET, SOCK_STREAM");
        let is_open_to_others = call == "bind" && !arguments.contains("inet_addr(\"127.0.0.1\")");
        is_outside
            || reaches_out && !is_expected
            || is_odd_socket
            || is_open_to_others
            || paths.iter().any(|path| path.starts_with(allowed.home))
    };
    trace.lines().filter(is_forbidden).map(str::to_owned).collect()
}

/// `1234 openat(AT_FDCWD</x>, "y", O_RDONLY) = 3`: the call and what is behind its parenthesis.
/// `None` for signals, exits and the second half of an interrupted line, whose first half has it all.
fn call(line: &str) -> Option<(&str, &str)> {
    let (_, call) = line.split_once(char::is_whitespace)?;
    let (name, arguments) = call.trim_start().split_once('(')?;
    name.bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
        .then_some((name, arguments))
}

/// Every quoted path among the arguments, made absolute by the folder that strace shows before it.
fn paths(arguments: &str) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    let mut parts = arguments.split('"');
    while let (Some(before), Some(path)) = (parts.next(), parts.next()) {
        let folder =
            before.rsplit_once('<').and_then(|(_, rest)| rest.split_once('>')).map_or("/", |(folder, _)| folder);
        paths.push(Path::new(folder).join(path));
    }
    paths
}

/// Whether processes can be traced here. A machine that forbids it cannot run these tests: said
/// aloud, and an error where nobody reads along.
async fn can_trace() -> bool {
    let probe = Command::new("strace").args(["-qq", "-e", "trace=none", "true"]).output().await;
    let why = match probe {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    assert!(Env::of_process().text("CI").unwrap() != Some("true"), "strace cannot be used here: {why}");
    eprintln!("NOT TESTED: strace cannot be used here, so nothing is known of files and connections: {why}");
    false
}

/// Starts, works photos, deletes one, stops; returns the trace of it all.
async fn traced(folder: &Path, settings: &[(&str, &str)]) -> String {
    let file = folder.join("trace");
    let mut strace = Command::new("strace");
    // -D: the host stays our child, and the tracer ends with it. -y: folders behind descriptors.
    strace.args(["-D", "-f", "-y", "-s", "4096", "-e", "trace=%file,%network", "-e", "signal=none", "-o"]);
    strace.arg(&file).arg(binary("local"));
    let (data, temporary, home) = (folder.join("data"), folder.join("tmp"), folder.join("home"));
    for made in [&temporary, &home] {
        std::fs::create_dir(made).unwrap();
    }
    let mut all = vec![("TMPDIR", temporary.to_str().unwrap()), ("HOME", home.to_str().unwrap())];
    all.push(("LEASE_SECONDS", "60"));
    all.extend_from_slice(settings);
    let host = Process::start_as(strace, Stdio::null(), &data, &all).await.expect("strace started the host");
    let pid = host.id();
    for photo in [mole(), sample("blurred.png"), sample("not-a-lesion.png")] {
        let id = submit(&client(), &host.url, &photo, Some("a-key")).await;
        let Ok(id) = id else { continue };
        let result: Value = ended(&client(), &host.url, &id).await;
        assert_ne!(result["status"], "failed", "{result}");
        let gone = client().delete(format!("{}/result/{id}", host.url)).send().await.unwrap();
        assert_eq!(gone.status().as_u16(), 204);
    }
    assert!(host.terminate().await.success());
    let mut trace = String::new();
    eventually("the tracer has written the end", async || {
        trace = std::fs::read_to_string(&file).unwrap();
        trace.lines().any(|line| line.starts_with(&format!("{pid} ")) && line.contains("+++ exited with 0 +++"))
    })
    .await;
    trace
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_connects_to_nothing_but_its_llm_and_writes_only_where_it_may() {
    if !can_trace().await {
        return;
    }
    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let port: u16 = base_url.trim_end_matches("/v1").rsplit(':').next().unwrap().parse().unwrap();
    let online = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("LLM_API_KEY", "sk-test")];
    for (settings, port) in [(&online[..], Some(port)), (&[], None)] {
        let folder = tempfile::tempdir().unwrap();
        let trace = traced(folder.path(), settings).await;
        let (data, temporary, home) =
            (folder.path().join("data"), folder.path().join("tmp"), folder.path().join("home"));
        let allowed = Allowed { folders: &[&data, &temporary], port, home: &home };
        assert_eq!(forbidden(&trace, &allowed), Vec::<String>::new());
        // The trace shows what is forbidden: with less allowed, the same run breaks the rules.
        let without_temporary = forbidden(&trace, &Allowed { folders: &[&data], port, home: &home });
        assert!(without_temporary.iter().any(|line| line.contains("manifest.json")), "{without_temporary:?}");
        let offline = forbidden(&trace, &Allowed { folders: &[&data, &temporary], port: None, home: &home });
        assert_eq!(offline.is_empty(), port.is_none(), "{offline:?}");
    }
    assert!(llm.calls() >= 1);
}

#[test]
fn what_a_run_may_not_do_is_seen_in_a_trace() {
    let allowed =
        Allowed { folders: &[Path::new("/d"), Path::new("/t")], port: Some(4242), home: Path::new("/home/me") };
    let judged = |line: &str| forbidden(line, &allowed).len();
    for line in [
        r#"7 openat(AT_FDCWD</w>, "/d/jobs.sqlite", O_RDWR|O_CREAT|O_CLOEXEC, 0600) = 3</d/jobs.sqlite>"#,
        r#"7 openat(AT_FDCWD</w>, "/etc/ld.so.cache", O_RDONLY|O_CLOEXEC) = 3"#,
        r#"7 openat(AT_FDCWD</t>, "x", O_WRONLY|O_CREAT <unfinished ...>"#,
        r#"7 rename("/d/a", "/d/b") = 0"#,
        r#"7 socket(AF_INET, SOCK_STREAM|SOCK_CLOEXEC, IPPROTO_TCP) = 9"#,
        r#"7 connect(9, {sa_family=AF_INET, sin_port=htons(4242), sin_addr=inet_addr("127.0.0.1")}, 16) = -1 EINPROGRESS"#,
        r#"7 bind(9, {sa_family=AF_INET, sin_port=htons(0), sin_addr=inet_addr("127.0.0.1")}, 16) = 0"#,
        r#"7 sendto(9<socket:[1]>, "POST", 4, MSG_NOSIGNAL, NULL, 0) = 4"#,
        r#"7 <... openat resumed>) = 4"#,
        r#"7 +++ exited with 0 +++"#,
    ] {
        assert_eq!(judged(line), 0, "{line}");
    }
    for line in [
        r#"7 openat(AT_FDCWD</w>, "note", O_WRONLY|O_CREAT, 0600) = 3"#,
        r#"7 openat(AT_FDCWD</w>, "/var/tmp/x", O_RDWR) = -1 ENOENT (No such file or directory)"#,
        r#"7 open("/x", O_RDONLY|O_TRUNC) = 3"#,
        r#"7 mkdir("/dd", 0700) = 0"#,
        r#"7 rename("/d/a", "/elsewhere/a") = 0"#,
        r#"7 unlink("/etc/passwd") = 0"#,
        r#"7 access("/home/me/.netrc", R_OK) = -1 ENOENT"#,
        r#"7 connect(9, {sa_family=AF_INET, sin_port=htons(443), sin_addr=inet_addr("192.0.2.1")}, 16) = 0"#,
        r#"7 connect(9, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("127.0.0.1")}, 16) = 0"#,
        r#"7 connect(9, {sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}, 110) = -1 ENOENT"#,
        r#"7 sendto(9, "x", 1, 0, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("192.0.2.1")}, 16) = 1"#,
        r#"7 socket(AF_NETLINK, SOCK_RAW|SOCK_CLOEXEC, NETLINK_ROUTE) = 9"#,
        r#"7 socket(AF_INET, SOCK_DGRAM|SOCK_CLOEXEC, IPPROTO_IP) = 9"#,
        r#"7 bind(9, {sa_family=AF_INET, sin_port=htons(0), sin_addr=inet_addr("0.0.0.0")}, 16) = 0"#,
    ] {
        assert_eq!(judged(line), 1, "{line}");
    }
}
