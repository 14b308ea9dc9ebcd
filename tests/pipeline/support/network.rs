//! Networks small enough to be written here, field by field, in ONNX's format (onnx.proto, opset
//! 13): the mean of each channel times a matrix. What they say of a picture can be told without
//! running them.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::{ImageFormat, Rgb, RgbImage};
use inference::bundle::{MANIFEST, sha256};
use serde_json::{Value, json};

/// The colour of the golden picture.
const GOLDEN: [u8; 3] = [200, 120, 60];
/// Of the input.
const SIDE: i64 = 8;
const FLOAT: u64 = 1;
const UINT8: u64 = 2;

/// What is to be made.
#[derive(Debug, Clone)]
pub struct Network {
    pub nhwc: bool,
    pub uint8: bool,
    /// Through a softmax already.
    pub probabilities: bool,
    /// A row of weights for each class, by channel.
    pub classes: Vec<(&'static str, [f32; 3])>,
    /// With an output of one number, the mean of all values.
    pub ood: bool,
    /// With an output of a class activation map: the mean over the channels at each place.
    pub map: bool,
}

impl Default for Network {
    /// Reddish, greenish or bluish, whatever the picture.
    fn default() -> Self {
        let classes = vec![("red", [9.0, 0.0, 0.0]), ("green", [0.0, 9.0, 0.0]), ("blue", [0.0, 0.0, 9.0])];
        Self { nhwc: false, uint8: false, probabilities: false, classes, ood: false, map: true }
    }
}

impl Network {
    /// The bytes of the `.onnx` file.
    pub fn onnx(&self) -> Vec<u8> {
        let operator = |version: u64| message(8, &[text(1, ""), number(2, version)].concat());
        [number(1, 8), operator(13), message(7, &self.graph())].concat()
    }

    fn graph(&self) -> Vec<u8> {
        let (channels, places): (u64, [u64; 2]) = if self.nhwc { (3, [1, 2]) } else { (1, [2, 3]) };
        let shape = if self.nhwc { [-1, SIDE, SIDE, 3] } else { [-1, 3, SIDE, SIDE] };
        let labels = i64::try_from(self.classes.len()).unwrap();
        let mut parts = vec![text(2, "channel means"), self.weights()];
        parts.push(message(11, &value("picture", if self.uint8 { UINT8 } else { FLOAT }, &shape)));
        let picture = if self.uint8 { "values" } else { "picture" };
        if self.uint8 {
            parts.push(node("Cast", &["picture"], "values", &[attribute("to", 2, &number(3, FLOAT))]));
        }
        parts.push(mean(picture, "means", &places));
        let logits = if self.probabilities { "logits" } else { "scores" };
        parts.push(node("MatMul", &["means", "weights"], logits, &[]));
        if self.probabilities {
            parts.push(node("Softmax", &["logits"], "scores", &[attribute("axis", 2, &number(3, 1))]));
        }
        parts.push(message(12, &value("scores", FLOAT, &[-1, labels])));
        if self.ood {
            parts.push(mean(picture, "ood_mean", &[1, 2, 3]));
            parts.push(message(12, &value("ood_mean", FLOAT, &[-1])));
        }
        if self.map {
            parts.push(mean(picture, "map_mean", &[channels]));
            parts.push(message(12, &value("map_mean", FLOAT, &[-1, SIDE, SIDE])));
        }
        parts.concat()
    }

    /// A row for each channel, as the means are multiplied from the left.
    fn weights(&self) -> Vec<u8> {
        let column = |channel: usize| self.classes.iter().map(move |(_, weights)| self.scaled(weights[channel]));
        let values: Vec<u8> = (0..3).flat_map(column).flat_map(f32::to_le_bytes).collect();
        let dims = [number(1, 3), number(1, self.classes.len() as u64)].concat();
        message(5, &[dims, number(2, FLOAT), text(8, "weights"), bytes(9, &values)].concat())
    }

    /// Bytes go in as 0 to 255, floats as 0 to 1.
    fn scaled(&self, weight: f32) -> f32 {
        if self.uint8 { weight / 255.0 } else { weight }
    }

