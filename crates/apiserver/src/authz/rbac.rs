//! RBAC: what roles allow whom by their bindings (upstream: `plugin/pkg/auth/authorizer/rbac`, `pkg/apis/rbac/validation`).

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::Attributes;
use crate::authn::User;
use crate::lookup::{Lookup, items, text};

/// The group that may do everything, whatever the roles say. None of our components is in it.
const MASTERS: &str = "system:masters";

/// Roles and bindings at one moment, by subject.
pub struct Snapshot {
    /// Bindings for the whole cluster, then those of each namespace.
    cluster: Bindings,
    namespaces: HashMap<String, Bindings>,
}

/// From a subject's key to what its bindings give it.
#[derive(Default)]
struct Bindings {
    by_subject: HashMap<String, Vec<Grant>>,
}

/// What one binding gives to one subject.
struct Grant {
    rules: Arc<Vec<Value>>,
    /// Binding, role and subject in upstream's words.
    by: String,
}

impl Snapshot {
    /// Reads all roles and bindings.
    pub fn build(lookup: &dyn Lookup) -> Self {
        let key = |object: &Value| (text(object, "/metadata/namespace").to_owned(), text(object, "/metadata/name").to_owned());
        let rules = |object: &Value| Arc::new(items(object, "/rules").to_vec());
        let mut roles: HashMap<(String, String), Arc<Vec<Value>>> = HashMap::new();
        for resource in ["clusterroles", "roles"] {
            roles.extend(lookup.list(resource, None).iter().map(|role| (key(role), rules(role))));
        }
        let mut snapshot = Snapshot { cluster: Bindings::default(), namespaces: HashMap::new() };
        for binding in lookup.list("clusterrolebindings", None) {
            if let Some(rules) = roles.get(&(String::new(), text(&binding, "/roleRef/name").to_owned())) {
                snapshot.cluster.add(&binding, "", "ClusterRoleBinding", rules);
            }
        }
        for binding in lookup.list("rolebindings", None) {
            let namespace = text(&binding, "/metadata/namespace").to_owned();
            let scope = if text(&binding, "/roleRef/kind") == "Role" { namespace.clone() } else { String::new() };
            if let Some(rules) = roles.get(&(scope, text(&binding, "/roleRef/name").to_owned())) {
                snapshot.namespaces.entry(namespace.clone()).or_default().add(&binding, &namespace, "RoleBinding", rules);
            }
        }
        snapshot
    }

    /// Whether any role of the user allows the request.
    pub fn allows(&self, attributes: &Attributes) -> bool {
        attributes.user.is_in(MASTERS) || self.rules(attributes.user, attributes.namespace).any(|rule| allows(rule, attributes))
    }

    /// The binding that allows the request, in the words of upstream's reviews; nothing for members of `system:masters`, whom none
    /// is needed for.
    pub fn reason(&self, attributes: &Attributes) -> Option<String> {
        if attributes.user.is_in(MASTERS) {
            return None;
        }
        let mut grants = self.grants(attributes.user, attributes.namespace);
        grants.find(|grant| grant.rules.iter().any(|rule| allows(rule, attributes))).map(|grant| format!("RBAC: allowed by {}", grant.by))
    }

    fn grants<'a>(&'a self, user: &'a User, namespace: &'a str) -> impl Iterator<Item = &'a Grant> {
        let own = (!namespace.is_empty()).then(|| self.namespaces.get(namespace)).flatten();
        let bindings = [Some(&self.cluster), own].into_iter().flatten();
        bindings.flat_map(move |bindings| subject_keys(user).filter_map(|key| bindings.by_subject.get(&key)).flatten())
    }

    /// The rules that hold for a user in a namespace, those of the whole cluster included.
    pub fn rules<'a>(&'a self, user: &'a User, namespace: &'a str) -> impl Iterator<Item = &'a Value> {
        self.grants(user, namespace).flat_map(|grant| grant.rules.iter())
    }

    /// The rules of `wanted` that the user does not hold already (upstream: `rbacregistryvalidation.ConfirmNoEscalation`).
    pub fn escalates(&self, user: &User, namespace: &str, wanted: &[Value]) -> Vec<Value> {
        if user.is_in(MASTERS) {
            return Vec::new();
        }
        let held: Vec<&Value> = self.rules(user, namespace).collect();
        wanted.iter().flat_map(simple_rules).filter(|simple| !held.iter().any(|rule| covers(rule, simple))).collect()
    }
}

