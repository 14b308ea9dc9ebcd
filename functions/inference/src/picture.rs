//! From a stored photo to the network's input: decode, turn upright, resize, normalise.

use std::io::Cursor;

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader, RgbImage};
use ndarray::Array4;
use shared::photo::{Format, MAX_DECODED_BYTES};

use crate::jpeg;
use crate::manifest::{Element, Input, Layout, Resize};

/// Part of every cache key: grows when the same photo gives other numbers than before.
pub(crate) const PREPROCESSING_VERSION: u8 = 1;
/// The longer side of the picture that the quality gate measures, in pixels.
const GATE_SIDE: u32 = 256;
/// What one decode may allocate: the picture, and as much again to work in.
const MAX_DECODE_BYTES: u64 = MAX_DECODED_BYTES * 2;

/// The pixels cannot be decoded or resized.
#[derive(Debug, thiserror::Error)]
#[error("unreadable photo: {0}")]
pub struct Unreadable(String);

/// The network's input, `[1,3,H,W]` or `[1,H,W,3]` as the manifest says.
#[derive(Debug, Clone, PartialEq)]
pub enum Tensor {
    Float32(Array4<f32>),
    Uint8(Array4<u8>),
}

/// Decodes a photo and turns it upright.
///
/// # Errors
/// [`Unreadable`] where the bytes are no photo, are damaged, or would take too much memory.
pub fn decode(bytes: &[u8], orientation: u8) -> Result<RgbImage, Unreadable> {
    let unreadable = |error: &dyn std::fmt::Display| Unreadable(error.to_string());
    let format = Format::sniff(bytes).map_err(|error| unreadable(&error))?;
    if format == Format::Jpeg {
        // The decoder paints what is missing grey and says nothing.
        jpeg::check(bytes).map_err(|error| unreadable(&error))?;
    }
    let reader = ImageReader::with_format(Cursor::new(bytes), format.image_format());
    let mut decoder = reader.into_decoder().map_err(|error| unreadable(&error))?;
    let mut limits = image::Limits::no_limits();
    limits.max_alloc = Some(MAX_DECODE_BYTES);
    // The decoder counts its own buffers against the limit, but not the picture.
    limits.reserve(decoder.total_bytes()).map_err(|error| unreadable(&error))?;
    decoder.set_limits(limits).map_err(|error| unreadable(&error))?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(|error| unreadable(&error))?;
    picture.apply_orientation(Orientation::from_exif(orientation).unwrap_or(Orientation::NoTransforms));
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
        longer if longer <= GATE_SIDE => picture.as_raw().clone(),
        _ => resize(picture, scaled(width), scaled(height), FilterType::Bilinear)?,
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
    let pixels = resize(picture, input.width, input.height, filter)?;
    let (width, height) = (input.width as usize, input.height as usize);
    let byte = |channel: usize, y: usize, x: usize| pixels[(y * width + x) * 3 + channel];
    let value = |channel: usize, y: usize, x: usize| {
        (f32::from(byte(channel, y, x)) * input.scale - input.mean[channel]) / input.std[channel]
    };
    Ok(match (input.element, input.layout) {
        (Element::Uint8, Layout::Nchw) => {
            Tensor::Uint8(Array4::from_shape_fn((1, 3, height, width), |(_, c, y, x)| byte(c, y, x)))
        }
        (Element::Uint8, Layout::Nhwc) => {
            Tensor::Uint8(Array4::from_shape_fn((1, height, width, 3), |(_, y, x, c)| byte(c, y, x)))
        }
        (Element::Float32, Layout::Nchw) => {
            Tensor::Float32(Array4::from_shape_fn((1, 3, height, width), |(_, c, y, x)| value(c, y, x)))
        }
        (Element::Float32, Layout::Nhwc) => {
            Tensor::Float32(Array4::from_shape_fn((1, height, width, 3), |(_, y, x, c)| value(c, y, x)))
        }
    })
}

fn resize(picture: &RgbImage, width: u32, height: u32, filter: FilterType) -> Result<Vec<u8>, Unreadable> {
    let source = ImageRef::new(picture.width(), picture.height(), picture.as_raw(), PixelType::U8x3);
    let source = source.map_err(|error| Unreadable(error.to_string()))?;
    let mut target = Image::new(width, height, PixelType::U8x3);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
    Resizer::new().resize(&source, &mut target, &options).map_err(|error| Unreadable(error.to_string()))?;
    Ok(target.into_vec())
}
