//! Sessions of kubectl with a person at the terminal: `exec -it`, `get --watch`.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::api::eventually;
use crate::cluster::Cluster;
use crate::script::{play, step};
use crate::terminal::Terminal;

/// All of them; the pod `tools` runs.
pub fn check(cluster: &Cluster, kubectl: &Path) -> Result<()> {
    exec_on_a_terminal(cluster, kubectl, "tools", "one", &[]).context("exec -it")?;
    watch_of_a_table(cluster, kubectl).context("get -w of a list")?;
    watch_of_an_object(cluster, kubectl).context("get -w of one object")
}

/// Starts kubectl on a terminal of 31 rows and 97 columns.
pub fn start_with(cluster: &Cluster, kubectl: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Result<Terminal> {
    let mut command: Command = cluster.enter(kubectl);
    command.args(arguments).envs(environment.iter().copied());
    Terminal::start(&command, 31, 97)
}

fn start(cluster: &Cluster, kubectl: &Path, arguments: &[&str]) -> Result<Terminal> {
    start_with(cluster, kubectl, arguments, &[])
}

/// A shell on a terminal: its size and changes of it, Ctrl-C, the exit code.
pub fn exec_on_a_terminal(cluster: &Cluster, kubectl: &Path, pod: &str, container: &str, environment: &[(&str, &str)]) -> Result<()> {
    let mut terminal = start_with(cluster, kubectl, &["exec", "-it", pod, "-c", container, "--", "sh"], environment)?;
    terminal.send("tty\n")?;
    terminal.wait_for("/dev/pts/0")?;
    eventually("the command's terminal has the size of kubectl's", || {
        terminal.send("stty size\n")?;
        Ok(terminal.text().contains("31 97"))
    })?;
    terminal.resize(32, 98)?;
    eventually("the command's terminal has the new size", || {
        terminal.send("stty size\n")?;
        Ok(terminal.text().contains("32 98"))
    })?;
    // Ctrl-C is the command's to see, not kubectl's.
    terminal.send("sleep 1000000\n")?;
    // Typed before the shell has started it, it would be a character of the shell's line.
    eventually("Ctrl-C ends a command", || {
        terminal.send("\u{3}echo after-$((40 + 2))\n")?;
        Ok(terminal.text().contains("after-42"))
    })?;
    terminal.send("exit 5\n")?;
    let (status, text) = terminal.wait()?;
    ensure!(status.code() == Some(5), "ended with {status}; shown was:\n{text}");
    ensure!(text.contains("command terminated with exit code 5"), "shown was:\n{text}");
    Ok(())
}

/// `get --watch` while the server is stopped and started again: as with upstream's server it ends when its connection does, and one
/// that is begun anew shows what was written meanwhile.
///
/// # Errors
/// What did not happen.
pub fn over_a_restart(cluster: &mut Cluster, kubectl: &Path) -> Result<()> {
    let data = "-o=custom-columns=N:.metadata.name,K:.data.key";
    let arguments = ["get", "configmaps", "--watch", data];
    let patch = |value: &str| step(&format!("patch configmap over -p '{{\"data\":{{\"key\":\"{value}\"}}}}'")).prints("patched");
    play(cluster, kubectl, &[step("create configmap over --from-literal=key=begun").prints("created")])?;
    let watch = start(cluster, kubectl, &arguments)?;
    watch.wait_for("begun")?;
    play(cluster, kubectl, &[patch("stopping")])?;
    watch.wait_for("stopping")?;
    cluster.stop()?;
    watch.wait().context("get --watch does not end with the server")?;
    cluster.up()?;
    let watch = start(cluster, kubectl, &arguments)?;
    watch.wait_for("stopping")?;
    play(cluster, kubectl, &[patch("started")])?;
    watch.wait_for("started")?;
    watch.interrupt()?;
    play(cluster, kubectl, &[step("delete configmap over").prints("deleted")])
}

fn watch_of_a_table(cluster: &Cluster, kubectl: &Path) -> Result<()> {
    let terminal = start(cluster, kubectl, &["get", "configmaps", "--watch"])?;
    terminal.wait_for("kube-root-ca.crt")?;
    play(cluster, kubectl, &[step("create configmap watched --from-literal=key=first").prints("created")])?;
    terminal.wait_for("watched ")?;
    let (_, text) = terminal.interrupt()?;
    ensure!(text.matches("DATA").count() == 1, "the head of the table is shown once:\n{text}");
    Ok(())
}

fn watch_of_an_object(cluster: &Cluster, kubectl: &Path) -> Result<()> {
    let arguments = ["get", "configmap", "watched", "-w", "--output-watch-events", "-o", "jsonpath={.type}={.object.data.key}{\"\\n\"}"];
    let terminal = start(cluster, kubectl, &arguments)?;
    terminal.wait_for("ADDED=first")?;
    play(cluster, kubectl, &[step("patch configmap watched -p '{\"data\":{\"key\":\"second\"}}'").prints("patched")])?;
    terminal.wait_for("MODIFIED=second")?;
    play(cluster, kubectl, &[step("delete configmap watched").prints("deleted")])?;
    terminal.wait_for("DELETED=second")?;
    terminal.interrupt().map(drop)
}