impl Bindings {
    fn add(&mut self, binding: &Value, namespace: &str, kind: &str, rules: &Arc<Vec<Value>>) {
        let own = text(binding, "/metadata/name");
        let place = if namespace.is_empty() { own.to_owned() } else { format!("{own}/{namespace}") };
        let role = format!("{} {:?}", text(binding, "/roleRef/kind"), text(binding, "/roleRef/name"));
        for subject in items(binding, "/subjects") {
            let name = text(subject, "/name");
            let mut called = name.to_owned();
            let key = match text(subject, "/kind") {
                "User" => format!("u:{name}"),
                "Group" => format!("g:{name}"),
                "ServiceAccount" => {
                    let own = text(subject, "/namespace");
                    let own = if own.is_empty() { namespace } else { own };
                    called = format!("{name}/{own}");
                    format!("u:system:serviceaccount:{own}:{name}")
                }
                _ => continue,
            };
            let by = format!("{kind} {place:?} of {role} to {} {called:?}", text(subject, "/kind"));
            self.by_subject.entry(key).or_default().push(Grant { rules: rules.clone(), by });
        }
    }
}

fn subject_keys(user: &User) -> impl Iterator<Item = String> {
    std::iter::once(format!("u:{}", user.name)).chain(user.groups.iter().map(|group| format!("g:{group}")))
}

fn has(rule: &Value, list: &str, wanted: &str) -> bool {
    items(rule, list).iter().filter_map(Value::as_str).any(|item| item == "*" || item == wanted)
}

/// Whether one rule allows a request.
pub fn allows(rule: &Value, attributes: &Attributes) -> bool {
    if !has(rule, "/verbs", attributes.verb) {
        return false;
    }
    if !attributes.is_resource {
        return items(rule, "/nonResourceURLs").iter().filter_map(Value::as_str).any(|url| url_matches(url, attributes.path));
    }
    let names = items(rule, "/resourceNames");
    has(rule, "/apiGroups", attributes.api_group)
        && items(rule, "/resources")
            .iter()
            .filter_map(Value::as_str)
            .any(|item| resource_matches(item, attributes.resource, attributes.subresource))
        && (names.is_empty() || names.iter().any(|name| name == attributes.name))
}

/// `pods`, `pods/log`, `*`, `*/scale`.
fn resource_matches(item: &str, resource: &str, subresource: &str) -> bool {
    if item == "*" {
        return true;
    }
    match item.split_once('/') {
        None => subresource.is_empty() && item == resource,
        Some((own, sub)) => sub == subresource && !subresource.is_empty() && (own == "*" || own == resource),
    }
}

fn url_matches(url: &str, path: &str) -> bool {
    url == "*" || url == path || url.strip_suffix('*').is_some_and(|prefix| path.starts_with(prefix))
}

/// A rule as rules of one verb and one resource (or path) and name each.
fn simple_rules(rule: &Value) -> Vec<Value> {
    let mut simple = Vec::new();
    for verb in items(rule, "/verbs") {
        for url in items(rule, "/nonResourceURLs") {
            simple.push(json!({ "verbs": [verb], "nonResourceURLs": [url] }));
        }
        for group in items(rule, "/apiGroups") {
            for resource in items(rule, "/resources") {
                let names = items(rule, "/resourceNames");
                if names.is_empty() {
                    simple.push(json!({ "verbs": [verb], "apiGroups": [group], "resources": [resource] }));
                }
                for name in names {
                    simple.push(json!({ "verbs": [verb], "apiGroups": [group], "resources": [resource], "resourceNames": [name] }));
                }
            }
        }
    }
    simple
}

