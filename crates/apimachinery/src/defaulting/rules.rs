//! Defaults per type.

use base64::Engine as _;
use serde_json::{Map, Value, json};

use super::{empty, image_tag};
use crate::quantity::Quantity;
use crate::schema::Type;

/// An object being filled in.
type Object = Map<String, Value>;

/// Sets a field that is absent, null or an empty text.
fn set(map: &mut Object, key: &str, value: impl Into<Value>) {
    if map.get(key).is_none_or(empty) {
        map.insert(key.to_owned(), value.into());
    }
}

/// Sets a number that is absent or zero.
fn set_number(map: &mut Object, key: &str, value: i64) {
    if map.get(key).and_then(Value::as_i64).unwrap_or(0) == 0 {
        map.insert(key.to_owned(), value.into());
    }
}

fn text<'a>(map: &'a Object, key: &str) -> &'a str {
    map.get(key).and_then(Value::as_str).unwrap_or("")
}

fn object<'a>(map: &'a mut Object, key: &str) -> Option<&'a mut Object> {
    map.get_mut(key)?.as_object_mut()
}

fn items<'a>(map: &'a mut Object, key: &str) -> impl Iterator<Item = &'a mut Object> {
    map.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten().filter_map(Value::as_object_mut)
}

/// The rules that come before a type's fields are visited.
pub(super) fn apply(found: &Type, map: &mut Object) {
    match found.name {
        "core.v1.Pod" => pod(map),
        "core.v1.PodSpec" => pod_spec(map),
        "core.v1.Container" | "core.v1.EphemeralContainer" => container(map),
        "core.v1.Probe" => {
            for (key, value) in [("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)] {
                set_number(map, key, value);
            }
        }
        "core.v1.HTTPGetAction" => {
            set(map, "path", "/");
            set(map, "scheme", "HTTP");
        }
        "core.v1.GRPCAction" => {
            set(map, "service", "");
        }
        "core.v1.NodeSpec" => node_spec(map),
        "core.v1.Volume" => volume(map),
        "core.v1.SecretVolumeSource" | "core.v1.ConfigMapVolumeSource" | "core.v1.DownwardAPIVolumeSource" => {
            set(map, "defaultMode", 0o644)
        }
        "core.v1.ProjectedVolumeSource" => {
            set(map, "defaultMode", 0o644);
            // Upstream's conversion makes an empty list none.
            if map.get("sources").and_then(Value::as_array).is_some_and(Vec::is_empty) {
                map.insert("sources".to_owned(), Value::Null);
            }
        }
        "core.v1.ServiceAccountTokenProjection" => set(map, "expirationSeconds", 3600),
        "core.v1.HostPathVolumeSource" => {
            map.entry("type").or_insert_with(|| "".into());
        }
        "core.v1.AzureDiskVolumeSource" => {
            map.entry("readOnly").or_insert(Value::Bool(false));
        }
        "core.v1.FileKeySelector" => {
            map.entry("optional").or_insert(Value::Bool(false));
        }
        "core.v1.ObjectFieldSelector" => set(map, "apiVersion", "v1"),
        "core.v1.ResourceRequirements" => round_resources(map),
        "core.v1.PersistentVolumeClaimSpec" => set(map, "volumeMode", "Filesystem"),
        "core.v1.PodStatus" => pod_status(map),
        "core.v1.NodeStatus" => node_status(map),
        "core.v1.Namespace" => namespace(map),
        "core.v1.NamespaceStatus" => set(map, "phase", "Active"),
        "core.v1.Secret" => secret(map),
        "core.v1.Service" => service(map),
        "apps.v1.DeploymentSpec" => deployment_spec(map),
        "apps.v1.ReplicaSetSpec" => set(map, "replicas", 1),
        "discovery.v1.EndpointPort" => {
            map.entry("name").or_insert_with(|| "".into());
            set(map, "protocol", "TCP");
        }
        "rbac.v1.RoleRef" => set(map, "apiGroup", "rbac.authorization.k8s.io"),
        "rbac.v1.Subject" if matches!(text(map, "kind"), "User" | "Group") => set(map, "apiGroup", "rbac.authorization.k8s.io"),
        "scheduling.v1.PriorityClass" => set(map, "preemptionPolicy", "PreemptLowerPriority"),
        "authentication.v1.TokenRequestSpec" => set(map, "expirationSeconds", 3600),
        _ => {}
    }
}

/// The rules that come after a type's fields were visited.
pub(super) fn apply_after(found: &Type, map: &mut Object) {
    if found.name == "core.v1.Pod"
        && let Some(spec) = object(map, "spec")
        && spec.get("hostNetwork") == Some(&Value::Bool(true))
    {
        for key in ["containers", "initContainers"] {
            for container in items(spec, key) {
                for port in items(container, "ports") {
                    let number = port.get("containerPort").and_then(Value::as_i64).unwrap_or(0);
                    set_number(port, "hostPort", number);
                }
            }
        }
    }
}

fn pod(map: &mut Object) {
    let Some(spec) = object(map, "spec") else { return };
    if spec.get("terminationGracePeriodSeconds").and_then(Value::as_i64).is_some_and(|seconds| seconds < 0) {
        spec.insert("terminationGracePeriodSeconds".to_owned(), 1.into());
    }
    for key in ["containers", "initContainers"] {
        for container in items(spec, key) {
            let Some(resources) = object(container, "resources") else { continue };
            let Some(Value::Object(limits)) = resources.get("limits").cloned() else { continue };
            let requests = resources.entry("requests").or_insert_with(|| json!({}));
            if let Value::Object(requests) = requests {
                for (name, limit) in limits {
                    requests.entry(name).or_insert(limit);
                }
            }
        }
    }
    set(spec, "enableServiceLinks", true);
}

fn pod_spec(map: &mut Object) {
    let name = match text(map, "serviceAccountName") {
        "" => text(map, "serviceAccount").to_owned(),
        name => name.to_owned(),
    };
    if !name.is_empty() {
        map.insert("serviceAccountName".to_owned(), name.clone().into());
        map.insert("serviceAccount".to_owned(), name.into());
    }
    set(map, "dnsPolicy", "ClusterFirst");
    set(map, "restartPolicy", "Always");
    set(map, "securityContext", json!({}));
    set(map, "terminationGracePeriodSeconds", 30);
    set(map, "schedulerName", "default-scheduler");
}

fn pull_policy(reference: &str) -> &'static str {
    if image_tag(reference) == "latest" { "Always" } else { "IfNotPresent" }
}

