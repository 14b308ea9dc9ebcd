//! Fixtures: `model/samples/mole-drawn.png`, 161×121 or 160×120, written by Pillow (libjpeg-turbo);
//! `a-scan-each` by its cjpeg, `a-byte-of-ones` by jpeg-js.

use super::*;

const PHOTOS: [(&str, &[u8]); 9] = [
    ("baseline-420", include_bytes!("../../fixtures/baseline-420.jpg")),
    ("baseline-444", include_bytes!("../../fixtures/baseline-444.jpg")),
    ("grey", include_bytes!("../../fixtures/grey.jpg")),
    ("cmyk", include_bytes!("../../fixtures/cmyk.jpg")),
    ("optimised-tables", include_bytes!("../../fixtures/optimised-tables.jpg")),
    ("a-scan-each", include_bytes!("../../fixtures/a-scan-each.jpg")),
    ("restarts", RESTARTS),
    ("progressive", PROGRESSIVE),
    ("progressive-restarts", include_bytes!("../../fixtures/progressive-restarts.jpg")),
];
/// 80 MCUs, ten to an interval.
const RESTARTS: &[u8] = include_bytes!("../../fixtures/restarts.jpg");
const PROGRESSIVE: &[u8] = include_bytes!("../../fixtures/progressive.jpg");
const SEEDS: u64 = 100;

/// Steele and Vigna's SplitMix64: damages are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ mixed >> 31) % end as u64) as usize
    }
}

/// Where the entropy-coded data of each scan lies.
fn scans(jpeg: &[u8]) -> Vec<std::ops::Range<usize>> {
    let (mut at, mut found) = (2, Vec::new());
    while jpeg[at + 1] != 0xD9 {
        let marker = jpeg[at + 1];
        at += 2 + usize::from(u16::from_be_bytes([jpeg[at + 2], jpeg[at + 3]]));
        if marker == 0xDA {
            let ends = |pair: &[u8]| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xD0..=0xD7);
            let length = jpeg[at..].windows(2).position(ends).unwrap();
            found.push(at..at + length);
            at += length;
        }
    }
    found
}

/// From the first scan's data to the end of the last one's.
fn span(jpeg: &[u8]) -> std::ops::Range<usize> {
    let scans = scans(jpeg);
    scans[0].start..scans[scans.len() - 1].end
}

/// How many of [`SEEDS`] damages are refused, of each photo.
fn refused(damage: impl Fn(&mut Vec<u8>, &mut Random)) -> [u64; PHOTOS.len()] {
    PHOTOS.map(|(_, photo)| {
        let seeds = (0..SEEDS).filter(|seed| {
            let mut damaged = photo.to_vec();
            damage(&mut damaged, &mut Random(*seed));
            check(&damaged).is_err()
        });
        seeds.count() as u64
    })
}

/// A grey JPEG of two blocks, steps of 16. One DC code, `0`; two AC codes, `0` and `1`. A scan is
/// the last three bytes of its header and its bits.
fn tiny(frame: u8, dc: u8, ac: [u8; 2], scans: &[([u8; 3], &str)]) -> Vec<u8> {
    let mut jpeg = vec![0xFF, 0xD8, 0xFF, 0xDB, 0, 67, 0];
    jpeg.extend([16; 64]);
    jpeg.extend([0xFF, frame, 0, 11, 8, 0, 8, 0, 16, 1, 1, 0x11, 0]);
    jpeg.extend([0xFF, 0xC4, 0, 20, 0x00, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, dc]);
    jpeg.extend([0xFF, 0xC4, 0, 21, 0x10, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ac[0], ac[1]]);
    for ([first, last, bits], data) in scans {
        jpeg.extend([0xFF, 0xDA, 0, 8, 1, 1, 0, *first, *last, *bits]);
        let data: Vec<u8> = data.bytes().filter(u8::is_ascii_digit).collect();
        let byte = |byte: &[u8]| (0..8).fold(0, |sum, at| sum << 1 | byte.get(at).map_or(1, |bit| bit & 1));
        jpeg.extend(data.chunks(8).map(byte));
    }
    jpeg.extend([0xFF, 0xD9]);
    jpeg
}

/// Six bits follow the DC code and the AC code `1`; `0` ends the block.
fn two_blocks(bits: &str) -> Vec<u8> {
    tiny(0xC0, 6, [0x00, 0x06], &[([0, 63, 0], bits)])
}

