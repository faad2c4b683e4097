//! What a kubelet's credential is good for: its own node, the pods on it and what these use; nothing of any other node's.

use anyhow::{Context, Result, ensure};
use e2e::api::Api;
use e2e::cluster::Cluster;
use serde_json::{Value, json};

use crate::{Case, POD, case, together, try_all, with_body};

/// Where namespaced objects of the test are.
const DEFAULT: &str = "/api/v1/namespaces/default";

/// Judges by requests with the kubelet's certificate.
pub fn judge(cluster: &Cluster, pod: &Value) -> Result<()> {
    let api = cluster.api();
    let kubelet = api.as_component("kubelet");
    let node = pod.pointer("/spec/nodeName").and_then(Value::as_str).context("the pod has no node")?;
    let outcome = together([
        try_all("the kubelet reads", &kubelet, &reads(node)),
        try_all("the kubelet changes its node", &kubelet, &nodes(node)),
        try_all("the kubelet changes pods", &kubelet, &pods(node, pod)),
        try_all("the kubelet asks for tokens", &kubelet, &tokens(pod)),
        try_all("the kubelet wants more", &kubelet, &others(node)),
    ]);
    together([outcome, nothing_changed(&api, node)])
}

fn reads(node: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    // The one Secret that a pod of the node uses, by each verb that a watch manager of upstream's uses.
    for query in ["/used", "?fieldSelector=metadata.name%3Dused"] {
        cases.push(case("GET", format!("{DEFAULT}/secrets{query}"), 200));
    }
    for path in [
        "secrets/unused",
        "secrets/foreign",
        "secrets",
        "secrets?fieldSelector=metadata.name%3Dunused",
        "secrets?fieldSelector=metadata.name!%3Dx",
        "secrets?watch=true&fieldSelector=metadata.name%3Dunused",
        "secrets?fieldSelector=metadata.name%3Dused,metadata.name%3Dunused&watch=true&labelSelector=a",
        "configmaps",
        "configmaps/other",
        "serviceaccounts/foreign",
        "serviceaccounts",
        "pods",
        "pods/elsewhere",
        "pods?fieldSelector=spec.nodeName%3Delsewhere",
        "pods?fieldSelector=spec.nodeName!%3Dx",
        "pods?watch=true",
        "pods/elsewhere/log",
        "pods/user/log",
    ] {
        cases.push(case("GET", format!("{DEFAULT}/{path}"), 403));
    }
    for path in ["/api/v1/secrets", "/api/v1/secrets?fieldSelector=metadata.name%3Dused", "/api/v1/nodes", "/api/v1/nodes/elsewhere"] {
        cases.push(case("GET", path, 403));
    }
    for path in ["/api/v1/pods", "/api/v1/pods?fieldSelector=spec.nodeName%3Delsewhere", "/api/v1/nodes?watch=true"] {
        cases.push(case("GET", path, 403));
    }
    cases.push(case("GET", format!("/api/v1/nodes/{node}"), 200));
    cases.push(case("GET", format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{node}"), 200));
    cases.push(case("GET", format!("{DEFAULT}/pods/{POD}"), 200));
    cases.push(case("GET", "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/elsewhere", 403));
    cases.push(case("GET", "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/kube-scheduler", 403));
    cases
}

fn nodes(node: &str) -> Vec<Case> {
    let own = format!("/api/v1/nodes/{node}");
    let other = "/api/v1/nodes/elsewhere".to_owned();
    let label = |key: &str| json!({"metadata": {"labels": {key: "x"}}});
    let new = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "new"}});
    vec![
        with_body("PATCH", &other, &label("a"), 403),
        with_body("PATCH", format!("{other}/status"), &json!({"status": {"phase": "Running"}}), 403),
        case("DELETE", &other, 403),
        case("DELETE", &own, 403),
        case("DELETE", "/api/v1/nodes", 403),
        with_body("POST", "/api/v1/nodes", &new, 403),
        with_body("PATCH", &own, &label("node-restriction.kubernetes.io/zone"), 403),
        with_body("PATCH", &own, &label("node-role.kubernetes.io/control-plane"), 403),
        with_body("PATCH", &own, &json!({"spec": {"taints": [{"key": "k", "effect": "NoSchedule"}]}}), 403),
        with_body("PATCH", format!("{own}/status"), &label("node-restriction.kubernetes.io/zone"), 403),
        with_body(
            "PATCH",
            format!("{own}/status"),
            &json!({"metadata": {"ownerReferences": [
            {"apiVersion": "v1", "kind": "Node", "name": "elsewhere", "uid": "u"}]}}),
            403,
        ),
        case("GET", format!("{own}/proxy/pods"), 403),
        case("GET", format!("{other}/proxy/pods"), 403),
    ]
}

