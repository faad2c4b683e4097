//! The processes of pods, seen in the process table: one shim per pod, below the keeper, and nothing else but the containers.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use e2e::cluster::Cluster;
use e2e::table::running_containers;
use serde_json::{Value, json};

/// How many small pods run beside the large one.
const SMALL_PODS: usize = 20;
/// The image of all containers.
const IMAGE: &str = "localhost:5000/tools:v1";

#[test]
fn a_pod_has_one_shim_and_no_pause_process() -> Result<()> {
    let cluster = Cluster::start("pods")?;
    cluster.serve("tools", "v1", &e2e::images::busybox("v1")?);
    let api = cluster.api();

    api.create_pod(&large())?;
    let pod = api.wait_ready("large")?;
    let table = cluster.table()?;
    ensure!(table.shims().len() == 1, "one pod has these shims: {:?}", table.shims());
    let containers = running_containers(&pod)?;
    ensure!(containers.len() == 4, "a sidecar and three containers run, not {containers:?}");
    let shim = table.shim_of(&containers)?;
    ensure!(table.shims()[0].pid == shim, "the containers' parent is not the only shim");

    for number in 0..SMALL_PODS {
        api.create_pod(&small(number))?;
    }
    let mut shims = BTreeSet::from([shim]);
    let mut pods = Vec::new();
    for number in 0..SMALL_PODS {
        pods.push(api.wait_ready(&format!("small-{number}"))?);
    }
    let table = cluster.table()?;
    for pod in &pods {
        shims.insert(table.shim_of(&running_containers(pod)?)?);
    }
    let seen: BTreeSet<u32> = table.shims().iter().map(|shim| shim.pid).collect();
    ensure!(shims.len() == SMALL_PODS + 1, "{} pods have {} shims", SMALL_PODS + 1, shims.len());
    ensure!(seen == shims, "the keeper has other shims too: {seen:?}, of pods are {shims:?}");
    Ok(())
}

fn large() -> Value {
    let forever = |name: &str| json!({"name": name, "image": IMAGE, "command": ["sleep", "1000000"]});
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "large"},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "initContainers": [
                {"name": "init", "image": IMAGE, "command": ["true"]},
                {"name": "sidecar", "image": IMAGE, "command": ["sleep", "1000000"], "restartPolicy": "Always"},
            ],
            "containers": [forever("one"), forever("two"), forever("three")],
        },
    })
}

fn small(number: usize) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": format!("small-{number}")},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "only", "image": IMAGE, "command": ["sleep", "1000000"]}],
        },
    })
}