fn container(map: &mut Object) {
    let policy = pull_policy(text(map, "image"));
    set(map, "imagePullPolicy", policy);
    set(map, "terminationMessagePath", "/dev/termination-log");
    set(map, "terminationMessagePolicy", "File");
}

fn volume(map: &mut Object) {
    if !map.iter().any(|(key, value)| key != "name" && !value.is_null()) {
        map.insert("emptyDir".to_owned(), json!({}));
    }
    if let Some(image) = object(map, "image") {
        let policy = pull_policy(text(image, "reference"));
        set(image, "pullPolicy", policy);
    }
}

/// Resources are kept in thousandths.
fn round_resources(map: &mut Object) {
    for key in ["limits", "requests"] {
        for value in map.get_mut(key).and_then(Value::as_object_mut).into_iter().flat_map(|list| list.values_mut()) {
            let Some(quantity) = value.as_str().and_then(|text| text.parse::<Quantity>().ok()) else { continue };
            let rounded = quantity.rounded_to_millis();
            if rounded != quantity {
                *value = rounded.to_string().into();
            }
        }
    }
}

fn pod_status(map: &mut Object) {
    let ip = text(map, "podIP").to_owned();
    let first = map.get("podIPs").and_then(|ips| ips.get(0)).and_then(|ip| ip.get("ip")).and_then(Value::as_str).map(str::to_owned);
    match (ip.is_empty(), first) {
        (true, Some(first)) => {
            map.insert("podIP".to_owned(), first.into());
        }
        (false, first) if first.as_ref() != Some(&ip) => {
            map.insert("podIPs".to_owned(), json!([{"ip": ip}]));
        }
        _ => {}
    }
}

