//! The pods of a soak whose every line and exit is accounted for: writers, that write until they are killed, and tasks, that write
//! so many lines and end with a code.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{PODS, Summary, choose, items, name_of};
use crate::api::{Api, eventually};
use crate::table::{Table, running_containers};

/// What a killed process ends with.
const KILLED: u64 = 137;
/// What is told of an exit that nobody saw.
const UNSEEN: u64 = 255;

/// A writer.
#[derive(Clone, Debug)]
struct Writer {
    uid: String,
    address: String,
    /// How often its container was killed by us: never more than once, for a second restart waits.
    kills: u64,
}

/// A pod that ends by itself.
#[derive(Clone, Debug)]
struct Task {
    lines: usize,
    code: u64,
    /// How often it was killed by us.
    killed: bool,
}

/// A container's first process.
pub struct Victim {
    /// Its id.
    pub pid: u32,
}

/// The pods, and what they must have become.
pub struct Pods<'a> {
    api: &'a Api,
    gates: &'a Path,
    writers: BTreeMap<String, Writer>,
    tasks: BTreeMap<String, Task>,
    /// Pods whose container was killed, by UID.
    killed: BTreeSet<String>,
    /// Pods that have been seen Ready, by UID, and how often they had been restarted by then: one whose container was being
    /// started when a daemon died is started anew.
    ready: BTreeMap<String, u64>,
    made: usize,
    /// Keepers and shims have died, so that containers may have lost everyone who waits for them.
    keeper_died: bool,
    shim_died: bool,
}

