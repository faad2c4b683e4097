//! Discovery: what is served, in the legacy form (a document per group and version) and the aggregated one (`/api`, `/apis`).

use std::collections::BTreeMap;

use apimachinery::KindFacts;
use apimachinery::kinds;
use base64::Engine as _;
use http::{HeaderMap, Response};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::metrics;
use crate::negotiate::{accept_header, clauses};
use crate::reply::{self, Body};

/// Subresources that this server carries out; what it does not is not offered.
const SUBRESOURCES: &[&str] =
    &["status", "scale", "binding", "token", "finalize", "log", "exec", "attach", "portforward", "ephemeralcontainers", "eviction"];

/// What can be done with metrics.
const METRICS_VERBS: [&str; 2] = ["get", "list"];

const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// Whether a subresource is carried out.
pub fn is_served(subresource: &str) -> bool {
    SUBRESOURCES.contains(&subresource)
}

/// Groups in the order of discovery, with their versions; without the core group.
fn groups() -> Vec<(&'static str, Vec<&'static str>)> {
    let mut found: Vec<(&'static str, Vec<&'static str>)> = Vec::new();
    for facts in kinds::all().filter(|facts| !facts.group.is_empty()) {
        match found.iter_mut().find(|(group, _)| *group == facts.group) {
            Some((_, versions)) if versions.contains(&facts.version.as_str()) => {}
            Some((_, versions)) => versions.push(&facts.version),
            None => found.push((&facts.group, vec![&facts.version])),
        }
    }
    found.push((metrics::GROUP, vec![metrics::VERSION]));
    found
}

fn of_version<'a>(group: &'a str, version: &'a str) -> impl Iterator<Item = &'static KindFacts> + 'a {
    kinds::all().filter(move |facts| facts.group == group && facts.version == version)
}

fn wants_aggregated(headers: &HeaderMap) -> bool {
    clauses(&accept_header(headers)).iter().take_while(|clause| !clause.parameter("as").is_empty()).any(|clause| {
        clause.media_type == "application/json"
            && clause.parameter("g") == "apidiscovery.k8s.io"
            && clause.parameter("v") == "v2"
            && clause.parameter("as") == "APIGroupDiscoveryList"
    })
}

fn aggregated_resource(facts: &KindFacts) -> Value {
    let scope = if facts.namespaced { "Namespaced" } else { "Cluster" };
    let mut resource = json!({
        "resource": facts.resource,
        "responseKind": {"group": facts.group, "version": facts.version, "kind": facts.kind},
        "scope": scope, "singularResource": facts.singular, "verbs": facts.verbs,
    });
    for (field, values) in [("shortNames", &facts.short_names), ("categories", &facts.categories)] {
        if !values.is_empty() {
            resource[field] = json!(values);
        }
    }
    let subresources: Vec<Value> = facts
        .subresources
        .iter()
        .filter(|sub| is_served(&sub.name))
        .map(|sub| {
            let or = |own: &str, parent: &str| if own.is_empty() { parent.to_owned() } else { own.to_owned() };
            let (group, version) = (or(&sub.kind.group, &facts.group), or(&sub.kind.version, &facts.version));
            json!({"subresource": sub.name, "responseKind": {"group": group, "version": version, "kind": sub.kind.kind}, "verbs": sub.verbs})
        })
        .collect();
    if !subresources.is_empty() {
        resource["subresources"] = json!(subresources);
    }
    resource
}

fn aggregated_group(group: &str, versions: &[&str]) -> Value {
    let versions: Vec<Value> = versions
        .iter()
        .map(|version| {
            let metrics = metrics::RESOURCES.iter().filter(|_| group == metrics::GROUP).map(|(resource, kind, namespaced)| {
                json!({"resource": resource, "responseKind": {"group": group, "version": version, "kind": kind},
                    "scope": if *namespaced { "Namespaced" } else { "Cluster" }, "singularResource": "", "verbs": METRICS_VERBS})
            });
            let resources: Vec<Value> = of_version(group, version).map(aggregated_resource).chain(metrics).collect();
            json!({"version": version, "resources": resources, "freshness": "Current"})
        })
        .collect();
    let mut metadata = json!({"creationTimestamp": null});
    if !group.is_empty() {
        metadata["name"] = group.into();
    }
    json!({"metadata": metadata, "versions": versions})
}

fn aggregated(items: Vec<Value>) -> Response<Body> {
    let list = json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items});
    reply::bytes(200, AGGREGATED, list.to_string())
}

fn api_group(group: &str, versions: &[&str]) -> Value {
    let versions: Vec<Value> =
        versions.iter().map(|version| json!({"groupVersion": format!("{group}/{version}"), "version": version})).collect();
    json!({"name": group, "preferredVersion": versions[0], "versions": versions})
}

