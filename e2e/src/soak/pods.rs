//! The pods of a soak whose every line and exit is accounted for: writers, that write until they are killed, and tasks, that write
//! so many lines and end with a code.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::killed::{Killed, Victim};
use super::{PODS, Summary, choose, items, name_of};
use crate::api::{Api, eventually};
use crate::table::{Table, running_containers};

/// What a killed process ends with.
const KILLED: u64 = 137;
/// What is told of an exit that nobody saw.
const UNSEEN: u64 = 255;
/// After so many rounds a writer goes, before its log is long.
const WRITER_ROUNDS: usize = 5;
/// The repository of the soak's images.
pub const REPOSITORY: &str = "tools";

/// A writer.
#[derive(Clone, Debug)]
struct Writer {
    uid: String,
    address: String,
    /// How often its container was killed by us: never more than once, for a second restart waits.
    kills: u64,
    rounds: usize,
}

/// A pod that ends by itself.
#[derive(Clone, Copy, Debug)]
struct Task {
    lines: usize,
    code: u64,
}

/// The pods, and what they must have become.
pub struct Pods<'a> {
    api: &'a Api,
    /// Where pods tell how many lines they have written.
    gates: &'a Path,
    /// The runtime's records of containers.
    containers: PathBuf,
    writers: BTreeMap<String, Writer>,
    tasks: BTreeMap<String, Task>,
    /// Pods whose container was killed, by UID: none is killed twice.
    killed: BTreeSet<String>,
    /// Pods that have been seen Ready, by UID, and how often they had been restarted by then: one whose container was being
    /// started when a daemon died is started anew.
    ready: BTreeMap<String, u64>,
    made: usize,
    /// How many images were served; pods are made of the newest.
    pub images: usize,
}

