//! Promise 6: what the host asks of the system, seen by strace. It connects to those that it was told
//! of and to nobody else, and writes nothing outside `DATA_DIR` and the temporary directory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use chrono::Utc;
use reqwest::header::{AUTHORIZATION, HeaderMap};
use reqwest::{Client, Response};
use serde_json::{Value, json};
use shared::config::Env;
use tokio::process::Command;

use crate::support::issuer::{Issuer, SigningKey};
use crate::support::llm_server::LlmServer;
use crate::support::process::{Process, binary};
use crate::support::receiver::{Receiver, SECRET};
use crate::support::redis_server::Redis;
use crate::support::{client, ended, eventually, mole, sample, submit};
use crate::uploads::{permit, put, submit_key};
use crate::webhooks::submit_told;

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
    /// Whom to connect to, as [`address`] writes it.
    peers: &'a BTreeSet<String>,
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
        let is_expected = call == "connect" && allowed.peers.contains(&address(arguments));
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

/// Everybody that was connected to.
fn connections(trace: &str) -> BTreeSet<String> {
    let connects = trace.lines().filter_map(call).filter(|(call, _)| *call == "connect");
    connects.map(|(_, arguments)| address(arguments)).collect()
}

/// `127.0.0.1:4242`, to which a connect goes; where that is no address of IPv4, all that strace prints.
fn address(arguments: &str) -> String {
    let between = |before: &str, after: &str| Some(arguments.split_once(before)?.1.split_once(after)?.0);
    match (between("sin_port=htons(", ")"), between("sin_addr=inet_addr(\"", "\"")) {
        (Some(port), Some(host)) => format!("{host}:{port}"),
        _ => arguments.to_owned(),
    }
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

/// All that a host can be told of, on loopback.
struct Peers {
    llm: LlmServer,
    receiver: Receiver,
    redis: Redis,
    issuer: Issuer,
    /// A user's, for an hour.
    token: String,
}

impl Peers {
    async fn start() -> Self {
        let key = SigningKey::p256("k");
        let issuer = Issuer::start(&[&key]).await;
        let now = Utc::now().timestamp();
        let claims = json!({"iss": issuer.url(), "sub": "6f1c", "aud": "app", "iat": now, "exp": now + 3600});
        let (llm, receiver) = (LlmServer::start([]).await, Receiver::start(200).await);
        Self { llm, receiver, redis: Redis::start(None), issuer, token: key.token(&claims) }
    }

    fn settings(&self) -> [(&'static str, String); 8] {
        [
            ("LLM_BASE_URL", self.llm.base_url()),
            ("LLM_MODEL", "m".to_owned()),
            ("LLM_API_KEY", "sk-test".to_owned()),
            ("WEBHOOK_HOSTS", self.receiver.host()),
            ("WEBHOOK_SECRET", SECRET.to_owned()),
            ("REDIS_URL", self.redis.url()),
            ("JWT_ISSUER", self.issuer.url()),
            ("JWT_AUDIENCE", "app".to_owned()),
        ]
    }

    /// Where they are, as [`address`] writes it.
    fn addresses(&self) -> BTreeSet<String> {
        let urls = [self.llm.base_url(), self.receiver.url(), self.redis.url(), self.issuer.url()];
        urls.iter().map(|url| url.split('/').nth(2).unwrap().to_owned()).collect()
    }

    /// A client that sends the token.
    fn client(&self) -> Client {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, format!("Bearer {}", self.token).parse().unwrap());
        Client::builder().default_headers(headers).timeout(Duration::from_secs(60)).build().unwrap()
    }
}

/// The id of a job that was accepted.
async fn accepted(answer: reqwest::Result<Response>) -> String {
    let answer = answer.unwrap();
    let (status, body) = (answer.status(), answer.json::<Value>().await.unwrap());
    assert_eq!(status.as_u16(), 202, "{body}");
    body["request_id"].as_str().unwrap().to_owned()
}

/// Waits for the end of a job and deletes it.
async fn ended_and_deleted(http: &Client, url: &str, id: &str) {
    let result = ended(http, url, id).await;
    assert!(["completed", "needs_retake"].contains(&result["status"].as_str().unwrap()), "{result}");
    let gone = http.delete(format!("{url}/result/{id}")).send().await.unwrap();
    assert_eq!(gone.status().as_u16(), 204);
}

/// Photos, one of them uploaded before; with peers as a user of theirs, and then a prompt and a webhook too.
async fn work(url: &str, peers: Option<&Peers>) {
    let http = peers.map_or_else(client, Peers::client);
    for photo in [mole(), sample("blurred.png"), sample("not-a-lesion.png")] {
        let id = submit(&http, url, &photo, Some("a-key")).await.unwrap();
        ended_and_deleted(&http, url, &id).await;
    }
    let permit = permit(&http, url, &mole()).await.unwrap();
    // Its URL is its credential; it takes no other.
    assert_eq!(put(&client(), url, &permit, &mole()).await.unwrap().status().as_u16(), 200);
    let id = accepted(submit_key(&http, url, permit["image_key"].as_str().unwrap()).await).await;
    ended_and_deleted(&http, url, &id).await;
    let Some(peers) = peers else { return };
    let prompt = http.post(format!("{url}/submit")).json(&json!({"prompt": "What is a naevus?"}));
    let id = accepted(prompt.send().await).await;
    ended_and_deleted(&http, url, &id).await;
    let id = submit_told(&http, url, mole(), &peers.receiver.url(), None).await.unwrap();
    // Nobody is told of what was deleted.
    ended(&http, url, &id).await;
    eventually("the end is told", async || !peers.receiver.received().is_empty()).await;
    ended_and_deleted(&http, url, &id).await;
}

/// Starts, works, stops; returns the trace of it all.
async fn traced(folder: &Path, peers: Option<&Peers>) -> String {
    let file = folder.join("trace");
    let mut strace = Command::new("strace");
    // -D: the host stays our child, and the tracer ends with it. -y: folders behind descriptors.
    strace.args(["-D", "-f", "-y", "-s", "4096", "-e", "trace=%file,%network", "-e", "signal=none", "-o"]);
    strace.arg(&file).arg(binary("local"));
    let (data, temporary, home) = (folder.join("data"), folder.join("tmp"), folder.join("home"));
    for made in [&temporary, &home] {
        std::fs::create_dir(made).unwrap();
    }
    let settings = peers.map(Peers::settings);
    let mut all = vec![("TMPDIR", temporary.to_str().unwrap()), ("HOME", home.to_str().unwrap())];
    all.push(("LEASE_SECONDS", "60"));
    all.extend(settings.iter().flatten().map(|(name, value)| (*name, value.as_str())));
    let host = Process::start_as(strace, Stdio::null(), &data, &all).await.expect("strace started the host");
    let pid = host.id();
    work(&host.url, peers).await;
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
async fn a_run_connects_to_all_whom_it_was_told_of_and_to_nobody_else_and_writes_only_where_it_may() {
    if !can_trace().await {
        return;
    }
    for told_of in [Some(Peers::start().await), None] {
        let folder = tempfile::tempdir().unwrap();
        let trace = traced(folder.path(), told_of.as_ref()).await;
        let (data, temporary, home) =
            (folder.path().join("data"), folder.path().join("tmp"), folder.path().join("home"));
        let peers = &told_of.as_ref().map(Peers::addresses).unwrap_or_default();
        assert_eq!(&connections(&trace), peers);
        let allowed = Allowed { folders: &[&data, &temporary], peers, home: &home };
        assert_eq!(forbidden(&trace, &allowed), Vec::<String>::new());
        // The trace shows what is forbidden: with less allowed, the same run breaks the rules.
        let without_temporary = forbidden(&trace, &Allowed { folders: &[&data], peers, home: &home });
        assert!(without_temporary.iter().any(|line| line.contains("manifest.json")), "{without_temporary:?}");
        let nobody = &BTreeSet::new();
        let offline = forbidden(&trace, &Allowed { folders: &[&data, &temporary], peers: nobody, home: &home });
        assert_eq!(connections(&offline.join("\n")), *peers);
    }
}

#[test]
fn what_a_run_may_not_do_is_seen_in_a_trace() {
    let peers = &BTreeSet::from(["127.0.0.1:4242".to_owned()]);
    let allowed = Allowed { folders: &[Path::new("/d"), Path::new("/t")], peers, home: Path::new("/home/me") };
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
    let began =
        r#"7 connect(9, {sa_family=AF_INET, sin_port=htons(4242), sin_addr=inet_addr("127.0.0.1")}, 16 <unfinished"#;
    assert_eq!(connections(&format!("7 bind(9)\n{began}")), *peers);
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
        r#"7 connect(9, {sa_family=AF_INET, sin_port=htons(4242), sin_addr=inet_addr("192.0.2.1")}, 16) = 0"#,
        r#"7 connect(9, {sa_family=AF_INET6, sin6_port=htons(4242), inet_pton(AF_INET6, "::1", &sin6_addr)}, 28) = 0"#,
        r#"7 connect(9, {sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}, 110) = -1 ENOENT"#,
        r#"7 sendto(9, "x", 1, 0, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("192.0.2.1")}, 16) = 1"#,
        r#"7 socket(AF_NETLINK, SOCK_RAW|SOCK_CLOEXEC, NETLINK_ROUTE) = 9"#,
        r#"7 socket(AF_INET, SOCK_DGRAM|SOCK_CLOEXEC, IPPROTO_IP) = 9"#,
        r#"7 bind(9, {sa_family=AF_INET, sin_port=htons(0), sin_addr=inet_addr("0.0.0.0")}, 16) = 0"#,
    ] {
        assert_eq!(judged(line), 1, "{line}");
    }
}
