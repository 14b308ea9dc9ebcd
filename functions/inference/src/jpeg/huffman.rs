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
}

impl Huffman {
    pub(super) fn read(segment: &mut &[u8]) -> Result<Self> {
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

/// The bits up to the next marker; a 0x00 that follows 0xFF is taken out (B.1.1.5).
pub(super) struct Bits<'a> {
    pub(super) rest: &'a [u8],
    /// The high `count` bits are not read yet, the others are 0.
    pub(super) buffer: u64,
    pub(super) count: u32,
}

impl Bits<'_> {
    /// More than 32 bits, unless a marker or the end is nearer.
    #[inline]
    pub(super) fn fill(&mut self) {
        while self.count <= 32 {
            if let Some((word, tail)) = self.rest.split_first_chunk()
                && let word = u32::from_be_bytes(*word)
                && !has_marker_byte(word)
            {
                self.buffer |= u64::from(word) << (32 - self.count);
                self.count += 32;
                self.rest = tail;
                continue;
            }
            let (byte, tail) = match self.rest {
                [0xFF, 0x00, tail @ ..] => (0xFF, tail),
                [0xFF, ..] | [] => return,
                [byte, tail @ ..] => (*byte, tail),
            };
            self.buffer |= u64::from(byte) << (56 - self.count);
            self.count += 8;
            self.rest = tail;
        }
    }

    #[inline]
    pub(super) fn symbol(&mut self, table: &Huffman) -> Result<u8> {
        if self.count < 32 {
            self.fill();
        }
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
        let bits = self.take(size)? as i32;
        Ok(if bits < (1 << size) >> 1 { bits - (1 << size) + 1 } else { bits })
    }

    /// Only what fills the last byte may be left: ones (F.1.2.3), a whole byte of them from
    /// encoders that count one too far (jpeg-js), or zeros.
    pub(super) fn end(&mut self) -> Result<()> {
        self.fill();
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

/// Whether one of the four bytes is 0xFF: then one of the inverted ones is 0 (Mycroft's test).
#[inline]
fn has_marker_byte(word: u32) -> bool {
    let inverted = !word;
    inverted.wrapping_sub(0x0101_0101) & !inverted & 0x8080_8080 != 0
}
