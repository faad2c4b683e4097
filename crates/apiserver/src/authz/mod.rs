//! Whether a user may do what a request asks: first the Node authorizer, then RBAC; who is allowed by neither is refused.

pub mod node;
pub mod rbac;

use std::sync::{Arc, RwLock};

use apimachinery::status::Status;
use serde_json::Value;

use crate::authn::User;
use crate::lookup::Lookup;
use rbac::Snapshot;

/// What a request asks (upstream: `k8s.io/apiserver/pkg/authorization/authorizer.Attributes`).
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a> {
    /// Who asks.
    pub user: &'a User,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`; else the HTTP method in lower case.
    pub verb: &'a str,
    /// The API group; empty for the core group.
    pub api_group: &'a str,
    /// The resource in the plural.
    pub resource: &'a str,
    /// The subresource, or empty.
    pub subresource: &'a str,
    /// The object's name, or empty.
    pub name: &'a str,
    /// The namespace, or empty.
    pub namespace: &'a str,
    /// The path of a request that is for no resource.
    pub path: &'a str,
    /// Whether the request is for a resource.
    pub is_resource: bool,
    /// The value that the request's field selector requires of `spec.nodeName`, or empty.
    pub node_name_selector: &'a str,
}

/// What an authorizer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Yes.
    Allow,
    /// Not by this one; with the reason, where there is one to tell.
    NoOpinion(String),
}

/// Node authorizer and RBAC over the stored objects.
pub struct Authorizer {
    lookup: Arc<dyn Lookup>,
    snapshot: RwLock<Option<Arc<Snapshot>>>,
    node_rules: Vec<Value>,
}

impl Authorizer {
    /// An authorizer over stored objects. Reads nothing yet.
    pub fn new(lookup: Arc<dyn Lookup>) -> Self {
        Authorizer { lookup, snapshot: RwLock::new(None), node_rules: node::rules() }
    }

    /// Forgets what it knows of roles and bindings: call it when one of them has changed.
    pub fn invalidate(&self) {
        if let Ok(mut snapshot) = self.snapshot.write() {
            *snapshot = None;
        }
    }

    /// Roles and bindings as they are.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        if let Ok(snapshot) = self.snapshot.read()
            && let Some(snapshot) = &*snapshot
        {
            return snapshot.clone();
        }
        // Built under the lock, so that a change in between cannot be overwritten by an older view.
        match self.snapshot.write() {
            Ok(mut kept) => kept.get_or_insert_with(|| Arc::new(Snapshot::build(self.lookup.as_ref()))).clone(),
            Err(_) => Arc::new(Snapshot::build(self.lookup.as_ref())),
        }
    }

    /// Why RBAC allows a request, for reviews.
    pub fn reason(&self, attributes: &Attributes) -> Option<String> {
        match node::authorize(attributes, &self.node_rules, self.lookup.as_ref()) {
            Decision::Allow => None,
            Decision::NoOpinion(_) => self.snapshot().reason(attributes),
        }
    }

    /// Decides.
    pub fn authorize(&self, attributes: &Attributes) -> Decision {
        let by_node = node::authorize(attributes, &self.node_rules, self.lookup.as_ref());
        if by_node == Decision::Allow || self.snapshot().allows(attributes) {
            return Decision::Allow;
        }
        by_node
    }
}

/// The 403 for a request that nobody allows (upstream: `responsewriters.ForbiddenStatusError`).
pub fn forbidden(attributes: &Attributes, reason: &str) -> Status {
    let Attributes { verb, api_group, namespace, .. } = attributes;
    let user = &attributes.user.name;
    let mut message = if !attributes.is_resource {
        format!("User {user:?} cannot {verb} path {:?}", attributes.path)
    } else {
        let resource = resource_name(attributes);
        let place = if namespace.is_empty() { "at the cluster scope".to_owned() } else { format!("in the namespace {namespace:?}") };
        format!("User {user:?} cannot {verb} resource {resource:?} in API group {api_group:?} {place}")
    };
    if !reason.is_empty() {
        message = format!("{message}: {reason}");
    }
    Status::forbidden(api_group, attributes.resource, attributes.name, &message)
}

fn resource_name(attributes: &Attributes) -> String {
    match attributes.subresource {
        "" => attributes.resource.to_owned(),
        subresource => format!("{}/{subresource}", attributes.resource),
    }
}
