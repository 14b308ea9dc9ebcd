//! The network behind its manifest: the only file that knows ONNX Runtime.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread::JoinHandle;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ort::environment::Environment;
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::{TensorElementType, TensorRef, ValueType};
use serde::{Deserialize, Serialize};
use shared::job::{self, AbstainReason, Prediction, Reading};

use crate::bundle::{Bundle, Refused, Verified};
use crate::manifest::{Element, GoldenPicture, Manifest, ScoreKind};
use crate::picture::{self, Tensor};

/// Places of a map along each side, at most: it is kept with every cached answer.
const MAX_MAP_SIDE: u32 = 256;

/// What the network gave, before calibration; what the cache keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RawOutputs {
    pub scores: Vec<f32>,
    pub ood: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<ActivationMap>,
}

/// What each place of the picture adds to the score of the class that comes first: rows of `width`
/// values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActivationMap {
    pub width: u32,
    pub height: u32,
    pub values: Vec<f32>,
}

impl ActivationMap {
    fn is_sound(&self) -> bool {
        let sides = [self.width, self.height];
        sides.iter().all(|side| (1..=MAX_MAP_SIDE).contains(side))
            && self.values.len() == (self.width * self.height) as usize
            && self.values.iter().all(|value| value.is_finite())
    }
}

/// The network failed, or gave what is no answer.
#[derive(Debug, thiserror::Error)]
#[error("model: {0}")]
pub struct ModelError(String);

/// A loaded model that has passed its own golden vectors.
pub struct Model {
    pub digest: String,
    pub manifest: Manifest,
    /// One for each photo that is worked at the same time: a run needs a session to itself.
    sessions: Vec<Mutex<Session>>,
}

/// One environment a process is all that ONNX Runtime allows.
fn environment(library: &Path) -> Result<&'static Environment, Refused> {
    static ENVIRONMENT: OnceLock<Result<Environment, String>> = OnceLock::new();
    let made = ENVIRONMENT.get_or_init(|| {
        // Without this check ort panics where the library is missing.
        if !library.is_file() {
            return Err(format!(
                "ORT_DYLIB_PATH: there is no ONNX Runtime library at {}; scripts/run installs it",
                library.display()
            ));
        }
        keep_large_blocks_apart();
        let builder = ort::init_from(library).map_err(|error| format!("ORT_DYLIB_PATH: {error}"))?;
        builder.with_telemetry(false).build().map_err(|error| format!("ONNX Runtime: {error}"))
    });
    made.as_ref().map_err(|error| Refused::new(error.clone()))
}

/// Has glibc take blocks of 512 KiB and more from the kernel one by one, and give them back.
///
/// It begins with 128 KiB and raises that by itself to the largest block that was freed, up to 32 MiB (mallopt(3)).
/// After a session was made what it freed stays in the heap then, in pieces: 20 MB of a host with two of them.
fn keep_large_blocks_apart() {
    #[cfg(target_env = "gnu")]
    set(libc::M_MMAP_THRESHOLD, 512 * 1024);
}

/// Has glibc keep what photos and pictures of a usual size took for those that come next, once the sessions are made.
///
/// Of a block from the kernel each page is cleared when it is first written: to pass a picture of 2 MB on took 5.5 ms
/// of the processor, and takes 2.6.
fn keep_blocks_of_requests() {
    #[cfg(target_env = "gnu")]
    {
        set(libc::M_MMAP_THRESHOLD, 4 * 1024 * 1024);
        set(libc::M_TRIM_THRESHOLD, 8 * 1024 * 1024);
    }
}

#[cfg(target_env = "gnu")]
fn set(parameter: libc::c_int, bytes: libc::c_int) {
    #[expect(unsafe_code, reason = "there is no safe way to glibc's settings but the environment of a process")]
    // SAFETY: glibc takes the lock of its main arena for it, and malloc reads the size as one word.
    unsafe {
        // A size that is set is not raised.
        libc::mallopt(parameter, bytes);
    }
}

/// ONNX Runtime on its way; waits for it where it goes out of scope.
#[must_use]
pub struct Starting(Option<JoinHandle<()>>);

impl Drop for Starting {
    fn drop(&mut self) {
        // A process that ends while the library begins might not end well.
        self.0.take().map(JoinHandle::join);
    }
}

/// Starts ONNX Runtime beside what else a process does at its start, such as fetching the bundle: it
/// takes 20 ms. What goes wrong is told by [`Model::load`].
pub fn start(library: PathBuf) -> Starting {
    let begin = move || drop(environment(&library));
    Starting(std::thread::Builder::new().name("onnxruntime".to_owned()).spawn(begin).ok())
}

