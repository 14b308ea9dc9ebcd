// The photo gate of functions/inference/src/quality.rs, for a first word before anything is sent. The host
// looks at the photo again and has the last one.

const WORKING_PX = 256;
const TILE_PX = 24;
const NOISE_ENERGY = 4;
const BLACK_LEVEL = 24;

// What the gate measures of an upright picture (ImageData).
export function measure({ data, width, height }) {
  const scale = Math.min(1, WORKING_PX / Math.max(width, height));
  const [smallWidth, smallHeight] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  const luma = new Float32Array(width * height);
  for (let i = 0; i < luma.length; i++) {
    luma[i] = (299 * data[4 * i] + 587 * data[4 * i + 1] + 114 * data[4 * i + 2]) / 1000;
  }
  const wide = reduce(luma, width, height, smallHeight);
  const small = Uint8ClampedArray.from(reduce(wide, smallHeight, width, smallWidth));
  const levels = new Uint32Array(256);
  for (const level of small) levels[level]++;
  const percentile = (percent) => {
    const rank = Math.max(1, Math.ceil((small.length * percent) / 100));
    let seen = 0;
    return levels.findIndex((count) => (seen += count) >= rank);
  };
  return {
    side_px: Math.min(width, height),
    sharpness: sharpness(small, smallWidth, smallHeight),
    brightness: percentile(75),
    contrast: percentile(99) - percentile(1),
  };
}

// The reasons for which the host would want another photo.
export function reasons(measures, limits) {
  const dark = measures.brightness < limits.min_brightness;
  const bright = measures.brightness > limits.max_brightness;
  const lit = !dark && !bright;
  return [
    ["too_small", measures.side_px < limits.min_side_px],
    ["blurred", lit && measures.sharpness < limits.min_sharpness],
    ["too_dark", dark],
    ["too_bright", bright],
    ["low_contrast", lit && measures.contrast < limits.min_contrast],
  ].filter(([, holds]) => holds).map(([reason]) => reason);
}

// Reduces the height by a triangle filter and turns the picture over: twice, and both sides are reduced.
function reduce(pixels, width, height, wanted) {
  const reduced = new Float32Array(width * wanted);
  const ratio = height / wanted;
  const support = Math.max(ratio, 1);
  for (let row = 0; row < wanted; row++) {
    const centre = (row + 0.5) * ratio;
    const first = Math.max(0, Math.floor(centre - support));
    const last = Math.min(height, Math.ceil(centre + support));
    const weights = [];
    for (let y = first; y < last; y++) weights.push(Math.max(0, 1 - Math.abs((y + 0.5 - centre) / support)));
    const sum = weights.reduce((a, b) => a + b, 0);
    for (let x = 0; x < width; x++) {
      let value = 0;
      for (let y = first; y < last; y++) value += weights[y - first] * pixels[y * width + x];
      reduced[x * wanted + row] = value / sum;
    }
  }
  return reduced;
}

function sharpness(pixels, width, height) {
  const [tileWidth, tileHeight] = [Math.min(width - 2, TILE_PX), Math.min(height - 2, TILE_PX)];
  if (tileWidth < 1 || tileHeight < 1) return 0;
  const tiles = [];
  for (let top = 1; top + tileHeight < height; top += tileHeight) {
    for (let left = 1; left + tileWidth < width; left += tileWidth) {
      const tile = tileSharpness(pixels, width, left, top, tileWidth, tileHeight);
      if (tile !== null) tiles.push(tile);
    }
  }
  tiles.sort((a, b) => a - b);
  return tiles[Math.max(1, Math.ceil(tiles.length * 0.9)) - 1] ?? 0;
}

// Null where the tile may touch the dark frame of a dermatoscope.
function tileSharpness(pixels, width, left, top, tileWidth, tileHeight) {
  const axes = [1, width].map((step) => ({ step, curvature: 0, slope: 0 }));
  for (let y = top; y < top + tileHeight; y++) {
    for (let x = left; x < left + tileWidth; x++) {
      const at = y * width + x;
      if (pixels[at] <= BLACK_LEVEL) return null;
      for (const axis of axes) {
        const [a, b] = [pixels[at - axis.step], pixels[at + axis.step]];
        axis.curvature += (2 * pixels[at] - a - b) ** 2;
        axis.slope += (b - a) ** 2 / 4;
      }
    }
  }
  const noise = NOISE_ENERGY * tileWidth * tileHeight;
  return Math.min(...axes.map(({ curvature, slope }) => curvature / (slope + noise)));
}
