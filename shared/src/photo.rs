//! What a photo is, from its bytes alone: format by magic number, size from the header, and the
//! bytes without their metadata.
//!
//! Metadata is removed by keeping only what a decoder needs: everything else (EXIF with GPS and
//! thumbnail, XMP, IPTC, ICC, comments, maker notes, further pictures behind the first) is left
//! out. The compressed pixels are copied, never encoded again. Formats: JPEG, ITU-T T.81 annex B;
//! PNG, W3C PNG third edition; WebP, RFC 9649.

use std::io::Cursor;

use image::metadata::Orientation;
use image::{ImageDecoder, ImageReader};

use crate::error::{Code, Error};

/// The most pixels that a photo may have: the largest that phones take by default (48 MP), with
/// room. Checked against the header, before anything is decoded.
pub const MAX_PIXELS: u64 = 50_000_000;

/// The most that a photo may take when decoded: [`MAX_PIXELS`] of four bytes.
pub const MAX_DECODED_BYTES: u64 = MAX_PIXELS * 4;

/// The formats that are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Jpeg,
    Png,
    WebP,
}

impl Format {
    /// The media type, as stored with the job.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Jpeg => "image/jpeg",
            Self::Png => "image/png",
            Self::WebP => "image/webp",
        }
    }

    /// The format that a media type names.
    ///
    /// # Errors
    /// 415, with advice of its own for HEIC.
    pub fn of_content_type(content_type: &str) -> Result<Self, Error> {
        match content_type.to_ascii_lowercase().as_str() {
            "image/jpeg" => Ok(Self::Jpeg),
            "image/png" => Ok(Self::Png),
            "image/webp" => Ok(Self::WebP),
            "image/heic" | "image/heif" => Err(heic_not_supported()),
            _ => Err(unsupported()),
        }
    }

    /// The decoder's name for the format.
    #[must_use]
    pub fn image_format(self) -> image::ImageFormat {
        match self {
            Self::Jpeg => image::ImageFormat::Jpeg,
            Self::Png => image::ImageFormat::Png,
            Self::WebP => image::ImageFormat::WebP,
        }
    }

    /// The format that the first bytes announce.
    ///
    /// # Errors
    /// 415, with advice of its own for HEIC, the iPhone's default.
    pub fn sniff(bytes: &[u8]) -> Result<Self, Error> {
        match bytes {
            [0xFF, 0xD8, 0xFF, ..] => Ok(Self::Jpeg),
            [0x89, b'P', b'N', b'G', 0x0D, 0x0A, 0x1A, 0x0A, ..] => Ok(Self::Png),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Ok(Self::WebP),
            [_, _, _, _, b'f', b't', b'y', b'p', brand @ ..] if is_heic(brand) => Err(heic_not_supported()),
            _ => Err(unsupported()),
        }
    }
}

fn heic_not_supported() -> Error {
    Error::new(
        Code::HeicNotSupported,
        "HEIC photos are not supported. Send a JPEG: on an iPhone choose Settings > Camera > Formats > \
         Most Compatible, or let the app convert the photo before the upload.",
    )
}

fn unsupported() -> Error {
    Error::new(Code::UnsupportedMediaType, "Send a JPEG, PNG or WebP photo.")
}

fn is_heic(brand: &[u8]) -> bool {
    [b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"].iter().any(|heic| brand.starts_with(*heic))
}

/// A photo that may be stored.
#[derive(Debug)]
pub struct Accepted {
    pub format: Format,
    /// Pixels before `orientation` is applied.
    pub width: u32,
    pub height: u32,
    /// EXIF orientation, 1–8.
    pub orientation: u8,
    /// The photo without metadata.
    pub bytes: Vec<u8>,
}

/// Checks a photo as it was received, and takes its metadata off.
///
/// # Errors
/// 415 for another format, 422 for a header that cannot be read, 413 for more than [`MAX_PIXELS`].
pub fn accept(bytes: &[u8]) -> Result<Accepted, Error> {
    let format = Format::sniff(bytes)?;
    // The decoder sees only what is kept: it unpacks colour profiles of any size, believes whatever
    // length a piece of metadata gives, and refuses photos for metadata that it cannot read.
    let stripped = match format {
        Format::Jpeg => strip_jpeg(bytes),
        Format::Png => strip_png(bytes),
        Format::WebP => strip_webp(bytes)?,
    };
    let Stripped { bytes, exif } = stripped.ok_or_else(unreadable)?;
    // As JPEG has it, which some cameras write into WebP and PNG as well.
    let exif = exif.map(|exif| exif.strip_prefix(b"Exif\0\0").unwrap_or(exif));
    let orientation = exif.and_then(Orientation::from_exif_chunk).map_or(1, Orientation::to_exif);
    let decoder = header(format, &bytes)?;
    let (width, height) = decoder.dimensions();
    // The WebP decoder counts 16,384 pixels as none.
    if width == 0 || height == 0 {
        return Err(unreadable());
    }
    // Sixteen bits a channel with alpha take twice the room of what a phone makes.
    if u64::from(width) * u64::from(height) > MAX_PIXELS || decoder.total_bytes() > MAX_DECODED_BYTES {
        let megapixels = MAX_PIXELS / 1_000_000;
        let message = format!("The photo has more than {megapixels} megapixels, or too many bits in each.");
        return Err(Error::new(Code::PayloadTooLarge, message));
    }
    drop(decoder);
    Ok(Accepted { format, width, height, orientation, bytes })
}

fn header(format: Format, bytes: &[u8]) -> Result<impl ImageDecoder, Error> {
    let reader = ImageReader::with_format(Cursor::new(bytes), format.image_format());
    reader.into_decoder().map_err(|_| unreadable())
}

fn unreadable() -> Error {
    Error::new(Code::PhotoUnreadable, "The photo is damaged or cut off. Export it again, or take another.")
}

/// A photo taken apart.
struct Stripped<'a> {
    /// What a decoder needs.
    bytes: Vec<u8>,
    /// The first EXIF block, a TIFF, which says which way is up.
    exif: Option<&'a [u8]>,
}

