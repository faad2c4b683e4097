//! Who writes roles and bindings may not give more than they hold
//! (`pkg/registry/rbac/*/policybased`, v1.37): the verbs `escalate` and `bind` say otherwise.

use apimachinery::status::Status;
use serde_json::Value;

use crate::api::Ctx;
use crate::authz::{Attributes, Decision};
use crate::lookup::{Lookup as _, items, text};

/// Checks a Role, ClusterRole or a binding that is written. Other kinds pass.
///
/// # Errors
/// 403 that names what the user lacks, 404 for a binding to a role that does not exist.
pub fn check(ctx: &Ctx<'_>, object: &Value, old: Option<&Value>) -> Result<(), Status> {
    if ctx.resource.facts.group != "rbac.authorization.k8s.io" {
        return Ok(());
    }
    let namespace = ctx.info.namespace.as_str();
    match ctx.resource.facts.resource.as_str() {
        resource @ ("roles" | "clusterroles") => {
            let unchanged = |field: &str| old.is_some_and(|old| old.get(field) == object.get(field));
            if (unchanged("rules") && unchanged("aggregationRule"))
                || allowed(ctx, "escalate", resource, text(object, "/metadata/name"), namespace)
            {
                return Ok(());
            }
            if object.get("aggregationRule").is_some_and(|rule| !rule.is_null()) && !unchanged("aggregationRule") {
                let all: Value = serde_json::json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]});
                refuse(ctx, object, namespace, &[all])?;
            }
            refuse(ctx, object, namespace, items(object, "/rules"))
        }
        "rolebindings" | "clusterrolebindings" => {
            let unchanged = |field: &str| old.is_some_and(|old| old.get(field) == object.get(field));
            if unchanged("subjects") && unchanged("roleRef") {
                return Ok(());
            }
            let name = text(object, "/roleRef/name");
            let (resource, place) = if text(object, "/roleRef/kind") == "Role" { ("roles", namespace) } else { ("clusterroles", "") };
            if allowed(ctx, "bind", resource, name, namespace) {
                return Ok(());
            }
            let role = ctx.api.lookup.get(resource, place, name);
            let role = role.ok_or_else(|| Status::not_found("rbac.authorization.k8s.io", resource, name))?;
            refuse(ctx, object, namespace, items(&role, "/rules"))
        }
        _ => Ok(()),
    }
}

fn allowed(ctx: &Ctx<'_>, verb: &str, resource: &str, name: &str, namespace: &str) -> bool {
    let attributes = Attributes {
        user: ctx.user,
        verb,
        api_group: "rbac.authorization.k8s.io",
        resource,
        subresource: "",
        name,
        namespace,
        path: "",
        is_resource: true,
        node_name_selector: "",
    };
    ctx.api.authorizer.authorize(&attributes) == Decision::Allow
}

fn refuse(ctx: &Ctx<'_>, object: &Value, namespace: &str, rules: &[Value]) -> Result<(), Status> {
    let missing = ctx.api.authorizer.snapshot().escalates(ctx.user, namespace, rules);
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = missing.iter().map(rule_text).collect();
    let groups = ctx.user.groups.iter().map(|group| format!("{group:?}")).collect::<Vec<_>>().join(" ");
    let why = format!(
        "user {:?} (groups=[{groups}]) is attempting to grant RBAC permissions not currently held:\n{}",
        ctx.user.name,
        list.join("\n")
    );
    let facts = ctx.resource.facts;
    Err(Status::forbidden(&facts.group, &facts.resource, text(object, "/metadata/name"), &why))
}

/// A rule as upstream's compact form writes it: `{APIGroups:["apps"], Resources:["deployments"], Verbs:["get"]}`.
fn rule_text(rule: &Value) -> String {
    let names = [
        ("NonResourceURLs", "nonResourceURLs"),
        ("APIGroups", "apiGroups"),
        ("Resources", "resources"),
        ("ResourceNames", "resourceNames"),
        ("Verbs", "verbs"),
    ];
    let part = |(shown, field): &(&str, &str)| {
        let values = items(rule, &format!("/{field}"));
        let values: Vec<String> = values.iter().filter_map(Value::as_str).map(|value| format!("{value:?}")).collect();
        (!values.is_empty()).then(|| format!("{shown}:[{}]", values.join(" ")))
    };
    format!("{{{}}}", names.iter().filter_map(part).collect::<Vec<_>>().join(", "))
}
