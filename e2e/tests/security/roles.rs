//! No component can do more than its upstream role: every credential's own rules are compared with those of kube-apiserver's
//! default roles, and what upstream's may not do is asked for and refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::api::{Api, Credential};
use e2e::cluster::Cluster;
use serde_json::{Value, json};

use crate::{case, together, token_of, try_all, with_body};

/// The default roles and bindings of a running kube-apiserver 1.37.2, one object a line (as `apiserver` has them from there).
const DEFAULTS: &str = include_str!("../../../crates/apiserver/data/bootstrap.jsonl");
/// What upstream has no binding for, as it has no such identities: the admin's group, and the API server towards kubelets.
const OURS: [(&str, &str); 2] =
    [("coracle:cluster-admins", "cluster-admin"), ("kube-apiserver-kubelet-client", "system:kubelet-api-admin")];
/// Certificates of servers, which must not be good for clients.
const SERVERS: [&str; 2] = ["apiserver", "kubelet-server"];
const AUTHORITY: &str = "ca";
/// The namespaces in which rules are compared.
const NAMESPACES: [&str; 3] = ["default", "kube-system", "kube-public"];

/// One thing that is allowed: verb, group, resource and name (or `*`), or verb and path.
type Simple = (String, String, String, String);

/// Judges every key that the cluster has made and every service account.
pub fn judge(cluster: &Cluster) -> Result<()> {
    let api = cluster.api();
    let defaults: Vec<Value> = DEFAULTS.lines().map(serde_json::from_str).collect::<Result<_, _>>().context("bad default roles")?;
    let mut outcomes = vec![roles_are_upstreams(&api, &defaults)];
    let mut users = 0;
    for name in certificates(cluster)? {
        if SERVERS.contains(&name.as_str()) {
            outcomes.push(no_client(&api, &name));
        } else {
            users += 1;
            outcomes.push(rules_are_upstreams(&name, &api.as_component(&name), &defaults));
        }
    }
    ensure!(users >= 5, "only {users} client certificates were found");
    let accounts = api.object("/api/v1/namespaces/kube-system/serviceaccounts")?;
    let accounts: Vec<&str> =
        accounts["items"].as_array().into_iter().flatten().filter_map(|account| account["metadata"]["name"].as_str()).collect();
    ensure!(accounts.contains(&"deployment-controller"), "the controllers have no service accounts: {accounts:?}");
    for account in accounts {
        let caller = api.with(Credential::Token(token_of(&api, "kube-system", account)?));
        outcomes.push(rules_are_upstreams(account, &caller, &defaults));
    }
    outcomes.push(refusals(&api));
    together(outcomes)
}

/// The names of the certificates that the cluster has made.
fn certificates(cluster: &Cluster) -> Result<Vec<String>> {
    let folder = cluster.data().join("pki");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("failed to list {}", folder.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".crt").filter(|name| *name != AUTHORITY).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

/// A server's certificate names a user, too, and must not make one.
fn no_client(api: &Api, name: &str) -> Result<()> {
    match api.as_component(name).ask("GET", "/api/v1/namespaces", "", "") {
        // The connection is closed, or the request refused.
        Err(_) | Ok((401, _)) => Ok(()),
        Ok((status, body)) => anyhow::bail!("{name}, a server's certificate, is answered with {status}: {body}"),
    }
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn items<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn find<'a>(objects: &'a [Value], kind: &str, namespace: &str, name: &str) -> Option<&'a Value> {
    objects.iter().find(|object| {
        text(object, "/kind") == kind && text(object, "/metadata/namespace") == namespace && text(object, "/metadata/name") == name
    })
}

