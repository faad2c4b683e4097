//! `NodeRestriction`: a kubelet changes its own node, its own pods and its own lease (upstream: `plugin/pkg/admission/noderestriction`).

use apimachinery::status::Status;
use serde_json::Value;

use super::{Operation, Request};
use crate::lookup::{items, text};

const MIRROR: &str = "kubernetes.io/config.mirror";

/// Labels of Kubernetes' own that a kubelet may set on its node (upstream: `staging/kubelet/pkg/apis/well_known_labels.go`).
const KUBELET_LABELS: [&str; 14] = [
    "kubernetes.io/hostname",
    "kubernetes.io/arch",
    "kubernetes.io/os",
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/instance-type",
    "node.kubernetes.io/instance-type",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.kubernetes.io/region",
    "failure-domain.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
    "node.kubernetes.io/windows-build",
];
const KUBELET_LABEL_SPACES: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];

pub(super) fn admit(request: &Request, object: Option<&Value>) -> Result<(), Status> {
    let Some(node) = request.user.node() else { return Ok(()) };
    if node.is_empty() {
        return Err(request.forbidden(&format!("could not determine node from user {:?}", request.user.name)));
    }
    match (request.group, request.resource, request.subresource) {
        ("", "pods", "") => pod(request, node, object),
        ("", "pods", "status") => pod_status(request, node, object),
        ("", "pods", "eviction") => pod_eviction(request, node),
        ("", "pods", other) => {
            Err(request.forbidden(&format!("unexpected pod subresource {other:?}, only 'status' and 'eviction' are allowed")))
        }
        ("", "nodes", _) => own_node(request, node, object),
        ("", "serviceaccounts", "token") if request.operation == Operation::Create => token(request, node, object),
        ("coordination.k8s.io", "leases", _) => lease(request, node, object),
        _ => Ok(()),
    }
}

fn pod(request: &Request, node: &str, object: Option<&Value>) -> Result<(), Status> {
    match (request.operation, object) {
        (Operation::Create, Some(pod)) => create_mirror(request, node, pod),
        (Operation::Delete, _) => {
            let pod = request.lookup.get("pods", request.namespace, request.name);
            let pod = pod.ok_or_else(|| Status::not_found("", "pods", request.name))?;
            if text(&pod, "/spec/nodeName") != node {
                return Err(request.forbidden(&format!("node {node:?} can only delete pods with spec.nodeName set to itself")));
            }
            Ok(())
        }
        _ => Err(request.forbidden(&format!("unexpected operation \"UPDATE\", node {node:?} can only create and delete mirror pods"))),
    }
}

fn create_mirror(request: &Request, node: &str, pod: &Value) -> Result<(), Status> {
    let refuse = |why: String| Err(request.forbidden(&why));
    if pod["metadata"]["annotations"].get(MIRROR).is_none() {
        return refuse(format!("pod does not have {MIRROR:?} annotation, node {node:?} can only create mirror pods"));
    }
    if text(pod, "/spec/nodeName") != node {
        return refuse(format!("node {node:?} can only create pods with spec.nodeName set to itself"));
    }
    let owner = match items(pod, "/metadata/ownerReferences") {
        [owner] => owner,
        [] => return refuse(format!("node {node:?} can only create pods with an owner reference set to itself")),
        _ => return refuse(format!("node {node:?} can only create pods with a single owner reference set to itself")),
    };
    if text(owner, "/apiVersion") != "v1" || text(owner, "/kind") != "Node" || text(owner, "/name") != node {
        return refuse(format!("node {node:?} can only create pods with an owner reference set to itself"));
    }
    if owner["controller"] != Value::Bool(true) {
        return refuse(format!("node {node:?} can only create pods with a controller owner reference set to itself"));
    }
    if owner["blockOwnerDeletion"] == Value::Bool(true) {
        return refuse(format!("node {node:?} must not set blockOwnerDeletion on an owner reference"));
    }
    let own = request.lookup.get("nodes", "", node).ok_or_else(|| Status::not_found("", "nodes", node))?;
    let (given, uid) = (text(owner, "/uid"), text(&own, "/metadata/uid"));
    if given != uid {
        return refuse(format!("node {node} UID mismatch: expected {given} got {uid}"));
    }
    Ok(())
}

