//! Networks small enough to be written here, field by field, in ONNX's format (onnx.proto, opset
//! 13): every value of the picture times a matrix. What they say of a picture can be told without
//! running them.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::{ImageFormat, Rgb, RgbImage};
use inference::bundle::{MANIFEST, sha256};
use serde_json::{Value, json};

/// The colour of the golden picture.
const GOLDEN: Rgb<u8> = Rgb([200, 120, 60]);
/// Of the input: sides that cannot be taken for each other.
pub const WIDTH: u32 = 8;
pub const HEIGHT: u32 = 12;
const FLOAT: u64 = 1;
const UINT8: u64 = 2;
const INT64: u64 = 7;
/// As many maps side by side are more than 256 places wide.
const MAPS: usize = 33;

/// What is to be made.
#[derive(Debug, Clone)]
pub struct Network {
    pub nhwc: bool,
    pub uint8: bool,
    /// Of floats, by channel: what goes in is 0 to 1, less `mean` and over `std`. The weights undo it.
    pub mean: [f32; 3],
    pub std: [f32; 3],
    /// Through a softmax already.
    pub probabilities: bool,
    /// The manifest's.
    pub temperature: f64,
    /// A row of weights for each class, by channel.
    pub classes: Vec<(&'static str, [f32; 3])>,
    /// With an output of one number, the mean of all values.
    pub ood: bool,
    /// With an output of a class activation map: the mean over the channels at each place.
    pub map: bool,
    /// With outputs besides that a manifest may name for those two, most of them wrongly; needs both.
    pub others: bool,
}

impl Default for Network {
    /// Reddish, greenish or bluish, whatever the picture.
    fn default() -> Self {
        let classes = vec![("red", [9.0, 0.0, 0.0]), ("green", [0.0, 9.0, 0.0]), ("blue", [0.0, 0.0, 9.0])];
        Self {
            nhwc: false,
            uint8: false,
            mean: [0.0; 3],
            std: [1.0; 3],
            probabilities: false,
            temperature: 1.0,
            classes,
            ood: false,
            map: true,
            others: false,
        }
    }
}

impl Network {
    /// The bytes of the `.onnx` file.
    pub fn onnx(&self) -> Vec<u8> {
        let operator = |version: u64| message(8, &[text(1, ""), number(2, version)].concat());
        [number(1, 8), operator(13), message(7, &self.graph())].concat()
    }

    fn graph(&self) -> Vec<u8> {
        let [width, height] = [WIDTH, HEIGHT].map(i64::from);
        let (channels, shape) = if self.nhwc { (3, [-1, height, width, 3]) } else { (1, [-1, 3, height, width]) };
        let labels = i64::try_from(self.classes.len()).unwrap();
        let mut parts = vec![text(2, "channel means"), self.weights(), self.biases()];
        parts.push(message(11, &value("picture", if self.uint8 { UINT8 } else { FLOAT }, &shape)));
        let picture = if self.uint8 { "values" } else { "picture" };
        if self.uint8 {
            parts.push(node("Cast", &["picture"], "values", &[attribute("to", 2, &number(3, FLOAT))]));
        }
        parts.push(node("Flatten", &[picture], "flat", &[]));
        parts.push(node("MatMul", &["flat", "weights"], "weighed", &[]));
        let logits = if self.probabilities { "logits" } else { "scores" };
        parts.push(node("Add", &["weighed", "biases"], logits, &[]));
        if self.probabilities {
            parts.push(node("Softmax", &["logits"], "scores", &[attribute("axis", 2, &number(3, 1))]));
        }
        parts.push(output("scores", FLOAT, &[-1, labels]));
        if self.ood {
            parts.push(mean(picture, "ood_mean", &[1, 2, 3]));
            parts.push(output("ood_mean", FLOAT, &[-1]));
        }
        if self.map {
            parts.push(mean(picture, "map_mean", &[channels]));
            parts.push(output("map_mean", FLOAT, &[-1, height, width]));
        }
        if self.others {
            parts.push(others(picture, [width, height]));
        }
        parts.concat()
    }

    /// A row for each value of the flat picture, in the order of the layout, and a column for each class.
    fn weights(&self) -> Vec<u8> {
        let places: Vec<[u32; 2]> = (0..HEIGHT).flat_map(|y| (0..WIDTH).map(move |x| [x, y])).collect();
        let rows: Vec<(usize, [u32; 2])> = if self.nhwc {
            places.iter().flat_map(|place| (0..3).map(move |channel| (channel, *place))).collect()
        } else {
            (0..3).flat_map(|channel| places.iter().map(move |place| (channel, *place))).collect()
        };
        let mut values = Vec::new();
        for (channel, place) in &rows {
            let unit = if self.uint8 { 1.0 / 255.0 } else { f64::from(self.std[*channel]) };
            for (class, (_, weights)) in self.classes.iter().enumerate() {
                let weight = f64::from(weights[*channel]) * share(class, *place, [WIDTH, HEIGHT]);
                values.push((weight * unit) as f32);
            }
        }
        initializer("weights", &[rows.len(), self.classes.len()], &values)
    }

    /// What the classes lack of the `mean` that was taken off.
    fn biases(&self) -> Vec<u8> {
        let bias = |weights: &[f32; 3]| (0..3).map(|channel| weights[channel] * self.mean[channel]).sum::<f32>();
        let biases = self.classes.iter().map(|(_, weights)| if self.uint8 { 0.0 } else { bias(weights) });
        initializer("biases", &[self.classes.len()], &biases.collect::<Vec<_>>())
    }

