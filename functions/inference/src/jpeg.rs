//! Whether the compressed pixels of a JPEG are whole.
//!
//! Decoders paint what is missing grey and say nothing; a prediction on it would be one on no
//! lesion. Called with the stored bytes before they are decoded; reads nothing else and writes
//! nothing. It walks the Huffman codes of every scan without making pixels and holds them against
//! what an encoder can write: each code is in its table, each block and restart marker is in its
//! place, nothing is left over, and no block says more than eight-bit samples can.
//!
//! Format: ITU-T T.81 (1992), letters and figures below are its. Known: baseline, extended
//! sequential and progressive with Huffman codes, 8 bits; the rest is refused, as the decoder does.
//!
//! What passes: a damage that swaps value bits for others (the walk stays in step and no value
//! leaves its range), and one after which the codes fall into step at the same block. Restart
//! intervals and progressive scans leave less room for the second.

mod huffman;
mod quarter;
mod scan;
mod sequential;

use huffman::Huffman;
use quarter::Planes;
pub use quarter::{Least, Quarter};
use scan::Scan;

/// The compressed pixels of a JPEG are not whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("damaged JPEG: {0}")]
pub struct Damaged(&'static str);

type Result<T> = std::result::Result<T, Damaged>;

const CUT_SHORT: Damaged = Damaged("the data ends too early");
const SEGMENT: Damaged = Damaged("a header is no header");
const NO_TABLE: Damaged = Damaged("a scan names a table that is not there");
const TOO_FAR: Damaged = Damaged("a coefficient beyond its band");
const TOO_LARGE: Damaged = Damaged("a value that no photo has");

/// The largest DC: eight times the mean of samples within ±128, and room for inexact transforms.
const MAX_DC: u32 = 1024 + 64;
/// The largest length of a block's AC coefficients together: 64 samples of ±128 (Parseval), and a
/// quarter for encoders that overshoot white and black on purpose (mozjpeg, by up to 31 of 128).
const MAX_AC: f64 = 1024.0 + 256.0;
/// A few bytes can end all blocks of a scan, so it is the scans that bound the time. Encoders write
/// ten or so; the decoder (zune-jpeg) takes as many as here.
const MAX_SCANS: usize = 100;
/// No scan has brought the coefficient yet.
const NOT_YET: u8 = u8::MAX;

/// Walks every scan of a JPEG from its start marker to its end marker, without decoding pixels.
///
/// Memory is bounded by the frame header (8 bytes for each 64 samples, progressive only): check
/// the dimensions first.
///
/// # Errors
/// [`Damaged`] where an encoder cannot have written these bytes, or where this walk does not know
/// the process: arithmetic, lossless, hierarchical, 12 bits, height told later (DNL).
pub fn check(bytes: &[u8]) -> Result<()> {
    walk(bytes, None).map(drop)
}

/// As [`check`], and where the JPEG is large enough for it and of the usual kind, its pixels at a
/// quarter of its width and height: `None` leaves them to the decoder.
///
/// # Errors
/// Those of [`check`].
pub fn check_and_reduce(bytes: &[u8], least: Least) -> Result<Option<Quarter>> {
    walk(bytes, Some(least)).map(|planes| planes.and_then(Planes::finish))
}

fn walk(bytes: &[u8], least: Option<Least>) -> Result<Option<Planes>> {
    let mut rest = bytes.strip_prefix(&[0xFF, 0xD8]).ok_or(Damaged("no start marker"))?;
    let mut tables = Tables::default();
    let mut frame = None;
    let mut planes = None;
    let (mut scans, mut is_rgb) = (0, false);
    loop {
        let marker = take_marker(&mut rest)?;
        if marker == 0xD9 {
            break;
        }
        let length = u16::from_be_bytes(take(&mut rest)?);
        let body = usize::from(length).checked_sub(2).and_then(|length| rest.split_at_checked(length));
        let (segment, tail) = body.ok_or(CUT_SHORT)?;
        rest = tail;
        match marker {
            0xDB => tables.quantisers(segment)?,
            0xC4 => tables.codes(segment)?,
            0xDD => tables.restart = u16::from_be_bytes(segment.try_into().map_err(|_| SEGMENT)?).into(),
            0xC0..=0xC2 if frame.is_none() => frame = Some(Frame::read(segment, marker == 0xC2)?),
            0xDA => {
                scans += 1;
                let frame = frame.as_mut().filter(|_| scans <= MAX_SCANS).ok_or(SEGMENT)?;
                let scan = Scan::read(segment, frame, &tables)?;
                if scan.parts.iter().map(|part| part.component).eq(0..3) && !is_rgb {
                    planes = least.and_then(|least| Planes::of(frame, least));
                }
                rest = match frame.progressive {
                    true => scan.walk_progressive(rest, frame, tables.restart)?,
                    false => scan.walk_sequential(rest, frame, tables.restart, planes.as_mut())?,
                };
            }
            // Adobe's segment says that the colours are not turned to luma and differences.
            0xEE => is_rgb |= segment.starts_with(b"Adobe") && segment.get(11) == Some(&0),
            0xE0..=0xEF | 0xFE => {}
            _ => return Err(Damaged("a marker that no photo has")),
        }
    }
    let complete = frame.is_some_and(|frame| frame.components.iter().all(|part| part.reached == [0; 64]));
    match (complete, rest) {
        (true, []) => Ok(planes),
        (true, _) => Err(Damaged("bytes after the end marker")),
        (false, _) => Err(Damaged("a scan is missing")),
    }
}

/// Whether the first frame is progressive: a decoder keeps the coefficients of one in memory.
/// `false` where no frame is found.
#[must_use]
pub fn is_progressive(bytes: &[u8]) -> bool {
    let mut rest = bytes.get(2..).unwrap_or_default();
    while let (Ok(marker), Ok(length)) = (take_marker(&mut rest), take(&mut rest)) {
        if matches!(marker, 0xC0..=0xC2 | 0xDA) {
            return marker == 0xC2;
        }
        rest = rest.get(usize::from(u16::from_be_bytes(length)).saturating_sub(2)..).unwrap_or_default();
    }
    false
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N]> {
    let (head, tail) = bytes.split_first_chunk().ok_or(CUT_SHORT)?;
    *bytes = tail;
    Ok(*head)
}

/// 0xFF, any number of fill bytes 0xFF, and the code (B.1.1.2).
fn take_marker(bytes: &mut &[u8]) -> Result<u8> {
    let [0xFF] = take(bytes)? else { return Err(Damaged("data where a marker should be")) };
    loop {
        match take(bytes)? {
            [0xFF] => {}
            [code] => return Ok(code),
        }
    }
}

/// What stays in force from one scan to the next until it is defined again (B.2.4).
#[derive(Default)]
struct Tables {
    /// Zigzag order.
    quantisers: [Option<[u16; 64]>; 4],
    dc: [Option<Huffman>; 4],
    ac: [Option<Huffman>; 4],
    /// MCUs between restart markers; 0: none.
    restart: usize,
}

impl Tables {
    fn quantisers(&mut self, mut segment: &[u8]) -> Result<()> {
        while !segment.is_empty() {
            let [head] = take(&mut segment)?;
            let slot = self.quantisers.get_mut(usize::from(head & 15)).ok_or(SEGMENT)?;
            let mut table = [0; 64];
            for step in &mut table {
                *step = match head >> 4 {
                    0 => u8::from_be_bytes(take(&mut segment)?).into(),
                    1 => u16::from_be_bytes(take(&mut segment)?),
                    _ => return Err(SEGMENT),
                };
            }
            *slot = Some(table).filter(|table| !table.contains(&0));
        }
        Ok(())
    }

    fn codes(&mut self, mut segment: &[u8]) -> Result<()> {
        while !segment.is_empty() {
            let [head] = take(&mut segment)?;
            let class = match head >> 4 {
                0 => &mut self.dc,
                1 => &mut self.ac,
                _ => return Err(SEGMENT),
            };
            let slot = class.get_mut(usize::from(head & 15)).ok_or(SEGMENT)?;
            *slot = Some(Huffman::read(&mut segment, head >> 4 == 0)?);
        }
        Ok(())
    }
}

struct Frame {
    progressive: bool,
    /// Width and height in pixels.
    sides: [usize; 2],
    /// MCUs of a scan with several components, and how many lie in a row.
    mcus: usize,
    mcus_across: usize,
    components: Vec<Component>,
}

struct Component {
    id: u8,
    /// Blocks in an MCU of a scan with several components, across and down.
    factors: [usize; 2],
    blocks: usize,
    quantiser: usize,
    /// By coefficient: the lowest bit that a scan has brought, or [`NOT_YET`].
    reached: [u8; 64],
    /// By block, a bit for each coefficient: no longer zero. Empty until a scan leaves bits for later.
    nonzero: Vec<u64>,
}

impl Frame {
    fn read(mut segment: &[u8], progressive: bool) -> Result<Self> {
        let [8, y1, y0, x1, x0, count @ 1..=4] = take(&mut segment)? else {
            return Err(Damaged("a frame that photos do not have"));
        };
        let sides = [u16::from_be_bytes([x1, x0]), u16::from_be_bytes([y1, y0])].map(usize::from);
        let (parts, []) = segment.as_chunks::<3>() else { return Err(SEGMENT) };
        let factors = |factors: u8| [factors >> 4, factors & 15].map(usize::from);
        let legal = |[_, sampling, _]: &[u8; 3]| factors(*sampling).iter().all(|factor| (1..=4).contains(factor));
        if parts.len() != usize::from(count) || sides.contains(&0) || !parts.iter().all(legal) {
            return Err(SEGMENT);
        }
        let sampling = parts.iter().map(|part| factors(part[1]));
        let [widest, highest] = sampling.fold([1, 1], |[h, v], part| [h.max(part[0]), v.max(part[1])]);
        let [width, height] = sides;
        let component = |&[id, sampling, quantiser]: &[u8; 3]| {
            let [h, v] = factors(sampling);
            let blocks = (width * h).div_ceil(widest).div_ceil(8) * (height * v).div_ceil(highest).div_ceil(8);
            let quantiser = quantiser.into();
            Component { id, factors: [h, v], blocks, quantiser, reached: [NOT_YET; 64], nonzero: Vec::new() }
        };
        let mcus_across = width.div_ceil(8 * widest);
        let mcus = mcus_across * height.div_ceil(8 * highest);
        Ok(Self { progressive, sides, mcus, mcus_across, components: parts.iter().map(component).collect() })
    }
}

#[cfg(test)]
mod tests;