fn pod_status(request: &Request, node: &str, object: Option<&Value>) -> Result<(), Status> {
    let (Operation::Update, Some(old), Some(new)) = (request.operation, request.old, object) else {
        return Err(request.forbidden("unexpected operation"));
    };
    if text(old, "/spec/nodeName") != node {
        return Err(request.forbidden(&format!("node {node:?} can only update pod status for pods with spec.nodeName set to itself")));
    }
    if map(old, "labels") != map(new, "labels") {
        return Err(request.forbidden(&format!("node {node:?} cannot update labels through pod status")));
    }
    if old.pointer("/status/resourceClaimStatuses") != new.pointer("/status/resourceClaimStatuses") {
        return Err(request.forbidden(&format!("node {node:?} cannot update resource claim statues")));
    }
    Ok(())
}

fn pod_eviction(request: &Request, node: &str) -> Result<(), Status> {
    let pod = request.lookup.get("pods", request.namespace, request.name);
    let pod = pod.ok_or_else(|| Status::not_found("", "pods", request.name))?;
    if text(&pod, "/spec/nodeName") != node {
        return Err(request.forbidden(&format!("node {node} can only evict pods with spec.nodeName set to itself")));
    }
    Ok(())
}

fn own_node(request: &Request, node: &str, object: Option<&Value>) -> Result<(), Status> {
    let asked = if request.name.is_empty() { object.map_or("", |object| text(object, "/metadata/name")) } else { request.name };
    if asked != node {
        return Err(request.forbidden(&format!("node {node:?} is not allowed to modify node {asked:?}")));
    }
    let Some(new) = object else { return Ok(()) };
    let forbidden = forbidden_labels(new, request.old).join(", ");
    match request.old {
        None if !forbidden.is_empty() => {
            Err(request.forbidden(&format!("node {node:?} is not allowed to set the following labels: {forbidden}")))
        }
        None => Ok(()),
        Some(old) => {
            if items(new, "/spec/taints") != items(old, "/spec/taints") {
                return Err(request.forbidden(&format!("node {node:?} is not allowed to modify taints")));
            }
            if items(new, "/metadata/ownerReferences") != items(old, "/metadata/ownerReferences") {
                return Err(request.forbidden(&format!("node {node:?} is not allowed to modify ownerReferences")));
            }
            if !forbidden.is_empty() {
                return Err(request.forbidden(&format!("is not allowed to modify labels: {forbidden}")));
            }
            Ok(())
        }
    }
}

fn map<'a>(object: &'a Value, name: &str) -> Option<&'a serde_json::Map<String, Value>> {
    object["metadata"].get(name).and_then(Value::as_object).filter(|map| !map.is_empty())
}

/// The labels that differ and that no kubelet may set, sorted.
fn forbidden_labels<'a>(new: &'a Value, old: Option<&'a Value>) -> Vec<&'a str> {
    let value = |object: Option<&'a Value>, key: &str| object.and_then(|object| object["metadata"]["labels"].get(key));
    let keys = [Some(new), old].into_iter().flatten().filter_map(|object| map(object, "labels")).flat_map(|labels| labels.keys());
    let changed = keys.map(String::as_str).filter(|key| value(Some(new), key) != value(old, key));
    let mut forbidden: Vec<&str> = changed.filter(|key| is_forbidden(key)).collect();
    forbidden.sort_unstable();
    forbidden.dedup();
    forbidden
}

fn is_forbidden(key: &str) -> bool {
    let space = key.split_once('/').map_or("", |(space, _)| space);
    let within = |domain: &str| space == domain || space.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'));
    if within("node-restriction.kubernetes.io") {
        return true;
    }
    let kubelet = KUBELET_LABELS.contains(&key) || KUBELET_LABEL_SPACES.iter().any(|domain| within(domain));
    (within("kubernetes.io") || within("k8s.io")) && !kubelet
}

fn token(request: &Request, node: &str, object: Option<&Value>) -> Result<(), Status> {
    let reference = object.and_then(|object| object.pointer("/spec/boundObjectRef")).unwrap_or(&Value::Null);
    let (name, uid) = (text(reference, "/name"), text(reference, "/uid"));
    if text(reference, "/apiVersion") != "v1" || text(reference, "/kind") != "Pod" || name.is_empty() {
        return Err(request.forbidden("node requested token not bound to a pod"));
    }
    if uid.is_empty() {
        return Err(request.forbidden("node requested token with a pod binding without a uid"));
    }
    let pod = request.lookup.get("pods", request.namespace, name).ok_or_else(|| Status::not_found("", "pods", name))?;
    if text(&pod, "/metadata/uid") != uid {
        return Err(request.forbidden(&format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
        )));
    }
    if text(&pod, "/spec/nodeName") != node {
        return Err(request.forbidden("node requested token bound to a pod scheduled on a different node"));
    }
    audience(request, &pod, object)
}

