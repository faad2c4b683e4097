//! The swap matrix's row of the shim from its other side: `coracle cri` drives upstream's containerd-shim-runc-v2, by a runtime handler.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use e2e::api::eventually;
use e2e::containerd::{Release, groups, processes};
use e2e::cri::Cri;
use e2e::images;
use e2e::node::{Node, on_node};
use e2e::skip;
use serde_json::{Value, json};

const HANDLER: &str = "upstream";
const SHIM: &str = "containerd-shim-runc-v2";

/// What the containers of a pod share with the test.
struct Pod {
    id: String,
    config: String,
    /// A folder of the host's, `/gate` in the containers.
    gate: PathBuf,
    logs: PathBuf,
}

struct Test<'n, 'h> {
    node: &'n mut Node<'h>,
    flags: Vec<String>,
    image: String,
}

impl Test<'_, '_> {
    fn file(&self, name: &str, value: &Value) -> Result<String> {
        let path = self.node.folder().join(name);
        fs::write(&path, value.to_string()).with_context(|| format!("failed to write {}", path.display()))?;
        Ok(path.display().to_string())
    }

    /// Runs a pod; `pid` is the mode of its PID namespace.
    fn pod(&self, name: &str, pid: i32) -> Result<Pod> {
        let (gate, logs) = (self.node.folder().join(format!("{name}-gate")), self.node.folder().join(format!("{name}-logs")));
        fs::create_dir_all(&gate).context("failed to make a folder")?;
        let config = json!({
            "metadata": { "name": name, "namespace": "default", "uid": name, "attempt": 1 },
            "hostname": name, "log_directory": logs,
            "linux": {
                "cgroup_parent": format!("{}/pods", self.node.cgroup()),
                "sysctls": { "net.ipv4.ip_unprivileged_port_start": "80" },
                "security_context": { "namespace_options": { "pid": pid } },
            },
        });
        let config = self.file(&format!("{name}.json"), &config)?;
        let id = self.node.crictl(&["runp", "-r", HANDLER, &config])?;
        Ok(Pod { id, config, gate, logs })
    }

    /// Makes and starts a container that runs a script.
    fn container(&self, pod: &Pod, name: &str, script: &str, change: impl FnOnce(&mut Value)) -> Result<String> {
        let mut config = json!({
            "metadata": { "name": name }, "image": { "image": self.image }, "command": ["/bin/sh", "-c", script],
            "mounts": [{ "container_path": "/gate", "host_path": pod.gate }],
            "log_path": format!("{name}.log"), "linux": {},
        });
        change(&mut config);
        let file = self.file(&format!("{name}.json"), &config)?;
        let id = self.node.crictl(&["create", &pod.id, &file, &pod.config])?;
        self.node.crictl(&["start", &id])?;
        Ok(id)
    }

    fn status(&self, id: &str) -> Result<Value> {
        let mut inspected: Value = serde_json::from_str(&self.node.crictl(&["inspect", id])?).context("inspect printed no JSON")?;
        let pid = inspected["info"]["pid"].take();
        let mut status = inspected["status"].take();
        status["pid"] = pid;
        Ok(status)
    }

    fn is_ready(&self, pod: &Pod) -> Result<bool> {
        Ok(self.node.crictl(&["inspectp", &pod.id])?.contains("SANDBOX_READY"))
    }

    /// What a log has of a stream, put together again.
    fn log(pod: &Pod, file: &str, stream: &str) -> String {
        let text = fs::read_to_string(pod.logs.join(file)).unwrap_or_default();
        let entries = text.lines().filter_map(|line| line.split_once(' ')).filter_map(|(_, rest)| rest.strip_prefix(stream));
        let content = |entry: &str| match entry.get(..3) {
            Some(" F ") => format!("{}\n", &entry[3..]),
            _ => entry.get(3..).unwrap_or_default().to_owned(),
        };
        entries.map(content).collect()
    }

    fn shims(&self) -> Result<Vec<String>> {
        let all = processes(self.node.cgroup())?;
        Ok(all.into_iter().filter(|(_, line)| line.contains(SHIM)).map(|(pid, _)| pid).collect())
    }

