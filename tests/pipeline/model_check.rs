//! `local model new` and `local model check` as a person runs them: from a network to a bundle that a host takes, and
//! what is said of each fault on the way.

mod faults;

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use inference::bundle::{Bundle, MANIFEST, sha256};
use inference::draft::{self, FILL_IN};
use serde_json::{Value, json};
use tempfile::TempDir;

use self::faults::FAULTS;
use crate::support::network::Network;
use crate::support::ort_library;
use crate::support::process::binary;
use crate::support::reference::Reference;

/// The steps of a check as far as the first that is wrong.
const AT_BUNDLE: &str = "bundle WRONG";
const AT_INTERFACE: &str = "bundle ok, network ok, interface WRONG";
const AT_GOLDEN: &str = "bundle ok, network ok, interface ok, golden WRONG";

/// What is advised.
const BEGIN: &str = "name a folder that has manifest.json; `local model new` on a network begins one";
const CORRECT: &str = "correct the field or line that it names";
const FILE: &str = "network.size_bytes its size and network.sha256 what sha256sum prints for it";
const FIT: &str = "names, shapes and types are the graph's, with a label for each score";
const LOAD: &str = "ONNX Runtime must load the network";
const COMPARE: &str = "compare input.resize, scale, mean, std and layout, the number and the order of the labels";
const DECODE: &str = "png_base64 must be a PNG in base64";

/// What a run of `local model` came to.
#[derive(Debug)]
struct Told {
    code: Option<i32>,
    printed: String,
    error: String,
}

impl Told {
    /// The first two words of every line: a step and how it went.
    fn steps(&self) -> String {
        let steps = self.printed.lines().map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(" "));
        steps.collect::<Vec<_>>().join(", ")
    }

    /// That it ended with 1 after exactly these steps, complained of this, and advised that.
    fn assert_refused(&self, steps: &str, complaint: &str, advice: &str) {
        assert_eq!(self.code, Some(1), "{complaint}: {self:?}");
        assert_eq!(self.steps(), steps, "{complaint}: {self:?}");
        let wrong = self.printed.lines().find(|line| line.contains("WRONG")).unwrap();
        assert!(wrong.contains(complaint), "{complaint}: {wrong}");
        assert!(self.error.contains("local: ") && self.error.contains(advice), "{complaint}, {advice}: {}", self.error);
    }
}

/// `local model` with this machine's ONNX Runtime and nothing else of its environment.
fn command(arguments: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(binary("local"));
    command.env_clear().env("ORT_DYLIB_PATH", ort_library()).arg("model").args(arguments);
    command
}

fn told(mut command: Command) -> Told {
    let output = command.output().unwrap();
    let [printed, error] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    Told { code: output.status.code(), printed, error }
}

fn new(network: &Path) -> Told {
    told(command(&[OsStr::new("new"), network.as_os_str()]))
}

fn check(folder: &Path) -> Told {
    told(command(&[OsStr::new("check"), folder.as_os_str()]))
}

fn manifest_in(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join(MANIFEST)).unwrap()).unwrap()
}

fn edit(folder: &Path, change: impl FnOnce(&mut Value)) {
    let mut manifest = manifest_in(folder);
    change(&mut manifest);
    std::fs::write(folder.join(MANIFEST), manifest.to_string()).unwrap();
}

/// A folder with the bundle of a synthetic network.
fn bundle() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    Network::default().write(folder.path());
    folder
}

/// Puts what is known where a draft asks for it, and nowhere else.
fn fill_in(drafted: &mut Value, known: &Value) {
    match drafted {
        Value::String(text) if text.starts_with(FILL_IN) => *drafted = known.clone(),
        Value::Array(values) => {
            values.iter_mut().zip(known.as_array().unwrap()).for_each(|(value, known)| fill_in(value, known));
        }
        Value::Object(fields) => fields.iter_mut().for_each(|(name, value)| fill_in(value, &known[name.as_str()])),
        _ => {}
    }
}

