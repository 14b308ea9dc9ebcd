//! Bundles: what is refused, what is reused, and another network by manifest alone.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use image::codecs::jpeg::JpegEncoder;
use image::imageops::{self, FilterType};
use image::{Rgb, RgbImage};
use inference::bundle::{Bundle, MANIFEST, sha256};
use inference::manifest::Manifest;
use inference::model::{ActivationMap, Model, RawOutputs};
use inference::{gate, picture};
use serde_json::{Value, json};
use shared::config::Env;
use shared::embedded::DirBlobStore;
use shared::job::AbstainReason::{LowConfidence, OutOfDistribution};

use crate::support::network::{HEIGHT, Network, WIDTH};
use crate::support::reference::{self, Reference};
use crate::support::{mole, ort_library, report, root};

fn shipped() -> (Value, Vec<u8>) {
    let manifest = std::fs::read(root().join("model").join(MANIFEST)).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let network = std::fs::read(root().join("model").join(manifest["network"]["file"].as_str().unwrap())).unwrap();
    (manifest, network)
}

fn load(manifest: &Value, network: Vec<u8>) -> Result<Model, String> {
    let bundle = Bundle::verify(manifest.to_string().as_bytes(), network, None).map_err(|error| error.to_string())?;
    Model::load(bundle, &ort_library(), 1).map_err(|error| error.to_string())
}

#[test]
fn the_shipped_bundle_passes_its_own_golden_vectors() {
    let (manifest, network) = shipped();
    assert!(load(&manifest, network).is_ok());
}

fn evaluation(coverage: f64) -> Value {
    json!({
        "data": "drawn", "coverage": coverage, "risk": 0.1, "melanomas_answered_benign": 0.2, "non_lesions_abstained": 1,
    })
}

#[test]
fn a_manifest_may_say_what_its_abstention_was_measured_to_buy() {
    let (mut manifest, network) = shipped();
    manifest["evaluation"] = evaluation(0.7);
    let model = load(&manifest, network).unwrap();
    assert_eq!(model.manifest.evaluation.unwrap().coverage, 0.7);
}

#[test]
fn a_bundle_that_does_not_fit_is_refused_and_says_why() {
    /// What is changed, how, and a part of the complaint.
    type Change = (&'static str, fn(&mut Value), &'static str);
    let changes: [Change; 22] = [
        ("another format", |m| m["format"] = json!(2), "format is 2"),
        ("an unknown field", |m| m["colour"] = json!("blue"), "unknown field `colour`"),
        ("a missing label", |m| drop(m["labels"].as_array_mut().unwrap().pop()), "for 6 labels"),
        ("a doubled label", |m| m["labels"][0]["code"] = m["labels"][1]["code"].clone(), "stands twice"),
        ("another width", |m| m["input"]["width"] = json!(99), "has shape"),
        ("another layout", |m| m["input"]["layout"] = json!("nhwc"), "has shape"),
        ("another type", |m| m["input"]["type"] = json!("uint8"), "is of type"),
        ("another input name", |m| m["input"]["name"] = json!("pixels"), "no input \"pixels\""),
        ("another output name", |m| m["outputs"]["scores"]["name"] = json!("probs"), "no output \"probs\""),
        ("no ood output", |m| m["outputs"]["ood"]["name"] = json!("strange"), "no output \"strange\""),
        (
            "an ood output of several numbers",
            |m| m["outputs"]["ood"]["name"] = json!("logits"),
            "output \"logits\" for one number: has shape [1, 7], the manifest says [] or [1] or [1, 1]",
        ),
        ("no map output", |m| m["outputs"]["map"] = json!({"name": "heat"}), "no output \"heat\""),
        ("a map of no places", |m| m["outputs"]["map"] = json!({"name": "logits"}), "output \"logits\": has shape"),
        ("a share above 1", |m| m["evaluation"] = evaluation(70.0), "must lie between 0 and 1"),
        ("half an evaluation", |m| m["evaluation"] = json!({"data": "none"}), "missing field `coverage`"),
        ("another size", |m| m["network"]["size_bytes"] = json!(1), "bytes, the manifest says 1"),
        ("a path as file name", |m| m["network"]["file"] = json!("../model.onnx"), "plain file name"),
        ("no golden picture", |m| m["golden"]["pictures"] = json!([]), "at least one picture"),
        (
            "a golden picture without the ood that decides",
            |m| drop(m["golden"]["pictures"][0].as_object_mut().unwrap().remove("ood")),
            "\"hairy\" has no ood, which abstention.max_ood needs",
        ),
        ("a golden ood that is not met", |m| m["golden"]["pictures"][0]["ood"] = json!(9.0), "ood is"),
        ("a golden answer that is not met", |m| m["input"]["scale"] = json!(0.1), "golden picture"),
        ("no temperature", |m| m["temperature"] = json!(0), "temperature must be above 0"),
    ];
    for (what, change, problem) in changes {
        let (mut manifest, network) = shipped();
        change(&mut manifest);
        // A label less is a probability less, or that would be found first.
        let labels = manifest["labels"].as_array().unwrap().len();
        for picture in manifest["golden"]["pictures"].as_array_mut().unwrap() {
            picture["probabilities"].as_array_mut().unwrap().truncate(labels);
        }
        let error = load(&manifest, network).err().unwrap_or_else(|| panic!("{what} was accepted"));
        assert!(error.contains(problem), "{what}: {error}");
    }
}

