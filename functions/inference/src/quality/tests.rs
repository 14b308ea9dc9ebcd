use super::*;

const THRESHOLDS: Thresholds = Thresholds {
    min_side_px: 120,
    min_sharpness: 0.35,
    min_brightness: 70.0,
    max_brightness: 240.0,
    min_contrast: 32.0,
};

fn draw(width: usize, height: usize, level: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    (0..height).flat_map(|y| (0..width).map(move |x| (x, y))).map(|(x, y)| level(x, y)).collect()
}

fn measured(width: usize, height: usize, pixels: &[u8]) -> Measures {
    measure(450, &Luma { width, height, pixels })
}

fn judged(width: usize, height: usize, pixels: &[u8]) -> Vec<RetakeReason> {
    reasons(&measured(width, height, pixels), &THRESHOLDS)
}

/// Squares of two greys, with edges as steep as pixels allow.
fn squares(x: usize, y: usize) -> u8 {
    if (x / 5 + y / 5).is_multiple_of(2) { 100 } else { 180 }
}

/// The same greys, without an edge.
fn waves(x: usize, y: usize) -> u8 {
    (140.0 + 20.0 * ((x as f32 / 5.0).sin() + (y as f32 / 5.0).sin())) as u8
}

#[test]
fn a_sharp_well_lit_picture_passes() {
    assert_eq!(judged(200, 150, &draw(200, 150, squares)), []);
}

#[test]
fn a_smooth_picture_is_blurred() {
    assert_eq!(judged(200, 150, &draw(200, 150, waves)), [RetakeReason::Blurred]);
}

#[test]
fn a_picture_smeared_along_one_axis_is_blurred() {
    let smeared = draw(200, 150, |x, y| if (y / 5).is_multiple_of(2) { 100 } else { waves(x, 0) });
    assert_eq!(judged(200, 150, &smeared), [RetakeReason::Blurred]);
}

#[test]
fn one_sharp_corner_does_not_hide_a_blurred_picture() {
    let picture = draw(200, 150, |x, y| if x < 40 && y < 40 { squares(x, y) } else { waves(x, y) });
    assert_eq!(judged(200, 150, &picture), [RetakeReason::Blurred]);
}

#[test]
fn smooth_skin_around_a_sharp_lesion_passes() {
    let picture =
        draw(200, 150, |x, y| if (50..150).contains(&x) && (30..120).contains(&y) { squares(x, y) } else { 170 });
    assert_eq!(judged(200, 150, &picture), []);
}

fn in_a_frame(x: usize, y: usize) -> bool {
    (x as f32 - 99.5).hypot(y as f32 - 74.5) > 80.0
}

#[test]
fn a_black_frame_around_a_sharp_picture_passes() {
    let framed = draw(200, 150, |x, y| if in_a_frame(x, y) { 3 } else { squares(x, y) });
    assert_eq!(judged(200, 150, &framed), []);
}

#[test]
fn a_black_frame_does_not_hide_a_blurred_picture() {
    let framed = draw(200, 150, |x, y| if in_a_frame(x, y) { 3 } else { waves(x, y) });
    assert_eq!(judged(200, 150, &framed), [RetakeReason::Blurred]);
}

#[test]
fn a_dark_picture_is_too_dark_and_nothing_else() {
    let dark = draw(200, 150, |x, y| squares(x, y) / 4);
    assert_eq!(judged(200, 150, &dark), [RetakeReason::TooDark]);
}

#[test]
fn a_washed_out_picture_is_too_bright_and_nothing_else() {
    let bright = draw(200, 150, |x, y| squares(x, y).saturating_mul(3));
    assert_eq!(judged(200, 150, &bright), [RetakeReason::TooBright]);
}

#[test]
fn a_flat_picture_has_low_contrast() {
    assert!(judged(200, 150, &[150; 200 * 150]).contains(&RetakeReason::LowContrast));
}

#[test]
fn a_small_original_is_too_small_however_good_it_is() {
    let pixels = draw(119, 119, squares);
    let luma = Luma { width: 119, height: 119, pixels: &pixels };
    assert_eq!(reasons(&measure(119, &luma), &THRESHOLDS), [RetakeReason::TooSmall]);
    assert_eq!(reasons(&measure(120, &luma), &THRESHOLDS), []);
}

#[test]
fn a_measure_on_its_threshold_passes() {
    let measures = Measures { side_px: 120, sharpness: 0.35, brightness: 70.0, contrast: 32.0 };
    assert_eq!(reasons(&measures, &THRESHOLDS), []);
    assert_eq!(reasons(&Measures { brightness: 240.0, ..measures }, &THRESHOLDS), []);
}

#[test]
fn percentiles_are_nearest_rank() {
    let pixels: Vec<u8> = (1..=100).collect();
    let measures = measured(10, 10, &pixels);
    assert_eq!((measures.brightness, measures.contrast), (75.0, 98.0));
}

#[test]
fn sharpness_is_the_ratio_of_second_to_first_differences() {
    // Columns 100, 100, 110, 110 and rows alike: 10² / (5² + 4), either axis.
    let step = draw(4, 4, |x, y| 100 + 10 * u8::from(x > 1) + 10 * u8::from(y > 1));
    assert!((measured(4, 4, &step).sharpness - 100.0 / 29.0).abs() < 1e-6);
}

#[test]
fn any_size_is_measured() {
    for (width, height) in [(0, 0), (0, 5), (1, 1), (2, 2), (1, 256), (256, 1), (3, 3), (25, 27)] {
        let measures = measured(width, height, &draw(width, height, squares));
        assert!(measures.sharpness.is_finite() && measures.contrast >= 0.0, "{width} x {height}");
    }
    assert_eq!(measured(1, 1, &[90]).brightness, 90.0);
}

#[test]
fn missing_rows_are_taken_as_not_there() {
    assert_eq!(measured(100, 100, &[90; 150]).brightness, 90.0);
    assert_eq!(measured(100, 100, &[]).brightness, 0.0);
}

#[test]
fn an_unknown_threshold_is_refused() {
    let json = r#"{"min_side_px": 1, "min_sharpness": 1, "min_brightness": 1,
        "max_brightness": 1, "min_contrast": 1, "max_blur": 1}"#;
    assert!(serde_json::from_str::<Thresholds>(json).is_err());
}
