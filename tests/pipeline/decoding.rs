//! What decoding at a quarter changes on real photos, that nothing else is decoded otherwise, and that colours are
//! those that another decoder reads. `scripts/bench vision` looks at all photos, at 12 megapixels, beside Pillow.

use std::io::Cursor;
use std::path::PathBuf;
use std::sync::Mutex;

use image::imageops::FilterType;
use image::metadata::Orientation;
use image::{DynamicImage, ImageBuffer, ImageFormat, Rgb, RgbImage};
use inference::bundle::Bundle;
use inference::manifest::{Input, Manifest};
use inference::model::Model;
use inference::picture;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use shared::photo::Accepted;

use crate::support::{mole, ort_library, real_photos, root};

const SEED: u64 = 20;
/// Of all real photos.
const SAMPLE: usize = 100;
/// Of the smallest phones' photos that are read at a quarter.
const PHONE: (u32, u32) = (2560, 1920);
/// Of all photos, the ones included that get no answer: the network tells one level of noise, so that the first
/// label of a near tie may change.
const SAME_LABEL: f64 = 0.98;
/// How far a probability of the shipped network may move.
const SCORES_WITHIN: f64 = 0.06;
/// The pictures of `tests/fixtures/colours`, and how far their levels may lie from Pillow's, on average and at most.
/// Each decoder rounds its inverse transform in its own way, and the widening of colours stored at half the width.
/// Inks become light as in Pillow: (1 - ink) (1 - black). Sixteen bits become the nearest eight, not the upper eight.
const COLOURS: [(&str, f64, u8); 11] = [
    ("baseline.jpg", 1.0, 8),
    ("progressive.jpg", 1.0, 8),
    ("grey.jpg", 0.25, 4),
    ("rgb.jpg", 0.25, 4),
    ("cmyk.jpg", 0.25, 4),
    ("ycck.jpg", 0.25, 4),
    ("on-its-side.jpg", 0.25, 4),
    ("lossy.webp", 0.25, 4),
    ("palette.png", 0.0, 0),
    ("deep.png", 0.0, 0),
    ("deep-grey.png", 0.0, 0),
];

fn model() -> Model {
    Model::load(Bundle::from_directory(&root().join("model"), None).unwrap(), &ort_library(), 2).unwrap()
}

fn probabilities(model: &Model, picture: &RgbImage) -> Vec<f64> {
    let tensor = picture::tensor(picture, &model.manifest.input).unwrap();
    model.calibrate(&model.run(&tensor).unwrap().scores)
}

/// Through a file: what writes into memory is compiled here, without optimisation.
fn jpeg(picture: impl Into<DynamicImage>) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    picture.into().save_with_format(file.path(), ImageFormat::Jpeg).unwrap();
    std::fs::read(file.path()).unwrap()
}

fn first(probabilities: &[f64]) -> usize {
    (0..probabilities.len()).max_by(|one, other| probabilities[*one].total_cmp(&probabilities[*other])).unwrap()
}

#[test]
fn real_photos_as_large_as_a_phones_are_answered_as_every_pixel_is() {
    let model = model();
    let photos = real_photos();
    if photos.is_empty() {
        return;
    }
    let mut random = SmallRng::seed_from_u64(SEED);
    let sample: Vec<&PathBuf> = (0..SAMPLE).map(|_| &photos[random.random_range(0..photos.len())]).collect();
    let found = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for half in sample.chunks(SAMPLE.div_ceil(2)) {
            let (model, found) = (&model, &found);
            scope.spawn(move || {
                for photo in half {
                    let large = image::open(photo).unwrap().resize_exact(PHONE.0, PHONE.1, FilterType::Triangle);
                    let large = jpeg(large);
                    let whole = probabilities(model, &picture::decode(&large, 1).unwrap());
                    let reduced = picture::decode_for(&large, 1, &model.manifest.input).unwrap().pixels;
                    assert_eq!(reduced.dimensions(), (PHONE.0 / 4, PHONE.1 / 4));
                    let reduced = probabilities(model, &reduced);
                    let off = whole.iter().zip(&reduced).map(|(one, other)| (one - other).abs()).fold(0.0, f64::max);
                    let answered = whole[first(&whole)] >= model.manifest.abstention.min_probability;
                    found.lock().unwrap().push((first(&whole) == first(&reduced), answered, off));
                }
            });
        }
    });
    let found = found.into_inner().unwrap();
    let same = found.iter().filter(|(same, ..)| *same).count() as f64 / found.len() as f64;
    let answered = found.iter().filter(|(_, answered, _)| *answered).count();
    let answered_otherwise = found.iter().filter(|(same, answered, _)| *answered && !same).count();
    let furthest = found.iter().map(|(.., off)| *off).fold(0.0, f64::max);
    println!(
        "{} photos, {answered} answered: same label {:.2} %, another answer {answered_otherwise}, a probability moves by {furthest:.4} at most",
        found.len(),
        100.0 * same
    );
    assert_eq!(answered_otherwise, 0, "a photo that is answered gets another label");
    assert!(same >= SAME_LABEL, "{same}");
    assert!(furthest <= SCORES_WITHIN, "{furthest}");
}