impl Model {
    /// Loads a verified bundle into `sessions` sessions of ONNX Runtime (`library`, a path) and
    /// tries it on its golden pictures.
    ///
    /// # Errors
    /// [`Refused`] where the library is missing, the network does not fit the manifest, or a
    /// golden picture comes out otherwise than it says.
    pub fn load(bundle: Bundle, library: &Path, sessions: usize) -> Result<Self, Refused> {
        let model = Self::open(bundle, library, sessions)?;
        model.manifest.golden.pictures.iter().try_for_each(|golden| model.compare(golden).map(drop))?;
        Ok(model)
    }

    /// As [`Model::load`], without its golden pictures: whoever calls compares them.
    ///
    /// # Errors
    /// [`Refused`] where the library is missing or the network does not fit the manifest.
    pub fn open(bundle: Bundle, library: &Path, sessions: usize) -> Result<Self, Refused> {
        let environment = environment(library)?;
        let refused = |error: ort::Error| Refused::new(format!("{}: {error}", bundle.manifest.network.file));
        let session = build_session(environment, &bundle.network).map_err(refused)?;
        check_interface(&session, &bundle.manifest)?;
        let mut pool = vec![Mutex::new(session)];
        for _ in 1..sessions {
            pool.push(Mutex::new(build_session(environment, &bundle.network).map_err(refused)?));
        }
        keep_blocks_of_requests();
        Ok(Self { digest: bundle.digest, manifest: bundle.manifest, sessions: pool })
    }

    /// Runs the network on one picture.
    ///
    /// # Errors
    /// [`ModelError`] where ONNX Runtime fails or an output has the wrong shape or is no number.
    pub fn run(&self, input: &Tensor) -> Result<RawOutputs, ModelError> {
        let failed = |error: ort::Error| ModelError(error.to_string());
        let name = self.manifest.input.name.as_str();
        let inputs = match input {
            Tensor::Float32(values) => ort::inputs![name => TensorRef::from_array_view(values).map_err(failed)?],
            Tensor::Uint8(values) => ort::inputs![name => TensorRef::from_array_view(values).map_err(failed)?],
        };
        let mut session = self.free_session();
        let outputs = session.run(inputs).map_err(failed)?;
        let read = |name: &str| {
            let value = outputs.get(name).ok_or_else(|| ModelError(format!("no output {name:?}")))?;
            let (shape, values) = value.try_extract_tensor::<f32>().map_err(failed)?;
            Ok((shape.to_vec(), values.to_vec()))
        };
        let (_, scores) = read(&self.manifest.outputs.scores.name)?;
        let ood = self.manifest.outputs.ood.as_ref().map(|output| read(&output.name)).transpose()?;
        // Of more than one number none is the score.
        let ood = ood.map(|(_, values)| if let [ood] = values.as_slice() { *ood } else { f32::NAN });
        let map = self.manifest.outputs.map.as_ref().map(|output| read(&output.name)).transpose()?;
        let map = map.map(|(shape, values)| {
            let side = |axis: usize| shape.get(axis).and_then(|side| u32::try_from(*side).ok()).unwrap_or(0);
            ActivationMap { width: side(2), height: side(1), values }
        });
        // It explains the scores and is none: they stand without it.
        let map = map.filter(|map| {
            let is_sound = map.is_sound();
            if !is_sound {
                tracing::warn!("map left out: too large, of another size than its values, or no numbers");
            }
            is_sound
        });
        let outputs = RawOutputs { scores, ood, map };
        if self.fits(&outputs) {
            Ok(outputs)
        } else {
            Err(ModelError("an output has the wrong length or is no number".into()))
        }
    }

