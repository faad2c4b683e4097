//! What happens to an object between decoding and storing: what clients may not set is reset, and generations are counted.
//!
//! The server itself sets uid, creationTimestamp, resourceVersion and cluster IPs. Sources: kubernetes v1.37 `pkg/registry/*/strategy.go`,
//! k8s.io/apiserver v0.37 `pkg/registry/rest/{create,update}.go`.

use serde_json::{Map, Value, json};

use crate::KindFacts;
use crate::normalize;

pub mod qos;
mod service;

fn metadata(object: &mut Value) -> Option<&mut Map<String, Value>> {
    object.as_object_mut()?.entry("metadata").or_insert_with(|| json!({})).as_object_mut()
}

fn take(from: &Value, path: &str) -> Option<Value> {
    from.pointer(path).cloned()
}

/// Sets a field of the object to what it was, or removes it.
fn keep(object: &mut Value, old: &Value, key: &str) {
    let Value::Object(map) = object else { return };
    match old.get(key) {
        Some(value) => map.insert(key.to_owned(), value.clone()),
        None => map.remove(key),
    };
}

fn keep_metadata(object: &mut Value, old: &Value, key: &str) {
    let value = old.get("metadata").and_then(|metadata| metadata.get(key)).cloned();
    let Some(metadata) = metadata(object) else { return };
    match value {
        Some(value) => metadata.insert(key.to_owned(), value),
        None => metadata.remove(key),
    };
}

fn reset_status(kind: &KindFacts, object: &mut Value) {
    if let Value::Object(map) = object {
        map.remove("status");
    }
    normalize::fill(kind.type_id, object);
}

fn set_generation(object: &mut Value, generation: i64) {
    if let Some(metadata) = metadata(object) {
        metadata.insert("generation".to_owned(), generation.into());
    }
}

fn generation(object: &Value) -> i64 {
    object.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or(0)
}

fn name_of(kind: &KindFacts) -> (&str, &str) {
    (kind.group.as_str(), kind.kind.as_str())
}

/// Drops `lifecycle.stopSignal`, whose feature is off in v1.37 ([`crate::support`] warns of it).
fn drop_disabled(object: &mut Value) {
    for path in ["/spec", "/spec/template/spec"] {
        for key in ["containers", "initContainers"] {
            for container in object.pointer_mut(&format!("{path}/{key}")).and_then(Value::as_array_mut).into_iter().flatten() {
                let Some(Value::Object(lifecycle)) = container.get_mut("lifecycle") else { continue };
                if lifecycle.remove("stopSignal").is_some()
                    && lifecycle.is_empty()
                    && let Value::Object(container) = container
                {
                    container.remove("lifecycle");
                }
            }
        }
    }
}

/// Topology keys of a slice are of an API version that is gone (`pkg/registry/discovery/endpointslice/strategy.go`,
/// `dropTopologyOnV1`).
fn drop_topology(object: &mut Value) {
    for endpoint in object.get_mut("endpoints").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Value::Object(endpoint) = endpoint {
            endpoint.remove("deprecatedTopology");
        }
    }
}

/// Fields of coordinated leader election, a gate that is off by default (`pkg/registry/coordination/lease/strategy.go`).
fn drop_election(object: &mut Value) {
    if let Some(Value::Object(spec)) = object.get_mut("spec") {
        spec.remove("strategy");
        spec.remove("preferredHolder");
    }
}

/// Prepares an object for its creation. Defaults must be set already.
pub fn prepare_create(kind: &KindFacts, object: &mut Value) {
    drop_disabled(object);
    if let Some(metadata) = metadata(object) {
        for key in ["deletionTimestamp", "deletionGracePeriodSeconds", "generation", "selfLink", "resourceVersion"] {
            metadata.remove(key);
        }
    }
    match name_of(kind) {
        ("", "Pod") => create_pod(kind, object),
        ("", "Namespace") => create_namespace(object),
        ("", "Service") => {
            reset_status(kind, object);
            service::create(object);
        }
        ("apps", "Deployment" | "ReplicaSet") => {
            reset_status(kind, object);
            set_generation(object, 1);
        }
        ("discovery.k8s.io", "EndpointSlice") => {
            set_generation(object, 1);
            drop_topology(object);
        }
        ("scheduling.k8s.io", "PriorityClass") => set_generation(object, 1),
        ("coordination.k8s.io", "Lease") => drop_election(object),
        ("", "ServiceAccount") => clean_secrets(object),
        _ => {}
    }
}

