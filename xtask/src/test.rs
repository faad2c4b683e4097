//! `cargo xtask test`: the gate and all tests, counted; afterwards nothing may be left on the machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use testkit::host::Lists;

use crate::guest::{Guest, Line, Program};
use crate::skips::{self, Skipped, SkippedSpec, SuiteCount};
use crate::{build, gate, readme, setup, sh};

/// The flags of `cargo xtask test`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Only the tests of these packages; `cgroup-v2` are those that run on cgroup v2, in QEMU.
    #[arg(long, short)]
    package: Vec<String>,
    /// Leave the gate out.
    #[arg(long)]
    no_gate: bool,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

/// The name, in the place of a package, of what runs in the guest.
const CGROUP_V2: &str = "cgroup-v2";

/// What runs in the guest: packages, and of each the test targets; none are all.
const GUEST_SUITES: [(&str, &[&str]); 3] = [("oci-runtime", &[]), ("shim", &[]), ("linux", &["cgroup_v2"])];

/// Tests of these suites that compute and ask no kernel: emulation would only make them slow.
const GUEST_LEAVES_OUT: [&str; 2] = ["the_same_as_libseccomp", "configurations"];

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
    /// Whether only tests of some name ran: the guest's counts are then no suite's.
    #[serde(skip)]
    filtered: bool,
    #[serde(skip)]
    skipped_in_guest: Vec<Skipped>,
    /// The release of the guest's kernel.
    #[serde(skip)]
    guest_kernel: String,
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
    let selected = Selected::of(&args);
    let programs = selected.build()?;

    let before = Lists::take(&testkit::host::ALL).context("failed to list what is on the machine")?;
    let mut variables = vec![("CORACLE_BIN", executables.directory.as_path())];
    variables.extend(host.peers.as_deref().map(|peers| ("CORACLE_PEERS", peers)));
    variables.extend(host.golden.as_deref().map(|golden| ("CORACLE_K8S_API_TESTDATA", golden)));
    let mut summary = if selected.host { count(selected.tests(&variables, args.filter.as_deref()))? } else { Summary::default() };
    if selected.guest {
        count_guest(&mut summary, &host, &programs, &variables, args.filter.as_deref())?;
    }
    // The compiler's own helpers come and go with the build.
    let left = before.expect_nothing_left(&["sccache", "/tmp/rustc"], Duration::from_secs(10));
    summary.left_behind = left.err().map(|left| left.lines().map(str::to_owned).collect()).unwrap_or_default();
    summary.filtered = args.filter.is_some();
    summary.missing.clone_from(&host.missing);
    summary.seconds = start.elapsed().as_secs();
    judge(&summary, &host)
}

/// What the flags ask for.
struct Selected {
    /// The packages of cargo; none are all.
    packages: Vec<String>,
    /// Whether they are tested on this machine.
    host: bool,
    /// Whether the guest is booted.
    guest: bool,
}

impl Selected {
    fn of(args: &Args) -> Selected {
        let (guests, mut packages): (Vec<String>, Vec<String>) = args.package.iter().cloned().partition(|name| name == CGROUP_V2);
        let host = !packages.is_empty() || guests.is_empty();
        // A filter means some tests of this machine: a boot only where it is asked for.
        let guest = !guests.is_empty() || (packages.is_empty() && args.filter.is_none());
        if !guests.is_empty() {
            packages.extend(GUEST_SUITES.map(|(package, _)| package.to_owned()));
        }
        Selected { packages, host, guest }
    }

    fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = sh::cargo(arguments);
        if self.packages.is_empty() {
            command.arg("--workspace");
        }
        for package in &self.packages {
            command.args(["--package", package]);
        }
        command
    }

    /// Builds the tests, and finds those that the guest runs.
    fn build(&self) -> Result<Vec<Program>> {
        eprintln!("==> build the tests");
        let start = Instant::now();
        let mut build = self.cargo(&["test", "--locked", "--no-run", "--message-format=json-render-diagnostics"]);
        let output = build.stderr(Stdio::inherit()).output().context("failed to run cargo test --no-run")?;
        if !output.status.success() {
            bail!("build the tests: cargo ended with {}", output.status);
        }
        eprintln!("    build the tests: {:.0} s", start.elapsed().as_secs_f64());
        let mut programs: Vec<Program> = String::from_utf8_lossy(&output.stdout).lines().filter_map(guest_program).collect();
        programs.sort_by(|one, other| (&one.suite, &one.executable).cmp(&(&other.suite, &other.executable)));
        Ok(programs)
    }

    fn tests(&self, variables: &[(&str, &Path)], filter: Option<&str>) -> Command {
        let mut tests = self.cargo(&["test", "--locked", "--no-fail-fast"]);
        tests.arg("--").arg("--show-output").args(filter);
        tests.envs(variables.iter().copied());
        tests
    }
}

