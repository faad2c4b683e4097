//! The whole program: `coracle up` to a Ready node, `coracle apply` to a running pod, and what it holds and burns while nothing happens.

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::group::Group;
use super::{Places, idle_cpu, wait_until};
use crate::sh;

/// How long the node may take to be Ready, and a pod to run.
const PATIENCE: Duration = Duration::from_secs(60);
/// Timed Deployments; one before them pulls the image and is not counted.
const DEPLOYMENTS: u32 = 5;

/// What was measured.
pub struct System {
    /// Seconds from the start of the process to the node's condition Ready.
    pub ready: f64,
    /// Milliseconds from the start of `coracle apply` to phase Running as the API shows it, one per Deployment.
    pub running: Vec<f64>,
    /// Proportional set size of the idle program, without pods, KiB.
    pub pss_kib: u64,
    /// Its processes.
    pub processes: usize,
    /// CPU of the idle program, milliseconds per second.
    pub idle_cpu_ms_per_s: f64,
    /// The same with idle pods.
    pub pods_cpu_ms_per_s: f64,
}

struct Up<'a> {
    places: &'a Places,
    child: Child,
}

/// Brings a cluster up, measures it, takes it down.
pub fn measure(places: &Places, image: &str, pods: u32) -> Result<System> {
    let group = Group::create(format!("{}/up", places.cgroup))?;
    eprintln!("==> coracle up");
    let began = Instant::now();
    let mut up = Up::start(places, &group)?;
    wait_until(PATIENCE, "the node to be Ready", || up.node_ready())?;
    let ready = began.elapsed().as_secs_f64();

    let idle_cpu_ms_per_s = idle_cpu(&[&group])?[0];
    let (pss_kib, processes) = (group.pss_kib()?, group.processes()?);

    eprintln!("==> coracle apply, {DEPLOYMENTS} times");
    up.apply("warm", image, 1)?;
    let running: Vec<f64> = (0..DEPLOYMENTS).map(|number| up.apply(&format!("bench-{number}"), image, 1)).collect::<Result<_>>()?;
    eprintln!("==> {pods} idle pods");
    up.apply("idle", image, pods)?;
    let pods_cpu_ms_per_s = idle_cpu(&[&group])?[0];
    up.down()?;
    Ok(System { ready, running, pss_kib, processes, idle_cpu_ms_per_s, pods_cpu_ms_per_s })
}

impl Up<'_> {
    fn start<'a>(places: &'a Places, group: &Group) -> Result<Up<'a>> {
        let mut command = group.command(&places.executables.join("coracle"));
        command.arg("up").arg("--data-dir").arg(places.folder.join("data")).args(["--state-dir", "/run/coracle-up"]);
        // The names of the runtime that was measured before are taken: it left its bridge, as a runtime does.
        command.args(["--bridge", "bench-up", "--pod-cidr", "10.87.0.0/16", "--nftables-table", "bench-up"]);
        for flag in ["--cni-conf-dir", "--cni-bin-dir"] {
            command.arg(flag).arg(places.folder.join("no-cni"));
        }
        command.arg("--pod-log-dir").arg(places.folder.join("logs/up")).args(["--cgroup-root", &group.path]);
        let log = File::create(places.folder.join("up.log")).context("failed to create the log of coracle up")?;
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().context("failed to run coracle up")?;
        Ok(Up { places, child })
    }

    fn coracle(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.places.executables.join("coracle"));
        command.args(words).arg("--data-dir").arg(self.places.folder.join("data")).stdin(Stdio::null());
        command
    }

    /// The answer to a GET; `Null` while there is no answer.
    fn get(&mut self, path: &str) -> Result<Value> {
        if let Some(status) = self.child.try_wait().context("failed to look after coracle up")? {
            let log = fs::read_to_string(self.places.folder.join("up.log")).unwrap_or_default();
            bail!("coracle up ended with {status}: {log}");
        }
        let output = self.coracle(&["get", path]).output().context("failed to run coracle get")?;
        Ok(serde_json::from_slice(&output.stdout).unwrap_or(Value::Null))
    }

    fn node_ready(&mut self) -> Result<bool> {
        let nodes = self.get("/api/v1/nodes")?;
        let conditions = nodes.pointer("/items/0/status/conditions").and_then(Value::as_array);
        Ok(conditions.into_iter().flatten().any(|condition| condition["type"] == "Ready" && condition["status"] == "True"))
    }

    /// Milliseconds from the start of `coracle apply` until all pods are Running.
    fn apply(&mut self, name: &str, image: &str, replicas: u32) -> Result<f64> {
        let labels = json!({ "app": name });
        let container = json!({
            "name": "sleep", "image": image, "imagePullPolicy": "IfNotPresent", "command": ["/bin/sleep", "1000000"],
        });
        let deployment = json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": { "name": name },
            "spec": {
                "replicas": replicas,
                "selector": { "matchLabels": labels },
                "template": {
                    "metadata": { "labels": labels },
                    "spec": { "terminationGracePeriodSeconds": 0, "containers": [container] },
                },
            },
        });
        let file = self.places.folder.join("deployment.json");
        fs::write(&file, deployment.to_string()).context("failed to write the Deployment")?;
        let began = Instant::now();
        sh::output(self.coracle(&["apply", "--timeout", "0"]).arg("--filename").arg(&file))?;
        let path = format!("/api/v1/namespaces/default/pods?labelSelector=app%3D{name}");
        wait_until(PATIENCE, &format!("the pod of Deployment {name}"), || {
            let pods = self.get(&path)?;
            let pods = pods["items"].as_array().into_iter().flatten();
            Ok(pods.filter(|pod| pod["status"]["phase"] == "Running").count() == replicas as usize)
        })?;
        Ok(began.elapsed().as_secs_f64() * 1000.0)
    }

    fn down(mut self) -> Result<()> {
        sh::output(&mut self.coracle(&["down"]))?;
        wait_until(PATIENCE, "the end of coracle up", || Ok(self.child.try_wait()?.is_some()))
    }
}
