//! `binding`, `scale`, `token`, and the reviews: bodies of another kind than the object that they change.

use std::sync::Arc;

use apimachinery::field_error::FieldError;
use apimachinery::kinds;
use apimachinery::status::Status;
use apimachinery::{Gvk, codec, defaulting};
use http::Response;
use serde_json::{Value, json};

use crate::admission::{self, Operation};
use crate::api::Ctx;
use crate::lookup::Lookup as _;
use crate::object::{self, text};
use crate::reply::{self, Body};
use crate::write::{Patch, Step, decode, guaranteed_update, plain, prepare_update};
use crate::{negotiate, reviews};

/// POST of a Binding: to `pods/NAME/binding`, or to `bindings` with the pod's name in it.
pub async fn bind(ctx: &Ctx<'_>, body: &[u8]) -> Result<Response<Body>, Status> {
    let mut warnings = Vec::new();
    let binding = decode(ctx, body, &Gvk::new("v1", "Binding"), &mut warnings)?;
    let name = if ctx.info.name.is_empty() { object::name(&binding) } else { ctx.info.name.as_str() };
    if name != object::name(&binding) && !object::name(&binding).is_empty() {
        return Err(Status::bad_request(format!(
            "the name of the object ({}) does not match the name on the URL ({name})",
            object::name(&binding)
        )));
    }
    let node = text(&binding, &["target", "name"]);
    let kind = text(&binding, &["target", "kind"]);
    let mut errors = Vec::new();
    if !matches!(kind, "" | "Node") {
        errors.push(FieldError::not_supported("target.kind", kind, &["Node", "<empty>"]));
    }
    if node.is_empty() {
        errors.push(FieldError::required("target.name", ""));
    }
    if !errors.is_empty() {
        return Err(Status::invalid("", "Binding", name, &errors));
    }
    let pods = ctx.api.resources.get("", "v1", "pods").ok_or_else(Status::no_such_path)?;
    let info = crate::request::RequestInfo {
        resource: "pods".to_owned(),
        name: name.to_owned(),
        subresource: "binding".to_owned(),
        ..ctx.info.clone()
    };
    let pod_ctx = Ctx { info: &info, resource: pods, ..ctx.copy() };
    admission::admit(&pod_ctx.admission(Operation::Create, name, None), Some(&mut binding.clone()))?;
    guaranteed_update(&pod_ctx, ctx.dry_run()?, |pod| assign(pod, &binding, node, ctx.now).map(Step::Put)).await?;
    let mut answer = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
    answer["metadata"] = json!({});
    let mut response = reply::value(201, plain(ctx), &answer)?;
    reply::warn(&mut response, &warnings);
    Ok(response)
}

/// The pod on its node (`pkg/registry/core/pod/storage`, `setPodNodeAndMetadata`).
fn assign(pod: &Value, binding: &Value, node: &str, now: jiff::Timestamp) -> Result<Value, Status> {
    let name = object::name(pod);
    let conflict = |why: String| Err(Status::conflict("", "pods/binding", name, &why));
    let (uid, own) = (text(binding, &["metadata", "uid"]), text(pod, &["metadata", "uid"]));
    if !uid.is_empty() && uid != own {
        return conflict(format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {own}"));
    }
    if object::is_deleting(pod) {
        return conflict(format!("pod {name} is being deleted, cannot be assigned to a host"));
    }
    let present = text(pod, &["spec", "nodeName"]);
    if !present.is_empty() {
        return conflict(format!("pod {name} is already assigned to node {present:?}"));
    }
    if pod.pointer("/spec/schedulingGates").and_then(Value::as_array).is_some_and(|gates| !gates.is_empty()) {
        return conflict(format!("pod {name} has non-empty .spec.schedulingGates"));
    }
    let mut bound = pod.clone();
    bound["spec"]["nodeName"] = node.into();
    for map in ["annotations", "labels"] {
        for (key, value) in binding.pointer(&format!("/metadata/{map}")).and_then(Value::as_object).into_iter().flatten() {
            bound["metadata"][map][key] = value.clone();
        }
    }
    let condition = json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null,
        "lastTransitionTime": apimachinery::time::format_seconds(now)});
    let conditions = bound["status"].as_object_mut().map(|status| status.entry("conditions").or_insert_with(|| json!([])));
    if let Some(conditions) = conditions.and_then(Value::as_array_mut) {
        conditions.retain(|condition| condition["type"] != "PodScheduled");
        conditions.push(condition);
    }
    Ok(bound)
}

