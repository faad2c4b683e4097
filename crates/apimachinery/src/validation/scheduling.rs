//! What steers scheduling: tolerations, taints, affinities, spreading. Source: kubernetes v1.37
//! `pkg/apis/core/validation/validation.go`.

use serde_json::Value;

use super::selector::label_selector;
use super::support::{Errors, Path, get, list, number, text};
use crate::formats;

const EFFECTS: &[&str] = &["NoSchedule", "PreferNoSchedule", "NoExecute"];

/// A pod's tolerations.
pub(super) fn tolerations(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    for (index, toleration) in list(spec, "tolerations").iter().enumerate() {
        let path = &path.index(index);
        let (key, value, operator) = (text(toleration, "key"), text(toleration, "value"), text(toleration, "operator"));
        let effect = text(toleration, "effect");
        if !key.is_empty() {
            errors.all_invalid(&path.child("key"), key, formats::label_key(key));
        } else if operator != "Exists" {
            let detail = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
            errors.invalid(&path.child("operator"), operator, detail);
        }
        if number(toleration, "tolerationSeconds").is_some() && effect != "NoExecute" {
            errors.invalid(&path.child("effect"), effect, "effect must be 'NoExecute' when `tolerationSeconds` is set");
        }
        match operator {
            "Equal" | "" => {
                let found = formats::label_value(value);
                if !found.is_empty() {
                    errors.invalid(&path.child("operator"), value, found.join(";"));
                }
            }
            "Exists" if !value.is_empty() => {
                errors.invalid(&path.child("operator"), value, "value must be empty when `operator` is 'Exists'");
            }
            "Exists" => {}
            other => errors.not_supported(&path.child("operator"), other, &["Equal", "Exists"]),
        }
        errors.one_of(&path.child("effect"), effect, EFFECTS);
    }
}

/// A node's taints.
pub(super) fn taints(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for (index, taint) in list(spec, "taints").iter().enumerate() {
        let path = &path.index(index);
        let (key, value, effect) = (text(taint, "key"), text(taint, "value"), text(taint, "effect"));
        errors.all_invalid(&path.child("key"), key, formats::label_key(key));
        let found = formats::label_value(value);
        if !found.is_empty() {
            errors.invalid(&path.child("value"), value, found.join(";"));
        }
        if effect.is_empty() {
            errors.required(&path.child("effect"), "");
        } else {
            errors.one_of(&path.child("effect"), effect, EFFECTS);
        }
        if seen.contains(&(key, effect)) {
            let time = get(taint, "timeAdded").cloned().unwrap_or(Value::Null);
            errors.duplicate(path, Value::Null);
            let (key, value, effect) = (Value::from(key), Value::from(value), Value::from(effect));
            errors.show_last(&format!("{{\"Key\":{key},\"Value\":{value},\"Effect\":{effect},\"TimeAdded\":{time}}}"));
            errors.explain_last("taints must be unique by key and effect pair");
            continue;
        }
        seen.push((key, effect));
    }
}

/// A pod's affinities.
pub(super) fn affinity(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    let Some(affinity) = get(spec, "affinity") else { return };
    if let Some(node) = get(affinity, "nodeAffinity") {
        node_affinity(errors, node, &path.child("nodeAffinity"));
    }
    for key in ["podAffinity", "podAntiAffinity"] {
        let Some(pods) = get(affinity, key) else { continue };
        let path = &path.child(key);
        let required = path.child("requiredDuringSchedulingIgnoredDuringExecution");
        for (index, term) in list(pods, "requiredDuringSchedulingIgnoredDuringExecution").iter().enumerate() {
            pod_affinity_term(errors, term, &required.index(index));
        }
        let preferred = path.child("preferredDuringSchedulingIgnoredDuringExecution");
        for (index, weighted) in list(pods, "preferredDuringSchedulingIgnoredDuringExecution").iter().enumerate() {
            let path = &preferred.index(index);
            weight(errors, weighted, path);
            pod_affinity_term(errors, weighted.get("podAffinityTerm").unwrap_or(&Value::Null), &path.child("podAffinityTerm"));
        }
    }
}

fn weight(errors: &mut Errors, weighted: &Value, path: &Path<'_>) {
    let weight = number(weighted, "weight").unwrap_or(0);
    if !(1..=100).contains(&weight) {
        errors.invalid(&path.child("weight"), weight, "must be in the range 1-100");
    }
}

fn pod_affinity_term(errors: &mut Errors, term: &Value, path: &Path<'_>) {
    for key in ["labelSelector", "namespaceSelector"] {
        if let Some(selector) = get(term, key) {
            label_selector(errors, selector, &path.child(key));
        }
    }
    for name in list(term, "namespaces").iter().filter_map(Value::as_str) {
        errors.all_invalid(&path.child("namespace"), name, formats::dns1123_label(name));
    }
    let key = text(term, "topologyKey");
    if key.is_empty() {
        errors.required(&path.child("topologyKey"), "can not be empty");
    }
    errors.all_invalid(&path.child("topologyKey"), key, formats::label_key(key));
}