    /// The manifest that fits it.
    pub fn manifest(&self) -> Value {
        let onnx = self.onnx();
        let labels = self.classes.iter().map(|(code, _)| json!({"code": code, "name": code, "malignant": false}));
        let mut input = json!({
            "name": "picture", "layout": if self.nhwc { "nhwc" } else { "nchw" },
            "type": if self.uint8 { "uint8" } else { "float32" },
            "width": SIDE, "height": SIDE, "resize": "bilinear",
        });
        if !self.uint8 {
            input["scale"] = json!(1.0 / 255.0);
        }
        let kind = if self.probabilities { "probabilities" } else { "logits" };
        let mut outputs = json!({"scores": {"name": "scores", "kind": kind}});
        if self.ood {
            outputs["ood"] = json!({"name": "ood_mean"});
        }
        if self.map {
            outputs["map"] = json!({"name": "map_mean"});
        }
        let mut png = std::io::Cursor::new(Vec::new());
        RgbImage::from_pixel(9, 7, Rgb(GOLDEN)).write_to(&mut png, ImageFormat::Png).unwrap();
        let golden = json!({
            "name": "a colour", "png_base64": STANDARD.encode(png.into_inner()), "probabilities": self.expected(GOLDEN),
        });
        json!({
            "format": 1, "name": "channel means", "version": "1", "licence": "CC0-1.0",
            "network": {"file": "means.onnx", "sha256": sha256(&onnx), "size_bytes": onnx.len()},
            "labels": labels.collect::<Vec<_>>(), "input": input, "outputs": outputs, "temperature": 1.0,
            "abstention": {"min_probability": 0.0},
            "quality": {
                "min_side_px": 1, "min_sharpness": 0.0, "min_brightness": 0.0, "max_brightness": 255.0, "min_contrast": 0.0,
            },
            "golden": {"tolerance": 0.001, "pictures": [golden]},
        })
    }

    /// The probabilities of a picture of one colour.
    pub fn expected(&self, colour: [u8; 3]) -> Vec<f64> {
        let channels = colour.map(|byte| f64::from(byte) / 255.0);
        let weighed = |weights: &[f32; 3]| -> f64 { (0..3).map(|at| f64::from(weights[at]) * channels[at]).sum() };
        let exponentials: Vec<f64> = self.classes.iter().map(|(_, weights)| weighed(weights).exp()).collect();
        let sum: f64 = exponentials.iter().sum();
        exponentials.iter().map(|exponential| exponential / sum).collect()
    }

    /// Writes the bundle, for a `MODEL_DIR`.
    pub fn write(&self, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("means.onnx"), self.onnx()).unwrap();
        std::fs::write(folder.join(MANIFEST), self.manifest().to_string()).unwrap();
    }
}

/// The mean over some axes, which are dropped.
fn mean(input: &str, output: &str, axes: &[u64]) -> Vec<u8> {
    let axes: Vec<u8> = axes.iter().flat_map(|axis| number(8, *axis)).collect();
    node("ReduceMean", &[input], output, &[attribute("axes", 7, &axes), attribute("keepdims", 2, &number(3, 0))])
}

fn node(operator: &str, inputs: &[&str], output: &str, attributes: &[Vec<u8>]) -> Vec<u8> {
    let inputs: Vec<u8> = inputs.iter().flat_map(|name| text(1, name)).collect();
    message(1, &[inputs, text(2, output), text(4, operator), attributes.concat()].concat())
}

fn attribute(name: &str, kind: u64, value: &[u8]) -> Vec<u8> {
    message(5, &[&text(1, name), value, &number(20, kind)].concat())
}

/// A name with its type; −1 is a dimension of any size.
fn value(name: &str, element: u64, shape: &[i64]) -> Vec<u8> {
    let dimension = |side: &i64| match u64::try_from(*side) {
        Ok(side) => message(1, &number(1, side)),
        Err(_) => message(1, &text(2, "any")),
    };
    let shape: Vec<u8> = shape.iter().flat_map(dimension).collect();
    let tensor = [number(1, element), message(2, &shape)].concat();
    [text(1, name), message(2, &message(1, &tensor))].concat()
}

fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

fn text(field: u64, value: &str) -> Vec<u8> {
    bytes(field, value.as_bytes())
}

fn message(field: u64, value: &[u8]) -> Vec<u8> {
    bytes(field, value)
}

fn bytes(field: u64, value: &[u8]) -> Vec<u8> {
    [&varint(field << 3 | 2), &varint(value.len() as u64), value].concat()
}

/// Protobuf's: seven bits a byte, the lowest first.
fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 127 {
        bytes.push(value as u8 | 128);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}
