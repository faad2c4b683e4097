//! Pods and pod templates. Source: kubernetes v1.37 `pkg/apis/core/validation/validation.go`, `ValidatePodSpec`, `ValidatePodCreate`.

use std::net::IpAddr;

use serde_json::Value;

use super::container::{self, Context};
use super::support::{Errors, Path, flag, get, list, number, text};
use super::{ephemeral, meta, scheduling, security, volume};
use crate::formats;

/// A pod to be created; its metadata is checked before.
pub(super) fn create(errors: &mut Errors, pod: &Value) {
    metadata_and_spec(errors, pod);
    let Some(spec) = get(pod, "spec") else { return };
    let path = Path::new("spec");
    if !list(spec, "ephemeralContainers").is_empty() {
        errors.forbidden(&path.child("ephemeralContainers"), "cannot be set on create");
    }
    if !text(spec, "nodeName").is_empty() && !list(spec, "schedulingGates").is_empty() {
        errors.forbidden(&path.child("nodeName"), "cannot be set until all schedulingGates have been cleared");
    }
}

/// What is checked of a pod on creation and on updates.
pub(super) fn metadata_and_spec(errors: &mut Errors, pod: &Value) {
    let path = Path::new("spec");
    let Some(spec) = get(pod, "spec") else { return };
    let mirror = pod.pointer("/metadata/annotations/kubernetes.io~1config.mirror").and_then(Value::as_str);
    if let Some(value) = mirror.filter(|_| text(spec, "nodeName").is_empty()) {
        let annotations = Path::new("metadata");
        let annotations = annotations.child("annotations");
        let detail = "must set spec.nodeName if mirror pod annotation is set";
        errors.invalid(&annotations.key("kubernetes.io/config.mirror"), value, detail);
    }
    pod_spec(errors, spec, true, &path);
    if text(spec, "serviceAccountName").is_empty() {
        for (index, volume) in list(spec, "volumes").iter().enumerate() {
            let sources = get(volume, "projected").map_or(&[][..], |projected| list(projected, "sources"));
            for (source_index, source) in sources.iter().enumerate() {
                if get(source, "serviceAccountToken").is_some() {
                    let volumes = path.child("volumes");
                    let volume = volumes.index(index);
                    let sources = volume.child("projected");
                    let sources = sources.child("sources");
                    let detail = "must not be specified when serviceAccountName is not set";
                    errors.forbidden(&sources.index(source_index).child("serviceAccountToken"), detail);
                }
            }
        }
    }
    errors.nonnegative(&path.child("terminationGracePeriodSeconds"), number(spec, "terminationGracePeriodSeconds"));
    for key in ["containers", "initContainers"] {
        for (index, container) in list(spec, key).iter().enumerate() {
            let image = text(container, "image");
            if image.trim() != image {
                let detail = "must not have leading or trailing whitespace";
                errors.invalid(&path.child(key).index(index).child("image"), image, detail);
            }
        }
    }
}

/// The template of a workload.
pub(super) fn template(errors: &mut Errors, template: &Value, path: &Path<'_>) {
    let empty = Value::Null;
    let metadata = get(template, "metadata").unwrap_or(&empty);
    meta::labels(errors, metadata, "labels", &path.child("labels"));
    meta::annotations(errors, metadata, &path.child("annotations"));
    let Some(spec) = get(template, "spec") else { return };
    pod_spec(errors, spec, false, &path.child("spec"));
    if !list(spec, "ephemeralContainers").is_empty() {
        errors.forbidden(&path.child("spec").child("ephemeralContainers"), "ephemeral containers not allowed in pod template");
    }
}

