//! The reference classifier beside the repository, as a bundle: a manifest written from its README,
//! whose golden vectors are two of its own expected rows.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use inference::bundle::{MANIFEST, sha256};
use serde_json::{Value, json};

use super::{root, shared_folder};

/// How far a probability may be off. The expected ones were computed on Pillow's decoder, from
/// which ours differs by 0.24 levels of 255 on average and by 4 at most. This network is that
/// sensitive: noise of one level on Pillow's own pixels moves its probabilities by up to 0.09.
pub const TOLERANCE: f64 = 0.07;

pub struct Reference {
    pub network: Vec<u8>,
    /// A photo's name and its probabilities, in the order of the labels.
    pub expected: Vec<(String, Vec<f64>)>,
    pub photos: PathBuf,
}

impl Reference {
    /// `None` where there is no such folder.
    pub fn read() -> Option<Self> {
        let folder = shared_folder()?;
        let model = folder.join("models/ham10000_mnv2_linear_fp32");
        let table = std::fs::read_to_string(model.with_extension("expected.csv")).unwrap();
        let row = |line: &str| {
            let fields: Vec<_> = line.split(',').collect();
            (fields[0].to_owned(), fields[2..].iter().map(|field| field.parse().unwrap()).collect())
        };
        Some(Self {
            network: std::fs::read(model.with_extension("onnx")).unwrap(),
            expected: table.lines().skip(1).map(row).collect(),
            photos: folder.join("data/ham10000/images"),
        })
    }

    pub fn photo(&self, name: &str) -> PathBuf {
        self.photos.join(format!("{name}.jpg"))
    }

    pub fn manifest(&self) -> Value {
        let shipped = std::fs::read(root().join("model").join(MANIFEST)).unwrap();
        let shipped: Value = serde_json::from_slice(&shipped).unwrap();
        let golden = self.expected.iter().step_by(self.expected.len() / 2);
        let pictures: Vec<Value> = golden.map(|(name, probabilities)| self.golden(name, probabilities)).collect();
        json!({
            "format": 1,
            "name": "reference",
            "version": "1",
            "licence": "research only",
            "network": {"file": "reference.onnx", "sha256": sha256(&self.network), "size_bytes": self.network.len()},
            "labels": shipped["labels"],
            "input": {
                "name": "input", "layout": "nchw", "type": "float32", "width": 224, "height": 224, "resize": "bilinear",
                "scale": 1.0 / 127.5, "mean": [1.0, 1.0, 1.0], "std": [1.0, 1.0, 1.0],
            },
            "outputs": {"scores": {"name": "probabilities", "kind": "probabilities"}},
            "temperature": 1.0,
            "abstention": {"min_probability": 0.0},
            "quality": shipped["quality"],
            "golden": {"tolerance": TOLERANCE, "pictures": pictures},
        })
    }

    fn golden(&self, name: &str, probabilities: &[f64]) -> Value {
        let mut png = std::io::Cursor::new(Vec::new());
        image::open(self.photo(name)).unwrap().write_to(&mut png, image::ImageFormat::Png).unwrap();
        json!({"name": name, "png_base64": STANDARD.encode(png.into_inner()), "probabilities": probabilities})
    }

    /// Writes the bundle, for a `MODEL_DIR`.
    #[allow(dead_code, reason = "the benchmark's alone")]
    pub fn write(&self, folder: &Path) {
        std::fs::write(folder.join("reference.onnx"), &self.network).unwrap();
        std::fs::write(folder.join(MANIFEST), self.manifest().to_string()).unwrap();
    }
}
