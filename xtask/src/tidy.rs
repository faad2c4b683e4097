//! The checks of our own: dependency rows (DESIGN.md, section 2), `//!` heads, `unsafe` only in `linux`, sizes, the tables of fields and of edges.

mod edges;
mod fields;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::sh;

/// The rows; an arrow falls to a lower row and never runs along one.
const ROWS: [&[&str]; 4] = [
    &["apimachinery", "protocols", "linux", "remotecommand"],
    &["client", "serving", "store", "cri-log", "image-store", "oci-runtime", "network"],
    &["apiserver", "controller-manager", "scheduler", "kubelet", "kube-proxy", "cri-server", "shim"],
    &["coracle"],
];

/// Crates beside the rows: they build and test, and nothing in a row depends on them but for tests.
const BESIDE: [&str; 3] = ["testkit", "e2e", "xtask"];

/// The crates under CRI: none of them knows a Kubernetes object.
const UNDER_CRI: [&str; 6] = ["cri-server", "shim", "cri-log", "oci-runtime", "network", "image-store"];
/// What knows Kubernetes objects.
const KUBERNETES: [&str; 4] = ["apimachinery", "client", "kube", "k8s-openapi"];

/// The crates whose executables run once per pod: no async runtime.
const PER_POD: [&str; 5] = ["shim", "cri-log", "oci-runtime", "linux", "network"];
/// Async runtimes.
const ASYNC: [&str; 3] = ["tokio", "async-std", "smol"];

/// A file is asking to be split at this many lines, a function at that many.
const FILE_LINES_MAX: usize = 800;
const FUNCTION_LINES_MAX: usize = 70;

/// What is known to be larger, each with its reason (`xtask/tidy.toml`).
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    #[serde(default)]
    large: Vec<Large>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Large {
    /// `path` of a file, or `path:function`.
    place: String,
    /// Why it is not split.
    reason: String,
}

/// Runs every check and tells every failure.
pub fn run() -> Result<()> {
    let root = sh::root();
    let known: Known = toml::from_str(&fs::read_to_string(root.join("xtask/tidy.toml")).context("failed to read xtask/tidy.toml")?)
        .context("failed to parse xtask/tidy.toml")?;
    let mut failures = rows(&root)?;
    failures.extend(fields::check(&root)?);
    let mut large = Vec::new();
    let sources = sources(&root)?;
    failures.extend(edges::check(&root, &sources)?);
    for path in sources {
        let name = path.strip_prefix(&root).unwrap_or(&path).to_string_lossy().into_owned();
        let text = fs::read_to_string(&path).with_context(|| format!("failed to read {name}"))?;
        failures.extend(check_file(&name, &text));
        large.extend(sizes(&name, &text));
    }
    for (place, lines) in &large {
        if !known.large.iter().any(|entry| entry.place == *place && !entry.reason.is_empty()) {
            failures.push(format!("{place}: {lines} lines; split it, or give the reason in xtask/tidy.toml"));
        }
    }
    for entry in &known.large {
        if !large.iter().any(|(place, _)| *place == entry.place) {
            failures.push(format!("xtask/tidy.toml: {} is not too large any more; delete its entry", entry.place));
        }
    }
    if failures.is_empty() {
        eprintln!("==> tidy: ok");
        return Ok(());
    }
    for failure in &failures {
        eprintln!("tidy: {failure}");
    }
    bail!("tidy: {} failures", failures.len())
}

fn row(name: &str) -> Option<usize> {
    ROWS.iter().position(|row| row.contains(&name))
}

#[derive(Deserialize)]
struct Manifest {
    package: Package,
    #[serde(default)]
    dependencies: toml::Table,
}

#[derive(Deserialize)]
struct Package {
    name: String,
}

fn rows(root: &Path) -> Result<Vec<String>> {
    let mut failures = Vec::new();
    let mut folders: Vec<PathBuf> = fs::read_dir(root.join("crates"))?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    folders.extend([root.join("xtask"), root.join("e2e")]);
    for folder in folders {
        let path = folder.join("Cargo.toml");
        let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
        let manifest: Manifest = toml::from_str(&text).with_context(|| format!("failed to parse {}", path.display()))?;
        if folder.file_name().is_none_or(|name| name != manifest.package.name.as_str()) {
            failures.push(format!("{}: the folder's name is not the crate's", path.display()));
        }
        failures.extend(check_rows(&manifest.package.name, &manifest.dependencies));
    }
    Ok(failures)
}

fn check_rows(name: &str, dependencies: &toml::Table) -> Vec<String> {
    let mut failures = Vec::new();
    let own = row(name);
    if own.is_none() && !BESIDE.contains(&name) {
        failures.push(format!("{name} has no row in xtask/src/tidy.rs"));
    }
    for dependency in dependencies.keys().map(String::as_str) {
        if let (Some(own), Some(other)) = (own, row(dependency))
            && other >= own
        {
            failures.push(format!("{name} (row {own}) depends on {dependency} (row {other}): arrows only fall"));
        }
        if own.is_some() && BESIDE.contains(&dependency) {
            failures.push(format!("{name} depends on {dependency}, which is for tests"));
        }
        if UNDER_CRI.contains(&name) && KUBERNETES.contains(&dependency) {
            failures.push(format!("{name} depends on {dependency}: nothing under CRI knows a Kubernetes object"));
        }
        if PER_POD.contains(&name) && ASYNC.contains(&dependency) {
            failures.push(format!("{name} depends on {dependency}: no async runtime there"));
        }
        if dependency == "store" && !["apiserver", "coracle"].contains(&name) {
            failures.push(format!("{name} depends on store: only the API server and `coracle etcd` link it"));
        }
    }
    failures
}