    /// Runs `crictl` with this on its stdin; answers its stdout.
    fn piped(&self, words: &[&str], input: &str) -> Result<String> {
        let mut command = self.node.crictl_command(words)?;
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("failed to run crictl")?;
        child.stdin.take().context("crictl has no stdin")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output().context("failed to wait for crictl")?;
        testkit::host::checked(output).with_context(|| format!("crictl {}", words.join(" ")))
    }

    fn restart(&mut self, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        self.node.kill_server()?;
        meanwhile()?;
        self.node.start_ours(&self.flags)
    }

    fn remove(&self, pod: &Pod) -> Result<()> {
        self.node.crictl(&["stopp", &pod.id])?;
        self.node.crictl(&["rmp", &pod.id]).map(drop)
    }

    /// What is left of pods: processes, cgroups, bundles, states of the OCI runtime, sockets, mounts.
    fn left(&self) -> Result<Vec<String>> {
        let state = self.node.folder().join("state");
        let all = processes(self.node.cgroup())?.into_iter().map(|(_, line)| line);
        let mut left: Vec<String> = all.filter(|line| line.contains(SHIM) || line.contains("/pause") || line.contains("/gate")).collect();
        let pods = format!("{}/pods", self.node.cgroup());
        let folders = ["containers", "sandboxes", "s", "netns", "oci/k8s.io"].map(|name| state.join(name));
        let folders = folders.into_iter().chain([PathBuf::from("/run/containerd/s")]);
        let is_group = |path: &Path| path.starts_with("/sys/fs/cgroup");
        for folder in folders.chain(groups(&pods)?) {
            let entries = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
            left.extend(entries.filter(|path| !is_group(path) || path.is_dir()).map(|path| path.display().to_string()));
        }
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").context("failed to read mountinfo")?;
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        left.extend(points.filter(|point| point.starts_with(&state.display().to_string())).map(str::to_owned));
        Ok(left)
    }

    fn nothing_is_left(&self) -> Result<()> {
        let mut left = Vec::new();
        let gone = eventually("nothing is left", || {
            left = self.left()?;
            Ok(left.is_empty())
        });
        gone.map_err(|_| anyhow::anyhow!("this is left of the pods:\n{}", left.join("\n")))
    }
}

/// Counts until it is told to stop; then ends without a newline.
const COUNTS: &str = "i=0; while [ ! -e /gate/stop ]; do echo $i; i=$((i+1)); sleep 0.01; done; printf end; exit 7";
/// Waits, then writes more than one entry of a log and ends.
const ENDS: &str = "while [ ! -e /gate/end ]; do sleep 0.02; done; seq 1 5000; echo oops >&2; touch /gate/ended; exit 5";

/// How far a container counts that writes as fast as it can.
const FLOOD: u32 = 400_000;

