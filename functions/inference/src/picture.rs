//! From a stored photo to the network's input: decode, turn upright, resize, normalise.

use std::borrow::Cow;
use std::io::Cursor;

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, PixelTrait, ResizeAlg, ResizeOptions, Resizer};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader, RgbImage};
use ndarray::Array4;
use shared::job::Photo;
use shared::photo::{Format, MAX_DECODED_BYTES};

use crate::jpeg;
use crate::manifest::{Element, Input, Layout, Resize};

/// Part of every cache key: grows when the same photo gives other numbers than before.
pub(crate) const PREPROCESSING_VERSION: u8 = 3;
/// The longer side of the picture that the quality gate measures, in pixels.
const GATE_SIDE: u32 = 256;
/// What one decode may allocate: the picture, and as much again to work in.
const MAX_DECODE_BYTES: u64 = MAX_DECODED_BYTES * 2;

/// The pixels cannot be decoded or resized.
#[derive(Debug, thiserror::Error)]
#[error("unreadable photo: {0}")]
pub struct Unreadable(pub(crate) String);

/// The network's input, `[1,3,H,W]` or `[1,H,W,3]` as the manifest says.
#[derive(Debug, Clone, PartialEq)]
pub enum Tensor {
    Float32(Array4<f32>),
    Uint8(Array4<u8>),
}

/// What decoding a photo takes in memory: its pixels as they are stored, a copy where these are not
/// upright RGB, and the coefficients of a progressive JPEG (sixteen bits each). PNGs of sixteen
/// bits, which no phone makes, are counted as if they had eight.
#[must_use]
pub fn decoding_bytes(photo: &Photo, bytes: &[u8]) -> u64 {
    let jpeg = photo.content_type == Format::Jpeg.content_type();
    let upright = Orientation::from_exif(photo.orientation).is_none_or(|turn| turn == Orientation::NoTransforms);
    let stored = if jpeg { 3 } else { 4 };
    let copied = if jpeg && upright { 0 } else { 3 };
    let coefficients = if jpeg && jpeg::is_progressive(bytes) { 6 } else { 0 };
    u64::from(photo.width) * u64::from(photo.height) * (stored + copied + coefficients)
}

/// An upright photo, as much of it as the gate and the network can tell apart.
pub struct Picture {
    pub pixels: RgbImage,
    /// The shorter side of the photo itself, in pixels.
    pub side_px: u32,
}

/// Decodes a photo and turns it upright.
///
/// # Errors
/// [`Unreadable`] where the bytes are no photo, are damaged, or would take too much memory.
pub fn decode(bytes: &[u8], orientation: u8) -> Result<RgbImage, Unreadable> {
    let format = sniff(bytes)?;
    if format == Format::Jpeg {
        // The decoder paints what is missing grey and says nothing.
        jpeg::check(bytes).map_err(unreadable)?;
    }
    decode_whole(bytes, format, orientation)
}

/// As [`decode`], where a large JPEG comes at a quarter of its width and height: still twice what
/// the gate and the network reduce it to, at a fraction of the time and the memory.
///
/// # Errors
/// Those of [`decode`].
pub fn decode_for(bytes: &[u8], orientation: u8, input: &Input) -> Result<Picture, Unreadable> {
    let format = sniff(bytes)?;
    if format == Format::Jpeg {
        let least = jpeg::Least { longer: 2 * GATE_SIDE, shorter: 2 * input.width.max(input.height) };
        if let Some(jpeg::Quarter { pixels, side_px }) = jpeg::check_and_reduce(bytes, least).map_err(unreadable)? {
            let mut picture = DynamicImage::from(pixels);
            picture.apply_orientation(turn(orientation));
            return Ok(Picture { pixels: picture.into_rgb8(), side_px });
        }
    }
    let pixels = decode_whole(bytes, format, orientation)?;
    let side_px = pixels.width().min(pixels.height());
    Ok(Picture { pixels, side_px })
}

fn unreadable(error: impl std::fmt::Display) -> Unreadable {
    Unreadable(error.to_string())
}

fn sniff(bytes: &[u8]) -> Result<Format, Unreadable> {
    Format::sniff(bytes).map_err(unreadable)
}

fn turn(orientation: u8) -> Orientation {
    Orientation::from_exif(orientation).unwrap_or(Orientation::NoTransforms)
}

fn decode_whole(bytes: &[u8], format: Format, orientation: u8) -> Result<RgbImage, Unreadable> {
    let reader = ImageReader::with_format(Cursor::new(bytes), format.image_format());
    let mut decoder = reader.into_decoder().map_err(unreadable)?;
    let mut limits = image::Limits::no_limits();
    limits.max_alloc = Some(MAX_DECODE_BYTES);
    // The decoder counts its own buffers against the limit, but not the picture.
    limits.reserve(decoder.total_bytes()).map_err(unreadable)?;
    decoder.set_limits(limits).map_err(unreadable)?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(unreadable)?;
    picture.apply_orientation(turn(orientation));
    Ok(picture.into_rgb8())
}

/// The grey picture that the quality gate measures (Rec. 601), at most [`GATE_SIDE`] on its
/// longer side, and its width and height.
///
/// # Errors
/// [`Unreadable`] where the picture cannot be resized.
pub fn gate_luma(picture: &RgbImage) -> Result<(Vec<u8>, usize, usize), Unreadable> {
    let (width, height) = picture.dimensions();
    let longer = width.max(height);
    let scaled = |side: u32| (f64::from(side) * f64::from(GATE_SIDE) / f64::from(longer)).round().max(1.0) as u32;
    let small = match longer {
        longer if longer <= GATE_SIDE => Cow::Borrowed(picture.as_raw().as_slice()),
        _ => Cow::Owned(resized(picture, [scaled(width), scaled(height)], FilterType::Bilinear)?),
    };
    let (width, height) = if longer <= GATE_SIDE { (width, height) } else { (scaled(width), scaled(height)) };
    let luma = small.chunks_exact(3).map(|pixel| {
        let [red, green, blue] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
        ((299 * red + 587 * green + 114 * blue + 500) / 1000) as u8
    });
    Ok((luma.collect(), width as usize, height as usize))
}

