//! A manifest to be filled in: what a network's graph tells is written, what it cannot tell is marked.
//!
//! Called with the graph of a network; writes nothing. A value that begins with [`FILL_IN`] keeps a
//! manifest from being used.

use serde_json::{Value, json};

use crate::bundle::{Refused, sha256};
use crate::manifest::FORMAT;
use crate::model::{Graph, Outlet};

/// What a value begins with that only a person can know.
pub const FILL_IN: &str = "FILL IN";

fn fill_in(what: &str) -> Value {
    json!(format!("{FILL_IN}: {what}"))
}

/// The paths of all values that were not filled in, with what is wanted there.
#[must_use]
pub fn missing(manifest: &Value) -> Vec<String> {
    let mut found = Vec::new();
    collect(manifest, String::new(), &mut found);
    found
}

fn collect(value: &Value, path: String, found: &mut Vec<String>) {
    match value {
        Value::String(text) if text.starts_with(FILL_IN) => {
            let wanted = text.trim_start_matches(FILL_IN).trim_start_matches(':').trim();
            found.push(if wanted.is_empty() { path } else { format!("{path} ({wanted})") });
        }
        Value::Array(values) => {
            values.iter().enumerate().for_each(|(at, value)| collect(value, format!("{path}[{at}]"), found));
        }
        Value::Object(fields) => {
            let dot = if path.is_empty() { "" } else { "." };
            fields.iter().for_each(|(name, value)| collect(value, format!("{path}{dot}{name}"), found));
        }
        _ => {}
    }
}

/// A manifest for the network `file` with these bytes.
///
/// # Errors
/// [`Refused`] where no input takes a picture of three channels, or no output can be scores.
pub fn manifest(file: &str, network: &[u8], graph: &Graph) -> Result<Value, Refused> {
    let input = graph.inputs.iter().find_map(picture);
    let input =
        input.ok_or_else(|| Refused::new(format!("{file}: no input takes a picture, [1,3,H,W] or [1,H,W,3]")))?;
    let scores = graph.outputs.iter().find(|output| classes(output).is_some());
    let scores = scores.ok_or_else(|| Refused::new(format!("{file}: no output gives scores, float32 [1, classes]")))?;
    let label = |at| {
        json!({"code": fill_in(&format!("of score {at}, such as nv")), "name": fill_in("for people"),
        "malignant": fill_in("true or false; pre-malignant counts")})
    };
    let mut outputs = json!({"scores": {"name": scores.name, "kind": kind(&scores.name)}});
    for (field, is_it, names) in
        [("ood", is_number as fn(&Outlet) -> bool, &["ood"] as &[&str]), ("map", is_map, &["map", "cam"])]
    {
        if let Some(output) = graph.outputs.iter().find(|output| is_it(output) && is_called(output, names)) {
            outputs[field] = json!({"name": output.name});
        }
    }
    let picture = json!({
        "name": fill_in("of a picture that is yours to publish"),
        "png_base64": fill_in("the picture, a PNG in base64"),
        "probabilities": fill_in("what your own code gives for it after calibration, a number for each label"),
    });
    Ok(json!({
        "format": FORMAT,
        "name": fill_in("for people"),
        "version": fill_in("for people"),
        "licence": fill_in("an SPDX expression or a sentence"),
        "network": {"file": file, "sha256": sha256(network), "size_bytes": network.len()},
        "labels": (0..classes(scores).unwrap_or(0)).map(label).collect::<Vec<_>>(),
        "input": input,
        "outputs": outputs,
        "temperature": 1.0,
        "abstention": {"min_probability": fill_in("0 to 1; below it the model gives no label")},
        // Of the photo and not of the network.
        "quality": {
            "min_side_px": 120, "min_sharpness": 0.35, "min_brightness": 70, "max_brightness": 240, "min_contrast": 32,
        },
        "golden": {"tolerance": 0.02, "pictures": [picture]},
    }))
}

/// The manifest's `input`, where the outlet can take a picture.
fn picture(outlet: &Outlet) -> Option<Value> {
    let (layout, [height, width]) = match *outlet.shape.as_slice() {
        [_, 3, height, width] => ("nchw", [height, width]),
        [_, height, width, 3] => ("nhwc", [height, width]),
        _ => return None,
    };
    if !["float32", "uint8"].contains(&outlet.element.as_str()) {
        return None;
    }
    let side = |side: i64, name| if side > 0 { json!(side) } else { fill_in(&format!("the {name} it was trained at")) };
    let mut input = json!({
        "name": outlet.name, "layout": layout, "type": outlet.element,
        "width": side(width, "width"), "height": side(height, "height"),
        "resize": fill_in("bilinear, bicubic or lanczos3, as in training"),
    });
    if outlet.element == "float32" {
        // value = (byte · scale − mean) / std
        input["scale"] =
            fill_in("1 where mean and std are in bytes, 0.00392156862745098 (1/255) where they are in 0 to 1");
        input["mean"] = fill_in("[R, G, B], as in training");
        input["std"] = fill_in("[R, G, B], as in training");
    }
    Some(input)
}

/// How many classes the outlet has scores for.
fn classes(outlet: &Outlet) -> Option<i64> {
    match *outlet.shape.as_slice() {
        [_, classes] if classes >= 2 && outlet.element == "float32" => Some(classes),
        _ => None,
    }
}

fn is_number(outlet: &Outlet) -> bool {
    outlet.element == "float32" && matches!(*outlet.shape.as_slice(), [] | [_] | [_, 1])
}

fn is_map(outlet: &Outlet) -> bool {
    outlet.element == "float32" && outlet.shape.len() == 3
}

/// Whether the output's name says what it is: its shape alone does not, and a number of another meaning would decide
/// what is answered.
fn is_called(outlet: &Outlet, names: &[&str]) -> bool {
    let called = outlet.name.to_ascii_lowercase();
    called.split(|letter: char| !letter.is_ascii_alphanumeric()).any(|word| names.contains(&word))
}

/// A name often says it, and the golden pictures find out.
fn kind(name: &str) -> Value {
    let name = name.to_ascii_lowercase();
    match () {
        () if name.contains("logit") => json!("logits"),
        () if name.contains("prob") || name.contains("softmax") => json!("probabilities"),
        () => fill_in("logits or probabilities"),
    }
}
