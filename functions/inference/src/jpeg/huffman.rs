//! Huffman tables and the bits that they are read from (ITU-T T.81, annexes C and F).

use super::{CUT_SHORT, Damaged, Result, SEGMENT, take};

/// Codes of 1–16 bits (annex C).
pub(super) struct Huffman {
    /// By the next nine bits: length in the high byte, symbol in the low; 0 where the code is longer.
    pub(super) short: [u16; 512],
    /// By length − 1: the first sixteen bits that lie behind its codes, and how far a code lies
    /// before its symbol.
    pub(super) long: [(u32, i32); 16],
    pub(super) symbols: Vec<u8>,
    /// By the next [`AHEAD`] bits: the code that they begin with, and its value with it.
    whole: [Whole; 1 << AHEAD],
}

/// The most bits that a value of eight-bit samples has (F.1.2.1.1, F.1.2.2.1).
pub(super) const MAX_DC_SIZE: u8 = 11;
pub(super) const MAX_AC_SIZE: u8 = 10;

/// How far a table looks for a code and the value that follows it.
const AHEAD: u32 = 10;

/// A code with the value that follows it: its bits in the lowest byte, the zeros before it in the
/// second, the value above. 0 where it is longer than what was looked at, or is not what photos have.
#[derive(Clone, Copy)]
pub(super) struct Whole(u32);

impl Whole {
    /// So many zeros that no coefficient is left.
    pub(super) const END: usize = 128;

    fn new(length: u32, symbol: u8, value: i32) -> Self {
        let run = if symbol == 0 { Self::END as u32 } else { u32::from(symbol >> 4) };
        Self((value as u32) << 16 | run << 8 | length)
    }

    #[inline]
    pub(super) fn is_known(self) -> bool {
        self.0 != 0
    }

    /// Of code and value together, in bits.
    #[inline]
    pub(super) fn length(self) -> u32 {
        self.0 & 0xFF
    }

    #[inline]
    pub(super) fn run(self) -> usize {
        (self.0 >> 8) as usize & 0xFF
    }

    #[inline]
    pub(super) fn value(self) -> i32 {
        self.0 as i32 >> 16
    }
}

impl Huffman {
    /// Reads a table of DC differences or of AC coefficients.
    pub(super) fn read(segment: &mut &[u8], of_dc: bool) -> Result<Self> {
        let counts: [u8; 16] = take(segment)?;
        let total = counts.iter().copied().map(usize::from).sum();
        let (symbols, tail) = segment.split_at_checked(total).ok_or(CUT_SHORT)?;
        *segment = tail;
        let mut table = Self { short: [0; 512], long: [(0, 0); 16], symbols: symbols.to_vec(), whole: [Whole(0); _] };
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
                let usual = match of_dc {
                    true => *symbol <= MAX_DC_SIZE,
                    false => *symbol == 0 || (1..=MAX_AC_SIZE).contains(&(symbol & 15)),
                };
                if usual {
                    see_ahead(&mut table.whole, from, length.into(), *symbol);
                }
                code += 1;
            }
            code <<= 1;
        }
        Ok(table)
    }

    /// The code and value that the next bits begin with.
    #[inline]
    pub(super) fn ahead(&self, bits: &Bits) -> Whole {
        self.whole[(bits.buffer >> (64 - AHEAD)) as usize]
    }

    /// Length and symbol of the code that `next`, sixteen bits, begins with.
    #[inline]
    pub(super) fn look_up(&self, next: u16) -> Result<(u32, u8)> {
        match self.short.get(usize::from(next >> 7)) {
            Some(&entry) if entry != 0 => Ok((u32::from(entry >> 8), entry as u8)),
            _ => self.look_up_long(next),
        }
    }

    #[cold]
    pub(super) fn look_up_long(&self, next: u16) -> Result<(u32, u8)> {
        let found = (1..).zip(&self.long).find(|(_, (end, _))| u32::from(next) < *end);
        let symbol = found.and_then(|(length, (_, before))| {
            let index = i32::from(next >> (16 - length)).checked_add(*before)?;
            Some((length, *self.symbols.get(usize::try_from(index).ok()?)?))
        });
        symbol.ok_or(Damaged("a code that is in no table"))
    }
}

/// Enters every value that the code at `from` (its first of sixteen bits) may have.
fn see_ahead(table: &mut [Whole], from: u32, length: u32, symbol: u8) {
    let size = u32::from(symbol & 15);
    let Some(spare) = AHEAD.checked_sub(length + size) else { return };
    for bits in 0..1_u32 << size {
        let start = ((from >> (16 - AHEAD)) + (bits << spare)) as usize;
        let whole = Whole::new(length + size, symbol, signed(bits as i32, size));
        if let Some(places) = table.get_mut(start..start + (1 << spare)) {
            places.fill(whole);
        }
    }
}