#[test]
fn a_network_of_other_bytes_and_a_manifest_of_another_digest_are_refused() {
    let (manifest, mut network) = shipped();
    let bytes = manifest.to_string().into_bytes();
    let wrong = Bundle::verify(&bytes, network.clone(), Some(&sha256(b"another manifest"))).unwrap_err().to_string();
    assert!(wrong.contains("MODEL_DIGEST is"), "{wrong}");
    network[1000] ^= 1;
    let wrong = Bundle::verify(&bytes, network, None).unwrap_err().to_string();
    assert!(wrong.contains("model.onnx has SHA-256"), "{wrong}");
}

#[cfg(target_os = "linux")]
#[test]
fn what_takes_the_place_of_a_verified_network_is_not_loaded() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["manifest.json", "model.onnx"] {
        std::fs::copy(root().join("model").join(name), folder.path().join(name)).unwrap();
    }
    let bundle = Bundle::from_directory(folder.path(), None).unwrap();
    std::fs::write(folder.path().join("another"), b"no network").unwrap();
    std::fs::rename(folder.path().join("another"), folder.path().join("model.onnx")).unwrap();
    Model::load(bundle, &ort_library(), 2).unwrap();
    assert!(Bundle::from_directory(folder.path(), None).is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn many_that_start_at_once_all_have_the_bundle() {
    let folder = tempfile::tempdir().unwrap();
    let store = DirBlobStore::open(&folder.path().join("blobs"), b"secret").unwrap();
    let digest = Bundle::publish(&root().join("model"), None, &store).await.unwrap();
    for round in 0..10 {
        let cache = folder.path().join(round.to_string());
        let fetches = (0..8).map(|_| {
            let (store, digest, cache) = (store.clone(), digest.clone(), cache.clone());
            tokio::spawn(async move { Bundle::fetch(&store, &digest, &cache).await.map(drop) })
        });
        for fetched in futures_util::future::join_all(fetches).await {
            fetched.unwrap().unwrap();
        }
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1, "nothing is left beside it");
    }
}