/// Splits `count` bytes off the front.
fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (head, tail) = bytes.split_at_checked(count)?;
    *bytes = tail;
    Some(head)
}

/// Keeps the frame, tables and scans; of APP0 and APP14 only what changes the colours. `None` for
/// a JPEG that is cut off or of a kind that no camera makes (arithmetic, lossless, hierarchical).
fn strip_jpeg(bytes: &[u8]) -> Option<Stripped<'_>> {
    const SOI: u8 = 0xD8;
    const EOI: u8 = 0xD9;
    const SOS: u8 = 0xDA;
    let mut rest = bytes;
    let mut out = Vec::with_capacity(bytes.len());
    let mut exif = None;
    out.extend_from_slice(take(&mut rest, 2)?);
    while let Some(start) = rest.iter().position(|byte| *byte == 0xFF) {
        // A marker is 0xFF, any number of fill bytes 0xFF, and its code.
        rest = &rest[start..];
        let code = rest.iter().position(|byte| *byte != 0xFF)?;
        let marker = rest[code];
        rest = &rest[code + 1..];
        match marker {
            EOI => {
                out.extend_from_slice(&[0xFF, EOI]);
                return Some(Stripped { bytes: out, exif });
            }
            // Another picture begins before this one has ended.
            SOI => return None,
            0x00 | 0x01 | 0xD0..=0xD7 => continue,
            _ => {}
        }
        let length = usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?]));
        let segment = take(&mut rest, length)?;
        let payload = segment.get(2..)?;
        match marker {
            // JFIF carries the pixel aspect and may carry a thumbnail, which is cut off.
            0xE0 if payload.starts_with(b"JFIF\0") && payload.len() >= 14 => {
                out.extend_from_slice(&[0xFF, marker, 0, 16]);
                out.extend_from_slice(&payload[..12]);
                out.extend_from_slice(&[0, 0]);
            }
            // Adobe's segment says whether CMYK and RGB are stored transformed.
            0xEE if payload.starts_with(b"Adobe") && payload.len() >= 12 => {
                out.extend_from_slice(&[0xFF, marker, 0, 14]);
                out.extend_from_slice(&payload[..12]);
            }
            0xE1 if payload.starts_with(b"Exif\0\0") => exif = exif.or(payload.get(6..)),
            // Application data and comments.
            0xE0..=0xEF | 0xFE => {}
            // Frame (baseline, extended, progressive), Huffman and quantisation tables, restart
            // interval, scan.
            0xC0..=0xC2 | 0xC4 | 0xDB | 0xDD | SOS => {
                out.extend_from_slice(&[0xFF, marker]);
                out.extend_from_slice(segment);
            }
            _ => return None,
        }
        if marker == SOS {
            let length = scan_length(rest);
            let scan = take(&mut rest, length)?;
            out.extend_from_slice(scan);
        }
    }
    None
}

/// Length of the entropy-coded data up to the next marker that is no stuffing and no restart.
fn scan_length(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(next) = bytes[at..].iter().position(|byte| *byte == 0xFF) {
        at += next;
        match bytes.get(at + 1) {
            None => return bytes.len(),
            Some(0x00 | 0xD0..=0xD7) => at += 2,
            Some(0xFF) => at += 1,
            Some(_) => return at,
        }
    }
    bytes.len()
}

