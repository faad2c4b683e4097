//! The review kinds: questions about identity and permission that are answered and not stored.

use apimachinery::field_error::FieldError;
use apimachinery::status::Status;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::authn::User;
use crate::authn::token::Verifier;
use crate::authz::{Attributes, Authorizer, Decision};
use crate::lookup::{Lookup, items, text};

/// What reviews are answered from.
pub struct Context<'a> {
    /// Who asks.
    pub user: &'a User,
    /// The namespace of the request, for local reviews.
    pub namespace: &'a str,
    /// Who decides.
    pub authorizer: &'a Authorizer,
    /// Who knows tokens.
    pub verifier: &'a Verifier,
    /// The cluster.
    pub lookup: &'a dyn Lookup,
    /// The present.
    pub now: Timestamp,
}

/// Whether a resource is a review.
pub fn is_review(group: &str, resource: &str) -> bool {
    let names = match group {
        "authentication.k8s.io" => &["tokenreviews", "selfsubjectreviews"][..],
        "authorization.k8s.io" => {
            &["subjectaccessreviews", "selfsubjectaccessreviews", "localsubjectaccessreviews", "selfsubjectrulesreviews"]
        }
        _ => return false,
    };
    names.contains(&resource)
}

/// Answers a decoded review: the same object with its status.
pub fn answer(resource: &str, mut review: Value, context: &Context) -> Result<Value, Status> {
    let status = match resource {
        "tokenreviews" => token_review(&review, context)?,
        "selfsubjectreviews" => json!({ "userInfo": user_info(context.user) }),
        "selfsubjectrulesreviews" => rules_review(&review, context)?,
        "selfsubjectaccessreviews" => access_review(&review, context.user, context)?,
        "subjectaccessreviews" => access_review(&review, &reviewed_user(&review)?, context)?,
        "localsubjectaccessreviews" => {
            if text(&review, "/spec/resourceAttributes/namespace") != context.namespace {
                let given = text(&review, "/spec/resourceAttributes/namespace");
                return Err(invalid(FieldError::invalid("spec.resourceAttributes.namespace", given, "must match metadata.namespace")));
            }
            access_review(&review, &reviewed_user(&review)?, context)?
        }
        _ => return Err(Status::not_found("", resource, "")),
    };
    if resource == "selfsubjectreviews" {
        review["metadata"]["creationTimestamp"] = json!(Timestamp::from_second(context.now.as_second()).unwrap_or(context.now).to_string());
    }
    if resource == "selfsubjectrulesreviews" {
        // Upstream answers with the status alone.
        review["spec"] = json!({});
    }
    review["status"] = status;
    Ok(review)
}

fn invalid(error: FieldError) -> Status {
    Status::invalid("authorization.k8s.io", "", "", &[error])
}

fn user_info(user: &User) -> Value {
    let mut info = Map::new();
    info.insert("username".to_owned(), json!(user.name));
    if !user.uid.is_empty() {
        info.insert("uid".to_owned(), json!(user.uid));
    }
    if !user.groups.is_empty() {
        info.insert("groups".to_owned(), json!(user.groups));
    }
    if !user.extra.is_empty() {
        info.insert("extra".to_owned(), json!(user.extra));
    }
    Value::Object(info)
}