#[test]
fn whole_photos_of_every_kind_pass() {
    for (name, photo) in PHOTOS {
        assert_eq!(check(photo), Ok(()), "{name}");
    }
    assert_eq!(check(include_bytes!("../../fixtures/a-byte-of-ones.jpg")), Ok(()));
}

#[test]
fn a_scan_with_zeros_instead_of_its_data_is_refused() {
    let zeroed = refused(|photo, random| {
        let span = span(photo);
        let start = span.start + random.below(span.len() * 7 / 10);
        photo[start..start + span.len() * 3 / 10].fill(0);
    });
    assert_eq!(zeroed, [SEEDS; PHOTOS.len()]);
}

#[test]
fn a_scan_with_a_piece_cut_out_is_refused() {
    let cut = refused(|photo, random| {
        let span = span(photo);
        let start = span.start + random.below(span.len() * 7 / 10);
        photo.drain(start..start + span.len() * 3 / 10);
    });
    assert_eq!(cut, [SEEDS; PHOTOS.len()]);
}

#[test]
fn a_photo_that_ends_early_is_refused_even_with_an_end_marker() {
    for (name, photo) in PHOTOS {
        for end in (2..photo.len() - 2).step_by(3) {
            assert!(check(&photo[..end]).is_err(), "{name} {end}");
            assert!(check(&[&photo[..end], &[0xFF, 0xD9]].concat()).is_err(), "{name} {end} and FFD9");
        }
    }
}

#[test]
fn a_progressive_photo_without_its_last_scans_is_refused() {
    let scans = scans(PROGRESSIVE);
    assert!(scans.len() > 5);
    for scan in &scans[..scans.len() - 1] {
        let cut = [&PROGRESSIVE[..scan.end], &[0xFF, 0xD9]].concat();
        assert_eq!(check(&cut), Err(Damaged("a scan is missing")));
    }
}

#[test]
fn a_scan_with_random_bytes_in_it_is_nearly_always_refused() {
    let refused = refused(|photo, random| {
        let span = span(photo);
        let start = span.start + random.below(span.len() * 9 / 10);
        photo[start..start + span.len() / 10].fill_with(|| random.below(256) as u8);
    });
    assert!(refused.iter().all(|count| *count >= SEEDS * 97 / 100), "{refused:?}");
}

/// One flipped bit often stays within its block and leaves legal values: only many are told surely.
#[test]
fn twenty_flipped_bits_are_mostly_refused() {
    let refused = refused(|photo, random| {
        let data: Vec<usize> = scans(photo).into_iter().flatten().collect();
        for _ in 0..20 {
            photo[data[random.below(data.len())]] ^= 1 << random.below(8);
        }
    });
    assert!(refused.iter().all(|count| *count >= SEEDS * 85 / 100), "{refused:?}");
    assert!(refused.iter().sum::<u64>() >= SEEDS * PHOTOS.len() as u64 * 95 / 100, "{refused:?}");
}

#[test]
fn restart_markers_must_be_in_their_places_and_in_order() {
    let markers = |photo: &[u8]| {
        let inner = span(photo).filter(|at| photo[*at] == 0xFF && matches!(photo[at + 1], 0xD0..=0xD7));
        inner.collect::<Vec<_>>()
    };
    let found = markers(RESTARTS);
    assert_eq!(found.len(), 7);
    for at in found {
        let mut photo = RESTARTS.to_vec();
        photo[at + 1] = 0xD0 | ((photo[at + 1] + 1) & 7);
        assert!(check(&photo).is_err(), "{at} another");
        photo.drain(at..at + 2);
        assert!(check(&photo).is_err(), "{at} missing");
    }
}

#[test]
fn a_restart_marker_behind_the_last_interval_passes_where_it_is_the_next_one() {
    let behind = |marker| [&RESTARTS[..RESTARTS.len() - 2], &[0xFF, marker, 0xFF, 0xD9]].concat();
    assert_eq!(check(&behind(0xD7)), Ok(()));
    assert!(check(&behind(0xD0)).is_err());
}

#[test]
fn nothing_may_follow_the_last_block_or_the_end_marker() {
    for (name, photo) in PHOTOS {
        let end = photo.len() - 2;
        assert!(check(&[&photo[..end], &[0x5A, 0xFF, 0xD9]].concat()).is_err(), "{name}");
        assert!(check(&[&photo[..end], &[0x00, 0x00, 0xFF, 0xD9]].concat()).is_err(), "{name}");
        assert_eq!(check(&[photo, &[0]].concat()), Err(Damaged("bytes after the end marker")), "{name}");
    }
}

