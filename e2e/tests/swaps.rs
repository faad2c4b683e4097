//! The swap matrix's rows of the shim and the OCI runtime: upstream's containerd with our parts in the place of its own.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use e2e::api::eventually;
use e2e::containerd::{Containerd, Release, with_containerd};
use e2e::{ours, skip};
use serde_json::json;

/// How `ctr` is told what runs its containers.
type Runtime<'a> = [&'a str];

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `ctr run` of a shell's script; `flags` stand before the image.
fn run(
    containerd: &Containerd<'_>,
    runtime: &Runtime<'_>,
    flags: &[&str],
    id: &str,
    script: &str,
) -> Result<(Option<i32>, String, String)> {
    let cgroup = format!("{}/{id}", containerd.host.cgroup);
    let mut words = vec!["run", "--cgroup", &cgroup];
    words.extend(runtime.iter().chain(flags));
    words.extend([containerd.image.as_str(), id, "/bin/sh", "-c", script]);
    let output = containerd.ctr(&words)?;
    Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
}

fn status(containerd: &Containerd<'_>, id: &str) -> Result<String> {
    let list = text(&containerd.ctr(&["task", "ls"])?.stdout);
    let line = list.lines().find(|line| line.split_whitespace().next() == Some(id)).unwrap_or_default();
    Ok(line.split_whitespace().last().unwrap_or_default().to_owned())
}

fn succeeds(containerd: &Containerd<'_>, words: &[&str]) -> Result<String> {
    let output = containerd.ctr(words)?;
    ensure!(output.status.success(), "ctr {words:?}: {}{}", text(&output.stdout), text(&output.stderr));
    Ok(text(&output.stdout))
}

/// A deletion, of which `ctr` tells the container's exit code in a warning.
fn deletes(containerd: &Containerd<'_>, words: &[&str], code: i32) -> Result<()> {
    let output = containerd.ctr(words)?;
    let told = text(&output.stderr).contains(&format!("exit with non-zero exit code {code}"));
    ensure!(output.status.success() && told, "ctr {words:?}: {output:?}");
    Ok(())
}

/// How often a silent client is asked again.
const SILENT_MAX: u32 = 10;

/// Asks again while output is missing: `ctr` closes its ends of the streams once the process has ended, on a busy machine before it has read
/// them (containerd v1.6.20, `task.go` and `process.go`, Delete). Whoever is silent each time has said nothing.
fn heard<T>(mut ask: impl FnMut() -> Result<T>, is_silent: impl Fn(&T) -> bool) -> Result<T> {
    for _ in 0..SILENT_MAX {
        let said = ask()?;
        if !is_silent(&said) {
            return Ok(said);
        }
    }
    ask()
}

/// A container's life by `ctr`: run, exec, pause, kill, delete, with and without a terminal.
fn life(containerd: &Containerd<'_>, runtime: &Runtime<'_>) -> Result<()> {
    let ask = || run(containerd, runtime, &["--rm"], "c1", "echo out; echo err >&2; exit 3");
    let (code, out, err) = heard(ask, |(_, out, err)| out.is_empty() || err.is_empty())?;
    ensure!((code, out.as_str()) == (Some(3), "out\n") && err.contains("err\n"), "run: {code:?} {out:?} {err:?}");
    let (code, out, err) = run(containerd, runtime, &["--rm", "--cwd", "/version"], "c2", "true")?;
    ensure!(code == Some(1) && err.contains("/version"), "an impossible folder: {code:?} {out:?} {err:?}");

    let cgroup = format!("{}/c3", containerd.host.cgroup);
    let mut words = vec!["run", "--rm", "-t", "--cgroup", &cgroup];
    words.extend(runtime);
    words.extend([containerd.image.as_str(), "c3", "/bin/sh", "-c", "[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo a $TERM; exit 5"]);
    let (shown, code) = heard(|| containerd.ctr_on_terminal(&words), |(shown, _)| shown.is_empty())?;
    ensure!(code == Some(5) && shown.contains("a xterm\r"), "run on a terminal: {code:?} {shown:?}");

    let (code, out, err) = run(containerd, runtime, &["-d"], "c4", "trap 'exit 7' TERM; while true; do sleep 0.05; done")?;
    ensure!(code == Some(0), "run -d: {code:?} {out:?} {err:?}");
    execs(containerd, "c4")?;
    for (verb, then) in [("pause", "PAUSED"), ("resume", "RUNNING")] {
        succeeds(containerd, &["task", verb, "c4"])?;
        let is = status(containerd, "c4")?;
        ensure!(is == then, "{verb}: {is}");
    }
    ensure!(succeeds(containerd, &["task", "metrics", "c4"])?.contains("memory"), "metrics");
    ensure!(succeeds(containerd, &["task", "ps", "c4"])?.lines().count() >= 2, "ps");
    succeeds(containerd, &["task", "kill", "-s", "SIGTERM", "c4"])?;
    eventually("c4 has stopped", || Ok(status(containerd, "c4")? == "STOPPED"))?;
    deletes(containerd, &["task", "delete", "c4"], 7)?;
    succeeds(containerd, &["container", "delete", "c4"])?;

    // One that is killed by force, with a process that was started into it.
    let (code, out, err) = run(containerd, runtime, &["-d", "--memory-limit", "67108864"], "c5", "sleep 1000 & exec sleep 1000")?;
    ensure!(code == Some(0), "run -d: {code:?} {out:?} {err:?}");
    succeeds(containerd, &["task", "exec", "-d", "--exec-id", "e1", "c5", "sleep", "1000"])?;
    deletes(containerd, &["task", "delete", "--force", "c5"], 137)?;
    succeeds(containerd, &["container", "delete", "c5"]).map(drop)
}

