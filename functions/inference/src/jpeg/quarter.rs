//! A JPEG at a quarter of its width and height, of the coefficients that the walk reads anyway.
//!
//! Each block of 8×8 samples becomes 2×2: the inverse transform of its four lowest coefficients, as
//! Dugad and Ahuja do ("A fast scheme for image size change in the compressed domain", IEEE TCSVT
//! 11(4), 2001), which costs a fraction of decoding every pixel.
//! Called by the walk, block by block. What is not the usual three components in one sequential
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

/// Luma and the two colour differences, each as its blocks fill it, up to whole MCUs.
pub(super) struct Planes {
    planes: [Plane; 3],
    /// Of the photo itself, in pixels.
    sides: [u32; 2],
    mcus_across: usize,
    /// Column and row of the MCU at hand.
    at: [usize; 2],
}

struct Plane {
    /// Blocks in an MCU, across and down.
    factors: [usize; 2],
    stride: usize,
    samples: Vec<u8>,
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
        let mcus_across = frame.sides[0].div_ceil(8 * luma.factors[0]);
        let planes = [luma, blue, red].map(|component| {
            let factors = component.factors;
            let samples = vec![0; 4 * frame.mcus * factors[0] * factors[1]];
            Plane { factors, stride: 2 * mcus_across * factors[0], samples }
        });
        Some(Self { planes, sides, mcus_across, at: [0; 2] })
    }

    #[inline]
    pub(super) fn begin(&mut self, mcu: usize) {
        self.at = [mcu % self.mcus_across, mcu / self.mcus_across];
    }

    /// Takes the `block`th block of a component in the MCU at hand: its first five coefficients,
    /// dequantised, in zigzag order.
    #[inline]
    pub(super) fn put(&mut self, component: usize, block: usize, low: [i32; 5]) {
        let [column, row] = self.at;
        let Some(Plane { factors: [across, down], stride, samples }) = self.planes.get_mut(component) else { return };
        let left = 2 * (column * *across + block % *across);
        let top = 2 * (row * *down + block / *across);
        // In zigzag order the fourth lies on the diagonal's other end, beyond what is kept.
        let [mean, across, down, _, both] = low;
        let sample = |sum: i32| (((sum + 4) >> 3) + 128).clamp(0, 255) as u8;
        let rows = [
            [mean + across + down + both, mean - across + down - both],
            [mean + across - down - both, mean - across - down + both],
        ];
        for (place, row) in rows.into_iter().enumerate() {
            let start = (top + place) * *stride + left;
            if let Some(target) = samples.get_mut(start..start + 2) {
                target.copy_from_slice(&row.map(sample));
            }
        }
    }

    /// The whole pixels of the quarter; `None` where there are none.
    pub(super) fn finish(self) -> Option<Quarter> {
        let [width, height] = self.sides.map(|side| side / 4);
        let [luma, blue, red] = &self.planes;
        let mut pixels = Vec::with_capacity(3 * width as usize * height as usize);
        let times = |plane: &Plane| [0, 1].map(|axis| luma.factors[axis] / plane.factors[axis]);
        let (blue_times, red_times) = (times(blue), times(red));
        for y in 0..height as usize {
            let row = |plane: &'_ Plane, times: [usize; 2]| y / times[1] * plane.stride;
            let luma_row = luma.samples.get(row(luma, [1, 1])..)?;
            let blue_row = blue.samples.get(row(blue, blue_times)..)?;
            let red_row = red.samples.get(row(red, red_times)..)?;
            for (x, luma) in luma_row.iter().enumerate().take(width as usize) {
                pixels.extend(rgb(*luma, *blue_row.get(x / blue_times[0])?, *red_row.get(x / red_times[0])?));
            }
        }
        let pixels = RgbImage::from_raw(width, height, pixels)?;
        Some(Quarter { pixels, side_px: self.sides[0].min(self.sides[1]) })
    }
}

/// ITU-T T.871 (JFIF), section 7, its factors times 2¹⁶.
#[inline]
fn rgb(luma: u8, blue: u8, red: u8) -> [u8; 3] {
    let [luma, blue, red] = [i32::from(luma) << 16, i32::from(blue) - 128, i32::from(red) - 128];
    let sums = [luma + 91_881 * red, luma - 22_554 * blue - 46_802 * red, luma + 116_130 * blue];
    sums.map(|sum| ((sum + (1 << 15)) >> 16).clamp(0, 255) as u8)
}
