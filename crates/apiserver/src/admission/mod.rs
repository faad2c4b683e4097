//! Admission: what is changed in, and refused of, a request that is authenticated and authorized, before it is stored.
//!
//! The order is upstream's (`pkg/kubeapiserver/options/plugins.go`): `NamespaceLifecycle`, `ServiceAccount`, `NodeRestriction`,
//! `TaintNodesByCondition`, `Priority`, `DefaultTolerationSeconds`. Each is a pure function of the request and the stored objects.

mod lifecycle;
mod node_restriction;
mod pod;
mod priority;
mod service_account;

use apimachinery::status::Status;
use serde_json::Value;

use crate::authn::User;
use crate::lookup::Lookup;

/// What is done to the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It is made; also for subresources that are made, such as a binding or a token.
    Create,
    /// It is changed, by PUT or PATCH.
    Update,
    /// It is deleted.
    Delete,
}

/// A request on its way to the store.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Who asks.
    pub user: &'a User,
    /// What is done.
    pub operation: Operation,
    /// The API group; empty for the core group.
    pub group: &'a str,
    /// The resource in the plural.
    pub resource: &'a str,
    /// The subresource, or empty.
    pub subresource: &'a str,
    /// The namespace, or empty.
    pub namespace: &'a str,
    /// The object's name; empty where the server will generate it.
    pub name: &'a str,
    /// The stored object, for updates and deletions.
    pub old: Option<&'a Value>,
    /// The cluster.
    pub lookup: &'a dyn Lookup,
}

impl Request<'_> {
    /// A refusal (upstream: `admission.NewForbidden`).
    fn forbidden(&self, why: &str) -> Status {
        Status::forbidden(self.group, self.resource, self.name, why)
    }

    fn is(&self, group: &str, resource: &str) -> bool {
        self.group == group && self.resource == resource
    }
}

/// The mutating phase: on the decoded and defaulted object, before it is validated. Deletions have no object.
pub fn admit(request: &Request, object: Option<&mut Value>) -> Result<(), Status> {
    lifecycle::admit(request)?;
    let Some(object) = object else { return node_restriction::admit(request, None) };
    if request.is("", "pods") && request.subresource.is_empty() && request.operation == Operation::Create {
        service_account::admit(request, object)?;
    }
    node_restriction::admit(request, Some(object))?;
    if request.is("", "nodes") && request.subresource.is_empty() && request.operation == Operation::Create {
        pod::taint_new_node(object);
    }
    if request.is("", "pods") && request.subresource.is_empty() {
        priority::admit(request, object)?;
        pod::default_tolerations(object);
    }
    Ok(())
}

/// The validating phase: on the object as it will be stored.
pub fn validate(request: &Request, object: Option<&Value>) -> Result<(), Status> {
    let Some(object) = object else { return Ok(()) };
    let creates = request.subresource.is_empty() && request.operation == Operation::Create;
    let adds_containers = request.subresource == "ephemeralcontainers" && request.operation == Operation::Update;
    if request.is("", "pods") && (creates || adds_containers) {
        service_account::validate(request, object)?;
    }
    if request.is("scheduling.k8s.io", "priorityclasses") && request.operation != Operation::Delete {
        priority::validate_class(request, object)?;
    }
    Ok(())
}
