//! `NamespaceLifecycle`: nothing is made in a namespace that is missing or going, and some namespaces never go
//! (upstream: `k8s.io/apiserver/pkg/admission/plugin/namespace/lifecycle`).

use apimachinery::status::Status;
use serde_json::{Value, json};

use super::{Operation, Request};
use crate::lookup::text;

const IMMORTAL: [&str; 3] = ["default", "kube-public", "kube-system"];

pub(super) fn admit(request: &Request) -> Result<(), Status> {
    let is_namespace = request.is("", "namespaces");
    if is_namespace && request.operation == Operation::Delete && IMMORTAL.contains(&request.name) {
        return Err(request.forbidden("this namespace may not be deleted"));
    }
    let review = request.is("authorization.k8s.io", "localsubjectaccessreviews");
    if is_namespace || request.namespace.is_empty() || request.operation != Operation::Create || review {
        return Ok(());
    }
    let Some(namespace) = request.lookup.get("namespaces", "", request.namespace) else {
        return Err(Status::not_found("", "namespaces", request.namespace));
    };
    if text(&namespace, "/status/phase") != "Terminating" {
        return Ok(());
    }
    let why = format!("unable to create new content in namespace {} because it is being terminated", request.namespace);
    let mut status = request.forbidden(&why);
    let cause = json!({
        "reason": "NamespaceTerminating",
        "message": format!("namespace {} is being terminated", request.namespace),
        "field": "metadata.namespace",
    });
    if let Some(details) = status.details.as_mut().and_then(Value::as_object_mut) {
        details.insert("causes".to_owned(), json!([cause]));
    }
    Err(status)
}
