//! Measures the embedded pipeline: the release binary as a process, on a fresh data folder on a
//! real disk, against what decoding and the network alone reach on as many threads.
//!
//! `scripts/bench` builds the binary and calls this. Prints one table and a line for each target;
//! ends with 0 whatever the figures are. Baseline and pipeline take turns within each round, since
//! the machine may be shared; every figure is the median of its rounds. Photos are read by the
//! shipped demonstration network, and by the reference classifier where it lies beside the repository.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod baseline;
mod host;
mod photos;
#[path = "../../pipeline/support/mod.rs"]
#[allow(dead_code, reason = "the pipeline's tests need the rest of it")]
mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use host::{Drain, Latency, drain, fill, median, submit_latency};
use photos::{Photos, Size};
use support::reference::Reference;

const SHARE_OF_BASELINE: f64 = 0.8;
const FLAT_WITHIN: f64 = 0.1;
const LATENCY_GROWTH: f64 = 1.2;
const MEMORY_MB: f64 = 150.0;

/// How much is measured.
struct Extent {
    rounds: usize,
    /// Drains of the small queues on either side of the full one in each round: they are short, so that chance weighs
    /// more, and the machine is not the same from minute to minute.
    short_drains: usize,
    /// Jobs of the full queue.
    full: usize,
    large: usize,
    huge: usize,
    submits: usize,
}

const WHOLE: Extent = Extent { rounds: 3, short_drains: 3, full: 10_000, large: 100, huge: 6, submits: 300 };
const QUICK: Extent = Extent { rounds: 1, short_drains: 3, full: 2_000, large: 12, huge: 2, submits: 100 };

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["baseline", folder, model, threads] => {
            baseline::run(Path::new(folder), Path::new(model), threads.parse().unwrap());
        }
        arguments => measure(if arguments.contains(&"--quick") { &QUICK } else { &WHOLE }).await,
    }
}

/// What decoding and the network alone reach.
#[derive(Clone, Copy)]
struct Baseline {
    per_second: f64,
    processor_ms: f64,
}

/// All drains of one queue, and the baselines beside them.
#[derive(Default)]
struct Series {
    name: String,
    baselines: Vec<Baseline>,
    drains: Vec<Drain>,
}

impl Series {
    fn per_second(&self) -> f64 {
        median(self.drains.iter().map(|drain| drain.per_second))
    }

    /// The median of the rounds' ratios, not the ratio of medians: a round shares its weather.
    fn share(&self) -> f64 {
        median(self.drains.iter().zip(&self.baselines).map(|(drain, baseline)| drain.per_second / baseline.per_second))
    }

    fn peak_mb(&self) -> f64 {
        self.drains.iter().map(|drain| drain.peak_mb).fold(0.0, f64::max)
    }

    async fn drain(&mut self, queue: &Path, model: &Path) {
        self.drains.push(drain(queue, model).await);
    }

    /// A drain between two baselines: what else the machine does falls on all.
    async fn compare(&mut self, queue: &Path, photos: &Path, model: &Path, threads: usize) {
        let before = baseline(photos, model, threads);
        self.drain(queue, model).await;
        let after = baseline(photos, model, threads);
        let mean = |of: fn(&Baseline) -> f64| f64::midpoint(of(&before), of(&after));
        self.baselines.push(Baseline {
            per_second: mean(|baseline| baseline.per_second),
            processor_ms: mean(|baseline| baseline.processor_ms),
        });
    }
}