fn pod_spec(errors: &mut Errors, spec: &Value, is_pod: bool, path: &Path<'_>) {
    if number(spec, "terminationGracePeriodSeconds").is_none() {
        errors.required(&path.child("terminationGracePeriodSeconds"), "");
    }
    let volumes = volume::volumes(errors, spec, &path.child("volumes"));
    let claims: Vec<&str> = list(spec, "resourceClaims").iter().map(|claim| text(claim, "name")).collect();
    let context = Context {
        volumes: &volumes,
        claims: &claims,
        grace_seconds: number(spec, "terminationGracePeriodSeconds"),
        host_users: get(spec, "hostUsers") != Some(&Value::Bool(false)),
        restart_policy: text(spec, "restartPolicy"),
    };
    container::containers(errors, spec, &context, &path.child("containers"));
    container::init_containers(errors, spec, &context, &path.child("initContainers"));
    ephemeral::containers(errors, spec, &context, &path.child("ephemeralContainers"));
    host_network(errors, spec, is_pod, path);
    errors.one_of(&path.child("restartPolicy"), text(spec, "restartPolicy"), &["Always", "OnFailure", "Never"]);
    let dns_policies = &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"];
    errors.one_of(&path.child("dnsPolicy"), text(spec, "dnsPolicy"), dns_policies);
    meta::labels(errors, spec, "nodeSelector", &path.child("nodeSelector"));
    security::pod(errors, spec, &path.child("securityContext"));
    if flag(spec, "shareProcessNamespace") && flag(spec, "hostPID") {
        let detail = "ShareProcessNamespace and HostPID cannot both be enabled";
        errors.invalid(&path.child("shareProcessNamespace"), true, detail);
    }
    scheduling::affinity(errors, spec, &path.child("affinity"));
    dns_config(errors, spec, &path.child("dnsConfig"));
    for (index, gate) in list(spec, "readinessGates").iter().enumerate() {
        let name = text(gate, "conditionType");
        errors.all_invalid(&path.child("readinessGates").index(index).child("conditionType"), name, formats::label_key(name));
    }
    scheduling_gates(errors, spec, &path.child("schedulingGates"));
    scheduling::topology(errors, spec, &path.child("topologySpreadConstraints"));
    if !context.host_users {
        for (key, name) in [("hostNetwork", "hostNetwork"), ("hostPID", "HostPID"), ("hostIPC", "HostIPC")] {
            if flag(spec, key) {
                errors.forbidden(&path.child(name), "when `hostUsers` is false");
            }
        }
    }
    names(errors, spec, path);
    if !list(spec, "tolerations").is_empty() {
        scheduling::tolerations(errors, spec, &path.child("tolerations"));
    }
    host_aliases(errors, spec, &path.child("hostAliases"));
    classes(errors, spec, path);
    operating_system(errors, spec, path);
    if get(spec, "overhead").is_some() {
        // Upstream checks the overhead as the limits of a container.
        let limits = serde_json::json!({"limits": get(spec, "overhead")});
        super::resources::requirements(errors, &limits, &[], &path.child("overhead"));
    }
}

fn host_network(errors: &mut Errors, spec: &Value, is_pod: bool, path: &Path<'_>) {
    if !flag(spec, "hostNetwork") {
        return;
    }
    for (index, container) in list(spec, "containers").iter().enumerate() {
        for (port_index, port) in list(container, "ports").iter().enumerate() {
            let (host, inner) = (number(port, "hostPort").unwrap_or(0), number(port, "containerPort").unwrap_or(0));
            if (is_pod || host != 0) && host != inner {
                let containers = path.child("containers");
                let container = containers.index(index);
                let port = container.child("ports");
                let port = port.index(port_index);
                errors.invalid(&port.child("hostPort"), host, "must match `containerPort` when `hostNetwork` is true");
            }
        }
    }
}

fn scheduling_gates(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    let mut seen: Vec<&str> = Vec::new();
    for (index, gate) in list(spec, "schedulingGates").iter().enumerate() {
        let name = text(gate, "name");
        errors.all_invalid(&path.index(index), name, formats::label_key(name));
        if seen.contains(&name) {
            errors.duplicate(&path.index(index), name);
        }
        seen.push(name);
    }
}

