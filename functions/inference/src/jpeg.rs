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
    let mut rest = bytes.strip_prefix(&[0xFF, 0xD8]).ok_or(Damaged("no start marker"))?;
    let mut tables = Tables::default();
    let mut frame = None;
    let mut scans = 0;
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
                rest = Scan::read(segment, frame, &tables)?.walk(rest, frame, tables.restart)?;
            }
            0xE0..=0xEF | 0xFE => {}
            _ => return Err(Damaged("a marker that no photo has")),
        }
    }
    let complete = frame.is_some_and(|frame| frame.components.iter().all(|part| part.reached == [0; 64]));
    match (complete, rest) {
        (true, []) => Ok(()),
        (true, _) => Err(Damaged("bytes after the end marker")),
        (false, _) => Err(Damaged("a scan is missing")),
    }
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
            *class.get_mut(usize::from(head & 15)).ok_or(SEGMENT)? = Some(Huffman::read(&mut segment)?);
        }
        Ok(())
    }
}

/// Codes of 1–16 bits (annex C).
struct Huffman {
    /// By the next nine bits: length in the high byte, symbol in the low; 0 where the code is longer.
    short: [u16; 512],
    /// By length − 1: the first sixteen bits that lie behind its codes, and how far a code lies
    /// before its symbol.
    long: [(u32, i32); 16],
    symbols: Vec<u8>,
}

impl Huffman {
    fn read(segment: &mut &[u8]) -> Result<Self> {
        let counts: [u8; 16] = take(segment)?;
        let total = counts.iter().copied().map(usize::from).sum();
        let (symbols, tail) = segment.split_at_checked(total).ok_or(CUT_SHORT)?;
        *segment = tail;
        let mut table = Self { short: [0; 512], long: [(0, 0); 16], symbols: symbols.to_vec() };
        let (mut code, mut symbols) = (0_u32, symbols.iter());
        for ((length, count), long) in (1_u16..).zip(counts).zip(&mut table.long) {
            let index = table.symbols.len() - symbols.len();
            *long = ((code + u32::from(count)) << (16 - length), index as i32 - code as i32);
            for symbol in symbols.by_ref().take(count.into()) {
                let (from, to) = (code << (16 - length), (code + 1) << (16 - length));
                if to > 1 << 16 {
                    return Err(Damaged("a table has more codes than fit"));
                }
                if length <= 9 {
                    let codes = table.short.get_mut((from >> 7) as usize..(to >> 7) as usize).ok_or(SEGMENT)?;
                    codes.fill(length << 8 | u16::from(*symbol));
                }
                code += 1;
            }
            code <<= 1;
        }
        Ok(table)
    }

    /// Length and symbol of the code that `next`, sixteen bits, begins with.
    #[inline]
    fn look_up(&self, next: u16) -> Result<(u32, u8)> {
        match self.short.get(usize::from(next >> 7)) {
            Some(&entry) if entry != 0 => Ok((u32::from(entry >> 8), entry as u8)),
            _ => self.look_up_long(next),
        }
    }

    #[cold]
    fn look_up_long(&self, next: u16) -> Result<(u32, u8)> {
        let found = (1..).zip(&self.long).find(|(_, (end, _))| u32::from(next) < *end);
        let symbol = found.and_then(|(length, (_, before))| {
            let index = i32::from(next >> (16 - length)).checked_add(*before)?;
            Some((length, *self.symbols.get(usize::try_from(index).ok()?)?))
        });
        symbol.ok_or(Damaged("a code that is in no table"))
    }
}

/// The bits up to the next marker; a 0x00 that follows 0xFF is taken out (B.1.1.5).
struct Bits<'a> {
    rest: &'a [u8],
    /// The low `count` bits are not read yet.
    buffer: u64,
    count: u32,
}