/// The network's input for an upright picture.
///
/// # Errors
/// [`Unreadable`] where the picture cannot be resized.
pub fn tensor(picture: &RgbImage, input: &Input) -> Result<Tensor, Unreadable> {
    let filter = match input.resize {
        Resize::Bilinear => FilterType::Bilinear,
        Resize::Bicubic => FilterType::CatmullRom,
        Resize::Lanczos3 => FilterType::Lanczos3,
    };
    // First across and then down, as Pillow does: both round in between, and a network can tell the
    // order (0.03 of a probability). The resizer by itself would go down first.
    let [across, down] = [[input.width, picture.height()], [input.width, input.height]];
    let narrow = resized(picture, across, filter)?;
    let pixels = resize::<U8x3>(&narrow, across, down, filter)?;
    // A value of a channel comes out the same wherever it stands: 768 are computed, not each pixel's.
    let values: [[f32; 256]; 3] = std::array::from_fn(|channel| {
        std::array::from_fn(|byte| (byte as f32 * input.scale - input.mean[channel]) / input.std[channel])
    });
    Ok(match input.element {
        Element::Uint8 => Tensor::Uint8(arranged(&pixels, input, |_, byte| byte)?),
        Element::Float32 => {
            Tensor::Float32(arranged(&pixels, input, |channel, byte| values[channel][usize::from(byte)])?)
        }
    })
}

/// Pixels of three bytes in the manifest's layout, each byte turned to what the network takes.
fn arranged<T>(pixels: &[u8], input: &Input, value: impl Fn(usize, u8) -> T) -> Result<Array4<T>, Unreadable> {
    let (width, height) = (input.width as usize, input.height as usize);
    let (pixels, _) = pixels.as_chunks::<3>();
    let mut values = Vec::with_capacity(3 * pixels.len());
    let shape = match input.layout {
        Layout::Nchw => {
            for channel in 0..3 {
                values.extend(pixels.iter().map(|pixel| value(channel, pixel[channel])));
            }
            (1, 3, height, width)
        }
        Layout::Nhwc => {
            for pixel in pixels {
                values.extend([0, 1, 2].map(|channel| value(channel, pixel[channel])));
            }
            (1, height, width, 3)
        }
    };
    Array4::from_shape_vec(shape, values).map_err(|error| Unreadable(error.to_string()))
}

fn resized(picture: &RgbImage, sides: [u32; 2], filter: FilterType) -> Result<Vec<u8>, Unreadable> {
    resize::<U8x3>(picture.as_raw(), picture.dimensions().into(), sides, filter)
}

/// Pixels of a type `P` of bytes, between two pairs of width and height. By the type of the pixels:
/// what chooses it at run time brings the code for all others along.
pub(crate) fn resize<P: PixelTrait>(
    pixels: &[u8],
    from: [u32; 2],
    to: [u32; 2],
    filter: FilterType,
) -> Result<Vec<u8>, Unreadable> {
    let unreadable = |error: &dyn std::fmt::Display| Unreadable(error.to_string());
    let source = TypedImageRef::<P>::from_buffer(from[0], from[1], pixels).map_err(|error| unreadable(&error))?;
    let mut resized = vec![0; to[0] as usize * to[1] as usize * P::size()];
    let target = TypedImage::<P>::from_buffer(to[0], to[1], &mut resized);
    let mut target = target.map_err(|error| unreadable(&error))?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
    Resizer::new().resize_typed(&source, &mut target, &options).map_err(|error| unreadable(&error))?;
    Ok(resized)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fixtures are `mole-drawn.png` as Pillow 12.0.0 makes it smaller: `Image.open(..).resize((96, 72), filter)`,
    /// the filter being `BILINEAR`, `BICUBIC` and `LANCZOS`.
    #[test]
    fn a_picture_is_resized_as_pillow_does_it() {
        let opened = |bytes: &[u8]| image::load_from_memory(bytes).unwrap().into_rgb8();
        let picture = opened(include_bytes!("../../../model/samples/mole-drawn.png"));
        for (resize, pillows) in [
            (Resize::Bilinear, opened(include_bytes!("../fixtures/resized-by-pillow.png"))),
            (Resize::Bicubic, opened(include_bytes!("../fixtures/resized-by-pillow-bicubic.png"))),
            (Resize::Lanczos3, opened(include_bytes!("../fixtures/resized-by-pillow-lanczos.png"))),
        ] {
            let input = Input {
                name: String::new(),
                layout: Layout::Nhwc,
                element: Element::Uint8,
                width: pillows.width(),
                height: pillows.height(),
                resize,
                scale: 1.0,
                mean: [0.0; 3],
                std: [1.0; 3],
            };
            let Tensor::Uint8(ours) = tensor(&picture, &input).unwrap() else { panic!("bytes") };
            let off: Vec<u8> = ours.iter().zip(pillows.as_raw()).map(|(one, other)| one.abs_diff(*other)).collect();
            let (differ, all) = (off.iter().filter(|off| **off > 0).count(), off.len());
            // The other order of the two passes moves one in nine, another filter one in eight at least.
            assert!(differ * 200 <= all && off.iter().all(|off| *off <= 1), "{resize:?}: {differ} of {all} differ");
        }
    }
}
