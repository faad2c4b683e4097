//! `coracle up` dies or stops while pods write and a client writes: nothing that was acknowledged or printed is lost.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::api::{Api, eventually};
use e2e::cluster::Cluster;
use serde_json::{Value, json};

/// How many pods write.
const PODS: usize = 5;
/// How often `coracle up` is killed.
const DEATHS: usize = 5;
/// How long it is stopped.
const STOPPED: Duration = Duration::from_secs(10);
/// How many lines each pod must write while it is stopped, at the least: one every 10 ms would be 1000.
const LINES_WHILE_STOPPED: usize = 100;
/// How many lines each pod writes between two deaths, at the least.
const LINES_BETWEEN: usize = 50;
/// How many lines each pod writes after the stop before it is looked at.
const LINES_SETTLED: usize = 300;
/// How many objects the client must have had acknowledged at the end, at the least.
const OBJECTS: usize = 20;
/// The objects of the client.
const CONFIGMAPS: &str = "/api/v1/namespaces/default/configmaps";

#[test]
fn deaths_lose_nothing() -> Result<()> {
    let mut cluster = Cluster::start("deaths")?;
    cluster.serve("tools", "v1", &e2e::images::busybox("v1")?);
    let api = cluster.api();
    for number in 0..PODS {
        api.create_pod(&writer(number))?;
    }
    let mut pods = Vec::new();
    for number in 0..PODS {
        pods.push(Identity::of(&api.wait_ready(&name(number))?)?);
    }

    let over = AtomicBool::new(false);
    let (died, written) = std::thread::scope(|scope| {
        let client = scope.spawn(|| write_until(&api, &over));
        let died = die(&mut cluster, &api, &pods);
        over.store(true, Ordering::Relaxed);
        (died, client.join())
    });
    died.with_context(|| format!("--- coracle up\n{}", cluster.log_tail()))?;
    written.map_err(|_| anyhow::anyhow!("the client panicked"))?.check(&api)?;

    let before = lines_of_all(&api)?;
    let pid_before = cluster.pid();
    cluster.stop()?;
    let start = Instant::now();
    while start.elapsed() < STOPPED {
        std::thread::sleep(STOPPED.saturating_sub(start.elapsed()));
    }
    cluster.up()?;
    ensure!(cluster.pid() != pid_before, "coracle up was not started again");
    let after = lines_of_all(&api)?;
    for (number, (before, after)) in before.iter().zip(&after).enumerate() {
        ensure!(*after >= before + LINES_WHILE_STOPPED, "{} wrote {before} lines, and {after} after the stop", name(number));
    }
    // The new kubelet has seen all pods by then, and would have ended what it does not know.
    write_on(&api, &after, LINES_SETTLED)?;
    check_pods(&api, &pods)
}

/// Kills `coracle up` again and again; between two deaths every pod writes on.
fn die(cluster: &mut Cluster, api: &Api, pods: &[Identity]) -> Result<()> {
    for death in 0..DEATHS {
        let before = lines_of_all(api)?;
        cluster.kill()?;
        cluster.up().with_context(|| format!("after death {death}"))?;
        write_on(api, &before, LINES_BETWEEN)?;
        check_pods(api, pods).with_context(|| format!("after death {death}"))?;
    }
    Ok(())
}

/// Waits until every pod has written so many lines more than `before`.
fn write_on(api: &Api, before: &[usize], more: usize) -> Result<()> {
    eventually("every pod has written on", || {
        let after = lines_of_all(api)?;
        Ok(before.iter().zip(after).all(|(before, after)| after >= before + more))
    })
}

/// What a death must not change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    uid: String,
    address: String,
    container: String,
    restarts: u64,
    deleted: bool,
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

fn check_pods(api: &Api, pods: &[Identity]) -> Result<()> {
    for (number, before) in pods.iter().enumerate() {
        let now = Identity::of(&api.wait_ready(&name(number))?)?;
        ensure!(now == *before, "{} was {before:?}, and is {now:?}", name(number));
    }
    Ok(())
}

