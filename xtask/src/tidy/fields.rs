//! The table of fields (`crates/apimachinery/data/fields.toml`): a row that says "done" names a test that is in the sources, and
//! the modules that it names are there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The table, from the root.
const TABLE: &str = "crates/apimachinery/data/fields.toml";

/// Every row that claims what is not there.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(root.join(TABLE)).with_context(|| format!("failed to read {TABLE}"))?;
    let table: BTreeMap<String, BTreeMap<String, toml::Value>> =
        toml::from_str(&text).with_context(|| format!("failed to parse {TABLE}"))?;
    let mut failures = Vec::new();
    let mut known: BTreeMap<String, bool> = BTreeMap::new();
    for (kind, rows) in &table {
        for (field, row) in rows {
            let Some(claim) = row.as_str() else { continue };
            for wrong in judge(claim, &mut |word| *known.entry(word.to_owned()).or_insert_with(|| exists(root, word))) {
                failures.push(format!("{TABLE}: {kind}.{field}: {wrong}"));
            }
        }
    }
    Ok(failures)
}

/// What is wrong with the claim of one row; `exists` tells whether a word (`test NAME`, or a module) is in the sources.
fn judge(claim: &str, exists: &mut dyn FnMut(&str) -> bool) -> Vec<String> {
    let Some(text) = claim.strip_prefix("done: ") else { return vec![format!("{claim:?} does not begin with \"done: \"")] };
    let mut wrong = Vec::new();
    let words: Vec<&str> = text.split(", ").map(|word| word.split(" (").next().unwrap_or(word)).collect();
    if !words.iter().any(|word| word.starts_with("test ")) {
        wrong.push("is said to be done, and no test is named".to_owned());
    }
    wrong.extend(words.iter().filter(|word| **word != "stored as given" && !exists(word)).map(|word| format!("{word} is not there")));
    wrong
}

fn exists(root: &Path, word: &str) -> bool {
    match word.strip_prefix("test ") {
        Some(test) => test_exists(root, test),
        None => files(root, word).iter().any(|path| path.is_file()),
    }
}

/// The folder of a crate.
fn folder(root: &Path, package: &str) -> PathBuf {
    if package == "e2e" { root.join("e2e") } else { root.join("crates").join(package) }
}

/// The files that `crate::module::path` may be.
fn files(root: &Path, path: &str) -> Vec<PathBuf> {
    let (package, modules) = path.split_once("::").unwrap_or((path, ""));
    let folder = folder(root, package);
    if modules.is_empty() {
        return vec![folder.join("src/lib.rs")];
    }
    let base = modules.replace("::", "/");
    [format!("src/{base}.rs"), format!("src/{base}/mod.rs"), format!("tests/{base}.rs")].map(|file| folder.join(file)).to_vec()
}

/// Whether `crate::module::path::name` is a test: in the module's file, or that of its `tests`.
fn test_exists(root: &Path, test: &str) -> bool {
    let Some((module, name)) = test.rsplit_once("::") else { return false };
    let mut candidates = files(root, module);
    if let Some(outer) = module.strip_suffix("::tests") {
        candidates.extend(files(root, outer));
    }
    candidates.iter().any(|path| std::fs::read_to_string(path).is_ok_and(|text| has_test(&text, name)))
}

fn has_test(text: &str, name: &str) -> bool {
    let lines: Vec<&str> = text.lines().map(str::trim_start).collect();
    let function = format!("fn {name}(");
    lines.iter().enumerate().any(|(at, line)| {
        let is_it = line.strip_prefix("async ").unwrap_or(line).starts_with(&function);
        let mut above = lines[..at].iter().rev().take_while(|line| line.starts_with("#[") || line.starts_with("///"));
        // A case that a macro makes a test of on each kind of server takes the kind.
        is_it && (above.any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test")) || line.contains("(kind: Kind)"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_names_a_test_that_is_there() {
        let judge = |claim: &str| judge(claim, &mut |word| !word.contains("missing")).len();
        assert_eq!(judge("done: kubelet::plan, test kubelet::plan::tests::x"), 0);
        assert_eq!(judge("done: stored as given (status), test apiserver::fields::x"), 0);
        assert_eq!(judge("done: kubelet::plan"), 1);
        assert_eq!(judge("done: kubelet::missing, test kubelet::x"), 1);
        assert_eq!(judge("done: kubelet::plan, test missing::x"), 1);
        assert_eq!(judge("kubelet::plan, test x"), 1);
    }

    #[test]
    fn tests_are_found_by_their_attribute() {
        let text = "#[test]\nfn one() {}\n\nfn two() {}\n    #[tokio::test(flavor = \"current_thread\")]\n    async fn three() {}\nasync fn four(kind: Kind) {}\n";
        assert_eq!(["one", "two", "three", "four", "five"].map(|name| has_test(text, name)), [true, false, true, true, false]);
    }
}