/// The bits up to the next marker; a 0x00 that follows 0xFF is taken out (B.1.1.5).
#[derive(Clone, Copy)]
pub(super) struct Bits<'a> {
    pub(super) rest: &'a [u8],
    /// The high `count` bits are not read yet, the others are 0.
    pub(super) buffer: u64,
    pub(super) count: u32,
}

/// Bits of the longest code with its value: 16 and 11, rounded up.
const ENOUGH: u32 = 32;

impl<'a> Bits<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, buffer: 0, count: 0 }
    }

    /// Enough for a code and its value, unless a marker or the end is nearer.
    #[inline(always)]
    pub(super) fn fill(&mut self) {
        if self.count >= ENOUGH {
            return;
        }
        if let Some(word) = self.rest.first_chunk()
            && let word = u64::from_be_bytes(*word)
            && !has_marker_byte(word)
            && let Some(tail) = self.rest.get((63 - self.count as usize) / 8..)
        {
            self.rest = tail;
            self.buffer |= word >> self.count;
            // Whole bytes: 56 to 63 bits are there now.
            self.count |= 56;
            self.buffer &= !(u64::MAX >> self.count);
        } else {
            *self = self.fill_by_bytes();
        }
    }

    #[inline(never)]
    fn fill_by_bytes(mut self) -> Self {
        while self.count <= 56 {
            let (byte, tail) = match self.rest {
                [0xFF, 0x00, tail @ ..] => (0xFF, tail),
                [0xFF, ..] | [] => break,
                [byte, tail @ ..] => (*byte, tail),
            };
            self.buffer |= u64::from(byte) << (56 - self.count);
            self.count += 8;
            self.rest = tail;
        }
        self
    }

    /// Leaves bits behind that were looked at.
    #[inline(always)]
    pub(super) fn skip(&mut self, bits: u32) -> Result<()> {
        self.count = self.count.checked_sub(bits).ok_or(CUT_SHORT)?;
        self.buffer <<= bits;
        Ok(())
    }

    #[inline]
    pub(super) fn symbol(&mut self, table: &Huffman) -> Result<u8> {
        self.fill();
        let (length, symbol) = table.look_up((self.buffer >> 48) as u16)?;
        self.count = self.count.checked_sub(length).ok_or(CUT_SHORT)?;
        self.buffer <<= length;
        Ok(symbol)
    }

    /// The next bits, at most 16 of them, as a number.
    #[inline]
    pub(super) fn take(&mut self, bits: u8) -> Result<u32> {
        let bits = u32::from(bits);
        if self.count < bits {
            self.fill();
        }
        self.count = self.count.checked_sub(bits).ok_or(CUT_SHORT)?;
        // In two steps, since no bits at all would be a shift by 64.
        let taken = (self.buffer >> 1) >> (63 - bits);
        self.buffer <<= bits;
        Ok(taken as u32)
    }

    /// The next bits as a value of that size (figure F.12).
    #[inline]
    pub(super) fn value(&mut self, size: u8) -> Result<i32> {
        Ok(signed(self.take(size)? as i32, size.into()))
    }

    /// Only what fills the last byte may be left: ones (F.1.2.3), a whole byte of them from
    /// encoders that count one too far (jpeg-js), or zeros.
    pub(super) fn end(&mut self) -> Result<()> {
        *self = self.fill_by_bytes();
        if self.count > 8 {
            return Err(Damaged("data after the last block"));
        }
        let ones = (1 << self.count) - 1;
        let left = (self.buffer >> 1) >> (63 - self.count);
        if left != 0 && left != ones {
            return Err(Damaged("data after the last block"));
        }
        (self.buffer, self.count) = (0, 0);
        Ok(())
    }
}

/// Bits of that many as a value (figure F.12).
fn signed(bits: i32, size: u32) -> i32 {
    if bits < (1 << size) >> 1 { bits - (1 << size) + 1 } else { bits }
}

/// Whether one of the eight bytes is 0xFF: then one of the inverted ones is 0 (Mycroft's test).
#[inline]
fn has_marker_byte(word: u64) -> bool {
    let inverted = !word;
    inverted.wrapping_sub(0x0101_0101_0101_0101) & !inverted & 0x8080_8080_8080_8080 != 0
}
