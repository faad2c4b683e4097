//! `cargo xtask test`: the gate and all tests, counted; afterwards nothing may be left on the machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use testkit::host::Lists;

use crate::skips::{self, Skipped, SkippedSpec, SuiteCount};
use crate::{build, gate, readme, setup, sh};

/// The flags of `cargo xtask test`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Only the tests of these packages.
    #[arg(long, short)]
    package: Vec<String>,
    /// Leave the gate out.
    #[arg(long)]
    no_gate: bool,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

/// The run's counts, written to `target/test-summary.json` and read by nobody's hand.
#[derive(Debug, Default, Serialize)]
struct Summary {
    passed: usize,
    failed: usize,
    skipped: BTreeMap<String, String>,
    /// Upstream's suites, each inside one test.
    suites: Vec<SuiteCount>,
    #[serde(skip)]
    skipped_specs: Vec<SkippedSpec>,
    seconds: u64,
    missing: Vec<String>,
    left_behind: Vec<String>,
    /// What the failed tests printed: repeated at the end, where a long log is read first.
    #[serde(skip)]
    failures: Failures,
}

/// The failed tests' own output, out of the harness's.
#[derive(Debug, Default)]
struct Failures {
    lines: Vec<String>,
    inside: bool,
}

impl Failures {
    /// At most so many lines are kept.
    const LINES_MAX: usize = 400;

    /// Takes the next line of the harness: what stands between `failures:` and the result is kept.
    fn take(&mut self, line: &str) {
        self.inside = line == "failures:" || (self.inside && !line.starts_with("test result: "));
        if self.inside && self.lines.len() < Self::LINES_MAX {
            self.lines.push(line.to_owned());
        }
    }
}

/// Runs everything. Fails where a test failed, a skip is not allowed, or something is left behind.
pub fn run(args: Args) -> Result<()> {
    let start = Instant::now();
    let host = setup::prepare(setup::Need::Tests)?;
    for missing in &host.missing {
        eprintln!("missing: {missing}");
    }
    if !args.no_gate {
        gate::run()?;
    }
    let executables = build::all(build::Profile::Dev)?;
    let mut list = sh::cargo(["test", "--locked", "--no-run"]);
    select(&mut list, &args);
    sh::run("build the tests", &mut list)?;

    let before = Lists::take(&testkit::host::ALL).context("failed to list what is on the machine")?;
    let mut tests = sh::cargo(["test", "--locked", "--no-fail-fast"]);
    select(&mut tests, &args);
    tests.arg("--").arg("--show-output").args(&args.filter);
    tests.env("CORACLE_BIN", &executables.directory);
    if let Some(peers) = &host.peers {
        tests.env("CORACLE_PEERS", peers);
    }
    if let Some(golden) = &host.golden {
        tests.env("CORACLE_K8S_API_TESTDATA", golden);
    }
    let mut summary = count(&mut tests)?;
    // The compiler's own helpers come and go with the build.
    let left = before.expect_nothing_left(&["sccache", "/tmp/rustc"], Duration::from_secs(10));
    summary.left_behind = left.err().map(|left| left.lines().map(str::to_owned).collect()).unwrap_or_default();
    summary.missing.clone_from(&host.missing);
    summary.seconds = start.elapsed().as_secs();
    judge(&summary, &host)
}

fn select(command: &mut std::process::Command, args: &Args) {
    if args.package.is_empty() {
        command.arg("--workspace");
    }
    for package in &args.package {
        command.args(["--package", package]);
    }
}

/// Runs the tests, shows their output as it comes, and counts.
fn count(tests: &mut std::process::Command) -> Result<Summary> {
    eprintln!("==> tests");
    let mut child = tests.stdout(Stdio::piped()).spawn().context("failed to run cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no stdout")?;
    let mut summary = Summary::default();
    let mut skipped = Vec::new();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("failed to read the tests' output")?;
        writeln!(std::io::stdout(), "{line}")?;
        skipped.extend(Skipped::parse(&line));
        summary.failures.take(&line);
        summary.skipped_specs.extend(SkippedSpec::parse(&line));
        summary.suites.extend(SuiteCount::parse(&line));
        if let Some((passed, failed)) = parse_result(&line) {
            summary.passed += passed;
            summary.failed += failed;
        }
    }
    let status = child.wait().context("failed to wait for cargo test")?;
    if !status.success() && summary.failed == 0 {
        bail!("cargo test ended with {status} without a failed test: a test did not build, or died");
    }
    for skip in skipped {
        summary.skipped.insert(skip.test, skip.reason);
    }
    // A test that skipped itself returned, and the harness took that for a pass.
    summary.passed = summary.passed.saturating_sub(summary.skipped.len());
    Ok(summary)
}

/// `test result: ok. 6 passed; 0 failed; 0 ignored; ...`
fn parse_result(line: &str) -> Option<(usize, usize)> {
    let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let number = |word: &str| {
        counts.split("; ").find_map(|part| part.trim().strip_suffix(word)).and_then(|number| number.trim().parse::<usize>().ok())
    };
    // An ignored test is a failure: house style has none.
    Some((number(" passed")?, number(" failed")? + number(" ignored")?))
}

fn judge(summary: &Summary, host: &setup::Host) -> Result<()> {
    let path = build::target_directory().join("test-summary.json");
    std::fs::write(&path, serde_json::to_vec_pretty(summary)?).with_context(|| format!("failed to write {}", path.display()))?;
    let skipped: Vec<Skipped> =
        summary.skipped.iter().map(|(test, reason)| Skipped { test: test.clone(), reason: reason.clone() }).collect();
    let refused = skips::refused(&skipped, &summary.skipped_specs, &summary.suites, host)?;
    readme::write_counts(&summary.suites)?;
    eprintln!();
    for line in &summary.failures.lines {
        eprintln!("{line}");
    }
    for suite in &summary.suites {
        eprintln!("{}: {} passed, {} failed, {} skipped", suite.suite, suite.passed, suite.failed, suite.skipped);
    }
    for skip in &skipped {
        eprintln!("skipped: {}: {}", skip.test, skip.reason);
    }
    for left in &summary.left_behind {
        eprintln!("left behind: {left}");
    }
    for refusal in &refused {
        eprintln!("not allowed: {refusal}");
    }
    eprintln!(
        "{} passed, {} failed, {} skipped, {} left behind, {} s",
        summary.passed,
        summary.failed,
        summary.skipped.len(),
        summary.left_behind.len(),
        summary.seconds
    );
    if summary.failed > 0 || !summary.left_behind.is_empty() || !refused.is_empty() {
        bail!("the tests do not pass");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_failed_tests_is_kept() {
        let mut failures = Failures::default();
        let text =
            "successes:\n  a said\nfailures:\n\n---- b stdout ----\nno\nfailures:\n    b\ntest result: FAILED. 1 passed; 1 failed\nnext";
        text.lines().for_each(|line| failures.take(line));
        assert_eq!(failures.lines, ["failures:", "", "---- b stdout ----", "no", "failures:", "    b"]);
    }

    #[test]
    fn results_are_counted_and_ignored_tests_fail() {
        let line = "test result: ok. 6 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(parse_result(line), Some((6, 1)));
        assert_eq!(parse_result("test tests::a ... ok"), None);
    }
}