impl<'a> Pods<'a> {
    /// None yet. `run` is the cluster's state directory.
    pub fn new(api: &'a Api, gates: &'a Path, run: &Path) -> Pods<'a> {
        Pods {
            api,
            gates,
            containers: run.join("cri/containers"),
            writers: BTreeMap::new(),
            tasks: BTreeMap::new(),
            killed: BTreeSet::new(),
            ready: BTreeMap::new(),
            made: 0,
            images: 1,
        }
    }

    /// Makes writers until there are so many that were never killed and are not old; the others go.
    pub fn fill_up(&mut self, count: usize) -> Result<()> {
        let is_spent = |writer: &Writer| writer.kills > 0 || writer.rounds > WRITER_ROUNDS;
        let spent: Vec<String> = self.writers.iter().filter(|(_, writer)| is_spent(writer)).map(|(name, _)| name.clone()).collect();
        for name in spent {
            self.writers.remove(&name);
            self.api.delete_pod(&name)?;
        }
        let mut fresh = Vec::new();
        while self.writers.len() + fresh.len() < count {
            let name = self.next("writer");
            let clock = "busybox mkfifo /tmp/clock; exec 3<>/tmp/clock";
            // Told to the log first: a file that names a line which the log lacks is the proof of a loss.
            let script = format!(
                "{clock}; n=0; while [ -e /gates/{name}.$n ]; do n=$((n+1)); done; i=0; \
                 while true; do i=$((i+1)); echo line $i; echo $i >> /gates/{name}.$n; read -t 0.02 x <&3; done"
            );
            // Of the image that is there: it is waited for.
            self.api.create_pod(&manifest(&name, &image(1), &script, "Always", Some(self.gates)))?;
            fresh.push(name);
        }
        for name in fresh {
            let pod = self.api.wait_ready(&name)?;
            let text =
                |path: &str| pod.pointer(path).and_then(Value::as_str).map(str::to_owned).context("a pod that is Ready has an address");
            let writer = Writer { uid: text("/metadata/uid")?, address: text("/status/podIP")?, kills: 0, rounds: 0 };
            self.writers.insert(name, writer);
        }
        Ok(())
    }

    fn next(&mut self, kind: &str) -> String {
        self.made += 1;
        format!("{kind}-{}", self.made)
    }

    /// The image of the pods that are made now.
    pub fn image(&self) -> String {
        image(self.images)
    }

    /// Makes a task.
    pub fn create_task(&mut self, lines: usize, code: usize) -> Result<()> {
        let name = self.next("task");
        let script = format!(
            "busybox mkfifo /tmp/clock; exec 3<>/tmp/clock; i=0; while [ $i -lt {lines} ]; do \
             i=$((i+1)); echo line $i; echo $i >> /gates/{name}.0; read -t 0.01 x <&3; done; exit {code}"
        );
        self.api.create_pod(&manifest(&name, &self.image(), &script, "Never", Some(self.gates)))?;
        self.tasks.insert(name, Task { lines, code: code as u64 });
        Ok(())
    }

    /// How many tasks are not judged yet.
    pub fn tasks(&self) -> usize {
        self.tasks.len()
    }

    /// The first process of a container of a pod that was never hit before.
    pub fn victim(&mut self, table: &Table, victim: usize) -> Option<Victim> {
        // Without the server it is not known which container is whose: then none is killed.
        let pods = items(&self.api.object(PODS).ok()?);
        let mut all = Vec::new();
        for pod in pods.iter().filter(|pod| pod.pointer("/metadata/deletionTimestamp").is_none()) {
            let uid = uid_of(pod);
            for container in running_containers(pod).unwrap_or_default() {
                if let Some(process) = table.first_in_cgroup(&container).filter(|_| !self.killed.contains(uid)) {
                    all.push(Victim { pod: name_of(pod).to_owned(), uid: uid.to_owned(), container, pid: process.pid });
                }
            }
        }
        let victim = choose(&all, victim)?.clone();
        self.killed.insert(victim.uid.clone());
        if let Some(writer) = self.writers.get_mut(&victim.pod) {
            writer.kills += 1;
        }
        Some(victim)
    }

    /// What is not yet as it should be.
    pub fn differences(&self, pods: &[Value]) -> Vec<String> {
        let mut why = Vec::new();
        let find = |name: &str| pods.iter().find(|pod| name_of(pod) == name);
        for (name, writer) in &self.writers {
            match find(name) {
                Some(pod) if is_ready(pod) && restarts(pod) >= writer.kills => {}
                Some(pod) => why.push(describe(pod)),
                None => why.push(format!("{name} is gone")),
            }
        }
        for name in self.tasks.keys() {
            match find(name) {
                Some(pod) if matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")) => {}
                Some(pod) => why.push(describe(pod)),
                None => why.push(format!("{name} is gone")),
            }
        }
        let known =
            |pod: &&Value| is_of_deployment(pod) || self.writers.contains_key(name_of(pod)) || self.tasks.contains_key(name_of(pod));
        why.extend(pods.iter().filter(|pod| !known(pod)).map(|pod| format!("not wanted: {}", describe(pod))));
        why
    }

    /// Accounts for every line and exit code, and for restarts that nobody wanted.
    pub fn judge(&mut self, killed: &Killed, summary: &mut Summary) -> Result<()> {
        let pods = items(&self.api.object(PODS)?);
        summary.pods.extend(pods.iter().map(|pod| uid_of(pod).to_owned()));
        self.judge_restarts(&pods, summary);
        for victim in &killed.containers {
            self.judge_victim(victim, &pods, killed, summary);
        }
        for (name, writer) in self.writers.clone() {
            if let Err(error) = self.judge_writer(&name, &writer, summary) {
                summary.lost.push(format!("{error:#}"));
            }
        }
        self.writers.values_mut().for_each(|writer| writer.rounds += 1);
        for (name, task) in std::mem::take(&mut self.tasks) {
            if let Err(error) = self.judge_task(&name, task, killed, summary) {
                summary.lost.push(format!("{error:#}"));
            }
            self.api.delete_pod(&name)?;
        }
        Ok(())
    }

    /// A container that was seen to run is restarted only when it was killed.
    fn judge_restarts(&mut self, pods: &[Value], summary: &mut Summary) {
        let mut ready = BTreeMap::new();
        for pod in pods.iter().filter(|pod| is_ready(pod)) {
            let uid = uid_of(pod);
            let expected = self.ready.get(uid).map(|before| before + u64::from(self.killed.contains(uid)));
            if expected.is_some_and(|expected| restarts(pod) > expected) {
                summary.lost.push(format!("more restarts than {expected:?}: {}", describe(pod)));
            }
            ready.insert(uid.to_owned(), self.ready.get(uid).copied().unwrap_or_else(|| restarts(pod)));
        }
        self.ready = ready;
    }

    /// Of every container that was killed it is told how it ended, unless its pod is gone. (Tasks are judged with their lines.)
    fn judge_victim(&self, victim: &Victim, pods: &[Value], killed: &Killed, summary: &mut Summary) {
        let lives = |pod: &&Value| uid_of(pod) == victim.uid && pod.pointer("/metadata/deletionTimestamp").is_none();
        let Some(pod) = pods.iter().find(lives).filter(|_| !self.tasks.contains_key(&victim.pod)) else { return };
        let status = &pod["status"]["containerStatuses"][0];
        let ends = [&status["state"]["terminated"], &status["lastState"]["terminated"]];
        let of_it = |ended: &&&Value| ended["containerID"].as_str().is_some_and(|id| id.ends_with(&victim.container));
        match ends.iter().find(of_it) {
            Some(ended) => self.judge_code(&victim.pod, ended, KILLED, killed, summary),
            None => summary.lost.push(format!("it is not told how {} ended: {}", victim.container, describe(pod))),
        }
    }

    fn judge_writer(&self, name: &str, writer: &Writer, summary: &mut Summary) -> Result<()> {
        let pod = self.api.pod(name)?;
        let text = |path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        ensure!(text("/metadata/uid") == writer.uid, "{name} is another pod");
        ensure!(text("/status/podIP") == writer.address, "{name} had the address {}, and has {}", writer.address, text("/status/podIP"));
        let path = format!("{PODS}/{name}/log");
        if writer.kills > 0 {
            summary.lines += self.judge_lines(name, 0, &format!("{path}?previous=true"))?;
        }
        let lines = self.judge_lines(name, writer.kills, &path)?;
        if writer.kills > 0 || writer.rounds == WRITER_ROUNDS {
            // It goes now; until then its lines are counted again each time.
            summary.lines += lines;
        }
        Ok(())
    }

    /// The log is numbered without a gap. It has all lines that their writer says it has written, at once or a moment later, and at
    /// the most the one more that it was about to tell of.
    fn judge_lines(&self, name: &str, incarnation: u64, path: &str) -> Result<usize> {
        let told = self.told(name, incarnation);
        let mut lines = 0;
        let there = eventually("the log has all lines", || {
            // A server that has just come up may refuse for a while.
            if let Ok(log) = self.api.patient().get(path) {
                lines = count(&log).with_context(|| format!("log {incarnation} of {name}"))?;
            }
            Ok(lines >= told)
        });
        there.with_context(|| format!("log {incarnation} of {name} has {lines} lines, and {told} were written"))?;
        let written = self.told(name, incarnation) + 1;
        ensure!(lines <= written, "log {incarnation} of {name} has {lines} lines, and only {written} were written");
        Ok(lines)
    }

    /// How many lines a pod says it has written.
    fn told(&self, name: &str, incarnation: u64) -> usize {
        fs::read_to_string(self.gates.join(format!("{name}.{incarnation}"))).map_or(0, |told| told.lines().count())
    }

    fn judge_task(&self, name: &str, task: Task, killed: &Killed, summary: &mut Summary) -> Result<()> {
        let pod = self.api.pod(name)?;
        let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
        let lines = count(&self.api.patient().log(name)?).with_context(|| format!("log of {name}"))?;
        summary.lines += lines;
        let was_killed = killed.containers.iter().any(|victim| victim.pod == name);
        if was_killed && (lines < task.lines || ended["exitCode"] == KILLED) {
            let told = self.told(name, 0);
            let is_all = lines == told || lines == told + 1;
            ensure!(is_all, "{name} was killed after {told} lines, and its log has {lines}");
            self.judge_code(name, ended, KILLED, killed, summary);
        } else {
            ensure!(lines == task.lines, "{name} wrote {} lines, and its log has {lines}; it ended so: {ended}", task.lines);
            self.judge_code(name, ended, task.code, killed, summary);
        }
        Ok(())
    }

    fn judge_code(&self, name: &str, ended: &Value, code: u64, killed: &Killed, summary: &mut Summary) {
        summary.exits += 1;
        let told = ended["exitCode"].as_u64();
        if told == Some(code) {
            return;
        }
        let container = ended["containerID"].as_str().and_then(|id| id.split_once("://")).map_or("", |(_, id)| id);
        let sandbox = self.sandbox_of(container);
        match sandbox.as_deref().and_then(|sandbox| killed.excuse(sandbox)).filter(|_| told == Some(UNSEEN)) {
            Some(excuse) => {
                let at = summary.rounds - 1;
                summary.excused.push(format!("round {at}: the exit of {name} (container {container}) was seen by nobody: {excuse}"));
            }
            None => summary.lost.push(format!("{name} ended with {code}, and this is told: {ended} (sandbox {sandbox:?}; {killed:?})")),
        }
    }

    /// The sandbox of a container, as the runtime's record has it.
    fn sandbox_of(&self, container: &str) -> Option<String> {
        let record = fs::read(self.containers.join(container).join("record.json")).ok()?;
        let record: Value = serde_json::from_slice(&record).ok()?;
        record["sandbox_id"].as_str().map(str::to_owned)
    }

    /// Removes writers and tasks.
    pub fn remove_all(&mut self) -> Result<()> {
        for name in self.writers.keys().chain(self.tasks.keys()) {
            self.api.delete_pod(name)?;
        }
        Ok(())
    }
}