#[tokio::test]
async fn a_bundle_is_fetched_once_and_a_spoilt_copy_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (blobs, cache) = (folder.path().join("blobs"), folder.path().join("cache"));
    let store = DirBlobStore::open(&blobs, b"secret").unwrap();
    let digest = Bundle::publish(&root().join("model"), None, &store).await.unwrap();
    Bundle::fetch(&store, &digest, &cache).await.unwrap();
    let copy = cache.join(&digest).join("model.onnx");
    std::fs::write(&copy, b"spoilt").unwrap();
    Bundle::fetch(&store, &digest, &cache).await.unwrap();
    assert_ne!(std::fs::read(&copy).unwrap(), b"spoilt");
    // Warm: the blob store is not asked.
    std::fs::remove_dir_all(&blobs).unwrap();
    Bundle::fetch(&store, &digest, &cache).await.unwrap();
    std::fs::remove_dir_all(&cache).unwrap();
    let missing = Bundle::fetch(&store, &digest, &cache).await.unwrap_err().to_string();
    assert!(missing.contains("is not in the blob store"), "{missing}");
}

/// How far the median photo's may be off.
const REFERENCE_MEDIAN: f64 = 0.015;

#[test]
fn the_reference_network_works_by_manifest_alone_within_its_tolerance() {
    let Some(reference) = Reference::read() else { return };
    assert_eq!(reference.expected.len(), 56);
    let model = load(&reference.manifest(), reference.network.clone()).unwrap();
    let mut differences = Vec::new();
    for (name, expected) in &reference.expected {
        let bytes = std::fs::read(reference.photo(name)).unwrap();
        let upright = picture::decode(&bytes, 1).unwrap();
        let outputs = model.run(&picture::tensor(&upright, &model.manifest.input).unwrap()).unwrap();
        let predictions = model.read(&outputs).predictions;
        let expected: HashMap<&str, f64> =
            model.manifest.labels.iter().zip(expected).map(|(label, p)| (label.code.as_str(), *p)).collect();
        let off = |one: &shared::job::Prediction| (one.probability - expected[one.label.as_str()]).abs();
        let difference = predictions.iter().map(off).fold(0.0, f64::max);
        assert!(difference <= reference::TOLERANCE, "{name}: off by {difference}");
        let best = expected.values().copied().fold(0.0, f64::max);
        assert!(
            expected[predictions[0].label.as_str()] >= best - reference::TOLERANCE,
            "{name}: another class came first"
        );
        differences.push(difference);
    }
    differences.sort_by(f64::total_cmp);
    let (median, worst) = (differences[28], differences[55]);
    assert!(median <= REFERENCE_MEDIAN, "median {median}");
    println!("56 photos: median difference {median:.4}, largest {worst:.4}");
}

/// How far a probability may be off from Python's of the same pixels.
const PARITY: f64 = 0.02;

/// Photos decoded by Pillow, whose resizing and probabilities are Python's. The first label is the same one, unless
/// Python's first two are closer to each other than a probability may be off: then it is one of these two.
#[test]
#[ignore = "needs what model/check.sh --parity wrote; scripts/test-hosts runs it"]
fn real_photos_score_as_they_do_in_python() {
    let folder = PathBuf::from(Env::of_process().text("PARITY_DIR").unwrap().unwrap());
    let written: Value = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let photos: BTreeMap<String, Vec<f64>> = serde_json::from_value(written["photos"].clone()).unwrap();
    assert!(photos.len() >= 200, "{} photos", photos.len());
    let (manifest, network) = shipped();
    let model = load(&manifest, network).unwrap();
    let codes: Vec<&str> = model.manifest.labels.iter().map(|label| label.code.as_str()).collect();
    assert_eq!(written["labels"], json!(codes));
    let (mut furthest, mut others) = (0.0_f64, 0);
    for (name, expected) in &photos {
        let picture = picture::decode(&std::fs::read(folder.join(name)).unwrap(), 1).unwrap();
        let outputs = model.run(&picture::tensor(&picture, &model.manifest.input).unwrap()).unwrap();
        let found = model.calibrate(&outputs.scores);
        assert_eq!(found.len(), expected.len(), "{name}");
        let off = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs()).fold(0.0, f64::max);
        assert!(off <= PARITY, "{name}: off by {off}");
        furthest = furthest.max(off);
        let order = |of: &[f64]| {
            let mut order: Vec<usize> = (0..of.len()).collect();
            order.sort_by(|one, other| of[*other].total_cmp(&of[*one]));
            order
        };
        let (first, ranks) = (order(&found)[0], order(expected));
        if first != ranks[0] {
            let close = expected[ranks[0]] - expected[ranks[1]] < PARITY;
            assert!(close && first == ranks[1], "{name}: {} comes first, in Python {}", codes[first], codes[ranks[0]]);
            others += 1;
        }
    }
    let count = photos.len();
    report(&format!("{count} photos: off by {furthest:.4} at most, another of two close labels first on {others}"));
}

