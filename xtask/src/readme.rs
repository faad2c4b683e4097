//! The blocks of README.md that a run writes: what is generated is never typed.

use std::fs;

use anyhow::{Context, Result};

use crate::skips::SuiteCount;
use crate::{setup, sh};

const BEGIN: &str = "<!-- suites: written by cargo xtask test -->";
const END: &str = "<!-- /suites -->";

/// Writes the counts of the suites that ran into their block, if they are other than what stands there.
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

/// The suite with its version, and the command that runs it alone.
fn cells(suite: &str) -> (String, String) {
    match suite {
        "critest" => (format!("critest {}", setup::CRI_TOOLS.trim_start_matches('v')), "cargo xtask test --package e2e critest".to_owned()),
        guest if guest.starts_with("cgroup v2") => (guest.to_owned(), "cargo xtask test --package cgroup-v2".to_owned()),
        other => (other.to_owned(), format!("cargo xtask test --package e2e {other}")),
    }
}

/// Rows of suites that did not run stay as they are.
fn with_counts(text: &str, suites: &[SuiteCount]) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (old, after) = rest.split_once(END)?;
    let ran = |row: &&str| suites.iter().any(|suite| row.starts_with(&format!("| {} |", cells(&suite.suite).0)));
    let kept = old.lines().filter(|row| row.starts_with("| ") && !row.starts_with("| suite |"));
    let mut rows: Vec<String> = kept.filter(|row| !ran(row)).map(str::to_owned).collect();
    for SuiteCount { suite, passed, failed, skipped } in suites {
        let (name, command) = cells(suite);
        rows.push(format!("| {name} | {passed} | {failed} | {skipped} | `{command}` |"));
    }
    rows.sort();
    let head =
        "\n| suite | passed | failed | skipped, each with its reason in `e2e/skips.toml` | command |\n|---|---|---|---|---|\n".to_owned();
    Some(format!("{before}{BEGIN}{head}{}\n{END}{after}", rows.join("\n")))
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
        let other = [SuiteCount { suite: "cgroup v2: shim".into(), passed: 9, failed: 0, skipped: 0 }];
        let both = with_counts(&first, &other).unwrap();
        assert!(both.contains("| cgroup v2: shim | 9 | 0 | 0 | `cargo xtask test --package cgroup-v2` |\n| critest "), "{both}");
        assert_eq!(with_counts("no block", &suites), None);
    }
}