/// How many lines each pod has written; a line that is missing, doubled or torn is an error.
fn lines_of_all(api: &Api) -> Result<Vec<usize>> {
    (0..PODS).map(|number| count(&api.log(&name(number))?).with_context(|| format!("log of {}", name(number)))).collect()
}

fn count(log: &str) -> Result<usize> {
    let mut count = 0;
    for line in log.lines() {
        count += 1;
        ensure!(line == format!("line {count}"), "line {count} is {line:?}");
    }
    Ok(count)
}

fn name(number: usize) -> String {
    format!("writer-{number}")
}

fn writer(number: usize) -> Value {
    let script = "i=0; while true; do i=$((i+1)); echo line $i; sleep 0.01; done";
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name(number)},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "writer", "image": "localhost:5000/tools:v1", "command": ["sh", "-c", script]}],
        },
    })
}

/// What the client knows of an object: the last write, and whether it was answered.
#[derive(Clone, Debug)]
struct Known {
    /// The value that the last acknowledged write gave it; none before the creation and after the deletion.
    acknowledged: Option<Written>,
    /// What a write that got no answer would have made of it, if there was one after that.
    unanswered: Option<Option<&'static str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Written {
    value: String,
    revision: String,
}

/// All objects that the client tried to write.
struct Ledger(BTreeMap<String, Known>);

/// Creates, patches and deletes objects until `over`. The first write without an answer ends the work on an object.
fn write_until(api: &Api, over: &AtomicBool) -> Ledger {
    let mut ledger = BTreeMap::new();
    let mut number = 0;
    while !over.load(Ordering::Relaxed) {
        let name = format!("object-{number}");
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"value": "created"}});
        let patch = json!({"data": {"value": "patched"}});
        let path = format!("{CONFIGMAPS}/{name}");
        let mut writes = vec![
            ("POST", CONFIGMAPS, "application/json", object.to_string(), Some("created")),
            ("PATCH", path.as_str(), "application/merge-patch+json", patch.to_string(), Some("patched")),
        ];
        if number % 3 == 0 {
            writes.push(("DELETE", &path, "", String::new(), None));
        }
        let mut known = Known { acknowledged: None, unanswered: None };
        for (method, path, content_type, body, becomes) in writes {
            match api.ask(method, path, content_type, &body) {
                Ok((200 | 201, answer)) => known.acknowledged = becomes.and_then(|_| written(&answer)),
                _ => {
                    known.unanswered = Some(becomes);
                    break;
                }
            }
        }
        ledger.insert(name, known);
        number += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ledger(ledger)
}

fn written(object: &str) -> Option<Written> {
    let object: Value = serde_json::from_str(object).ok()?;
    let text = |path: &str| object.pointer(path).and_then(Value::as_str).map(str::to_owned);
    Some(Written { value: text("/data/value")?, revision: text("/metadata/resourceVersion")? })
}

impl Ledger {
    /// Compares with what the server has now.
    fn check(&self, api: &Api) -> Result<()> {
        let list = api.object(CONFIGMAPS)?;
        let mut found = BTreeMap::new();
        for item in list["items"].as_array().into_iter().flatten() {
            let name = item.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
            found.insert(name.to_owned(), written(&item.to_string()));
        }
        for (name, known) in &self.0 {
            let now = found.get(name).cloned().flatten();
            let as_acknowledged = now == known.acknowledged;
            let value = now.as_ref().map(|written| written.value.as_str());
            let as_unanswered = known.unanswered.is_some_and(|becomes| value == becomes);
            ensure!(as_acknowledged || as_unanswered, "{name} is {now:?}, but the client knows {known:?}");
        }
        let answered = self.0.values().filter(|known| known.unanswered.is_none()).count();
        println!("{answered} of {} objects were written with every answer", self.0.len());
        ensure!(answered >= OBJECTS, "only {answered} objects were written with every answer");
        Ok(())
    }
}
