//! Measures the OpenAI-compatible proxy: the release binary beside a bare nginx and LiteLLM, all in
//! front of the same model server, with the same clients, in turns within each round.
//!
//! `scripts/bench proxy` builds the binary, installs the others and calls this. Ends with 0 whatever
//! the figures are. Clients and model server run on the same processors as what is measured, so the
//! processor time that each server takes by itself is printed beside the requests per second.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod load;
mod servers;
#[path = "../../pipeline/support/mod.rs"]
#[allow(dead_code, reason = "the pipeline's tests need the rest of it")]
mod support;
mod upstream;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use load::{Seen, Work};
use servers::{Server, Servers};

const ADDED_P99_MS: f64 = 1.0;
const TIMES_LITELLM: f64 = 20.0;
const TIMES_OF_NGINX: f64 = 1.5;

const CLIENTS: [usize; 3] = [1, 32, 256];
const WORKS: [(Work, &str, &[usize]); 4] = [
    (Work::Paced, "streams of 20 pieces, one every 50 ms", &CLIENTS),
    (Work::Plain, "whole answers, as fast as they come", &CLIENTS),
    (Work::Burst, "streams of 20 pieces, as fast as they come", &CLIENTS),
    (Work::Picture, "whole answers to a picture of 2 MB, as fast as they come", &[1, 32]),
];

/// One server under one load, by round.
#[derive(Default)]
struct Series(Vec<Figures>);

/// Of one round. Times in milliseconds.
struct Figures {
    per_second: f64,
    /// Processor time of the server for each request.
    processor: f64,
    first: Percentiles,
    delay: Percentiles,
    whole: Percentiles,
    failed: usize,
}

#[derive(Clone, Copy)]
struct Percentiles {
    p50: f64,
    p99: f64,
}

impl Percentiles {
    /// No numbers where nothing was answered: the table then says so, and the other servers are still measured.
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let last = values.len().saturating_sub(1) as f64;
        let at = |share: f64| values.get((last * share).round() as usize).copied().unwrap_or(f64::NAN);
        Self { p50: at(0.5), p99: at(0.99) }
    }
}

impl Series {
    fn median(&self, of: impl Fn(&Figures) -> f64) -> f64 {
        let mut values: Vec<f64> = self.0.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }
}

fn main() {
    // The clients are many; the host that is measured has a runtime of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["upstream"] => runtime.block_on(upstream::serve()),
        arguments => runtime.block_on(measure(arguments.contains(&"--quick"))),
    }
}

async fn measure(quick: bool) {
    support::client();
    let (rounds, time) = if quick { (1, Duration::from_secs(2)) } else { (3, Duration::from_secs(4)) };
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let servers = Servers::start(scratch.path()).await;
    let mut all: BTreeMap<(usize, usize, usize), Series> = BTreeMap::new();
    for round in 0..rounds {
        for (work_at, (work, name, clients)) in WORKS.iter().enumerate() {
            eprintln!("round {} of {rounds}: {name}", round + 1);
            for (clients_at, clients) in clients.iter().enumerate() {
                for (server_at, server) in servers.all.iter().enumerate() {
                    let figures = figures(server, *work, *clients, time).await;
                    all.entry((work_at, clients_at, server_at)).or_default().0.push(figures);
                }
            }
        }
    }
    print(&servers, &all);
}

async fn figures(server: &Server, work: Work, clients: usize, time: Duration) -> Figures {
    let (started, processor) = (Instant::now(), server.processor_ms());
    let Seen { first, delays, whole, failed } = load::run(server, work, clients, time).await;
    let requests = whole.len() as f64;
    Figures {
        per_second: requests / started.elapsed().as_secs_f64(),
        processor: (server.processor_ms() - processor) / (requests + clients as f64),
        first: Percentiles::of(first),
        delay: Percentiles::of(delays),
        whole: Percentiles::of(whole),
        failed,
    }
}

fn print(servers: &Servers, all: &BTreeMap<(usize, usize, usize), Series>) {
    println!("\nMedians of the rounds; milliseconds. \"+\" is what came on top of asking the model server directly.");
    for (work_at, (_, name, clients)) in WORKS.iter().enumerate() {
        println!("\n{name}");
        println!(
            "{:>8} {:>8} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>6}",
            "clients",
            "server",
            "requests/s",
            "cpu ms",
            "first+50",
            "first+99",
            "piece+50",
            "piece+99",
            "whole 50",
            "whole 99",
            "failed"
        );
        for (clients_at, clients) in clients.iter().enumerate() {
            let direct = &all[&(work_at, clients_at, 0)];
            for (server_at, server) in servers.all.iter().enumerate() {
                let series = &all[&(work_at, clients_at, server_at)];
                let added = |of: fn(&Figures) -> f64| series.median(of) - direct.median(of);
                println!(
                    "{clients:>8} {:>8} {:>10.1} {:>10.3} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>6}",
                    server.name,
                    series.median(|figures| figures.per_second),
                    series.median(|figures| figures.processor),
                    added(|figures| figures.first.p50),
                    added(|figures| figures.first.p99),
                    added(|figures| figures.delay.p50),
                    added(|figures| figures.delay.p99),
                    series.median(|figures| figures.whole.p50),
                    series.median(|figures| figures.whole.p99),
                    series.0.iter().map(|figures| figures.failed).sum::<usize>(),
                );
            }
        }
    }
    println!("\npeak memory");
    for server in &servers.all[1..] {
        println!("{:>8} {:>7.0} MB", server.name, server.peak_mb());
    }
    targets(servers, all);
}

fn targets(servers: &Servers, all: &BTreeMap<(usize, usize, usize), Series>) {
    let at = |name: &str| servers.all.iter().position(|server| server.name == name);
    let lesion = at("lesion").expect("the host is always there");
    println!();
    for (work_at, (work, name, clients)) in WORKS.iter().enumerate() {
        for (clients_at, clients) in clients.iter().enumerate() {
            let series = |server: usize| &all[&(work_at, clients_at, server)];
            let per_second = |server: usize| series(server).median(|figures| figures.per_second);
            let told = format!("{clients} clients, {name}");
            if let Some(nginx) = at("nginx") {
                if *work == Work::Paced {
                    let beyond = |of: fn(&Figures) -> f64| series(lesion).median(of) - series(nginx).median(of);
                    let (first, piece) = (beyond(|figures| figures.first.p99), beyond(|figures| figures.delay.p99));
                    let reached = first < ADDED_P99_MS && piece < ADDED_P99_MS;
                    say(
                        reached,
                        &format!(
                            "{told}: p99 {first:.2} ms (first piece) and {piece:.2} ms (each piece) beyond nginx, below {ADDED_P99_MS}"
                        ),
                    );
                } else {
                    let times = per_second(nginx) / per_second(lesion);
                    say(
                        times <= TIMES_OF_NGINX,
                        &format!("{told}: nginx relays {times:.2} times as many, at most {TIMES_OF_NGINX}"),
                    );
                }
            }
            if let Some(litellm) = at("LiteLLM").filter(|_| *work != Work::Paced) {
                let times = per_second(lesion) / per_second(litellm);
                say(
                    times >= TIMES_LITELLM,
                    &format!("{told}: {times:.1} times as many as LiteLLM, at least {TIMES_LITELLM}"),
                );
            }
        }
    }
}

fn say(reached: bool, what: &str) {
    println!("{} {what}", if reached { "reached:    " } else { "NOT REACHED:" });
}
