//! The resources served: their facts, where they are stored, and the few ways in which their storage differs.

use std::collections::HashMap;

use apimachinery::KindFacts;
use apimachinery::kinds;

/// A resource as it is served. Two may share one storage (`events` of the core group and of `events.k8s.io`).
#[derive(Debug)]
pub struct Resource {
    /// Names, scope, verbs, columns.
    pub facts: &'static KindFacts,
    /// Where its objects are kept; `None` for kinds that are only asked (reviews, bindings).
    pub storage: Option<usize>,
    /// The kind that is stored is another one (see [`apimachinery::convert`]).
    pub converted: bool,
}

/// One keyspace of the store.
#[derive(Debug)]
pub struct Storage {
    /// `/registry/pods/`.
    pub prefix: String,
    /// Facts of the kind that is stored.
    pub facts: &'static KindFacts,
    /// What stored bytes start with after the brace: `"kind":"Pod","apiVersion":"v1",`.
    pub type_prefix: String,
}

impl Storage {
    /// The key of an object.
    pub fn key(&self, namespace: &str, name: &str) -> String {
        if self.facts.namespaced { format!("{}{namespace}/{name}", self.prefix) } else { format!("{}{name}", self.prefix) }
    }

    /// The prefix of all keys of a namespace, or of all keys for an empty namespace.
    pub fn collection(&self, namespace: &str) -> String {
        if self.facts.namespaced && !namespace.is_empty() { format!("{}{namespace}/", self.prefix) } else { self.prefix.clone() }
    }
}

/// All resources and their storages.
#[derive(Debug)]
pub struct Resources {
    root: String,
    resources: HashMap<(&'static str, &'static str, &'static str), Resource>,
    storages: Vec<Storage>,
}

/// Upstream's names of keyspaces where they are not the plural (`pkg/registry/core/rest/storage_core.go`).
fn keyspace(facts: &KindFacts) -> &str {
    match (facts.group.as_str(), facts.resource.as_str()) {
        ("", "nodes") => "minions",
        ("", "services") => "services/specs",
        ("", "endpoints") => "services/endpoints",
        (_, resource) => resource,
    }
}

impl Default for Resources {
    fn default() -> Self {
        Self::new("/registry")
    }
}

impl Resources {
    /// All resources, their keys below `prefix` (`--etcd-prefix`).
    pub fn new(prefix: &str) -> Self {
        let root = format!("{prefix}/");
        let mut storages: Vec<Storage> = Vec::new();
        let mut resources = HashMap::new();
        for facts in kinds::all() {
            let prefix = format!("{root}{}/", keyspace(facts));
            let converted = facts.group == "events.k8s.io";
            let storage = facts.has_verb("list").then(|| {
                storages.iter().position(|storage| storage.prefix == prefix).unwrap_or_else(|| {
                    let type_prefix = format!("\"kind\":\"{}\",\"apiVersion\":\"{}\",", facts.kind, facts.api_version());
                    storages.push(Storage { prefix, facts, type_prefix });
                    storages.len() - 1
                })
            });
            resources
                .insert((facts.group.as_str(), facts.version.as_str(), facts.resource.as_str()), Resource { facts, storage, converted });
        }
        Self { root, resources, storages }
    }

    /// What all keys begin with: `/registry/`.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// The resource behind a path.
    pub fn get(&self, group: &str, version: &str, resource: &str) -> Option<&Resource> {
        kinds::by_resource(group, version, resource)
            .and_then(|facts| self.resources.get(&(facts.group.as_str(), facts.version.as_str(), facts.resource.as_str())))
    }

    /// All keyspaces; the index is [`Resource::storage`].
    pub fn storages(&self) -> &[Storage] {
        &self.storages
    }

    /// The keyspace of a plural name, whatever its group.
    pub fn storage_of(&self, resource: &str) -> Option<usize> {
        self.storages.iter().position(|storage| storage.facts.resource == resource)
    }
}

/// Whether a PUT to a name that does not exist creates it (each kind's `AllowCreateOnUpdate`).
pub fn creates_on_update(facts: &KindFacts) -> bool {
    matches!(facts.group.as_str(), "rbac.authorization.k8s.io" | "coordination.k8s.io" | "events.k8s.io")
        || matches!((facts.group.as_str(), facts.resource.as_str()), ("", "events" | "services" | "endpoints") | (_, "priorityclasses"))
}

/// Whether a PUT without resourceVersion is taken (each kind's `AllowUnconditionalUpdate`).
pub fn updates_unconditionally(facts: &KindFacts) -> bool {
    !matches!(facts.resource.as_str(), "leases")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_upstreams() {
        let resources = Resources::default();
        let key = |group, version, resource, namespace, name| {
            let resource = resources.get(group, version, resource).expect("served");
            resources.storages()[resource.storage.expect("stored")].key(namespace, name)
        };
        assert_eq!(key("", "v1", "nodes", "", "n"), "/registry/minions/n");
        assert_eq!(key("", "v1", "services", "a", "s"), "/registry/services/specs/a/s");
        assert_eq!(key("events.k8s.io", "v1", "events", "a", "e"), "/registry/events/a/e");
        assert_eq!(key("apps", "v1", "deployments", "a", "d"), "/registry/deployments/a/d");
    }
}
