//! The photo gate: is a photo good enough to be classified?
//!
//! It runs before inference, reads the working luma of the upright photo, and answers with the
//! reasons for a retake. It writes nothing.
//!
//! The working luma is the photo reduced by a triangle (bilinear) convolution until its longer side
//! is at most 256 px, never enlarged, then Rec. 601 luma: `(299 R + 587 G + 114 B + 500) / 1000` in
//! whole numbers, 0 to 255. So "blurred" means blurred at that scale, whatever camera took it.
//!
//! - **Side**: the shorter side of the original photo, in pixels.
//! - **Brightness**: the 75th percentile of luma, 0 to 255. A dark dermoscope frame does not pull it
//!   down as it would a mean, nor does a patch of glare lift it.
//! - **Contrast**: the 99th percentile of luma less the 1st, 0 to 255.
//! - **Sharpness**: the ratio of second to first differences in tiles of 24 px, from 0 (smooth)
//!   upwards; in-focus dermatoscopic photos lie between 0.5 and 4. Along each axis of a tile it is
//!   `mean((2c - a - b)²) / (mean(((b - a) / 2)²) + 4)`, with `a` and `b` the neighbours of `c`. A
//!   tile counts its softer axis, as the blur effect of Crete et al. 2007 does
//!   (doi:10.1117/12.702790), which finds motion as well as defocus; the photo counts the 90th
//!   percentile of its tiles, since smooth skin between the hairs is no fault. The numerator is the
//!   energy of the Laplacian, the focus measure of Subbarao, Choi and Nikzad ("Focusing
//!   techniques", Optical Engineering 32(11), 1993), taken an axis at a time; over the gradient's
//!   energy it hardly depends on contrast. The 4 is rounding and compression noise: without it a
//!   flat tile looks sharp.
//!
//! Percentiles are nearest-rank. Known limits: noise of one level, or the blocks of a JPEG saved
//! after the blur, in a photo so small that it is not reduced, hide the blur; so do letters or a
//! ruler laid over a tenth of the tiles.

use serde::{Deserialize, Serialize};
use shared::job::RetakeReason;

/// Side of a tile, in pixels of the working luma.
const TILE_PX: usize = 24;
/// Energy of the gradient that noise alone makes, in squared levels.
const NOISE_ENERGY: f32 = 4.0;
/// A tile that holds a pixel this dark may hold the edge of a frame, which is sharp in any photo.
const BLACK_LEVEL: u8 = 24;
/// The tile that speaks for the photo.
const TILE_PERCENT: usize = 90;

const CONTRAST_LOW_PERCENT: usize = 1;
const BRIGHTNESS_PERCENT: usize = 75;
const CONTRAST_HIGH_PERCENT: usize = 99;

/// A luma picture: row-major, one byte a pixel (Rec. 601).
#[derive(Debug, Clone, Copy)]
pub struct Luma<'a> {
    pub width: usize,
    pub height: usize,
    pub pixels: &'a [u8],
}

/// Where the gate closes; the numbers are in `model/quality.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thresholds {
    /// Pixels: a shorter side below it is too small.
    pub min_side_px: u32,
    /// A ratio, 0 upwards: a sharpness below it is blurred.
    pub min_sharpness: f32,
    /// Luma levels, 0 to 255: a brightness below it is too dark.
    pub min_brightness: f32,
    /// Luma levels, 0 to 255: a brightness above it is too bright.
    pub max_brightness: f32,
    /// Luma levels, 0 to 255: a contrast below it is too low.
    pub min_contrast: f32,
}

/// What [`measure`] found; the module's page has the formulas.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// Shorter side of the original photo, in pixels.
    pub side_px: u32,
    /// A ratio, 0 upwards; 0 too where no tile could be judged.
    pub sharpness: f32,
    /// Luma levels, 0 to 255.
    pub brightness: f32,
    /// Luma levels, 0 to 255.
    pub contrast: f32,
}

/// Measures a photo from the shorter side of the original and its working luma.
///
/// Any size will do: what is too small to be judged measures 0. Bytes beyond `width * height` are
/// not read, and rows that `pixels` does not hold are taken as not there.
#[must_use]
pub fn measure(short_side_px: u32, luma: &Luma<'_>) -> Measures {
    let rows: Vec<&[u8]> =
        if luma.width == 0 { Vec::new() } else { luma.pixels.chunks_exact(luma.width).take(luma.height).collect() };
    let levels = Levels::count(&rows);
    let contrast = levels.percentile(CONTRAST_HIGH_PERCENT) - levels.percentile(CONTRAST_LOW_PERCENT);
    Measures {
        side_px: short_side_px,
        sharpness: sharpness(&rows, luma.width),
        brightness: levels.percentile(BRIGHTNESS_PERCENT),
        contrast,
    }
}