/// The first of `podCIDRs` is `podCIDR`.
fn node_spec(map: &mut Object) {
    let cidr = text(map, "podCIDR").to_owned();
    let first = map.get("podCIDRs").and_then(|list| list.get(0)).and_then(Value::as_str).map(str::to_owned);
    match (cidr.is_empty(), first) {
        (true, Some(first)) => {
            map.insert("podCIDR".to_owned(), first.into());
        }
        (false, first) if first.as_ref() != Some(&cidr) => {
            map.insert("podCIDRs".to_owned(), json!([cidr]));
        }
        _ => {}
    }
}

fn node_status(map: &mut Object) {
    if let (None, Some(capacity)) = (map.get("allocatable"), map.get("capacity").cloned()) {
        map.insert("allocatable".to_owned(), capacity);
    }
}

fn namespace(map: &mut Object) {
    let Some(metadata) = object(map, "metadata") else { return };
    let name = text(metadata, "name").to_owned();
    if !name.is_empty()
        && let Value::Object(labels) = metadata.entry("labels").or_insert_with(|| json!({}))
    {
        labels.insert("kubernetes.io/metadata.name".to_owned(), name.into());
    }
}

/// `stringData` is written only: it goes into `data`.
fn secret(map: &mut Object) {
    if let Some(Value::Object(texts)) = map.remove("stringData")
        && let Value::Object(data) = map.entry("data").or_insert_with(|| json!({}))
    {
        for (key, value) in texts {
            let encoded = base64::engine::general_purpose::STANDARD.encode(value.as_str().unwrap_or(""));
            data.insert(key, encoded.into());
        }
    }
    set(map, "type", "Opaque");
}

fn service(map: &mut Object) {
    let Some(spec) = object(map, "spec") else { return };
    set(spec, "sessionAffinity", "None");
    match text(spec, "sessionAffinity") {
        "None" => {
            spec.remove("sessionAffinityConfig");
        }
        "ClientIP" => {
            let seconds = spec.get("sessionAffinityConfig").and_then(|config| config.pointer("/clientIP/timeoutSeconds"));
            if seconds.is_none_or(Value::is_null) {
                spec.insert("sessionAffinityConfig".to_owned(), json!({"clientIP": {"timeoutSeconds": 10_800}}));
            }
        }
        _ => {}
    }
    set(spec, "type", "ClusterIP");
    let kind = text(spec, "type").to_owned();
    for port in items(spec, "ports") {
        set(port, "protocol", "TCP");
        let target = port.get("targetPort");
        if target.is_none_or(|target| empty(target) || target.as_i64() == Some(0)) {
            let number = port.get("port").cloned().unwrap_or_else(|| 0.into());
            port.insert("targetPort".to_owned(), number);
        }
    }
    let external_ips = spec.get("externalIPs").and_then(Value::as_array).is_some_and(|ips| !ips.is_empty());
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") || (kind == "ClusterIP" && external_ips) {
        set(spec, "externalTrafficPolicy", "Cluster");
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer" | "ClusterIP") {
        set(spec, "internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        set(spec, "allocateLoadBalancerNodePorts", true);
        if let Some(balancer) = object(map, "status").and_then(|status| object(status, "loadBalancer")) {
            for ingress in items(balancer, "ingress").filter(|ingress| !text(ingress, "ip").is_empty()) {
                set(ingress, "ipMode", "VIP");
            }
        }
    }
}

fn deployment_spec(map: &mut Object) {
    set(map, "replicas", 1);
    if let Value::Object(strategy) = map.entry("strategy").or_insert_with(|| json!({})) {
        set(strategy, "type", "RollingUpdate");
        if text(strategy, "type") == "RollingUpdate" {
            set(strategy, "rollingUpdate", json!({}));
            if let Some(rolling) = object(strategy, "rollingUpdate") {
                set(rolling, "maxUnavailable", "25%");
                set(rolling, "maxSurge", "25%");
            }
        }
    }
    set(map, "revisionHistoryLimit", 10);
    set(map, "progressDeadlineSeconds", 600);
}