/// A photo enlarged, which is as smooth as they come, and many small ones side by side, which is as
/// detailed.
fn large_photos() -> [RgbImage; 2] {
    let drawn = image::load_from_memory(&mole()).unwrap().into_rgb8();
    let small = imageops::resize(&drawn, 200, 150, FilterType::Triangle);
    let mosaic = RgbImage::from_fn(2802, 2101, |x, y| *small.get_pixel(x % 200, y % 150));
    [imageops::resize(&drawn, 2802, 2101, FilterType::CatmullRom), mosaic]
}

#[test]
fn a_large_photo_reads_at_a_quarter_as_it_does_with_every_pixel() {
    let (manifest, network) = shipped();
    let model = load(&manifest, network).unwrap();
    let Manifest { input, quality: thresholds, golden, .. } = &model.manifest;
    for photo in large_photos() {
        let mut jpeg = Vec::new();
        JpegEncoder::new_with_quality(&mut jpeg, 85).encode_image(&photo).unwrap();
        for orientation in [1, 6] {
            let whole = picture::decode(&jpeg, orientation).unwrap();
            let quarter = picture::decode_for(&jpeg, orientation, input).unwrap();
            assert_eq!(quarter.side_px, 2101);
            assert_eq!(quarter.pixels.width(), whole.width() / 4);
            let [judged, expected] = [&quarter.pixels, &whole].map(|picture| gate(picture, 2101, thresholds).unwrap());
            assert_eq!(judged.reasons, expected.reasons);
            for (name, value) in &expected.measures {
                let off = (judged.measures[name] - value).abs();
                println!("{name} {value:.3}, at a quarter {:.3}", judged.measures[name]);
                assert!(off <= 0.05 * value.abs() + 1.0, "{name}: {value}, at a quarter {}", judged.measures[name]);
            }
            let [judged, expected] = [&quarter.pixels, &whole].map(|picture| {
                let outputs = model.run(&picture::tensor(picture, input).unwrap()).unwrap();
                (model.calibrate(&outputs.scores), outputs.ood.unwrap())
            });
            println!("ood {:.4}, at a quarter {:.4}", expected.1, judged.1);
            for (judged, expected) in judged.0.iter().zip(&expected.0) {
                println!("{expected:.4}, at a quarter {judged:.4}");
                assert!((judged - expected).abs() <= golden.tolerance, "{expected}, at a quarter {judged}");
            }
        }
    }
}

#[test]
fn every_layout_and_type_of_input_carries_the_same_picture() {
    use inference::manifest::{Element, Layout};
    use inference::picture::Tensor;
    let (manifest, _) = shipped();
    let manifest = Manifest::parse(manifest.to_string().as_bytes()).unwrap();
    let upright = picture::decode(&mole(), 1).unwrap();
    let tensor = |layout, element| {
        picture::tensor(&upright, &inference::manifest::Input { layout, element, ..manifest.input.clone() }).unwrap()
    };
    let Tensor::Float32(planes) = tensor(Layout::Nchw, Element::Float32) else { panic!() };
    let Tensor::Float32(pixels) = tensor(Layout::Nhwc, Element::Float32) else { panic!() };
    let Tensor::Uint8(bytes) = tensor(Layout::Nhwc, Element::Uint8) else { panic!() };
    let Tensor::Uint8(byte_planes) = tensor(Layout::Nchw, Element::Uint8) else { panic!() };
    let input = &manifest.input;
    for channel in 0..3 {
        for (y, x) in [(0, 0), (3, 7), (50, 20)] {
            let byte = bytes[[0, y, x, channel]];
            let value = (f32::from(byte) * input.scale - input.mean[channel]) / input.std[channel];
            assert_eq!(byte_planes[[0, channel, y, x]], byte);
            assert_eq!(planes[[0, channel, y, x]], value);
            assert_eq!(pixels[[0, y, x, channel]], value);
        }
    }
}

