//! Running other programs: every step is named before it runs and timed after it.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// The root of the repository.
pub fn root() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map_or(manifest.clone(), PathBuf::from)
}

/// A cargo command in the repository, with the cargo that runs this.
pub fn cargo<I: AsRef<str>>(arguments: impl IntoIterator<Item = I>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments.into_iter().map(|argument| argument.as_ref().to_owned())).current_dir(root());
    command
}

/// Runs a step with its output shown; a failure is an error that names the step.
pub fn run(step: &str, command: &mut Command) -> Result<()> {
    eprintln!("==> {step}");
    let start = Instant::now();
    let status = command.status().with_context(|| format!("{step}: failed to run {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{step}: {:?} ended with {status}", command.get_program());
    }
    eprintln!("    {step}: {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// What a program prints on stdout; a failure shows its stderr.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("failed to run {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!("{:?} ended with {}: {}", command.get_program(), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{:?} printed no UTF-8", command.get_program()))
}

/// Whether a program of this name is on PATH.
pub fn on_path(name: &str) -> bool {
    find(name).is_some()
}

/// Where a program of this name is on PATH.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|candidate| candidate.is_file())
}
