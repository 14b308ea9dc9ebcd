//! What a photo is, from its bytes alone: format by magic number, size from the header, and the
//! bytes without their metadata.
//!
//! Metadata is removed by keeping only what a decoder needs: everything else (EXIF with GPS and
//! thumbnail, XMP, IPTC, ICC, comments, maker notes, further pictures behind the first) is left
//! out. The compressed pixels are copied, never encoded again. Formats: JPEG, ITU-T T.81 annex B;
//! PNG, W3C PNG third edition; WebP, RFC 9649.

use std::io::Cursor;

use image::{ImageDecoder, ImageReader};

use crate::error::{Code, Error};

/// The most pixels that a photo may have: the largest that phones take by default (48 MP), with
/// room. Checked against the header, before anything is decoded.
pub const MAX_PIXELS: u64 = 50_000_000;

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
            [_, _, _, _, b'f', b't', b'y', b'p', brand @ ..] if is_heic(brand) => Err(Error::new(
                Code::HeicNotSupported,
                "HEIC photos are not supported. Send a JPEG: on an iPhone choose Settings > Camera > Formats > \
                 Most Compatible, or let the app convert the photo before the upload.",
            )),
            _ => Err(Error::new(Code::UnsupportedMediaType, "Send a JPEG, PNG or WebP photo.")),
        }
    }
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
    let orientation = header(format, bytes)?.orientation().map_or(1, image::metadata::Orientation::to_exif);
    let stripped = match format {
        Format::Jpeg => strip_jpeg(bytes),
        Format::Png => strip_png(bytes),
        Format::WebP => strip_webp(bytes)?,
    };
    let bytes = stripped.ok_or_else(unreadable)?;
    let (width, height) = header(format, &bytes)?.dimensions();
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        let megapixels = MAX_PIXELS / 1_000_000;
        return Err(Error::new(Code::PayloadTooLarge, format!("The photo has more than {megapixels} megapixels.")));
    }
    Ok(Accepted { format, width, height, orientation, bytes })
}

fn header(format: Format, bytes: &[u8]) -> Result<impl ImageDecoder, Error> {
    let reader = ImageReader::with_format(Cursor::new(bytes), format.image_format());
    reader.into_decoder().map_err(|_| unreadable())
}

fn unreadable() -> Error {
    Error::new(Code::PhotoUnreadable, "The photo is damaged: its header cannot be read.")
}

/// Splits `count` bytes off the front.
fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (head, tail) = bytes.split_at_checked(count)?;
    *bytes = tail;
    Some(head)
}

/// Keeps the frame, tables and scans; of APP0 and APP14 only what changes the colours.
fn strip_jpeg(bytes: &[u8]) -> Option<Vec<u8>> {
    const SOI: u8 = 0xD8;
    const EOI: u8 = 0xD9;
    const SOS: u8 = 0xDA;
    let mut rest = bytes;
    let mut out = Vec::with_capacity(bytes.len());
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
                return Some(out);
            }
            0x00 | 0x01 | 0xD0..=0xD7 | SOI => continue,
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
            0xE0..=0xFE => {}
            _ => {
                out.extend_from_slice(&[0xFF, marker]);
                out.extend_from_slice(segment);
            }
        }
        if marker == SOS {
            let length = scan_length(rest);
            let scan = take(&mut rest, length)?;
            out.extend_from_slice(scan);
        }
    }
    // Cut off before EOI: the header may be right, and the decoder will judge the pixels.
    Some(out)
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

/// Keeps the chunks that make the pixels.
fn strip_png(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut rest = bytes;
    let mut out = Vec::with_capacity(bytes.len());
    out.extend_from_slice(take(&mut rest, 8)?);
    while rest.len() >= 12 {
        let length = usize::try_from(u32::from_be_bytes(rest[..4].try_into().ok()?)).ok()?;
        let kind: [u8; 4] = rest[4..8].try_into().ok()?;
        let Some(chunk) = take(&mut rest, length.checked_add(12)?) else { break };
        if matches!(&kind, b"IHDR" | b"PLTE" | b"tRNS" | b"IDAT" | b"IEND") {
            out.extend_from_slice(chunk);
        }
        if &kind == b"IEND" {
            return Some(out);
        }
    }
    // Cut off: keep what there is of the last chunk, so that the decoder sees damaged pixels.
    if rest.get(4..8) == Some(b"IDAT") {
        out.extend_from_slice(rest);
    }
    Some(out)
}

/// Keeps the picture and its alpha; refuses animations.
fn strip_webp(bytes: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    const ICC_EXIF_XMP: u8 = 0x20 | 0x08 | 0x04;
    let mut rest = &bytes[12..];
    let mut out = bytes[..12].to_vec();
    while rest.len() >= 8 {
        let kind = [rest[0], rest[1], rest[2], rest[3]];
        let length = u32::from_le_bytes([rest[4], rest[5], rest[6], rest[7]]) as usize;
        // Chunks are padded to even lengths; a last one that is cut off is kept as far as it goes.
        let padded = length.saturating_add(length % 2).saturating_add(8).min(rest.len());
        let (chunk, tail) = rest.split_at(padded);
        rest = tail;
        match &kind {
            b"ANIM" | b"ANMF" => {
                return Err(Error::new(
                    Code::UnsupportedMediaType,
                    "Animated pictures are not supported; send a photo.",
                ));
            }
            b"VP8X" if chunk.len() >= 9 => {
                let at = out.len() + 8;
                out.extend_from_slice(chunk);
                out[at] &= !ICC_EXIF_XMP;
            }
            b"VP8 " | b"VP8L" | b"ALPH" => out.extend_from_slice(chunk),
            _ => {}
        }
    }
    let Ok(size) = u32::try_from(out.len() - 8) else { return Ok(None) };
    out[4..8].copy_from_slice(&size.to_le_bytes());
    Ok(Some(out))
}

#[cfg(test)]
#[path = "photo_tests.rs"]
mod tests;
