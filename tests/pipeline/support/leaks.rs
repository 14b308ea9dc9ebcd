//! Looks for bytes that must be nowhere: in files, a log, all that is sent; as they are and in the
//! forms into which programs turn them.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;

/// How many bytes of a form are looked up at once.
const HEAD: usize = 8;

/// What is looked for: every form by its first bytes, with the marker's name.
#[derive(Default)]
pub struct Leaks(HashMap<[u8; HEAD], Vec<(String, Vec<u8>)>>);

impl Leaks {
    /// Looks for this marker as well: raw, in base64, in hex, in UTF-16, and as a list of numbers.
    pub fn watch(&mut self, name: &str, marker: &[u8]) {
        assert!(marker.len() >= 12, "{name} is too short to be told from chance");
        let mut forms = vec![("raw", marker.to_vec())];
        // Base64 has three forms: the letters that hold bytes of the marker alone are looked for.
        for before in 0..3 {
            let text = STANDARD_NO_PAD.encode([&vec![0; before], marker].concat());
            let (start, end) = ((before * 8).div_ceil(6), (before + marker.len()) * 8 / 6);
            let standard = text[start..end].to_owned();
            forms.push(("base64url", standard.replace('+', "-").replace('/', "_").into_bytes()));
            forms.push(("base64", standard.into_bytes()));
        }
        let hex = marker.iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        forms.push(("hex", hex.to_ascii_uppercase().into_bytes()));
        forms.push(("hex", hex.into_bytes()));
        forms.push(("UTF-16", marker.iter().flat_map(|byte| [*byte, 0]).collect()));
        let numbers: Vec<_> = marker.iter().map(u8::to_string).collect();
        forms.push(("numbers", numbers.join(", ").into_bytes()));
        forms.push(("numbers", numbers.join(",").into_bytes()));
        for (form, bytes) in forms {
            let head = *bytes.first_chunk().unwrap();
            self.0.entry(head).or_default().push((format!("{name} ({form})"), bytes));
        }
    }

    /// Which markers are in these bytes, and where.
    pub fn found_in(&self, place: &str, bytes: &[u8]) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        for (at, head) in bytes.array_windows::<HEAD>().enumerate() {
            for (name, form) in self.0.get(head).into_iter().flatten() {
                if bytes[at..].starts_with(form) {
                    found.push(format!("{name} in {place}"));
                }
            }
        }
        found.dedup();
        found
    }

    /// Which markers are in what came to a place. What is known to have come must be there as well: in
    /// nothing, nothing is found.
    pub fn found_among(&self, place: &str, came: &[Vec<u8>], known: &[impl AsRef<str>]) -> Vec<String> {
        let came = came.concat();
        let text = String::from_utf8_lossy(&came);
        for known in known {
            let known: &str = known.as_ref();
            assert!(text.contains(known), "{place} says nothing of {known}: {text:.1000}");
        }
        self.found_in(place, &came)
    }

    /// Which markers are in the files below a folder, or in their names, and how many files there are.
    pub fn found_below(&self, folder: &Path) -> (Vec<String>, usize) {
        let (mut found, mut files) = (Vec::new(), 0);
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            found.extend(self.found_in("a name", path.as_os_str().as_encoded_bytes()));
            if path.is_dir() {
                let (more, count) = self.found_below(&path);
                found.extend(more);
                files += count;
            } else {
                files += 1;
                // A file may be gone again, as SQLite's are.
                let bytes = std::fs::read(&path).unwrap_or_default();
                found.extend(self.found_in(&path.display().to_string(), &bytes));
            }
        }
        (found, files)
    }
}

#[test]
fn a_marker_is_found_in_every_form_and_at_every_offset() {
    let marker = b"\x01marker \xFEof thirty bytes.";
    let mut leaks = Leaks::default();
    leaks.watch("it", marker);
    for before in 0..6 {
        let within = [&vec![b'-'; before], &marker[..], b"..."].concat();
        let numbers = format!("{within:?}");
        let hex: String = within.iter().map(|byte| format!("{byte:02X}")).collect();
        let utf16: Vec<u8> = within.iter().flat_map(|byte| [*byte, 0]).collect();
        for text in [STANDARD_NO_PAD.encode(&within).into_bytes(), numbers.into(), hex.into(), utf16, within.clone()] {
            assert!(!leaks.found_in("here", &text).is_empty(), "{before}: {}", String::from_utf8_lossy(&text));
        }
        assert!(leaks.found_in("here", &within[..within.len() - 4]).is_empty());
    }
}
