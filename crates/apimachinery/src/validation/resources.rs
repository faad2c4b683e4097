//! Compute resources of containers. Source: kubernetes v1.37 `pkg/apis/core/validation/validation.go`, `validateResourceRequirements`.

use serde_json::Value;

use super::support::{Errors, NEGATIVE, Path, get, list, pairs, text};
use crate::formats;
use crate::quantity::Quantity;

/// Names that need no domain.
const STANDARD: &[&str] = &["cpu", "memory", "ephemeral-storage", "storage", "pods", "services", "secrets", "configmaps"];

fn quantity(text: &str) -> Quantity {
    text.parse().unwrap_or_else(|_| Quantity::from_units(0, crate::quantity::Format::DecimalSi))
}

fn is_huge_pages(name: &str) -> bool {
    name.starts_with("hugepages-")
}

fn is_native(name: &str) -> bool {
    !name.contains('/') || name.contains("kubernetes.io/")
}

/// Whether limits may be above requests.
fn is_overcommit_allowed(name: &str) -> bool {
    is_native(name) && !is_huge_pages(name)
}

/// A container's resource name.
fn container_name(errors: &mut Errors, name: &str, path: &Path<'_>) {
    let before = errors.len();
    errors.all_invalid(path, name, formats::label_key(name));
    if errors.len() != before {
        return;
    }
    if !name.contains('/') {
        if !STANDARD.contains(&name) && !is_huge_pages(name) {
            errors.invalid(path, name, "must be a standard resource type or fully qualified");
        }
        if !matches!(name, "cpu" | "memory" | "ephemeral-storage") && !is_huge_pages(name) {
            errors.invalid(path, name, "must be a standard resource for containers");
        }
    } else if !is_native(name) {
        // What quotas would call it must be a name too.
        if !formats::label_key(&format!("requests.{name}")).is_empty() {
            errors.invalid(path, name, "doesn't follow extended resource name standard");
        }
    }
}

/// A value that may not be negative, and is a whole number where the resource is counted.
pub(super) fn value(errors: &mut Errors, name: &str, text: &str, path: &Path<'_>) {
    let quantity = quantity(text);
    if quantity.sign() < 0 {
        errors.invalid(path, text, NEGATIVE);
    }
    let counted = matches!(name, "pods" | "services" | "secrets" | "configmaps") || (name.contains('/') && !is_native(name));
    if counted && quantity.milli_value() % 1000 != 0 {
        errors.invalid(path, text, "must be an integer");
    }
}

fn huge_pages(errors: &mut Errors, name: &str, text: &str, path: &Path<'_>) {
    let Some(size) = name.strip_prefix("hugepages-").and_then(|size| size.parse::<Quantity>().ok()) else { return };
    let quantity = quantity(text);
    if size.value() <= 0 || quantity.value() % size.value() != 0 {
        errors.invalid(path, text, format!("{text} is not positive integer multiple of {name}"));
    }
}

/// Checks limits and requests.
pub(super) fn requirements(errors: &mut Errors, resources: &Value, claims: &[&str], path: &Path<'_>) {
    let (limits_path, requests_path) = (path.child("limits"), path.child("requests"));
    let (limits, requests) = (pairs(resources, "limits"), pairs(resources, "requests"));
    for (name, text) in &limits {
        let path = limits_path.key(name);
        container_name(errors, name, &path);
        value(errors, name, text, &path);
        huge_pages(errors, name, text, &path);
    }
    for (name, text) in &requests {
        let path = requests_path.key(name);
        container_name(errors, name, &path);
        value(errors, name, text, &path);
        huge_pages(errors, name, text, &path);
        match limits.iter().find(|(limit, _)| limit == name) {
            Some((_, limit)) => {
                let (request, limit_value) = (quantity(text), quantity(limit));
                if !is_overcommit_allowed(name) && request != limit_value {
                    errors.invalid(&requests_path, *text, format!("must be equal to {name} limit of {limit}"));
                } else if request > limit_value {
                    errors.invalid(&requests_path, *text, format!("must be less than or equal to {name} limit of {limit}"));
                }
            }
            None if !is_overcommit_allowed(name) => {
                errors.required(&limits_path, "Limit must be set for non overcommitable resources");
            }
            None => {}
        }
    }
    let all = || limits.iter().chain(&requests).map(|(name, _)| *name);
    if all().any(is_huge_pages) && !all().any(|name| matches!(name, "cpu" | "memory")) {
        errors.forbidden(path, "HugePages require cpu or memory");
    }
    for (index, claim) in list(resources, "claims").iter().enumerate() {
        let name = text(claim, "name");
        if name.is_empty() {
            errors.required(&path.child("claims").index(index), "");
        } else if !claims.contains(&name) {
            let mut error = crate::field_error::FieldError::not_found(path.child("claims").index(index), name);
            error.detail = if claims.is_empty() {
                "must be one of the names in pod.spec.resourceClaims which is empty".to_owned()
            } else {
                format!("must be one of the names in pod.spec.resourceClaims: {}", claims.join(","))
            };
            errors.push(error);
        }
    }
}

/// A list of resources with names of any kind (a node's capacity).
pub(super) fn resource_list(errors: &mut Errors, owner: &Value, key: &str, path: &Path<'_>) {
    if get(owner, key).is_none() {
        return;
    }
    for (name, text) in pairs(owner, key) {
        value(errors, name, text, &path.child(name));
    }
}