fn create_pod(kind: &KindFacts, object: &mut Value) {
    reset_status(kind, object);
    set_generation(object, 1);
    let gated = object.pointer("/spec/schedulingGates").and_then(Value::as_array).is_some_and(|gates| !gates.is_empty());
    object["status"] = json!({"phase": "Pending", "qosClass": qos::class(&object["spec"])});
    if gated {
        object["status"]["conditions"] = json!([{
            "type": "PodScheduled", "status": "False", "lastProbeTime": null, "lastTransitionTime": null, "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates",
        }]);
    }
}

fn create_namespace(object: &mut Value) {
    object["status"] = json!({"phase": "Active"});
    let finalizers = object.get("spec").and_then(|spec| spec.get("finalizers")).and_then(Value::as_array).cloned();
    let mut finalizers = finalizers.unwrap_or_default();
    if !finalizers.iter().any(|name| name == "kubernetes") {
        finalizers.push("kubernetes".into());
    }
    if !object["spec"].is_object() {
        object["spec"] = json!({});
    }
    object["spec"]["finalizers"] = finalizers.into();
}

/// References to secrets keep only their name.
fn clean_secrets(object: &mut Value) {
    for secret in object.get_mut("secrets").and_then(Value::as_array_mut).into_iter().flatten() {
        let name = secret.get("name").cloned();
        *secret = json!({});
        if let Some(name) = name {
            secret["name"] = name;
        }
    }
}

/// What no update changes: identity, deletion and generation are the old object's.
fn keep_system_metadata(object: &mut Value, old: &Value) {
    for key in ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "selfLink"] {
        keep_metadata(object, old, key);
    }
}

/// Prepares an object for an update through its main resource.
pub fn prepare_update(kind: &KindFacts, object: &mut Value, old: &Value) {
    keep_system_metadata(object, old);
    drop_disabled(object);
    match name_of(kind) {
        ("", "Pod") => {
            keep(object, old, "status");
            bump_if(object, old, object.get("spec") != old.get("spec"));
        }
        ("", "Node") => keep(object, old, "status"),
        ("", "Namespace") => {
            keep(object, old, "status");
            keep(object, old, "spec");
        }
        ("", "Service") => {
            keep(object, old, "status");
            service::update(object, old);
        }
        ("apps", "Deployment") => {
            keep(object, old, "status");
            let annotations = |object: &Value| take(object, "/metadata/annotations").unwrap_or_else(|| json!({}));
            let changed = object.get("spec") != old.get("spec") || annotations(object) != annotations(old);
            bump_if(object, old, changed);
        }
        ("apps", "ReplicaSet") => {
            keep(object, old, "status");
            bump_if(object, old, object.get("spec") != old.get("spec"));
        }
        ("discovery.k8s.io", "EndpointSlice") => {
            let body = |object: &Value| ["addressType", "endpoints", "ports"].map(|key| object.get(key).cloned());
            let changed = body(object) != body(old) || object.pointer("/metadata/labels") != old.pointer("/metadata/labels");
            bump_if(object, old, changed);
        }
        ("", "Secret") if object.get("type").and_then(Value::as_str).unwrap_or("").is_empty() => keep(object, old, "type"),
        ("", "ServiceAccount") => clean_secrets(object),
        _ => {}
    }
}

fn bump_if(object: &mut Value, old: &Value, changed: bool) {
    if changed {
        set_generation(object, generation(old) + 1);
    }
}

/// Prepares an object for an update through `status`: all but the status is the old object's (labels and annotations may change, as
/// upstream lets them).
pub fn prepare_status_update(kind: &KindFacts, object: &mut Value, old: &Value) {
    keep_system_metadata(object, old);
    keep(object, old, "spec");
    match name_of(kind) {
        ("", "Pod") => {
            keep_metadata(object, old, "ownerReferences");
            for key in ["qosClass", "resourceClaimStatuses", "extendedResourceClaimStatus", "nodeAllocatableResourceClaimStatuses"] {
                let before = old.get("status").and_then(|status| status.get(key));
                if let (Some(before), Some(Value::Object(status))) = (before, object.get_mut("status")) {
                    status.entry(key).or_insert_with(|| before.clone());
                }
            }
        }
        ("apps", "Deployment") => keep_metadata(object, old, "labels"),
        _ => {}
    }
}

