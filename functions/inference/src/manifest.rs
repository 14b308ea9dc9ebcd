//! `manifest.json`, the only place that says how a network is fed and how its answers are read.
//! Any ONNX image classifier is swapped in by writing one; `docs/MODEL.md` walks through the fields.

use serde::{Deserialize, Serialize};

use crate::{draft, quality};

/// The version of this format that this build reads.
pub const FORMAT: u32 = 1;

/// A model bundle's description. Its SHA-256 is the model's digest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always [`FORMAT`].
    pub format: u32,
    pub name: String,
    pub version: String,
    /// SPDX expression or a sentence.
    pub licence: String,
    pub network: Network,
    /// In the order of the scores.
    pub labels: Vec<Label>,
    pub input: Input,
    pub outputs: Outputs,
    /// Logits are divided by it before the softmax; 1 changes nothing. Above 0.
    pub temperature: f64,
    pub abstention: Abstention,
    pub quality: quality::Thresholds,
    pub golden: Golden,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Evaluation>,
}

/// The `.onnx` file beside the manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// A plain file name.
    pub file: String,
    /// In hex.
    pub sha256: String,
    /// The file's own.
    pub size_bytes: u64,
}

/// One class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Label {
    pub code: String,
    pub name: String,
    /// Malignant or pre-malignant.
    pub malignant: bool,
}

/// How the network wants its picture: one RGB picture, stretched to `width` × `height`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    pub name: String,
    pub layout: Layout,
    #[serde(rename = "type")]
    pub element: Element,
    pub width: u32,
    pub height: u32,
    pub resize: Resize,
    /// `value = (byte · scale − mean[c]) / std[c]`, byte 0–255, channels R, G, B. Not for `uint8`.
    #[serde(default = "one")]
    pub scale: f32,
    #[serde(default)]
    pub mean: [f32; 3],
    #[serde(default = "ones")]
    pub std: [f32; 3],
}

/// The order of the input's dimensions: `[1,3,H,W]` or `[1,H,W,3]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    Nchw,
    Nhwc,
}

/// The input's element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Element {
    Float32,
    Uint8,
}

/// Resampling filters, widened when shrinking as Pillow's are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resize {
    Bilinear,
    Bicubic,
    Lanczos3,
}

/// The outputs by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outputs {
    pub scores: Scores,
    /// float32 `[]`, `[N]` or `[N, 1]`: one number, higher for stranger pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ood: Option<Output>,
    /// float32 `[N, h, w]`: what each place of the picture adds to the score of the class that comes
    /// first, raw. A class activation map: Zhou et al. 2016, "Learning Deep Features for
    /// Discriminative Localization", CVPR.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<Output>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scores {
    pub name: String,
    pub kind: ScoreKind,
}

/// What the scores are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScoreKind {
    Logits,
    /// Already through a softmax; the temperature is applied to their logarithms.
    Probabilities,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    pub name: String,
}

/// When the model gives no label.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Abstention {
    /// Below this highest calibrated probability, 0–1.
    pub min_probability: f64,
    /// Above this out-of-distribution score; needs the output `ood`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ood: Option<f64>,
}

/// Pictures with known answers, which the bundle must reproduce before it may work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    /// How far each calibrated probability may be off, and the `ood` score, as a share of it where it
    /// is above 1.
    pub tolerance: f64,
    pub pictures: Vec<GoldenPicture>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldenPicture {
    pub name: String,
    pub png_base64: String,
    /// Calibrated, in the order of the labels.
    pub probabilities: Vec<f64>,
    /// Needed where `abstention.max_ood` is set: a score that decides is tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ood: Option<f64>,
}

impl GoldenPicture {
    fn check(&self, labels: usize, needs_ood: bool) -> Result<(), String> {
        let found = self.probabilities.len();
        if found != labels {
            return Err(format!("golden picture {:?} has {found} probabilities for {labels} labels", self.name));
        }
        if needs_ood && self.ood.is_none() {
            return Err(format!("golden picture {:?} has no ood, which abstention.max_ood needs", self.name));
        }
        Ok(())
    }
}

/// What calibration and abstention were measured to buy, on photos that the model was not made from.
/// For people; nothing is decided by it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Which photos, in words.
    pub data: String,
    /// Share of the photos that get a label, 0–1, as all of these.
    pub coverage: f64,
    /// Share of wrong ones among the labels.
    pub risk: f64,
    /// Share of the melanomas that get the label of a benign class.
    pub melanomas_answered_benign: f64,
    /// Share of the pictures of no lesion that get no label.
    pub non_lesions_abstained: f64,
}

impl Evaluation {
    fn is_of_shares(&self) -> bool {
        let shares = [self.coverage, self.risk, self.melanomas_answered_benign, self.non_lesions_abstained];
        shares.iter().all(|share| (0.0..=1.0).contains(share))
    }
}

fn one() -> f32 {
    1.0
}

fn ones() -> [f32; 3] {
    [1.0; 3]
}

impl Manifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// What is wrong with it, by field.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let missing = draft::missing(&value);
        if !missing.is_empty() {
            return Err(format!("not filled in: {}", missing.join("; ")));
        }
        // Once more of the bytes: errors then say the line.
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        let checks = [
            (self.format == FORMAT, format!("format is {}, this build reads {FORMAT}", self.format)),
            (self.labels.len() >= 2, "labels: at least two classes are needed".into()),
            (!self.has_doubled_label(), "labels: a code stands twice".into()),
            (self.temperature > 0.0 && self.temperature.is_finite(), "temperature must be above 0".into()),
            ((1..=4096).contains(&self.input.width), "input.width must lie between 1 and 4096".into()),
            ((1..=4096).contains(&self.input.height), "input.height must lie between 1 and 4096".into()),
            (self.input.std.iter().all(|std| *std != 0.0), "input.std must not be 0".into()),
            (is_file_name(&self.network.file), "network.file must be a plain file name".into()),
            (self.network.sha256.len() == 64, "network.sha256 must be 64 hex digits".into()),
            (
                (0.0..=1.0).contains(&self.abstention.min_probability),
                "abstention.min_probability must lie between 0 and 1".into(),
            ),
            (
                self.abstention.max_ood.is_none() || self.outputs.ood.is_some(),
                "abstention.max_ood needs outputs.ood".into(),
            ),
            (!self.golden.pictures.is_empty(), "golden.pictures: at least one picture is needed".into()),
            (self.golden.tolerance >= 0.0, "golden.tolerance must not be negative".into()),
            (
                self.evaluation.as_ref().is_none_or(Evaluation::is_of_shares),
                "evaluation: every share must lie between 0 and 1".into(),
            ),
        ];
        if let Some((_, problem)) = checks.into_iter().find(|(holds, _)| !holds) {
            return Err(problem);
        }
        let (labels, needs_ood) = (self.labels.len(), self.abstention.max_ood.is_some());
        self.golden.pictures.iter().try_for_each(|picture| picture.check(labels, needs_ood))
    }

    fn has_doubled_label(&self) -> bool {
        let mut codes: Vec<_> = self.labels.iter().map(|label| label.code.as_str()).collect();
        codes.sort_unstable();
        codes.windows(2).any(|pair| pair[0] == pair[1])
    }

    /// The input tensor's shape, batch included.
    #[must_use]
    pub fn input_shape(&self) -> [i64; 4] {
        let (width, height) = (i64::from(self.input.width), i64::from(self.input.height));
        match self.input.layout {
            Layout::Nchw => [1, 3, height, width],
            Layout::Nhwc => [1, height, width, 3],
        }
    }
}

fn is_file_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}