/// The same picture by every way in and out that a manifest can name.
#[test]
fn networks_of_every_layout_type_and_kind_say_the_same_of_the_same_picture() {
    // Redder to the right, greener to the bottom: no two pixels are alike. It fits, so that none is resized.
    let picture =
        RgbImage::from_fn(WIDTH, HEIGHT, |x, y| Rgb([20 * x, 120 + 10 * y, 30 + 5 * x + 3 * y].map(|byte| byte as u8)));
    for bits in 0..32_u32 {
        let flag = |at: u32| (bits >> at) & 1 == 1;
        let classes =
            vec![("one", [3.0, -1.0, 0.5]), ("two", [0.0, 2.0, 1.0]), ("three", [1.0; 3]), ("four", [0.0; 3])];
        let network = Network {
            nhwc: flag(0),
            uint8: flag(1),
            probabilities: flag(2),
            ood: flag(3),
            map: flag(4),
            // ImageNet's: another of each channel.
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
            temperature: 2.5,
            classes,
            ..Network::default()
        };
        let model = load(&network.manifest(), network.onnx()).unwrap_or_else(|why| panic!("{network:?}: {why}"));
        let outputs = run(&model, &picture);
        for (found, expected) in model.calibrate(&outputs.scores).iter().zip(network.expected(&picture)) {
            assert!((found - expected).abs() < 1e-4, "{network:?}: {found}, {expected}");
        }
        assert_eq!(model.read(&outputs).predictions[0].label, "two");
        assert_eq!((outputs.ood.is_some(), outputs.map.is_some()), (network.ood, network.map));
        let is_near = |found: f32, expected: f64| (f64::from(found) - expected).abs() < 1e-4 * expected.abs().max(1.0);
        let fed: Vec<f64> = picture.pixels().map(|pixel| network.fed(*pixel)).collect();
        if let Some(ood) = outputs.ood {
            let mean = fed.iter().sum::<f64>() / f64::from(WIDTH * HEIGHT);
            assert!(is_near(ood, mean), "{network:?}: {ood}, {mean}");
        }
        if let Some(map) = outputs.map {
            assert_eq!((map.width, map.height, map.values.len()), (WIDTH, HEIGHT, fed.len()));
            let mut places = map.values.iter().zip(&fed);
            assert!(places.all(|(found, expected)| is_near(*found, *expected)), "{network:?}: {map:?}");
        }
    }
}

fn run(model: &Model, picture: &RgbImage) -> RawOutputs {
    model.run(&picture::tensor(picture, &model.manifest.input).unwrap()).unwrap()
}

#[test]
fn an_ood_output_is_one_float_however_it_is_shaped() {
    let network = Network { ood: true, others: true, ..Network::default() };
    for (output, problem) in [
        // That it is the number, the golden picture tells.
        ("ood_mean", ""),
        ("column", ""),
        ("scalar", ""),
        ("first", "output \"first\" for one number: is of type"),
        ("map_mean", "output \"map_mean\" for one number: has shape"),
        // How many it has only a run tells.
        ("row", "an output has the wrong length"),
    ] {
        let mut manifest = network.manifest();
        manifest["outputs"]["ood"]["name"] = json!(output);
        let error = load(&manifest, network.onnx()).err().unwrap_or_default();
        assert_eq!(error.is_empty(), problem.is_empty(), "{output}: {error}");
        assert!(error.contains(problem), "{output}: {error}");
    }
}

