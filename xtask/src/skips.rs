//! `e2e/skips.toml`: which tests, and which specs of upstream's suites, may be skipped, why, and on what condition. A skip that is not
//! listed fails the run, and so does one whose condition does not hold here, and a listed spec that was not skipped.

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

/// A spec of one of upstream's suites that may be skipped; the suite runs inside one test.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SpecSkip {
    /// The suite: `critest`.
    suite: String,
    /// The spec's whole name.
    spec: String,
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
    /// The kernel is older than this release, e.g. `6.15`.
    KernelBefore(String),
    /// What a spec judges is not built yet: its test leaves it out.
    NotBuilt,
    /// What a spec needs is outside of every test's network: its test leaves it out.
    OutOfReach,
    /// It is run on request only, as benchmarks are.
    NotAsked,
}

impl Condition {
    fn holds(&self, host: &Host) -> bool {
        match self {
            Condition::NoGo => !host.go,
            Condition::NoApt => !host.apt,
            Condition::KernelLacks(file) => !Path::new(file).exists(),
            Condition::KernelBefore(release) => version(&host.kernel).zip(version(release)).is_some_and(|(here, there)| here < there),
            Condition::NotBuilt | Condition::OutOfReach | Condition::NotAsked => true,
        }
    }
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(['.', '-']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    skip: Vec<Skip>,
    #[serde(default)]
    spec: Vec<SpecSkip>,
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

/// A `SKIPPED SPEC: suite | name | reason` line of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkippedSpec {
    /// The suite.
    pub suite: String,
    /// The spec.
    pub spec: String,
    /// The suite's own words.
    pub reason: String,
}

impl SkippedSpec {
    /// Reads a line of a test's output.
    pub fn parse(line: &str) -> Option<SkippedSpec> {
        let mut parts = line.trim().strip_prefix("SKIPPED SPEC: ")?.splitn(3, " | ").map(str::to_owned);
        Some(SkippedSpec { suite: parts.next()?, spec: parts.next()?, reason: parts.next()? })
    }
}

/// A `SPECS: suite | 1 passed | 2 failed | 3 skipped` line of a test.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SuiteCount {
    /// The suite.
    pub suite: String,
    /// Specs that passed.
    pub passed: usize,
    /// Specs that failed.
    pub failed: usize,
    /// Specs that did not run.
    pub skipped: usize,
}

impl SuiteCount {
    /// Reads a line of a test's output.
    pub fn parse(line: &str) -> Option<SuiteCount> {
        let mut parts = line.trim().strip_prefix("SPECS: ")?.split(" | ");
        let suite = parts.next()?.to_owned();
        let mut number = |word: &str| parts.next()?.strip_suffix(word)?.trim().parse::<usize>().ok();
        Some(SuiteCount { suite, passed: number("passed")?, failed: number("failed")?, skipped: number("skipped")? })
    }
}

fn read() -> Result<File> {
    let path = sh::root().join("e2e/skips.toml");
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("failed to parse {}", path.display()))
}

/// The skips that are not allowed on this host, each as a sentence; `ran` are the suites that ran.
pub fn refused(skipped: &[Skipped], specs: &[SkippedSpec], ran: &[SuiteCount], host: &Host) -> Result<Vec<String>> {
    let file = read()?;
    let mut sentences = judge(skipped, &file.skip, host);
    sentences.extend(judge_specs(specs, ran, &file.spec, host));
    Ok(sentences)
}

/// The same of the tests that ran in the guest, on a kernel of release `kernel`: it has all files that they need, whatever this machine's lacks.
pub fn refused_in_guest(skipped: &[Skipped], host: &Host, kernel: &str) -> Result<Vec<String>> {
    let mut listed = read()?.skip;
    listed.retain(|entry| !matches!(entry.when, Condition::KernelLacks(_)));
    let guest = Host { kernel: kernel.to_owned(), ..host.clone() };
    Ok(judge(skipped, &listed, &guest).into_iter().map(|sentence| format!("on cgroup v2: {sentence}")).collect())
}

fn judge(skipped: &[Skipped], listed: &[Skip], host: &Host) -> Vec<String> {
    let judge_one = |skip: &Skipped| {
        // One that lacks either of two things has two entries.
        let entries = listed.iter().filter(|entry| entry.test == skip.test);
        let Some(entry) = entries.max_by_key(|entry| entry.when.holds(host)) else {
            return Some(format!("{} was skipped ({}) and does not stand in e2e/skips.toml", skip.test, skip.reason));
        };
        (!entry.when.holds(host)).then(|| {
            format!("{} was skipped ({}), but its condition {:?} does not hold: {}", skip.test, skip.reason, entry.when, entry.reason)
        })
    };
    skipped.iter().filter_map(judge_one).collect()
}

fn judge_specs(skipped: &[SkippedSpec], ran: &[SuiteCount], listed: &[SpecSkip], host: &Host) -> Vec<String> {
    let mut sentences = Vec::new();
    for skip in skipped {
        let name = format!("{} {:?}", skip.suite, skip.spec);
        match listed.iter().find(|entry| entry.suite == skip.suite && entry.spec == skip.spec) {
            None => sentences.push(format!("{name} was skipped ({}) and does not stand in e2e/skips.toml", skip.reason)),
            Some(entry) if !entry.when.holds(host) => {
                sentences.push(format!(
                    "{name} was skipped ({}), but its condition {:?} does not hold: {}",
                    skip.reason, entry.when, entry.reason
                ));
            }
            Some(_) => {}
        }
    }
    for entry in listed.iter().filter(|entry| entry.when.holds(host) && ran.iter().any(|suite| suite.suite == entry.suite)) {
        if !skipped.iter().any(|skip| skip.suite == entry.suite && skip.spec == entry.spec) {
            sentences.push(format!("e2e/skips.toml lists {} {:?}, which was not skipped: delete its entry", entry.suite, entry.spec));
        }
    }
    sentences
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

        let before = Condition::KernelBefore("6.15".to_owned());
        let on = |kernel: &str| before.holds(&Host { kernel: kernel.to_owned(), ..Host::default() });
        assert!(on("6.12.94+deb12-cloud-amd64") && on("5.15") && !on("6.15.0-rc1\n") && !on("6.18.5") && !on("7.0") && !on(""));
    }

    #[test]
    fn a_spec_is_skipped_by_its_name_and_listed_only_while_it_is() {
        let listed: File = toml::from_str(
            "[[spec]]\nsuite = \"s\"\nspec = \"a b\"\nreason = \"later\"\nwhen = \"not-built\"\n\
             [[spec]]\nsuite = \"s\"\nspec = \"c\"\nreason = \"kernel\"\nwhen = { kernel-lacks = \"/proc\" }\n",
        )
        .unwrap();
        let skip = |name: &str| SkippedSpec::parse(&format!("SKIPPED SPEC: s | {name} | so")).unwrap();
        let ran = [SuiteCount::parse("SPECS: s | 3 passed | 0 failed | 1 skipped").unwrap()];
        assert_eq!((ran[0].passed, ran[0].failed, ran[0].skipped), (3, 0, 1));
        let judge = |skipped: &[SkippedSpec], ran: &[SuiteCount]| judge_specs(skipped, ran, &listed.spec, &Host::default());
        assert_eq!(judge(&[skip("a b")], &ran), Vec::<String>::new());
        assert_eq!(judge(&[skip("a b"), skip("c"), skip("d")], &ran).len(), 2);
        assert_eq!(judge(&[], &ran).len(), 1);
        assert_eq!(judge(&[], &[]).len(), 0);
    }
}