impl<'a> Pods<'a> {
    pub fn new(api: &'a Api, gates: &'a Path) -> Pods<'a> {
        Pods {
            api,
            gates,
            writers: BTreeMap::new(),
            tasks: BTreeMap::new(),
            killed: BTreeSet::new(),
            ready: BTreeMap::new(),
            made: 0,
            keeper_died: false,
            shim_died: false,
        }
    }

    /// Makes writers until there are so many that were never killed; the others go.
    pub fn fill_up(&mut self, count: usize) -> Result<()> {
        let spent: Vec<String> = self.writers.iter().filter(|(_, writer)| writer.kills > 0).map(|(name, _)| name.clone()).collect();
        for name in spent {
            self.writers.remove(&name);
            self.api.delete_pod(&name)?;
        }
        let mut fresh = Vec::new();
        while self.writers.len() + fresh.len() < count {
            let name = self.next("writer");
            // Told to the log first: a file that names a line which the log lacks is the proof of a loss.
            let script = format!(
                "busybox mkfifo /tmp/clock; exec 3<>/tmp/clock; n=0; while [ -e /gates/{name}.$n ]; do n=$((n+1)); done; i=0; \
                 while true; do i=$((i+1)); echo line $i; echo $i > /gates/{name}.$n; read -t 0.01 x <&3; done"
            );
            self.api.create_pod(&manifest(&name, &script, "Always", Some(self.gates)))?;
            fresh.push(name);
        }
        for name in fresh {
            let pod = self.api.wait_ready(&name)?;
            let text =
                |path: &str| pod.pointer(path).and_then(Value::as_str).map(str::to_owned).context("a pod that is Ready has an address");
            self.writers.insert(name, Writer { uid: text("/metadata/uid")?, address: text("/status/podIP")?, kills: 0 });
        }
        Ok(())
    }

    fn next(&mut self, kind: &str) -> String {
        self.made += 1;
        format!("{kind}-{}", self.made)
    }

    /// Makes a task.
    pub fn create_task(&mut self, lines: usize, code: usize) -> Result<()> {
        let name = self.next("task");
        let script = format!(
            "busybox mkfifo /tmp/clock; exec 3<>/tmp/clock; i=0; \
             while [ $i -lt {lines} ]; do i=$((i+1)); echo line $i; read -t 0.01 x <&3; done; exit {code}"
        );
        self.api.create_pod(&manifest(&name, &script, "Never", None))?;
        self.tasks.insert(name, Task { lines, code: code as u64, killed: false });
        Ok(())
    }

    /// How many tasks are not judged yet.
    pub fn tasks(&self) -> usize {
        self.tasks.len()
    }

    /// The keeper is about to die.
    pub fn keeper_dies(&mut self) {
        self.keeper_died = true;
    }

    /// A shim is about to die.
    pub fn shim_dies(&mut self) {
        self.shim_died = true;
    }

    /// The process of a container that was never killed before.
    pub fn victim(&mut self, table: &Table, victim: usize) -> Option<Victim> {
        // Without the server it is not known which container is whose: then none is killed.
        let pods = items(&self.api.object(PODS).ok()?);
        let mut all = Vec::new();
        for pod in pods.iter().filter(|pod| pod.pointer("/metadata/deletionTimestamp").is_none()) {
            let uid = pod.pointer("/metadata/uid").and_then(Value::as_str).unwrap_or_default();
            for id in running_containers(pod).unwrap_or_default() {
                if let Some(process) = table.first_in_cgroup(&id).filter(|_| !self.killed.contains(uid)) {
                    all.push((name_of(pod).to_owned(), uid.to_owned(), process.pid));
                }
            }
        }
        let (name, uid, pid) = choose(&all, victim)?.clone();
        self.killed.insert(uid);
        if let Some(writer) = self.writers.get_mut(&name) {
            writer.kills += 1;
        }
        if let Some(task) = self.tasks.get_mut(&name) {
            task.killed = true;
        }
        Some(Victim { pid })
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
    pub fn judge(&mut self, summary: &mut Summary) -> Result<()> {
        let pods = items(&self.api.object(PODS)?);
        self.judge_restarts(&pods, summary);
        for (name, writer) in self.writers.clone() {
            if let Err(error) = self.judge_writer(&name, &writer, summary) {
                summary.lost.push(format!("{error:#}"));
            }
        }
        for (name, task) in std::mem::take(&mut self.tasks) {
            if let Err(error) = self.judge_task(&name, &task, summary) {
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
            let uid = pod.pointer("/metadata/uid").and_then(Value::as_str).unwrap_or_default();
            let expected = self.ready.get(uid).map(|before| before + u64::from(self.killed.contains(uid)));
            if expected.is_some_and(|expected| restarts(pod) > expected) {
                summary.lost.push(format!("more restarts than {expected:?}: {}", describe(pod)));
            }
            ready.insert(uid.to_owned(), self.ready.get(uid).copied().unwrap_or_else(|| restarts(pod)));
        }
        self.ready = ready;
    }

    fn judge_writer(&self, name: &str, writer: &Writer, summary: &mut Summary) -> Result<()> {
        let pod = self.api.pod(name)?;
        let text = |path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        ensure!(text("/metadata/uid") == writer.uid, "{name} is another pod");
        ensure!(text("/status/podIP") == writer.address, "{name} had the address {}, and has {}", writer.address, text("/status/podIP"));
        let path = format!("{PODS}/{name}/log");
        if writer.kills > 0 {
            let ended = &pod["status"]["containerStatuses"][0]["lastState"]["terminated"];
            self.judge_code(name, ended, KILLED, summary)?;
            self.judge_lines(name, 0, &format!("{path}?previous=true"))?;
        }
        self.judge_lines(name, writer.kills, &path)
    }

    /// The log is numbered without a gap, and has all lines that its writer says it has written, at once or a moment later.
    fn judge_lines(&self, name: &str, incarnation: u64, path: &str) -> Result<()> {
        let told = fs::read_to_string(self.gates.join(format!("{name}.{incarnation}"))).unwrap_or_default();
        // The writer may be in the middle of writing its file.
        let told: usize = told.trim().parse().unwrap_or(0);
        let mut lines = 0;
        let there = eventually("the log has all lines", || {
            lines = count(&self.api.get(path)?).with_context(|| format!("log {incarnation} of {name}"))?;
            Ok(lines >= told)
        });
        there.with_context(|| format!("log {incarnation} of {name} has {lines} lines, and {told} were written"))
    }

    fn judge_task(&self, name: &str, task: &Task, summary: &mut Summary) -> Result<()> {
        let pod = self.api.pod(name)?;
        let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
        let lines = count(&self.api.log(name)?).with_context(|| format!("log of {name}"))?;
        if task.killed && lines < task.lines {
            return self.judge_code(name, ended, KILLED, summary);
        }
        self.judge_code(name, ended, task.code, summary).or_else(|error| {
            // It may have been killed between its last line and its end.
            if task.killed { self.judge_code(name, ended, KILLED, summary) } else { Err(error) }
        })?;
        ensure!(lines == task.lines, "{name} wrote {} lines, and its log has {lines}", task.lines);
        Ok(())
    }

    fn judge_code(&self, name: &str, ended: &Value, code: u64, summary: &mut Summary) -> Result<()> {
        match ended["exitCode"].as_u64() {
            Some(told) if told == code => Ok(()),
            // The one case of DESIGN.md: nobody was there to see it.
            Some(UNSEEN) if self.keeper_died && self.shim_died => {
                summary.unseen_exits += 1;
                Ok(())
            }
            _ => anyhow::bail!("{name} ended with {code}, and this is told: {ended}"),
        }
    }

    /// Removes writers and tasks.
    pub fn remove_all(&mut self) -> Result<()> {
        for name in self.writers.keys().chain(self.tasks.keys()) {
            self.api.delete_pod(name)?;
        }
        Ok(())
    }
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
pub fn manifest(name: &str, script: &str, restart_policy: &str, gates: Option<&Path>) -> Value {
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
            "containers": [{"name": "main", "image": "localhost:5000/tools:v1", "command": ["sh", "-c", script], "volumeMounts": mounts}],
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
