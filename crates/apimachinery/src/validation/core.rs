//! The smaller kinds. Sources: kubernetes v1.37 `pkg/apis/{core,coordination,discovery,scheduling,authentication}/validation`.

use base64::Engine as _;
use serde_json::Value;

use super::pod::ip;
use super::resources::resource_list;
use super::scheduling::taints;
use super::service::{cidr, endpoint_ip};
use super::support::{Errors, IMMUTABLE, Path, flag, get, list, number, pairs, text};
use crate::KindFacts;
use crate::field_error::FieldError;
use crate::formats;

/// Most bytes of a ConfigMap's or Secret's values.
const DATA_BYTES_MAX: usize = 1024 * 1024;

fn base64_length(text: &str) -> usize {
    text.len() / 4 * 3 - text.bytes().rev().take_while(|byte| *byte == b'=').count().min(text.len())
}

/// Whether data may change: not when the old object is immutable.
fn immutability(errors: &mut Errors, object: &Value, old: Option<&Value>) {
    let Some(old) = old.filter(|old| flag(old, "immutable")) else { return };
    if !flag(object, "immutable") {
        errors.forbidden(&Path::new("immutable"), "field is immutable when `immutable` is set");
    }
    for key in ["data", "binaryData"] {
        let size = |value: &Value| value.get(key).and_then(Value::as_object).is_none_or(serde_json::Map::is_empty);
        if object.get(key) != old.get(key) && !(size(object) && size(old)) {
            errors.forbidden(&Path::new(key), "field is immutable when `immutable` is set");
        }
    }
}

/// A ConfigMap.
pub(super) fn config_map(errors: &mut Errors, object: &Value, old: Option<&Value>) {
    immutability(errors, object, old);
    let binary = pairs(object, "binaryData");
    let mut bytes = 0;
    for (key, value) in pairs(object, "data") {
        let path = Path::new("data");
        errors.all_invalid(&path.key(key), key, formats::config_key(key));
        if binary.iter().any(|(other, _)| *other == key) {
            errors.invalid(&path.key(key), key, "duplicate of key present in binaryData");
        }
        bytes += value.len();
    }
    for (key, value) in binary {
        errors.all_invalid(&Path::new("binaryData").key(key), key, formats::config_key(key));
        bytes += base64_length(value);
    }
    if bytes > DATA_BYTES_MAX {
        errors.push(FieldError::too_long("[]", DATA_BYTES_MAX));
    }
}

/// A Secret.
pub(super) fn secret(errors: &mut Errors, object: &Value, old: Option<&Value>) {
    let kind = text(object, "type");
    if let Some(old) = old {
        if text(old, "type") != kind {
            errors.invalid(&Path::new("type"), kind, IMMUTABLE);
        }
        immutability(errors, object, Some(old));
    }
    let path = Path::new("data");
    let data = pairs(object, "data");
    let mut bytes = 0;
    for (key, value) in &data {
        errors.all_invalid(&path.key(key), key, formats::config_key(key));
        bytes += base64_length(value);
    }
    if bytes > DATA_BYTES_MAX {
        errors.push(FieldError::too_long("data", DATA_BYTES_MAX));
    }
    let has = |key: &str| data.iter().any(|(known, _)| *known == key);
    match kind {
        "kubernetes.io/service-account-token" => {
            let account = object.pointer("/metadata/annotations/kubernetes.io~1service-account.name").and_then(Value::as_str);
            if account.unwrap_or("").is_empty() {
                let metadata = Path::new("metadata");
                errors.required(&metadata.child("annotations").key("kubernetes.io/service-account.name"), "");
            }
        }
        "kubernetes.io/dockercfg" => docker_config(errors, &data, ".dockercfg"),
        "kubernetes.io/dockerconfigjson" => docker_config(errors, &data, ".dockerconfigjson"),
        "kubernetes.io/basic-auth" if !has("username") && !has("password") => {
            errors.required(&path.key("username"), "");
            errors.required(&path.key("password"), "");
        }
        "kubernetes.io/ssh-auth" if !data.iter().any(|(key, value)| *key == "ssh-privatekey" && !value.is_empty()) => {
            errors.required(&path.key("ssh-privatekey"), "");
        }
        "kubernetes.io/tls" => {
            for key in ["tls.crt", "tls.key"] {
                if !has(key) {
                    errors.required(&path.key(key), "");
                }
            }
        }
        _ => {}
    }
}