fn scale_gvk() -> Gvk {
    Gvk::new("autoscaling/v1", "Scale")
}

/// The Scale of a Deployment or ReplicaSet.
fn scale_of(object: &Value) -> Value {
    let metadata = &object["metadata"];
    let mut scale = json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"], "creationTimestamp": metadata["creationTimestamp"]},
        "spec": {"replicas": object.pointer("/spec/replicas").cloned().unwrap_or_else(|| json!(0))},
        "status": {"replicas": object.pointer("/status/replicas").cloned().unwrap_or_else(|| json!(0))},
    });
    let selector = selector_text(object.pointer("/spec/selector"));
    if !selector.is_empty() {
        scale["status"]["selector"] = selector.into();
    }
    if scale["spec"]["replicas"] == json!(0) {
        scale["spec"] = json!({});
    }
    scale
}

/// A label selector as query text.
fn selector_text(selector: Option<&Value>) -> String {
    let Some(selector) = selector else { return String::new() };
    let mut parts: Vec<String> = Vec::new();
    for (key, value) in selector.get("matchLabels").and_then(Value::as_object).into_iter().flatten() {
        parts.push(format!("{key}={}", value.as_str().unwrap_or("")));
    }
    for expression in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
        let key = text(expression, &["key"]);
        let mut values: Vec<&str> =
            expression.get("values").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        values.sort_unstable();
        let values = values.join(",");
        parts.push(match text(expression, &["operator"]) {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    parts.sort_unstable();
    parts.join(",")
}

/// GET, PUT and PATCH of `scale`.
pub async fn scale(ctx: &Ctx<'_>, body: &[u8]) -> Result<Response<Body>, Status> {
    let facts = ctx.resource.facts;
    if ctx.info.verb == "get" {
        let (bytes, revision) = ctx.load().await?;
        return reply::value(200, plain(ctx), &scale_of(&reply::parse(&bytes, revision)?));
    }
    let mut warnings = Vec::new();
    let type_id = kinds::by_gvk(&scale_gvk()).ok_or_else(|| Status::internal("Scale has no schema"))?.type_id;
    let (put, patch) = if ctx.info.verb == "patch" {
        (None, Some(Patch::read(negotiate::content_type(ctx.headers), body)?))
    } else {
        (Some(decode(ctx, body, &scale_gvk(), &mut warnings)?), None)
    };
    let outcome = guaranteed_update(ctx, ctx.dry_run()?, |old| {
        let mut wanted = match (&put, &patch) {
            (Some(scale), _) => scale.clone(),
            (None, Some(patch)) => patch.apply(type_id, &scale_of(old))?,
            (None, None) => return Err(Status::internal("no scale")),
        };
        codec::refit(type_id, &mut wanted, &String::from_utf8_lossy(body))?;
        let name = object::name(&wanted);
        if !name.is_empty() && name != ctx.info.name {
            return Err(Status::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({})",
                ctx.info.name
            )));
        }
        let replicas = wanted.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(0);
        if replicas < 0 {
            let error = FieldError::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
            return Err(Status::invalid("autoscaling", "Scale", &ctx.info.name, &[error]));
        }
        let mut new = old.clone();
        new["metadata"]["resourceVersion"] = wanted.pointer("/metadata/resourceVersion").cloned().unwrap_or_default();
        if let Some(uid) = wanted.pointer("/metadata/uid") {
            new["metadata"]["uid"] = uid.clone();
        }
        new["spec"]["replicas"] = replicas.into();
        let main = crate::request::RequestInfo { subresource: String::new(), ..ctx.info.clone() };
        prepare_update(&Ctx { info: &main, resource: ctx.resource, ..ctx.copy() }, old, new)
    })
    .await?;
    let object = reply::parse(&outcome.stored.value, outcome.stored.revision)?;
    tracing::debug!(resource = %facts.resource, name = %ctx.info.name, "scaled");
    let mut response = reply::value(200, plain(ctx), &scale_of(&object))?;
    reply::warn(&mut response, &warnings);
    Ok(response)
}