/// The program for the guest that a line of cargo's JSON tells of, if it is one.
fn guest_program(line: &str) -> Option<Program> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let executable = PathBuf::from(message["executable"].as_str().filter(|_| message["profile"]["test"] == true)?);
    let directory = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
    let (package, targets) = GUEST_SUITES.iter().find(|(package, _)| directory.ends_with(Path::new("crates").join(package)))?;
    let target = message["target"]["name"].as_str()?;
    let wanted = targets.is_empty() || targets.contains(&target);
    wanted.then(|| Program { suite: format!("cgroup v2: {package}"), executable, directory })
}

/// Runs the guest's programs, shows their output, and counts each suite.
fn count_guest(
    summary: &mut Summary,
    host: &setup::Host,
    programs: &[Program],
    variables: &[(&str, &Path)],
    filter: Option<&str>,
) -> Result<()> {
    let guest = match Guest::find(host.peers.as_deref()) {
        Ok(guest) => guest,
        Err(reason) => {
            summary.skipped.insert("cgroup_v2".to_owned(), format!("{reason:#}"));
            return Ok(());
        }
    };
    eprintln!("==> cgroup v2: {} executables in a guest", programs.len());
    let start = Instant::now();
    let mut arguments = vec!["--color", "never", "--show-output"];
    arguments.extend(GUEST_LEAVES_OUT.iter().flat_map(|name| ["--skip", *name]));
    arguments.extend(filter);
    let mut count = GuestCount { programs, summary, suites: Vec::new(), running: 0, told: true };
    let result = guest.run(&build::target_directory().join("guest"), programs, variables, &arguments, |line| count.take(line));
    let mut suites = count.suites;
    if let Err(error) = result {
        summary.failures.lines.push(format!("cgroup v2: {error:#}"));
        suites.push(SuiteCount { suite: "cgroup v2: the guest".to_owned(), passed: 0, failed: 1, skipped: 0 });
    }
    eprintln!("    cgroup v2: {:.0} s", start.elapsed().as_secs_f64());
    summary.suites.extend(suites);
    Ok(())
}

/// Counts what the guest says.
struct GuestCount<'a> {
    programs: &'a [Program],
    summary: &'a mut Summary,
    suites: Vec<SuiteCount>,
    /// The suite of the program that runs.
    running: usize,
    /// Whether that program told its result.
    told: bool,
}

impl GuestCount<'_> {
    fn take(&mut self, line: Line) {
        match line {
            Line::Kernel(release) => self.summary.guest_kernel = release,
            Line::Begin(index) => {
                let program = &self.programs[index];
                let known = self.suites.iter().position(|suite| suite.suite == program.suite);
                self.running = known.unwrap_or(self.suites.len());
                if known.is_none() {
                    self.suites.push(SuiteCount { suite: program.suite.clone(), passed: 0, failed: 0, skipped: 0 });
                }
                self.told = false;
                println!("     Running {} on cgroup v2", program.executable.display());
            }
            Line::End(index, status) => {
                if !self.told {
                    let died = format!("{} ended with {status} without a result", self.programs[index].executable.display());
                    self.summary.failures.lines.push(died);
                    self.suites[self.running].failed += 1;
                }
            }
            Line::Text(line) => {
                println!("{line}");
                self.summary.failures.take(&line);
                let Some(suite) = self.suites.get_mut(self.running) else { return };
                if let Some(skip) = Skipped::parse(&line) {
                    suite.skipped += 1;
                    suite.passed = suite.passed.saturating_sub(1);
                    self.summary.skipped_in_guest.push(skip);
                }
                if let Some((passed, failed)) = parse_result(&line) {
                    suite.passed += passed;
                    suite.failed += failed;
                    self.told = true;
                }
            }
        }
    }
}

/// Runs the tests, shows their output as it comes, and counts.
fn count(mut tests: Command) -> Result<Summary> {
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

fn in_guest(suite: &SuiteCount) -> bool {
    suite.suite.starts_with("cgroup v2")
}

fn judge(summary: &Summary, host: &setup::Host) -> Result<()> {
    let path = build::target_directory().join("test-summary.json");
    std::fs::write(&path, serde_json::to_vec_pretty(summary)?).with_context(|| format!("failed to write {}", path.display()))?;
    let skipped: Vec<Skipped> =
        summary.skipped.iter().map(|(test, reason)| Skipped { test: test.clone(), reason: reason.clone() }).collect();
    let mut refused = skips::refused(&skipped, &summary.skipped_specs, &summary.suites, host)?;
    refused.extend(skips::refused_in_guest(&summary.skipped_in_guest, host, &summary.guest_kernel)?);
    readme::write_counts(&summary.suites.iter().filter(|suite| !summary.filtered || !in_guest(suite)).cloned().collect::<Vec<_>>())?;
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
    for skip in &summary.skipped_in_guest {
        eprintln!("skipped on cgroup v2: {}: {}", skip.test, skip.reason);
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
    // A failed spec of a suite on this machine has failed its test as well; the guest's suites are counted by themselves alone.
    let failed = summary.failed > 0 || summary.suites.iter().any(|suite| suite.failed > 0);
    if failed || !summary.left_behind.is_empty() || !refused.is_empty() {
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
