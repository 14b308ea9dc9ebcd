//! Every real photo beside the repository: metadata, the quality gate, and the gate's faults.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use image::RgbImage;
use image::imageops::{self, FilterType};
use inference::manifest::Manifest;
use inference::{gate, picture};
use shared::job::RetakeReason;

use crate::support::{real_photos, root};

/// One way to spoil a photo, at its stated strength, and the code that must catch it.
struct Fault {
    name: &'static str,
    reason: RetakeReason,
    spoil: fn(&RgbImage) -> RgbImage,
}

const FAULTS: &[Fault] = &[
    Fault { name: "blurred, sigma 1.5 px at 200 px", reason: RetakeReason::Blurred, spoil: |p| imageops::blur(p, 1.5) },
    Fault { name: "darkened to 0.3", reason: RetakeReason::TooDark, spoil: |p| scaled(p, 0.3) },
    Fault { name: "over-exposed by 2.0", reason: RetakeReason::TooBright, spoil: |p| scaled(p, 2.0) },
    Fault { name: "shrunk to 1/2", reason: RetakeReason::TooSmall, spoil: halved },
    Fault { name: "contrast cut to 0.15", reason: RetakeReason::LowContrast, spoil: flattened },
];

fn scaled(photo: &RgbImage, factor: f32) -> RgbImage {
    let mut photo = photo.clone();
    photo.iter_mut().for_each(|value| *value = (f32::from(*value) * factor).round().min(255.0) as u8);
    photo
}

fn halved(photo: &RgbImage) -> RgbImage {
    imageops::resize(photo, photo.width() / 2, photo.height() / 2, FilterType::Triangle)
}

fn flattened(photo: &RgbImage) -> RgbImage {
    let mean = photo.iter().map(|value| f64::from(*value)).sum::<f64>() / photo.len() as f64;
    let mut photo = photo.clone();
    photo
        .iter_mut()
        .for_each(|value| *value = (mean + (f64::from(*value) - mean) * 0.15).round().clamp(0.0, 255.0) as u8);
    photo
}

/// Calls `check` with every photo, on all cores.
fn for_each_photo(photos: &[PathBuf], check: impl Fn(&[u8]) + Sync) {
    let cores = std::thread::available_parallelism().unwrap().get();
    std::thread::scope(|scope| {
        for chunk in photos.chunks(photos.len().div_ceil(cores).max(1)) {
            let check = &check;
            scope.spawn(move || chunk.iter().for_each(|photo| check(&std::fs::read(photo).unwrap())));
        }
    });
}

fn side(photo: &RgbImage) -> u32 {
    photo.width().min(photo.height())
}

fn manifest() -> Manifest {
    Manifest::parse(&std::fs::read(root().join("model/manifest.json")).unwrap()).unwrap()
}

#[test]
fn real_photos_pass_the_gate_and_each_fault_is_caught() {
    let photos = real_photos();
    let thresholds = manifest().quality;
    let passed = AtomicUsize::new(0);
    let caught: Vec<_> = FAULTS.iter().map(|_| AtomicUsize::new(0)).collect();
    for_each_photo(&photos, |bytes| {
        let photo = picture::decode(bytes, 1).unwrap();
        passed.fetch_add(usize::from(gate(&photo, side(&photo), &thresholds).unwrap().accepted), Ordering::Relaxed);
        for (fault, caught) in FAULTS.iter().zip(&caught) {
            let spoilt = (fault.spoil)(&photo);
            let quality = gate(&spoilt, side(&spoilt), &thresholds).unwrap();
            caught.fetch_add(usize::from(quality.reasons.contains(&fault.reason)), Ordering::Relaxed);
        }
    });
    if photos.is_empty() {
        return;
    }
    let share = |count: &AtomicUsize| count.load(Ordering::Relaxed) as f64 / photos.len() as f64;
    println!("{} photos, {:.2} % pass", photos.len(), 100.0 * share(&passed));
    assert!(share(&passed) >= 0.99);
    for (fault, caught) in FAULTS.iter().zip(&caught) {
        println!("{}: {:.2} % caught", fault.name, 100.0 * share(caught));
        assert!(share(caught) >= 0.95, "{}", fault.name);
    }
}

#[test]
fn stripping_a_real_photo_changes_no_pixel() {
    let photos = real_photos();
    for_each_photo(&photos, |bytes| {
        let accepted = shared::photo::accept(bytes).unwrap();
        assert!(accepted.bytes.len() <= bytes.len());
        assert_eq!(picture::decode(&accepted.bytes, 1).unwrap(), picture::decode(bytes, 1).unwrap());
    });
    println!("{} photos", photos.len());
}

#[test]
fn the_drawn_samples_stand_in_where_there_are_no_real_photos() {
    let thresholds = manifest().quality;
    let judged = |name: &str| {
        let bytes = std::fs::read(root().join("model/samples").join(name)).unwrap();
        let photo = picture::decode(&bytes, 1).unwrap();
        gate(&photo, side(&photo), &thresholds).unwrap().reasons
    };
    assert_eq!(judged("mole-drawn.png"), []);
    assert_eq!(judged("blurred.png"), [RetakeReason::Blurred]);
    let mole = picture::decode(&std::fs::read(root().join("model/samples/mole-drawn.png")).unwrap(), 1).unwrap();
    for fault in FAULTS.iter().filter(|fault| matches!(fault.reason, RetakeReason::TooDark | RetakeReason::LowContrast))
    {
        let spoilt = (fault.spoil)(&mole);
        let reasons = gate(&spoilt, side(&spoilt), &thresholds).unwrap().reasons;
        assert!(reasons.contains(&fault.reason), "{}", fault.name);
    }
}