/// Every Rust file of the workspace.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let list = sh::output(
        std::process::Command::new("git").args(["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"]).current_dir(root),
    )?;
    Ok(list.lines().map(|line| root.join(line)).filter(|path| path.exists()).collect())
}

fn check_file(name: &str, text: &str) -> Vec<String> {
    let mut failures = Vec::new();
    if !text.starts_with("//!") {
        failures.push(format!("{name}: does not open with a //! line that says what it is for"));
    }
    let in_linux = name.starts_with("crates/linux/");
    let crate_root = name.ends_with("src/lib.rs") || name.ends_with("src/main.rs");
    if crate_root && !in_linux && !text.contains("#![forbid(unsafe_code)]") {
        failures.push(format!("{name}: has no #![forbid(unsafe_code)]"));
    }
    let mut previous: Vec<&str> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        if in_linux && trimmed.contains("unsafe {") && !trimmed.starts_with("//") {
            let explained = previous.iter().rev().take(8).any(|before| before.contains("SAFETY:"));
            if !explained && !line.contains("SAFETY:") {
                failures.push(format!("{name}:{}: unsafe without a SAFETY line", number + 1));
            }
        }
        previous.push(trimmed);
    }
    failures
}

/// The file and the functions in it that are too long. Relies on rustfmt: a function ends at the first `}` that is
/// indented as its `fn` is.
fn sizes(name: &str, text: &str) -> Vec<(String, usize)> {
    let mut large = Vec::new();
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() > FILE_LINES_MAX {
        large.push((name.to_owned(), lines.len()));
    }
    for (start, line) in lines.iter().enumerate() {
        let Some(function) = function_name(line) else { continue };
        let indent = line.len() - line.trim_start().len();
        let end = format!("{}}}", " ".repeat(indent));
        let length =
            lines[start..].iter().position(|line| *line == end || line.ends_with(';') && line.len() - line.trim_start().len() == indent);
        if let Some(length) = length.map(|length| length + 1).filter(|length| *length > FUNCTION_LINES_MAX) {
            large.push((format!("{name}:{function}"), length));
        }
    }
    large
}

fn function_name(line: &str) -> Option<&str> {
    let rest = line.trim_start();
    let rest = rest.strip_prefix("pub").map_or(rest, |rest| rest.split_once(' ').map_or(rest, |(_, rest)| rest));
    let rest = ["const ", "async ", "unsafe ", "extern \"C\" "].iter().fold(rest, |rest, word| rest.strip_prefix(word).unwrap_or(rest));
    let rest = rest.strip_prefix("fn ")?;
    rest.split(|character: char| !(character.is_alphanumeric() || character == '_')).next().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dependencies(names: &[&str]) -> toml::Table {
        names.iter().map(|name| ((*name).to_owned(), toml::Value::Boolean(true))).collect()
    }

    #[test]
    fn arrows_only_fall() {
        assert_eq!(check_rows("kubelet", &dependencies(&["client", "linux"])), Vec::<String>::new());
        assert_eq!(check_rows("kubelet", &dependencies(&["cri-server"])).len(), 1);
        assert_eq!(check_rows("shim", &dependencies(&["apimachinery", "tokio"])).len(), 2);
        assert_eq!(check_rows("linux", &dependencies(&["network"])).len(), 1);
        assert_eq!(check_rows("client", &dependencies(&["testkit"])).len(), 1);
        assert_eq!(check_rows("newcomer", &dependencies(&[])).len(), 1);
    }

    #[test]
    fn long_functions_are_found() {
        let long = format!(
            "//! x\nimpl A {{\n    pub(crate) async fn long(\n        a: u8,\n    ) {{\n{}    }}\n}}\n",
            "        b();\n".repeat(70)
        );
        assert_eq!(sizes("f.rs", &long), [("f.rs:long".to_owned(), 74)]);
        let short = "fn a() {\n}\ntrait T {\n    fn b();\n}\n".to_owned() + &"x\n".repeat(75);
        assert_eq!(sizes("f.rs", &short), []);
    }

    #[test]
    fn unsafe_is_explained() {
        assert_eq!(check_file("crates/linux/src/x.rs", "//! x\nlet a = unsafe { b() };\n").len(), 1);
        assert_eq!(check_file("crates/linux/src/x.rs", "//! x\n// SAFETY: b has no argument.\nlet a = unsafe { b() };\n").len(), 0);
        assert_eq!(check_file("crates/a/src/lib.rs", "fn a() {}\n").len(), 2);
    }
}
