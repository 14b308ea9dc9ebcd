use image::{DynamicImage, ImageFormat, RgbImage};

use super::*;

fn picture() -> DynamicImage {
    let pixel = |x: u32, y: u32| image::Rgb([(x * 5) as u8, (y * 7) as u8, ((x * y) % 251) as u8]);
    DynamicImage::ImageRgb8(RgbImage::from_fn(40, 30, pixel))
}

fn encoded(format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn pixels(bytes: &[u8]) -> Vec<u8> {
    image::load_from_memory(bytes).unwrap().into_rgb8().into_raw()
}

/// A little-endian TIFF block with orientation 6, a GPS latitude reference and text that must
/// not survive (TIFF 6.0, EXIF 2.32).
fn exif() -> Vec<u8> {
    let mut block = b"II*\0\x08\0\0\0".to_vec();
    block.extend_from_slice(&2_u16.to_le_bytes());
    for (tag, kind, count, value) in [(0x0112_u16, 3_u16, 1_u32, 6_u32), (0x010F, 2, 4, u32::from_le_bytes(*b"GPS!"))] {
        block.extend_from_slice(&tag.to_le_bytes());
        block.extend_from_slice(&kind.to_le_bytes());
        block.extend_from_slice(&count.to_le_bytes());
        block.extend_from_slice(&value.to_le_bytes());
    }
    block.extend_from_slice(&[0; 4]);
    block.extend_from_slice(b"52.5200 N SECRET PLACE");
    block
}

fn jpeg_segment(marker: u8, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() + 2) as u16;
    [&[0xFF, marker], length.to_be_bytes().as_slice(), payload].concat()
}

fn jpeg_with_metadata() -> Vec<u8> {
    let plain = encoded(ImageFormat::Jpeg);
    let exif = jpeg_segment(0xE1, &[b"Exif\0\0".as_slice(), &exif()].concat());
    let xmp = jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x>SECRET</x>");
    let comment = jpeg_segment(0xFE, b"SECRET comment");
    let trailer = b"\xFF\xD8\xFFSECRET second picture\xFF\xD9";
    [&plain[..2], &exif, &xmp, &comment, &plain[2..], trailer].concat()
}

fn png_chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    // The CRC is of no interest here: the chunk is to be dropped unread.
    [(data.len() as u32).to_be_bytes().as_slice(), kind, data, &[0; 4]].concat()
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}

fn png_with_metadata(exif: &[u8]) -> Vec<u8> {
    let plain = encoded(ImageFormat::Png);
    let mut exif_chunk = [(exif.len() as u32).to_be_bytes().as_slice(), b"eXIf", exif].concat();
    let crc = crc32(&exif_chunk[4..]);
    exif_chunk.extend_from_slice(&crc.to_be_bytes());
    let text = png_chunk(b"tEXt", b"Comment\0SECRET");
    // The signature and IHDR take the first 33 bytes.
    [&plain[..33], &exif_chunk, &text, &plain[33..], b"SECRET trailer"].concat()
}

fn webp_with_metadata(exif: &[u8]) -> Vec<u8> {
    let plain = encoded(ImageFormat::WebP);
    let mut extended = b"VP8X\x0a\0\0\0".to_vec();
    extended.extend_from_slice(&[0x08, 0, 0, 0, 39, 0, 0, 29, 0, 0]);
    let mut chunk = [b"EXIF".as_slice(), &(exif.len() as u32).to_le_bytes(), exif].concat();
    chunk.resize(chunk.len() + exif.len() % 2, 0);
    let body = [b"WEBP".as_slice(), &extended, &plain[12..], &chunk].concat();
    [b"RIFF".as_slice(), &(body.len() as u32).to_le_bytes(), &body].concat()
}

#[test]
fn metadata_goes_orientation_stays_and_no_pixel_changes() {
    // Some cameras write what begins EXIF in a JPEG into WebP and PNG as well.
    let prefixed = [b"Exif\0\0".as_slice(), &exif()].concat();
    for (name, format, bytes) in [
        ("jpeg", ImageFormat::Jpeg, jpeg_with_metadata()),
        ("png", ImageFormat::Png, png_with_metadata(&exif())),
        ("png of a camera", ImageFormat::Png, png_with_metadata(&prefixed)),
        ("webp", ImageFormat::WebP, webp_with_metadata(&exif())),
        ("webp of a camera", ImageFormat::WebP, webp_with_metadata(&prefixed)),
    ] {
        let accepted = accept(&bytes).unwrap();
        assert_eq!(accepted.orientation, 6, "{name}");
        assert_eq!((accepted.width, accepted.height), (40, 30), "{name}");
        for secret in [b"SECRET".as_slice(), b"GPS!", b"Exif", b"EXIF", b"eXIf"] {
            assert!(!accepted.bytes.windows(secret.len()).any(|window| window == secret), "{name}");
        }
        assert_eq!(pixels(&accepted.bytes), pixels(&encoded(format)), "{name}");
    }
}

#[test]
fn a_photo_without_metadata_keeps_its_orientation_and_pixels() {
    for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP] {
        let bytes = encoded(format);
        let accepted = accept(&bytes).unwrap();
        assert_eq!(accepted.orientation, 1);
        assert_eq!(pixels(&accepted.bytes), pixels(&bytes));
    }
}

#[test]
fn metadata_that_no_decoder_can_read_does_not_refuse_the_photo() {
    let plain = encoded(ImageFormat::Jpeg);
    let short = jpeg_segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0SECRET");
    let accepted = accept(&[&plain[..2], &short, &plain[2..]].concat()).unwrap();
    assert_eq!((accepted.orientation, accepted.bytes == plain), (1, true));
}