impl Bits<'_> {
    /// Up to 64 bits; whoever fills reads at least one, so that no shift is by 64.
    fn fill(&mut self) {
        while self.count <= 32 {
            if let Some((word, tail)) = self.rest.split_first_chunk()
                && !word.contains(&0xFF)
            {
                self.buffer = self.buffer << 32 | u64::from(u32::from_be_bytes(*word));
                self.count += 32;
                self.rest = tail;
                continue;
            }
            let (byte, tail) = match self.rest {
                [0xFF, 0x00, tail @ ..] => (0xFF, tail),
                [0xFF, ..] | [] => return,
                [byte, tail @ ..] => (*byte, tail),
            };
            self.buffer = self.buffer << 8 | u64::from(byte);
            self.count += 8;
            self.rest = tail;
        }
    }

    #[inline]
    fn symbol(&mut self, table: &Huffman) -> Result<u8> {
        if self.count < 32 {
            self.fill();
        }
        let next = if self.count < 16 { self.buffer << (16 - self.count) } else { self.buffer >> (self.count - 16) };
        let (length, symbol) = table.look_up(next as u16)?;
        self.count = self.count.checked_sub(length).ok_or(CUT_SHORT)?;
        Ok(symbol)
    }

    /// The next bits, at most 16 of them, as a number.
    #[inline]
    fn take(&mut self, bits: u8) -> Result<u32> {
        if self.count < u32::from(bits) {
            self.fill();
        }
        self.count = self.count.checked_sub(bits.into()).ok_or(CUT_SHORT)?;
        Ok((self.buffer >> self.count) as u32 & ((1 << bits) - 1))
    }

    /// The next bits as a value of that size (figure F.12).
    #[inline]
    fn value(&mut self, size: u8) -> Result<i32> {
        let bits = self.take(size)? as i32;
        Ok(if size > 0 && bits >> (size - 1) == 0 { bits - (1 << size) + 1 } else { bits })
    }

    /// Only what fills the last byte may be left: ones (F.1.2.3), a whole byte of them from
    /// encoders that count one too far (jpeg-js), or zeros.
    fn end(&mut self) -> Result<()> {
        self.fill();
        let ones = (1_u64 << self.count.min(8)) - 1;
        let left = self.buffer & ones;
        if self.count > 8 || (left != 0 && left != ones) {
            return Err(Damaged("data after the last block"));
        }
        self.count = 0;
        Ok(())
    }
}

struct Frame {
    progressive: bool,
    /// MCUs of a scan with several components.
    mcus: usize,
    components: Vec<Component>,
}

struct Component {
    id: u8,
    /// In an MCU of a scan with several components.
    blocks_per_mcu: usize,
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
            Component { id, blocks_per_mcu: h * v, blocks, quantiser, reached: [NOT_YET; 64], nonzero: Vec::new() }
        };
        let mcus = width.div_ceil(8 * widest) * height.div_ceil(8 * highest);
        Ok(Self { progressive, mcus, components: parts.iter().map(component).collect() })
    }
}

/// One scan: a band of coefficients, and of these the bits from `high` (0: the top) down to `low`.
struct Scan<'a> {
    parts: Vec<Part<'a>>,
    first: u8,
    last: u8,
    high: u8,
    low: u8,
    progressive: bool,
    /// Blocks to come that have no further coefficients (EOBRUN, G.1.2.2).
    ended: u32,
}

/// A component's part in a scan.
struct Part<'a> {
    component: usize,
    blocks_per_mcu: usize,
    dc: Option<&'a Huffman>,
    ac: Option<&'a Huffman>,
    quantiser: &'a [u16; 64],
    /// The block's DC as it stands, in units of the scan's lowest bit.
    predicted: i32,
    max_dc: i32,
    /// Of the squares of a block's AC coefficients.
    max_energy: u64,
}

impl<'a> Scan<'a> {
    /// Reads a scan header (B.2.3) and enters into the frame what the scan brings.
    fn read(mut segment: &[u8], frame: &mut Frame, tables: &'a Tables) -> Result<Self> {
        let [count] = take(&mut segment)?;
        let (selectors, &[first, last, bits]) = segment.split_last_chunk().ok_or(CUT_SHORT)?;
        let (selectors, []) = selectors.as_chunks::<2>() else { return Err(SEGMENT) };
        // Sequential encoders are known to write anything here, and decoders not to look.
        let band = if frame.progressive { [first, last, bits >> 4, bits & 15] } else { [0, 63, 0, 0] };
        let [first, last, high, low] = band;
        let interleaved = selectors.len() > 1;
        let legal = match first {
            0 => last == 0 || !frame.progressive,
            _ => first <= last && last < 64 && !interleaved,
        };
        if usize::from(count) != selectors.len() || selectors.is_empty() || !legal || low > 13 {
            return Err(SEGMENT);
        }
        let mut scan = Self { parts: Vec::new(), first, last, high, low, progressive: frame.progressive, ended: 0 };
        for &[id, slots] in selectors {
            let index = frame.components.iter().position(|component| component.id == id).ok_or(SEGMENT)?;
            let component = frame.components.get_mut(index).ok_or(SEGMENT)?;
            scan.enter(component)?;
            scan.parts.push(scan.part(index, component, slots, tables)?);
        }
        Ok(scan)
    }