    /// A session that nobody uses, or the first one when it is free. A panic in a run leaves a
    /// session as it was: it holds no half-written state of ours.
    fn free_session(&self) -> MutexGuard<'_, Session> {
        let free = self.sessions.iter().find_map(|session| match session.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        });
        free.unwrap_or_else(|| self.sessions[0].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether outputs, perhaps from a cache, are an answer of this network.
    #[must_use]
    pub fn fits(&self, outputs: &RawOutputs) -> bool {
        outputs.scores.len() == self.manifest.labels.len()
            && outputs.ood.is_some() == self.manifest.outputs.ood.is_some()
            && outputs.scores.iter().chain(outputs.ood.iter()).all(|value| value.is_finite())
            && (outputs.map.is_none() || self.manifest.outputs.map.is_some())
            && outputs.map.as_ref().is_none_or(ActivationMap::is_sound)
    }

    /// Calibrated probabilities in the order of the labels; they add up to 1.
    ///
    /// Temperature scaling: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    #[must_use]
    pub fn calibrate(&self, scores: &[f32]) -> Vec<f64> {
        let logits = scores.iter().map(|score| match self.manifest.outputs.scores.kind {
            ScoreKind::Logits => f64::from(*score),
            ScoreKind::Probabilities => f64::from(*score).max(1e-12).ln(),
        });
        let scaled: Vec<f64> = logits.map(|logit| logit / self.manifest.temperature).collect();
        // Taking the largest off first keeps the exponentials finite.
        let largest = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let exponentials: Vec<f64> = scaled.iter().map(|logit| (logit - largest).exp()).collect();
        let sum: f64 = exponentials.iter().sum();
        exponentials.iter().map(|value| value / sum).collect()
    }

    /// What is told of a run: labels, or an abstention and none.
    #[must_use]
    pub fn read(&self, outputs: &RawOutputs) -> Reading {
        let probabilities = self.calibrate(&outputs.scores);
        let mut predictions: Vec<Prediction> = self
            .manifest
            .labels
            .iter()
            .zip(probabilities)
            .map(|(label, probability)| Prediction {
                label: label.code.clone(),
                name: label.name.clone(),
                probability: (probability * 1e6).round() / 1e6,
                malignant: label.malignant,
            })
            .collect();
        predictions.sort_by(|one, other| other.probability.total_cmp(&one.probability));
        let strange = match (outputs.ood, self.manifest.abstention.max_ood) {
            (Some(ood), Some(most)) => f64::from(ood) > most,
            _ => false,
        };
        let unsure =
            predictions.first().is_none_or(|first| first.probability < self.manifest.abstention.min_probability);
        let reason = match (strange, unsure) {
            (true, _) => Some(AbstainReason::OutOfDistribution),
            (false, true) => Some(AbstainReason::LowConfidence),
            (false, false) => None,
        };
        let abstained = reason.map(|reason| job::Abstention { reason });
        let predictions = if abstained.is_some() { Vec::new() } else { predictions };
        Reading { model_digest: self.digest.clone(), predictions, abstained, has_map: false }
    }

    /// How far the probabilities of a golden picture are off, at most.
    ///
    /// # Errors
    /// [`Refused`] where that is more than the tolerance, or the picture cannot be read.
    pub fn compare(&self, golden: &GoldenPicture) -> Result<f64, Refused> {
        let tolerance = self.manifest.golden.tolerance;
        let wrong = |why: String| Refused::new(format!("golden picture {:?}: {why}", golden.name));
        let png = STANDARD.decode(&golden.png_base64).map_err(|error| wrong(error.to_string()))?;
        let picture = picture::decode(&png, 1).map_err(|error| wrong(error.to_string()))?;
        let tensor = picture::tensor(&picture, &self.manifest.input).map_err(|error| wrong(error.to_string()))?;
        let outputs = self.run(&tensor).map_err(|error| wrong(error.to_string()))?;
        // A resize that does not average shows in this score first.
        if let (Some(found), Some(expected)) = (outputs.ood, golden.ood) {
            let most = tolerance * expected.abs().max(1.0);
            if (f64::from(found) - expected).abs() > most {
                return Err(wrong(format!("ood is {found:.4}, expected {expected:.4} ± {most:.4}")));
            }
        }
        let found = self.calibrate(&outputs.scores);
        let mut furthest: f64 = 0.0;
        for ((label, found), expected) in self.manifest.labels.iter().zip(found).zip(&golden.probabilities) {
            let off = (found - expected).abs();
            if off > tolerance {
                return Err(wrong(format!("{} is {found:.4}, expected {expected:.4} ± {tolerance}", label.code)));
            }
            furthest = furthest.max(off);
        }
        Ok(furthest)
    }
}

/// One input or output of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outlet {
    pub name: String,
    /// As in a manifest, `float32` or `uint8`; ONNX Runtime's own word for others.
    pub element: String,
    /// −1 for a dimension of any size.
    pub shape: Vec<i64>,
}

/// What a network takes and gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graph {
    pub inputs: Vec<Outlet>,
    pub outputs: Vec<Outlet>,
}

