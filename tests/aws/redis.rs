//! The cache of a stage with `cache = "redis"`: a real `redis-server` behind TLS, as ElastiCache
//! Serverless is, with a certificate authority of the test's own.
//!
//! Takes a stage to itself: inference is told of the cache while no other test needs it.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::lambda::Lambda;
use crate::pipeline::User;
use crate::support::{sample, within};

struct Redis {
    child: Child,
    folder: TempDir,
    port: u16,
}

fn run(folder: &Path, command: &str) -> String {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

impl Redis {
    /// On a free port, for whoever knows its authority.
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
        std::fs::write(folder.path().join("names"), "subjectAltName=DNS:localhost").unwrap();
        for command in [
            format!("openssl req -x509 {key} -keyout ca.key -out ca.pem -subj /CN=test -days 2"),
            format!("openssl req {key} -keyout server.key -out server.csr -subj /CN=localhost"),
            "openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.pem"
                .to_owned(),
        ] {
            run(folder.path(), &command);
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let options = format!(
            "--port 0 --tls-port {port} --bind 127.0.0.1 --tls-auth-clients no --tls-ca-cert-file ca.pem \
             --tls-cert-file server.pem --tls-key-file server.key --appendonly no"
        );
        let mut server = Command::new("redis-server");
        server.args(options.split(' ')).args(["--save", ""]).current_dir(folder.path()).stdout(Stdio::null());
        Self { child: server.spawn().expect("redis-server is missing: run scripts/test"), folder, port }
    }

    fn keys(&self) -> usize {
        let asked = format!("redis-cli --tls --cacert ca.pem -h localhost -p {} --raw dbsize", self.port);
        run(self.folder.path(), &asked).trim().parse().unwrap_or(0)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a stage of its own: scripts/package --debug && scripts/emulator --debug"]
async fn outputs_are_kept_in_a_redis_behind_tls_if_its_certificate_is_trusted() {
    let (redis, lambda, user) = (Redis::start(), Lambda::new(), User::new("redis").await);
    let usual = lambda.environment("inference").await;
    let mut told = usual.clone();
    told.insert("CACHE".into(), json!("redis"));
    told.insert("REDIS_URL".into(), json!(format!("rediss://localhost:{}", redis.port)));
    let read = async |photo: &str| -> Value { user.ended(&user.submit("?describe=false", sample(photo)).await).await };

    lambda.set_environment("inference", &told).await;
    assert_eq!(read("mole-drawn.png").await["status"], "completed", "without the cache");
    assert_eq!(redis.keys(), 0, "a server that nobody vouches for is told nothing");

    let authority = redis.folder.path().join("ca.pem");
    told.insert("SSL_CERT_FILE".into(), json!(authority.to_str().unwrap()));
    lambda.set_environment("inference", &told).await;
    let first = read("mole-drawn.png").await;
    within("the outputs are in Redis", async || redis.keys() == 1).await;
    let second = read("mole-drawn.png").await;
    assert!(first["timings_ms"]["inference"].is_number(), "{first}");
    assert!(second["timings_ms"]["inference"].is_null(), "{second}");
    assert_eq!(first["predictions"], second["predictions"]);
    lambda.set_environment("inference", &usual).await;
}