async fn measure(extent: &Extent) {
    let threads = std::thread::available_parallelism().unwrap().get().min(8);
    let small = Photos::load(Size::Small, extent.full);
    let large = Photos::load(Size::Large, extent.large / 5);
    let huge = Photos::load(Size::Huge, 1);
    print_machine(&small, &large, threads);

    let demonstration = support::root().join("model");
    // A network of the size that is used; the demonstration's takes about a millisecond.
    let reference = Reference::read().map(|reference| {
        let folder = host::scratch();
        reference.write(folder.path());
        folder
    });
    let small_folder = files(&small, extent.full.min(4000));
    let large_folder = files(&large, extent.large);
    let one = fill(&small, 1, true).await;
    let hundred = fill(&small, 100, true).await;
    let full = fill(&small, extent.full, true).await;
    let fifth = fill(&small, extent.full / 5, true).await;
    let undescribed = fill(&small, extent.full / 5, false).await;
    let large_queue = fill(&large, extent.large, true).await;
    let huge_queue = fill(&huge, extent.huge, true).await;

    let names = ["1", "100", &extent.full.to_string(), "no text", "reference", "12 MP", "50 MP"];
    let mut series = names.map(|name| Series { name: name.to_owned(), ..Series::default() });
    let (mut idle, mut busy) = (Vec::new(), Vec::new());
    for round in 0..extent.rounds {
        eprintln!("round {} of {}", round + 1, extent.rounds);
        let [on_one, on_hundred, on_full, on_undescribed, on_reference, on_large, on_huge] = &mut series;
        for side in 0..2 {
            for _ in 0..extent.short_drains {
                on_one.drain(one.path(), &demonstration).await;
                on_hundred.drain(hundred.path(), &demonstration).await;
            }
            if side == 0 {
                on_full.compare(full.path(), small_folder.path(), &demonstration, threads).await;
            }
        }
        on_undescribed.compare(undescribed.path(), small_folder.path(), &demonstration, threads).await;
        if let Some(reference) = &reference {
            on_reference.compare(fifth.path(), small_folder.path(), reference.path(), threads).await;
        }
        on_large.compare(large_queue.path(), large_folder.path(), &demonstration, threads).await;
        on_huge.drain(huge_queue.path(), &demonstration).await;
        let first = extent.full * (round + 1);
        idle.push(submit_latency(None, &small, first, extent.submits).await);
        busy.push(submit_latency(Some(full.path()), &small, first, extent.submits).await);
    }
    print_table(&series);
    let millis = |latencies: &[Latency]| latencies.iter().map(|latency| latency.millis).collect::<Vec<_>>();
    let (idle, busy) = (millis(&idle), millis(&busy));
    print_latency(extent, &idle, &busy);
    print_targets(extent, &series, median(idle), median(busy));
}

/// The photos as files, for the baseline's process.
fn files(photos: &Photos, count: usize) -> tempfile::TempDir {
    let folder = host::scratch();
    (0..count).for_each(|n| std::fs::write(folder.path().join(format!("{n:06}.jpg")), photos.nth(n)).unwrap());
    folder
}

fn baseline(folder: &Path, model: &Path, threads: usize) -> Baseline {
    let program = std::env::current_exe().unwrap();
    let output =
        Command::new(program).arg("baseline").arg(folder).arg(model).arg(threads.to_string()).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let figures: Vec<f64> = printed.split_whitespace().map(|figure| figure.parse().unwrap()).collect();
    Baseline { per_second: figures[0], processor_ms: figures[1] }
}

fn print_machine(small: &Photos, large: &Photos, threads: usize) {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let model = cpus.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
    let library = support::ort_library();
    println!("machine   {threads} threads, {}", model.unwrap_or("unknown processor"));
    println!("library   {}", library.file_name().unwrap().display());
    println!(
        "photos    {}: 200x150 of {:.1} kB, enlarged to 4000x3000 of {:.0} kB (means)",
        small.source,
        small.mean_kb(),
        large.mean_kb()
    );
    println!("host      target/release/local, {threads} workers, described by template, 200x150 unless said otherwise");
}

