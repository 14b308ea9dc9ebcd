//! The walk over one scan, sequential or progressive (ITU-T T.81, annexes F and G).

use super::huffman::{Bits, Huffman, MAX_AC_SIZE, MAX_DC_SIZE};
use super::{
    CUT_SHORT, Component, Damaged, Frame, MAX_AC, MAX_DC, NO_TABLE, NOT_YET, Result, SEGMENT, TOO_FAR, TOO_LARGE,
    Tables, take, take_marker,
};

/// One scan: a band of coefficients, and of these the bits from `high` (0: the top) down to `low`.
pub(super) struct Scan<'a> {
    pub(super) parts: Vec<Part<'a>>,
    pub(super) first: u8,
    pub(super) last: u8,
    pub(super) high: u8,
    pub(super) low: u8,
    /// Blocks to come that have no further coefficients (EOBRUN, G.1.2.2).
    pub(super) ended: u32,
}

/// A component's part in a scan.
pub(super) struct Part<'a> {
    pub(super) component: usize,
    /// Blocks in an MCU of a scan with several components, across and down.
    pub(super) factors: [usize; 2],
    pub(super) dc: Option<&'a Huffman>,
    pub(super) ac: Option<&'a Huffman>,
    pub(super) quantiser: &'a [u16; 64],
    /// The block's DC as it stands, in units of the scan's lowest bit.
    pub(super) predicted: i32,
    pub(super) max_dc: i32,
    /// Of the squares of a block's AC coefficients.
    pub(super) max_energy: u64,
}

impl<'a> Scan<'a> {
    /// Reads a scan header (B.2.3) and enters into the frame what the scan brings.
    pub(super) fn read(mut segment: &[u8], frame: &mut Frame, tables: &'a Tables) -> Result<Self> {
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
        let mut scan = Self { parts: Vec::new(), first, last, high, low, ended: 0 };
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
    pub(super) fn enter(&self, component: &mut Component) -> Result<()> {
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

    pub(super) fn part(&self, index: usize, component: &Component, slots: u8, tables: &'a Tables) -> Result<Part<'a>> {
        let quantiser = tables.quantisers.get(component.quantiser).and_then(Option::as_ref).ok_or(NO_TABLE)?;
        let step = u32::from(quantiser[0]) << self.low;
        // Rounding moves each coefficient by up to half a step, the point transform only towards zero.
        let rounding = quantiser.iter().map(|step| f64::from(*step).powi(2)).sum::<f64>().sqrt() / 2.0;
        let part = Part {
            component: index,
            factors: component.factors,
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

    /// Walks all MCUs of a progressive scan; gives what follows on it.
    pub(super) fn walk_progressive<'b>(
        mut self,
        bytes: &'b [u8],
        frame: &mut Frame,
        restart: usize,
    ) -> Result<&'b [u8]> {
        let mut bits = Bits::of(bytes);
        let mut parts = std::mem::take(&mut self.parts);
        let mut mcus = frame.mcus;
        let mut nonzero: &mut [u64] = &mut [];
        if let [part] = parts.as_mut_slice() {
            // Alone, a component has no blocks that only fill up an MCU (A.2.2).
            let component = frame.components.get_mut(part.component).ok_or(SEGMENT)?;
            (part.factors, mcus, nonzero) = ([1, 1], component.blocks, &mut component.nonzero);
        }
        for mcu in 0..mcus {
            if restart > 0 && mcu > 0 && mcu.is_multiple_of(restart) {
                self.all_ended()?;
                restart_at(&mut bits, mcu / restart)?;
                parts.iter_mut().for_each(|part| part.predicted = 0);
            }
            let mut unused = 0;
            let block_bits = nonzero.get_mut(mcu).unwrap_or(&mut unused);
            for part in &mut parts {
                for _ in 0..part.factors[0] * part.factors[1] {
                    self.block(&mut bits, part, block_bits)?;
                }
            }
        }
        self.all_ended()?;
        bits.end()?;
        behind(bits.rest, restart, mcus)
    }

    fn all_ended(&self) -> Result<()> {
        if self.ended > 0 { Err(Damaged("more blocks are ended than there are")) } else { Ok(()) }
    }

    #[inline]
    pub(super) fn block(&mut self, bits: &mut Bits, part: &mut Part, nonzero: &mut u64) -> Result<()> {
        if self.first == 0 && self.high == 0 {
            let size = bits.symbol(part.dc.ok_or(NO_TABLE)?)?;
            if size > MAX_DC_SIZE {
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
    pub(super) fn band(&mut self, bits: &mut Bits, part: &mut Part, nonzero: &mut u64) -> Result<()> {
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
            if size > MAX_AC_SIZE {
                return Err(TOO_LARGE);
            }
            if size > 0 {
                let value = bits.value(size)?;
                let value = u64::from(value.unsigned_abs() << self.low) * u64::from(*step);
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
    pub(super) fn end_run(&self, bits: &mut Bits, run: u8) -> Result<u32> {
        match run {
            0 => Ok(1),
            _ => Ok((1 << run) + bits.take(run)?),
        }
    }

    /// A further bit of the AC coefficients (G.1.2.3, figure G.7).
    pub(super) fn refine(&mut self, bits: &mut Bits, part: &Part, nonzero: &mut u64) -> Result<()> {
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

/// Reads the marker between two restart intervals.
pub(super) fn restart_at(bits: &mut Bits, interval: usize) -> Result<()> {
    bits.end()?;
    if take_marker(&mut bits.rest)? == restart_marker(interval) {
        Ok(())
    } else {
        Err(Damaged("a restart marker is missing or out of order"))
    }
}

/// What follows on a scan of that many MCUs.
pub(super) fn behind(rest: &[u8], restart: usize, mcus: usize) -> Result<&[u8]> {
    if restart > 0 && mcus.is_multiple_of(restart) {
        // Some encoders write a marker behind the last interval too (image-rs/jpeg-decoder#53).
        let mut ahead = rest;
        if take_marker(&mut ahead)? == restart_marker(mcus / restart) {
            return Ok(ahead);
        }
    }
    Ok(rest)
}

fn restart_marker(interval: usize) -> u8 {
    0xD0 | (interval.wrapping_sub(1) & 7) as u8
}