fn docker_config(errors: &mut Errors, data: &[(&str, &str)], key: &str) {
    let path = Path::new("data");
    let Some((_, value)) = data.iter().find(|(known, _)| *known == key) else {
        errors.required(&path.key(key), "");
        return;
    };
    let bytes = base64::engine::general_purpose::STANDARD.decode(value).unwrap_or_default();
    if let Err(detail) = crate::codec::strict::check_json_object(&bytes) {
        errors.invalid(&path.key(key), "<secret contents redacted>", detail);
    }
}

/// A Namespace.
pub(super) fn namespace(errors: &mut Errors, object: &Value) {
    let path = Path::new("spec");
    let path = path.child("finalizers");
    let finalizers = get(object, "spec").map_or(&[][..], |spec| list(spec, "finalizers"));
    for name in finalizers.iter().filter_map(Value::as_str) {
        errors.all_invalid(&path, name, formats::label_key(name));
        if !name.contains('/') && !matches!(name, "kubernetes" | "orphan" | "foregroundDeletion") {
            errors.invalid(&path, name, "name is neither a standard finalizer name nor is it fully qualified");
        }
    }
}

/// A Node to be created, or updated from `old` (also through `status`).
pub(super) fn node(errors: &mut Errors, node: &Value, old: Option<&Value>) {
    let empty = Value::Null;
    let (spec, status) = (get(node, "spec").unwrap_or(&empty), get(node, "status").unwrap_or(&empty));
    let (metadata, spec_path, status_path) = (Path::new("metadata"), Path::new("spec"), Path::new("status"));
    if old.is_none() {
        taints(errors, spec, &metadata.child("taints"));
    }
    for key in ["capacity", "allocatable"] {
        resource_list(errors, status, key, &status_path.child(key));
    }
    let cidrs_path = spec_path.child("podCIDRs");
    let cidrs = list(spec, "podCIDRs");
    let Some(old) = old else {
        for (index, value) in cidrs.iter().filter_map(Value::as_str).enumerate() {
            cidr(errors, value, &cidrs_path.index(index));
        }
        let is_v6 = |cidr: &Value| cidr.as_str().is_some_and(|cidr| cidr.contains(':'));
        if cidrs.len() > 2 || (cidrs.len() == 2 && is_v6(&cidrs[0]) == is_v6(&cidrs[1])) {
            errors.invalid(&cidrs_path, cidrs, "may specify no more than one CIDR for each IP family");
        }
        return;
    };
    let addresses = list(status, "addresses");
    for (index, address) in addresses.iter().enumerate().filter(|(index, address)| addresses[..*index].contains(address)) {
        errors.duplicate(&status_path.child("addresses").index(index), Value::Null);
        let show = |key: &str| Value::from(text(address, key)).to_string();
        errors.show_last(&format!("{{\"Type\":{},\"Address\":{}}}", show("type"), show("address")));
    }
    let before = get(old, "spec").unwrap_or(&empty);
    let old_cidrs = list(before, "podCIDRs");
    if !old_cidrs.is_empty() && old_cidrs != cidrs {
        errors.forbidden(&cidrs_path, "node updates may not change podCIDR except from \"\" to valid");
    }
    let (provider, old_provider) = (text(spec, "providerID"), text(before, "providerID"));
    if !old_provider.is_empty() && provider != old_provider {
        let detail = if provider.is_empty() { "field cannot be cleared once set" } else { "field cannot be modified once set" };
        errors.invalid(&spec_path.child("providerID"), Value::Null, detail);
    }
    taints(errors, spec, &metadata.child("taints"));
}

/// The target of a Binding.
pub(super) fn binding(errors: &mut Errors, binding: &Value) {
    let empty = Value::Null;
    let target = get(binding, "target").unwrap_or(&empty);
    let path = Path::new("target");
    errors.one_of(&path.child("kind"), text(target, "kind"), &["Node", "<empty>"]);
    let name = text(target, "name");
    if name.is_empty() {
        errors.required(&path.child("name"), "");
    } else {
        errors.all_invalid(&path.child("name"), name, formats::dns1123_subdomain(name));
    }
}