fn strings(value: &Value, pointer: &str) -> Vec<String> {
    items(value, pointer).iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn token_review(review: &Value, context: &Context) -> Result<Value, Status> {
    let token = text(review, "/spec/token");
    if token.is_empty() {
        return Err(Status::bad_request("token is required for TokenReview in authentication"));
    }
    let audiences = strings(review, "/spec/audiences");
    Ok(match context.verifier.verify(token, &audiences, context.now, context.lookup) {
        Ok(user) => {
            let audiences = if audiences.is_empty() { context.verifier.audiences().to_vec() } else { audiences };
            json!({ "authenticated": true, "user": user_info(&user), "audiences": audiences })
        }
        Err(error) => {
            tracing::debug!(error = &error as &dyn std::error::Error, "a reviewed token is refused");
            json!({ "user": {}, "error": "invalid bearer token" })
        }
    })
}

/// The user that a review names. A review without one is invalid.
fn reviewed_user(review: &Value) -> Result<User, Status> {
    let user = User {
        name: text(review, "/spec/user").to_owned(),
        uid: text(review, "/spec/uid").to_owned(),
        groups: strings(review, "/spec/groups"),
        extra: Default::default(),
    };
    if user.name.is_empty() && user.groups.is_empty() {
        return Err(invalid(FieldError::invalid("spec.user", "", "at least one of user or group must be specified")));
    }
    Ok(user)
}

fn access_review(review: &Value, user: &User, context: &Context) -> Result<Value, Status> {
    let (resource, path) = (review.pointer("/spec/resourceAttributes"), review.pointer("/spec/nonResourceAttributes"));
    let attributes = match (resource.filter(|value| !value.is_null()), path.filter(|value| !value.is_null())) {
        (Some(asked), None) => Attributes {
            user,
            verb: text(asked, "/verb"),
            api_group: text(asked, "/group"),
            resource: text(asked, "/resource"),
            subresource: text(asked, "/subresource"),
            name: text(asked, "/name"),
            namespace: text(asked, "/namespace"),
            path: "",
            is_resource: true,
            node_name_selector: selected_node(asked),
        },
        (None, Some(asked)) => Attributes {
            user,
            verb: text(asked, "/verb"),
            api_group: "",
            resource: "",
            subresource: "",
            name: "",
            namespace: "",
            path: text(asked, "/path"),
            is_resource: false,
            node_name_selector: "",
        },
        _ => {
            let why = "exactly one of nonResourceAttributes or resourceAttributes must be specified";
            // Upstream shows the one it looked at last.
            let shown = path.map_or(Value::Null, |asked| json!({"Path": text(asked, "/path"), "Verb": text(asked, "/verb")}));
            return Err(invalid(FieldError::invalid("spec", shown, why)));
        }
    };
    Ok(match context.authorizer.authorize(&attributes) {
        Decision::Allow => match context.authorizer.reason(&attributes) {
            Some(reason) => json!({ "allowed": true, "reason": reason }),
            None => json!({ "allowed": true }),
        },
        Decision::NoOpinion(reason) if reason.is_empty() => json!({ "allowed": false }),
        Decision::NoOpinion(reason) => json!({ "allowed": false, "reason": reason }),
    })
}

/// The value that a review's field selector requires of `spec.nodeName`.
fn selected_node(asked: &Value) -> &str {
    let is_node = |requirement: &&Value| {
        text(requirement, "/key") == "spec.nodeName" && text(requirement, "/operator") == "In" && items(requirement, "/values").len() == 1
    };
    items(asked, "/fieldSelector/requirements").iter().find(is_node).map_or("", |requirement| text(requirement, "/values/0"))
}

fn rules_review(review: &Value, context: &Context) -> Result<Value, Status> {
    let namespace = text(review, "/spec/namespace");
    if namespace.is_empty() {
        return Err(Status::bad_request("no namespace on request"));
    }
    let snapshot = context.authorizer.snapshot();
    let (mut resources, mut paths) = (Vec::new(), Vec::new());
    for rule in snapshot.rules(context.user, namespace) {
        let mut copy = Map::new();
        let target = if items(rule, "/nonResourceURLs").is_empty() { &mut resources } else { &mut paths };
        for field in ["verbs", "apiGroups", "resources", "resourceNames", "nonResourceURLs"] {
            if let Some(list) = rule.get(field) {
                copy.insert(field.to_owned(), list.clone());
            }
        }
        target.push(Value::Object(copy));
    }
    let mut status = json!({ "resourceRules": resources, "nonResourceRules": paths, "incomplete": false });
    if context.user.node().is_some() {
        status["incomplete"] = json!(true);
        status["evaluationError"] = json!("node authorizer does not support user rule resolution");
    }
    Ok(status)
}
