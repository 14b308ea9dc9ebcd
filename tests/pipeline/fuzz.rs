//! Replays the fuzzers' corpora, seeds and what was found, through the fuzzers' own targets.

#[path = "../fuzz/targets.rs"]
pub mod targets;

use std::path::PathBuf;

use crate::support::root;

fn corpus(target: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join("tests/fuzz/corpus").join(target)).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn every_input_of_the_corpora_keeps_what_its_target_promises() {
    for (name, target) in targets::TARGETS {
        let files = corpus(name);
        assert!(files.len() >= 2, "{name}: {} files", files.len());
        for file in files {
            println!("{}", file.display());
            target(&std::fs::read(&file).unwrap());
        }
    }
}

#[test]
fn every_target_has_a_binary_for_the_fuzzer_and_the_corpora_are_small() {
    let manifest = std::fs::read_to_string(root().join("tests/fuzz/Cargo.toml")).unwrap();
    assert_eq!(manifest.matches("[[bin]]").count(), targets::TARGETS.len());
    let mut bytes = 0;
    for (name, _) in targets::TARGETS {
        let binary = std::fs::read_to_string(root().join(format!("tests/fuzz/bins/{name}.rs"))).unwrap();
        assert!(binary.contains(&format!("fuzz::{name}(data)")), "{name}");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        bytes += corpus(name).iter().map(|file| file.metadata().unwrap().len()).sum::<u64>();
    }
    assert!(bytes < 300_000, "{bytes}");
}
