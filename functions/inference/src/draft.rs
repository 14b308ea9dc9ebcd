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
    let input = graph.inputs.iter().find_map(picture).ok_or_else(|| {
        let found = listed(&graph.inputs);
        Refused::new(format!(
            "{file}: no input takes a picture, float32 or uint8 [1,3,H,W] or [1,H,W,3]; it has: {found}"
        ))
    })?;
    // One that says how many there are is surer to be scores.
    let scores = graph.outputs.iter().find(|output| classes(output).is_some());
    let scores = scores.or_else(|| graph.outputs.iter().find(|output| is_of_any_size(output))).ok_or_else(|| {
        let found = listed(&graph.outputs);
        Refused::new(format!("{file}: no output gives scores, float32 [1, classes], two or more; it has: {found}"))
    })?;
    let label = |at| {
        json!({"code": fill_in(&format!("of score {at}, such as nv")), "name": fill_in("for people"),
        "malignant": fill_in("true or false; pre-malignant counts")})
    };
    let labels: Vec<Value> = match classes(scores) {
        Some(classes) => (0..classes).map(label).collect(),
        None => {
            let others =
                fill_in("the graph does not say how many there are: one for each other score, or take this out");
            vec![label(0), label(1), others]
        }
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
        "labels": labels,
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
    // A host gives it one at a time.
    let (layout, [height, width]) = match *outlet.shape.as_slice() {
        [-1 | 1, 3, height, width] => ("nchw", [height, width]),
        [-1 | 1, height, width, 3] => ("nhwc", [height, width]),
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

/// How many classes the outlet has scores for, where its shape says it.
fn classes(outlet: &Outlet) -> Option<i64> {
    match *outlet.shape.as_slice() {
        [_, classes] if classes >= 2 && outlet.element == "float32" => Some(classes),
        _ => None,
    }
}

/// Whether the outlet can have scores for a number of classes that only a run tells.
fn is_of_any_size(outlet: &Outlet) -> bool {
    outlet.element == "float32" && matches!(*outlet.shape.as_slice(), [_, -1])
}

fn is_number(outlet: &Outlet) -> bool {
    outlet.element == "float32" && matches!(*outlet.shape.as_slice(), [] | [-1 | 1] | [-1 | 1, 1])
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

/// What a network has, where nothing of it will do.
fn listed(outlets: &[Outlet]) -> String {
    let each = outlets.iter().map(|Outlet { name, element, shape }| format!("{name} {element} {shape:?}"));
    each.collect::<Vec<_>>().join(", ")
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

#[cfg(test)]
mod tests {
    use super::*;

    fn outlet(name: &str, shape: &[i64]) -> Outlet {
        Outlet { name: name.to_owned(), element: "float32".to_owned(), shape: shape.to_vec() }
    }

    #[test]
    fn an_output_called_ood_is_drafted_as_one_where_it_is_one_number() {
        let cases: [(&[i64], bool); 7] = [
            (&[], true),
            (&[1], true),
            (&[-1], true),
            (&[-1, 1], true),
            (&[7], false),
            (&[-1, 7], false),
            (&[7, 1], false),
        ];
        for (shape, drafted) in cases {
            let inputs = vec![outlet("picture", &[-1, 3, 12, 8])];
            let outputs = vec![outlet("logits", &[-1, 2]), outlet("ood", shape)];
            let draft = manifest("network.onnx", b"", &Graph { inputs, outputs }).unwrap();
            assert_eq!(draft["outputs"]["ood"].is_object(), drafted, "{shape:?}");
        }
    }

    #[test]
    fn height_and_width_are_drafted_from_either_layout() {
        for (layout, shape) in [("nchw", [-1, 3, 12, 8]), ("nhwc", [-1, 12, 8, 3])] {
            let graph = Graph { inputs: vec![outlet("picture", &shape)], outputs: vec![outlet("logits", &[-1, 2])] };
            let input = &manifest("network.onnx", b"", &graph).unwrap()["input"];
            assert_eq!((&input["layout"], &input["width"], &input["height"]), (&json!(layout), &json!(8), &json!(12)));
        }
    }
}