/// What the shipped network takes, without loading it.
fn input() -> Input {
    Manifest::parse(&std::fs::read(root().join("model/manifest.json")).unwrap()).unwrap().input
}

/// A picture of `tests/fixtures/colours` as it is stored, and its pixels as Pillow reads them.
fn drawn(name: &str) -> (Accepted, RgbImage) {
    let path = root().join("tests/fixtures/colours").join(name);
    let pillows = image::open(path.with_extension("decoded.png")).unwrap().into_rgb8();
    (shared::photo::accept(&std::fs::read(path).unwrap()).unwrap(), pillows)
}

/// How many levels lie between two pictures, on average and at most.
fn apart(one: &RgbImage, other: &RgbImage) -> (f64, u8) {
    assert_eq!(one.dimensions(), other.dimensions());
    let off: Vec<u8> = one.iter().zip(other.iter()).map(|(one, other)| one.abs_diff(*other)).collect();
    (off.iter().copied().map(f64::from).sum::<f64>() / off.len() as f64, off.into_iter().max().unwrap())
}

#[test]
fn photos_of_every_kind_have_the_colours_that_pillow_reads() {
    let input = input();
    for (name, mean_within, most_within) in COLOURS {
        let (photo, pillows) = drawn(name);
        let whole = picture::decode(&photo.bytes, photo.orientation).unwrap();
        let (mean, most) = apart(&whole, &pillows);
        println!("{name}: {mean:.3} levels apart on average, {most} at most");
        assert!(mean <= mean_within && most <= most_within, "{name}: {mean:.3} on average, {most} at most");
        let read = picture::decode_for(&photo.bytes, photo.orientation, &input).unwrap();
        assert!(read.pixels == whole, "{name}");
    }
}

#[test]
fn a_photo_that_is_read_at_a_quarter_has_the_colours_that_pillow_reads() {
    // For a network so small that a strip is large.
    let input = Input { width: 1, height: 1, ..input() };
    let (photo, pillows) = drawn("large.jpg");
    let read = picture::decode_for(&photo.bytes, photo.orientation, &input).unwrap();
    assert_eq!(read.side_px, photo.height);
    let (mean, most) = apart(&read.pixels, &pillows);
    println!("{mean:.3} levels apart on average, {most} at most");
    assert!(mean <= 2.0 && most <= 16, "{mean:.3} on average, {most} at most");
}

/// Drawn, and large enough to be read at a quarter if it were a usual JPEG.
fn large() -> RgbImage {
    let drawn = image::load_from_memory(&mole()).unwrap();
    drawn.resize_exact(PHONE.0, PHONE.1, FilterType::Triangle).into_rgb8()
}

#[test]
fn a_grey_photo_and_one_of_sixteen_bits_are_read_by_every_pixel() {
    let input = input();
    let grey = jpeg(DynamicImage::from(large()).into_luma8());
    let photo = large();
    let deep: ImageBuffer<Rgb<u16>, Vec<u16>> =
        ImageBuffer::from_fn(PHONE.0, PHONE.1, |x, y| Rgb(photo.get_pixel(x, y).0.map(|byte| u16::from(byte) * 257)));
    let mut png = Cursor::new(Vec::new());
    DynamicImage::from(deep).write_to(&mut png, ImageFormat::Png).unwrap();
    for bytes in [&grey, png.get_ref()] {
        let read = picture::decode_for(bytes, 1, &input).unwrap();
        assert!(read.pixels == picture::decode(bytes, 1).unwrap());
        assert_eq!(read.side_px, PHONE.1);
    }
}

#[test]
fn a_photo_that_lies_on_its_side_is_reduced_as_it_is_and_turned_after() {
    let input = input();
    let photo = jpeg(large());
    let upright = picture::decode_for(&photo, 1, &input).unwrap().pixels;
    for orientation in 2..=8 {
        let mut expected = DynamicImage::from(upright.clone());
        expected.apply_orientation(Orientation::from_exif(orientation).unwrap());
        let turned = picture::decode_for(&photo, orientation, &input).unwrap();
        assert!(turned.pixels == expected.into_rgb8(), "orientation {orientation}");
        assert_eq!(turned.side_px, PHONE.1);
    }
}
