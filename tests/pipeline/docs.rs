//! The pages that people go by say what the code does.

use std::path::{Path, PathBuf};

use crate::support::root;

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

/// Every source file outside the tests.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_variable_that_is_read_is_in_the_readme_and_no_other() {
    let readme = read("README.md");
    let mut files = Vec::new();
    ["shared", "functions", "local", "cli"].iter().for_each(|folder| sources(&root().join(folder), &mut files));
    let mut variables = Vec::new();
    for text in files.iter().map(|file| std::fs::read_to_string(file).unwrap()) {
        // A read is one of these calls with the name as its first argument.
        for call in [".text(\"", ".parse(\"", ".number(\"", ".secret(\"", ".flag(\"", ".needed(\"", "env = \""] {
            let names = text.split(call).skip(1).filter_map(|rest| rest.split('"').next());
            variables.extend(
                names
                    .filter(|name| {
                        name.len() > 3 && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
                    })
                    .map(str::to_owned),
            );
        }
    }
    variables.sort();
    variables.dedup();
    // Debug builds only.
    variables.retain(|name| name != "CRASH_AT");
    let mut listed: Vec<_> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` |").map(|(name, _)| name.to_owned()))
        .collect();
    listed.sort();
    assert_eq!(variables, listed);
    assert!(variables.len() > 20);
}

#[test]
fn every_error_and_failure_code_is_in_the_api_page() {
    let page = read("docs/API.md");
    for description in ["Code", "FailureCode", "RetakeReason", "Status", "AbstainReason"] {
        let openapi = serde_json::to_value(local::openapi()).unwrap();
        let codes = openapi["components"]["schemas"][description]["enum"].as_array().unwrap().clone();
        for code in codes {
            let code = code.as_str().unwrap();
            assert!(
                page.contains(&format!("`{code}`")) || page.contains(&format!("\"{code}\"")),
                "{description}: {code}"
            );
        }
    }
}

/// From what was measured, Terraform's sizes and a list of prices.
#[test]
fn the_costs_in_the_readme_are_what_the_script_computes() {
    let output = std::process::Command::new(root().join("scripts/cost")).output().expect("python3 is missing");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout).unwrap();
    let tables: Vec<_> = printed.trim().split("\n\n").collect();
    assert_eq!(tables.len(), 2);
    for table in tables {
        assert!(read("README.md").contains(table), "scripts/cost computes, and README.md does not say:\n{table}");
    }
}

#[test]
fn every_metric_is_in_the_architecture_page_with_its_unit() {
    let page = read("docs/ARCHITECTURE.md");
    for (name, unit) in shared::metrics::ALL {
        let row = page.lines().find(|line| line.starts_with('|') && line.contains(&format!("`{name}`")));
        let unit = match unit.map(|unit| unit.as_str()) {
            Some("count") => "Count",
            Some("milliseconds") => "Milliseconds",
            None => "None (USD)",
            other => panic!("{other:?}"),
        };
        assert!(row.unwrap_or_else(|| panic!("{name}")).contains(&format!("| {unit} |")), "{name}");
    }
}

#[test]
fn every_link_between_the_pages_leads_somewhere() {
    for page in
        ["README.md", "docs/API.md", "docs/ARCHITECTURE.md", "docs/MODEL.md", "docs/RUNBOOK.md", "model/README.md"]
    {
        let text = read(page);
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.starts_with("http")) {
            let (file, section) = target.split_once('#').unwrap_or((target, ""));
            let path = root().join(page).parent().unwrap().join(file);
            assert!(path.exists(), "{page}: {target}");
            assert!(section.is_empty() || text.lines().any(|line| line == format!("## {section}")), "{page}: {target}");
        }
    }
}