    /// Each scan follows on what there is of its coefficients (G.1.1.1): DC before AC, and a bit
    /// lower each time. This also bounds how often a file can have the same blocks walked.
    fn enter(&self, component: &mut Component) -> Result<()> {
        let follows = |reached: u8| match self.high {
            0 => reached == NOT_YET,
            high => reached == high && self.low == high - 1,
        };
        let dc_is_there = self.first == 0 || component.reached[0] != NOT_YET;
        let band = component.reached.get_mut(self.first.into()..=self.last.into()).ok_or(SEGMENT)?;
        if !dc_is_there || !band.iter().all(|reached| follows(*reached)) {
            return Err(Damaged("a scan does not follow on those before it"));
        }
        band.fill(self.low);
        if self.first > 0 && self.low > 0 && component.nonzero.is_empty() {
            component.nonzero = vec![0; component.blocks];
        }
        Ok(())
    }

    fn part(&self, index: usize, component: &Component, slots: u8, tables: &'a Tables) -> Result<Part<'a>> {
        let quantiser = tables.quantisers.get(component.quantiser).and_then(Option::as_ref).ok_or(NO_TABLE)?;
        let step = u32::from(quantiser[0]) << self.low;
        // Rounding moves each coefficient by up to half a step, the point transform only towards zero.
        let rounding = quantiser.iter().map(|step| f64::from(*step).powi(2)).sum::<f64>().sqrt() / 2.0;
        let part = Part {
            component: index,
            blocks_per_mcu: component.blocks_per_mcu,
            dc: tables.dc.get(usize::from(slots >> 4)).and_then(Option::as_ref),
            ac: tables.ac.get(usize::from(slots & 15)).and_then(Option::as_ref),
            quantiser,
            predicted: 0,
            max_dc: (MAX_DC / step) as i32 + 1,
            max_energy: (MAX_AC + rounding).powi(2) as u64,
        };
        let no_dc = self.first == 0 && self.high == 0 && part.dc.is_none();
        if no_dc || (self.last > 0 && part.ac.is_none()) { Err(NO_TABLE) } else { Ok(part) }
    }

    /// Walks all MCUs; gives what follows on the scan.
    fn walk<'b>(mut self, bytes: &'b [u8], frame: &mut Frame, restart: usize) -> Result<&'b [u8]> {
        let mut bits = Bits { rest: bytes, buffer: 0, count: 0 };
        let mut parts = std::mem::take(&mut self.parts);
        let mut mcus = frame.mcus;
        let mut nonzero: &mut [u64] = &mut [];
        if let [part] = parts.as_mut_slice() {
            // Alone, a component has no blocks that only fill up an MCU (A.2.2).
            let component = frame.components.get_mut(part.component).ok_or(SEGMENT)?;
            (part.blocks_per_mcu, mcus, nonzero) = (1, component.blocks, &mut component.nonzero);
        }
        for mcu in 0..mcus {
            if restart > 0 && mcu > 0 && mcu.is_multiple_of(restart) {
                self.restart(&mut bits, mcu / restart)?;
                parts.iter_mut().for_each(|part| part.predicted = 0);
            }
            let mut unused = 0;
            let block_bits = nonzero.get_mut(mcu).unwrap_or(&mut unused);
            for part in &mut parts {
                for _ in 0..part.blocks_per_mcu {
                    self.block(&mut bits, part, block_bits)?;
                }
            }
        }
        self.end(&mut bits)?;
        if restart > 0 && mcus.is_multiple_of(restart) {
            // Some encoders write a marker behind the last interval too (image-rs/jpeg-decoder#53).
            let mut ahead = bits.rest;
            if take_marker(&mut ahead)? == restart_marker(mcus / restart) {
                return Ok(ahead);
            }
        }
        Ok(bits.rest)
    }

    fn restart(&mut self, bits: &mut Bits, interval: usize) -> Result<()> {
        self.end(bits)?;
        if take_marker(&mut bits.rest)? == restart_marker(interval) {
            Ok(())
        } else {
            Err(Damaged("a restart marker is missing or out of order"))
        }
    }

    fn end(&mut self, bits: &mut Bits) -> Result<()> {
        if self.ended > 0 {
            return Err(Damaged("more blocks are ended than there are"));
        }
        bits.end()
    }

    #[inline]
    fn block(&mut self, bits: &mut Bits, part: &mut Part, nonzero: &mut u64) -> Result<()> {
        if self.first == 0 && self.high == 0 {
            let size = bits.symbol(part.dc.ok_or(NO_TABLE)?)?;
            if size > 11 {
                return Err(TOO_LARGE);
            }
            part.predicted += bits.value(size)?;
            if part.predicted.abs() > part.max_dc {
                return Err(TOO_LARGE);
            }
        } else if self.first == 0 {
            bits.take(1)?;
        }
        match (self.last, self.high) {
            (0, _) => Ok(()),
            (_, 0) => self.band(bits, part, nonzero),
            _ => self.refine(bits, part, nonzero),
        }
    }

    /// The AC coefficients' first bits (F.1.2.2, G.1.2.2).
    #[inline]
    fn band(&mut self, bits: &mut Bits, part: &Part, nonzero: &mut u64) -> Result<()> {
        if self.ended > 0 {
            self.ended -= 1;
            return Ok(());
        }
        let table = part.ac.ok_or(NO_TABLE)?;
        let last = usize::from(self.last);
        let mut at = usize::from(self.first.max(1));
        let mut energy = 0;
        while at <= last {
            let symbol = bits.symbol(table)?;
            let (run, size) = (symbol >> 4, symbol & 15);
            if size == 0 && run < 15 {
                self.ended = self.end_run(bits, run)? - 1;
                break;
            }
            at += usize::from(run);
            let step = part.quantiser.get(at).filter(|_| at <= last).ok_or(TOO_FAR)?;
            if size > 10 {
                return Err(TOO_LARGE);
            }
            if size > 0 {
                let value = u64::from(bits.value(size)?.unsigned_abs() << self.low) * u64::from(*step);
                energy += value.min(1 << 20).pow(2);
                *nonzero |= 1 << at;
            } else if at == last {
                // Sixteen zeros stand only before a coefficient or an end.
                return Err(TOO_FAR);
            }
            at += 1;
        }
        if energy > part.max_energy { Err(TOO_LARGE) } else { Ok(()) }
    }

    /// How many blocks end here, this one included.
    fn end_run(&self, bits: &mut Bits, run: u8) -> Result<u32> {
        match run {
            0 => Ok(1),
            _ if !self.progressive => Err(Damaged("a code that sequential scans do not have")),
            _ => Ok((1 << run) + bits.take(run)?),
        }
    }

    /// A further bit of the AC coefficients (G.1.2.3, figure G.7).
    fn refine(&mut self, bits: &mut Bits, part: &Part, nonzero: &mut u64) -> Result<()> {
        let table = part.ac.ok_or(NO_TABLE)?;
        let before = *nonzero;
        let (mut at, last) = (self.first, self.last);
        while self.ended == 0 && at <= last {
            let symbol = bits.symbol(table)?;
            let (mut run, size) = (symbol >> 4, symbol & 15);
            if size > 1 {
                return Err(TOO_LARGE);
            }
            if size == 0 && run < 15 {
                self.ended = self.end_run(bits, run)?;
                break;
            }
            bits.take(size)?;
            // Past `run` coefficients that are still zero; each other one on the way has a bit.
            while at <= last && (run > 0 || before >> at & 1 == 1) {
                match before >> at & 1 {
                    1 => drop(bits.take(1)?),
                    _ => run -= 1,
                }
                at += 1;
            }
            if at > last {
                return Err(TOO_FAR);
            }
            *nonzero |= u64::from(size) << at;
            at += 1;
        }
        if self.ended > 0 {
            self.ended -= 1;
            let behind = before & (u64::MAX << at) & (u64::MAX >> (63 - last));
            for _ in 0..behind.count_ones() {
                bits.take(1)?;
            }
        }
        Ok(())
    }
}

fn restart_marker(interval: usize) -> u8 {
    0xD0 | (interval.wrapping_sub(1) & 7) as u8
}

#[cfg(test)]
#[path = "jpeg_tests.rs"]
mod tests;
