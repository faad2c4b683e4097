//! Services: pods and the host reach them from the first second and through every change.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::api::{Api, eventually};
use e2e::cluster::Cluster;
use serde_json::{Value, json};

/// The image of all containers.
const IMAGE: &str = "localhost:5000/tools:v1";
/// The node's address, of the uplink.
const NODE: &str = "192.0.2.10";
const NODE_PORT: u16 = 30080;
/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(20);
const SERVICES: &str = "/api/v1/namespaces/default/services";
const DEPLOYMENT: &str = "/apis/apps/v1/namespaces/default/deployments/web";
const MERGE: &str = "application/merge-patch+json";

#[test]
fn services_are_reached_through_every_change() -> Result<()> {
    let cluster = Cluster::start_with_uplink("services")?;
    cluster.serve("tools", "v1", &e2e::images::busybox("v1")?);
    let api = cluster.api();
    a_pod_reads_itself_in_its_first_second(&api)?;
    let address = make_web(&api)?;
    a_pod_reaches_itself_through_its_service(&api)?;
    nothing_fails_while_pods_come_and_go(&cluster, &api, &address)?;
    clients_stay_when_asked_to(&cluster, &api, &address)?;
    policies_and_absence(&cluster, &api, &address)?;
    the_ways_outlive_the_proxy(cluster, &address)
}

fn post(api: &Api, path: &str, object: &Value) -> Result<Value> {
    match api.ask("POST", path, "application/json", &object.to_string())? {
        (201, body) => Ok(serde_json::from_str(&body)?),
        (status, body) => bail!("POST {path}: {status}: {body}"),
    }
}

fn patch(api: &Api, path: &str, change: &Value) -> Result<()> {
    match api.ask("PATCH", path, MERGE, &change.to_string())? {
        (200, _) => Ok(()),
        (status, body) => bail!("PATCH {path}: {status}: {body}"),
    }
}

/// A pod with the host's curl (busybox' static wget dies of its resolver).
fn with_curl(name: &str, script: &str) -> Value {
    let folders: Vec<&str> = ["/usr", "/lib", "/lib64"].into_iter().filter(|path| std::fs::exists(path).unwrap_or(false)).collect();
    let volume = |path: &str| format!("host{}", path.replace('/', "-"));
    let volumes: Vec<Value> = folders.iter().map(|path| json!({"name": volume(path), "hostPath": {"path": path}})).collect();
    let mounts: Vec<Value> = folders.iter().map(|path| json!({"name": volume(path), "mountPath": path, "readOnly": true})).collect();
    json!({"metadata": {"name": name, "labels": {"app": name}}, "spec": {"terminationGracePeriodSeconds": 1, "volumes": volumes,
        "containers": [{"name": "main", "image": IMAGE, "command": ["sh", "-c", script], "volumeMounts": mounts,
            "env": [{"name": "PATH", "value": "/bin:/usr/bin"}]}]}})
}

/// The API server by the Service `kubernetes`, its authority and the pod's token, with one try and no wait. The client is the host's curl.
fn a_pod_reads_itself_in_its_first_second(api: &Api) -> Result<()> {
    let rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/default";
    let role = json!({"metadata": {"name": "reader"}, "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}]});
    post(api, &format!("{rbac}/roles"), &role)?;
    let binding = json!({"metadata": {"name": "reader"}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"},
        "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": "default"}]});
    post(api, &format!("{rbac}/rolebindings"), &binding)?;
    let script = "cd /var/run/secrets/kubernetes.io/serviceaccount && \
        curl --silent --show-error --max-time 20 --cacert ca.crt --header \"Authorization: Bearer $(cat token)\" \
        \"https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/api/v1/namespaces/default/pods/$HOSTNAME\" 2>&1; echo; sleep 1000000";
    let pod = with_curl("self", script);
    api.create_pod(&pod)?;
    let uid = api.wait_ready("self")?["metadata"]["uid"].as_str().context("the pod has no uid")?.to_owned();
    let mut log = String::new();
    eventually("the pod has its answer", || {
        log = api.log("self")?;
        Ok(!log.trim().is_empty())
    })?;
    eventually("the pod has read itself", || Ok(api.log("self")?.contains(&uid))).with_context(|| format!("it read: {log}"))?;
    // There is no cluster DNS, which is told as upstream does.
    ensure!(api.events("self")?.contains("MissingClusterDNS"), "no event MissingClusterDNS: {}", api.events("self")?);
    api.delete_pod("self")
}

