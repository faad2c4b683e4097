//! The blocks of README.md that a run writes: what is generated is never typed.

use std::fs;

use anyhow::{Context, Result};

use crate::skips::SuiteCount;
use crate::{setup, sh};

const BEGIN: &str = "<!-- suites: written by cargo xtask test -->";
const END: &str = "<!-- /suites -->";

/// Writes the counts of upstream's suites into their block, if they are other than what stands there.
///
/// # Errors
/// When the README cannot be read or written, or has no such block.
pub fn write_counts(suites: &[SuiteCount]) -> Result<()> {
    if suites.is_empty() {
        return Ok(());
    }
    let path = sh::root().join("README.md");
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    let written = with_counts(&text, suites).with_context(|| format!("{} has no block {BEGIN} ... {END}", path.display()))?;
    if written == text {
        return Ok(());
    }
    fs::write(&path, written).with_context(|| format!("failed to write {}", path.display()))
}

fn with_counts(text: &str, suites: &[SuiteCount]) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    let mut block = String::from(
        "\n| suite | passed | failed | skipped, each with its reason in `e2e/skips.toml` | command |\n|---|---|---|---|---|\n",
    );
    for suite in suites {
        let version = if suite.suite == "critest" { format!(" {}", setup::CRI_TOOLS.trim_start_matches('v')) } else { String::new() };
        let SuiteCount { suite, passed, failed, skipped } = suite;
        block.push_str(&format!("| {suite}{version} | {passed} | {failed} | {skipped} | `cargo xtask test --package e2e {suite}` |\n"));
    }
    Some(format!("{before}{BEGIN}{block}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_is_replaced_and_nothing_else() {
        let suites = [SuiteCount { suite: "critest".into(), passed: 90, failed: 0, skipped: 18 }];
        let first = with_counts(&format!("a\n{BEGIN}old{END}\nb\n"), &suites).unwrap();
        assert!(first.starts_with("a\n") && first.ends_with("\nb\n") && first.contains("| 90 | 0 | 18 |") && !first.contains("old"));
        assert_eq!(with_counts(&first, &suites).unwrap(), first);
        assert_eq!(with_counts("no block", &suites), None);
    }
}