/// Names of other things, hostname, deadline.
fn names(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    for key in ["serviceAccountName", "nodeName"] {
        let name = text(spec, key);
        if !name.is_empty() {
            errors.all_invalid(&path.child(key), name, formats::dns1123_subdomain(name));
        }
    }
    if let Some(seconds) = number(spec, "activeDeadlineSeconds").filter(|seconds| !(1..=i64::from(i32::MAX)).contains(seconds)) {
        errors.invalid(&path.child("activeDeadlineSeconds"), seconds, formats::range_error(1, i64::from(i32::MAX)));
    }
    for key in ["hostname", "subdomain"] {
        let name = text(spec, key);
        if !name.is_empty() {
            errors.all_invalid(&path.child(key), name, formats::dns1123_label(name));
        }
    }
}

fn classes(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    for key in ["priorityClassName", "runtimeClassName"] {
        let name = text(spec, key);
        if get(spec, key).is_some() && !(key == "priorityClassName" && name.is_empty()) {
            errors.all_invalid(&path.child(key), name, formats::dns1123_subdomain(name));
        }
    }
    let policies = &["PreemptLowerPriority", "Never"];
    errors.one_of(&path.child("preemptionPolicy"), text(spec, "preemptionPolicy"), policies);
}

fn operating_system(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    let Some(os) = get(spec, "os") else { return };
    match text(os, "name") {
        "linux" => {}
        "" => errors.required(&path.child("os").child("name"), ""),
        "windows" => {
            for key in ["hostPID", "hostIPC"] {
                if flag(spec, key) {
                    errors.forbidden(&path.child(key), "cannot be set for a windows pod");
                }
            }
        }
        other => errors.not_supported(&path.child("os"), other, &["linux", "windows"]),
    }
}

/// An IP address in a field that always took what Go's old parser took.
pub(super) fn ip(errors: &mut Errors, value: &str, path: &Path<'_>) {
    if value.parse::<IpAddr>().is_err() {
        errors.invalid(path, value, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
    }
}

fn host_aliases(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    for (index, alias) in list(spec, "hostAliases").iter().enumerate() {
        let path = &path.index(index);
        ip(errors, text(alias, "ip"), &path.child("ip"));
        for (index, name) in list(alias, "hostnames").iter().filter_map(Value::as_str).enumerate() {
            errors.all_invalid(&path.child("hostnames").index(index), name, formats::dns1123_subdomain(name));
        }
    }
}

fn dns_config(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    let config = get(spec, "dnsConfig");
    if text(spec, "dnsPolicy") == "None" {
        let Some(config) = config else {
            errors.required(path, "must provide `dnsConfig` when `dnsPolicy` is None");
            return;
        };
        if list(config, "nameservers").is_empty() {
            errors.required(&path.child("nameservers"), "must provide at least one DNS nameserver when `dnsPolicy` is None");
            return;
        }
    }
    let Some(config) = config else { return };
    let servers = list(config, "nameservers");
    if servers.len() > 3 {
        errors.invalid(&path.child("nameservers"), servers, "must not have more than 3 nameservers");
    }
    for (index, server) in servers.iter().filter_map(Value::as_str).enumerate() {
        ip(errors, server, &path.child("nameservers").index(index));
    }
    let searches = list(config, "searches");
    if searches.len() > 32 {
        errors.invalid(&path.child("searches"), searches, "must not have more than 32 search paths");
    }
    let letters = searches.iter().filter_map(Value::as_str).map(|search| search.len() + 1).sum::<usize>();
    if letters > 2049 {
        let detail = "must not have more than 2048 characters (including spaces) in the search list";
        errors.invalid(&path.child("searches"), searches, detail);
    }
    for (index, search) in searches.iter().filter_map(Value::as_str).enumerate().filter(|(_, search)| *search != ".") {
        let search = search.strip_suffix('.').unwrap_or(search);
        errors.all_invalid(&path.child("searches").index(index), search, formats::dns1123_subdomain_underscore(search));
    }
    for (index, option) in list(config, "options").iter().enumerate() {
        if text(option, "name").is_empty() {
            errors.required(&path.child("options").index(index), "must not be empty");
        }
    }
}
