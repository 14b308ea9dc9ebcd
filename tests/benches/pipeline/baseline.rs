//! What decoding and the network alone reach: no checks, no gate, no records, nothing written.
//! Runs in a process of its own, so that nothing of the pipeline warms or burdens it.

use std::io::Cursor;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use image::{DynamicImage, ImageFormat, ImageReader};
use inference::bundle::Bundle;
use inference::model::Model;
use inference::picture;

use crate::host::processor_ms;
use crate::support::ort_library;

/// Prints photos per second of `threads` threads over the files of a folder, and the processor time
/// of each in milliseconds.
pub fn run(folder: &Path, model: &Path, threads: usize) {
    let bundle = Bundle::from_directory(model, None).unwrap();
    let model = Model::load(bundle, &ort_library(), threads).unwrap();
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let photos: Vec<_> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    // Any input costs the network the same.
    let tensor = picture::tensor(&decode(&photos[0]).into_rgb8(), &model.manifest.input).unwrap();
    let next = AtomicUsize::new(0);
    let before = processor_ms(&std::fs::read_to_string("/proc/self/stat").unwrap());
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(photo) = photos.get(next.fetch_add(1, Ordering::Relaxed)) {
                    std::hint::black_box(decode(photo));
                    std::hint::black_box(model.run(&tensor).unwrap());
                }
            });
        }
    });
    let per_second = photos.len() as f64 / started.elapsed().as_secs_f64();
    let processor_ms = processor_ms(&std::fs::read_to_string("/proc/self/stat").unwrap()) - before;
    println!("{per_second} {}", processor_ms / photos.len() as f64);
}

fn decode(photo: &[u8]) -> DynamicImage {
    let reader = ImageReader::with_format(Cursor::new(photo), ImageFormat::Jpeg);
    DynamicImage::from_decoder(reader.into_decoder().unwrap()).unwrap()
}
