//! Pods that write a numbered line every 10 ms, and what a death must not change of them.

use anyhow::{Context, Result, ensure};
use e2e::api::{Api, eventually};
use e2e::cluster::Cluster;
use e2e::table::running_containers;
use serde_json::{Value, json};

/// The script of a writer. It waits by reading a FIFO that nobody writes, for that costs no process each time.
pub const SCRIPT: &str =
    "busybox mkfifo /tmp/clock; exec 3<>/tmp/clock; i=0; while true; do i=$((i+1)); echo line $i; read -t 0.01 x <&3; done";

/// The pods of a test.
pub struct Writers(Vec<Identity>);

/// What a death must not change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    uid: String,
    address: String,
    container: String,
    restarts: u64,
    deleted: bool,
}

impl Writers {
    /// Creates so many, and waits until all write.
    pub fn create(api: &Api, count: usize) -> Result<Writers> {
        for number in 0..count {
            api.create_pod(&writer(number))?;
        }
        let identities = (0..count).map(|number| Identity::of(&api.wait_ready(&name(number))?));
        Ok(Writers(identities.collect::<Result<_>>()?))
    }

    /// Each is still the same: not deleted, not restarted, with its address.
    pub fn check(&self, api: &Api) -> Result<()> {
        for (number, before) in self.0.iter().enumerate() {
            let now = Identity::of(&api.wait_ready(&name(number))?)?;
            ensure!(now == *before, "{} was {before:?}, and is {now:?}", name(number));
        }
        Ok(())
    }

    /// In the process table each container's parent is its shim, and above that is the keeper.
    pub fn check_processes(&self, cluster: &Cluster) -> Result<()> {
        let api = cluster.api();
        for number in 0..self.0.len() {
            let containers = running_containers(&api.pod(&name(number))?)?;
            // A table that was read while something was executed in a pod shows that, too.
            let mut last = Ok(());
            let judged = eventually("the containers' parents are shims", || {
                last = cluster.table().and_then(|table| table.shim_of(&containers)).map(drop);
                Ok(last.is_ok())
            });
            last.and(judged).with_context(|| name(number))?;
        }
        Ok(())
    }

    /// How many lines each has written; a line that is missing, doubled or torn is an error.
    pub fn lines(&self, api: &Api) -> Result<Vec<usize>> {
        let logs = (0..self.0.len()).map(|number| {
            let name = name(number);
            api.log(&name).and_then(|log| count(&log)).with_context(|| format!("log of {name}"))
        });
        logs.collect()
    }

    /// Waits until each has written so many lines more than `before`.
    pub fn write_on(&self, api: &Api, before: &[usize], more: usize) -> Result<()> {
        for (number, before) in before.iter().enumerate() {
            let path = format!("/api/v1/namespaces/default/pods/{}/log?tailLines=1", name(number));
            eventually(&format!("{} has written on", name(number)), || Ok(number_of(&api.get(&path)?)? >= before + more))?;
        }
        Ok(())
    }
}

impl Identity {
    fn of(pod: &Value) -> Result<Identity> {
        let text = |path: &str| {
            let value = pod.pointer(path).and_then(Value::as_str).map(str::to_owned);
            value.with_context(|| format!("the pod has no {path}: {pod}"))
        };
        Ok(Identity {
            uid: text("/metadata/uid")?,
            address: text("/status/podIP")?,
            container: text("/status/containerStatuses/0/containerID")?,
            restarts: pod.pointer("/status/containerStatuses/0/restartCount").and_then(Value::as_u64).context("no restartCount")?,
            deleted: pod.pointer("/metadata/deletionTimestamp").is_some(),
        })
    }
}

/// How many lines a log has; they must be numbered from 1 without a gap.
pub fn count(log: &str) -> Result<usize> {
    let mut count = 0;
    for line in log.lines() {
        count += 1;
        ensure!(line == format!("line {count}"), "line {count} is {line:?}");
    }
    Ok(count)
}

/// The number of the last line; 0 without one.
pub fn number_of(tail: &str) -> Result<usize> {
    match tail.lines().last() {
        Some(line) => line.strip_prefix("line ").and_then(|number| number.parse().ok()).with_context(|| format!("a line is {line:?}")),
        None => Ok(0),
    }
}

fn name(number: usize) -> String {
    format!("writer-{number}")
}

fn writer(number: usize) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name(number)},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "writer", "image": "localhost:5000/tools:v1", "command": ["sh", "-c", SCRIPT]}],
        },
    })
}