/// An Event of core/v1 or events.k8s.io/v1.
pub(super) fn event(errors: &mut Errors, event: &Value, kind: &KindFacts) {
    let core = kind.group.is_empty();
    let (object_key, message_key, reporter_key) =
        if core { ("involvedObject", "message", "reportingComponent") } else { ("regarding", "note", "reportingController") };
    // Upstream's checks are on the internal type, whose names are those of core/v1.
    let reporter_name = if core { "reportingComponent" } else { "reportingController" };
    let metadata = event.pointer("/metadata/namespace").and_then(Value::as_str).unwrap_or("");
    let empty = Value::Null;
    let object = get(event, object_key).unwrap_or(&empty);
    let namespace = text(object, "namespace");
    let place = Path::new("involvedObject");
    if namespace.is_empty() {
        if metadata != "default" && metadata != "kube-system" {
            errors.invalid(&place.child("namespace"), namespace, "does not match event.namespace");
        }
    } else if namespace != metadata {
        errors.invalid(&place.child("namespace"), namespace, "does not match event.namespace");
    }
    if get(event, "eventTime").is_some() {
        let reporter = text(event, reporter_key);
        let path = Path::new(reporter_name);
        if reporter.is_empty() {
            errors.required(&path, "");
        }
        errors.all_invalid(&path, reporter, formats::label_key(reporter));
        for (key, limit) in [("reportingInstance", 128), ("action", 128), ("reason", 128)] {
            let value = text(event, key);
            if value.is_empty() {
                errors.required(&Path::new(key), "");
            } else if value.len() > limit {
                errors.invalid(&Path::new(key), "", format!("can have at most {limit} characters"));
            }
        }
        if text(event, message_key).len() > 1024 {
            errors.invalid(&Path::new("message"), "", "can have at most 1024 characters");
        }
    }
    if !core {
        if get(event, "eventTime").is_none() {
            errors.required(&Path::new("eventTime"), "");
            return;
        }
        let value = text(event, "type");
        if !matches!(value, "Normal" | "Warning") {
            errors.invalid(&Path::new("type"), "", format!("has invalid value: {value}"));
        }
    }
}

/// A Lease.
pub(super) fn lease(errors: &mut Errors, lease: &Value) {
    let Some(spec) = get(lease, "spec") else { return };
    let path = Path::new("spec");
    if let Some(seconds) = number(spec, "leaseDurationSeconds").filter(|seconds| *seconds <= 0) {
        errors.invalid(&path.child("leaseDurationSeconds"), seconds, "must be greater than 0");
    }
    errors.nonnegative(&path.child("leaseTransitions"), number(spec, "leaseTransitions"));
}

