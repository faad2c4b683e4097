//! Upstream's suites of many specs inside one test: their counts and skips, told to `cargo xtask test`; and which specs `skips.toml` leaves
//! out because what they judge is not built.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// The name of critest in `skips.toml` and in the counts.
pub const CRITEST: &str = "critest";

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    spec: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    suite: String,
    spec: String,
    when: toml::Value,
}

/// A regular expression of the specs of a suite that stand in `skips.toml` as not built, or as out of reach of every test; `None`: there are none.
///
/// # Errors
/// When the file cannot be read.
pub fn unbuilt(suite: &str) -> Result<Option<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("skips.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    let file: File = toml::from_str(&text).with_context(|| format!("failed to parse {}", path.display()))?;
    let left_out = |entry: &&Entry| entry.suite == suite && matches!(entry.when.as_str(), Some("not-built" | "out-of-reach"));
    let names: Vec<String> = file.spec.iter().filter(left_out).map(|entry| regex::escape(&entry.spec)).collect();
    Ok((!names.is_empty()).then(|| names.join("|")))
}

/// Says that a spec was skipped, in the form that `cargo xtask test` judges.
pub fn skip(suite: &str, spec: &str, reason: &str) {
    let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    println!("SKIPPED SPEC: {suite} | {} | {}", one_line(spec), one_line(reason));
}

/// Says how a suite ended, in the form that `cargo xtask test` writes into the README.
pub fn count(suite: &str, passed: usize, failed: usize, skipped: usize) {
    println!("SPECS: {suite} | {passed} passed | {failed} failed | {skipped} skipped");
}
