//! The table of parsers at an edge (`xtask/edges.toml`): each is there, has a fuzz target that is there, and every target has a row.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

/// The table, from the root.
const TABLE: &str = "xtask/edges.toml";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    edge: Vec<Edge>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Edge {
    /// What comes in.
    input: String,
    /// The file, or the folder, of the parser.
    parser: String,
    /// `FILE:TEST`.
    target: String,
}

/// Every row that claims what is not there, and every target without a row. `sources` are all Rust files.
pub fn check(root: &Path, sources: &[PathBuf]) -> Result<Vec<String>> {
    let text = fs::read_to_string(root.join(TABLE)).with_context(|| format!("failed to read {TABLE}"))?;
    let table: Table = toml::from_str(&text).with_context(|| format!("failed to parse {TABLE}"))?;
    let mut targets = BTreeSet::new();
    for path in sources.iter().filter(|path| path.ends_with("fuzz.rs") && !path.ends_with("testkit/src/fuzz.rs")) {
        let name = path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned();
        let text = fs::read_to_string(path).with_context(|| format!("failed to read {name}"))?;
        targets.extend(tests(&text).map(|test| format!("{name}:{test}")));
    }
    let mut failures = Vec::new();
    for edge in &table.edge {
        if !root.join(&edge.parser).exists() {
            failures.push(format!("{TABLE}: {}: there is no {}", edge.input, edge.parser));
        }
        if !targets.contains(&edge.target) {
            failures.push(format!("{TABLE}: {}: there is no target {}", edge.input, edge.target));
        }
    }
    let named: BTreeSet<&String> = table.edge.iter().map(|edge| &edge.target).collect();
    failures.extend(targets.iter().filter(|target| !named.contains(target)).map(|target| format!("{TABLE}: no row names {target}")));
    Ok(failures)
}

/// The names of a file's tests.
fn tests(text: &str) -> impl Iterator<Item = &str> {
    text.split("#[test]\nfn ").skip(1).filter_map(|rest| rest.split_once('(')).map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    #[test]
    fn tests_are_found() {
        let text = "//! x\nfn help() {}\n#[test]\nfn one() {}\n\n#[test]\nfn two() {\n}\n";
        assert_eq!(super::tests(text).collect::<Vec<_>>(), ["one", "two"]);
    }
}