/// Prepares a Pod for an update through `ephemeralcontainers`: all else of it is the old object's.
pub fn prepare_ephemeral_containers(object: &mut Value, old: &Value) {
    keep_system_metadata(object, old);
    for key in ["labels", "annotations", "finalizers", "ownerReferences"] {
        keep_metadata(object, old, key);
    }
    let containers = take(object, "/spec/ephemeralContainers");
    keep(object, old, "spec");
    keep(object, old, "status");
    if let Some(Value::Object(spec)) = object.get_mut("spec") {
        match containers {
            Some(containers) => spec.insert("ephemeralContainers".to_owned(), containers),
            None => spec.remove("ephemeralContainers"),
        };
    }
    drop_disabled(object);
    bump_if(object, old, object.get("spec") != old.get("spec"));
}

/// Prepares a Namespace for an update through `finalize`: the status is the old object's.
pub fn prepare_finalize(object: &mut Value, old: &Value) {
    keep_system_metadata(object, old);
    keep(object, old, "status");
}

/// Warnings that upstream sends on creation, of which clients should know.
pub fn warnings_create(kind: &KindFacts, object: &Value) -> Vec<String> {
    let name = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or("");
    let errors = crate::formats::dns1123_label(name);
    let (place, spec, path) = match name_of(kind) {
        ("", "Pod") => ("the Pod's hostname", object.get("spec"), "spec"),
        ("apps", "Deployment" | "ReplicaSet") => ("Pod names and hostnames", object.pointer("/spec/template/spec"), "spec.template.spec"),
        _ => return Vec::new(),
    };
    let mut warnings = Vec::new();
    if !errors.is_empty() {
        let list = errors.join(" ");
        let text = "which can result in surprising behavior; a DNS label is recommended";
        warnings.push(format!("metadata.name: this is used in {place}, {text}: [{list}]"));
    }
    warnings.extend(spec.map(|spec| pod_warnings(spec, path)).unwrap_or_default());
    warnings
}

/// What is taken of a pod's spec but means nothing good (`pkg/api/pod/warnings.go`).
fn pod_warnings(spec: &Value, path: &str) -> Vec<String> {
    let mut warnings = Vec::new();
    for (index, secret) in spec.get("imagePullSecrets").and_then(Value::as_array).into_iter().flatten().enumerate() {
        if secret.get("name").and_then(Value::as_str).unwrap_or("").is_empty() {
            warnings.push(format!("{path}.imagePullSecrets[{index}].name: invalid empty name \"\""));
        }
    }
    if spec.get("terminationGracePeriodSeconds").and_then(Value::as_i64).is_some_and(|seconds| seconds < 0) {
        warnings.push(format!("{path}.terminationGracePeriodSeconds: must be >= 0; negative values are invalid and will be treated as 1"));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds;

    #[test]
    fn generations() {
        let kind = kinds::by_kind("apps", "v1", "Deployment").expect("served");
        let mut object = json!({"metadata": {"name": "d", "generation": 7}, "spec": {"replicas": 1}, "status": {"replicas": 3}});
        prepare_create(kind, &mut object);
        assert_eq!((generation(&object), &object["status"]), (1, &json!({})));
        let old = object.clone();
        object["status"] = json!({"replicas": 9});
        prepare_update(kind, &mut object, &old);
        assert_eq!((generation(&object), &object["status"]), (1, &json!({})));
        object["spec"]["replicas"] = 2.into();
        prepare_update(kind, &mut object, &old);
        assert_eq!(generation(&object), 2);
        object["status"] = json!({"replicas": 2});
        object["metadata"]["labels"] = json!({"x": "y"});
        prepare_status_update(kind, &mut object, &old);
        assert_eq!(object["spec"]["replicas"], 1);
        assert_eq!(object["status"]["replicas"], 2);
        assert!(object["metadata"].get("labels").is_none());
    }

    #[test]
    fn namespaces_get_their_finalizer() {
        let kind = kinds::by_kind("", "v1", "Namespace").expect("served");
        let mut object = json!({"metadata": {"name": "n"}, "spec": {"finalizers": ["a"]}, "status": {}});
        prepare_create(kind, &mut object);
        assert_eq!(object["spec"]["finalizers"], json!(["a", "kubernetes"]));
        assert_eq!(object["status"]["phase"], "Active");
    }
}
