//! What stands in front of the model server: nothing, nginx, this project's host, LiteLLM. Each is
//! stopped by its process id.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use reqwest::Client;
use serde_json::{Value, json};

use crate::support::root;

/// Somewhere to send requests.
#[derive(Clone)]
pub struct Server {
    pub name: &'static str,
    pub url: String,
    pub key: String,
    /// Its processes; of the model server itself none counts.
    pub processes: Vec<u32>,
}

/// Everything that was started; dropped, it ends.
pub struct Servers {
    pub all: Vec<Server>,
    children: Vec<Child>,
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.children {
            let pid = rustix::process::Pid::from_child(child);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        for child in &mut self.children {
            let _ = child.wait();
        }
    }
}

impl Servers {
    /// Starts all of them. LiteLLM and nginx are left out, with a word, where they are not installed.
    pub async fn start(scratch: &Path) -> Self {
        let mut servers = Self { all: Vec::new(), children: Vec::new() };
        let upstream = servers.first_line(Command::new(std::env::current_exe().unwrap()).arg("upstream"));
        let upstream = format!("http://{upstream}");
        servers.all.push(Server { name: "direct", url: upstream.clone(), key: "none".into(), processes: Vec::new() });
        if Command::new("nginx").arg("-v").stderr(Stdio::null()).status().is_ok() {
            servers.nginx(scratch, &upstream).await;
        } else {
            eprintln!("nginx is not installed; left out");
        }
        servers.host(scratch, &upstream).await;
        servers.litellm(scratch, &upstream).await;
        servers
    }

    fn spawn(&mut self, command: &mut Command) -> u32 {
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let id = child.id();
        self.children.push(child);
        id
    }

    /// Starts a process that prints a line when it is ready.
    fn first_line(&mut self, command: &mut Command) -> String {
        self.spawn(command.stdout(Stdio::piped()));
        let child = self.children.last_mut().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        // It may have more to say.
        child.stdout = Some(output.into_inner());
        line.trim().to_owned()
    }

    async fn nginx(&mut self, scratch: &Path, upstream: &str) {
        let port = free_port();
        let folder = scratch.join("nginx");
        std::fs::create_dir_all(&folder).unwrap();
        let at = folder.display();
        // As its documentation has it for a proxy that keeps connections and streams.
        let settings = format!(
            "daemon off; worker_processes auto; pid {at}/pid; error_log {at}/log warn;
            events {{ worker_connections 4096; }}
            http {{
                access_log off; client_max_body_size 10m; client_body_buffer_size 4m; keepalive_requests 1000000;
                client_body_temp_path {at}/body; proxy_temp_path {at}/proxy; fastcgi_temp_path {at}/fastcgi;
                uwsgi_temp_path {at}/uwsgi; scgi_temp_path {at}/scgi;
                upstream model {{ server {host}; keepalive 512; keepalive_requests 1000000; }}
                server {{
                    listen 127.0.0.1:{port};
                    location / {{
                        proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection \"\";
                        proxy_buffering off;
                    }}
                }}
            }}",
            host = upstream.trim_start_matches("http://"),
        );
        std::fs::write(folder.join("nginx.conf"), settings).unwrap();
        let id = self.spawn(Command::new("nginx").arg("-p").arg(&folder).arg("-c").arg(folder.join("nginx.conf")));
        let url = format!("http://127.0.0.1:{port}");
        wait_for(&url).await;
        let processes = children(id);
        self.all.push(Server { name: "nginx", url, key: "none".into(), processes });
    }

    async fn host(&mut self, scratch: &Path, upstream: &str) {
        let models = scratch.join("models.json");
        let model = json!({"base_url": format!("{upstream}/v1"), "prompt_usd_per_million": 1, "completion_usd_per_million": 10});
        std::fs::write(&models, json!({"models": {"at-once": model, "paced": model}}).to_string()).unwrap();
        let program = root().join("target/release/local");
        let command = |argument: &str| {
            let mut command = Command::new(&program);
            command
                .arg(argument)
                .env("DATA_DIR", scratch.join("data"))
                .env("LISTEN_ADDR", "127.0.0.1:0")
                .env("MODEL_DIR", root().join("model"))
                .env("LLM_MODELS_FILE", &models)
                .env("REQUESTS_PER_MINUTE", "1000000")
                .env("LOG_LEVEL", "warn");
            command
        };
        let made = command("init").output().unwrap();
        let admin = String::from_utf8(made.stdout).unwrap();
        let line = self.first_line(&mut command("serve"));
        let url = line.split_whitespace().last().expect("the host has not started").to_owned();
        let answer = Client::new()
            .post(format!("{url}/admin/keys"))
            .bearer_auth(admin.trim())
            // A budget as well: it is kept in the same account as the rest.
            .json(&json!({"caller": "bench", "budget_usd_per_month": 100_000}))
            .send()
            .await
            .unwrap();
        let key: Value = answer.json().await.unwrap();
        let id = self.children.last().map(Child::id).unwrap();
        let key = key["key"].as_str().expect("no key was made").to_owned();
        self.all.push(Server { name: "lesion", url, key, processes: vec![id] });
    }

    async fn litellm(&mut self, scratch: &Path, upstream: &str) {
        let installed = Command::new(root().join("scripts/litellm")).output().unwrap();
        let program = Path::new(std::str::from_utf8(&installed.stdout).unwrap().trim()).join("litellm");
        let port = free_port();
        let key = format!("sk-{}", uuid::Uuid::new_v4().simple());
        let model = |name: &str| json!({"model_name": name, "litellm_params": {"model": format!("openai/{name}"), "api_base": format!("{upstream}/v1"), "api_key": "none"}});
        // JSON is YAML.
        let settings =
            json!({"model_list": [model("at-once"), model("paced")], "litellm_settings": {"telemetry": false}});
        let path = scratch.join("litellm.yaml");
        std::fs::write(&path, settings.to_string()).unwrap();
        let log = std::fs::File::create(scratch.join("litellm.log")).unwrap();
        let id = self.spawn(
            Command::new(program)
                .args(["--config", path.to_str().unwrap(), "--host", "127.0.0.1", "--port", &port.to_string()])
                .env("LITELLM_MASTER_KEY", &key)
                .env("LITELLM_LOG", "ERROR")
                .stdout(log.try_clone().unwrap())
                .stderr(log),
        );
        let url = format!("http://127.0.0.1:{port}");
        wait_for(&format!("{url}/health/liveliness")).await;
        let processes = [vec![id], children(id)].concat();
        self.all.push(Server { name: "LiteLLM", url, key, processes });
    }
}

impl Server {
    /// User and system time of its processes so far, in milliseconds (proc(5)).
    pub fn processor_ms(&self) -> f64 {
        let ticks = |process: &u32| -> f64 {
            let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
            let fields = stat.rsplit(") ").next().unwrap().split(' ');
            fields.skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap() * 10.0).sum()
        };
        self.processes.iter().map(ticks).sum()
    }

    /// The greatest resident memory of its processes, added up, in MB.
    pub fn peak_mb(&self) -> f64 {
        let peak = |process: &u32| {
            let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0 / 1e6
        };
        self.processes.iter().map(peak).sum()
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn children(parent: u32) -> Vec<u32> {
    let found = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    found.split_whitespace().map(|id| id.parse().unwrap()).collect()
}

async fn wait_for(url: &str) {
    for _ in 0..600 {
        if reqwest::get(url).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    panic!("{url} does not answer");
}
