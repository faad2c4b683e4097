//! Deployments, ReplicaSets and their scale. Source: kubernetes v1.37 `pkg/apis/apps/validation/validation.go`.

use serde_json::Value;

use super::selector::{is_usable, label_selector};
use super::support::{Errors, IMMUTABLE, Path, get, list, number, text};
use super::{meta, pod};
use crate::formats;
use crate::selector::label::LabelSelector;

/// The checks that Deployments and ReplicaSets share from the selector on.
fn selector_and_template(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    let selector_path = path.child("selector");
    let selector = get(spec, "selector");
    match selector {
        None => errors.required(&selector_path, ""),
        Some(selector) => {
            label_selector(errors, selector, &selector_path);
            let size = selector.get("matchLabels").and_then(Value::as_object).map_or(0, serde_json::Map::len);
            if size + list(selector, "matchExpressions").len() == 0 {
                errors.invalid(&selector_path, selector.clone(), "empty selector is invalid for deployment");
            }
            if !is_usable(selector) {
                errors.invalid(&selector_path, selector.clone(), "invalid label selector");
                return;
            }
        }
    }
    let Some(template) = get(spec, "template") else { return };
    let path = path.child("template");
    let labels = template.pointer("/metadata/labels");
    let matcher = LabelSelector::from_object(selector).unwrap_or_default();
    if !matcher.is_empty() && !matcher.matches(labels) {
        let shown = labels.cloned().unwrap_or(Value::Null);
        errors.invalid(&path.child("metadata").child("labels"), shown, "`selector` does not match template `labels`");
    }
    pod::template(errors, template, &path);
    let inner = path.child("spec");
    if let Some(spec) = get(template, "spec") {
        if text(spec, "restartPolicy") != "Always" {
            errors.not_supported(&inner.child("restartPolicy"), text(spec, "restartPolicy"), &["Always"]);
        }
        if get(spec, "activeDeadlineSeconds").is_some() {
            errors.forbidden(&inner.child("activeDeadlineSeconds"), "activeDeadlineSeconds in ReplicaSet is not Supported");
        }
    }
}

fn immutable_selector(errors: &mut Errors, object: &Value, old: Option<&Value>) {
    let selector = |object: &Value| object.pointer("/spec/selector").cloned().unwrap_or(Value::Null);
    if let Some(old) = old
        && selector(old) != selector(object)
    {
        errors.invalid(&Path::new("spec").child("selector"), selector(object), IMMUTABLE);
    }
}

/// A Deployment to be created, or updated from `old`.
pub(super) fn deployment(errors: &mut Errors, deployment: &Value, old: Option<&Value>) {
    let Some(spec) = get(deployment, "spec") else { return };
    let path = Path::new("spec");
    errors.nonnegative(&path.child("replicas"), number(spec, "replicas"));
    selector_and_template(errors, spec, &path);
    strategy(errors, spec, &path.child("strategy"));
    for key in ["minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"] {
        errors.nonnegative(&path.child(key), number(spec, key));
    }
    if let Some(deadline) = number(spec, "progressDeadlineSeconds")
        && deadline <= number(spec, "minReadySeconds").unwrap_or(0)
    {
        errors.invalid(&path.child("progressDeadlineSeconds"), deadline, "must be greater than minReadySeconds");
    }
    immutable_selector(errors, deployment, old);
}

fn strategy(errors: &mut Errors, spec: &Value, path: &Path<'_>) {
    let empty = Value::Null;
    let strategy = get(spec, "strategy").unwrap_or(&empty);
    let rolling = get(strategy, "rollingUpdate");
    let rolling_path = path.child("rollingUpdate");
    match text(strategy, "type") {
        "Recreate" => {
            if rolling.is_some() {
                errors.forbidden(&rolling_path, "may not be specified when strategy `type` is 'Recreate'");
            }
        }
        "RollingUpdate" => match rolling {
            None => errors.required(&rolling_path, "this should be defaulted and never be nil"),
            Some(rolling) => {
                let (unavailable_path, surge_path) = (rolling_path.child("maxUnavailable"), rolling_path.child("maxSurge"));
                let (unavailable, surge) = (&rolling["maxUnavailable"], &rolling["maxSurge"]);
                int_or_percent(errors, unavailable, &unavailable_path);
                int_or_percent(errors, surge, &surge_path);
                if amount(unavailable) == 0 && amount(surge) == 0 {
                    errors.invalid(&unavailable_path, unavailable.clone(), "may not be 0 when `maxSurge` is 0");
                }
                if percentage(unavailable).is_some_and(|percent| percent > 100) {
                    errors.invalid(&unavailable_path, unavailable.clone(), "must not be greater than 100%");
                }
            }
        },
        other => {
            errors.not_supported(path, Value::Null, &["Recreate", "RollingUpdate"]);
            errors.show_last(&format!("{{\"Type\":{},\"RollingUpdate\":{}}}", Value::from(other), rolling.unwrap_or(&Value::Null)));
        }
    }
}