fn execs(containerd: &Containerd<'_>, id: &str) -> Result<()> {
    let exec = |words: &[&str]| heard(|| containerd.ctr(words), |output| output.stdout.is_empty());
    let output = exec(&["task", "exec", "--exec-id", "e1", id, "/bin/sh", "-c", "echo in; exit 4"])?;
    ensure!((output.status.code(), text(&output.stdout).as_str()) == (Some(4), "in\n"), "exec: {output:?}");
    let output = exec(&["task", "exec", "--exec-id", "e2", "--user", "1000", "--cwd", "/tmp", id, "/bin/sh", "-c", "id -u; pwd"])?;
    ensure!(text(&output.stdout) == "1000\n/tmp\n", "exec as a user: {output:?}");
    let output = heard(|| typed(containerd, id), |output| output.stdout.is_empty())?;
    ensure!(output.status.success() && text(&output.stdout) == "typed\n", "exec with stdin: {output:?}");
    let words = ["task", "exec", "-t", "--exec-id", "e4", id, "/bin/sh", "-c", "[ -t 0 ] && echo yes; exit 6"];
    let (shown, code) = heard(|| containerd.ctr_on_terminal(&words), |(shown, _)| shown.is_empty())?;
    ensure!(code == Some(6) && shown.contains("yes\r"), "exec on a terminal: {code:?} {shown:?}");
    let output = containerd.ctr(&["task", "exec", "--exec-id", "e5", id, "nope"])?;
    ensure!(!output.status.success() && text(&output.stderr).contains("not found"), "exec of nothing: {output:?}");
    Ok(())
}