fn pods(node: &str, pod: &Value) -> Vec<Case> {
    let mirror = |on: &str| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "mirror", "annotations": {"kubernetes.io/config.mirror": "x"}},
            "spec": {"nodeName": on, "containers": [{"name": "c", "image": "i"}]}})
    };
    let mut plain = mirror(node);
    plain["metadata"]["annotations"] = json!({});
    let status = json!({"status": {"message": "x"}});
    let labels = json!({"metadata": {"labels": {"a": "b"}}});
    let ephemeral = json!({"spec": {"ephemeralContainers": [{"name": "e", "image": "i"}]}});
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "x"}, "target": {"kind": "Node", "name": node}});
    let mut whole = pod.clone();
    whole["metadata"]["labels"] = json!({"a": "b"});
    let path = |rest: &str| format!("{DEFAULT}/pods{rest}");
    vec![
        with_body("PATCH", path("/elsewhere/status"), &status, 403),
        with_body("PATCH", path(&format!("/{POD}/status")), &labels, 403),
        with_body("PATCH", path("/elsewhere"), &labels, 403),
        with_body("PATCH", path(&format!("/{POD}")), &labels, 403),
        with_body("PUT", path(&format!("/{POD}")), &whole, 403),
        case("DELETE", path("/elsewhere"), 403),
        case("DELETE", path(""), 403),
        with_body("POST", path(""), &plain, 403),
        with_body("POST", path(""), &mirror("elsewhere"), 403),
        // Of its own node, but not owned by it.
        with_body("POST", path(""), &mirror(node), 403),
        with_body("POST", path(&format!("/{POD}/binding")), &binding, 403),
        with_body("PATCH", path(&format!("/{POD}/ephemeralcontainers")), &ephemeral, 403),
        case("POST", path(&format!("/{POD}/exec?command=id&stdout=true")), 403),
        case("POST", path(&format!("/{POD}/attach?stdout=true")), 403),
        case("POST", path(&format!("/{POD}/portforward")), 403),
    ]
}

fn tokens(pod: &Value) -> Vec<Case> {
    let request = |bound: Value, audiences: Value| json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"boundObjectRef": bound, "audiences": audiences}});
    let uid = pod.pointer("/metadata/uid").cloned().unwrap_or_default();
    let bound = |name: &str, uid: Value| json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid});
    let path = |account: &str| format!("{DEFAULT}/serviceaccounts/{account}/token");
    vec![
        with_body("POST", path("default"), &request(bound(POD, uid.clone()), json!([])), 201),
        with_body("POST", path("default"), &request(Value::Null, json!([])), 403),
        with_body("POST", path("default"), &request(bound(POD, json!("00000000-0000-0000-0000-000000000000")), json!([])), 403),
        with_body("POST", path("default"), &request(bound(POD, uid.clone()), json!(["vault"])), 403),
        with_body("POST", path("foreign"), &request(bound("elsewhere", uid.clone()), json!([])), 403),
        with_body("POST", path("foreign"), &request(bound(POD, uid), json!([])), 403),
        with_body(
            "POST",
            "/api/v1/namespaces/kube-system/serviceaccounts/deployment-controller/token",
            &request(Value::Null, json!([])),
            403,
        ),
    ]
}

fn others(node: &str) -> Vec<Case> {
    let lease = |name: &str| json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}, "spec": {}});
    let leases = |namespace: &str| format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases");
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "new"}});
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "mine"},
        "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": format!("system:node:{node}")}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}});
    vec![
        with_body("POST", leases("kube-node-lease"), &lease("elsewhere"), 403),
        with_body("POST", leases("kube-system"), &lease(node), 403),
        with_body("PATCH", format!("{}/elsewhere", leases("kube-node-lease")), &json!({"spec": {"holderIdentity": "x"}}), 403),
        with_body("POST", format!("{DEFAULT}/secrets"), &secret, 403),
        with_body("PATCH", format!("{DEFAULT}/secrets/used"), &json!({"data": {}}), 403),
        case("DELETE", format!("{DEFAULT}/secrets/used"), 403),
        with_body("POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding, 403),
        case("GET", "/apis/rbac.authorization.k8s.io/v1/clusterroles", 403),
        case("GET", "/apis/apps/v1/deployments", 403),
        case("GET", "/metrics", 403),
        case("DELETE", "/api/v1/namespaces/default", 403),
    ]
}

/// What was refused has left nothing behind.
fn nothing_changed(api: &Api, node: &str) -> Result<()> {
    let own = api.object(&format!("/api/v1/nodes/{node}"))?;
    let labels = own["metadata"]["labels"].as_object().cloned().unwrap_or_default();
    ensure!(!labels.keys().any(|key| key.contains("node-restriction") || key.contains("node-role")), "the node has labels {labels:?}");
    ensure!(own["spec"].get("taints").is_none(), "the node has taints {}", own["spec"]["taints"]);
    let other = api.object("/api/v1/nodes/elsewhere")?;
    ensure!(other["metadata"].get("labels").is_none_or(|labels| labels.get("a").is_none()), "the other node was changed: {other}");
    let pod = api.pod("elsewhere")?;
    ensure!(pod["metadata"].get("deletionTimestamp").is_none(), "the other node's pod was deleted: {pod}");
    ensure!(pod["status"].get("message").is_none(), "the other node's pod was changed: {}", pod["status"]);
    let names = ["secrets/new", "pods/mirror"].map(|path| format!("{DEFAULT}/{path}"));
    for path in names.iter().map(String::as_str).chain(["/api/v1/nodes/new"]) {
        ensure!(api.ask("GET", path, "", "")?.0 == 404, "{path} was made");
    }
    Ok(())
}
