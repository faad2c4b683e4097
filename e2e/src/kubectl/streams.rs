//! Streams through the API server to a pod: `attach`, `port-forward`, `cp`, `debug`, and `exec` in the older framing.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::sessions::{exec_on_a_terminal, start_with};
use crate::api::eventually;
use crate::cluster::Cluster;
use crate::script::{Step, play, step};

/// What makes kubectl speak SPDY/3.1 instead of WebSocket.
const SPDY: &[(&str, &str)] = &[("KUBECTL_REMOTE_COMMAND_WEBSOCKETS", "false"), ("KUBECTL_PORT_FORWARD_WEBSOCKETS", "false")];
/// What `head -c` in the pod's manifest makes.
const LARGE_BYTES: &str = "8000000";

/// All of them, on a pod of their own.
pub fn check(cluster: &Cluster, kubectl: &Path) -> Result<()> {
    let manifest = cluster.folder().join("streams.yaml");
    fs::write(&manifest, include_str!("../../data/streams.yaml"))?;
    let manifest = manifest.to_string_lossy();
    play(
        cluster,
        kubectl,
        &[
            step(&format!("apply -f {manifest}")).prints("pod/streams created"),
            step("wait --for=condition=Ready pod/streams --timeout=60s").prints("condition met"),
        ],
    )?;
    for (round, environment) in [&[][..], SPDY].into_iter().enumerate() {
        exec_on_a_terminal(cluster, kubectl, "streams", "web", environment).with_context(|| format!("exec -it, {environment:?}"))?;
        port_forward(cluster, kubectl, environment).with_context(|| format!("port-forward, {environment:?}"))?;
        port_forward_to_nobody(cluster, kubectl, environment).with_context(|| format!("port-forward to a closed port, {environment:?}"))?;
        attach(cluster, kubectl, environment, round).with_context(|| format!("attach, {environment:?}"))?;
    }
    play(cluster, kubectl, &plain())?;
    copy(cluster, kubectl).context("cp")?;
    debug(cluster, kubectl).context("debug")?;
    play(
        cluster,
        kubectl,
        &[
            step("drain --selector=kubernetes.io/os=linux --force --timeout=60s").prints("pod/streams evicted").prints("drained"),
            step("get pod streams").fails().prints("NotFound"),
            step("uncordon --selector=kubernetes.io/os=linux").prints("uncordoned"),
        ],
    )
}

/// Commands without a terminal.
fn plain() -> Vec<Step> {
    let spdy = |line: &str| SPDY.iter().fold(step(line), |step, (name, value)| step.environment(name, value));
    vec![
        spdy("exec -i streams -c web -- cat").input("x").prints("x"),
        spdy("exec streams -c web -- sh -c 'echo out; echo err >&2; exit 3'").fails().prints("out").prints("err").prints("exit code 3"),
        step("events --for pod/streams").prints("Scheduled").prints("Started"),
        step("events --types=Normal").prints("Pod/streams").prints_not("Warning"),
        step("top node").eventually().prints("CPU(cores)").prints("MEMORY(bytes)").prints("Mi"),
        step("top pod streams").eventually().prints("streams").prints("Mi"),
        step("top pod streams --containers").eventually().prints("web").prints("reader").prints("shell"),
        step("top pod --sum=true -A").eventually().prints("NAMESPACE").prints("streams"),
    ]
}

fn curl(cluster: &Cluster, arguments: &[&str]) -> Result<(bool, String)> {
    let output = cluster.run(Path::new("curl"), &[&["--silent", "--show-error", "--max-time", "60"], arguments].concat(), "")?;
    Ok((output.status.success(), format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))))
}

/// The local port that kubectl has chosen.
fn local_port(shown: &str) -> Result<u16> {
    let port = shown.split("127.0.0.1:").nth(1).and_then(|rest| rest.split_whitespace().next());
    port.with_context(|| format!("no port in:\n{shown}"))?.parse().with_context(|| format!("bad port in:\n{shown}"))
}

fn port_forward(cluster: &Cluster, kubectl: &Path, environment: &[(&str, &str)]) -> Result<()> {
    let terminal = start_with(cluster, kubectl, &["port-forward", "pod/streams", ":8080"], environment)?;
    terminal.wait_for("-> 8080")?;
    let port = local_port(&terminal.text())?;
    let address = |path: &str| format!("http://127.0.0.1:{port}/{path}");
    for _ in 0..3 {
        let (good, text) = curl(cluster, &[&address("index.html")])?;
        ensure!(good && text == "from the pod\n", "curl: {text}; kubectl:\n{}", terminal.text());
    }
    // Several connections at one time, each with more than any buffer holds.
    let large = address("large");
    let downloads: Result<Vec<(bool, String)>> = std::thread::scope(|scope| {
        let arguments = ["--output", "/dev/null", "--write-out", "%{size_download}", &large];
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(move || curl(cluster, &arguments))).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow::anyhow!("curl's thread panicked"))?).collect()
    });
    for (good, text) in downloads? {
        ensure!(good && text == LARGE_BYTES, "curl: {text}; kubectl:\n{}", terminal.text());
    }
    terminal.interrupt().map(drop)
}

