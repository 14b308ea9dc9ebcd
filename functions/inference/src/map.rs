//! The class activation map as a picture to be laid over the photo.
//!
//! Called with a network's raw map after a reading that gives a label; writes nothing. What comes
//! out is one colour whose opacity says how much a place spoke for the class that comes first:
//! negative values not at all, the largest most. No pixel of the photo is in it.

use fast_image_resize::FilterType;
use fast_image_resize::pixels::U8;
use png::{BitDepth, ColorType, Compression, Encoder, EncodingError, Filter};

use crate::model::ActivationMap;
use crate::picture::{Unreadable, resize};

/// The longer side of an overlay, in pixels. A map has some dozens of places, so more shows no more.
const SIDE: u32 = 256;
const COLOUR: [u8; 3] = [255, 80, 0];
/// Of the largest value, of 255: the photo is still seen below.
const OPACITY: u8 = 160;

/// A PNG in the proportions of the upright photo, `width` × `height`: the map's positive part over
/// its largest value, scaled bilinearly.
///
/// # Errors
/// [`Unreadable`] where the map's size and values do not agree, or the photo has no pixels.
pub fn overlay(map: &ActivationMap, width: u32, height: u32) -> Result<Vec<u8>, Unreadable> {
    let largest = map.values.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    let levels = map.values.iter().map(|value| (value.max(0.0) / largest * f32::from(OPACITY)).round() as u8);
    let longer = width.max(height);
    let scaled =
        |side: u32| (f64::from(side) * f64::from(SIDE.min(longer)) / f64::from(longer)).round().max(1.0) as u32;
    let (width, height) = (scaled(width), scaled(height));
    let opacities =
        resize::<U8>(&levels.collect::<Vec<_>>(), [map.width, map.height], [width, height], FilterType::Bilinear)?;
    encode(&opacities, width, height).map_err(|error| Unreadable(error.to_string()))
}

/// With a palette of one colour in every opacity: a byte a pixel, where red, green, blue and opacity take four times
/// the bytes and the time.
fn encode(opacities: &[u8], width: u32, height: u32) -> Result<Vec<u8>, EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, width, height);
    encoder.set_color(ColorType::Indexed);
    encoder.set_depth(BitDepth::Eight);
    encoder.set_palette(COLOUR.repeat(usize::from(OPACITY) + 1));
    encoder.set_trns((0..=OPACITY).collect::<Vec<_>>());
    encoder.set_compression(Compression::Fast);
    encoder.set_filter(Filter::Up);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(opacities)?;
    writer.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use image::RgbaImage;

    use super::*;

    fn map(values: &[f32]) -> ActivationMap {
        ActivationMap { width: 2, height: 2, values: values.to_vec() }
    }

    fn opacities(png: &[u8]) -> RgbaImage {
        image::load_from_memory(png).unwrap().into_rgba8()
    }

    #[test]
    fn the_largest_value_is_the_most_opaque_and_negative_ones_are_clear() {
        let overlay = opacities(&overlay(&map(&[4.0, 2.0, -9.0, 0.0]), 400, 300).unwrap());
        assert_eq!(overlay.dimensions(), (256, 192));
        let opacity = |x, y| overlay.get_pixel(x, y).0[3];
        assert_eq!([opacity(0, 0), opacity(255, 0), opacity(0, 191), opacity(255, 191)], [160, 80, 0, 0]);
        // Between the centres of two places lies their mean.
        assert!((119..=121).contains(&opacity(127, 0)), "{}", opacity(127, 0));
        assert!(overlay.pixels().all(|pixel| pixel.0[..3] == COLOUR));
    }

    #[test]
    fn a_map_on_which_nothing_speaks_for_the_class_shows_nothing() {
        for values in [[0.0; 4], [-1.0, -2.0, -3.0, -0.5]] {
            let overlay = opacities(&overlay(&map(&values), 30, 40).unwrap());
            assert_eq!(overlay.dimensions(), (30, 40), "a small photo's is not enlarged");
            assert!(overlay.pixels().all(|pixel| pixel.0[3] == 0));
        }
    }

    #[test]
    fn a_map_whose_values_do_not_fit_its_size_is_refused() {
        assert!(overlay(&map(&[1.0, 2.0]), 30, 40).is_err());
    }
}
