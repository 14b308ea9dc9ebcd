//! Clients that ask again as soon as they have their answer.

use std::time::{Duration, Instant};

use axum::body::Bytes;
use futures_util::future::join_all;
use reqwest::Client;

use crate::servers::Server;
use crate::upstream;

/// What the clients ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Work {
    /// A short question, a whole answer.
    Plain,
    /// A stream whose pieces come at once.
    Burst,
    /// A stream whose pieces come at the pace of a model.
    Paced,
    /// A question with a picture of 2 MB, a whole answer.
    Picture,
}

impl Work {
    pub fn body(self) -> String {
        let (stream, content) = match self {
            Self::Plain => ("false", r#""What is a naevus?""#.to_owned()),
            Self::Burst | Self::Paced => ("true", r#""What is a naevus?""#.to_owned()),
            Self::Picture => {
                let picture = "iVBORw0K".repeat(2_000_000 / 8);
                let url = format!(r#"{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{picture}"}}}}"#);
                ("false", format!(r#"[{{"type":"text","text":"What is this?"}},{url}]"#))
            }
        };
        let model = if self == Self::Paced { "paced" } else { "at-once" };
        format!(r#"{{"model":"{model}","stream":{stream},"messages":[{{"role":"user","content":{content}}}]}}"#)
    }

    fn is_stream(self) -> bool {
        matches!(self, Self::Burst | Self::Paced)
    }
}

/// What the clients have seen, in milliseconds.
#[derive(Default)]
pub struct Seen {
    /// From the request to the first content.
    pub first: Vec<f64>,
    /// From the sending of a piece to its arrival.
    pub delays: Vec<f64>,
    /// From the request to the end of the answer.
    pub whole: Vec<f64>,
    /// Requests without an answer, or with half of one.
    pub failed: usize,
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.first.extend(other.first);
        self.delays.extend(other.delays);
        self.whole.extend(other.whole);
        self.failed += other.failed;
    }
}

/// Keeps `clients` requests under way for as long as `time`; the ones that are under way then are waited for.
pub async fn run(server: &Server, work: Work, clients: usize, time: Duration) -> Seen {
    let http = Client::builder().pool_max_idle_per_host(clients).build().unwrap();
    let body = Bytes::from(work.body());
    // Connections are made, caches filled.
    join_all((0..clients).map(|_| ask(&http, server, work, body.clone()))).await;
    let end = Instant::now() + time;
    let tasks: Vec<_> = (0..clients)
        .map(|n| {
            let (http, server, body) = (http.clone(), server.clone(), body.clone());
            tokio::spawn(async move {
                if work == Work::Paced {
                    // Or the pieces of all streams would come at the same moment.
                    tokio::time::sleep(upstream::PACE * u32::try_from(n).unwrap() / u32::try_from(clients).unwrap())
                        .await;
                }
                let mut seen = Seen::default();
                while Instant::now() < end {
                    seen.add(ask(&http, &server, work, body.clone()).await);
                }
                seen
            })
        })
        .collect();
    let mut all = Seen::default();
    for task in tasks {
        all.add(task.await.unwrap());
    }
    all
}

async fn ask(http: &Client, server: &Server, work: Work, body: Bytes) -> Seen {
    let asked = asked(http, server, work, body).await;
    asked.unwrap_or_else(|| Seen { failed: 1, ..Seen::default() })
}

async fn asked(http: &Client, server: &Server, work: Work, body: Bytes) -> Option<Seen> {
    let mut seen = Seen::default();
    let started = Instant::now();
    let request = http.post(format!("{}/v1/chat/completions", server.url)).bearer_auth(&server.key);
    let request = request.header("content-type", "application/json").body(body);
    let mut answer = request.send().await.ok().filter(|answer| answer.status().is_success())?;
    while let Some(chunk) = answer.chunk().await.ok()? {
        let arrived = upstream::now();
        for sent in contents(&chunk) {
            if seen.delays.is_empty() {
                seen.first.push(started.elapsed().as_secs_f64() * 1e3);
            }
            seen.delays.push((arrived - sent) as f64 / 1e6);
        }
    }
    seen.whole.push(started.elapsed().as_secs_f64() * 1e3);
    let expected = if work.is_stream() { upstream::PIECES as usize } else { 1 };
    (seen.delays.len() == expected).then_some(seen)
}

/// The numbers that are the content of events or of an answer.
fn contents(bytes: &[u8]) -> impl Iterator<Item = i64> {
    let text = std::str::from_utf8(bytes).unwrap_or("");
    text.split("\"content\":").skip(1).filter_map(|rest| {
        let digits = rest.trim_start().strip_prefix('"')?;
        digits[..digits.find('"')?].parse().ok()
    })
}
