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

/// What to do where there is no manifest to read.
const BEGIN: &str = "name a folder that has manifest.json; `local model new` on a network begins one beside it";
/// What to do where the manifest cannot be read, or says of the network's file what is not so.
const CORRECT: &str = "correct the field or line that it names: network.file is a file beside manifest.json, \
    network.size_bytes its size and network.sha256 what sha256sum prints for it; docs/MODEL.md has all fields";
/// What to do where the network does not load, or is another than the manifest describes.
const FIT: &str = "ONNX Runtime must load the network; names, shapes and types are the graph's, with a label for each \
    score: `local model new` on a copy of the network, in a folder of its own, writes them";
/// Why golden pictures come out otherwise.
const READ_OTHERWISE: &str = "png_base64 must be a PNG in base64; where it is, the host and your own code see another \
    picture or read another score: compare input.resize, scale, mean, std and layout, the number and the order of the \
    labels, outputs.scores.kind and temperature";
/// Runs that the latency is the median of.
const RUNS: usize = 30;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Say whether a bundle can be used: digests, shapes, golden pictures, and how fast it is.
    ///
    /// Prints a line for each step as far as the first that is wrong, and then what to do, or the digest to
    /// start a host with.
    #[command(after_help = "Example:
  local model check model
  MODEL_DIR=model MODEL_DIGEST=<the digest it prints> local serve

Exit codes:
  0  a host would take the bundle
  1  it would not, or there is no ONNX Runtime to tell
  2  the command line is wrong

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
  local model check mine

Exit codes:
  0  the manifest is written, and what is to be filled in is printed
  1  nothing is written: the network is no such classifier, a manifest.json is there already,
     or there is no ONNX Runtime to read the network (ORT_DYLIB_PATH, as for check)
  2  the command line is wrong")]
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
        let advice = if folder.join(MANIFEST).is_file() { CORRECT } else { BEGIN };
        wrong("bundle", &error, advice)
    })?;
    let (digest, labels) = (bundle.digest.clone(), bundle.manifest.labels.len());
    row("bundle", &format!("ok      {} {}, {labels} labels", bundle.manifest.name, bundle.manifest.version));
    let network = &bundle.manifest.network;
    row("network", &format!("ok      {}, {} bytes, SHA-256 as said", network.file, network.size_bytes));

    let started = Instant::now();
    let model = Model::open(bundle, library, 1)
        .map_err(|error| if is_setting(&error) { anyhow!(error.0) } else { wrong("interface", &error, FIT) })?;
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
    row(what, &format!("WRONG   {}", error.0));
    anyhow!(advice)
}

/// Whether it is this machine that lacks something and no fault of the network: a setting's error begins with its name.
fn is_setting(error: &Refused) -> bool {
    error.0.starts_with("ORT_DYLIB_PATH")
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
    let graph = graph(&bytes, library)
        .map_err(|error| if is_setting(&error) { anyhow!(error.0) } else { anyhow!("{file}: {}", error.0) })?;
    let manifest = draft::manifest(file, &bytes, &graph).map_err(|error| anyhow!(error.0))?;
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
    // Of a plain file name it is "".
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    println!("Then: local model check {}", folder.display());
    Ok(())
}