/// An exec that prints what it reads, whose stdin ends.
fn typed(containerd: &Containerd<'_>, id: &str) -> Result<std::process::Output> {
    let mut command = containerd.ctr_command();
    command.args(["task", "exec", "--exec-id", "e3", id, "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().context("failed to run ctr")?;
    let mut stdin = child.stdin.take().context("ctr has no stdin")?;
    std::io::Write::write_all(&mut stdin, b"typed\n")?;
    // The end of the client's stdin is that of the process.
    drop(stdin);
    child.wait_with_output().context("failed to wait for ctr")
}

/// A pod of three containers by containerd's CRI has one shim; its containers run, exec, log and end.
fn pod(containerd: &Containerd<'_>, handler: &str) -> Result<()> {
    let logs = containerd.folder.join("logs").join(handler);
    std::fs::create_dir_all(&logs).context("failed to make a folder")?;
    let write = |name: &str, value: serde_json::Value| -> Result<String> {
        let path = containerd.folder.join(format!("{handler}-{name}.json"));
        std::fs::write(&path, value.to_string()).with_context(|| format!("failed to write {}", path.display()))?;
        Ok(path.display().to_string())
    };
    let sandbox = write(
        "pod",
        json!({
            "metadata": { "name": handler, "namespace": "default", "uid": handler, "attempt": 1 },
            "log_directory": logs,
            "linux": { "cgroup_parent": containerd.host.cgroup }
        }),
    )?;
    let pod = containerd.crictl(&["runp", "-r", handler, &sandbox])?;
    let script = "echo line; trap 'exit 0' TERM; while true; do sleep 0.05; done";
    let mut containers = Vec::new();
    for name in ["a", "b", "c"] {
        let container = json!({
            "metadata": { "name": name }, "image": { "image": containerd.image },
            "command": ["/bin/sh", "-c", script], "log_path": format!("{name}.log"), "linux": {}
        });
        let id = containerd.crictl(&["create", &pod, &write(name, container)?, &sandbox])?;
        containerd.crictl(&["start", &id])?;
        containers.push(id);
    }
    let processes = containerd.processes()?;
    let shims: Vec<_> = processes.iter().filter(|(_, line)| line.contains("containerd-shim-")).collect();
    ensure!(shims.len() == 1, "one shim for the pod: {processes:?}");
    let ours = shims.iter().all(|(_, line)| line.contains("containerd-shim-coracle-v2"));
    ensure!(ours == (handler != "coracle-oci"), "it is the handler's: {shims:?}");
    for (id, name) in containers.iter().zip(["a", "b", "c"]) {
        let said = containerd.crictl(&["exec", "-s", id, "cat", "/version"])?;
        ensure!(said == "1", "exec in {name}: {said:?}");
        eventually("its log", || Ok(containerd.crictl(&["logs", id])? == "line"))?;
    }
    let stats = containerd.crictl(&["stats", "-o", "json", "--id", &containers[0]])?;
    ensure!(stats.contains("workingSetBytes"), "stats: {stats}");
    // One is stopped by itself, the others with the pod.
    containerd.crictl(&["stop", "-t", "30", &containers[0]])?;
    let inspected = containerd.crictl(&["inspect", &containers[0]])?;
    let status: serde_json::Value = serde_json::from_str(&inspected).context("inspect printed no JSON")?;
    let (state, code) = (&status["status"]["state"], &status["status"]["exitCode"]);
    ensure!((state, code) == (&json!("CONTAINER_EXITED"), &json!(0)), "after stop: {state} {code}");
    containerd.crictl(&["stopp", &pod])?;
    containerd.crictl(&["rmp", &pod]).map(drop)
}

/// The rows of one release: each of our parts in its place.
fn rows(test: &str, release: &Release) -> Result<()> {
    println!("{test}: {}", release.version()?);
    let done = with_containerd(test, release, |containerd| {
        let (oci, root) = (ours("coracle-oci")?.display().to_string(), containerd.runtime_root().display().to_string());
        let our_oci = ["--runtime", "io.containerd.runc.v2", "--runc-binary", &oci, "--runc-root", &root];
        life(containerd, &our_oci).context("coracle-oci in runc's place")?;
        life(containerd, &["--runtime", "io.containerd.coracle.v2"]).context("our shim in the place of containerd-shim-runc-v2")?;
        if e2e::peer("crictl").is_some() {
            containerd.crictl(&["pull", &containerd.image])?;
            for handler in containerd.handlers() {
                pod(containerd, handler).with_context(|| format!("a pod by containerd's CRI, handler {handler}"))?;
            }
        }
        Ok(())
    })?;
    if done.is_none() {
        skip(test, "it cannot have a host of its own");
    }
    Ok(())
}

#[test]
fn containerd_1_6_with_our_parts() -> Result<()> {
    match Release::debian() {
        Some(release) => rows("containerd_1_6_with_our_parts", &release),
        None => {
            skip("containerd_1_6_with_our_parts", "CORACLE_PEERS has no debian/containerd and debian/runc");
            Ok(())
        }
    }
}

#[test]
fn containerd_1_7_with_our_parts() -> Result<()> {
    match Release::v1_7() {
        Some(release) => rows("containerd_1_7_with_our_parts", &release),
        None => {
            skip("containerd_1_7_with_our_parts", "CORACLE_PEERS has no containerd-1.7 and runc");
            Ok(())
        }
    }
}

#[test]
fn containerd_2_with_our_parts() -> Result<()> {
    match Release::v2() {
        Some(release) => rows("containerd_2_with_our_parts", &release),
        None => {
            skip("containerd_2_with_our_parts", "CORACLE_PEERS has no containerd and runc");
            Ok(())
        }
    }
}
