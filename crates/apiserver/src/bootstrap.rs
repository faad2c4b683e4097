//! What the server makes at its start, and keeps: namespaces, priority classes, default roles and bindings
//! (upstream: `plugin/pkg/auth/authorizer/rbac/bootstrappolicy`, `pkg/registry/rbac/reconciliation`), and the two bindings that
//! this program's own identities need.

use serde_json::{Value, json};

use crate::lookup::{items, text};

/// Facts of a running kube-apiserver 1.37.2, one object a line.
const DATA: &str = include_str!("../data/bootstrap.jsonl");

/// The group of the admin's certificate.
pub const ADMIN_GROUP: &str = "coracle:cluster-admins";
/// The user of the API server towards kubelets.
pub const KUBELET_CLIENT: &str = "kube-apiserver-kubelet-client";

/// Every object, in the order in which they are to be made.
pub fn objects() -> Vec<Value> {
    // The data are part of the program; the test below reads every line.
    let mut objects: Vec<Value> = DATA.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    objects.push(binding(ADMIN_GROUP, "cluster-admin", "Group", ADMIN_GROUP));
    objects.push(binding(KUBELET_CLIENT, "system:kubelet-api-admin", "User", KUBELET_CLIENT));
    objects
}

fn binding(name: &str, role: &str, kind: &str, subject: &str) -> Value {
    let group = "rbac.authorization.k8s.io";
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": { "name": name, "annotations": { "rbac.authorization.kubernetes.io/autoupdate": "true" } },
        "subjects": [{ "kind": kind, "apiGroup": group, "name": subject }],
        "roleRef": { "apiGroup": group, "kind": "ClusterRole", "name": role },
    })
}

/// What to write so that `wanted` holds: nothing where it holds already, the whole object where there is none, the present
/// object with what it lacks where an operator changed it. An operator who sets the annotation `autoupdate` to false is left
/// alone.
pub fn reconcile(existing: Option<&Value>, wanted: &Value) -> Option<Value> {
    let Some(existing) = existing else { return Some(wanted.clone()) };
    const AUTOUPDATE: &str = "/metadata/annotations/rbac.authorization.kubernetes.io~1autoupdate";
    let rbac = text(wanted, "/apiVersion").starts_with("rbac.");
    if !rbac || text(existing, AUTOUPDATE) == "false" {
        return None;
    }
    let mut object = existing.clone();
    if wanted.get("aggregationRule").is_none() {
        add_missing(&mut object, wanted, "rules");
    }
    add_missing(&mut object, wanted, "subjects");
    for map in ["labels", "annotations"] {
        let Some(entries) = wanted.pointer(&format!("/metadata/{map}")).and_then(Value::as_object) else { continue };
        for (key, value) in entries {
            if object["metadata"][map].get(key).is_none() {
                object["metadata"][map][key] = value.clone();
            }
        }
    }
    (object != *existing).then_some(object)
}

fn add_missing(object: &mut Value, wanted: &Value, list: &str) {
    let missing: Vec<Value> =
        items(wanted, &format!("/{list}")).iter().filter(|item| !items(object, &format!("/{list}")).contains(item)).cloned().collect();
    if missing.is_empty() {
        return;
    }
    match object[list].as_array_mut() {
        Some(present) => present.extend(missing),
        None => object[list] = Value::Array(missing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_an_object() {
        assert_eq!(objects().len(), DATA.lines().count() + 2);
        assert!(objects().iter().all(|object| !text(object, "/kind").is_empty() && !text(object, "/metadata/name").is_empty()));
    }

    #[test]
    fn what_an_operator_took_away_comes_back_unless_he_says_no() {
        let wanted = objects()
            .into_iter()
            .find(|object| text(object, "/metadata/name") == "system:kube-scheduler" && object.get("rules").is_some())
            .unwrap();
        assert_eq!(reconcile(Some(&wanted), &wanted), None);
        assert_eq!(reconcile(None, &wanted).as_ref(), Some(&wanted));
        let mut changed = wanted.clone();
        changed["rules"].as_array_mut().unwrap().truncate(1);
        changed["rules"].as_array_mut().unwrap().push(json!({ "verbs": ["get"], "apiGroups": ["x"], "resources": ["y"] }));
        let repaired = reconcile(Some(&changed), &wanted).unwrap();
        assert_eq!(items(&repaired, "/rules").len(), items(&wanted, "/rules").len() + 1);
        changed["metadata"]["annotations"]["rbac.authorization.kubernetes.io/autoupdate"] = json!("false");
        assert_eq!(reconcile(Some(&changed), &wanted), None);
    }
}
