//! Metadata. Source: k8s.io/apimachinery v0.37 `pkg/api/validation/objectmeta.go`.

use serde_json::{Value, json};

use super::support::{Errors, IMMUTABLE, Path, get, list, number, pairs, text};
use crate::KindFacts;
use crate::formats;

/// Most bytes of all annotations together.
const ANNOTATIONS_BYTES_MAX: usize = 256 * 1024;

/// Upstream's texts for a name that is not well-formed for the kind.
pub(super) fn name_errors(kind: &KindFacts, name: &str) -> Vec<String> {
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Namespace" | "Service") => formats::dns1123_label(name),
        ("rbac.authorization.k8s.io", _) | ("events.k8s.io", _) => formats::path_segment(name),
        _ => formats::dns1123_subdomain(name),
    }
}

/// The metadata of an object to be created (and of a pod in any case).
pub(super) fn create(errors: &mut Errors, kind: &KindFacts, object: &Value) {
    let Some(metadata) = get(object, "metadata") else { return };
    let path = Path::new("metadata");
    let generate = text(metadata, "generateName");
    if !generate.is_empty() {
        // A trailing hyphen is cut for the check.
        let prefix = generate.strip_suffix('-').map_or(generate.to_owned(), |prefix| format!("{prefix}a"));
        errors.all_invalid(&path.child("generateName"), generate, name_errors(kind, &prefix));
    }
    let name = text(metadata, "name");
    if name.is_empty() {
        errors.required(&path.child("name"), "name or generateName is required");
    } else {
        errors.all_invalid(&path.child("name"), name, name_errors(kind, name));
    }
    if let Some(namespace) = get(metadata, "namespace").and_then(Value::as_str).filter(|text| !text.is_empty()) {
        if kind.namespaced {
            errors.all_invalid(&path.child("namespace"), namespace, formats::dns1123_label(namespace));
        } else {
            errors.forbidden(&path.child("namespace"), "not allowed on this type");
        }
    } else if kind.namespaced {
        errors.required(&path.child("namespace"), "");
    }
    errors.nonnegative(&path.child("generation"), number(metadata, "generation"));
    maps(errors, metadata, &path);
}

/// What is checked on creation and on updates: labels, annotations, owners, finalizers.
fn maps(errors: &mut Errors, metadata: &Value, path: &Path<'_>) {
    labels(errors, metadata, "labels", &path.child("labels"));
    annotations(errors, metadata, &path.child("annotations"));
    owners(errors, metadata, &path.child("ownerReferences"));
    finalizers(errors, metadata, &path.child("finalizers"));
}

/// A map of labels.
pub(super) fn labels(errors: &mut Errors, owner: &Value, key: &str, path: &Path<'_>) {
    for (key, value) in pairs(owner, key) {
        errors.all_invalid(path, key, formats::label_key(key));
        errors.all_invalid(path, value, formats::label_value(value));
    }
}

/// Annotations: keys, and their size.
pub(super) fn annotations(errors: &mut Errors, owner: &Value, path: &Path<'_>) {
    let mut bytes = 0;
    for (key, value) in pairs(owner, "annotations") {
        errors.all_invalid(path, key, formats::label_key(&key.to_lowercase()));
        bytes += key.len() + value.len();
    }
    if bytes > ANNOTATIONS_BYTES_MAX {
        errors.push(crate::field_error::FieldError::too_long(path, ANNOTATIONS_BYTES_MAX));
    }
}

