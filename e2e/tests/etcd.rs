//! A real etcd under ours: kubectl's commands, and two API servers that share it, each with controllers and a scheduler.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use e2e::cluster::Cluster;
use e2e::http::{Client, Request};
use e2e::kubectl;
use e2e::servers::{Server, make_keys, start_etcd, start_ours_at, start_part};
use serde_json::{Value, json};

const EVENTUALLY: Duration = Duration::from_secs(120);
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";
const SERVICES_PATH: &str = "/api/v1/namespaces/default/services";
/// How many Services are created, by how many clients at one time.
const SERVICES: usize = 200;
const CLIENTS: usize = 20;
/// The addresses of 10.96.0.0/24 that are chosen from: all but the network, the broadcast and that of the servers.
const ADDRESSES: usize = 253;

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
        let mut pods = list["items"].as_array().cloned().unwrap_or_default();
        // No kubelet ends those that are deleted.
        pods.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
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
    let scheduler = ["scheduler", "--leader-elect=true"];
    let leaders = [start_part(folder, "manager-1", &first, &manager)?, start_part(folder, "scheduler-1", &first, &scheduler)?];
    let before = holders(&mut second, ["", ""])?;
    let _others = [start_part(folder, "manager-2", &second, &manager)?, start_part(folder, "scheduler-2", &second, &scheduler)?];
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
    assert_eq!(holders(&mut second, ["", ""])?, before, "the first to come lead");
    // The leaders are killed; the others take over, and a rollout goes on.
    drop(leaders);
    let killed = Instant::now();
    let change = json!({"spec": {"replicas": 5, "template": {"metadata": {"annotations": {"rolled": "out"}}}}});
    ask(&mut second, "PATCH", &format!("{DEPLOYMENTS}/web"), "application/merge-patch+json", &change)?;
    holders(&mut second, [&before[0], &before[1]])?;
    println!("both leases have new holders {:.1} s after the death of the old ones", killed.elapsed().as_secs_f64());
    // Two of the old stay, for none of the new becomes ready; of all there may be a quarter more.
    scheduled(&mut second, 7)?;
    allocations(first, &mut second)
}

/// Waits until both leases are held, and by others than these; answers the holders.
fn holders(server: &mut Server, others: [&str; 2]) -> Result<[String; 2]> {
    let deadline = Instant::now() + EVENTUALLY;
    loop {
        let mut holder = |name: &str| {
            let path = format!("/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/{name}");
            let lease = ask(server, "GET", &path, "application/json", &Value::Null).unwrap_or_default();
            lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned()
        };
        let found = [holder("kube-controller-manager"), holder("kube-scheduler")];
        if found.iter().zip(others).all(|(found, other)| !found.is_empty() && found != other) {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("the leases should be held, and not by {others:?}; they are by {found:?}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Services are created at both servers at once, and one server is killed in the midst of it: no cluster IP and no node port is given
/// twice, and once the Services are gone, all of them can be given out again.
fn allocations(first: Server, second: &mut Server) -> Result<()> {
    let made = AtomicUsize::new(0);
    let addresses = [first.address(), second.address()];
    let keys = second.keys().to_owned();
    std::thread::scope(|scope| -> Result<()> {
        let (made, keys) = (&made, &keys);
        let threads: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(move || create(addresses[number % 2], keys, number, made))).collect();
        while made.load(Ordering::Relaxed) < SERVICES / 2 && threads.iter().any(|thread| !thread.is_finished()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(first);
        for (number, thread) in threads.into_iter().enumerate() {
            let outcome = thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            // The clients of the killed server fail, whenever they come to it.
            if number % 2 == 1 {
                outcome?;
            }
        }
        Ok(())
    })?;
    let services = all_services(second)?;
    println!("{} Services were acknowledged, {} are there", made.load(Ordering::Relaxed), services.len());
    assert!(services.len() >= made.load(Ordering::Relaxed) && services.len() > SERVICES / 2);
    let ports: Vec<u64> = services.iter().map(|service| service["spec"]["ports"][0]["nodePort"].as_u64().unwrap_or_default()).collect();
    let ips: Vec<&str> = services.iter().map(|service| service["spec"]["clusterIP"].as_str().unwrap_or_default()).collect();
    assert_eq!(ips.iter().collect::<HashSet<_>>().len(), services.len(), "a cluster IP is given twice: {ips:?}");
    assert_eq!(ports.iter().collect::<HashSet<_>>().len(), services.len(), "a node port is given twice: {ports:?}");
    let taken =
        ask(second, "POST", SERVICES_PATH, "application/json", &service("taken", &json!({"clusterIP": ips[0], "ports": [{"port": 80}]})));
    assert!(taken.is_err_and(|error| error.to_string().contains("provided IP is already allocated")));
    let taken = service("taken", &json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": ports[0]}]}));
    let taken = ask(second, "POST", SERVICES_PATH, "application/json", &taken);
    assert!(taken.is_err_and(|error| error.to_string().contains("provided port is already allocated")));
    for service in &services {
        let name = service["metadata"]["name"].as_str().unwrap_or_default();
        ask(second, "DELETE", &format!("{SERVICES_PATH}/{name}"), "application/json", &Value::Null)?;
    }
    // All ports that were given out can be asked for, and as many Services as the range has addresses can be created.
    for number in 0..ADDRESSES {
        let spec = match ports.get(number) {
            Some(port) => json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]}),
            None => json!({"ports": [{"port": 80}]}),
        };
        ask(second, "POST", SERVICES_PATH, "application/json", &service(&format!("again-{number}"), &spec))
            .with_context(|| format!("Service {number} of {ADDRESSES}"))?;
    }
    let full = ask(second, "POST", SERVICES_PATH, "application/json", &service("full", &json!({"ports": [{"port": 80}]})));
    assert!(full.is_err_and(|error| error.to_string().contains("range is full")));
    Ok(())
}

/// Creates this client's part of the Services.
fn create(address: SocketAddr, keys: &Path, client: usize, made: &AtomicUsize) -> Result<()> {
    let mut connection = Client::new(address, keys)?;
    for number in 0..SERVICES / CLIENTS {
        let body = service(&format!("s-{client}-{number}"), &json!({"type": "NodePort", "ports": [{"port": 80}]})).to_string();
        let headers = vec!["Content-Type: application/json".to_owned()];
        let answer = connection.ask(&Request { method: "POST", path: SERVICES_PATH, headers, body: body.into(), ..Request::default() })?;
        if answer.status != 201 {
            bail!("{}: {}", answer.status, String::from_utf8_lossy(&answer.body));
        }
        made.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn service(name: &str, spec: &Value) -> Value {
    json!({"metadata": {"name": name}, "spec": spec})
}

/// All Services but that of the servers.
fn all_services(server: &mut Server) -> Result<Vec<Value>> {
    let list = ask(server, "GET", SERVICES_PATH, "application/json", &Value::Null)?;
    let mut all = list["items"].as_array().cloned().unwrap_or_default();
    all.retain(|service| service["metadata"]["name"] != "kubernetes");
    Ok(all)
}