/// A pod of three containers that share a PID namespace: exec, stats, attach, rotation, and the server killed in the middle.
fn a_pod_and_a_killed_server(test: &mut Test<'_, '_>) -> Result<()> {
    let pod = test.pod("pod", 0)?;
    let counts = test.container(&pod, "counts", COUNTS, |_| {})?;
    let ends = test.container(&pod, "ends", ENDS, |_| {})?;
    let reads = test.container(&pod, "reads", "read line; echo got $line; cat; echo over", |config| {
        config["stdin"] = true.into();
        config["stdin_once"] = true.into();
    })?;
    ensure!(test.shims()?.len() == 1, "one shim for the pod: {:?}", processes(test.node.cgroup())?);
    execs(test, &counts)?;
    let stats = test.node.crictl(&["stats", "-o", "json", "--id", &counts])?;
    ensure!(stats.contains("workingSetBytes") && stats.contains("usageCoreNanoSeconds"), "stats: {stats}");
    test.node.crictl(&["update", "--memory", "67108864", &counts])?;
    test.piped(&["attach", "-i", &reads], "hello\nmore\n")?;
    eventually("the container has read its stdin's end", || Ok(test.status(&reads)?["state"] == "CONTAINER_EXITED"))?;
    let said = Test::log(&pod, "reads.log", "stdout");
    ensure!(said == "got hello\nmore\nover\n", "attached: {said:?}");

    // A rotation, as the kubelet does it.
    fs::rename(pod.logs.join("counts.log"), pod.logs.join("counts.log.1")).context("failed to rotate")?;
    let cri = Cri::connect(&test.node.socket())?;
    cri.call("ReopenContainerLog", &json!({ "container_id": counts }))??;
    eventually("the new log is written", || Ok(!Test::log(&pod, "counts.log", "stdout").is_empty()))?;

    let before = test.status(&counts)?;
    let gate = pod.gate.clone();
    let shims = test.shims()?;
    test.restart(|| {
        fs::write(gate.join("end"), "")?;
        // By then its output is in the FIFO, and soon nobody writes to that any more.
        eventually("a container has ended while no server runs", || Ok(gate.join("ended").exists()))
    })?;
    let after = test.status(&counts)?;
    for field in ["state", "startedAt", "pid"] {
        ensure!(before[field] == after[field], "{field}: {} and {}", before[field], after[field]);
    }
    ensure!(test.is_ready(&pod)? && test.shims()? == shims, "it is the same pod");
    eventually("the other container has ended", || Ok(test.status(&ends)?["state"] == "CONTAINER_EXITED"))?;
    ensure!(test.status(&ends)?["exitCode"] == 5, "its code: {}", test.status(&ends)?);
    ensure!(Test::log(&pod, "ends.log", "stdout") == numbers(5000), "its output: {:?}", Test::log(&pod, "ends.log", "stdout").len());
    ensure!(Test::log(&pod, "ends.log", "stderr") == "oops\n", "its stderr");

    let floods = test.container(&pod, "floods", &format!("seq 1 {FLOOD}"), |_| {})?;
    for _ in 0..3 {
        // In the middle of reading and writing.
        test.restart(|| Ok(()))?;
    }
    eventually("the flood is over", || Ok(test.status(&floods)?["state"] == "CONTAINER_EXITED"))?;
    ensure!(Test::log(&pod, "floods.log", "stdout") == numbers(FLOOD), "a line is lost or doubled");
    execs(test, &counts)?;
    fs::write(pod.gate.join("stop"), "")?;
    eventually("the counting has ended", || Ok(test.status(&counts)?["state"] == "CONTAINER_EXITED"))?;
    ensure!(test.status(&counts)?["exitCode"] == 7, "its code: {}", test.status(&counts)?);
    let whole = Test::log(&pod, "counts.log.1", "stdout") + &Test::log(&pod, "counts.log", "stdout");
    let lines: Vec<&str> = whole.lines().collect();
    let (last, numbers) = lines.split_last().context("the log is empty")?;
    ensure!(*last == "end" && !whole.ends_with('\n'), "the line without an end: {last:?}");
    for (number, line) in numbers.iter().enumerate() {
        ensure!(*line == number.to_string(), "line {number} of {} is {line:?}: lost or doubled", numbers.len());
    }
    test.node.crictl(&["rm", &ends])?;
    test.remove(&pod)?;
    test.nothing_is_left()
}

/// What `seq 1 LAST` prints.
fn numbers(last: u32) -> String {
    (1..=last).map(|number| format!("{number}\n")).collect()
}

fn execs(test: &Test<'_, '_>, id: &str) -> Result<()> {
    let exec = |words: &[&str]| test.node.crictl(&[&["exec", "-s", id], words].concat());
    ensure!(exec(&["hostname"])? == "pod", "the pod's hostname");
    ensure!(exec(&["cat", "/proc/1/cmdline"])?.contains("pause"), "the pause process is process 1 of the pod");
    ensure!(exec(&["cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"])? == "80", "the pod's sysctl");
    ensure!(exec(&["sh", "-c", "exit 3"]).is_err_and(|error| format!("{error:#}").contains('3')), "exec's exit code");
    let big = "0123456789abcdef\n".repeat(10_000);
    let echoed = test.piped(&["exec", "-i", id, "cat"], &big)?;
    ensure!(echoed == big, "a streamed exec: {} bytes of {}", echoed.len(), big.len());
    let line = format!("{} exec -it {id} sh -c 'test -t 1 && echo terminal'", shell_words(&test.node.crictl_command(&[])?));
    // script(1) gives crictl the terminal that it insists on.
    let output = Command::new("script").args(["-qec", &line, "/dev/null"]).stdin(Stdio::null()).output().context("failed to run script")?;
    ensure!(String::from_utf8_lossy(&output.stdout).contains("terminal\r\n"), "exec on a terminal: {output:?}");
    Ok(())
}