/// Every reason for a retake, in the order of [`RetakeReason`]; none where the photo is good.
///
/// Sharpness and contrast shrink with the light, so they are not judged where the light is wrong.
#[must_use]
pub fn reasons(measures: &Measures, thresholds: &Thresholds) -> Vec<RetakeReason> {
    let too_dark = measures.brightness < thresholds.min_brightness;
    let too_bright = measures.brightness > thresholds.max_brightness;
    let lit = !too_dark && !too_bright;
    [
        (measures.side_px < thresholds.min_side_px, RetakeReason::TooSmall),
        (lit && measures.sharpness < thresholds.min_sharpness, RetakeReason::Blurred),
        (too_dark, RetakeReason::TooDark),
        (too_bright, RetakeReason::TooBright),
        (lit && measures.contrast < thresholds.min_contrast, RetakeReason::LowContrast),
    ]
    .into_iter()
    .filter_map(|(holds, reason)| holds.then_some(reason))
    .collect()
}

/// How many pixels have each luma level.
struct Levels {
    counts: [usize; 256],
    total: usize,
}

impl Levels {
    fn count(rows: &[&[u8]]) -> Self {
        let mut counts = [0; 256];
        for &level in rows.iter().copied().flatten() {
            counts[usize::from(level)] += 1;
        }
        Self { counts, total: counts.iter().sum() }
    }

    /// The lowest level that at least `percent` of the pixels do not exceed; 0 without pixels.
    fn percentile(&self, percent: usize) -> f32 {
        let rank = rank(self.total, percent);
        let mut seen = 0;
        for (level, count) in (0_u8..=255).zip(self.counts) {
            seen += count;
            if seen >= rank {
                return f32::from(level);
            }
        }
        0.0
    }
}

/// The nearest rank of a percentile among `total` values, counted from 1.
fn rank(total: usize, percent: usize) -> usize {
    (total * percent).div_ceil(100).max(1)
}

/// The 90th percentile of the tiles' sharpness; 0 where no tile can be judged.
fn sharpness(rows: &[&[u8]], width: usize) -> f32 {
    // The border has no neighbours on one side, so the tiles start one pixel in.
    let (Some(inner_width), Some(inner_height)) = (width.checked_sub(2), rows.len().checked_sub(2)) else {
        return 0.0;
    };
    if inner_width == 0 || inner_height == 0 {
        return 0.0;
    }
    let (tile_width, tile_height) = (inner_width.min(TILE_PX), inner_height.min(TILE_PX));
    let mut tiles = Vec::new();
    for down in 0..inner_height / tile_height {
        let top = down * tile_height;
        let Some(band) = rows.get(top..top + tile_height + 2) else {
            break;
        };
        for across in 0..inner_width / tile_width {
            tiles.extend(tile_sharpness(band, across * tile_width, tile_width));
        }
    }
    tiles.sort_unstable_by(f32::total_cmp);
    tiles.get(rank(tiles.len(), TILE_PERCENT) - 1).copied().unwrap_or(0.0)
}

/// The sharpness of the tile that starts after column `left` of a band of rows with one row more
/// on either side; `None` where it may touch a frame.
fn tile_sharpness<'a>(band: &[&'a [u8]], left: usize, tile_width: usize) -> Option<f32> {
    let mut across = Energies::default();
    let mut along = Energies::default();
    for rows in band.windows(3) {
        let [above, row, below] = rows else {
            return None;
        };
        let cut = |row: &'a [u8], start: usize| row.get(start..start + tile_width);
        let centre = cut(row, left + 1)?;
        if centre.iter().any(|level| *level <= BLACK_LEVEL) {
            return None;
        }
        across.add(cut(row, left)?, centre, cut(row, left + 2)?);
        along.add(cut(above, left + 1)?, centre, cut(below, left + 1)?);
    }
    Some(across.ratio().min(along.ratio()))
}

/// Sums over one axis of a tile; whole numbers, so that the order of adding cannot matter.
#[derive(Default)]
struct Energies {
    /// Of the second difference.
    curvature: u32,
    /// Of the first difference over two pixels: four times that of the slope.
    slope_x4: u32,
    pixels: u32,
}

impl Energies {
    /// A row of pixels with their neighbours along the axis.
    fn add(&mut self, before: &[u8], centre: &[u8], after: &[u8]) {
        for ((before, centre), after) in before.iter().zip(centre).zip(after) {
            let [a, c, b] = [*before, *centre, *after].map(i32::from);
            let (curvature, slope) = (2 * c - a - b, b - a);
            self.curvature += (curvature * curvature) as u32;
            self.slope_x4 += (slope * slope) as u32;
        }
        self.pixels += centre.len() as u32;
    }

    fn ratio(&self) -> f32 {
        let pixels = self.pixels as f32;
        let (curvature, slope) = (self.curvature as f32, self.slope_x4 as f32 / 4.0);
        curvature / (slope + NOISE_ENERGY * pixels)
    }
}

#[cfg(test)]
mod tests;