/// Whether a held rule covers a simple one.
fn covers(held: &Value, simple: &Value) -> bool {
    let verb = text(simple, "/verbs/0");
    if !has(held, "/verbs", verb) {
        return false;
    }
    if let Some(url) = simple.pointer("/nonResourceURLs/0").and_then(Value::as_str) {
        return items(held, "/nonResourceURLs").iter().filter_map(Value::as_str).any(|own| url_matches(own, url));
    }
    let resource = text(simple, "/resources/0");
    let covered = |own: &str| {
        own == "*"
            || own == resource
            || own.strip_prefix("*/").is_some_and(|sub| resource.split_once('/').is_some_and(|(_, wanted)| wanted == sub))
    };
    let names = items(held, "/resourceNames");
    has(held, "/apiGroups", text(simple, "/apiGroups/0"))
        && items(held, "/resources").iter().filter_map(Value::as_str).any(covered)
        && (names.is_empty() || simple.pointer("/resourceNames/0").is_some_and(|name| names.contains(name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lookup::fake::Fake;

    fn everything() -> Value {
        json!({ "apiGroups": ["*"], "resources": ["*"], "verbs": ["*"] })
    }

    fn user(name: &str, groups: &[&str]) -> User {
        User { name: name.into(), groups: groups.iter().map(|group| (*group).to_owned()).collect(), ..User::default() }
    }

    fn snapshot() -> Snapshot {
        let binding = |kind: &str, role: &str, subject: Value| {
            json!({
            "metadata": { "namespace": "ns", "name": role }, "roleRef": { "kind": kind, "name": role }, "subjects": [subject] })
        };
        Snapshot::build(
            &Fake::default()
                .with(
                    "clusterroles",
                    json!({ "metadata": { "name": "reader" }, "rules": [
                    { "verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods", "pods/log", "*/scale"] },
                    { "verbs": ["get"], "nonResourceURLs": ["/healthz/*"] } ] }),
                )
                .with(
                    "roles",
                    json!({ "metadata": { "namespace": "ns", "name": "one" }, "rules": [
                    { "verbs": ["*"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": ["mine"] } ] }),
                )
                .with(
                    "clusterrolebindings",
                    json!({ "metadata": { "name": "b" }, "roleRef": { "kind": "ClusterRole", "name": "reader" },
                    "subjects": [{ "kind": "Group", "name": "readers" }] }),
                )
                .with("rolebindings", binding("Role", "one", json!({ "kind": "ServiceAccount", "name": "sa" })))
                .with("rolebindings", binding("ClusterRole", "reader", json!({ "kind": "User", "name": "eve" }))),
        )
    }

    fn asks<'a>(user: &'a User, verb: &'a str, resource: &'a str, namespace: &'a str, name: &'a str) -> Attributes<'a> {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        Attributes {
            user,
            verb,
            api_group: "",
            resource,
            subresource,
            name,
            namespace,
            path: "",
            is_resource: true,
            node_name_selector: "",
        }
    }

    #[test]
    fn rules_hold_where_they_are_bound() {
        let (reader, eve, sa) = (user("bob", &["readers"]), user("eve", &[]), user("system:serviceaccount:ns:sa", &[]));
        let cases = [
            (&reader, "get", "pods", "other", "", true),
            (&reader, "get", "pods/log", "other", "p", true),
            (&reader, "get", "pods/exec", "other", "p", false),
            (&reader, "get", "deployments/scale", "other", "d", true),
            (&reader, "delete", "pods", "other", "p", false),
            (&eve, "list", "pods", "ns", "", true),
            (&eve, "list", "pods", "other", "", false),
            (&eve, "list", "pods", "", "", false),
            (&sa, "delete", "secrets", "ns", "mine", true),
            (&sa, "delete", "secrets", "ns", "yours", false),
            (&sa, "list", "secrets", "ns", "", false),
        ];
        let snapshot = snapshot();
        for (user, verb, resource, namespace, name, allowed) in cases {
            assert_eq!(snapshot.allows(&asks(user, verb, resource, namespace, name)), allowed, "{} {verb} {resource}", user.name);
        }
        let path = Attributes { path: "/healthz/etcd", is_resource: false, ..asks(&reader, "get", "", "", "") };
        assert!(snapshot.allows(&path));
        assert!(!snapshot.allows(&Attributes { path: "/metrics", ..path }));
        let by_account = snapshot.reason(&asks(&sa, "delete", "secrets", "ns", "mine"));
        assert_eq!(by_account.as_deref(), Some("RBAC: allowed by RoleBinding \"one/ns\" of Role \"one\" to ServiceAccount \"sa/ns\""));
        let by_group = snapshot.reason(&asks(&reader, "get", "pods", "other", ""));
        assert_eq!(by_group.as_deref(), Some("RBAC: allowed by ClusterRoleBinding \"b\" of ClusterRole \"reader\" to Group \"readers\""));
    }

    #[test]
    fn nobody_gives_away_what_he_does_not_hold() {
        let snapshot = snapshot();
        let reader = user("bob", &["readers"]);
        let held = json!({ "verbs": ["get"], "apiGroups": [""], "resources": ["pods", "replicasets/scale"] });
        assert_eq!(snapshot.escalates(&reader, "", std::slice::from_ref(&held)), Vec::<Value>::new());
        assert_eq!(snapshot.escalates(&reader, "", &[everything()]).len(), 1);
        assert_eq!(snapshot.escalates(&user("x", &[MASTERS]), "", &[everything()]).len(), 0);
    }
}