#[test]
fn a_map_without_numbers_or_of_too_many_is_left_out_and_the_reading_stands() {
    let network = Network { ood: true, others: true, ..Network::default() };
    let black = RgbImage::new(WIDTH, HEIGHT);
    let mut told = Vec::new();
    // Of black the logarithm is no number.
    for (output, is_told) in [("map_mean", true), ("logarithms", false), ("wide", false)] {
        let mut manifest = network.manifest();
        manifest["outputs"]["map"]["name"] = json!(output);
        let model = load(&manifest, network.onnx()).unwrap();
        let outputs = run(&model, &black);
        assert_eq!(outputs.map.is_some(), is_told, "{output}");
        assert!(model.fits(&outputs), "{output}");
        told.push(model.read(&outputs).predictions);
    }
    assert!(told[0].len() == 3 && told.iter().all(|predictions| *predictions == told[0]), "{told:?}");
}

#[test]
fn a_map_from_a_cache_is_taken_only_where_it_is_sound() {
    let network = Network::default();
    let model = load(&network.manifest(), network.onnx()).unwrap();
    let map = |width: u32, height: u32, value: f32| {
        let values = vec![value; (width * height) as usize];
        ActivationMap { width, height, values }
    };
    for (map, fits) in [
        (map(256, 1, 0.0), true),
        (map(1, 256, -1.0), true),
        (map(257, 1, 0.0), false),
        (map(1, 257, 0.0), false),
        (map(0, 1, 0.0), false),
        (map(1, 0, 0.0), false),
        (map(2, 2, f32::NAN), false),
        (map(2, 2, f32::INFINITY), false),
        (ActivationMap { width: 3, ..map(2, 2, 0.0) }, false),
    ] {
        let outputs = RawOutputs { scores: vec![0.0; 3], ood: None, map: Some(map) };
        assert_eq!(model.fits(&outputs), fits, "{:?}", outputs.map);
    }
    let mapless = Network { map: false, ..network };
    let model = load(&mapless.manifest(), mapless.onnx()).unwrap();
    let outputs = RawOutputs { scores: vec![0.0; 3], ood: None, map: Some(map(2, 2, 0.0)) };
    assert!(!model.fits(&outputs), "another network's");
}

#[test]
fn a_reading_at_the_thresholds_stands_and_one_beyond_them_says_which() {
    let network = Network { ood: true, ..Network::default() };
    let mut manifest = network.manifest();
    manifest["abstention"] = json!({"min_probability": 0.5, "max_ood": 1.5});
    let model = load(&manifest, network.onnx()).unwrap();
    // Of the first two classes a half each, less what the third takes: nothing, or 2 in 100,000.
    let (half, less, sure) = ([0.0, 0.0, -1000.0], [0.0, 0.0, -10.0], [9.0, 0.0, 0.0]);
    for (scores, ood, reason) in [
        (half, 1.5, None),
        (sure, -1.0, None),
        (less, 1.5, Some(LowConfidence)),
        (sure, 1.5_f32.next_up(), Some(OutOfDistribution)),
        (less, 1.5_f32.next_up(), Some(OutOfDistribution)),
    ] {
        let reading = model.read(&RawOutputs { scores: scores.to_vec(), ood: Some(ood), map: None });
        assert_eq!(reading.abstained.map(|abstained| abstained.reason), reason, "{scores:?}, {ood}");
        // An abstention tells no label.
        assert_eq!(reading.predictions.len(), if reason.is_some() { 0 } else { 3 }, "{scores:?}, {ood}");
    }
    manifest["abstention"] = json!({"min_probability": 0.5});
    let model = load(&manifest, network.onnx()).unwrap();
    let reading = model.read(&RawOutputs { scores: sure.to_vec(), ood: Some(1e9), map: None });
    assert_eq!(reading.abstained, None, "nothing says how strange is too strange");
}
