//! Bundles: what is refused, what is reused, and another network by manifest alone.

use std::collections::HashMap;

use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::{self, FilterType};
use inference::bundle::{Bundle, MANIFEST, sha256};
use inference::manifest::Manifest;
use inference::model::Model;
use inference::{gate, picture};
use serde_json::{Value, json};
use shared::embedded::DirBlobStore;

use crate::support::network::Network;
use crate::support::process::binary;
use crate::support::reference::{self, Reference};
use crate::support::{mole, ort_library, root};

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
    let changes: [Change; 18] = [
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
        ("no map output", |m| m["outputs"]["map"] = json!({"name": "heat"}), "no output \"heat\""),
        ("a map of no places", |m| m["outputs"]["map"] = json!({"name": "logits"}), "output \"logits\": has shape"),
        ("a share above 1", |m| m["evaluation"] = evaluation(70.0), "must lie between 0 and 1"),
        ("half an evaluation", |m| m["evaluation"] = json!({"data": "none"}), "missing field `coverage`"),
        ("a path as file name", |m| m["network"]["file"] = json!("../model.onnx"), "plain file name"),
        ("no golden picture", |m| m["golden"]["pictures"] = json!([]), "at least one picture"),
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
    let colour = [30, 200, 90];
    let picture = RgbImage::from_pixel(40, 30, image::Rgb(colour));
    let flags = [false, true];
    for (nhwc, uint8, probabilities, extras) in flags
        .iter()
        .flat_map(|nhwc| flags.iter().map(move |uint8| (*nhwc, *uint8)))
        .flat_map(|(nhwc, uint8)| flags.iter().map(move |kind| (nhwc, uint8, *kind)))
        .flat_map(|(nhwc, uint8, kind)| flags.iter().map(move |extras| (nhwc, uint8, kind, *extras)))
    {
        let classes =
            vec![("one", [3.0, -1.0, 0.5]), ("two", [0.0, 2.0, 1.0]), ("three", [1.0; 3]), ("four", [0.0; 3])];
        let network = Network { nhwc, uint8, probabilities, classes, ood: extras, map: extras };
        let model = load(&network.manifest(), network.onnx()).unwrap_or_else(|why| panic!("{network:?}: {why}"));
        let outputs = model.run(&picture::tensor(&picture, &model.manifest.input).unwrap()).unwrap();
        for (found, expected) in model.calibrate(&outputs.scores).iter().zip(network.expected(colour)) {
            assert!((found - expected).abs() < 1e-4, "{network:?}: {found}, {expected}");
        }
        assert_eq!((outputs.ood.is_some(), outputs.map.is_some()), (extras, extras));
        let full = if uint8 { 255.0 } else { 1.0 };
        let mean = colour.iter().map(|byte| f32::from(*byte) / 255.0 * full / 3.0).sum::<f32>();
        if let (Some(ood), Some(map)) = (outputs.ood, outputs.map) {
            assert_eq!((map.width, map.height), (8, 8));
            assert!(map.values.iter().chain([&ood]).all(|value| (value - mean).abs() < 1e-3 * full), "{network:?}");
        }
        assert_eq!(
            model.read(&model.run(&picture::tensor(&picture, &model.manifest.input).unwrap()).unwrap()).predictions[0]
                .label,
            "two"
        );
    }
}

/// `local` on a folder, and what it printed in all.
fn local(arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = std::process::Command::new(binary("local"));
    let output = command.env_clear().env("ORT_DYLIB_PATH", ort_library()).args(arguments).output().unwrap();
    let printed = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(printed).unwrap())
}