/// Begins the bundle of a network, fills it in and checks it at every stage. Its folder, and what was asked for.
fn begun_and_filled_in(network: &[u8], known: &Value) -> (TempDir, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(known["network"]["file"].as_str().unwrap());
    std::fs::write(&path, network).unwrap();
    check(folder.path()).assert_refused(AT_BUNDLE, "manifest.json: No such file", BEGIN);

    let begun = new(&path);
    assert_eq!(begun.code, Some(0), "{begun:?}");
    assert!(begun.printed.ends_with(&format!("Then: local model check {}\n", folder.path().display())), "{begun:?}");
    let mut manifest = manifest_in(folder.path());
    let asked = draft::missing(&manifest);
    for field in ["labels[1].code", "labels[1].malignant", "input.resize", "abstention.min_probability", "licence"] {
        assert!(asked.iter().any(|asked| asked.starts_with(field)), "{field}: {asked:?}");
    }
    let listed: Vec<_> = begun.printed.lines().filter_map(|line| line.strip_prefix("  ")).collect();
    assert_eq!(listed, asked);

    let again = new(&path);
    assert_eq!(again.code, Some(1), "{again:?}");
    assert!(again.error.contains("is there already; move it away first"), "{again:?}");
    assert_eq!(manifest_in(folder.path()), manifest, "what somebody has filled in is not written over");
    check(folder.path()).assert_refused(AT_BUNDLE, &format!("not filled in: {}", asked.join("; ")), CORRECT);

    fill_in(&mut manifest, known);
    for told in ["network", "labels", "input", "outputs"] {
        assert_eq!(manifest[told], known[told], "the graph tells it, or it was filled in");
    }
    manifest["golden"] = known["golden"].clone();
    let filled_in = manifest.clone();
    manifest["licence"] = json!(FILL_IN);
    std::fs::write(folder.path().join(MANIFEST), manifest.to_string()).unwrap();
    check(folder.path()).assert_refused(AT_BUNDLE, "manifest.json: not filled in: licence", CORRECT);

    std::fs::write(folder.path().join(MANIFEST), filled_in.to_string()).unwrap();
    let checked = check(folder.path());
    assert_eq!(checked.code, Some(0), "{checked:?}");
    assert!(checked.steps().starts_with("bundle ok, network ok, interface ok, golden ok, "), "{checked:?}");
    assert!(!checked.printed.contains("WRONG") && checked.printed.contains("ms a run"), "{checked:?}");
    let digest = sha256(filled_in.to_string().as_bytes());
    assert!(checked.printed.ends_with(&format!("for MODEL_DIGEST:\n{digest}\n")), "{digest}: {checked:?}");
    assert!(Bundle::from_directory(folder.path(), Some(&digest)).is_ok(), "a host pinned to it takes it");
    assert!(Bundle::from_directory(folder.path(), Some(&sha256(b"another"))).is_err());
    (folder, asked)
}

#[test]
fn a_bundle_is_begun_from_its_network_filled_in_and_passes_the_check() {
    for other in [false, true] {
        let network = Network { nhwc: other, uint8: other, probabilities: other, ood: true, ..Network::default() };
        let (folder, _) = begun_and_filled_in(&network.onnx(), &network.manifest());
        // Read otherwise than it speaks: the golden pictures tell.
        let kind = if other { "logits" } else { "probabilities" };
        edit(folder.path(), |manifest| manifest["outputs"]["scores"]["kind"] = json!(kind));
        check(folder.path()).assert_refused(AT_GOLDEN, "golden picture \"a colour\": ", COMPARE);
    }
}

#[test]
fn the_reference_bundle_is_begun_from_its_network_filled_in_and_passes_the_check() {
    let Some(reference) = Reference::read() else { return };
    let (folder, asked) = begun_and_filled_in(&reference.network, &reference.manifest());
    assert!(asked.iter().any(|field| field.starts_with("labels[6].code")), "{asked:?}");
    // Fed otherwise than it was trained: the golden pictures tell.
    edit(folder.path(), |manifest| manifest["input"]["mean"] = json!([0.0, 0.0, 0.0]));
    let checked = check(folder.path());
    assert_eq!(checked.code, Some(1), "{checked:?}");
    assert!(checked.printed.contains("golden     WRONG") && checked.error.contains(COMPARE), "{checked:?}");
}

/// A manifest of another number of labels, with as many probabilities.
fn relabel(folder: &Path, count: usize) {
    edit(folder, |manifest| {
        let other = json!({"code": "other", "name": "other", "malignant": false});
        manifest["labels"].as_array_mut().unwrap().resize(count, other);
        for picture in manifest["golden"]["pictures"].as_array_mut().unwrap() {
            picture["probabilities"].as_array_mut().unwrap().resize(count, json!(0.0));
        }
    });
}

