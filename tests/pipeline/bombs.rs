//! Small photos that would be large: refused by their header, or decoded within the stated cap.

use image::{DynamicImage, ImageFormat};
use inference::bundle::Bundle;
use inference::picture;
use shared::api::MAX_UPLOAD_BYTES;
use shared::clock::Clock;
use shared::http::Caller;
use shared::photo::{MAX_PIXELS, accept};
use shared::ports::BlobStore;
use submit::body::ImageKey;

use crate::support::memory::{MIB, is_alone, peak_of};
use crate::support::{open, root};
use crate::uploads::upload_body;

/// What taking one photo in may hold besides the received bytes: some copies of 4 MiB, and what a
/// decoder sets up to read a header.
const ACCEPT_CAP: u64 = 32 * MIB;
/// As much for 25 MiB, which are read from the store first.
const ACCEPT_UPLOAD_CAP: u64 = 64 * MIB;
/// What one worker may hold for the largest photo that is accepted: docs/ARCHITECTURE.md names it.
const DECODE_CAP: u64 = 640 * MIB;

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}

fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let named = [kind, data].concat();
    [&(data.len() as u32).to_be_bytes(), &named[..], &crc32(&named).to_be_bytes()].concat()
}

/// A PNG of `[width, height]` pixels with these chunks between its header and its pixels.
fn png([width, height]: [u32; 2], depth: u8, colour: u8, between: &[u8], idat: &[u8]) -> Vec<u8> {
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[depth, colour, 0, 0, 0]].concat();
    [b"\x89PNG\r\n\x1A\n", &chunk(b"IHDR", &header)[..], between, &chunk(b"IDAT", idat), &chunk(b"IEND", b"")].concat()
}

/// Bits as deflate packs them: the least significant of a byte first.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    used: usize,
}

impl Bits {
    fn push(&mut self, bits: impl IntoIterator<Item = u8>) {
        for bit in bits {
            if self.used.is_multiple_of(8) {
                self.bytes.push(0);
            }
            *self.bytes.last_mut().unwrap() |= bit << (self.used % 8);
            self.used += 1;
        }
    }
}

/// A zlib stream (RFC 1950, 1951) of one zero and `copies` times 258 more: 13 bits for each copy.
fn zeros(copies: usize) -> Vec<u8> {
    let mut bits = Bits { bytes: vec![0x78, 0x01], used: 16 };
    bits.push([1, 1, 0]);
    bits.push([0, 0, 1, 1, 0, 0, 0, 0]);
    for _ in 0..copies {
        bits.push([1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0]);
    }
    bits.push([0; 7]);
    let sum = ((1 + copies * 258) % 65_521) as u32;
    bits.bytes.extend_from_slice(&(sum << 16 | 1).to_be_bytes());
    bits.bytes
}

fn zeros_of(bytes: u64) -> Vec<u8> {
    zeros(usize::try_from(bytes).unwrap().div_ceil(258))
}

fn segment(marker: u8, payload: &[u8]) -> Vec<u8> {
    [&[0xFF, marker][..], &((payload.len() + 2) as u16).to_be_bytes(), payload].concat()
}

/// Everything of a JPEG before its scans: one quantiser, one code a table, no subsampling.
fn jpeg_head(frame: u8, [width, height]: [u16; 2], components: u8) -> Vec<u8> {
    let mut size = vec![8];
    size.extend([height.to_be_bytes(), width.to_be_bytes()].concat());
    size.push(components);
    size.extend((1..=components).flat_map(|id| [id, 0x11, 0]));
    let table = |class: u8, symbol: u8| {
        let counts = [&[1][..], &[0; 15]].concat();
        segment(0xC4, &[&[class], &counts[..], &[symbol]].concat())
    };
    let quantiser = segment(0xDB, &[&[0][..], &[1; 64]].concat());
    [&[0xFF, 0xD8][..], &quantiser, &segment(frame, &size), &table(0x00, 0), &table(0x10, 0xE0)].concat()
}

