//! The judge of the node: critest, the CRI validation suite of cri-tools, against `coracle cri`.
//!
//! A spec that is skipped must stand in `e2e/skips.toml`; `CORACLE_CRITEST` names another critest than the one that is built.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use e2e::node::{Node, on_node};
use serde::Deserialize;

/// How long the suite may take, in seconds: on a quiet machine it is 100.
const SECONDS_MAX: &str = "1200";
/// Fewer specs than this is not the suite.
const SPECS_MIN: usize = 100;

#[test]
fn critest() -> Result<()> {
    let test = "critest";
    let suite = std::env::var_os("CORACLE_CRITEST").map(PathBuf::from).or_else(|| e2e::peer("critest"));
    let Some(suite) = suite else {
        e2e::skip(test, "critest is built by Go");
        return Ok(());
    };
    let Some(shell) = e2e::peer("busybox") else {
        e2e::skip(test, "its images need Debian's busybox");
        return Ok(());
    };
    on_node(test, |node| {
        testkit::critest::serve(&node.registry, &e2e::ours("critest-tool")?, &shell)?;
        let hosts = node.folder().join("hosts");
        testkit::critest::mirror(&node.registry, &hosts)?;
        node.start_ours(&[format!("--registry-config-path={}", hosts.display())])?;
        judge(node, &suite)
    })
    .map(drop)
}

fn judge(node: &Node<'_>, suite: &Path) -> Result<()> {
    let report = node.folder().join("report.json");
    let socket = format!("unix://{}", node.socket().display());
    let mut command = node.enter(Path::new("timeout"));
    command.arg(SECONDS_MAX).arg(suite);
    command.args(["-runtime-endpoint", &socket, "-image-endpoint", &socket, "-ginkgo.seed=1", "-ginkgo.no-color"]);
    command.args(["-ginkgo.json-report".as_ref(), report.as_os_str()]);
    if let Some(unbuilt) = e2e::specs::unbuilt(e2e::specs::CRITEST)? {
        command.args(["-ginkgo.skip", &unbuilt]);
    }
    if let Ok(focus) = std::env::var("CORACLE_CRITEST_FOCUS") {
        command.args(["-ginkgo.focus", &focus]);
    }
    let output = node.folder().join("critest.log");
    let log = fs::File::create(&output).context("failed to create critest's log")?;
    command.current_dir(node.folder()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let status = command.status().context("failed to run critest")?;
    if let Some(keep) = std::env::var_os("CORACLE_CRITEST_KEEP") {
        let keep = PathBuf::from(keep);
        fs::create_dir_all(&keep)?;
        for file in ["report.json", "critest.log", "servers.log", "state/keeper.log"] {
            let to = keep.join(file.rsplit('/').next().unwrap_or(file));
            let _ = fs::copy(node.folder().join(file), to);
        }
    }
    let text = fs::read_to_string(&report).with_context(|| format!("critest ended with {status} without a report:\n{}", tail(&output)))?;
    let reports: Vec<Report> = serde_json::from_str(&text).context("critest's report cannot be parsed")?;
    let specs: Vec<Spec> = reports.into_iter().flat_map(|report| report.specs).filter(|spec| spec.kind == "It").collect();
    tell(&specs)?;
    ensure!(status.success(), "critest ended with {status}:\n{}", tail(&output));
    Ok(())
}

/// Prints the counts and the skipped specs for `cargo xtask test`, which judges the skips.
fn tell(specs: &[Spec]) -> Result<()> {
    let count = |state: &str| specs.iter().filter(|spec| spec.state == state).count();
    let (passed, skipped) = (count("passed"), count("skipped"));
    let failed: Vec<&Spec> = specs.iter().filter(|spec| !matches!(spec.state.as_str(), "passed" | "skipped" | "pending")).collect();
    for spec in specs.iter().filter(|spec| spec.state == "skipped") {
        e2e::specs::skip(e2e::specs::CRITEST, &spec.name(), spec.why());
    }
    e2e::specs::count(e2e::specs::CRITEST, passed, failed.len(), skipped);
    if !failed.is_empty() {
        let lines: Vec<String> = failed.iter().map(|spec| format!("{}: {}: {}", spec.state, spec.name(), spec.why())).collect();
        bail!("{} specs failed:\n{}", failed.len(), lines.join("\n"));
    }
    ensure!(passed + skipped >= SPECS_MIN || std::env::var_os("CORACLE_CRITEST_FOCUS").is_some(), "only {} specs", specs.len());
    Ok(())
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// Ginkgo's JSON report, as far as it is read.
#[derive(Deserialize)]
struct Report {
    #[serde(rename = "SpecReports")]
    specs: Vec<Spec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    #[serde(rename = "ContainerHierarchyTexts")]
    containers: Option<Vec<String>>,
    #[serde(rename = "LeafNodeText")]
    text: String,
    #[serde(rename = "LeafNodeType")]
    kind: String,
    state: String,
    failure: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    message: String,
}

impl Spec {
    fn name(&self) -> String {
        let containers = self.containers.iter().flatten().map(String::as_str);
        containers.chain([self.text.as_str()]).collect::<Vec<_>>().join(" ")
    }

    fn why(&self) -> &str {
        self.failure.as_ref().map(|failure| failure.message.as_str()).filter(|why| !why.is_empty()).unwrap_or("not asked for")
    }
}
