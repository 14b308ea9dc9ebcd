//! The faults that a bundle may have, in the order of the steps of a check, each with what is said of it.

use std::path::Path;

use inference::bundle::MANIFEST;
use serde_json::json;

use super::{
    AT_BUNDLE, AT_GOLDEN, AT_INTERFACE, BEGIN, COMPARE, CORRECT, DECODE, FILE, FIT, LOAD, described, edit, relabel,
};

/// What is done to the folder, the steps that are printed, a part of the complaint and of the advice.
type Fault = (fn(&Path), &'static str, &'static str, &'static str);

pub(super) const FAULTS: [Fault; 27] = [
    // Which folder.
    (|at| std::fs::remove_dir_all(at).unwrap(), AT_BUNDLE, "manifest.json: No such file", BEGIN),
    (|at| std::fs::remove_file(at.join(MANIFEST)).unwrap(), AT_BUNDLE, "manifest.json: No such file", BEGIN),
    // What the manifest is.
    (|at| std::fs::write(at.join(MANIFEST), "no JSON").unwrap(), AT_BUNDLE, "at line 1 column", CORRECT),
    (|at| std::fs::write(at.join(MANIFEST), "{\"format\": 1,").unwrap(), AT_BUNDLE, "EOF while parsing", CORRECT),
    (|at| edit(at, |m| m["colour"] = json!("blue")), AT_BUNDLE, "unknown field `colour`", CORRECT),
    (|at| edit(at, |m| m["input"]["type"] = json!("float16")), AT_BUNDLE, "unknown variant `float16`", CORRECT),
    (|at| edit(at, |m| m["temperature"] = json!(0)), AT_BUNDLE, "temperature must be above 0", CORRECT),
    // A label less than the golden picture has probabilities.
    (
        |at| edit(at, |m| m["labels"].as_array_mut().unwrap().truncate(2)),
        AT_BUNDLE,
        "3 probabilities for 2 labels",
        CORRECT,
    ),
    // Which network.
    (|at| std::fs::remove_file(at.join("means.onnx")).unwrap(), AT_BUNDLE, "means.onnx: No such file", FILE),
    (|at| edit(at, |m| m["network"]["file"] = json!("other.onnx")), AT_BUNDLE, "other.onnx: No such file", FILE),
    (|at| std::fs::write(at.join("means.onnx"), "short").unwrap(), AT_BUNDLE, "means.onnx has 5 bytes", FILE),
    (|at| edit(at, |m| m["network"]["size_bytes"] = json!(5)), AT_BUNDLE, "bytes, the manifest says 5", FILE),
    (|at| edit(at, |m| m["network"]["sha256"] = json!("0".repeat(64))), AT_BUNDLE, "the manifest says 00000000", FILE),
    // What the network is.
    (|at| write_network(at, b"no network"), AT_INTERFACE, "means.onnx: ", LOAD),
    (|at| edit(at, |m| m["input"]["width"] = json!(9)), AT_INTERFACE, "the manifest says [1, 3, 12, 9]", FIT),
    (|at| edit(at, |m| m["input"]["layout"] = json!("nhwc")), AT_INTERFACE, "says [1, 12, 8, 3]", FIT),
    (|at| edit(at, |m| m["input"]["type"] = json!("uint8")), AT_INTERFACE, "\"picture\": is of type", FIT),
    (|at| edit(at, |m| m["input"]["name"] = json!("pixels")), AT_INTERFACE, "\"pixels\"; it has: picture", FIT),
    (|at| edit(at, |m| m["outputs"]["scores"]["name"] = json!("p")), AT_INTERFACE, "\"p\"; it has: scores", FIT),
    (|at| relabel(at, 2), AT_INTERFACE, "for 2 labels: has shape [-1, 3]", FIT),
    (|at| relabel(at, 4), AT_INTERFACE, "for 4 labels: has shape [-1, 3]", FIT),
    // What it says.
    (
        |at| edit(at, |m| m["input"]["scale"] = json!(1.0)),
        AT_GOLDEN,
        "golden picture \"a colour\": red is 1.0000, expected",
        COMPARE,
    ),
    (|at| edit(at, |m| m["temperature"] = json!(5.0)), AT_GOLDEN, "golden picture \"a colour\": red is", COMPARE),
    (
        |at| add_golden_picture(at, 1),
        "bundle ok, network ok, interface ok, golden ok, golden WRONG",
        "golden picture \"another\": red is",
        COMPARE,
    ),
    (
        |at| add_golden_picture(at, 0),
        "bundle ok, network ok, interface ok, golden WRONG, golden ok",
        "golden picture \"another\": red is",
        COMPARE,
    ),
    // What its golden picture is: no base64, and the base64 of no picture.
    (
        |at| edit(at, |m| m["golden"]["pictures"][0]["png_base64"] = json!("***")),
        AT_GOLDEN,
        "golden picture \"a colour\": ",
        DECODE,
    ),
    (
        |at| edit(at, |m| m["golden"]["pictures"][0]["png_base64"] = json!("aGVsbG8=")),
        AT_GOLDEN,
        "golden picture \"a colour\": ",
        DECODE,
    ),
];

/// A second golden picture at `place`, whose answer is not met.
fn add_golden_picture(folder: &Path, place: usize) {
    edit(folder, |manifest| {
        let pictures = manifest["golden"]["pictures"].as_array_mut().unwrap();
        let mut another = pictures[0].clone();
        another["name"] = json!("another");
        another["probabilities"].as_array_mut().unwrap().reverse();
        pictures.insert(place, another);
    });
}

fn write_network(folder: &Path, network: &[u8]) {
    std::fs::write(folder.join("means.onnx"), network).unwrap();
    edit(folder, |manifest| manifest["network"] = described(network));
}
