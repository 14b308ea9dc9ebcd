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
    /// The low `count` bits are not read yet.
    pub(super) buffer: u64,
    pub(super) count: u32,
}

impl Bits<'_> {
    /// Up to 64 bits; whoever fills reads at least one, so that no shift is by 64.
    pub(super) fn fill(&mut self) {
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
    pub(super) fn symbol(&mut self, table: &Huffman) -> Result<u8> {
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
    pub(super) fn take(&mut self, bits: u8) -> Result<u32> {
        if self.count < u32::from(bits) {
            self.fill();
        }
        self.count = self.count.checked_sub(bits.into()).ok_or(CUT_SHORT)?;
        Ok((self.buffer >> self.count) as u32 & ((1 << bits) - 1))
    }

    /// The next bits as a value of that size (figure F.12).
    #[inline]
    pub(super) fn value(&mut self, size: u8) -> Result<i32> {
        let bits = self.take(size)? as i32;
        Ok(if size > 0 && bits >> (size - 1) == 0 { bits - (1 << size) + 1 } else { bits })
    }

    /// Only what fills the last byte may be left: ones (F.1.2.3), a whole byte of them from
    /// encoders that count one too far (jpeg-js), or zeros.
    pub(super) fn end(&mut self) -> Result<()> {
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