fn int_or_percent(errors: &mut Errors, value: &Value, path: &Path<'_>) {
    match value {
        Value::String(text) => errors.all_invalid(path, text, formats::percent(text)),
        other => errors.nonnegative(path, other.as_i64()),
    }
}

fn percentage(value: &Value) -> Option<i64> {
    value.as_str().and_then(|text| text.strip_suffix('%')).and_then(|digits| digits.parse().ok())
}

fn amount(value: &Value) -> i64 {
    percentage(value).or_else(|| value.as_i64()).unwrap_or(0)
}

/// The status of a Deployment.
pub(super) fn deployment_status(errors: &mut Errors, deployment: &Value, old: &Value) {
    let Some(status) = get(deployment, "status") else { return };
    let path = Path::new("status");
    for key in [
        "observedGeneration",
        "replicas",
        "updatedReplicas",
        "readyReplicas",
        "availableReplicas",
        "unavailableReplicas",
        "terminatingReplicas",
        "collisionCount",
    ] {
        errors.nonnegative(&path.child(key), number(status, key));
    }
    counts(errors, status, &["updatedReplicas", "readyReplicas", "availableReplicas"], &path);
    let before = old.pointer("/status/collisionCount").and_then(Value::as_i64).unwrap_or(0);
    let count = number(status, "collisionCount").unwrap_or(0);
    if count < before {
        errors.invalid(&path.child("collisionCount"), count, "cannot be decremented");
    }
}

/// The status of a ReplicaSet.
pub(super) fn replica_set_status(errors: &mut Errors, set: &Value) {
    let Some(status) = get(set, "status") else { return };
    let path = Path::new("status");
    for key in ["replicas", "fullyLabeledReplicas", "readyReplicas", "availableReplicas", "observedGeneration", "terminatingReplicas"] {
        errors.nonnegative(&path.child(key), number(status, key));
    }
    counts(errors, status, &["fullyLabeledReplicas", "readyReplicas", "availableReplicas"], &path);
}

fn counts(errors: &mut Errors, status: &Value, keys: &[&str], path: &Path<'_>) {
    let count = |key: &str| number(status, key).unwrap_or(0);
    for key in keys {
        if count(key) > count("replicas") {
            errors.invalid(&path.child(key), count(key), "cannot be greater than status.replicas");
        }
    }
    if count("availableReplicas") > count("readyReplicas") {
        errors.invalid(&path.child("availableReplicas"), count("availableReplicas"), "cannot be greater than readyReplicas");
    }
}

/// A ReplicaSet to be created, or updated from `old`.
pub(super) fn replica_set(errors: &mut Errors, set: &Value, old: Option<&Value>) {
    let Some(spec) = get(set, "spec") else { return };
    let path = Path::new("spec");
    errors.nonnegative(&path.child("replicas"), number(spec, "replicas"));
    errors.nonnegative(&path.child("minReadySeconds"), number(spec, "minReadySeconds"));
    selector_and_template(errors, spec, &path);
    immutable_selector(errors, set, old);
}

/// A Scale.
pub(super) fn scale(errors: &mut Errors, scale: &Value) {
    let path = Path::new("spec");
    let replicas = scale.pointer("/spec/replicas").and_then(Value::as_i64);
    errors.nonnegative(&path.child("replicas"), replicas);
    let empty = Value::Null;
    meta::labels(errors, get(scale, "metadata").unwrap_or(&empty), "labels", &Path::new("metadata").child("labels"));
}