fn port_forward_to_nobody(cluster: &Cluster, kubectl: &Path, environment: &[(&str, &str)]) -> Result<()> {
    let terminal = start_with(cluster, kubectl, &["port-forward", "pod/streams", ":9"], environment)?;
    terminal.wait_for("-> 9")?;
    let port = local_port(&terminal.text())?;
    let (good, text) = curl(cluster, &[&format!("http://127.0.0.1:{port}/")])?;
    ensure!(!good, "nobody listens, and curl got: {text}");
    terminal.wait_for("refused")
}

fn attach(cluster: &Cluster, kubectl: &Path, environment: &[(&str, &str)], round: usize) -> Result<()> {
    let mut terminal = start_with(cluster, kubectl, &["attach", "-i", "streams", "-c", "reader"], environment)?;
    terminal.send("one\n")?;
    terminal.wait_for("got one")?;
    terminal.send("two\n")?;
    terminal.wait_for("got two")?;
    terminal.interrupt()?;
    // The container goes on, and its output was logged beside.
    play(cluster, kubectl, &[step("logs streams -c reader").prints("got two")])?;

    let mut terminal = start_with(cluster, kubectl, &["attach", "-it", "streams", "-c", "shell"], environment)?;
    eventually("the container's terminal has the size of kubectl's", || {
        terminal.send("stty size\n")?;
        Ok(terminal.text().contains("31 97"))
    })?;
    terminal.send("echo end-$((40 + 2)); exit\n")?;
    terminal.wait_for("end-42")?;
    // The session ends with the container; kubectl tells nothing of its exit code.
    let (status, text) = terminal.wait()?;
    ensure!(status.success(), "ended with {status}; shown was:\n{text}");
    let of_shell = "{.status.containerStatuses[?(@.name==\"shell\")]";
    let restarts = format!("get pod streams -o jsonpath={of_shell}.restartCount}}/{of_shell}.ready}}");
    play(cluster, kubectl, &[step(&restarts).eventually().prints(&format!("{}/true", round + 1))])
}

fn copy(cluster: &Cluster, kubectl: &Path) -> Result<()> {
    let (here, back) = (cluster.folder().join("here"), cluster.folder().join("back"));
    let content: Vec<u8> = (0..1_000_003_u32).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    fs::write(&here, &content)?;
    let (here, back_name) = (here.to_string_lossy().into_owned(), back.to_string_lossy().into_owned());
    play(
        cluster,
        kubectl,
        &[
            step(&format!("cp {here} streams:/tmp/there -c web")),
            step("exec streams -c web -- stat -c %s /tmp/there").prints("1000003"),
            step(&format!("cp streams:/tmp/there {back_name} -c web")),
        ],
    )?;
    ensure!(fs::read(&back)? == content, "what came back is not what went there");
    fs::remove_file(&back)?;
    Ok(())
}

fn debug(cluster: &Cluster, kubectl: &Path) -> Result<()> {
    let image = "--image=localhost:5000/tools:v2";
    let arguments = ["debug", "-it", "streams", image, "--target=web", "--container=looker", "--", "sh"];
    let mut terminal = start_with(cluster, kubectl, &arguments, &[])?;
    let deadline = Instant::now() + Duration::from_secs(60);
    // The shell may start before kubectl has attached: its first prompt is lost then.
    while !terminal.text().contains("httpd") {
        if Instant::now() > deadline {
            bail!("the target's process was not seen; shown was:\n{}", terminal.text());
        }
        // The process of the target container, by its PID namespace, and a file of its own image.
        terminal.send("ps; cat /version\n")?;
        std::thread::sleep(Duration::from_millis(500));
    }
    terminal.wait_for("v2")?;
    terminal.send("exit 6\n")?;
    terminal.wait()?;
    let terminated = "jsonpath={.status.ephemeralContainerStatuses[0].state.terminated.exitCode}";
    play(
        cluster,
        kubectl,
        &[
            step(&format!("get pod streams -o {terminated}")).eventually().prints("6"),
            step("describe pod streams").prints("Ephemeral Containers:").prints("looker"),
            step("logs streams -c looker").prints("httpd"),
            step("patch pod streams --subresource=ephemeralcontainers -p '{\"spec\":{\"ephemeralContainers\":[{\"name\":\"web\",\"image\":\"x\"}]}}'")
                .fails()
                .prints("Duplicate value"),
            step("patch pod streams -p '{\"spec\":{\"ephemeralContainers\":[{\"name\":\"other\",\"image\":\"x\"}]}}'").fails().prints("Forbidden"),
            step(&format!("debug streams {image} --copy-to=copy --container=web -- sleep 1000")),
            step("wait --for=condition=Ready pod/copy --timeout=60s").prints("condition met"),
            step("delete pod copy --now").prints("deleted"),
        ],
    )
}