/// A Deployment whose pods serve on for a while when they are asked to end, behind a Service; gives the cluster IP.
fn make_web(api: &Api) -> Result<String> {
    let serve = "mkdir -p /tmp/www && hostname > /tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www";
    let container = json!({"name": "web", "image": IMAGE, "command": ["sh", "-c", serve],
        "ports": [{"name": "http", "containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/index.html", "port": "http"}, "periodSeconds": 1},
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", "3"]}}}});
    let deployment = json!({"metadata": {"name": "web"}, "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}},
        "strategy": {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"terminationGracePeriodSeconds": 10, "containers": [container]}}}});
    post(api, "/apis/apps/v1/namespaces/default/deployments", &deployment)?;
    let service = json!({"metadata": {"name": "web"}, "spec": {"type": "NodePort", "selector": {"app": "web"},
        "ports": [{"name": "http", "port": 80, "targetPort": "http", "nodePort": NODE_PORT}]}});
    let made = post(api, SERVICES, &service)?;
    rolled_out(api, 2)?;
    Ok(made["spec"]["clusterIP"].as_str().context("the Service has no cluster IP")?.to_owned())
}

/// All pods of the newest template are available, and no others are left.
fn rolled_out(api: &Api, replicas: u64) -> Result<()> {
    eventually(&format!("{replicas} pods are rolled out"), || {
        let deployment = api.object(DEPLOYMENT)?;
        let count = |name: &str| deployment["status"][name].as_u64().unwrap_or(0);
        Ok(deployment["status"]["observedGeneration"] == deployment["metadata"]["generation"]
            && ["replicas", "updatedReplicas", "availableReplicas"].iter().all(|name| count(name) == replicas)
            && ready_endpoints(api, "web")? == replicas)
    })
}

fn ready_endpoints(api: &Api, service: &str) -> Result<u64> {
    let path = format!("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices?labelSelector=kubernetes.io/service-name%3D{service}");
    let slices = api.object(&path)?;
    let endpoints = slices["items"].as_array().into_iter().flatten().flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
    Ok(endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true).count() as u64)
}

/// The only endpoint of a Service is the pod that asks: the answer must come back by the host.
fn a_pod_reaches_itself_through_its_service(api: &Api) -> Result<()> {
    let service =
        json!({"metadata": {"name": "lonely"}, "spec": {"selector": {"app": "lonely"}, "ports": [{"port": 80, "targetPort": 8080}]}});
    let made = post(api, SERVICES, &service)?;
    let address = made["spec"]["clusterIP"].as_str().context("the Service has no cluster IP")?;
    let script = format!(
        "mkdir -p /tmp/www && echo reached > /tmp/www/index.html && httpd -p 8080 -h /tmp/www && \
         until curl --silent --fail --max-time 5 http://{address}/index.html; do sleep 0.2; done; sleep 1000000"
    );
    let pod = with_curl("lonely", &script);
    api.create_pod(&pod)?;
    eventually("the pod reached itself", || Ok(api.wait_ready("lonely").is_ok() && api.log("lonely")?.contains("reached")))?;
    api.delete_pod("lonely")
}

/// One request; gives the name of the pod that answered.
fn fetch(to: &str) -> Result<String> {
    let address: SocketAddr = to.parse()?;
    let mut stream = TcpStream::connect_timeout(&address, REQUEST).with_context(|| format!("failed to connect to {to}"))?;
    stream.set_read_timeout(Some(REQUEST))?;
    write!(stream, "GET /index.html HTTP/1.0\r\nHost: web\r\n\r\n").context("failed to ask")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("failed to read the answer")?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer: {answer:?}"))?;
    ensure!(head.starts_with("HTTP/1.") && head.contains(" 200 "), "the answer is {head:?}");
    Ok(body.trim().to_owned())
}

