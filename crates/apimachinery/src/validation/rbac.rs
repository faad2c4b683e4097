//! Roles and bindings. Source: kubernetes v1.37 `pkg/apis/rbac/validation/validation.go`.

use serde_json::Value;

use super::selector::{is_usable, label_selector};
use super::support::{Errors, IMMUTABLE, Path, get, list, text};
use crate::formats;

const GROUP: &str = "rbac.authorization.k8s.io";

/// A Role's or ClusterRole's rules.
pub(super) fn role(errors: &mut Errors, role: &Value, namespaced: bool) {
    let rules = Path::new("rules");
    for (index, rule) in list(role, "rules").iter().enumerate() {
        let path = &rules.index(index);
        let urls = list(rule, "nonResourceURLs");
        let (groups, resources) = (list(rule, "apiGroups"), list(rule, "resources"));
        if !urls.is_empty() {
            let shown = Value::Array(urls.to_vec());
            if namespaced {
                errors.invalid(&path.child("nonResourceURLs"), shown, "namespaced rules cannot apply to non-resource URLs");
            } else if !groups.is_empty() || !resources.is_empty() || !list(rule, "resourceNames").is_empty() {
                let detail = "rules cannot apply to both regular resources and non-resource URLs";
                errors.invalid(&path.child("nonResourceURLs"), shown, detail);
            }
        } else {
            if groups.is_empty() {
                errors.required(&path.child("apiGroups"), "resource rules must supply at least one api group");
            }
            if resources.is_empty() {
                errors.required(&path.child("resources"), "resource rules must supply at least one resource");
            }
        }
        if list(rule, "verbs").is_empty() {
            errors.required(&path.child("verbs"), "");
        }
    }
}

/// A ClusterRole.
pub(super) fn cluster_role(errors: &mut Errors, object: &Value) {
    role(errors, object, false);
    let Some(aggregation) = get(object, "aggregationRule") else { return };
    let path = Path::new("aggregationRule");
    let path = path.child("clusterRoleSelectors");
    let selectors = list(aggregation, "clusterRoleSelectors");
    if selectors.is_empty() {
        errors.required(&path, "at least one clusterRoleSelector required if aggregationRule is non-nil");
    }
    for (index, selector) in selectors.iter().enumerate() {
        label_selector(errors, selector, &path.index(index));
        if !is_usable(selector) {
            errors.invalid(&path.index(index), Value::Null, "invalid label selector.");
        }
    }
}

/// A RoleBinding or ClusterRoleBinding to be created, or updated from `old`.
pub(super) fn binding(errors: &mut Errors, binding: &Value, old: Option<&Value>, namespaced: bool) {
    let empty = Value::Null;
    let role = get(binding, "roleRef").unwrap_or(&empty);
    let path = Path::new("roleRef");
    if text(role, "apiGroup") != GROUP {
        errors.not_supported(&path.child("apiGroup"), text(role, "apiGroup"), &[GROUP]);
    }
    let kinds: &[&str] = if namespaced { &["Role", "ClusterRole"] } else { &["ClusterRole"] };
    if !kinds.contains(&text(role, "kind")) {
        errors.not_supported(&path.child("kind"), text(role, "kind"), kinds);
    }
    let name = text(role, "name");
    if !name.is_empty() {
        errors.all_invalid(&path.child("name"), name, formats::path_segment(name));
    }
    let subjects = Path::new("subjects");
    let all = list(binding, "subjects");
    for (index, subject) in all.iter().enumerate() {
        check_subject(errors, subject, namespaced, &subjects.index(index));
    }
    // Upstream's declarative validation finds missing names after all else.
    if name.is_empty() {
        errors.required(&path.child("name"), "");
    }
    for (index, _) in all.iter().enumerate().filter(|(_, subject)| text(subject, "name").is_empty()) {
        errors.required(&subjects.index(index).child("name"), "");
    }
    if let Some(before) = old.and_then(|old| get(old, "roleRef"))
        && before != role
    {
        errors.invalid(&path, Value::Null, IMMUTABLE);
        let show = |key: &str| Value::from(text(role, key)).to_string();
        errors.show_last(&format!("{{\"APIGroup\":{},\"Kind\":{},\"Name\":{}}}", show("apiGroup"), show("kind"), show("name")));
    }
}

fn check_subject(errors: &mut Errors, subject: &Value, namespaced: bool, path: &Path<'_>) {
    let (name, group) = (text(subject, "name"), text(subject, "apiGroup"));
    match text(subject, "kind") {
        "ServiceAccount" => {
            if !name.is_empty() {
                errors.all_invalid(&path.child("name"), name, formats::dns1123_subdomain(name));
            }
            if !group.is_empty() {
                errors.not_supported(&path.child("apiGroup"), group, &[""]);
            }
            if !namespaced && text(subject, "namespace").is_empty() {
                errors.required(&path.child("namespace"), "");
            }
        }
        "User" | "Group" => {
            if group != GROUP {
                errors.not_supported(&path.child("apiGroup"), group, &[GROUP]);
            }
        }
        other => errors.not_supported(&path.child("kind"), other, &["ServiceAccount", "User", "Group"]),
    }
}