fn owners(errors: &mut Errors, metadata: &Value, path: &Path<'_>) {
    let mut controller = String::new();
    for (index, owner) in list(metadata, "ownerReferences").iter().enumerate() {
        let path = &path.index(index);
        let (api_version, kind, name, uid) = (text(owner, "apiVersion"), text(owner, "kind"), text(owner, "name"), text(owner, "uid"));
        let group_version = api_version.split_once('/');
        let version = group_version.map_or(api_version, |(_, version)| version);
        if version.is_empty() || group_version.is_some_and(|(_, version)| version.contains('/')) {
            if api_version.is_empty() {
                errors.required(&path.child("apiVersion"), "must not be empty");
            } else {
                errors.invalid(&path.child("apiVersion"), api_version, "version must not be empty");
            }
        }
        for (key, value) in [("kind", kind), ("name", name), ("uid", uid)] {
            if value.is_empty() {
                errors.required(&path.child(key), "must not be empty");
            }
        }
        if kind == "Event" && matches!(api_version, "v1" | "events.k8s.io/v1" | "events.k8s.io/v1beta1") {
            let group = group_version.map_or("", |(group, _)| group);
            let shown = if group.is_empty() { format!("/{version}, Kind={kind}") } else { format!("{group}/{version}, Kind={kind}") };
            errors.invalid(path, Value::Null, format!("{shown} is disallowed from being an owner"));
            errors.show_last(&owner_text(owner));
        }
        if owner.get("controller") == Some(&Value::Bool(true)) {
            if controller.is_empty() {
                controller = format!("{kind}/{name}");
            } else {
                let detail = format!(
                    "Only one reference can have Controller set to true. Found \"true\" in references for {controller} and {kind}/{name}"
                );
                let all: Vec<String> = list(metadata, "ownerReferences").iter().map(owner_text).collect();
                errors.invalid(&Path::new("metadata").child("ownerReferences"), Value::Null, detail);
                errors.show_last(&format!("[{}]", all.join(",")));
            }
        }
    }
}

/// An owner reference in the order of its Go type.
fn owner_text(owner: &Value) -> String {
    let keys = ["apiVersion", "kind", "name", "uid", "controller", "blockOwnerDeletion"];
    let known = keys.iter().filter_map(|key| owner.get(*key).map(|value| format!("\"{key}\":{value}")));
    format!("{{{}}}", known.collect::<Vec<_>>().join(","))
}

fn finalizers(errors: &mut Errors, metadata: &Value, path: &Path<'_>) {
    let names: Vec<&str> = list(metadata, "finalizers").iter().filter_map(Value::as_str).collect();
    for name in &names {
        errors.all_invalid(path, name, formats::label_key(name));
    }
    if names.contains(&"orphan") && names.contains(&"foregroundDeletion") {
        errors.invalid(path, json!(names), "finalizer orphan and foregroundDeletion cannot be both set");
    }
    for (index, name) in names.iter().enumerate() {
        if !name.contains('/') && !matches!(*name, "kubernetes" | "orphan" | "foregroundDeletion") {
            errors.invalid(&path.index(index), *name, "name is neither a standard finalizer name nor is it fully qualified");
        }
    }
}

/// The metadata of an update.
pub(super) fn update(errors: &mut Errors, kind: &KindFacts, object: &Value, old: &Value) {
    let (Some(new), Some(old)) = (get(object, "metadata"), get(old, "metadata")) else { return };
    let path = Path::new("metadata");
    if get(old, "deletionTimestamp").is_some() {
        let before = list(old, "finalizers");
        let added: Vec<&Value> = list(new, "finalizers").iter().filter(|name| !before.contains(name)).collect();
        if !added.is_empty() {
            let names: Vec<String> = added.iter().map(|name| name.to_string()).collect();
            let detail = format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                names.join(", ")
            );
            errors.forbidden(&path.child("finalizers"), &detail);
        }
    }
    if text(new, "resourceVersion").is_empty() {
        errors.invalid(&path.child("resourceVersion"), text(new, "resourceVersion"), "must be specified for an update");
    }
    for key in ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        if get(new, key) != get(old, key) {
            errors.invalid(&path.child(key), new.get(key).cloned().unwrap_or(Value::Null), IMMUTABLE);
        }
    }
    if number(new, "generation").unwrap_or(0) < number(old, "generation").unwrap_or(0) {
        errors.invalid(&path.child("generation"), number(new, "generation").unwrap_or(0), "must not be decremented");
    }
    if kind.kind != "Pod" {
        maps(errors, new, &path);
    } else {
        owners(errors, new, &path.child("ownerReferences"));
        finalizers(errors, new, &path.child("finalizers"));
    }
}