/// A node asks only for audiences that the pod's own volumes ask for (feature `ServiceAccountNodeAudienceRestriction`).
fn audience(request: &Request, pod: &Value, object: Option<&Value>) -> Result<(), Status> {
    let asked = object.map_or(&[][..], |object| items(object, "/spec/audiences"));
    let asked = match asked {
        [] => return Ok(()),
        [one] => one.as_str().unwrap_or_default(),
        _ => return Err(request.forbidden("node may only request 0 or 1 audiences")),
    };
    let wanted = items(pod, "/spec/volumes")
        .iter()
        .flat_map(|volume| items(volume, "/projected/sources"))
        .filter_map(|source| source.get("serviceAccountToken"))
        .any(|token| text(token, "/audience") == asked);
    if asked.is_empty() || wanted {
        return Ok(());
    }
    Err(request.forbidden(&format!("audience {asked:?} not found in pod spec volume")))
}

fn lease(request: &Request, node: &str, object: Option<&Value>) -> Result<(), Status> {
    if request.namespace != "kube-node-lease" {
        return Err(request.forbidden("can only access leases in the \"kube-node-lease\" system namespace"));
    }
    let name = if request.name.is_empty() { object.map_or("", |object| text(object, "/metadata/name")) } else { request.name };
    if name != node {
        return Err(request.forbidden("can only access node lease with the same name as the requesting node"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authn::User;
    use crate::lookup::fake::Fake;
    use serde_json::json;

    #[test]
    fn a_kubelet_changes_its_own() {
        let user = User { name: "system:node:n1".into(), groups: vec!["system:nodes".into()], ..User::default() };
        let pod = json!({ "metadata": { "namespace": "ns", "name": "p", "uid": "u" }, "spec": { "nodeName": "n1" } });
        let foreign = json!({ "metadata": { "namespace": "ns", "name": "q", "uid": "v" }, "spec": { "nodeName": "n2" } });
        let lookup = Fake::default().with("pods", pod.clone()).with("pods", foreign.clone());
        let node = |labels: Value| json!({ "metadata": { "name": "n1", "labels": labels } });
        let request = |operation, group, resource, subresource, namespace, name, old| Request {
            user: &user,
            operation,
            group,
            resource,
            subresource,
            namespace,
            name,
            old,
            lookup: &lookup,
        };
        use Operation::{Create, Delete, Update};
        let labelled = node(json!({ "kubernetes.io/hostname": "n1", "kubelet.kubernetes.io/x": "1", "mine": "1" }));
        let roled = node(json!({ "node-role.kubernetes.io/control-plane": "" }));
        let cases: Vec<(Request, Option<Value>, bool)> = vec![
            (request(Create, "", "nodes", "", "", "n1", None), Some(labelled.clone()), true),
            (request(Create, "", "nodes", "", "", "n2", None), Some(labelled.clone()), false),
            (request(Create, "", "nodes", "", "", "n1", None), Some(roled.clone()), false),
            (request(Update, "", "nodes", "", "", "n1", Some(&roled)), Some(roled.clone()), true),
            (request(Update, "", "nodes", "status", "", "n2", Some(&labelled)), Some(labelled.clone()), false),
            (request(Delete, "", "pods", "", "ns", "p", Some(&pod)), None, true),
            (request(Delete, "", "pods", "", "ns", "q", Some(&foreign)), None, false),
            (request(Create, "", "pods", "", "ns", "x", None), Some(json!({ "spec": { "nodeName": "n1" } })), false),
            (request(Update, "", "pods", "status", "ns", "p", Some(&pod)), Some(pod.clone()), true),
            (request(Update, "", "pods", "status", "ns", "q", Some(&foreign)), Some(foreign.clone()), false),
            (request(Update, "", "pods", "", "ns", "p", Some(&pod)), Some(pod.clone()), false),
            (request(Update, "coordination.k8s.io", "leases", "", "kube-node-lease", "n2", None), Some(json!({})), false),
        ];
        for (request, object, allowed) in cases {
            let result = admit(&request, object.as_ref());
            assert_eq!(result.is_ok(), allowed, "{:?} {} {} {:?}", request.operation, request.resource, request.name, result);
        }
    }
}