fn nothing_fails_while_pods_come_and_go(cluster: &Cluster, api: &Api, address: &str) -> Result<()> {
    let ways = [format!("{address}:80"), format!("{NODE}:{NODE_PORT}")];
    let once = ways
        .iter()
        .map(|way| format!("curl --silent --show-error --fail --max-time 20 http://{way}/index.html 2>&1 || echo FAILED {way}"))
        .collect::<Vec<_>>()
        .join("; ");
    let script = format!("while true; do {once}; sleep 0.05; done");
    api.create_pod(&with_curl("asker", &script))?;
    api.wait_ready("asker")?;
    let stop = AtomicBool::new(false);
    let asking = || -> Result<(usize, BTreeSet<String>)> {
        let (mut count, mut pods) = (0, BTreeSet::new());
        while !stop.load(Ordering::Relaxed) {
            for way in &ways {
                pods.insert(fetch(way).with_context(|| format!("after {count} requests"))?);
                count += 1;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok((count, pods))
    };
    let (changed, asked) = std::thread::scope(|scope| {
        let host = scope.spawn(|| cluster.inside(asking));
        let changed = change(api);
        stop.store(true, Ordering::Relaxed);
        (changed, host.join())
    });
    changed?;
    let (count, pods) = asked.map_err(|_| anyhow::anyhow!("the asking thread panicked"))???;
    ensure!(count > 20 && pods.len() > 3, "{count} requests reached only {pods:?}");
    let log = api.log("asker")?;
    let answers: BTreeSet<&str> = log.lines().filter(|line| line.starts_with("web-")).collect();
    ensure!(!log.contains("FAILED"), "requests of a pod failed:\n{log}");
    ensure!(answers.len() > 3, "a pod reached only {answers:?}");
    api.delete_pod("asker")
}

/// Scales up and down, and rolls out a new template.
fn change(api: &Api) -> Result<()> {
    for replicas in [4, 1, 2] {
        patch(api, DEPLOYMENT, &json!({"spec": {"replicas": replicas}}))?;
        rolled_out(api, replicas)?;
    }
    patch(api, DEPLOYMENT, &json!({"spec": {"template": {"metadata": {"annotations": {"rolled": "out"}}}}}))?;
    rolled_out(api, 2)
}

/// Which pods answer some requests in a row.
fn asked(cluster: &Cluster, way: &str, times: usize) -> Result<BTreeSet<String>> {
    cluster.inside(|| (0..times).map(|_| fetch(way)).collect())?
}

fn clients_stay_when_asked_to(cluster: &Cluster, api: &Api, address: &str) -> Result<()> {
    let way = format!("{address}:80");
    ensure!(asked(cluster, &way, 40)?.len() == 2, "40 requests reached not both pods");
    let path = format!("{SERVICES}/web");
    patch(api, &path, &json!({"spec": {"sessionAffinity": "ClientIP"}}))?;
    eventually("a client stays with its pod", || Ok(asked(cluster, &way, 20)?.len() == 1))?;
    patch(api, &path, &json!({"spec": {"sessionAffinity": "None"}}))?;
    eventually("clients are led to all pods again", || Ok(asked(cluster, &way, 40)?.len() == 2))
}

fn policies_and_absence(cluster: &Cluster, api: &Api, address: &str) -> Result<()> {
    let (way, node) = (format!("{address}:80"), format!("{NODE}:{NODE_PORT}"));
    let path = format!("{SERVICES}/web");
    // All endpoints are on this node, so Local reaches them as Cluster does.
    patch(api, &path, &json!({"spec": {"internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local"}}))?;
    eventually("the policies Local lead to both pods", || {
        Ok(asked(cluster, &way, 40)?.len() == 2 && asked(cluster, &node, 40)?.len() == 2)
    })?;
    patch(api, &path, &json!({"spec": {"selector": {"app": "nobody"}}}))?;
    eventually("a Service without endpoints refuses", || {
        let refused = |way: &str| -> Result<bool> {
            let error = cluster.inside(|| TcpStream::connect_timeout(&way.parse().expect("an address"), REQUEST).err())?;
            Ok(error.is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused))
        };
        Ok(refused(&way)? && refused(&node)?)
    })?;
    patch(api, &path, &json!({"spec": {"selector": {"app": "web"}}}))?;
    eventually("it leads to its pods again", || Ok(asked(cluster, &way, 5).is_ok()))
}

/// The kernel leads on without a proxy; a new one takes the table over; `down` removes it.
fn the_ways_outlive_the_proxy(cluster: Cluster, address: &str) -> Result<()> {
    let mut cluster = cluster;
    let way = format!("{address}:80");
    cluster.kill()?;
    asked(&cluster, &way, 20).context("while nothing of Coracle runs")?;
    cluster.up()?;
    asked(&cluster, &way, 20).context("after the restart")?;
    cluster.stop()?;
    let coracle = e2e::ours("coracle")?;
    let data = cluster.data();
    let down = cluster.run(&coracle, &["down", "--data-dir", &data.to_string_lossy()], "")?;
    ensure!(down.status.success(), "down failed: {}", String::from_utf8_lossy(&down.stderr));
    let tables = cluster.inside(|| linux::nftables::Nftables::open()?.tables(linux::nftables::TableFamily::Ipv4))??;
    ensure!(tables.is_empty(), "down left the tables {tables:?}");
    Ok(())
}
