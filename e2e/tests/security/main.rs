//! Who may do what: every port and socket that a running `coracle up` opens, every credential that it makes.
//!
//! What is open is found by listing, never by memory: a new port, socket, key or service account without a row here fails.

mod files;
mod kubelet;
mod ports;
mod roles;
mod streams;

use anyhow::{Context, Result, bail, ensure};
use e2e::api::Api;
use e2e::cluster::Cluster;
use serde_json::{Value, json};

/// The image of the pods.
const IMAGE: &str = "localhost:5000/tools:v1";
/// The pod whose shim's sockets are judged, and whose Secret its node may read.
const POD: &str = "user";

#[test]
fn nobody_can_do_more_than_upstream_lets_them() -> Result<()> {
    let cluster = Cluster::start("security")?;
    cluster.serve("tools", "v1", &e2e::images::busybox("v1")?);
    let api = cluster.api();
    for (path, object) in objects() {
        let (status, body) = api.ask("POST", path, "application/json", &object.to_string())?;
        ensure!(status == 201, "POST {path}: {status}: {body}");
    }
    let pod = api.wait_ready(POD)?;
    let parts: [(&str, Result<()>); 6] = [
        ("the ports", ports::judge(&cluster)),
        ("the unix sockets", ports::judge_unix(&cluster)),
        ("the files", files::judge(&cluster)),
        ("the streams", streams::judge(&cluster, &pod)),
        ("the kubelet", kubelet::judge(&cluster, &pod)),
        ("the components", roles::judge(&cluster)),
    ];
    let failed: Vec<String> =
        parts.into_iter().filter_map(|(part, outcome)| outcome.err().map(|error| format!("{part}: {error:#}"))).collect();
    ensure!(failed.is_empty(), "{}\n--- coracle up\n{}", failed.join("\n"), cluster.log_tail());
    Ok(())
}

/// Two Secrets, one of them used by a pod of the node; another node with a pod of its own.
fn objects() -> Vec<(&'static str, Value)> {
    let metadata = |name: &str| json!({"name": name});
    let secret = |name: &str| json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata(name), "stringData": {"word": "hush"}});
    let account = |name: &str| json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(name)});
    let pod = |name: &str, spec: Value| json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata(name), "spec": spec});
    let container = json!({"name": "main", "image": IMAGE, "command": ["sleep", "1000000"],
        "env": [{"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "used", "key": "word"}}}]});
    let elsewhere = json!({"nodeName": "elsewhere", "serviceAccountName": "foreign",
        "containers": [{"name": "main", "image": IMAGE, "envFrom": [{"secretRef": {"name": "foreign"}}]}]});
    vec![
        ("/api/v1/namespaces/default/secrets", secret("used")),
        ("/api/v1/namespaces/default/secrets", secret("unused")),
        ("/api/v1/namespaces/default/secrets", secret("foreign")),
        ("/api/v1/namespaces/default/serviceaccounts", account("foreign")),
        ("/api/v1/nodes", json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata("elsewhere")})),
        ("/api/v1/namespaces/default/pods", pod("elsewhere", elsewhere)),
        ("/api/v1/namespaces/default/pods", pod(POD, json!({"terminationGracePeriodSeconds": 1, "containers": [container]}))),
    ]
}

/// A request and the status that it must be answered with.
#[derive(Clone, Debug)]
struct Case {
    method: &'static str,
    path: String,
    body: String,
    status: u16,
}

/// A request without a body.
fn case(method: &'static str, path: impl Into<String>, status: u16) -> Case {
    Case { method, path: path.into(), body: String::new(), status }
}

/// A request with an object or a merge patch.
fn with_body(method: &'static str, path: impl Into<String>, body: &Value, status: u16) -> Case {
    Case { method, path: path.into(), body: body.to_string(), status }
}

/// Tries every case; the failures come together.
fn try_all(who: &str, api: &Api, cases: &[Case]) -> Result<()> {
    let mut wrong = Vec::new();
    for case in cases {
        let content_type = if case.method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        match api.ask(case.method, &case.path, content_type, &case.body) {
            Ok((status, _)) if status == case.status => {}
            Ok((status, body)) => wrong.push(format!("{who}: {} {}: {status}, not {}: {body}", case.method, case.path, case.status)),
            Err(error) => wrong.push(format!("{who}: {error:#}")),
        }
    }
    println!("{who}: {} requests, {} wrong", cases.len(), wrong.len());
    if wrong.is_empty() { Ok(()) } else { bail!("{} of {} requests:\n{}", wrong.len(), cases.len(), wrong.join("\n")) }
}

/// A token of a service account, as its pods get one.
fn token_of(api: &Api, namespace: &str, account: &str) -> Result<String> {
    let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let (status, body) = api.ask("POST", &path, "application/json", &request.to_string())?;
    ensure!(status == 201, "POST {path}: {status}: {body}");
    let answer: Value = serde_json::from_str(&body).with_context(|| format!("POST {path}: bad JSON"))?;
    answer["status"]["token"].as_str().map(str::to_owned).with_context(|| format!("POST {path}: no token"))
}

/// Goes on through all that may fail, and tells of every failure.
fn together(failures: impl IntoIterator<Item = Result<()>>) -> Result<()> {
    let failed: Vec<String> = failures.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    if failed.is_empty() { Ok(()) } else { bail!("{}", failed.join("\n")) }
}