fn node_affinity(errors: &mut Errors, affinity: &Value, path: &Path<'_>) {
    if let Some(selector) = get(affinity, "requiredDuringSchedulingIgnoredDuringExecution") {
        let required = path.child("requiredDuringSchedulingIgnoredDuringExecution");
        let terms_path = required.child("nodeSelectorTerms");
        let terms = list(selector, "nodeSelectorTerms");
        if terms.is_empty() {
            errors.required(&terms_path, "must have at least one node selector term");
        }
        for (index, term) in terms.iter().enumerate() {
            node_selector_term(errors, term, true, &terms_path.index(index));
        }
    }
    let preferred = path.child("preferredDuringSchedulingIgnoredDuringExecution");
    for (index, weighted) in list(affinity, "preferredDuringSchedulingIgnoredDuringExecution").iter().enumerate() {
        let path = &preferred.index(index);
        weight(errors, weighted, path);
        let term = weighted.get("preference").unwrap_or(&Value::Null);
        node_selector_term(errors, term, false, &path.child("preference"));
    }
}

fn node_selector_term(errors: &mut Errors, term: &Value, check_values: bool, path: &Path<'_>) {
    for (index, expression) in list(term, "matchExpressions").iter().enumerate() {
        let expressions = path.child("matchExpressions");
        let path = &expressions.index(index);
        let values = list(expression, "values");
        match text(expression, "operator") {
            "In" | "NotIn" if values.is_empty() => {
                errors.required(&path.child("values"), "must be specified when `operator` is 'In' or 'NotIn'");
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                errors.forbidden(&path.child("values"), "may not be specified when `operator` is 'Exists' or 'DoesNotExist'");
            }
            "Gt" | "Lt" if values.len() != 1 => {
                errors.required(&path.child("values"), "must be specified single value when `operator` is 'Lt' or 'Gt'");
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
            other => errors.invalid(&path.child("operator"), other, "not a valid selector operator"),
        }
        let key = text(expression, "key");
        errors.all_invalid(&path.child("key"), key, formats::label_key(key));
        for (index, value) in values.iter().filter_map(Value::as_str).enumerate().filter(|_| check_values) {
            errors.all_invalid(&path.child("values").index(index), value, formats::label_value(value));
        }
    }
    for (index, field) in list(term, "matchFields").iter().enumerate() {
        let fields = path.child("matchFields");
        node_field(errors, field, &fields.index(index));
    }
}

fn node_field(errors: &mut Errors, field: &Value, path: &Path<'_>) {
    let values = list(field, "values");
    match text(field, "operator") {
        "In" | "NotIn" if values.len() != 1 => {
            let detail = "must be only one value when `operator` is 'In' or 'NotIn' for node field selector";
            errors.required(&path.child("values"), detail);
        }
        "In" | "NotIn" => {}
        other => errors.invalid(&path.child("operator"), other, "not a valid selector operator"),
    }
    if text(field, "key") != "metadata.name" {
        errors.invalid(&path.child("key"), text(field, "key"), "not a valid field selector key");
        return;
    }
    for (index, value) in values.iter().filter_map(Value::as_str).enumerate() {
        errors.all_invalid(&path.child("values").index(index), value, formats::dns1123_subdomain(value));
    }
}

/// A pod's topology spread constraints.
pub(super) fn topology(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    let constraints = list(spec, "topologySpreadConstraints");
    for (index, constraint) in constraints.iter().enumerate() {
        let path = &path.index(index);
        let skew = number(constraint, "maxSkew").unwrap_or(0);
        if skew <= 0 {
            errors.invalid(&path.child("maxSkew"), skew, "must be greater than zero");
        }
        let (key, action) = (text(constraint, "topologyKey"), text(constraint, "whenUnsatisfiable"));
        if key.is_empty() {
            errors.required(&path.child("topologyKey"), "can not be empty");
        }
        if !matches!(action, "DoNotSchedule" | "ScheduleAnyway") {
            errors.not_supported(&path.child("whenUnsatisfiable"), action, &["DoNotSchedule", "ScheduleAnyway"]);
        }
        let repeats = |other: &Value| text(other, "topologyKey") == key && text(other, "whenUnsatisfiable") == action;
        if constraints[index + 1..].iter().any(repeats) {
            errors.duplicate(&path.child("{topologyKey, whenUnsatisfiable}"), format!("{{{key}, {action}}}"));
        }
        if let Some(domains) = number(constraint, "minDomains") {
            let path = path.child("minDomains");
            if domains <= 0 {
                errors.invalid(&path, domains, "must be greater than zero");
            }
            if action != "DoNotSchedule" {
                let detail = format!("can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {action}");
                errors.invalid(&path, domains, detail);
            }
        }
        for policy in ["nodeAffinityPolicy", "nodeTaintsPolicy"] {
            errors.one_of(&path.child(policy), text(constraint, policy), &["Honor", "Ignore"]);
        }
        if let Some(selector) = get(constraint, "labelSelector") {
            label_selector(errors, selector, &path.child("labelSelector"));
        }
    }
}