/// Keeps the chunks that make the pixels. `None` for a PNG that is cut off.
fn strip_png(bytes: &[u8]) -> Option<Stripped<'_>> {
    let mut rest = bytes;
    let mut out = Vec::with_capacity(bytes.len());
    let mut exif = None;
    out.extend_from_slice(take(&mut rest, 8)?);
    loop {
        let length = usize::try_from(u32::from_be_bytes(rest.get(..4)?.try_into().ok()?)).ok()?;
        let kind: [u8; 4] = rest.get(4..8)?.try_into().ok()?;
        let chunk = take(&mut rest, length.checked_add(12)?)?;
        // Larger than its kind can be, a chunk carries something else.
        let largest = match &kind {
            b"IHDR" => 13,
            b"PLTE" => 768,
            b"tRNS" => 256,
            b"IEND" => 0,
            b"IDAT" => usize::MAX,
            b"eXIf" => {
                exif = exif.or(chunk.get(8..8 + length));
                continue;
            }
            _ => continue,
        };
        if length > largest {
            return None;
        }
        out.extend_from_slice(chunk);
        if &kind == b"IEND" {
            return Some(Stripped { bytes: out, exif });
        }
    }
}

/// Keeps the picture and its alpha, the first of each; refuses animations. `Ok(None)` for a WebP
/// that is cut off or whose two sizes differ.
fn strip_webp(bytes: &[u8]) -> Result<Option<Stripped<'_>>, Error> {
    const ICC_EXIF_XMP: u8 = 0x20 | 0x08 | 0x04;
    let riff_size = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
    // What lies behind the container is no part of the picture.
    let Some(mut rest) = bytes.get(12..riff_size.saturating_add(8)) else { return Ok(None) };
    let mut out = bytes[..12].to_vec();
    let (mut canvas, mut frame, mut has_alpha, mut exif) = (None, None, false, None);
    while rest.len() >= 8 {
        let kind = [rest[0], rest[1], rest[2], rest[3]];
        let length = u32::from_le_bytes([rest[4], rest[5], rest[6], rest[7]]) as usize;
        // Chunks are padded to even lengths; some writers leave the last pad byte out.
        let padded = length.saturating_add(length % 2).saturating_add(8);
        if length.saturating_add(8) > rest.len() {
            return Ok(None);
        }
        let (chunk, tail) = rest.split_at(padded.min(rest.len()));
        rest = tail;
        match &kind {
            b"ANIM" | b"ANMF" => {
                return Err(Error::new(
                    Code::UnsupportedMediaType,
                    "Animated pictures are not supported; send a photo.",
                ));
            }
            b"VP8X" if canvas.is_none() && length == 10 => {
                let at = out.len() + 8;
                out.extend_from_slice(chunk);
                out[at] &= !ICC_EXIF_XMP;
                let side = |at: usize| u32::from_le_bytes([chunk[at], chunk[at + 1], chunk[at + 2], 0]) + 1;
                canvas = Some((side(12), side(15)));
            }
            b"VP8X" => return Ok(None),
            b"VP8 " | b"VP8L" if frame.is_none() => {
                frame = webp_frame_size(&kind, &chunk[8..]);
                if frame.is_none() {
                    return Ok(None);
                }
                out.extend_from_slice(chunk);
            }
            b"ALPH" if !has_alpha => {
                has_alpha = true;
                out.extend_from_slice(chunk);
            }
            b"EXIF" => exif = exif.or(chunk.get(8..8 + length)),
            _ => {}
        }
    }
    // A large frame behind a small canvas would pass the cap on pixels.
    if frame.is_none() || canvas.is_some_and(|canvas| Some(canvas) != frame) {
        return Ok(None);
    }
    let Ok(size) = u32::try_from(out.len() - 8) else { return Ok(None) };
    out[4..8].copy_from_slice(&size.to_le_bytes());
    Ok(Some(Stripped { bytes: out, exif }))
}

/// Width and height of a VP8 key frame (RFC 6386, 9.1) or a VP8L picture (RFC 9649, 3.4).
fn webp_frame_size(kind: &[u8; 4], data: &[u8]) -> Option<(u32, u32)> {
    if kind == b"VP8L" {
        let [0x2F, bits @ ..] = data.get(..5)? else { return None };
        let bits = u32::from_le_bytes(bits.try_into().ok()?);
        return Some(((bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1));
    }
    let [0x9D, 0x01, 0x2A, size @ ..] = data.get(3..10)? else { return None };
    let side = |low: u8, high: u8| u32::from(u16::from_le_bytes([low, high]) & 0x3FFF);
    Some((side(size[0], size[1]), side(size[2], size[3])))
}

#[cfg(test)]
mod tests;
