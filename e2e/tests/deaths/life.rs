//! Pods that crash, fail their probes, hang in hooks, and are deleted with and without grace: what the kubelet does is upstream's.
//!
//! Scripts and probes in the pods wait for files in a folder of the test, so that nothing here depends on how fast a machine is.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::api::{Api, eventually};
use e2e::cluster::Cluster;
use serde_json::{Value, json};

use crate::writers;

/// The pods of the tests.
const PODS: &str = "/api/v1/namespaces/default/pods";
/// How long a hook lasts, at the least.
const HOOK: Duration = Duration::from_secs(10);
/// How many lines the neighbour of a hook writes before it is looked at again.
const LINES: usize = 100;
/// Keeps the object of a pod that has ended, so that its last status can be read.
const FINALIZER: &str = "coracle.test/hold";

#[test]
fn pods_live_and_die_as_upstreams() -> Result<()> {
    let cluster = Cluster::start("life")?;
    cluster.serve("tools", "v1", &e2e::images::busybox("v1")?);
    let gates = cluster.folder().join("gates");
    fs::create_dir(&gates).with_context(|| format!("failed to create {}", gates.display()))?;
    let test = Test { api: cluster.api(), cluster, gates };
    test.create()?;
    type Part = (&'static str, fn(&Test) -> Result<()>);
    let parts: [Part; 7] = [
        ("a hook and its neighbour", Test::hooks),
        ("a failing liveness probe", Test::liveness),
        ("a failing readiness probe", Test::readiness),
        ("a pod that goes when asked", Test::polite),
        ("a pod that does not go when asked", Test::stubborn),
        ("a pod that is deleted by force", Test::force),
        ("a crash-looping pod", Test::crash_loop),
    ];
    for (what, part) in parts {
        part(&test).with_context(|| format!("{what}\n--- coracle up\n{}", test.cluster.log_tail()))?;
    }
    Ok(())
}

struct Test {
    cluster: Cluster,
    api: Api,
    /// The folder that all pods have as `/gates`.
    gates: PathBuf,
}

impl Test {
    /// All pods at once, but for the crash-looping one: its first waits are short.
    fn create(&self) -> Result<()> {
        let ends = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
        let hook = |name: &str| {
            let script = format!("touch /gates/{name}; while [ ! -e /gates/{name}-end ]; do sleep 0.1; done");
            json!({"exec": {"command": ["sh", "-c", script]}})
        };
        let probe = |script: &str, failures: u32| json!({"exec": {"command": ["sh", "-c", script]}, "periodSeconds": 1, "failureThreshold": failures});
        // Asked to end, it writes on until the hook of the other is over.
        let neighbour = format!("trap '' TERM; ({}) & while [ ! -e /gates/pre-end ]; do sleep 0.1; done; kill -9 $!", writers::SCRIPT);
        let mut slow = container("slow", ends);
        slow["lifecycle"] = json!({"postStart": hook("post"), "preStop": hook("pre")});
        let mut live = container("live", ends);
        live["livenessProbe"] = probe("echo broken; exit 1", 2);
        let mut ready = container("ready", ends);
        ready["readinessProbe"] = probe("test -e /gates/ready || { echo closed; exit 1; }", 1);
        let stubborn =
            container("main", "trap 'echo asked >> /gates/stubborn' TERM; touch /gates/stubborn-runs; while :; do sleep 0.1; done");
        let polite = container("main", "trap 'exit 7' TERM; touch /gates/polite-runs; while :; do sleep 0.1; done");
        let pods = [
            ("hooks", 120, vec![container("neighbour", &neighbour), slow], false),
            ("live", 1, vec![live], false),
            ("ready", 1, vec![ready], false),
            ("stubborn", 60, vec![stubborn], true),
            ("polite", 120, vec![polite], true),
            ("force", 120, vec![container("main", "trap '' TERM; while :; do sleep 0.1; done")], false),
        ];
        for (name, grace, containers, held) in pods {
            self.api.create_pod(&self.pod(name, grace, &containers, held))?;
        }
        Ok(())
    }

    fn pod(&self, name: &str, grace: u32, containers: &[Value], held: bool) -> Value {
        let finalizers = if held { vec![FINALIZER] } else { Vec::new() };
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "finalizers": finalizers},
            "spec": {
                "terminationGracePeriodSeconds": grace,
                "containers": containers,
                "volumes": [{"name": "gates", "hostPath": {"path": self.gates, "type": "Directory"}}],
            },
        })
    }

    /// postStart and preStop of one container last 10 s; the other writes, and runs what it is told, all the while.
    fn hooks(&self) -> Result<()> {
        self.wait_for("post")?;
        let start = Instant::now();
        let file = || -> Result<PathBuf> {
            let logs = self.cluster.folder().join("logs");
            let uid = self.api.pod("hooks")?["metadata"]["uid"].as_str().context("a pod without uid")?.to_owned();
            Ok(logs.join(format!("default_hooks_{uid}/neighbour/0.log")))
        };
        // As upstream's, the kubelet shows no log of a pod whose containers have not all been started. The line is there.
        let log = file()?;
        self.write_on_beside("post", start, || {
            let text = fs::read_to_string(&log).with_context(|| format!("failed to read {}", log.display()))?;
            Ok(text.lines().count())
        })?;
        self.execute()?;
        self.open("post-end")?;
        self.api.wait_ready("hooks")?;

        self.delete("hooks", "")?;
        self.wait_for("pre")?;
        let path = format!("{PODS}/hooks/log?container=neighbour&tailLines=1");
        self.write_on_beside("pre", Instant::now(), || writers::number_of(&self.api.get(&path)?))?;
        self.execute()?;
        writers::count(&self.api.get(&format!("{PODS}/hooks/log?container=neighbour"))?)?;
        self.open("pre-end")?;
        self.gone("hooks")
    }

    /// The neighbour writes as long as the hook lasts.
    fn write_on_beside(&self, hook: &str, start: Instant, lines: impl Fn() -> Result<usize>) -> Result<()> {
        while start.elapsed() < HOOK {
            let before = lines()?;
            eventually(&format!("the neighbour of {hook} writes on"), || Ok(lines()? >= before + LINES))?;
        }
        ensure!(!self.gates.join(format!("{hook}-end")).exists(), "the hook {hook} is over");
        Ok(())
    }

    /// Executes something in the neighbour.
    fn execute(&self) -> Result<()> {
        let Some(kubectl) = e2e::peer("kubectl") else {
            e2e::skip("an_exec_beside_a_hook", "kubectl is built by Go");
            return Ok(());
        };
        let output = self.cluster.run(&kubectl, &["exec", "hooks", "-c", "neighbour", "--", "echo", "beside"], "")?;
        ensure!(output.status.success() && output.stdout == b"beside\n", "kubectl exec: {output:?}");
        Ok(())
    }

    fn liveness(&self) -> Result<()> {
        self.tells("live", "Warning Unhealthy: Liveness probe failed: broken")?;
        self.tells("live", "Normal Killing: Container live failed liveness probe, will be restarted")?;
        eventually("the container was restarted", || Ok(restarts(&self.api.pod("live")?) >= 1))?;
        self.delete("live", "")?;
        self.gone("live")
    }

    fn readiness(&self) -> Result<()> {
        self.tells("ready", "Warning Unhealthy: Readiness probe failed: closed")?;
        let unready = |pod: &Value| {
            let status = container_status(pod);
            let conditions = pod.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
            let told = conditions.iter().any(|condition| {
                condition["type"] == "Ready" && condition["status"] == "False" && condition["reason"] == "ContainersNotReady"
            });
            told && status["ready"] == false && status["state"].get("running").is_some()
        };
        eventually("the pod runs and is not ready", || Ok(unready(&self.api.pod("ready")?)))?;
        self.open("ready")?;
        self.api.wait_ready("ready")?;
        let gate = self.gates.join("ready");
        fs::remove_file(&gate).with_context(|| format!("failed to remove {}", gate.display()))?;
        eventually("the pod is not ready again", || Ok(unready(&self.api.pod("ready")?)))?;
        ensure!(restarts(&self.api.pod("ready")?) == 0, "a readiness probe restarted its container");
        self.delete("ready", "")?;
        self.gone("ready")
    }

    /// SIGTERM is enough, and its own exit code is told.
    fn polite(&self) -> Result<()> {
        self.wait_for("polite-runs")?;
        let deleted = self.delete("polite", "")?;
        ensure!(deleted.pointer("/metadata/deletionGracePeriodSeconds") == Some(&json!(120)), "{}", deleted["metadata"]);
        let ended = self.ended("polite")?;
        ensure!(ended["exitCode"] == 7 && ended["reason"] == "Error", "polite ended so: {ended}");
        self.release("polite")
    }

    /// SIGTERM, and SIGKILL when the grace period is over.
    fn stubborn(&self) -> Result<()> {
        self.wait_for("stubborn-runs")?;
        let deleted = self.delete("stubborn", "?gracePeriodSeconds=4")?;
        let over = deleted.pointer("/metadata/deletionTimestamp").and_then(Value::as_str).context("no deletionTimestamp")?;
        let ended = self.ended("stubborn")?;
        ensure!(ended["exitCode"] == 137 && ended["reason"] == "Error", "stubborn ended so: {ended}");
        // Both are RFC 3339 in UTC and of whole seconds.
        ensure!(ended["finishedAt"].as_str().is_some_and(|at| at >= over), "it ended before {over}: {ended}");
        let asked = fs::read_to_string(self.gates.join("stubborn")).context("stubborn was not sent SIGTERM")?;
        ensure!(asked == "asked\n", "SIGTERM came so often: {asked:?}");
        self.release("stubborn")
    }

    /// The object goes at once, and the process without its 120 s.
    fn force(&self) -> Result<()> {
        let pod = self.api.wait_ready("force")?;
        let [container] = &e2e::table::running_containers(&pod)?[..] else { anyhow::bail!("force has not one container") };
        ensure!(!self.cluster.table()?.in_cgroup(container).is_empty(), "the container of force does not run");
        self.delete("force", "?gracePeriodSeconds=0")?;
        let (status, body) = self.api.ask("GET", &format!("{PODS}/force"), "", "")?;
        ensure!(status == 404, "force is still there: {status}: {body}");
        eventually("its processes are gone", || Ok(self.cluster.table()?.in_cgroup(container).is_empty()))
    }

    /// The first restart is at once; those after it wait 10 s and 20 s.
    fn crash_loop(&self) -> Result<()> {
        self.api.create_pod(&self.pod("crash", 1, &[container("crash", "exit 3")], false))?;
        let mut seen = Vec::new();
        for wait in ["10s", "20s"] {
            let message = format!("back-off {wait} restarting failed container=crash pod=crash_default(");
            let mut last = Value::Null;
            let waited = eventually(&format!("the container waits {wait}"), || {
                last = container_status(&self.api.pod("crash")?);
                let waiting = &last["state"]["waiting"];
                let told = waiting["message"].as_str().is_some_and(|text| text.starts_with(&message));
                Ok(told && waiting["reason"] == "CrashLoopBackOff")
            });
            waited.with_context(|| format!("the last status: {last}"))?;
            ensure!(last["lastState"]["terminated"]["exitCode"] == 3, "the last state is told wrong: {last}");
            seen.push(restarts_of(&last));
        }
        ensure!(seen == [1, 2], "restarts before the waits of 10 s and 20 s: {seen:?}");
        self.tells("crash", "Warning BackOff: Back-off restarting failed container crash in pod crash_default(")
    }

    fn wait_for(&self, gate: &str) -> Result<()> {
        let path: &Path = &self.gates.join(gate);
        eventually(&format!("a pod has made {gate}"), || Ok(path.exists()))
    }

    fn open(&self, gate: &str) -> Result<()> {
        fs::write(self.gates.join(gate), "").with_context(|| format!("failed to make {gate}"))
    }

    fn tells(&self, pod: &str, event: &str) -> Result<()> {
        let mut told = String::new();
        let waited = eventually(&format!("{pod} tells {event:?}"), || {
            told = self.api.events(pod)?;
            Ok(told.contains(event))
        });
        waited.with_context(|| format!("its events: {told}"))
    }

    fn delete(&self, pod: &str, query: &str) -> Result<Value> {
        let (status, body) = self.api.ask("DELETE", &format!("{PODS}/{pod}{query}"), "", "")?;
        ensure!(status == 200, "DELETE of {pod}: {status}: {body}");
        serde_json::from_str(&body).with_context(|| format!("DELETE of {pod}: bad JSON"))
    }

    fn gone(&self, pod: &str) -> Result<()> {
        eventually(&format!("{pod} is gone"), || Ok(self.api.ask("GET", &format!("{PODS}/{pod}"), "", "")?.0 == 404))
    }

    /// How the only container of a deleted pod ended.
    fn ended(&self, pod: &str) -> Result<Value> {
        let mut last = Value::Null;
        let waited = eventually(&format!("{pod} has ended"), || {
            last = container_status(&self.api.pod(pod)?);
            Ok(last["state"].get("terminated").is_some())
        });
        waited.with_context(|| format!("the last status: {last}"))?;
        Ok(last["state"]["terminated"].clone())
    }

    /// Takes the finalizer away; the object goes.
    fn release(&self, pod: &str) -> Result<()> {
        let patch = json!({"metadata": {"finalizers": null}}).to_string();
        let (status, body) = self.api.ask("PATCH", &format!("{PODS}/{pod}"), "application/merge-patch+json", &patch)?;
        ensure!(status == 200, "PATCH of {pod}: {status}: {body}");
        self.gone(pod)
    }
}

fn container(name: &str, script: &str) -> Value {
    json!({
        "name": name,
        "image": "localhost:5000/tools:v1",
        "command": ["sh", "-c", script],
        "volumeMounts": [{"name": "gates", "mountPath": "/gates"}],
    })
}

/// The status of a pod's only container.
fn container_status(pod: &Value) -> Value {
    pod.pointer("/status/containerStatuses/0").cloned().unwrap_or_default()
}

fn restarts_of(status: &Value) -> u64 {
    status["restartCount"].as_u64().unwrap_or_default()
}

fn restarts(pod: &Value) -> u64 {
    restarts_of(&container_status(pod))
}
