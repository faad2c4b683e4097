//! `meta.v1.Status`: what the server answers when it refuses. Source: k8s.io/apimachinery v0.37 `pkg/api/errors/errors.go`.

use std::fmt;

use serde_json::{Map, Value, json};

use crate::field_error::{FieldError, aggregate};
use crate::formats::go_quote;

/// A failure, with upstream's code, reason, message and details.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// HTTP status code.
    pub code: u16,
    /// Reason, as `NotFound`; empty when there is none.
    pub reason: &'static str,
    /// Message.
    pub message: String,
    /// Details, if any.
    pub details: Option<Value>,
}

impl fmt::Display for Status {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.message)
    }
}

impl std::error::Error for Status {}

/// `resource.group`, or `resource` in the core group.
fn qualified(group: &str, name: &str) -> String {
    if group.is_empty() { name.to_owned() } else { format!("{name}.{group}") }
}

/// Details that leave out what is empty.
fn details(group: &str, kind: &str, name: &str) -> Map<String, Value> {
    let mut map = Map::new();
    for (key, value) in [("name", name), ("group", group), ("kind", kind)] {
        if !value.is_empty() {
            map.insert(key.to_owned(), value.into());
        }
    }
    map
}

impl Status {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: None }
    }

    fn with(mut self, group: &str, kind: &str, name: &str) -> Self {
        self.details = Some(Value::Object(details(group, kind, name)));
        self
    }

    fn retry_after(mut self, seconds: u32) -> Self {
        if seconds > 0 {
            let details = self.details.get_or_insert_with(|| json!({}));
            details["retryAfterSeconds"] = seconds.into();
        }
        self
    }

    /// Seconds of a `Retry-After` header, if there shall be one.
    pub fn retry_after_seconds(&self) -> Option<u64> {
        self.details.as_ref()?.get("retryAfterSeconds")?.as_u64()
    }

    /// 404 for an object.
    pub fn not_found(group: &str, resource: &str, name: &str) -> Self {
        let message = format!("{} {} not found", qualified(group, resource), go_quote(name));
        Self::new(404, "NotFound", message).with(group, resource, name)
    }

    /// 404 for a path or resource that does not exist.
    pub fn no_such_path() -> Self {
        let mut status = Self::new(404, "NotFound", "the server could not find the requested resource");
        status.details = Some(json!({}));
        status
    }

    /// 409 for a name that is taken.
    pub fn already_exists(group: &str, resource: &str, name: &str) -> Self {
        let message = format!("{} {} already exists", qualified(group, resource), go_quote(name));
        Self::new(409, "AlreadyExists", message).with(group, resource, name)
    }

    /// 409 for an update against another resourceVersion, uid or state.
    pub fn conflict(group: &str, resource: &str, name: &str, why: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {} {}: {why}", qualified(group, resource), go_quote(name));
        Self::new(409, "Conflict", message).with(group, resource, name)
    }

    /// [`Status::conflict`] with the text of a stale resourceVersion.
    pub fn modified(group: &str, resource: &str, name: &str) -> Self {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(group, resource, name, why)
    }

    /// 422 for an object that is not valid.
    pub fn invalid(group: &str, kind: &str, name: &str, errors: &[FieldError]) -> Self {
        let mut message = format!("{} {} is invalid", qualified(group, kind), go_quote(name));
        if !errors.is_empty() {
            message = format!("{message}: {}", aggregate(errors));
        }
        let mut status = Self::new(422, "Invalid", message).with(group, kind, name);
        if let (Some(Value::Object(map)), false) = (&mut status.details, errors.is_empty()) {
            map.insert("causes".to_owned(), errors.iter().map(FieldError::cause).collect());
        }
        status
    }

    /// 403. `name` may be empty.
    pub fn forbidden(group: &str, resource: &str, name: &str, why: &str) -> Self {
        let message = match (resource.is_empty(), name.is_empty()) {
            (true, _) => format!("forbidden: {why}"),
            (false, true) => format!("{} is forbidden: {why}", qualified(group, resource)),
            (false, false) => format!("{} {} is forbidden: {why}", qualified(group, resource), go_quote(name)),
        };
        Self::new(403, "Forbidden", message).with(group, resource, name)
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 400.
    pub fn bad_request(why: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", why)
    }

    /// 410: the resourceVersion or continue token is gone.
    pub fn expired(why: impl Into<String>) -> Self {
        Self::new(410, "Expired", why)
    }

    /// 405.
    pub fn method_not_supported(group: &str, resource: &str, action: &str) -> Self {
        let message = format!("{action} is not supported on resources of kind {}", go_quote(&qualified(group, resource)));
        Self::new(405, "MethodNotAllowed", message).with(group, resource, "")
    }

    /// 415. `supported` are the media types that are taken.
    pub fn unsupported_media_type(supported: &[&str]) -> Self {
        let list = supported.join(", ");
        let message = format!("the body of the request was in an unknown format - accepted media types include: {list}");
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 413.
    pub fn too_large(why: &str) -> Self {
        Self::new(413, "RequestEntityTooLarge", format!("Request entity too large: {why}"))
    }

    /// 429.
    pub fn too_many_requests(why: impl Into<String>, retry_seconds: u32) -> Self {
        Self::new(429, "TooManyRequests", why).retry_after(retry_seconds)
    }

    /// 500.
    pub fn internal(why: impl Into<String>) -> Self {
        let why = why.into();
        let mut status = Self::new(500, "InternalError", format!("Internal error occurred: {why}"));
        status.details = Some(json!({"causes": [{"message": why}]}));
        status
    }

    /// 500 with a time after which a client may try again.
    pub fn server_timeout(group: &str, resource: &str, operation: &str, retry_seconds: u32) -> Self {
        let resource_name = qualified(group, resource);
        let message = format!("The {operation} operation against {resource_name} could not be completed at this time, please try again.");
        Self::new(500, "ServerTimeout", message).with(group, resource, operation).retry_after(retry_seconds)
    }

    /// 504.
    pub fn timeout(why: &str, retry_seconds: u32) -> Self {
        Self::new(504, "Timeout", format!("Timeout: {why}")).retry_after(retry_seconds)
    }

    /// 503.
    pub fn unavailable(why: impl Into<String>) -> Self {
        Self::new(503, "ServiceUnavailable", why)
    }

    /// 501: what Coracle does not carry out (upstream has no such answer).
    pub fn unimplemented(what: &str) -> Self {
        Self::new(501, "NotImplemented", format!("unimplemented: {what}"))
    }

    /// 422 without an object: a patch that cannot be applied. Upstream does not tell the cause.
    pub fn unprocessable_patch() -> Self {
        let mut status = Self::new(422, "Invalid", "the server rejected our request due to an error in our request");
        status.details = Some(json!({}));
        status
    }

    /// 422 for a patch whose result does not fit its type: `"" is invalid: patch: Invalid value: ...`.
    pub fn invalid_patch(patch: &str, why: &str) -> Self {
        Self::invalid("", "", "", &[FieldError::invalid("patch", patch, why)])
    }

    /// The `Status` object.
    pub fn to_value(&self) -> Value {
        let mut object = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": self.message, "code": self.code,
        });
        if !self.reason.is_empty() {
            object["reason"] = self.reason.into();
        }
        if let Some(details) = &self.details {
            object["details"] = details.clone();
        }
        object
    }
}

/// The `Status` object of a success (deletions): details name what was deleted.
pub fn success(group: &str, resource: &str, name: &str, uid: &str) -> Value {
    let mut map = details(group, resource, name);
    if !uid.is_empty() {
        map.insert("uid".to_owned(), uid.into());
    }
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": map})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        assert_eq!(Status::not_found("apps", "deployments", "x").message, "deployments.apps \"x\" not found");
        let status = Status::invalid("", "Pod", "p", &[FieldError::required("spec.containers", "")]);
        assert_eq!(
            status.to_value(),
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 422, "reason": "Invalid",
                "message": "Pod \"p\" is invalid: spec.containers: Required value",
                "details": {"name": "p", "kind": "Pod",
                    "causes": [{"reason": "FieldValueRequired", "message": "Required value", "field": "spec.containers"}]}})
        );
    }
}