/// POST of a TokenRequest to `serviceaccounts/NAME/token`.
pub async fn token(ctx: &Ctx<'_>, body: &[u8]) -> Result<Response<Body>, Status> {
    let gvk = Gvk::new("authentication.k8s.io/v1", "TokenRequest");
    let mut warnings = Vec::new();
    let mut request = decode(ctx, body, &gvk, &mut warnings)?;
    if let Some(facts) = kinds::by_gvk(&gvk) {
        defaulting::default(facts, &mut request);
    }
    check_expiration(&request)?;
    let (bytes, revision) = ctx.load().await?;
    let account = reply::parse(&bytes, revision)?;
    crate::read::wait_for(ctx, ctx.api.store.revision().await.map_err(crate::api::store_error)?).await?;
    admission::admit(&ctx.admission(Operation::Create, &ctx.info.name, None), Some(&mut request))?;
    let issued = ctx.api.issuer.issue(&request, &account, &ctx.api.audiences, ctx.now, ctx.api.lookup.as_ref())?;
    let mut response = reply::value(201, plain(ctx), &issued)?;
    reply::warn(&mut response, &warnings);
    Ok(response)
}

fn check_expiration(request: &Value) -> Result<(), Status> {
    let Some(seconds) = request.pointer("/spec/expirationSeconds").and_then(Value::as_i64) else { return Ok(()) };
    let why = match seconds {
        ..600 => "may not specify a duration less than 10 minutes",
        4_294_967_297.. => "may not specify a duration larger than 2^32 seconds",
        _ => return Ok(()),
    };
    let error = FieldError::invalid("spec.expirationSeconds", seconds, why);
    Err(Status::invalid("authentication.k8s.io", "TokenRequest", "", &[error]))
}

/// POST of a review.
pub async fn review(ctx: &Ctx<'_>, body: &[u8]) -> Result<Response<Body>, Status> {
    let mut warnings = Vec::new();
    let mut review = decode(ctx, body, &ctx.resource.facts.gvk(), &mut warnings)?;
    object::metadata_mut(&mut review);
    crate::read::wait_for(ctx, ctx.api.store.revision().await.map_err(crate::api::store_error)?).await?;
    let lookup = Arc::clone(&ctx.api.lookup);
    let context = reviews::Context {
        user: ctx.user,
        namespace: &ctx.info.namespace,
        authorizer: &ctx.api.authorizer,
        verifier: &ctx.api.verifier,
        lookup: lookup.as_ref(),
        now: ctx.now,
    };
    let answered = reviews::answer(&ctx.resource.facts.resource, review, &context)?;
    let mut response = reply::value(201, plain(ctx), &answered)?;
    reply::warn(&mut response, &warnings);
    Ok(response)
}

/// A pod, and the node that it runs on if it has one, for the kubelet's part of the API.
///
/// # Errors
/// 404 for the pod or its node.
pub async fn pod_and_node(ctx: &Ctx<'_>) -> Result<(Value, Option<Arc<Value>>), Status> {
    let (bytes, revision) = ctx.load().await?;
    let pod = reply::parse(&bytes, revision)?;
    let node = match text(&pod, &["spec", "nodeName"]) {
        "" => None,
        node => Some(ctx.api.lookup.get("nodes", "", node).ok_or_else(|| Status::not_found("", "pods", node))?),
    };
    Ok((pod, node))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_bound_once() {
        let now = jiff::Timestamp::from_second(0).expect("time");
        let pod = json!({"metadata": {"name": "p", "uid": "u"}, "spec": {}, "status": {"phase": "Pending"}});
        let binding = json!({"metadata": {"name": "p", "uid": "u", "labels": {"a": "b"}}, "target": {"name": "n"}});
        let bound = assign(&pod, &binding, "n", now).expect("free");
        assert_eq!((&bound["spec"]["nodeName"], &bound["status"]["conditions"][0]["type"]), (&json!("n"), &json!("PodScheduled")));
        assert_eq!(bound["metadata"]["labels"], json!({"a": "b"}));
        assert_eq!(assign(&bound, &binding, "m", now).map_err(|status| status.code), Err(409));
        let other = json!({"metadata": {"uid": "x"}, "target": {"name": "n"}});
        assert_eq!(assign(&pod, &other, "n", now).map_err(|status| status.code), Err(409));
    }
}