/// An EndpointSlice to be created, or updated from `old`.
pub(super) fn endpoint_slice(errors: &mut Errors, slice: &Value, old: Option<&Value>) {
    let kind = text(slice, "addressType");
    let path = Path::new("addressType");
    if old.is_some_and(|old| text(old, "addressType") != kind) {
        errors.invalid(&path, Value::Null, IMMUTABLE);
    }
    if kind.is_empty() {
        errors.required(&path, "");
    } else {
        errors.one_of(&path, kind, &["FQDN", "IPv4", "IPv6"]);
    }
    let path = Path::new("endpoints");
    for (index, endpoint) in list(slice, "endpoints").iter().enumerate() {
        let path = &path.index(index);
        let addresses = path.child("addresses");
        if list(endpoint, "addresses").is_empty() {
            errors.required(&addresses, "");
        }
        for (index, address) in list(endpoint, "addresses").iter().filter_map(Value::as_str).enumerate() {
            let indexed = addresses.index(index);
            if kind == "FQDN" {
                errors.all_invalid(&indexed, address, formats::dns1123_subdomain(address));
            } else if matches!(kind, "IPv4" | "IPv6") {
                let before = errors.len();
                ip(errors, address, &indexed);
                if errors.len() == before {
                    if (kind == "IPv6") != address.contains(':') {
                        errors.invalid(&addresses, address, format!("must be an {kind} address"));
                    }
                    endpoint_ip(errors, address, &indexed);
                }
            }
        }
        let node = text(endpoint, "nodeName");
        if !node.is_empty() {
            errors.all_invalid(&path.child("nodeName"), node, formats::dns1123_subdomain(node));
        }
        if let Some(name) = get(endpoint, "hostname").and_then(Value::as_str) {
            errors.all_invalid(&path.child("hostname"), name, formats::dns1123_label(name));
        }
        let hints = path.child("hints");
        for (key, most) in [("forZones", 8), ("forNodes", 8)] {
            let targets = get(endpoint, "hints").map_or(&[][..], |hints| list(hints, key));
            let path = hints.child(key);
            if targets.len() > most {
                errors.push(crate::field_error::FieldError::too_many(&path, targets.len(), most));
                continue;
            }
            let mut seen: Vec<&str> = Vec::new();
            for (index, target) in targets.iter().enumerate() {
                let (path, name) = (path.index(index), text(target, "name"));
                let path = path.child("name");
                errors.all_invalid(&path, name, formats::label_value(name));
                if seen.contains(&name) {
                    errors.duplicate(&path, name);
                }
                seen.push(name);
            }
        }
    }
    endpoint_ports(errors, slice);
}

fn endpoint_ports(errors: &mut Errors, slice: &Value) {
    let path = Path::new("ports");
    let mut names: Vec<&str> = Vec::new();
    for (index, port) in list(slice, "ports").iter().enumerate() {
        let path = &path.index(index);
        let name = text(port, "name");
        if !name.is_empty() {
            errors.all_invalid(&path.child("name"), name, formats::dns1123_label(name));
        }
        if names.contains(&name) {
            errors.duplicate(&path.child("name"), name);
        } else {
            names.push(name);
        }
        errors.one_of(&path.child("protocol"), text(port, "protocol"), &["SCTP", "TCP", "UDP"]);
        if let Some(protocol) = get(port, "appProtocol").and_then(Value::as_str) {
            errors.all_invalid(&path.child("appProtocol"), protocol, formats::label_key(protocol));
        }
    }
}

/// A PriorityClass to be created, or updated from `old`.
pub(super) fn priority_class(errors: &mut Errors, class: &Value, old: Option<&Value>) {
    let value = number(class, "value").unwrap_or(0);
    if let Some(old) = old {
        if number(old, "value").unwrap_or(0) != value {
            errors.forbidden(&Path::new("value"), "may not be changed in an update.");
        }
        if get(old, "preemptionPolicy") != get(class, "preemptionPolicy") {
            errors.invalid(&Path::new("preemptionPolicy"), text(class, "preemptionPolicy"), IMMUTABLE);
        }
        return;
    }
    let name = class.pointer("/metadata/name").and_then(Value::as_str).unwrap_or("");
    if name.starts_with("system-") {
        let known = matches!((name, value), ("system-node-critical", 2_000_001_000) | ("system-cluster-critical", 2_000_000_000));
        if !known {
            let detail = "priority class names with 'system-' prefix are reserved for system use only. error:";
            let path = Path::new("metadata");
            errors.forbidden(&path.child("name"), &format!("{detail} {name} is not a known system priority class"));
        }
    } else if value > 1_000_000_000 {
        errors.forbidden(&Path::new("value"), "maximum allowed value of a user defined priority is 1000000000");
    }
    errors.one_of(&Path::new("preemptionPolicy"), text(class, "preemptionPolicy"), &["PreemptLowerPriority", "Never"]);
}

/// A TokenRequest.
pub(super) fn token_request(errors: &mut Errors, request: &Value) {
    let path = Path::new("spec");
    let path = path.child("expirationSeconds");
    let seconds = request.pointer("/spec/expirationSeconds").and_then(Value::as_i64).unwrap_or(0);
    if seconds < 600 {
        errors.invalid(&path, seconds, "may not specify a duration less than 10 minutes");
    }
    if seconds > 1 << 32 {
        errors.invalid(&path, seconds, "may not specify a duration larger than 2^32 seconds");
    }
}
