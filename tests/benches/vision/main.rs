//! The Rust side of `scripts/bench vision`: photos through decoding, the tensor and the network on one
//! thread, a JSON line each. `bench.py` calls it beside its Python twin, and judges.
//!
//! `stages MODEL (reduced|whole)` reads paths of photos from standard input, and ends with the peak of
//! its memory; `cold MODEL PHOTO` loads and reads one photo; `enlarge FOLDER` writes those of standard
//! input as phones would take them. Anything else is the command of `bench.py`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, Cursor};
use std::path::{Path, PathBuf};
use std::process::Command;

use image::codecs::jpeg::JpegEncoder;
use image::imageops::FilterType;
use inference::bundle::Bundle;
use inference::config::ort_library;
use inference::model::{self, Model};
use inference::picture::{self, Picture};
use rustix::time::{ClockId, Timespec, clock_gettime};
use serde_json::json;
use shared::config::Env;

/// Runs on one tensor, whose median is the run without anything beside it.
const RUNS: usize = 60;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["stages", model, decoding] => stages(&load(model), *decoding == "whole"),
        ["cold", model, photo] => {
            let model = load(model);
            let bytes = std::fs::read(photo).unwrap();
            let picture = picture::decode_for(&bytes, 1, &model.manifest.input).unwrap();
            let tensor = picture::tensor(&picture.pixels, &model.manifest.input).unwrap();
            println!("{}", json!(model.calibrate(&model.run(&tensor).unwrap().scores)));
        }
        ["enlarge", folder] => enlarge(Path::new(folder)),
        [program, script, others @ ..] => {
            let own = std::env::current_exe().unwrap();
            let status = Command::new(program).arg(script).arg(own).args(others).status().unwrap();
            assert!(status.success(), "{script}: {status}");
        }
        _ => panic!("scripts/bench vision calls this"),
    }
}

/// As a function does at its start: verified, and tried on its golden pictures.
fn load(folder: &str) -> Model {
    let library = ort_library(&Env::of_process()).unwrap();
    let _starting = model::start(library.clone());
    let bundle = Bundle::from_directory(Path::new(folder), None).unwrap();
    Model::load(bundle, &library, 1).unwrap()
}

fn paths() -> impl Iterator<Item = PathBuf> {
    std::io::stdin().lock().lines().map(|line| line.unwrap().into())
}

fn stages(model: &Model, whole: bool) {
    let input = &model.manifest.input;
    let mut last = None;
    for path in paths() {
        // As submit stores it.
        let shared::photo::Accepted { bytes, orientation, .. } =
            shared::photo::accept(&std::fs::read(&path).unwrap()).unwrap();
        let started = now();
        let picture = match whole {
            true => picture::decode(&bytes, orientation).map(|pixels| Picture { side_px: 0, pixels }),
            false => picture::decode_for(&bytes, orientation, input),
        };
        let pixels = picture.unwrap().pixels;
        let decode = millis(started);
        let started = now();
        let tensor = picture::tensor(&pixels, input).unwrap();
        let resize = millis(started);
        let started = now();
        let probabilities = model.calibrate(&model.run(&tensor).unwrap().scores);
        let run = millis(started);
        let name = path.file_name().unwrap().to_str();
        println!(
            "{}",
            json!({"name": name, "decode": decode, "tensor": resize, "run": run, "probabilities": probabilities})
        );
        last = Some(tensor);
    }
    // Before the runs below, which belong to no photo.
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_mb = peak.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0;
    let tensor = last.unwrap();
    let mut runs: Vec<f64> = (0..RUNS)
        .map(|_| {
            let started = now();
            std::hint::black_box(model.read(&model.run(&tensor).unwrap()));
            millis(started)
        })
        .collect();
    runs.sort_by(f64::total_cmp);
    println!("{}", json!({"peak_mb": peak_mb, "run": runs[RUNS / 2]}));
}

/// Of the processor, for this thread: others may want it too.
fn now() -> Timespec {
    clock_gettime(ClockId::ThreadCPUTime)
}

fn millis(since: Timespec) -> f64 {
    let took = now() - since;
    took.tv_sec as f64 * 1e3 + took.tv_nsec as f64 / 1e6
}

/// To 12 megapixels, as the camera of a phone compresses them.
fn enlarge(folder: &Path) {
    for path in paths() {
        let picture = image::open(&path).unwrap().resize_exact(4000, 3000, FilterType::CatmullRom).into_rgb8();
        let mut encoded = Cursor::new(Vec::new());
        JpegEncoder::new_with_quality(&mut encoded, 85).encode_image(&picture).unwrap();
        std::fs::write(folder.join(path.file_name().unwrap()), encoded.into_inner()).unwrap();
    }
}