/// A whole progressive JPEG of 49 megapixels, all grey: a bit for each block's DC, and one code of
/// 15 bits that ends 16,384 blocks' AC.
fn progressive(components: u8) -> Vec<u8> {
    let (width, height) = (8 * 1024_u16, 8 * 752_u16);
    let blocks = usize::from(width) / 8 * (usize::from(height) / 8);
    let mut jpeg = jpeg_head(0xC2, [width, height], components);
    let dc: Vec<u8> = (1..=components).flat_map(|id| [id, 0]).collect();
    jpeg.extend(segment(0xDA, &[&[components][..], &dc, &[0, 0, 0]].concat()));
    jpeg.extend(vec![0; blocks * usize::from(components) / 8]);
    for id in 1..=components {
        jpeg.extend(segment(0xDA, &[1, id, 0, 1, 63, 0]));
        // 47 codes are 705 bits: 88 bytes and one bit, filled up with ones.
        jpeg.extend([&[0; 88][..], &[0x7F]].concat());
    }
    jpeg.extend([0xFF, 0xD9]);
    jpeg
}

fn webp(chunks: &[(&[u8; 4], Vec<u8>)]) -> Vec<u8> {
    let mut body = b"WEBP".to_vec();
    for (kind, data) in chunks {
        body.extend_from_slice(*kind);
        body.extend((data.len() as u32).to_le_bytes());
        body.extend(data);
        body.resize(body.len() + data.len() % 2, 0);
    }
    [b"RIFF", &(body.len() as u32).to_le_bytes()[..], &body].concat()
}

/// A lossless picture of one colour: every prefix code has one symbol, so pixels take no bits.
fn vp8l(width: u32, height: u32) -> Vec<u8> {
    let size = (width - 1) | (height - 1) << 14;
    // No transform, no cache, no groups; five codes of one symbol each.
    let mut bits = Bits::default();
    bits.push([0, 0, 0]);
    (0..5).for_each(|_| bits.push([1, 0, 0, 0]));
    [&[0x2F][..], &size.to_le_bytes(), &bits.bytes, &[0; 8]].concat()
}

fn vp8(width: u16, height: u16) -> Vec<u8> {
    [&[0x10, 0x02, 0x00, 0x9D, 0x01, 0x2A][..], &width.to_le_bytes(), &height.to_le_bytes(), &[0; 64]].concat()
}

fn canvas(side: u32) -> Vec<u8> {
    let side = (side - 1).to_le_bytes();
    [&[0x10, 0, 0, 0][..], &side[..3], &side[..3]].concat()
}

/// Frames of an animated PNG: a control chunk that announces four thousand million of them.
fn animation() -> Vec<u8> {
    let control = chunk(b"acTL", &[0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0]);
    let frame = [&[0; 4][..], &60_000_u32.to_be_bytes(), &60_000_u32.to_be_bytes(), &[0; 14]].concat();
    [control, chunk(b"fcTL", &frame), chunk(b"fdAT", &zeros_of(100 * MIB))].concat()
}

/// A bomb, and the statuses with which it may be refused; 202 where what is left of it is harmless.
type Bomb = (&'static str, Vec<u8>, &'static [u16]);