/// Reads what a network takes and gives, without a manifest.
///
/// # Errors
/// [`Refused`] where the library is missing or the bytes are no network.
pub fn graph(network: &[u8], library: &Path) -> Result<Graph, Refused> {
    let built = builder(environment(library)?).and_then(|mut builder| builder.commit_from_memory(network));
    let session = built.map_err(|error| Refused::new(error.to_string()))?;
    let outlet = |outlet: &ort::value::Outlet| {
        let (element, shape) = match outlet.dtype() {
            ValueType::Tensor { ty: TensorElementType::Float32, shape, .. } => ("float32".to_owned(), shape.to_vec()),
            ValueType::Tensor { ty: TensorElementType::Uint8, shape, .. } => ("uint8".to_owned(), shape.to_vec()),
            ValueType::Tensor { ty, shape, .. } => (ty.to_string(), shape.to_vec()),
            other => (other.to_string(), Vec::new()),
        };
        Outlet { name: outlet.name().to_owned(), element, shape }
    };
    let [inputs, outputs] = [session.inputs(), session.outputs()].map(|outlets| outlets.iter().map(outlet).collect());
    Ok(Graph { inputs, outputs })
}

fn build_session(environment: &Environment, network: &Verified) -> Result<Session, ort::Error> {
    let mut builder = builder(environment)?;
    match network {
        Verified::File(file) => builder.commit_from_file(file.path()),
        Verified::Bytes(bytes) => builder.commit_from_memory(bytes),
    }
}

fn builder(environment: &Environment) -> Result<SessionBuilder, ort::Error> {
    let builder = Session::builder(environment)?
        .with_optimization_level(GraphOptimizationLevel::Level3)?
        // Two threads spin against each other where cores are shared (docs: ONNX Runtime, threading).
        .with_intra_threads(1)?
        // A plan of all of a run's memory comes beside what the first run took: two sessions hold 17 MB less without,
        // and a run takes as long (12.3 ms).
        .with_memory_pattern(false)?;
    Ok(builder)
}

/// Compares the network's inputs and outputs with the manifest, so that a mismatch is told in
/// words at start and not in numbers later.
fn check_interface(session: &Session, manifest: &Manifest) -> Result<(), Refused> {
    let file = &manifest.network.file;
    let names = |outlets: &[ort::value::Outlet]| {
        outlets.iter().map(|outlet| outlet.name().to_owned()).collect::<Vec<_>>().join(", ")
    };
    let input = session.inputs().iter().find(|outlet| outlet.name() == manifest.input.name);
    let input = input.ok_or_else(|| {
        Refused::new(format!("{file} has no input {:?}; it has: {}", manifest.input.name, names(session.inputs())))
    })?;
    let element = match manifest.input.element {
        Element::Float32 => TensorElementType::Float32,
        Element::Uint8 => TensorElementType::Uint8,
    };
    check_tensor(input.dtype(), element, &[manifest.input_shape().to_vec()])
        .map_err(|why| Refused::new(format!("{file}, input {:?}: {why}", manifest.input.name)))?;

    let labels = i64::try_from(manifest.labels.len()).unwrap_or(i64::MAX);
    let scores = (&manifest.outputs.scores.name, vec![vec![1, labels]], format!(" for {labels} labels"));
    let number = vec![vec![], vec![1], vec![1, 1]];
    let ood = manifest.outputs.ood.as_ref().map(|output| (&output.name, number, " for one number".to_owned()));
    // Of any height and width.
    let map = manifest.outputs.map.as_ref().map(|output| (&output.name, vec![vec![1, -1, -1]], String::new()));
    for (name, shapes, purpose) in std::iter::once(scores).chain(ood).chain(map) {
        let output = session.outputs().iter().find(|outlet| outlet.name() == *name);
        let output = output.ok_or_else(|| {
            Refused::new(format!("{file} has no output {name:?}; it has: {}", names(session.outputs())))
        })?;
        check_tensor(output.dtype(), TensorElementType::Float32, &shapes)
            .map_err(|why| Refused::new(format!("{file}, output {name:?}{purpose}: {why}")))?;
    }
    Ok(())
}

/// Whether a tensor has one of the shapes.
fn check_tensor(found: &ValueType, element: TensorElementType, wanted: &[Vec<i64>]) -> Result<(), String> {
    let ValueType::Tensor { ty, shape, .. } = found else { return Err("is no tensor".into()) };
    if *ty != element {
        return Err(format!("is of type {ty}, the manifest says {element}"));
    }
    // A dimension of −1 is dynamic and takes any size.
    let agree = |(found, wanted): (&i64, &i64)| *found == -1 || *wanted == -1 || found == wanted;
    let fits = |wanted: &Vec<i64>| shape.len() == wanted.len() && shape.iter().zip(wanted).all(agree);
    if wanted.iter().any(fits) {
        return Ok(());
    }
    let wanted: Vec<String> = wanted.iter().map(|wanted| format!("{wanted:?}")).collect();
    Err(format!("has shape {shape:?}, the manifest says {}", wanted.join(" or ")))
}
