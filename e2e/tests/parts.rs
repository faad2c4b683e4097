//! Each part a process of its own, over TLS, with its own identity and the command line that `coracle parts` prints: kubectl's
//! commands, and deaths of single parts.

use anyhow::{Context, Result, ensure};
use e2e::api::{Api, eventually};
use e2e::cluster::Cluster;
use e2e::kubectl;
use serde_json::{Value, json};

const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";
const PODS: &str = "/api/v1/namespaces/default/pods?labelSelector=app%3Dsteady";

#[test]
fn kubectl_with_each_part_a_process() -> Result<()> {
    let mut cluster = Cluster::start_in_parts("parts")?;
    kubectl::serve_images(&cluster)?;
    match kubectl::clients().first() {
        Some(client) => {
            kubectl::commands(&cluster, client)?;
            kubectl::over_a_restart(&mut cluster, client)?;
        }
        None => e2e::skip("kubectl_with_each_part_a_process", "there is no kubectl"),
    }
    deaths(&mut cluster).with_context(|| cluster.log_tail())
}

/// Kills one part after the other. Meanwhile the Deployment is given another replica; when the part is back, there it is, and no
/// container that ran before has been ended.
fn deaths(cluster: &mut Cluster) -> Result<()> {
    let api = cluster.api();
    let template = json!({"metadata": {"labels": {"app": "steady"}}, "spec": {"terminationGracePeriodSeconds": 1,
        "containers": [{"name": "c", "image": "localhost:5000/tools:v1", "command": ["sleep", "1000000"]}]}});
    let spec = json!({"replicas": 1, "selector": {"matchLabels": {"app": "steady"}}, "template": template});
    let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "steady"}, "spec": spec});
    let (status, body) = api.ask("POST", DEPLOYMENTS, "application/json", &deployment.to_string())?;
    ensure!(status == 201, "{status}: {body}");
    ready(&api, 1)?;
    let parts = ["controller-manager", "scheduler", "kubelet", "cri", "kube-proxy", "apiserver"];
    for (number, part) in parts.into_iter().enumerate() {
        println!("--- kill -9 of {part}");
        let (replicas, before) = (number + 2, containers(&api)?);
        ensure!(before.len() == number + 1, "{before:?}");
        cluster.kill_part(part)?;
        if part != "apiserver" {
            scale(&api, replicas)?;
        }
        cluster.start_part(part)?;
        cluster.parts_ready().with_context(|| format!("after the death of {part}"))?;
        if part == "apiserver" {
            scale(&api, replicas)?;
        }
        ready(&api, replicas).with_context(|| format!("after the death of {part}"))?;
        let after = containers(&api)?;
        let lost: Vec<&String> = before.iter().filter(|id| !after.contains(id)).collect();
        ensure!(lost.is_empty(), "the death of {part} has ended containers: {lost:?}");
    }
    Ok(())
}

fn scale(api: &Api, replicas: usize) -> Result<()> {
    let patch = json!({"spec": {"replicas": replicas}}).to_string();
    let (status, body) = api.ask("PATCH", &format!("{DEPLOYMENTS}/steady"), "application/merge-patch+json", &patch)?;
    ensure!(status == 200, "{status}: {body}");
    Ok(())
}

fn ready(api: &Api, replicas: usize) -> Result<()> {
    eventually(&format!("{replicas} replicas are ready"), || {
        let deployment = api.object(&format!("{DEPLOYMENTS}/steady"))?;
        Ok(deployment["status"]["readyReplicas"] == replicas && deployment["status"]["replicas"] == replicas)
    })
}

/// The ids of the running containers.
fn containers(api: &Api) -> Result<Vec<String>> {
    let pods = api.object(PODS)?;
    let statuses = pods["items"].as_array().cloned().unwrap_or_default().into_iter();
    let running = statuses.map(|pod| pod["status"]["containerStatuses"][0].clone()).filter(|status| status["state"]["running"].is_object());
    Ok(running.filter_map(|status| status.get("containerID").and_then(Value::as_str).map(str::to_owned)).collect())
}