fn bombs() -> Vec<Bomb> {
    let small = [8, 8];
    let dot = zeros(1);
    let large = [60_000, 60_000];
    let profile = [b"p\0\0", &zeros_of(330 * MIB)[..]].concat();
    let text = [b"Comment\0\0", &zeros_of(330 * MIB)[..]].concat();
    let international = [b"Comment\0\x01\0\0\0", &zeros_of(330 * MIB)[..]].concat();
    let many: Vec<u8> = (0..40_000).flat_map(|_| chunk(b"zTXt", b"Comment\0\0\x78\x01")).collect();
    let whole = progressive(3);
    let mut inside = png(small, 8, 2, &chunk(b"iCCP", &profile), &dot);
    let nested = [&jpeg_head(0xC0, [8, 8], 1)[..2], &segment(0xE2, &inside[..60_000]), &whole[2..]].concat();
    inside.truncate(inside.len() / 2);
    let twice = [&jpeg_head(0xC0, [8, 8], 1)[..], &jpeg_head(0xC2, [65_500, 65_500], 3)[2..], &whole[2..]].concat();
    let exif = [&b"EXIF"[..], &u32::MAX.to_le_bytes(), b"II*\0"].concat();
    let mut endless = webp(&[(b"VP8L", vp8l(8, 8))]);
    endless.extend(exif);
    endless[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    vec![
        ("PNG of 3,600 megapixels", png(large, 8, 6, b"", &dot), &[413]),
        ("PNG of 2^31 by 2^31", png([i32::MAX as u32; 2], 16, 6, b"", &dot), &[413, 422]),
        ("PNG, one pixel high", png([i32::MAX as u32, 1], 8, 2, b"", &dot), &[413, 422]),
        ("PNG within the cap, all zeros", png([7000, 7000], 8, 0, b"", &zeros_of(7001 * 7000)), &[202]),
        ("PNG with far more pixels than its header says", png(small, 8, 0, b"", &zeros_of(300 * MIB)), &[202]),
        ("PNG with a colour profile of 330 MiB", png(small, 8, 0, &chunk(b"iCCP", &profile), &dot), &[202, 413, 422]),
        ("PNG with a text of 330 MiB", png(small, 8, 0, &chunk(b"zTXt", &text), &dot), &[202, 413, 422]),
        ("PNG with international text", png(small, 8, 0, &chunk(b"iTXt", &international), &dot), &[202, 413, 422]),
        ("PNG with 40,000 texts", png(small, 8, 0, &many, &dot), &[202, 413, 422]),
        ("animated PNG", png(small, 8, 0, &animation(), &dot), &[202, 422]),
        ("PNG cut off", inside, &[422]),
        (
            "baseline JPEG of 4,290 megapixels",
            [jpeg_head(0xC0, [65_500; 2], 3), whole[400..].to_vec()].concat(),
            &[413, 422],
        ),
        (
            "progressive JPEG of 4,290 megapixels",
            [jpeg_head(0xC2, [65_500; 2], 3), vec![0xFF, 0xDA, 0, 12, 3, 1, 0, 2, 0, 3, 0, 0, 0, 0, 0, 0xFF, 0xD9]]
                .concat(),
            &[413],
        ),
        ("JPEG that tells its height later", [jpeg_head(0xC0, [65_500, 0], 3), vec![0xFF, 0xD9]].concat(), &[422]),
        ("JPEG with a second, larger frame", twice, &[413, 422]),
        ("JPEG with a PNG in it", nested, &[202]),
        ("JPEG cut off", whole[..whole.len() / 2].to_vec(), &[422]),
        ("progressive JPEG within the cap", whole, &[202]),
        ("lossless WebP of 268 megapixels", webp(&[(b"VP8L", vp8l(16_383, 16_384))]), &[413, 422]),
        ("lossless WebP, one side within the cap", webp(&[(b"VP8L", vp8l(16_384, 8))]), &[413, 422]),
        ("lossless WebP of 268 megapixels less a row", webp(&[(b"VP8L", vp8l(16_383, 16_383))]), &[413]),
        ("lossless WebP within the cap", webp(&[(b"VP8L", vp8l(7000, 7000))]), &[202]),
        ("lossy WebP of 268 megapixels", webp(&[(b"VP8 ", vp8(16_383, 16_383))]), &[413, 422]),
        ("WebP canvas of 2^24", webp(&[(b"VP8X", canvas(1 << 24)), (b"VP8L", vp8l(8, 8))]), &[413, 422]),
        ("animated WebP", webp(&[(b"VP8X", canvas(8)), (b"ANIM", vec![0; 6]), (b"ANMF", vp8l(8, 8))]), &[415, 422]),
        ("WebP with metadata of 4 GiB", endless, &[422]),
        ("GIF that calls itself PNG", b"GIF89a\xFF\xFF\xFF\xFF\xF7\0\0".to_vec(), &[415]),
        ("zip", b"PK\x03\x04".to_vec(), &[415]),
        ("gzip", [b"\x1F\x8B\x08\0\0\0\0\0\0\xFF", &zeros(1000)[..]].concat(), &[415]),
        ("TIFF", b"II*\0\x08\0\0\0".to_vec(), &[415]),
    ]
}

#[test]
fn a_bomb_is_refused_by_its_header_or_taken_in_without_being_unpacked() {
    if !is_alone("bombs::a_bomb_is_refused_by_its_header_or_taken_in_without_being_unpacked") {
        return;
    }
    for (name, bytes, allowed) in bombs() {
        assert!(bytes.len() <= shared::api::MAX_PHOTO_BYTES, "{name}: {} bytes", bytes.len());
        let mut status = 202;
        let peak = peak_of(|| status = accept(&bytes).map_or_else(|error| error.http_status(), |_| 202));
        println!("{name}: {status}, {:.1} MiB", peak as f64 / MIB as f64);
        assert!(allowed.contains(&status), "{name}: {status}");
        assert!(peak <= ACCEPT_CAP, "{name}: {} MiB", peak / MIB);
    }
}

/// Beyond what may be submitted directly.
fn uploaded_bombs() -> Vec<Bomb> {
    let (small, dot, gib) = ([8, 8], zeros(1), zeros_of(1024 * MIB));
    let profile = [b"p\0\0", &gib[..]].concat();
    let text = [b"Comment\0\0", &gib[..]].concat();
    let many: Vec<u8> = (0..900_000).flat_map(|_| chunk(b"zTXt", b"Comment\0\0\x78\x01")).collect();
    vec![
        ("PNG of 3,600 megapixels", png([60_000; 2], 8, 0, b"", &gib), &[413]),
        ("PNG with far more pixels than its header says", png(small, 8, 0, b"", &gib), &[202]),
        ("PNG with a colour profile of 1 GiB", png(small, 8, 0, &chunk(b"iCCP", &profile), &dot), &[202, 413, 422]),
        ("PNG with a text of 1 GiB", png(small, 8, 0, &chunk(b"zTXt", &text), &dot), &[202, 413, 422]),
        ("PNG with 900,000 texts", png(small, 8, 0, &many, &dot), &[202, 413, 422]),
    ]
}

#[test]
fn an_uploaded_bomb_is_refused_by_its_header_or_taken_in_without_being_unpacked() {
    if !is_alone("bombs::an_uploaded_bomb_is_refused_by_its_header_or_taken_in_without_being_unpacked") {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (folder, caller) = (tempfile::tempdir().unwrap(), Caller("local".into()));
    let host = runtime.block_on(open(folder.path(), Clock::System, &[]));
    for (name, bytes, allowed) in uploaded_bombs() {
        assert!((4 * MIB..=MAX_UPLOAD_BYTES).contains(&(bytes.len() as u64)), "{name}: {} bytes", bytes.len());
        let permit = runtime.block_on(host.submit.permit(&caller, &upload_body(&bytes))).unwrap();
        runtime.block_on(host.blobs.put(&permit.image_key, bytes)).unwrap();
        let upload = ImageKey { image_key: permit.image_key, describe: false, callback_url: None };
        let mut status = 202;
        let peak = peak_of(|| {
            let accepted = runtime.block_on(host.submit.accept_upload(&caller, None, upload));
            status = accepted.map_or_else(|error| error.http_status(), |_| 202);
        });
        println!("{name}: {status}, {:.1} MiB", peak as f64 / MIB as f64);
        assert!(allowed.contains(&status), "{name}: {status}");
        assert!(peak <= ACCEPT_UPLOAD_CAP, "{name}: {} MiB", peak / MIB);
    }
}

#[test]
fn the_largest_photos_that_are_taken_are_decoded_within_the_cap() {
    if !is_alone("bombs::the_largest_photos_that_are_taken_are_decoded_within_the_cap") {
        return;
    }
    let deep = [5700, 5800];
    assert!(u64::from(deep[0]) * u64::from(deep[1]) * 6 <= MAX_PIXELS * 4);
    let drawn = DynamicImage::new_rgb8(7000, 7000);
    let mut baseline = std::io::Cursor::new(Vec::new());
    drawn.write_to(&mut baseline, ImageFormat::Jpeg).unwrap();
    drop(drawn);
    let photos = [
        ("PNG with alpha", png([7000, 7000], 8, 6, b"", &zeros_of(28_001 * 7000)), true),
        ("PNG of 16 bits", png(deep, 16, 2, b"", &zeros_of((5700 * 6 + 1) * 5800)), true),
        ("lossless WebP", webp(&[(b"VP8L", vp8l(7000, 7000))]), true),
        ("lossy WebP without pixels", webp(&[(b"VP8 ", vp8(7000, 7000))]), false),
        ("baseline JPEG", baseline.into_inner(), true),
        ("progressive JPEG", progressive(3), true),
        ("progressive JPEG, CMYK", progressive(4), true),
        ("PNG with too few pixels", png([7000, 7000], 8, 6, b"", &zeros(9)), false),
    ];
    let input = Bundle::from_directory(&root().join("model"), None).unwrap().manifest.input;
    for (name, bytes, whole) in photos {
        let accepted = accept(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut decoded = false;
        let reduced = peak_of(|| decoded = picture::decode_for(&accepted.bytes, 6, &input).is_ok());
        assert_eq!(decoded, whole, "{name}");
        let unreduced = peak_of(|| decoded = picture::decode(&accepted.bytes, 6).is_ok());
        assert_eq!(decoded, whole, "{name}");
        println!("{name}: {} MiB, without reducing it {} MiB", reduced / MIB, unreduced / MIB);
        assert!(reduced.max(unreduced) <= DECODE_CAP, "{name}: {} MiB", reduced.max(unreduced) / MIB);
    }
}