/// `storageVersionHash`, as k8s.io/apiserver's discovery makes it: of the group, version and kind under which the objects are stored.
fn storage_version_hash(facts: &KindFacts) -> String {
    // Events of both groups are one: the core group's.
    let group = if facts.group == "events.k8s.io" { "" } else { facts.group.as_str() };
    let digest = Sha256::digest(format!("{group}/{}/{}", facts.version, facts.kind));
    base64::engine::general_purpose::STANDARD.encode(&digest[..8])
}

fn resource_list(group: &str, version: &str) -> Option<Value> {
    let mut resources = Vec::new();
    for facts in of_version(group, version) {
        let mut resource = json!({
            "name": facts.resource, "singularName": facts.singular, "namespaced": facts.namespaced,
            "kind": facts.kind, "verbs": facts.verbs,
        });
        for (field, values) in [("shortNames", &facts.short_names), ("categories", &facts.categories)] {
            if !values.is_empty() {
                resource[field] = json!(values);
            }
        }
        if facts.verbs.iter().any(|verb| verb == "list") {
            resource["storageVersionHash"] = storage_version_hash(facts).into();
        }
        resources.push(resource);
        for sub in facts.subresources.iter().filter(|sub| is_served(&sub.name)) {
            let mut entry = json!({
                "name": format!("{}/{}", facts.resource, sub.name), "singularName": "", "namespaced": facts.namespaced,
                "kind": sub.kind.kind, "verbs": sub.verbs,
            });
            if !sub.kind.group.is_empty() {
                entry["group"] = sub.kind.group.clone().into();
                entry["version"] = sub.kind.version.clone().into();
            }
            resources.push(entry);
        }
    }
    for (resource, kind, namespaced) in metrics::RESOURCES.iter().filter(|_| (group, version) == (metrics::GROUP, metrics::VERSION)) {
        resources.push(json!({"name": resource, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": METRICS_VERBS}));
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    if resources.is_empty() {
        return None;
    }
    let mut list = json!({"kind": "APIResourceList", "groupVersion": group_version, "resources": resources});
    if !group.is_empty() {
        // The core group's list has none, as upstream's.
        list["apiVersion"] = "v1".into();
    }
    Some(list)
}

/// Answers a discovery path; `None` when it is none. `address` is where clients reach the server.
pub fn answer(path: &str, headers: &HeaderMap, address: &str) -> Option<Response<Body>> {
    let segments: Vec<&str> = path.trim_matches('/').split('/').collect();
    let value = match segments.as_slice() {
        ["api"] if wants_aggregated(headers) => return Some(aggregated(vec![aggregated_group("", &["v1"])])),
        ["apis"] if wants_aggregated(headers) => {
            return Some(aggregated(groups().iter().map(|(group, versions)| aggregated_group(group, versions)).collect()));
        }
        ["api"] => json!({"kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]}),
        ["apis"] => {
            let groups: Vec<Value> = groups().iter().map(|(group, versions)| api_group(group, versions)).collect();
            json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        }
        ["api", version] => resource_list("", version)?,
        ["apis", group] => {
            let (_, versions) = groups().into_iter().find(|(name, _)| name == group)?;
            let mut value = api_group(group, &versions);
            value["kind"] = "APIGroup".into();
            value["apiVersion"] = "v1".into();
            value
        }
        ["apis", group, version] => resource_list(group, version)?,
        _ => return None,
    };
    Some(reply::json(&value))
}

/// `/version`: the API that is served is Kubernetes 1.37's; the build is ours.
pub fn version() -> Value {
    json!({
        "major": "1", "minor": "37", "gitVersion": format!("v1.37.2+coracle-{}", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "", "buildDate": "", "goVersion": "", "compiler": "rustc",
        "platform": format!("{}/{}", std::env::consts::OS, match std::env::consts::ARCH { "x86_64" => "amd64", "aarch64" => "arm64", other => other }),
    })
}

/// All paths that lead somewhere, for `/`.
pub fn paths() -> Value {
    let mut paths: BTreeMap<String, ()> =
        ["/api", "/api/v1", "/apis", "/healthz", "/livez", "/openapi/v3", "/readyz", "/version"].map(|path| (path.to_owned(), ())).into();
    for (group, versions) in groups() {
        paths.insert(format!("/apis/{group}"), ());
        paths.extend(versions.iter().map(|version| (format!("/apis/{group}/{version}"), ())));
    }
    json!({"paths": paths.into_keys().collect::<Vec<_>>()})
}
