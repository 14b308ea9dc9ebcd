//! The id of a job's trace is in its record and in every line of the log that is about the job.

use std::process::Stdio;

use serde_json::Value;
use shared::embedded::SqliteJobStore;
use shared::ports::JobStore;
use tokio::process::Command;

use crate::support::llm_server::{Behaviour, HONEST, LlmServer, explanation};
use crate::support::process::{Process, binary};
use crate::support::{client, ended, mole, sample, submit};

#[tokio::test(flavor = "multi_thread")]
async fn every_line_about_a_job_carries_its_trace_whatever_is_to_be_logged() {
    for (log_level, least) in [("info", 6), ("warn", 1), ("enrichment=info", 1)] {
        let data = tempfile::tempdir().unwrap();
        let log_file = tempfile::NamedTempFile::new().unwrap();
        // The first answer keeps the job waiting, and sweep marks it again.
        let llm = LlmServer::start([Behaviour::Status(503, Some(3)), Behaviour::Answer(explanation(HONEST))]).await;
        let base_url = llm.base_url();
        let settings = [
            ("LOG_LEVEL", log_level),
            ("LLM_BASE_URL", base_url.as_str()),
            ("LLM_MODEL", "m"),
            ("BACKOFF_SECONDS", "1"),
        ];
        let stderr = Stdio::from(log_file.reopen().unwrap());
        let host = Process::start_as(Command::new(binary("local")), stderr, data.path(), &settings).await.unwrap();
        let http = client();
        let mut ids = Vec::new();
        for photo in [mole(), sample("blurred.png"), sample("not-a-lesion.png")] {
            let id = submit(&http, &host.url, &photo, None).await.unwrap();
            ended(&http, &host.url, &id).await;
            ids.push(id);
        }
        let deleted = http.delete(format!("{}/result/{}", host.url, ids[2])).send().await.unwrap();
        assert_eq!(deleted.status().as_u16(), 204);
        // Said of the tombstone.
        assert_eq!(http.get(format!("{}/result/{}", host.url, ids[2])).send().await.unwrap().status().as_u16(), 404);
        assert!(host.terminate().await.success());

        let store = SqliteJobStore::open(&data.path().join("jobs.sqlite")).unwrap();
        let log = std::fs::read_to_string(log_file.path()).unwrap();
        let mut traces = Vec::new();
        for id in &ids {
            let record = store.get(id.parse().unwrap()).await.unwrap().unwrap();
            let trace = serde_json::to_value(&record).unwrap()["trace_id"].as_str().unwrap().to_owned();
            assert!(trace.len() > 16 && !traces.contains(&trace), "{trace}");
            let lines: Vec<Value> = log
                .lines()
                .filter(|line| line.contains(id.as_str()))
                .map(|line| serde_json::from_str(line).unwrap())
                .collect();
            for line in &lines {
                assert_eq!(
                    (&line["span"]["trace.id"], &line["span"]["job.id"]),
                    (&trace.as_str().into(), &id.as_str().into()),
                    "{line}"
                );
            }
            if id == &ids[0] {
                assert!(lines.len() >= least, "{log_level}: {lines:#?}");
                let crates: Vec<_> = lines.iter().map(|line| line["target"].as_str().unwrap()).collect();
                let needed: &[&str] = match log_level {
                    "info" => &["shared::http", "inference", "enrichment", "sweep"],
                    "warn" => &["sweep"],
                    _ => &["enrichment"],
                };
                assert!(needed.iter().all(|needed| crates.contains(needed)), "{log_level}: {crates:?}");
            }
            traces.push(trace);
        }
    }
}
