//! Photos to measure with: as many distinct ones as are asked for, as JPEG.

use std::io::Cursor;

use image::codecs::jpeg::JpegEncoder;
use image::imageops::FilterType;

use crate::support::{real_photos, sample};

/// Pixels of a photo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// 200×150, as the real photos are.
    Small,
    /// The same enlarged to 4000×3000.
    Large,
    /// The same enlarged to 8160×6120, nearly the most that is taken.
    Huge,
}

/// Encoded photos that many distinct ones are made of.
pub struct Photos {
    bases: Vec<Vec<u8>>,
    pub source: &'static str,
}

impl Photos {
    /// At most `count` photos, spread over all there are.
    pub fn load(size: Size, count: usize) -> Self {
        let real = real_photos();
        let (originals, source): (Vec<_>, _) = if real.is_empty() {
            let drawn = ["mole-drawn.png", "hairy-mole-drawn.png", "red-spot-drawn.png"];
            (drawn.map(sample).map(|png| encode(&png, 200, 150)).to_vec(), "model/samples (drawn)")
        } else {
            let every = real.len().div_ceil(count);
            let read = real.iter().step_by(every).map(|photo| std::fs::read(photo).unwrap());
            (read.collect(), "HAM10000")
        };
        let bases = match size {
            Size::Small => originals,
            Size::Large => originals.iter().map(|photo| encode(photo, 4000, 3000)).collect(),
            Size::Huge => originals.iter().map(|photo| encode(photo, 8160, 6120)).collect(),
        };
        Self { bases, source }
    }

    pub fn mean_kb(&self) -> f64 {
        self.bases.iter().map(Vec::len).sum::<usize>() as f64 / self.bases.len() as f64 / 1e3
    }

    /// The `n`th photo. Every one is another to the prediction cache, which would spare its run:
    /// those that repeat a base get other values in the last steps of their first quantisation
    /// table, which costs a decoder nothing and changes hardly a pixel.
    pub fn nth(&self, n: usize) -> Vec<u8> {
        let mut photo = self.bases[n % self.bases.len()].clone();
        let table = photo.windows(2).position(|pair| pair == [0xFF, 0xDB]).unwrap() + 5;
        let steps = photo[table + 48..table + 64].iter_mut();
        for (bit, step) in steps.enumerate().filter(|(bit, _)| (n / self.bases.len()) >> bit & 1 == 1) {
            *step = if *step == u8::MAX { *step - 1 } else { *step + 1 };
            assert!(bit < 16);
        }
        photo
    }
}

fn encode(photo: &[u8], width: u32, height: u32) -> Vec<u8> {
    let picture = image::load_from_memory(photo).unwrap().resize_exact(width, height, FilterType::CatmullRom);
    let mut encoded = Cursor::new(Vec::new());
    JpegEncoder::new_with_quality(&mut encoded, 85).encode_image(&picture.into_rgb8()).unwrap();
    encoded.into_inner()
}