/// The stored roles and bindings are upstream's, and nothing besides but ours.
fn roles_are_upstreams(api: &Api, defaults: &[Value]) -> Result<()> {
    let mut wrong = Vec::new();
    for (resource, kind) in
        [("clusterroles", "ClusterRole"), ("clusterrolebindings", "ClusterRoleBinding"), ("roles", "Role"), ("rolebindings", "RoleBinding")]
    {
        let list = api.object(&format!("/apis/rbac.authorization.k8s.io/v1/{resource}"))?;
        for object in items(&list, "/items") {
            let (namespace, name) = (text(object, "/metadata/namespace"), text(object, "/metadata/name"));
            let own = kind == "ClusterRoleBinding" && OURS.iter().any(|(own, role)| name == *own && text(object, "/roleRef/name") == *role);
            let Some(upstream) = find(defaults, kind, namespace, name) else {
                if !own {
                    wrong.push(format!("{kind} {namespace}/{name} is not upstream's"));
                }
                continue;
            };
            let same = flatten(items(object, "/rules")) == flatten(items(upstream, "/rules"))
                && items(object, "/subjects") == items(upstream, "/subjects")
                && text(object, "/roleRef/name") == text(upstream, "/roleRef/name");
            if !same {
                wrong.push(format!("{kind} {namespace}/{name} differs from upstream's: {object}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Rules as single permissions, so that their order and grouping do not matter.
fn flatten(rules: &[Value]) -> BTreeSet<Simple> {
    let mut simple = BTreeSet::new();
    let words =
        |rule: &Value, name: &str| -> Vec<String> { items(rule, name).iter().filter_map(Value::as_str).map(str::to_owned).collect() };
    for rule in rules {
        for verb in words(rule, "/verbs") {
            for path in words(rule, "/nonResourceURLs") {
                simple.insert((verb.clone(), String::new(), path, "path".to_owned()));
            }
            let mut names = words(rule, "/resourceNames");
            if names.is_empty() {
                names.push("*".to_owned());
            }
            for group in words(rule, "/apiGroups") {
                for resource in words(rule, "/resources") {
                    simple.extend(names.iter().map(|name| (verb.clone(), group.clone(), resource.clone(), name.clone())));
                }
            }
        }
    }
    simple
}

/// What upstream's default bindings give a user in a namespace.
fn expected(defaults: &[Value], user: &str, groups: &BTreeSet<String>, namespace: &str) -> BTreeSet<Simple> {
    let mut simple = BTreeSet::new();
    let is_meant = |subject: &Value| match text(subject, "/kind") {
        "User" => text(subject, "/name") == user,
        "Group" => groups.contains(text(subject, "/name")),
        _ => user == format!("system:serviceaccount:{}:{}", text(subject, "/namespace"), text(subject, "/name")),
    };
    let mut add = |kind: &str, namespace: &str, role: &str| {
        simple.extend(find(defaults, kind, namespace, role).map(|role| flatten(items(role, "/rules"))).unwrap_or_default());
    };
    for binding in defaults.iter().filter(|object| matches!(text(object, "/kind"), "ClusterRoleBinding" | "RoleBinding")) {
        let place = text(binding, "/metadata/namespace");
        if (place.is_empty() || place == namespace) && items(binding, "/subjects").iter().any(is_meant) {
            let kind = text(binding, "/roleRef/kind");
            add(kind, if kind == "Role" { place } else { "" }, text(binding, "/roleRef/name"));
        }
    }
    for (subject, role) in OURS {
        if user == subject || groups.contains(subject) {
            add("ClusterRole", "", role);
        }
    }
    simple
}

/// Who the server takes the caller for, and what it says that the caller may do.
fn rules_are_upstreams(name: &str, caller: &Api, defaults: &[Value]) -> Result<()> {
    let ask = |group: &str, resource: &str, review: Value| -> Result<Value> {
        let path = format!("/apis/{group}/v1/{resource}");
        let (status, body) = caller.ask("POST", &path, "application/json", &review.to_string())?;
        ensure!(status == 201, "{name}: POST {path}: {status}: {body}");
        serde_json::from_str(&body).with_context(|| format!("POST {path}: bad JSON"))
    };
    let who = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"});
    let who = ask("authentication.k8s.io", "selfsubjectreviews", who)?;
    let user = text(&who, "/status/userInfo/username");
    let groups: BTreeSet<String> = items(&who, "/status/userInfo/groups").iter().filter_map(Value::as_str).map(str::to_owned).collect();
    ensure!(!groups.contains("system:masters"), "{name} is in system:masters");
    let mut counts = BTreeMap::new();
    for namespace in NAMESPACES {
        let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": namespace}});
        let review = ask("authorization.k8s.io", "selfsubjectrulesreviews", review)?;
        let mut rules = items(&review, "/status/resourceRules").to_vec();
        rules.extend_from_slice(items(&review, "/status/nonResourceRules"));
        let (seen, wanted) = (flatten(&rules), expected(defaults, user, &groups, namespace));
        let (more, less): (Vec<_>, Vec<_>) = (seen.difference(&wanted).collect(), wanted.difference(&seen).collect());
        ensure!(more.is_empty() && less.is_empty(), "{name} ({user}) in {namespace} may also {more:?}, and may not {less:?}");
        counts.insert(namespace, seen.len());
    }
    println!("{name}: {user} in {groups:?}: permissions {counts:?}");
    Ok(())
}

/// Requests that upstream's roles refuse to the two that stand nearest to everything.
fn refusals(api: &Api) -> Result<()> {
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "mine"},
        "subjects": [{"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": "system:authenticated"}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}});
    let pod =
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "mine"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
    let default = "/api/v1/namespaces/default";
    let scheduler = [
        case("GET", format!("{default}/secrets/used"), 403),
        case("GET", "/api/v1/secrets", 403),
        case("GET", format!("{default}/configmaps"), 403),
        with_body("POST", format!("{default}/pods"), &pod, 403),
        with_body("POST", bindings, &binding, 403),
        with_body("PATCH", "/api/v1/nodes/elsewhere", &json!({"spec": {"unschedulable": true}}), 403),
        case("DELETE", "/api/v1/nodes/elsewhere", 403),
        case("POST", format!("{default}/pods/user/exec?command=id&stdout=true"), 403),
        case("GET", "/api/v1/nodes/elsewhere/proxy/pods", 403),
        case("DELETE", "/api/v1/namespaces/default", 403),
    ];
    let controllers = [
        case("POST", format!("{default}/pods/user/exec?command=id&stdout=true"), 403),
        with_body("POST", format!("{default}/pods"), &pod, 403),
        with_body("POST", bindings, &binding, 403),
        case("DELETE", "/api/v1/nodes/elsewhere", 403),
        case("DELETE", "/api/v1/namespaces/default", 403),
        case("GET", format!("{default}/pods/user/log"), 403),
    ];
    let deployments = [
        case("GET", format!("{default}/secrets/used"), 403),
        case("GET", "/api/v1/nodes", 403),
        with_body("POST", bindings, &binding, 403),
        case("DELETE", "/api/v1/nodes/elsewhere", 403),
    ];
    let deployment = api.with(Credential::Token(token_of(api, "kube-system", "deployment-controller")?));
    together([
        try_all("the scheduler wants more", &api.as_component("kube-scheduler"), &scheduler),
        try_all("the controller manager wants more", &api.as_component("kube-controller-manager"), &controllers),
        try_all("the deployment controller wants more", &deployment, &deployments),
    ])
}