/// The name of an image.
pub fn image(number: usize) -> String {
    format!("localhost:5000/{REPOSITORY}:v{number}")
}

fn uid_of(pod: &Value) -> &str {
    pod.pointer("/metadata/uid").and_then(Value::as_str).unwrap_or_default()
}

/// How many lines a log has; they must be numbered from 1 without a gap.
fn count(log: &str) -> Result<usize> {
    let mut count = 0;
    for line in log.lines() {
        count += 1;
        ensure!(line == format!("line {count}"), "line {count} is {line:?}");
    }
    Ok(count)
}

/// A pod of one container.
pub fn manifest(name: &str, image: &str, script: &str, restart_policy: &str, gates: Option<&Path>) -> Value {
    let (mounts, volumes) = match gates {
        Some(gates) => (
            json!([{"name": "gates", "mountPath": "/gates"}]),
            json!([{"name": "gates", "hostPath": {"path": gates, "type": "Directory"}}]),
        ),
        None => (json!([]), json!([])),
    };
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": restart_policy,
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": image, "command": ["sh", "-c", script], "volumeMounts": mounts}],
            "volumes": volumes,
        },
    })
}

/// Whether a Deployment's ReplicaSet made it.
pub fn is_of_deployment(pod: &Value) -> bool {
    pod.pointer("/metadata/ownerReferences/0/kind").is_some_and(|kind| kind == "ReplicaSet")
}

/// Whether it is Ready and stays.
pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    let ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    pod.pointer("/metadata/deletionTimestamp").is_none() && conditions.is_some_and(|conditions| conditions.iter().any(ready))
}

fn restarts(pod: &Value) -> u64 {
    pod.pointer("/status/containerStatuses/0/restartCount").and_then(Value::as_u64).unwrap_or(0)
}

/// What is to be known of a pod that is not as it should be.
pub fn describe(pod: &Value) -> String {
    format!("pod {} (deleted: {}): {}", name_of(pod), pod.pointer("/metadata/deletionTimestamp").unwrap_or(&Value::Null), pod["status"])
}
