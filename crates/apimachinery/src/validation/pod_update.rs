//! Updates of pods. Source: kubernetes v1.37 `pkg/apis/core/validation/validation.go`, `ValidatePodUpdate`, `ValidatePodStatusUpdate`.

use serde_json::Value;

use super::pod;
use super::support::{Errors, IMMUTABLE, Path, get, list, number, text};
use crate::formats;

const CHANGEABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only \
                          additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was \
                          previously negative)";

/// An update through the main resource; metadata is checked before.
pub(super) fn update(errors: &mut Errors, pod: &Value, old: &Value) {
    pod::metadata_and_spec(errors, pod);
    let (Some(new), Some(old)) = (get(pod, "spec"), get(old, "spec")) else { return };
    let path = Path::new("spec");
    for key in ["containers", "initContainers"] {
        let (new, old) = (list(new, key), list(old, key));
        if new.len() != old.len() {
            errors.forbidden(&path.child(key), "pod updates may not add or remove containers");
            return;
        }
    }
    if !deadline(errors, new, old, &path.child("activeDeadlineSeconds")) {
        return;
    }
    tolerations(errors, new, old, &path.child("tolerations"));
    let gates = list(old, "schedulingGates");
    for (index, gate) in list(new, "schedulingGates").iter().enumerate().filter(|(_, gate)| !gates.contains(gate)) {
        let detail = format!("only deletion is allowed, but found new scheduling gate '{}'", text(gate, "name"));
        errors.forbidden(&path.child("schedulingGates").index(index), &detail);
    }
    if new == old {
        return;
    }
    let mut munged = new.clone();
    munge(&mut munged, old);
    if munged != *old {
        let difference = difference(old, &munged);
        errors.forbidden(&path, &format!("pod updates may not change fields other than {CHANGEABLE}\n{difference}"));
    }
}

/// Puts back what may change.
fn munge(munged: &mut Value, old: &Value) {
    for key in ["containers", "initContainers"] {
        let before = list(old, key);
        for (index, container) in munged.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten().enumerate() {
            container["image"] = before[index]["image"].clone();
        }
    }
    let gated = !list(old, "schedulingGates").is_empty();
    let mut keys = vec!["activeDeadlineSeconds", "schedulingGates", "tolerations"];
    if gated && only_adds(get(munged, "nodeSelector"), get(old, "nodeSelector")) {
        keys.push("nodeSelector");
    }
    if let Value::Object(map) = munged {
        for key in keys {
            match old.get(key) {
                Some(value) => map.insert(key.to_owned(), value.clone()),
                None => map.remove(key),
            };
        }
        if number(old, "terminationGracePeriodSeconds").is_some_and(|seconds| seconds < 0)
            && map.get("terminationGracePeriodSeconds").and_then(Value::as_i64) == Some(1)
        {
            map.insert("terminationGracePeriodSeconds".to_owned(), old["terminationGracePeriodSeconds"].clone());
        }
    }
}

fn only_adds(new: Option<&Value>, old: Option<&Value>) -> bool {
    let Some(old) = old.and_then(Value::as_object) else { return true };
    old.iter().all(|(key, value)| new.and_then(|new| new.get(key)) == Some(value))
}

/// The changed fields, a line each. (Upstream shows a diff of Go structs here; ours names the paths.)
fn difference(old: &Value, new: &Value) -> String {
    let mut lines = Vec::new();
    compare(old, new, "spec", &mut lines);
    lines.join("\n")
}

fn compare(old: &Value, new: &Value, path: &str, lines: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            let mut keys: Vec<&String> = old.keys().chain(new.keys()).collect();
            keys.sort_unstable();
            keys.dedup();
            for key in keys {
                compare(old.get(key).unwrap_or(&Value::Null), new.get(key).unwrap_or(&Value::Null), &format!("{path}.{key}"), lines);
            }
        }
        (Value::Array(old), Value::Array(new)) if old.len() == new.len() => {
            for (index, (old, new)) in old.iter().zip(new).enumerate() {
                compare(old, new, &format!("{path}[{index}]"), lines);
            }
        }
        (old, new) if old != new => lines.push(format!("{path}: {old} -> {new}")),
        _ => {}
    }
}

