//! Validation of objects, with upstream's errors in upstream's order.
//!
//! Objects must be in canonical form, with defaults set, and prepared ([`crate::strategy`]). Sources: kubernetes v1.37
//! `pkg/apis/*/validation`, k8s.io/apimachinery v0.37 `pkg/api/validation`. Not checked is what depends on other objects or on the
//! server's configuration (cluster IP ranges, priority classes): that is the server's and admission's.

mod apps;
mod container;
mod core;
mod ephemeral;
mod meta;
mod pod;
mod pod_update;
mod rbac;
mod resources;
mod scheduling;
mod security;
mod selector;
mod service;
mod support;
mod volume;

use serde_json::Value;

use crate::KindFacts;
use crate::field_error::FieldError;
use support::Errors;

/// Whether a name is well-formed for objects of the kind; a list of upstream's texts. For names that are made of generateName.
pub fn name(kind: &KindFacts, name: &str) -> Vec<String> {
    meta::name_errors(kind, name)
}

/// The errors of an object to be created.
pub fn create(kind: &KindFacts, object: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    match kind.kind.as_str() {
        "DeleteOptions" | "Status" | "Scale" | "TokenRequest" => {}
        _ if kind.group == "authentication.k8s.io" || kind.group == "authorization.k8s.io" => {}
        _ => meta::create(&mut errors, kind, object),
    }
    body(&mut errors, kind, object, None);
    errors.into_list()
}

/// The errors of an update from `old` through the main resource.
pub fn update(kind: &KindFacts, object: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    meta::update(&mut errors, kind, object, old);
    if kind.kind == "Pod" {
        meta::create(&mut errors, kind, object);
        pod_update::update(&mut errors, object, old);
        return errors.into_list();
    }
    body(&mut errors, kind, object, Some(old));
    errors.into_list()
}

/// The errors of an update from `old` through `status`.
pub fn update_status(kind: &KindFacts, object: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    meta::update(&mut errors, kind, object, old);
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Pod") => pod_update::status(&mut errors, object, old),
        ("", "Node") => core::node(&mut errors, object, Some(old)),
        ("apps", "Deployment") => apps::deployment_status(&mut errors, object, old),
        ("apps", "ReplicaSet") => apps::replica_set_status(&mut errors, object),
        _ => {}
    }
    errors.into_list()
}

/// The errors of a pod's update from `old` through `ephemeralcontainers`.
pub fn update_ephemeral_containers(kind: &KindFacts, object: &Value, old: &Value) -> Vec<FieldError> {
    let mut errors = Errors::default();
    meta::update(&mut errors, kind, object, old);
    ephemeral::update(&mut errors, object, old);
    errors.into_list()
}

fn body(errors: &mut Errors, kind: &KindFacts, object: &Value, old: Option<&Value>) {
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Pod") => pod::create(errors, object),
        ("", "Binding") => core::binding(errors, object),
        ("", "Service") => service::service(errors, object, old),
        ("", "ConfigMap") => core::config_map(errors, object, old),
        ("", "Secret") => core::secret(errors, object, old),
        ("", "Namespace") => core::namespace(errors, object),
        ("", "Node") => core::node(errors, object, old),
        ("", "Event") | ("events.k8s.io", "Event") => core::event(errors, object, kind),
        ("apps", "Deployment") => apps::deployment(errors, object, old),
        ("apps", "ReplicaSet") => apps::replica_set(errors, object, old),
        ("autoscaling", "Scale") => apps::scale(errors, object),
        ("coordination.k8s.io", "Lease") => core::lease(errors, object),
        ("discovery.k8s.io", "EndpointSlice") => core::endpoint_slice(errors, object, old),
        ("scheduling.k8s.io", "PriorityClass") => core::priority_class(errors, object, old),
        ("authentication.k8s.io", "TokenRequest") => core::token_request(errors, object),
        ("rbac.authorization.k8s.io", "Role") => rbac::role(errors, object, true),
        ("rbac.authorization.k8s.io", "ClusterRole") => rbac::cluster_role(errors, object),
        ("rbac.authorization.k8s.io", "RoleBinding") => rbac::binding(errors, object, old, true),
        ("rbac.authorization.k8s.io", "ClusterRoleBinding") => rbac::binding(errors, object, old, false),
        _ => {}
    }
}
