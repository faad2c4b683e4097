//! `e2e/skips.toml`: which tests may be skipped, why, and on what condition. A skip that is not listed fails the run, and so
//! does one whose condition does not hold here.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::setup::Host;
use crate::sh;

/// A test that may be skipped.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Skip {
    /// The test's name as its `SKIPPED:` line gives it.
    test: String,
    /// For the reader.
    reason: String,
    /// When it may be skipped.
    when: Condition,
}

/// What the run finds out by itself.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Condition {
    /// There is no Go, so none of upstream's programs.
    NoGo,
    /// There is no apt.
    NoApt,
    /// The kernel has no such file, e.g. `/sys/kernel/security/apparmor`.
    KernelLacks(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    skip: Vec<Skip>,
}

/// A `SKIPPED: name: reason` line of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The test.
    pub test: String,
    /// Its own words.
    pub reason: String,
}

impl Skipped {
    /// Reads a line of a test's output.
    pub fn parse(line: &str) -> Option<Skipped> {
        let (test, reason) = line.trim().strip_prefix("SKIPPED: ")?.split_once(": ")?;
        Some(Skipped { test: test.to_owned(), reason: reason.to_owned() })
    }
}

/// The skips that are not allowed on this host, each as a sentence.
pub fn refused(skipped: &[Skipped], host: &Host) -> Result<Vec<String>> {
    let path = sh::root().join("e2e/skips.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    let file: File = toml::from_str(&text).with_context(|| format!("failed to parse {}", path.display()))?;
    Ok(judge(skipped, &file.skip, host))
}

fn judge(skipped: &[Skipped], listed: &[Skip], host: &Host) -> Vec<String> {
    let judge_one = |skip: &Skipped| {
        let Some(entry) = listed.iter().find(|entry| entry.test == skip.test) else {
            return Some(format!("{} was skipped ({}) and does not stand in e2e/skips.toml", skip.test, skip.reason));
        };
        let holds = match &entry.when {
            Condition::NoGo => !host.go,
            Condition::NoApt => !host.apt,
            Condition::KernelLacks(file) => !Path::new(file).exists(),
        };
        (!holds).then(|| {
            format!("{} was skipped ({}), but its condition {:?} does not hold: {}", skip.test, skip.reason, entry.when, entry.reason)
        })
    };
    skipped.iter().filter_map(judge_one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_counts_only_where_its_condition_holds() {
        let listed: File = toml::from_str(
            "[[skip]]\ntest = \"a\"\nreason = \"needs Go\"\nwhen = \"no-go\"\n\
             [[skip]]\ntest = \"b\"\nreason = \"kernel\"\nwhen = { kernel-lacks = \"/nonexistent\" }\n",
        )
        .unwrap();
        let skip = |name: &str| Skipped::parse(&format!("SKIPPED: {name}: no reason")).unwrap();
        let with_go = Host { go: true, ..Host::default() };
        assert_eq!(judge(&[skip("b")], &listed.skip, &with_go), Vec::<String>::new());
        assert_eq!(judge(&[skip("a"), skip("c")], &listed.skip, &with_go).len(), 2);
        assert_eq!(judge(&[skip("a")], &listed.skip, &Host::default()).len(), 0);
    }
}