/// False when nothing more is checked.
fn deadline(errors: &mut Errors, new: &Value, old: &Value, path: &Path<'_>) -> bool {
    match (number(new, "activeDeadlineSeconds"), number(old, "activeDeadlineSeconds")) {
        (Some(seconds), _) if !(0..=i64::from(i32::MAX)).contains(&seconds) => {
            errors.invalid(path, seconds, formats::range_error(0, i64::from(i32::MAX)));
            false
        }
        (Some(seconds), Some(before)) if before < seconds => {
            errors.invalid(path, seconds, "must be less than or equal to previous value");
            false
        }
        (None, Some(_)) => {
            errors.invalid(path, Value::Null, "must not update from a positive integer to nil value");
            true
        }
        _ => true,
    }
}

/// Tolerations may only be added (or have their seconds changed).
fn tolerations(errors: &mut Errors, new: &Value, old: &Value, path: &Path<'_>) {
    let plain = |toleration: &Value| ["key", "operator", "value", "effect"].map(|key| text(toleration, key).to_owned());
    for before in list(old, "tolerations") {
        if !list(new, "tolerations").iter().any(|toleration| plain(toleration) == plain(before)) {
            errors.forbidden(path, "existing toleration can not be modified except its tolerationSeconds");
            return;
        }
    }
}

/// An update through `status`.
pub(super) fn status(errors: &mut Errors, pod: &Value, old_pod: &Value) {
    let empty = Value::Null;
    let (new, old) = (get(pod, "status").unwrap_or(&empty), get(old_pod, "status").unwrap_or(&empty));
    let spec = get(old_pod, "spec").unwrap_or(&empty);
    let path = Path::new("status");
    for (index, condition) in list(new, "conditions").iter().enumerate() {
        let kind = text(condition, "type");
        if !matches!(kind, "PodScheduled" | "Ready" | "Initialized") {
            errors.all_invalid(&path.child("conditions").index(index).child("Type"), kind, formats::label_key(kind));
        }
    }
    let nominated = text(new, "nominatedNodeName");
    if !nominated.is_empty() && nominated != text(old, "nominatedNodeName") {
        errors.all_invalid(&path.child("nominatedNodeName"), nominated, formats::dns1123_subdomain(nominated));
        if !text(spec, "nodeName").is_empty() {
            errors.forbidden(&path.child("nominatedNodeName"), "may not be set on pods that are already bound to a node");
        }
    }
    if number(new, "observedGeneration").is_some_and(|generation| generation < 0) {
        errors.invalid(&path.child("observedGeneration"), new["observedGeneration"].clone(), "must be a non-negative integer");
    }
    if text(new, "qosClass") != text(old, "qosClass") {
        errors.invalid(&path.child("qosClass"), text(new, "qosClass"), IMMUTABLE);
    }
    transitions(errors, spec, list(new, "containerStatuses"), list(old, "containerStatuses"), &path.child("containerStatuses"));
    addresses(errors, new, "podIPs", &path.child("podIPs"));
    addresses(errors, new, "hostIPs", &path.child("hostIPs"));
}

/// A container that ended stays so, unless the restart policy lets it start again.
fn transitions(errors: &mut Errors, spec: &Value, new: &[Value], old: &[Value], path: &Path<'_>) {
    let policy = text(spec, "restartPolicy");
    for (index, before) in old.iter().enumerate() {
        let Some(ended) = before.pointer("/state/terminated") else { continue };
        let exit_code = number(ended, "exitCode").unwrap_or(0);
        let own = list(spec, "containers").iter().find(|container| text(container, "name") == text(before, "name"));
        let own = own.map_or("", |container| text(container, "restartPolicy"));
        let policy = if own.is_empty() { policy } else { own };
        if policy == "Always" || (policy == "OnFailure" && exit_code != 0) {
            continue;
        }
        let restarted = |status: &&Value| text(status, "name") == text(before, "name") && status.pointer("/state/terminated").is_none();
        if new.iter().any(|status| restarted(&status)) {
            errors.forbidden(&path.index(index).child("state"), "may not be transitioned to non-terminated state");
        }
    }
}

/// At most one address of each family.
fn addresses(errors: &mut Errors, status: &Value, key: &str, path: &Path<'_>) {
    let addresses = list(status, key);
    for (index, address) in addresses.iter().enumerate() {
        pod::ip(errors, text(address, "ip"), &path.index(index));
    }
    let families: Vec<bool> = addresses.iter().map(|address| text(address, "ip").contains(':')).collect();
    if families.len() > 2 || (families.len() == 2 && families[0] == families[1]) {
        let ips: Vec<&str> = addresses.iter().map(|address| text(address, "ip")).collect();
        errors.invalid(path, ips, "may specify no more than one IP for each IP family");
    }
}