/// A manifest's `network` of these bytes.
fn described(network: &[u8]) -> Value {
    json!({"file": "means.onnx", "sha256": sha256(network), "size_bytes": network.len()})
}

#[test]
fn each_fault_of_a_bundle_is_told_at_its_step_with_what_to_do() {
    let whole = check(bundle().path());
    assert_eq!(whole.code, Some(0), "{whole:?}");
    for (spoil, steps, complaint, advice) in FAULTS {
        let folder = bundle();
        spoil(folder.path());
        check(folder.path()).assert_refused(steps, complaint, advice);
    }
}

#[test]
fn an_onnx_runtime_that_is_missing_or_is_none_is_no_fault_of_the_bundle() {
    let folder = bundle();
    let network = folder.path().join("means.onnx");
    let before = manifest_in(folder.path());
    for library in ["nowhere.so", "means.onnx"].map(|name| folder.path().join(name)) {
        for (verb, path) in [("check", folder.path()), ("new", network.as_path())] {
            let mut command = command(&[OsStr::new(verb), path.as_os_str()]);
            command.env("ORT_DYLIB_PATH", &library);
            let told = told(command);
            assert_eq!(told.code, Some(1), "{verb}: {told:?}");
            assert!(told.error.contains("local: ORT_DYLIB_PATH: "), "{verb}: {told:?}");
            assert!(!told.printed.contains("WRONG"), "{verb}: {told:?}");
        }
    }
    assert_eq!(manifest_in(folder.path()), before);
}

/// Puts `other` in the place of the first `known`, which is as long: the lengths around it stay true.
fn replaced(onnx: &[u8], known: &[u8], other: &[u8]) -> Vec<u8> {
    assert_eq!(known.len(), other.len());
    let at = onnx.windows(known.len()).position(|window| window == known).unwrap();
    [&onnx[..at], other, &onnx[at + known.len()..]].concat()
}

/// A network whose graph does not say how many classes it has: the scores go through a choice of all columns, which
/// only a run makes (onnx.proto: `Compress`), and the output's second dimension has no size.
fn of_untold_classes(network: &Network) -> Vec<u8> {
    let field = |number: u8, value: &[u8]| {
        let length = u8::try_from(value.len()).unwrap();
        [&[number << 3 | 2, length][..], value].concat()
    };
    // The node's output comes before the graph's, which alone is called so then.
    let onnx = replaced(&network.onnx(), b"scores", b"hidden");
    let at = onnx.windows(6).position(|window| window == b"scores").unwrap();
    let (before, output) = onnx.split_at(at);
    // A dimension of size 3 (field 1) and one with a name (field 2) that is empty.
    let output = replaced(output, &[0x0a, 2, 8, 3], &[0x0a, 2, 0x12, 0]);
    // The attribute's number (field 3) and its type (field 20), which is 2 for whole numbers.
    let axis = [field(1, b"axis").as_slice(), &[0x18, 1, 0xa0, 1, 2]].concat();
    let names = [field(1, b"hidden"), field(1, b"all"), field(2, b"scores"), field(4, b"Compress")].concat();
    let node = [names, field(5, &axis)].concat();
    // Three values (field 1) that are true or false (field 2).
    let all = [&[8, 3, 0x10, 9][..], field(8, b"all").as_slice(), &field(9, &[1; 3])].concat();
    // What is appended to a message of protobuf is merged with it: the graph gets a node and a constant more.
    let graph = [field(1, &node), field(5, &all)].concat();
    [before, &output, &field(7, &graph)].concat()
}

#[test]
fn a_network_that_does_not_say_how_many_classes_it_has_is_begun_with_two_and_a_place_for_the_others() {
    let network = Network::default();
    let onnx = of_untold_classes(&network);
    let mut known = network.manifest();
    known["network"] = described(&onnx);
    let (folder, asked) = begun_and_filled_in(&onnx, &known);
    assert!(asked.iter().any(|field| field.starts_with("labels[2] (the graph does not say how many")), "{asked:?}");
    // No shape can tell then that there are too few: the golden pictures do.
    relabel(folder.path(), 2);
    check(folder.path()).assert_refused(AT_GOLDEN, "golden picture \"a colour\": ", COMPARE);
}