#[test]
fn values_that_eight_bit_samples_cannot_give_are_refused() {
    for (bits, expected) in [
        ("0 111111 0   0 000000 0", Ok(())),
        ("0 111111 0   0 111111 0", Err(TOO_LARGE)), // DC 63 + 63, of which each step is 16
        ("0 000000 0   0 000000 0", Err(TOO_LARGE)),
        ("0 100000 1 111111 0   0 011111 0", Ok(())),
        ("0 100000 1 111110 1 111111 0   0 011111 0", Err(TOO_LARGE)),
        ("0 100000 0", Err(CUT_SHORT)),
    ] {
        assert_eq!(check(&two_blocks(bits)), expected, "{bits}");
    }
}

#[test]
fn codes_that_no_encoder_writes_there_are_refused() {
    const SEQUENTIAL: [u8; 3] = [0, 63, 0];
    for (what, dc, ac, bits, expected) in [
        ("DC of twelve bits", 12, [0, 0], "0 100000000000 0   0 011111111111 0", TOO_LARGE),
        ("DC with zeros before it", 0x11, [0, 0], "0 1 0   0 0 0", TOO_LARGE),
        ("AC of eleven bits", 0, [0x00, 0x0B], "0 1 10000000000 0   0 0", TOO_LARGE),
        ("65th coefficient", 0, [0x00, 0xF1], "0 1 0 1 0 1 0 1 0 0   0 0", TOO_FAR),
        ("zeros up to the end", 0, [0xF0, 0xE1], "0 0 0 1 0 0   0 0", TOO_FAR),
        ("a run of ends", 0, [0x10, 0x00], "0 0 0", Damaged("a code that sequential scans do not have")),
        ("a code of no table", 0, [0x00, 0x00], "", CUT_SHORT),
    ] {
        assert_eq!(check(&tiny(0xC0, dc, ac, &[(SEQUENTIAL, bits)])), Err(expected), "{what}");
    }
    let mut overfull = tiny(0xC0, 0, [0, 0], &[(SEQUENTIAL, "0 0 0 0")]);
    assert_eq!(check(&overfull), Ok(()));
    let table = overfull.windows(5).position(|head| head == [0xFF, 0xC4, 0, 21, 0x10]).unwrap();
    (overfull[table + 3], overfull[table + 5]) = (22, 3);
    overfull.insert(table + 21, 1);
    assert_eq!(check(&overfull), Err(Damaged("a table has more codes than fit")));
}

#[test]
fn progressive_scans_must_follow_on_each_other_and_end_with_their_blocks() {
    const DC: ([u8; 3], &str) = ([0, 0, 0], "0 0");
    let order = Err(Damaged("a scan does not follow on those before it"));
    let ended = Err(Damaged("more blocks are ended than there are"));
    for (what, ac, scans, expected) in [
        ("whole", [0x10, 0x00], vec![DC, ([1, 63, 0], "0 0")], Ok(())),
        ("three ends for two blocks", [0x10, 0x00], vec![DC, ([1, 63, 0], "0 1")], ended),
        ("beyond the band", [0x00, 0x71], vec![DC, ([1, 5, 0], "1 0")], Err(TOO_FAR)),
        ("refined", [0x00, 0xF1], vec![DC, ([1, 63, 1], "1 1 0   0"), ([1, 63, 0x10], "1 1 0 0   0")], Ok(())),
        (
            "refined too far",
            [0x00, 0xF1],
            vec![DC, ([1, 63, 1], "0 0"), ([1, 63, 0x10], "1 1 1 1 1 0 1 0")],
            Err(TOO_FAR),
        ),
        ("AC before DC", [0x00, 0x01], vec![([1, 63, 0], "0 0"), DC], order),
        ("DC twice", [0x00, 0x01], vec![DC, DC], order),
        ("a bit left out", [0x00, 0x01], vec![DC, ([1, 63, 2], "0 0"), ([1, 63, 0x20], "0 0")], order),
    ] {
        assert_eq!(check(&tiny(0xC2, 0, ac, &scans)), expected, "{what}");
    }
}

