//! `local model`: whether a bundle can be used, and the manifest of a new one.
//!
//! Triggered by a person. `check` reads a bundle and writes nothing; `new` reads a network and writes
//! a manifest beside it.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use inference::bundle::{Bundle, MANIFEST, Refused};
use inference::config::ort_library;
use inference::manifest::Manifest;
use inference::model::{Model, graph};
use inference::{draft, picture};
use shared::config::Env;

/// Why golden pictures come out otherwise.
const READ_OTHERWISE: &str = "the host and your own code see another picture or read another score: compare \
    input.resize, scale, mean, std and layout, the order of the labels, outputs.scores.kind and temperature";
/// Runs that the latency is the median of.
const RUNS: usize = 30;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Say whether a bundle can be used: digests, shapes, golden pictures, and how fast it is.
    ///
    /// Ends with 0 where a host would take it, with 1 and what to do where it would not.
    #[command(after_help = "Example:
  local model check model
  MODEL_DIR=model MODEL_DIGEST=<the digest it prints> local serve

ORT_DYLIB_PATH names the ONNX Runtime library; `scripts/onnxruntime` installs it and prints the path.")]
    Check {
        /// The folder with manifest.json and the network.
        folder: PathBuf,
    },
    /// Write a manifest.json beside a network, to be filled in.
    ///
    /// Names, shapes and types are read from the graph. What it cannot tell says FILL IN and what is
    /// wanted there: labels in the order of the scores, how bytes become values, when to abstain, and a
    /// golden picture with what your own code gives for it. No host takes the bundle before that.
    #[command(after_help = "Example:
  local model new mine/model.onnx     writes mine/manifest.json
  $EDITOR mine/manifest.json
  local model check mine")]
    New {
        /// An image classifier with one picture as input, [1,3,H,W] or [1,H,W,3].
        network: PathBuf,
    },
}

pub(crate) fn run(command: Command, env: &Env) -> anyhow::Result<()> {
    let library = ort_library(env)?;
    match command {
        Command::Check { folder } => check(&folder, &library),
        Command::New { network } => new(&network, &library),
    }
}

fn row(what: &str, found: &str) {
    println!("{what:<10} {found}");
}

fn check(folder: &Path, library: &Path) -> anyhow::Result<()> {
    let bundle = Bundle::from_directory(folder, None).map_err(|error| {
        let advice = "correct the field that it names, or run sha256sum on the network and write that into \
                      network.sha256; docs/MODEL.md has all fields";
        wrong("bundle", &error, advice)
    })?;
    let (digest, labels) = (bundle.digest.clone(), bundle.manifest.labels.len());
    row("bundle", &format!("ok      {} {}, {labels} labels", bundle.manifest.name, bundle.manifest.version));
    row(
        "network",
        &format!("ok      {}, {} bytes, SHA-256 as said", bundle.manifest.network.file, bundle.network.len()),
    );

    let started = Instant::now();
    let model = Model::open(bundle, library, 1).map_err(|error| {
        let advice = "names, shapes and types are the graph's; `local model new` on a copy of the network writes them";
        wrong("interface", &error, advice)
    })?;
    let loaded = started.elapsed();
    row("interface", &format!("ok      {}", interface(&model.manifest)));

    let mut problem = None;
    for golden in &model.manifest.golden.pictures {
        let tolerance = model.manifest.golden.tolerance;
        match model.compare(golden) {
            Ok(off) => row("golden", &format!("ok      {}: off by {off:.4}, {tolerance} is allowed", golden.name)),
            Err(error) => problem = Some(wrong("golden", &error, READ_OTHERWISE)),
        }
    }
    if let Some(problem) = problem {
        return Err(problem);
    }
    row("latency", &format!("{:.1} ms a run, {:.0} ms to load, on one thread", run_ms(&model)?, millis(loaded)));
    println!("\nThe bundle can be used. Its digest, for MODEL_DIGEST:\n{digest}");
    Ok(())
}

/// Prints what is wrong; the error says what to do.
fn wrong(what: &str, error: &Refused, advice: &'static str) -> anyhow::Error {
    row(what, &format!("WRONG   {error}"));
    anyhow!(advice)
}

fn interface(manifest: &Manifest) -> String {
    let outputs = &manifest.outputs;
    let others = [("ood", &outputs.ood), ("map", &outputs.map)];
    let others = others.iter().filter(|(_, output)| output.is_some()).map(|(what, _)| format!(", {what}"));
    let shape = manifest.input_shape();
    format!("takes {shape:?}, gives scores{}", others.collect::<String>())
}

/// The median of some runs, on a picture of nothing: any costs the network the same.
fn run_ms(model: &Model) -> anyhow::Result<f64> {
    let tensor = picture::tensor(&image::RgbImage::new(64, 64), &model.manifest.input)?;
    let mut times = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let started = Instant::now();
        model.run(&tensor)?;
        times.push(millis(started.elapsed()));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[RUNS / 2])
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn new(network: &Path, library: &Path) -> anyhow::Result<()> {
    let bytes = std::fs::read(network).with_context(|| network.display().to_string())?;
    let file = network.file_name().and_then(|name| name.to_str()).context("the network has no plain file name")?;
    let graph = graph(&bytes, library)?;
    let manifest = draft::manifest(file, &bytes, &graph)?;
    let path = network.with_file_name(MANIFEST);
    let text = serde_json::to_string_pretty(&manifest)? + "\n";
    match File::create_new(&path).and_then(|mut file| file.write_all(text.as_bytes())) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            bail!("{} is there already; move it away first", path.display())
        }
        written => written.with_context(|| path.display().to_string())?,
    }
    println!("{} is written. To be filled in:", path.display());
    draft::missing(&manifest).iter().for_each(|field| println!("  {field}"));
    println!("Then: local model check {}", path.parent().unwrap_or(Path::new(".")).display());
    Ok(())
}