    /// The manifest that fits it.
    pub fn manifest(&self) -> Value {
        let onnx = self.onnx();
        let labels = self.classes.iter().map(|(code, _)| json!({"code": code, "name": code, "malignant": false}));
        let mut input = json!({
            "name": "picture", "layout": if self.nhwc { "nhwc" } else { "nchw" },
            "type": if self.uint8 { "uint8" } else { "float32" },
            "width": WIDTH, "height": HEIGHT, "resize": "bilinear",
        });
        if !self.uint8 {
            input["scale"] = json!(1.0 / 255.0);
            input["mean"] = json!(self.mean);
            input["std"] = json!(self.std);
        }
        let kind = if self.probabilities { "probabilities" } else { "logits" };
        let mut outputs = json!({"scores": {"name": "scores", "kind": kind}});
        if self.ood {
            outputs["ood"] = json!({"name": "ood_mean"});
        }
        if self.map {
            outputs["map"] = json!({"name": "map_mean"});
        }
        let picture = RgbImage::from_pixel(9, 7, GOLDEN);
        let mut png = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut png, ImageFormat::Png).unwrap();
        let mut golden = json!({
            "name": "a colour", "png_base64": STANDARD.encode(png.into_inner()),
            "probabilities": self.expected(&picture),
        });
        if self.ood {
            golden["ood"] = json!(self.fed(GOLDEN));
        }
        json!({
            "format": 1, "name": "channel means", "version": "1", "licence": "CC0-1.0",
            "network": {"file": "means.onnx", "sha256": sha256(&onnx), "size_bytes": onnx.len()},
            "labels": labels.collect::<Vec<_>>(), "input": input, "outputs": outputs,
            "temperature": self.temperature,
            "abstention": {"min_probability": 0.0},
            "quality": {
                "min_side_px": 1, "min_sharpness": 0.0, "min_brightness": 0.0, "max_brightness": 255.0, "min_contrast": 0.0,
            },
            "golden": {"tolerance": 0.001, "pictures": [golden]},
        })
    }

    /// The calibrated probabilities of a picture of the input's size, or of one colour.
    pub fn expected(&self, picture: &RgbImage) -> Vec<f64> {
        let logits = self.classes.iter().enumerate().map(|(class, (_, weights))| {
            let weighed = picture.enumerate_pixels().map(|(x, y, pixel)| {
                let colour: f64 = (0..3).map(|at| f64::from(weights[at]) * f64::from(pixel[at]) / 255.0).sum();
                colour * share(class, [x, y], picture.dimensions().into())
            });
            weighed.sum::<f64>()
        });
        let exponentials: Vec<f64> = logits.map(|logit| (logit / self.temperature).exp()).collect();
        let sum: f64 = exponentials.iter().sum();
        exponentials.iter().map(|exponential| exponential / sum).collect()
    }

    /// What goes in for a pixel, the mean over its channels: what the map says of its place.
    pub fn fed(&self, pixel: Rgb<u8>) -> f64 {
        let channel = |at: usize| {
            let byte = f64::from(pixel[at]);
            if self.uint8 { byte } else { (byte / 255.0 - f64::from(self.mean[at])) / f64::from(self.std[at]) }
        };
        (0..3).map(channel).sum::<f64>() / 3.0
    }

    /// Writes the bundle, for a `MODEL_DIR`.
    pub fn write(&self, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("means.onnx"), self.onnx()).unwrap();
        std::fs::write(folder.join(MANIFEST), self.manifest().to_string()).unwrap();
    }
}

/// How much of a class's weight lies at a place, 1 over all: of every other class, beginning with the
/// first, more to the right; of the rest more to the bottom.
fn share(class: usize, place: [u32; 2], sides: [u32; 2]) -> f64 {
    let axis = class % 2;
    f64::from(2 * place[axis] + 1) / f64::from(sides[axis]) / f64::from(sides[0] * sides[1])
}

/// The number in two other shapes, more numbers than one, and one that is no float; the map without numbers
/// where the picture is black, and a map that is too wide.
fn others(picture: &str, [width, height]: [i64; 2]) -> Vec<u8> {
    let axis = |axis: u64| attribute("axis", 2, &number(3, axis));
    [
        mean(picture, "scalar", &[0, 1, 2, 3]),
        output("scalar", FLOAT, &[]),
        node("Flatten", &["ood_mean"], "column", &[]),
        output("column", FLOAT, &[-1, 1]),
        node("Flatten", &["scores"], "row", &[axis(0)]),
        output("row", FLOAT, &[1, -1]),
        node("ArgMax", &["scores"], "first", &[axis(1), attribute("keepdims", 2, &number(3, 0))]),
        output("first", INT64, &[-1]),
        node("Log", &["map_mean"], "logarithms", &[]),
        output("logarithms", FLOAT, &[-1, height, width]),
        node("Concat", &["map_mean"; MAPS], "wide", &[axis(2)]),
        output("wide", FLOAT, &[-1, height, width * MAPS as i64]),
    ]
    .concat()
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

fn initializer(name: &str, sides: &[usize], values: &[f32]) -> Vec<u8> {
    let sides: Vec<u8> = sides.iter().flat_map(|side| number(1, *side as u64)).collect();
    let values: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    message(5, &[sides, number(2, FLOAT), text(8, name), bytes(9, &values)].concat())
}

fn output(name: &str, element: u64, shape: &[i64]) -> Vec<u8> {
    message(12, &value(name, element, shape))
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