#[test]
fn a_jfif_thumbnail_is_cut_off() {
    let plain = encoded(ImageFormat::Jpeg);
    let jfif = [b"JFIF\0\x01\x01\0\0\x01\0\x01\x01\x02".as_slice(), b"SECRET"].concat();
    let bytes = [&plain[..2], &jpeg_segment(0xE0, &jfif), &plain[2..]].concat();
    let accepted = accept(&bytes).unwrap();
    assert!(!accepted.bytes.windows(6).any(|window| window == b"SECRET"));
}

#[test]
fn the_format_comes_from_the_bytes_and_heic_is_told_what_to_do() {
    let code = |bytes: &[u8]| accept(bytes).unwrap_err().code();
    assert_eq!(code(b"\0\0\0\x18ftypheic\0\0\0\0"), Code::HeicNotSupported);
    assert_eq!(code(b"\0\0\0\x18ftypmif1\0\0\0\0"), Code::HeicNotSupported);
    assert_eq!(code(b"\0\0\0\x18ftypisom\0\0\0\0"), Code::UnsupportedMediaType);
    assert_eq!(code(b"GIF89a"), Code::UnsupportedMediaType);
    assert_eq!(code(b"<svg/>"), Code::UnsupportedMediaType);
    assert_eq!(code(b""), Code::UnsupportedMediaType);
    assert!(accept(b"\0\0\0\x18ftypheic\0\0\0\0").unwrap_err().message().contains("JPEG"));
}

#[test]
fn too_many_pixels_are_refused_by_the_header_alone() {
    let mut png = encoded(ImageFormat::Png);
    png[16..24].copy_from_slice(&[0, 0, 0xEA, 0x60, 0, 0, 0xEA, 0x60]); // 60,000 × 60,000
    let crc = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    assert_eq!(accept(&png).unwrap_err().code(), Code::PayloadTooLarge);
}

/// A VP8X header and a frame of a picture, as `webp_with_metadata` makes them.
fn webp_of(chunks: &[&[u8]]) -> Vec<u8> {
    let body = [b"WEBP".as_slice(), &chunks.concat()].concat();
    [b"RIFF".as_slice(), &(body.len() as u32).to_le_bytes(), &body].concat()
}

#[test]
fn what_hides_data_where_no_decoder_looks_is_refused_or_cut_off() {
    let plain = encoded(ImageFormat::Jpeg);
    let png = encoded(ImageFormat::Png);
    let webp = encoded(ImageFormat::WebP);
    let secret = b"SECRET".as_slice();
    let reserved = [&plain[..2], &jpeg_segment(0x4F, secret), &plain[2..]].concat();
    let hierarchical = [&plain[..2], &jpeg_segment(0xDE, secret), &plain[2..]].concat();
    let second_picture = [&plain[..plain.len() - 2], &jpeg_with_metadata()[..]].concat();
    let palette = [&png[..33], &png_chunk(b"tRNS", &[secret, &[0; 300]].concat()), &png[33..]].concat();
    let mut long_idat = [&png[..33], &png_chunk(b"IDAT", secret)].concat();
    long_idat[33..37].copy_from_slice(&1_000_000_u32.to_be_bytes());
    let long_canvas = webp_of(&[b"VP8X\x14\0\0\0\0\0\0\0", &[39, 0, 0, 29, 0, 0], b"SECRET0123", &webp[12..]]);
    for (name, bytes) in [
        ("reserved marker", reserved),
        ("hierarchical marker", hierarchical),
        ("second picture", second_picture),
        ("large tRNS", palette),
        ("IDAT beyond the end", long_idat),
        ("long VP8X", long_canvas),
    ] {
        assert_eq!(accept(&bytes).unwrap_err().code(), Code::PhotoUnreadable, "{name}");
    }
    let behind = [webp.as_slice(), secret].concat();
    let twice = webp_of(&[&webp[12..], b"VP8L\x06\0\0\0SECRET"]);
    for bytes in [behind, twice] {
        let kept = accept(&bytes).unwrap().bytes;
        assert!(!kept.windows(6).any(|window| window == secret));
        assert_eq!(pixels(&kept), pixels(&webp));
    }
}

#[test]
fn a_large_frame_behind_a_small_canvas_is_refused() {
    let webp = encoded(ImageFormat::WebP);
    let canvas = |width: u8, height: u8| [b"VP8X\x0a\0\0\0\0\0\0\0".as_slice(), &[width, 0, 0, height, 0, 0]].concat();
    assert!(accept(&webp_of(&[&canvas(39, 29), &webp[12..]])).is_ok());
    assert_eq!(accept(&webp_of(&[&canvas(9, 9), &webp[12..]])).unwrap_err().code(), Code::PhotoUnreadable);
}

#[test]
fn sixteen_bits_a_channel_count_against_the_cap() {
    let mut png = encoded(ImageFormat::Png);
    png[16..26].copy_from_slice(&[0, 0, 0x1B, 0x58, 0, 0, 0x13, 0x88, 16, 6]); // 7,000 × 5,000, RGBA, 16 bits
    let crc = crc32(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    assert_eq!(accept(&png).unwrap_err().code(), Code::PayloadTooLarge);
}

#[test]
fn any_cut_of_a_photo_is_refused_or_stored_but_never_panics() {
    for bytes in [jpeg_with_metadata(), png_with_metadata(&exif()), webp_with_metadata(&exif())] {
        for end in 0..bytes.len() {
            if let Err(error) = accept(&bytes[..end]) {
                assert!(matches!(error.http_status(), 413 | 415 | 422), "{error}");
            }
        }
    }
}