#[test]
fn a_file_cannot_have_its_blocks_walked_without_end() {
    let scans = |lowest: u8| {
        let bands = (0..=lowest).rev().flat_map(|low| (1..64).map(move |at| (at, low)));
        let bits = |low| if low == lowest { low } else { (low + 1) << 4 | low };
        let bands = bands.map(|(at, low)| ([at, at, bits(low)], "0 0"));
        std::iter::once(([0, 0, 0], "0 0")).chain(bands).collect::<Vec<_>>()
    };
    assert_eq!(check(&tiny(0xC2, 0, [0x00, 0x01], &scans(0))), Ok(()));
    assert_eq!(check(&tiny(0xC2, 0, [0x00, 0x01], &scans(1))), Err(SEGMENT));
}

#[test]
fn frames_that_the_decoder_does_not_know_are_refused() {
    let grey = two_blocks("0 100000 0   0 011111 0");
    assert_eq!(check(&grey), Ok(()));
    let frame = grey.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    for (what, at, value) in [
        ("lossless", 1, 0xC3),
        ("hierarchical", 1, 0xC5),
        ("arithmetic", 1, 0xC9),
        ("12 bits", 4, 12),
        ("height told later", 6, 0),
        ("no width", 8, 0),
        ("no components", 9, 0),
        ("no sampling", 11, 0x01),
        ("no such quantiser", 12, 1),
    ] {
        let mut other = grey.clone();
        other[frame + at] = value;
        assert!(check(&other).is_err(), "{what}");
    }
    for side in [6, 8] {
        let mut empty = two_blocks("");
        empty[frame + side] = 0;
        assert_eq!(check(&empty), Err(SEGMENT), "no pixels and no data for them");
    }
}

#[test]
fn no_bytes_make_the_walk_panic() {
    for (name, photo) in PHOTOS {
        let headers = scans(photo)[0].start;
        for at in (0..headers).chain((headers..photo.len()).step_by(11)) {
            for value in [0x00, 0x01, 0x7F, 0xFF, photo[at].wrapping_add(1), photo[at] ^ 0x10] {
                let mut mutated = photo.to_vec();
                mutated[at] = value;
                let _ = check(&mutated);
            }
        }
        let mut random = Random(name.len() as u64);
        for _ in 0..500 {
            let mut mutated = photo.to_vec();
            for _ in 0..=random.below(12) {
                let at = random.below(mutated.len());
                mutated[at] = random.below(256) as u8;
            }
            let _ = check(&mutated);
        }
    }
}

#[test]
fn a_quarter_is_what_averaging_every_pixel_gives() {
    let least = Least { longer: 1, shorter: 1 };
    let usual = ["baseline-420", "baseline-444", "optimised-tables", "restarts"];
    for (name, photo) in PHOTOS {
        let quarter = check_and_reduce(photo, least).unwrap();
        assert_eq!(quarter.is_some(), usual.contains(&name), "{name}");
        let Some(Quarter { pixels, side_px }) = quarter else { continue };
        let whole = image::load_from_memory(photo).unwrap().into_rgb8();
        assert_eq!(side_px, whole.height(), "{name}");
        assert_eq!(pixels.dimensions(), (whole.width() / 4, whole.height() / 4), "{name}");
        let mut differences = Vec::new();
        for (x, y, pixel) in pixels.enumerate_pixels() {
            for channel in 0..3 {
                let square = (0..16).map(|at| whole.get_pixel(4 * x + at % 4, 4 * y + at / 4).0[channel]);
                let mean = square.map(f64::from).sum::<f64>() / 16.0;
                differences.push((f64::from(pixel.0[channel]) - mean).abs());
            }
        }
        let mean = differences.iter().sum::<f64>() / differences.len() as f64;
        println!("{name}: {mean:.2} levels apart on average");
        assert!(mean < 2.0, "{name}: {mean}");
    }
}

#[test]
fn a_small_photo_and_one_without_luma_are_left_to_the_decoder() {
    let (_, photo) = PHOTOS[1];
    let reduced = |photo: &[u8], longer, shorter| check_and_reduce(photo, Least { longer, shorter }).unwrap().is_some();
    let whole = image::load_from_memory(photo).unwrap();
    let [longer, shorter] = [whole.width() / 4, whole.height() / 4];
    assert!(reduced(photo, longer, shorter));
    assert!(!reduced(photo, longer + 1, shorter));
    assert!(!reduced(photo, longer, shorter + 1));
    let adobe = |transform: u8| {
        let segment = [&[0xFF, 0xEE, 0, 14][..], b"Adobe", &[0, 100, 0, 0, 0, 0, transform]].concat();
        [&photo[..2], &segment, &photo[2..]].concat()
    };
    assert!(reduced(&adobe(1), longer, shorter));
    assert!(!reduced(&adobe(0), longer, shorter));
}
