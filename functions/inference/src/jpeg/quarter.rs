//! A JPEG at a quarter of its width and height, of the coefficients that the walk reads anyway.
//!
//! Each block of 8×8 samples becomes 2×2 out of its four lowest coefficients, which costs a fraction of
//! decoding every pixel: the scheme of Dugad and Ahuja ("A fast scheme for image size change in the
//! compressed domain", IEEE TCSVT 11(4), 2001), but weighed as the mean of what each sample stands for.
//! Called by the walk, for each row of MCUs. What is not the usual three components in one sequential
//! scan is left to the decoder.

use image::RgbImage;

use super::Frame;

/// The sides that a reduced photo must have for everybody who reduces it further.
#[derive(Debug, Clone, Copy)]
pub struct Least {
    /// Of the longer side, in pixels.
    pub longer: u32,
    /// Of the shorter side, in pixels.
    pub shorter: u32,
}

/// A photo reduced, not turned upright.
pub struct Quarter {
    pub pixels: RgbImage,
    /// The shorter side of the photo itself, in pixels.
    pub side_px: u32,
}

/// The pixels of a quarter in the making.
pub(super) struct Planes {
    /// Of the photo itself, in pixels.
    sides: [u32; 2],
    /// Luma and the two colour differences.
    planes: [Plane; 3],
    /// Rows of luma that come at a time.
    rows: usize,
    pixels: Vec<u8>,
}

struct Plane {
    /// How many pixels have one sample, across and down.
    times: [usize; 2],
    /// Pairs of samples in a row.
    stride: usize,
    /// A row with a sample for each pixel.
    wide: Vec<u8>,
}

impl Planes {
    /// `None` where the photo is too small, or no usual one.
    pub(super) fn of(frame: &Frame, least: Least) -> Option<Self> {
        let sides = frame.sides.map(|side| side as u32);
        let [longer, shorter] = [sides[0].max(sides[1]), sides[0].min(sides[1])];
        let [luma, blue, red] = frame.components.as_slice() else { return None };
        let ids = [luma.id, blue.id, red.id];
        let whole = |colour: &[usize; 2]| (0..2).all(|axis| luma.factors[axis].is_multiple_of(colour[axis]));
        let usual = !frame.progressive && ids == [1, 2, 3] && whole(&blue.factors) && whole(&red.factors);
        if !usual || longer / 4 < least.longer || shorter / 4 < least.shorter {
            return None;
        }
        let planes = [luma, blue, red].map(|component| {
            let times = [0, 1].map(|axis| luma.factors[axis] / component.factors[axis]);
            Plane { times, stride: frame.mcus_across * component.factors[0], wide: Vec::new() }
        });
        let [width, height] = frame.sides.map(|side| side / 4);
        Some(Self { sides, planes, rows: 2 * luma.factors[1], pixels: Vec::with_capacity(3 * width * height) })
    }

    /// Takes the samples of a row of MCUs as their blocks fill it: what lies beyond the pixels is
    /// left out.
    pub(super) fn take(&mut self, samples: [&[[u8; 2]]; 3]) -> Option<()> {
        let [width, height] = self.sides.map(|side| side as usize / 4);
        for y in 0..self.rows {
            let start = self.pixels.len();
            if start >= 3 * width * height {
                break;
            }
            let mut rows: [&[u8]; 3] = [&[]; 3];
            for ((row, samples), plane) in rows.iter_mut().zip(samples).zip(&mut self.planes) {
                let samples = samples.get(y / plane.times[1] * plane.stride..)?.as_flattened();
                *row = plane.widened(samples, width)?;
            }
            self.pixels.resize(start + 3 * width, 0);
            convert(rows, self.pixels.get_mut(start..)?);
        }
        Some(())
    }

    /// The whole pixels of the quarter; `None` where there are none.
    pub(super) fn finish(self) -> Option<Quarter> {
        let [width, height] = self.sides.map(|side| side / 4);
        let pixels = RgbImage::from_raw(width, height, self.pixels)?;
        Some(Quarter { pixels, side_px: self.sides[0].min(self.sides[1]) })
    }
}

impl Plane {
    /// The first samples of a row, one for each of `width` pixels.
    fn widened<'a>(&'a mut self, samples: &'a [u8], width: usize) -> Option<&'a [u8]> {
        match self.times[0] {
            1 => samples.get(..width),
            times => {
                self.wide.clear();
                let samples = samples.get(..width.div_ceil(times))?;
                match times {
                    2 => self.wide.extend(samples.iter().flat_map(|sample| [*sample; 2])),
                    _ => self.wide.extend(samples.iter().flat_map(|sample| std::iter::repeat_n(*sample, times))),
                }
                self.wide.get(..width)
            }
        }
    }
}

/// 2×2 samples, by rows, of a block's lowest coefficients: each the mean of the 4×4 that it stands for.
#[inline(always)]
pub(super) fn samples(low: [i32; 5]) -> [[u8; 2]; 2] {
    // In zigzag order the fourth lies on the diagonal's other end, beyond what is kept.
    let [mean, across, down, _, both] = low;
    // Over half a block the first cosine's mean is 0.6407 of its height, which the transform takes times √2:
    // 0.906 for one axis and 0.821 for both, here in parts of 128.
    let (mean, across, down, both) = (mean * 128 + 512, across * 116, down * 116, both * 105);
    let sample = |sum: i32| ((sum >> 10) + 128).clamp(0, 255) as u8;
    [
        [sample(mean + across + down + both), sample(mean - across + down - both)],
        [sample(mean + across - down - both), sample(mean - across - down + both)],
    ]
}

/// A row of luma and the differences of blue and red as pixels.
fn convert(rows: [&[u8]; 3], pixels: &mut [u8]) {
    const AT_ONCE: usize = 16;
    let [(luma, luma_rest), (blue, blue_rest), (red, red_rest)] = rows.map(<[u8]>::as_chunks::<AT_ONCE>);
    let (many, rest) = pixels.as_chunks_mut::<{ 3 * AT_ONCE }>();
    for (((pixels, luma), blue), red) in many.iter_mut().zip(luma).zip(blue).zip(red) {
        // In three passes, each over sixteen at once.
        let mut colours = [[0; AT_ONCE]; 3];
        for at in 0..AT_ONCE {
            let [red, green, blue] = rgb(luma[at], blue[at], red[at]);
            colours[0][at] = red;
            colours[1][at] = green;
            colours[2][at] = blue;
        }
        for (at, pixel) in pixels.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            *pixel = [colours[0][at], colours[1][at], colours[2][at]];
        }
    }
    let rest = rest.as_chunks_mut::<3>().0;
    for (((pixel, luma), blue), red) in rest.iter_mut().zip(luma_rest).zip(blue_rest).zip(red_rest) {
        *pixel = rgb(*luma, *blue, *red);
    }
}

/// ITU-T T.871 (JFIF), section 7, its factors times 2¹⁶. Whole parts of the factors stand outside:
/// what is left fits sixteen bits, as the processor multiplies many at once.
#[inline(always)]
fn rgb(luma: u8, blue: u8, red: u8) -> [u8; 3] {
    let [luma, blue, red] = [i16::from(luma), i16::from(blue) - 128, i16::from(red) - 128];
    let part = |sum: i32| ((sum + (1 << 15)) >> 16) as i16;
    let times = |value: i16, factor: i32| i32::from(value) * factor;
    let sums = [
        luma + red + part(times(red, 26_345)),
        luma - red + part(times(red, 18_734) - times(blue, 22_554)),
        luma + 2 * blue + part(times(blue, -14_942)),
    ];
    sums.map(|sum| sum.clamp(0, 255) as u8)
}