fn print_table(series: &[Series]) {
    let series: Vec<&Series> = series.iter().filter(|series| !series.drains.is_empty()).collect();
    let row = |name: &str, cell: &dyn Fn(&Series) -> Option<f64>, digits: usize| {
        let cells = series.iter().map(|&series| match cell(series) {
            Some(value) => format!("{value:>10.digits$}"),
            None => format!("{:>10}", "-"),
        });
        println!("{name:<28}{}", cells.collect::<String>());
    };
    println!();
    println!("{:<28}{}", "queued", series.iter().map(|series| format!("{:>10}", series.name)).collect::<String>());
    let over = |series: &Series, value: fn(&Drain) -> f64| Some(median(series.drains.iter().map(value)));
    row("jobs", &|series| Some(series.drains[0].ends.values().sum::<usize>() as f64), 0);
    row("runs", &|series| Some(series.drains.len() as f64), 0);
    row("jobs per second", &|series| Some(series.per_second()), 1);
    let baseline = |series: &Series, value: fn(&Baseline) -> f64| {
        (!series.baselines.is_empty()).then(|| median(series.baselines.iter().map(value)))
    };
    row("decode and network alone", &|series| baseline(series, |alone| alone.per_second), 1);
    row("share of that", &|series| baseline(series, |_| 0.0).map(|_| series.share()), 2);
    row("processor time of a job, ms", &|series| over(series, |drain| drain.processor_ms_per_job), 2);
    row("the same, alone", &|series| baseline(series, |alone| alone.processor_ms), 2);
    let stages: BTreeMap<&String, ()> =
        series.iter().flat_map(|series| series.drains[0].stages.keys()).map(|stage| (stage, ())).collect();
    for stage in stages.into_keys().filter(|stage| !["queued", "total"].contains(&stage.as_str())) {
        let millis = |series: &Series| {
            let found: Vec<f64> = series.drains.iter().filter_map(|drain| drain.stages.get(stage).copied()).collect();
            (!found.is_empty()).then(|| median(found))
        };
        row(&format!("{stage}, ms"), &millis, 1);
    }
    row("writes to a record", &|series| over(series, |drain| drain.writes_per_job), 1);
    row("flushes of the disk, a job", &|series| over(series, |drain| drain.flushes_per_job), 1);
    row("peak memory, MB (worst)", &|series| Some(series.peak_mb()), 0);
    row("memory a second later, MB", &|series| over(series, |drain| drain.after_mb), 0);
    println!();
    for series in series {
        println!("ends, {}: {:?}", series.name, series.drains[0].ends);
    }
}

fn print_latency(extent: &Extent, idle: &[f64], busy: &[f64]) {
    let print = |what: &str, medians: &[f64]| {
        let rounds: Vec<_> = medians.iter().map(|median| format!("{median:.2}")).collect();
        println!(
            "submit latency, {what}: {:.2} ms (medians of rounds: {})",
            median(medians.to_vec()),
            rounds.join(" ")
        );
    };
    println!();
    print("nothing queued", idle);
    print(&format!("{} queued and at work", extent.full), busy);
}

fn print_targets(extent: &Extent, series: &[Series; 7], idle: f64, busy: f64) {
    let [_, hundred, full, _, reference, large, _] = series;
    println!();
    let target = |reached: bool, text: String| println!("{}  {text}", if reached { "reached" } else { "MISSED " });
    let shares = [("200x150, reference network", reference), ("200x150", full), ("12 megapixels", large)];
    for (name, series) in shares.into_iter().filter(|(_, series)| !series.drains.is_empty()) {
        let share = series.share();
        let text = format!("{name}: {share:.2} of decoding and network alone, at least {SHARE_OF_BASELINE}");
        target(share >= SHARE_OF_BASELINE, text);
    }
    let growth = full.per_second() / hundred.per_second() - 1.0;
    let text = format!(
        "from 100 to {} queued: {:+.1} % jobs per second, within {:.0} %",
        extent.full,
        growth * 100.0,
        FLAT_WITHIN * 100.0
    );
    target(growth.abs() <= FLAT_WITHIN, text);
    let times = busy / idle;
    target(
        times <= LATENCY_GROWTH,
        format!(
            "submit latency with {} queued: {times:.2} times that with none, at most {LATENCY_GROWTH}",
            extent.full
        ),
    );
    let peak = full.peak_mb().max(large.peak_mb());
    target(
        peak <= MEMORY_MB,
        format!("peak memory at {} queued and at 12 megapixels: {peak:.0} MB, at most {MEMORY_MB:.0}", extent.full),
    );
}
