//! The walk over a sequential scan (ITU-T T.81, annex F), as nearly every photo is one: the longest
//! part of the way from a photo to the network, so written for speed.
//!
//! The bits are copied into what is called for the rare cases: lent, they would be kept in memory and
//! not in registers.

use super::huffman::{Bits, Huffman, MAX_AC_SIZE, MAX_DC_SIZE, Whole};
use super::quarter::{Planes, samples};
use super::scan::{Part, Scan, behind, restart_at};
use super::{Damaged, Frame, NO_TABLE, Result, SEGMENT, TOO_FAR, TOO_LARGE};

/// A component on the walk.
struct Walked<'a> {
    dc: &'a Huffman,
    ac: &'a Huffman,
    steps: [i32; 64],
    /// The last block's DC, in steps.
    predicted: i32,
    max_dc: i32,
    max_energy: u64,
    /// Blocks in an MCU, across and down.
    factors: [usize; 2],
    /// Blocks in a row.
    stride: usize,
    /// A row of MCUs at a quarter: pairs of samples, two rows for each row of blocks. Empty where
    /// nobody wants it.
    row: Vec<[u8; 2]>,
}

impl Scan<'_> {
    /// Walks all MCUs of a sequential scan, and gives their rows to `planes`; returns what follows on
    /// the scan.
    pub(super) fn walk_sequential<'b>(
        self,
        bytes: &'b [u8],
        frame: &Frame,
        restart: usize,
        mut planes: Option<&mut Planes>,
    ) -> Result<&'b [u8]> {
        let mut bits = Bits::of(bytes);
        let mut across = frame.mcus_across;
        let mut mcus = frame.mcus;
        let alone = self.parts.len() == 1;
        if let [part] = self.parts.as_slice() {
            mcus = frame.components.get(part.component).ok_or(SEGMENT)?.blocks;
            across = mcus;
        }
        let is_wanted = planes.is_some();
        let parts = self.parts.iter().map(|part| {
            // Alone, a component has no blocks that only fill up an MCU (A.2.2).
            let factors = if alone { [1, 1] } else { part.factors };
            Walked::of(part, factors, across, is_wanted)
        });
        let mut parts = parts.collect::<Result<Vec<_>>>()?;
        let mut to_restart = restart;
        for start in (0..mcus).step_by(across.max(1)) {
            for column in 0..across {
                if restart > 0 && to_restart == 0 {
                    restart_at(&mut bits, (start + column) / restart)?;
                    parts.iter_mut().for_each(|part| part.predicted = 0);
                    to_restart = restart;
                }
                to_restart = to_restart.wrapping_sub(1);
                for part in &mut parts {
                    part.mcu(&mut bits, column)?;
                }
            }
            if let (Some(planes), [luma, blue, red]) = (&mut planes, parts.as_slice()) {
                planes.take([luma, blue, red].map(|part| part.row.as_slice()));
            }
        }
        bits.end()?;
        behind(bits.rest, restart, mcus)
    }
}

impl<'a> Walked<'a> {
    fn of(part: &Part<'a>, factors: [usize; 2], mcus_across: usize, is_wanted: bool) -> Result<Self> {
        let stride = mcus_across * factors[0];
        Ok(Self {
            dc: part.dc.ok_or(NO_TABLE)?,
            ac: part.ac.ok_or(NO_TABLE)?,
            steps: part.quantiser.map(i32::from),
            predicted: 0,
            max_dc: part.max_dc,
            max_energy: part.max_energy,
            factors,
            stride,
            row: if is_wanted { vec![[0; 2]; 2 * factors[1] * stride] } else { Vec::new() },
        })
    }

    #[inline(always)]
    fn mcu(&mut self, bits: &mut Bits, column: usize) -> Result<()> {
        let [across, down] = self.factors;
        for down in 0..down {
            for place in 0..across {
                let low = self.block(bits)?;
                let top = 2 * down * self.stride + column * across + place;
                let bottom = top + self.stride;
                let pairs = samples(low);
                if let Some(pair) = self.row.get_mut(top) {
                    *pair = pairs[0];
                }
                if let Some(pair) = self.row.get_mut(bottom) {
                    *pair = pairs[1];
                }
            }
        }
        Ok(())
    }

    /// A block's first five coefficients, dequantised, in zigzag order.
    #[inline(always)]
    fn block(&mut self, bits: &mut Bits) -> Result<[i32; 5]> {
        bits.fill();
        let whole = self.dc.ahead(bits);
        self.predicted += match whole.is_known() {
            true => {
                bits.skip(whole.length())?;
                whole.value()
            }
            false => {
                let (after, difference) = difference(*bits, self.dc)?;
                *bits = after;
                difference
            }
        };
        if self.predicted.abs() > self.max_dc {
            return Err(TOO_LARGE);
        }
        // The last place is for all that is not kept.
        let mut low = [self.predicted * self.steps[0], 0, 0, 0, 0, 0];
        let (mut energy, mut at) = (0, 1);
        while at < 64 {
            bits.fill();
            let whole = self.ac.ahead(bits);
            let (run, value) = match whole.is_known() {
                true => {
                    bits.skip(whole.length())?;
                    (whole.run(), whole.value())
                }
                false => {
                    let (after, run, value) = coefficient(*bits, self.ac, at)?;
                    *bits = after;
                    (run, value)
                }
            };
            at += run;
            let Some(step) = self.steps.get(at) else {
                if run == Whole::END {
                    break;
                }
                return Err(TOO_FAR);
            };
            let value = value * step;
            low[at.min(5)] = value;
            energy += u64::from(value.unsigned_abs()).pow(2);
            at += 1;
        }
        if energy > self.max_energy {
            return Err(TOO_LARGE);
        }
        let [mean, across, down, second, both, _] = low;
        Ok([mean, across, down, second, both])
    }
}

/// A DC difference that is longer than what the table looks ahead.
#[inline(never)]
fn difference<'b>(mut bits: Bits<'b>, table: &Huffman) -> Result<(Bits<'b>, i32)> {
    let size = bits.symbol(table)?;
    if size > MAX_DC_SIZE {
        return Err(TOO_LARGE);
    }
    let value = bits.value(size)?;
    Ok((bits, value))
}

/// As [`difference`], of an AC coefficient: the zeros before it and its value.
#[inline(never)]
fn coefficient<'b>(mut bits: Bits<'b>, table: &Huffman, at: usize) -> Result<(Bits<'b>, usize, i32)> {
    let symbol = bits.symbol(table)?;
    let (run, size) = (usize::from(symbol >> 4), symbol & 15);
    match (run, size) {
        (0, 0) => return Ok((bits, Whole::END, 0)),
        (1..15, 0) => return Err(Damaged("a code that sequential scans do not have")),
        // Sixteen zeros stand only before a coefficient or an end.
        (15, 0) if at + run == 63 => return Err(TOO_FAR),
        _ if at + run > 63 => return Err(TOO_FAR),
        (_, size) if size > MAX_AC_SIZE => return Err(TOO_LARGE),
        _ => {}
    }
    let value = bits.value(size)?;
    Ok((bits, run, value))
}