fn shell_words(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| format!("'{}'", word.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

/// Nobody takes over what a killed shim of upstream's leaves: its `delete` ends it.
fn a_killed_shim(test: &Test<'_, '_>) -> Result<()> {
    let pod = test.pod("dies", 1)?;
    let id = test.container(&pod, "sleeps", "echo line; exec tail -f /gate/never /dev/null", |config| config["tty"] = true.into())?;
    eventually("its log", || Ok(Test::log(&pod, "sleeps.log", "stdout").contains("line")))?;
    for pid in test.shims()? {
        ensure!(Command::new("kill").args(["-9", &pid]).status()?.success(), "failed to kill {pid}");
    }
    eventually("the pod is not ready", || Ok(!test.is_ready(&pod)?))?;
    eventually("the container has ended", || Ok(test.status(&id)?["state"] == "CONTAINER_EXITED"))?;
    test.node.crictl(&["rmp", &pod.id])?;
    test.nothing_is_left()
}

fn rows(test: &str, release: &Release) -> Result<()> {
    println!("{test}: {}", release.version()?);
    let done = on_node(test, |node| {
        // The shim of 1.6 has its sockets below /run: a new one, in this mount namespace.
        let mounted = Command::new("mount").args(["-t", "tmpfs", "tmpfs", "/run"]).status().context("failed to run mount")?;
        ensure!(mounted.success(), "failed to mount a new /run");
        let runtimes = node.folder().join("runtimes.toml");
        let (shim, runc) = (release.folder.join(SHIM), &release.runc);
        let text = format!(
            "[runtimes.{HANDLER}]\nruntime_type = \"io.containerd.runc.v2\"\nruntime_path = {shim:?}\n[runtimes.{HANDLER}.options]\nBinaryName = {runc:?}\n"
        );
        fs::write(&runtimes, text).context("failed to write the handlers")?;
        let flags = vec![format!("--runtime-config={}", runtimes.display())];
        node.start_ours(&flags)?;
        let image = node.registry.add("busybox", "1", &images::busybox("1")?);
        node.crictl(&["pull", &image])?;
        let mut test = Test { node, flags, image };
        ensure!(test.node.crictl(&["info"])?.contains(HANDLER), "the handler is listed");
        let nobody = test.file("nobody.json", &json!({ "metadata": { "name": "n", "namespace": "n", "uid": "n" } }))?;
        let refused = test.node.crictl(&["runp", "-r", "nobody", &nobody]);
        ensure!(refused.is_err_and(|error| format!("{error:#}").contains(HANDLER)), "an unknown handler is told those that there are");
        a_pod_and_a_killed_server(&mut test).context("a pod, and a killed server")?;
        a_killed_shim(&test).context("a killed shim")
    })?;
    if done.is_none() {
        skip(test, "it cannot have a host of its own");
    }
    Ok(())
}

#[test]
fn the_shim_of_containerd_1_6() -> Result<()> {
    match Release::debian() {
        Some(release) if e2e::peer("crictl").is_some() => rows("the_shim_of_containerd_1_6", &release),
        _ => {
            skip("the_shim_of_containerd_1_6", "CORACLE_PEERS has no debian/containerd, debian/runc and crictl");
            Ok(())
        }
    }
}

#[test]
fn the_shim_of_containerd_1_7() -> Result<()> {
    match Release::v1_7() {
        Some(release) if e2e::peer("crictl").is_some() => rows("the_shim_of_containerd_1_7", &release),
        _ => {
            skip("the_shim_of_containerd_1_7", "CORACLE_PEERS has no containerd-1.7, runc and crictl");
            Ok(())
        }
    }
}

#[test]
fn the_shim_of_containerd_2() -> Result<()> {
    match Release::v2() {
        Some(release) if e2e::peer("crictl").is_some() => rows("the_shim_of_containerd_2", &release),
        _ => {
            skip("the_shim_of_containerd_2", "CORACLE_PEERS has no containerd, runc and crictl");
            Ok(())
        }
    }
}