#[test]
fn a_bundle_is_begun_from_its_network_filled_in_and_passes_the_check() {
    let Some(reference) = Reference::read() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("reference.onnx"), &reference.network).unwrap();
    let (code, printed) = local(&["model", "new", &path("reference.onnx")]);
    assert_eq!(code, Some(0), "{printed}");
    for field in ["labels[6].code", "input.resize", "input.mean", "abstention.min_probability", "png_base64"] {
        assert!(printed.contains(field), "{field}: {printed}");
    }
    let (code, printed) = local(&["model", "new", &path("reference.onnx")]);
    assert_eq!(code, Some(1), "what somebody has filled in is not written over");
    assert!(printed.contains("is there already"), "{printed}");
    let (code, printed) = local(&["model", "check", &path("")]);
    assert_eq!(code, Some(1));
    assert!(printed.contains("not filled in") && printed.contains("input.resize"), "{printed}");

    // What the graph tells stays; what a person knows is filled in.
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(path(MANIFEST)).unwrap()).unwrap();
    let known = reference.manifest();
    for told in ["network", "outputs"] {
        assert_eq!(manifest[told], known[told], "the graph tells it");
    }
    for told in ["name", "layout", "type"] {
        assert_eq!(manifest["input"][told], known["input"][told], "the graph tells it");
    }
    for asked in ["name", "version", "licence", "labels", "abstention", "golden"] {
        manifest[asked] = known[asked].clone();
    }
    for asked in ["width", "height", "resize", "scale", "mean", "std"] {
        manifest["input"][asked] = known["input"][asked].clone();
    }
    std::fs::write(path(MANIFEST), manifest.to_string()).unwrap();
    let (code, printed) = local(&["model", "check", &path("")]);
    assert_eq!(code, Some(0), "{printed}");
    for part in ["reference 1, 7 labels", "golden     ok", "ms a run", "MODEL_DIGEST"] {
        assert!(printed.contains(part), "{part}: {printed}");
    }

    // Fed otherwise than it was trained: the golden pictures tell.
    manifest["input"]["mean"] = json!([0.0, 0.0, 0.0]);
    std::fs::write(path(MANIFEST), manifest.to_string()).unwrap();
    let (code, printed) = local(&["model", "check", &path("")]);
    assert_eq!(code, Some(1), "{printed}");
    assert!(printed.contains("WRONG") && printed.contains("compare input.resize"), "{printed}");
}

#[test]
fn what_the_graph_tells_is_in_the_draft_and_what_is_no_classifier_gets_none() {
    // Outputs of the same shapes whose names say nothing: what they mean is not guessed.
    fn renamed(onnx: &[u8]) -> Vec<u8> {
        let mut renamed = onnx.to_vec();
        for at in 0..onnx.len() {
            for (known, other) in [(b"ood_mean", b"age_mean"), (b"map_mean", b"out_mean")] {
                if onnx[at..].starts_with(known) {
                    renamed[at..at + known.len()].copy_from_slice(other);
                }
            }
        }
        renamed
    }
    for nhwc in [false, true] {
        let network = Network { nhwc, uint8: nhwc, probabilities: nhwc, ood: true, ..Network::default() };
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("means.onnx"), network.onnx()).unwrap();
        assert_eq!(local(&["model", "new", &path("means.onnx")]).0, Some(0));
        let drafted: Value = serde_json::from_slice(&std::fs::read(path(MANIFEST)).unwrap()).unwrap();
        let known = network.manifest();
        for told in ["layout", "type", "width", "height"] {
            assert_eq!(drafted["input"][told], known["input"][told]);
        }
        assert_eq!(
            (&drafted["outputs"]["ood"], &drafted["outputs"]["map"]),
            (&known["outputs"]["ood"], &known["outputs"]["map"])
        );
        assert_eq!(drafted["labels"].as_array().unwrap().len(), 3);
        assert_eq!(drafted["input"]["mean"].is_string(), !nhwc, "bytes go in as they are");
        std::fs::remove_file(path(MANIFEST)).unwrap();
        std::fs::write(path("means.onnx"), renamed(&network.onnx())).unwrap();
        assert_eq!(local(&["model", "new", &path("means.onnx")]).0, Some(0));
        let drafted: Value = serde_json::from_slice(&std::fs::read(path(MANIFEST)).unwrap()).unwrap();
        assert_eq!((&drafted["outputs"]["ood"], &drafted["outputs"]["map"]), (&Value::Null, &Value::Null));
        assert_eq!(local(&["model", "new", &path("means.onnx")]).0, Some(1), "a manifest is not written over");
        std::fs::write(path("none.onnx"), b"no network").unwrap();
        assert_eq!(local(&["model", "new", &path("none.onnx")]).0, Some(1));
    }
}