#[test]
fn what_the_graph_tells_is_in_the_draft() {
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
        let path = folder.path().join("means.onnx");
        std::fs::write(&path, network.onnx()).unwrap();
        assert_eq!(new(&path).code, Some(0));
        let (drafted, known) = (manifest_in(folder.path()), network.manifest());
        for told in ["layout", "type", "width", "height"] {
            assert_eq!(drafted["input"][told], known["input"][told]);
        }
        assert_eq!(
            (&drafted["outputs"]["ood"], &drafted["outputs"]["map"]),
            (&known["outputs"]["ood"], &known["outputs"]["map"])
        );
        assert_eq!(drafted["labels"].as_array().unwrap().len(), 3);
        assert_eq!(drafted["input"]["mean"].is_string(), !nhwc, "bytes go in as they are");

        std::fs::remove_file(folder.path().join(MANIFEST)).unwrap();
        std::fs::write(&path, renamed(&network.onnx())).unwrap();
        // By its plain name, from where it lies.
        let mut command = command(&["new", "means.onnx"]);
        command.current_dir(folder.path());
        let begun = told(command);
        assert_eq!(begun.code, Some(0), "{begun:?}");
        assert!(begun.printed.ends_with("Then: local model check .\n"), "{begun:?}");
        let drafted = manifest_in(folder.path());
        assert_eq!((&drafted["outputs"]["ood"], &drafted["outputs"]["map"]), (&Value::Null, &Value::Null));
    }
}

#[test]
fn what_is_no_classifier_of_one_picture_gets_no_draft_and_is_told_what_it_has() {
    let network = Network::default();
    let one_class = Network { classes: vec![("one", [1.0; 3])], ..Network::default() };
    // 8, in as many bytes as the name of a dimension of any size had: the last of a varint may be 0.
    let eight_pictures = replaced(&network.onnx(), b"\x0a\x05\x12\x03any", b"\x0a\x05\x08\x88\x80\x80\x00");
    let networks = [
        (b"no network".to_vec(), "means.onnx: ", "local: "),
        (one_class.onnx(), "no output gives scores", "scores float32 [-1, 1], map_mean float32 [-1, 12, 8]"),
        (eight_pictures, "no input takes a picture", "picture float32 [8, 3, 12, 8]"),
    ];
    for (onnx, complaint, found) in networks {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("means.onnx");
        std::fs::write(&path, onnx).unwrap();
        let told = new(&path);
        assert_eq!(told.code, Some(1), "{complaint}: {told:?}");
        assert!(told.error.contains(complaint) && told.error.contains(found), "{complaint}: {told:?}");
        assert!(!folder.path().join(MANIFEST).exists(), "{complaint}");
    }
    let nowhere = new(Path::new("nowhere/model.onnx"));
    assert_eq!(nowhere.code, Some(1), "{nowhere:?}");
    assert!(nowhere.error.contains("nowhere/model.onnx: No such file"), "{nowhere:?}");
}

#[test]
fn the_help_of_each_command_has_an_example_and_the_exit_codes() {
    let helps: [(&[&str], [&str; 3]); 3] = [
        (&["--help"], ["local model new mine/model.onnx", "MODEL_DIR=mine MODEL_DIGEST=", "docs/MODEL.md"]),
        (&["check", "--help"], ["local model check model", "ORT_DYLIB_PATH", "scripts/onnxruntime"]),
        (&["new", "--help"], ["local model new mine/model.onnx", "FILL IN", "ORT_DYLIB_PATH"]),
    ];
    for (arguments, parts) in helps {
        let told = told(command(arguments));
        assert_eq!(told.code, Some(0), "{told:?}");
        let help = told.printed.split_whitespace().collect::<Vec<_>>().join(" ");
        let always = ["local model check ", "Exit codes: 0 ", " 1 ", " 2 the command line is wrong"];
        for part in parts.into_iter().chain(always) {
            assert!(help.contains(part), "{arguments:?}, {part}: {help}");
        }
    }
    for verb in ["check", "new"] {
        let told = told(command(&[verb]));
        assert_eq!((told.code, told.printed.as_str()), (Some(2), ""), "{verb}");
        assert!(told.error.contains("Usage: local model"), "{verb}: {told:?}");
    }
}
