//! A real etcd under ours: kubectl's commands, and two API servers that share it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use e2e::cluster::Cluster;
use e2e::http::Request;
use e2e::kubectl;
use e2e::servers::{Server, make_keys, start_etcd, start_ours_at, start_part};
use serde_json::{Value, json};

const EVENTUALLY: Duration = Duration::from_secs(120);
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";

#[test]
fn kubectl_on_a_real_etcd() -> Result<()> {
    let (Some(etcd), Some(client)) = (e2e::peer("etcd"), e2e::peer("kubectl")) else {
        e2e::skip("kubectl_on_a_real_etcd", "there is no etcd or kubectl: they are built by Go");
        return Ok(());
    };
    let mut cluster = Cluster::start_on_etcd("etcd", &etcd)?;
    kubectl::serve_images(&cluster)?;
    kubectl::commands(&cluster, &client)?;
    kubectl::over_a_restart(&mut cluster, &client)
}

fn ask(server: &mut Server, method: &str, path: &str, kind: &str, body: &Value) -> Result<Value> {
    let headers = vec!["Accept: application/json".to_owned(), format!("Content-Type: {kind}")];
    let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    let answer = server.ask(&Request { method, path, headers, body, ..Request::default() })?;
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    if answer.status >= 300 {
        bail!("{method} {path}: {}: {text}", answer.status);
    }
    serde_json::from_str(&text).with_context(|| format!("{method} {path}: bad JSON"))
}

/// Waits until this many pods are there and all of them have a node.
fn scheduled(server: &mut Server, wanted: usize) -> Result<()> {
    let deadline = Instant::now() + EVENTUALLY;
    loop {
        let list = ask(server, "GET", "/api/v1/namespaces/default/pods", "application/json", &Value::Null)?;
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        let placed = pods.iter().filter(|pod| pod["spec"]["nodeName"] == "n1").count();
        if pods.len() == wanted && placed == wanted {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{wanted} pods should be scheduled; {} are there, {placed} have a node", pods.len());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn web(replicas: u32) -> Value {
    let template = json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "web"}]}});
    let spec = json!({"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": template});
    json!({"metadata": {"name": "web"}, "spec": spec})
}

#[test]
fn two_servers_share_one_etcd() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    make_keys(folder)?;
    let Some((_etcd, url)) = start_etcd(folder)? else {
        e2e::skip("two_servers_share_one_etcd", "there is no etcd: it is built by Go");
        return Ok(());
    };
    // Both make the first objects at one time.
    let (first, second) = std::thread::scope(|scope| {
        let start = |name| {
            let url = &url;
            scope.spawn(move || start_ours_at(folder, name, url, "/registry"))
        };
        let (first, second) = (start("first"), start("second"));
        (first.join(), second.join())
    });
    let panicked = |_| anyhow::anyhow!("a thread panicked");
    let (mut first, mut second) = (first.map_err(panicked)??, second.map_err(panicked)??);
    let manager = ["controller-manager", "--node-monitor-grace-period=3600s"];
    let of_first = [
        start_part(folder, "manager-1", &first, &manager)?,
        start_part(folder, "scheduler-1", &first, &["scheduler", "--leader-elect=true"])?,
    ];
    let _of_second = [
        start_part(folder, "manager-2", &second, &manager)?,
        start_part(folder, "scheduler-2", &second, &["scheduler", "--leader-elect=true"])?,
    ];
    let conditions = json!([{"type": "Ready", "status": "True", "reason": "Test", "lastHeartbeatTime": null, "lastTransitionTime": null}]);
    let room = json!({"cpu": "8", "memory": "8Gi", "pods": "110"});
    ask(&mut first, "POST", "/api/v1/nodes", "application/json", &json!({"metadata": {"name": "n1"}}))?;
    let status = json!({"status": {"capacity": room, "allocatable": room, "conditions": conditions}});
    ask(&mut first, "PATCH", "/api/v1/nodes/n1/status", "application/strategic-merge-patch+json", &status)?;
    // What one server acknowledges the other shows at once.
    ask(&mut first, "POST", DEPLOYMENTS, "application/json", &web(3))?;
    ask(&mut second, "GET", &format!("{DEPLOYMENTS}/web"), "application/json", &Value::Null)?;
    let names = |list: Value| list["items"].as_array().map_or(0, Vec::len);
    assert_eq!(names(ask(&mut second, "GET", DEPLOYMENTS, "application/json", &Value::Null)?), 1);
    scheduled(&mut second, 3)?;
    let holder = |server: &mut Server, name: &str| -> Result<String> {
        let lease = ask(
            server,
            "GET",
            &format!("/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/{name}"),
            "application/json",
            &Value::Null,
        )?;
        Ok(lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned())
    };
    for name in ["kube-controller-manager", "kube-scheduler"] {
        assert!(!holder(&mut second, name)?.is_empty(), "{name} has a leader");
    }
    // One server and what hangs on it die; the other's take over.
    drop(of_first);
    drop(first);
    ask(&mut second, "PATCH", &format!("{DEPLOYMENTS}/web"), "application/merge-patch+json", &json!({"spec": {"replicas": 5}}))?;
    scheduled(&mut second, 5)
}
