//! The kinds served: names, scope, verbs, subresources, table columns.
//!
//! Source: discovery and tables of kube-apiserver v1.37.2 (`data/kinds.json`, kept to the kinds that Coracle serves).

use std::fmt;
use std::sync::OnceLock;

use serde::Deserialize;

use crate::schema::{TypeId, schema};

static TABLE: &str = include_str!("../data/kinds.json");

/// Group, version and kind of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Gvk {
    /// API group; empty for the core group.
    pub group: String,
    /// API version.
    pub version: String,
    /// Kind.
    pub kind: String,
}

impl Gvk {
    /// From an object's `apiVersion` and `kind`.
    pub fn new(api_version: &str, kind: &str) -> Self {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        Self { group: group.to_owned(), version: version.to_owned(), kind: kind.to_owned() }
    }

    /// From an object's own fields; `None` when either is missing or no string.
    pub fn of(object: &serde_json::Value) -> Option<Self> {
        Some(Self::new(object.get("apiVersion")?.as_str()?, object.get("kind")?.as_str()?))
    }

    /// `group/version`, or `version` in the core group.
    pub fn api_version(&self) -> String {
        api_version(&self.group, &self.version)
    }
}

impl fmt::Display for Gvk {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}, Kind={}", self.api_version(), self.kind)
    }
}

fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

/// A subresource of a resource.
#[derive(Debug, Deserialize)]
pub struct Subresource {
    /// Name, as in the path.
    pub name: String,
    /// The kind of its body; empty group and version mean the parent's.
    pub kind: SubresourceKind,
    /// Verbs.
    pub verbs: Vec<String>,
}

/// Kind of a subresource's body.
#[derive(Debug, Deserialize)]
pub struct SubresourceKind {
    /// API group; empty when it is the parent's.
    pub group: String,
    /// API version; empty when it is the parent's.
    pub version: String,
    /// Kind.
    pub kind: String,
}

/// A column of a kind's table.
#[derive(Debug, Deserialize)]
#[serde(from = "(String, String, String, i32)")]
pub struct Column {
    /// Heading.
    pub name: String,
    /// OpenAPI type.
    pub r#type: String,
    /// OpenAPI format; `name` marks the primary column.
    pub format: String,
    /// 0 is always shown, others with `-o wide`.
    pub priority: i32,
}

impl From<(String, String, String, i32)> for Column {
    fn from((name, r#type, format, priority): (String, String, String, i32)) -> Self {
        Self { name, r#type, format, priority }
    }
}

#[derive(Deserialize)]
struct Row {
    group: String,
    version: String,
    kind: String,
    plural: String,
    singular: String,
    scope: String,
    verbs: Vec<String>,
    short: Vec<String>,
    categories: Vec<String>,
    sub: Vec<Subresource>,
    #[serde(default)]
    columns: Vec<Column>,
}

/// Facts of one kind.
#[derive(Debug)]
pub struct KindFacts {
    /// API group; empty for the core group.
    pub group: String,
    /// API version.
    pub version: String,
    /// Kind.
    pub kind: String,
    /// Plural name, as in paths; empty for kinds that are only bodies of subresources.
    pub resource: String,
    /// Singular name.
    pub singular: String,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
    /// Verbs of the resource.
    pub verbs: Vec<String>,
    /// Short names.
    pub short_names: Vec<String>,
    /// Categories, as `all`.
    pub categories: Vec<String>,
    /// Subresources.
    pub subresources: Vec<Subresource>,
    /// Table columns; empty when the server has only the default ones.
    pub columns: Vec<Column>,
    /// The schema type.
    pub type_id: TypeId,
}

impl KindFacts {
    /// `group/version`, or `version` in the core group.
    pub fn api_version(&self) -> String {
        api_version(&self.group, &self.version)
    }

    /// `resource.group`, or `resource` in the core group: upstream's `GroupResource.String()`.
    pub fn group_resource(&self) -> String {
        if self.group.is_empty() { self.resource.clone() } else { format!("{}.{}", self.resource, self.group) }
    }

    /// The group, version and kind.
    pub fn gvk(&self) -> Gvk {
        Gvk { group: self.group.clone(), version: self.version.clone(), kind: self.kind.clone() }
    }

    /// The subresource with this name.
    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|sub| sub.name == name)
    }

    /// Whether the resource has the verb.
    pub fn has_verb(&self, verb: &str) -> bool {
        self.verbs.iter().any(|known| known == verb)
    }

    /// Whether the kind has a `status` subresource, so that status is separated from the rest.
    pub fn has_status(&self) -> bool {
        self.subresource("status").is_some()
    }
}

/// Kinds that are no resource of their own: bodies of subresources and options.
const BODIES: &[(&str, &str, &str)] = &[
    ("autoscaling", "v1", "Scale"),
    ("authentication.k8s.io", "v1", "TokenRequest"),
    ("policy", "v1", "Eviction"),
    ("", "v1", "DeleteOptions"),
    ("", "v1", "Status"),
];

/// Subresources that upstream has and Coracle does not serve; discovery does not list them.
const UNSERVED: &[&str] = &["proxy", "resize"];

fn facts() -> &'static [KindFacts] {
    static FACTS: OnceLock<Vec<KindFacts>> = OnceLock::new();
    FACTS.get_or_init(|| {
        let rows: Vec<Row> = serde_json::from_str(TABLE).expect("data/kinds.json is generated and parsed by a test");
        let mut facts: Vec<KindFacts> = rows.into_iter().map(KindFacts::from).collect();
        facts.extend(BODIES.iter().map(|(group, version, kind)| body(group, version, kind)));
        facts
    })
}

fn type_of(group: &str, version: &str, kind: &str) -> TypeId {
    schema().by_kind(group, version, kind).unwrap_or_else(|| panic!("data/schema.tsv has no {group}/{version} {kind}"))
}

fn body(group: &str, version: &str, kind: &str) -> KindFacts {
    KindFacts {
        group: group.to_owned(),
        version: version.to_owned(),
        kind: kind.to_owned(),
        resource: String::new(),
        singular: String::new(),
        namespaced: true,
        verbs: Vec::new(),
        short_names: Vec::new(),
        categories: Vec::new(),
        subresources: Vec::new(),
        columns: Vec::new(),
        type_id: type_of(group, version, kind),
    }
}

impl From<Row> for KindFacts {
    fn from(row: Row) -> Self {
        let type_id = type_of(&row.group, &row.version, &row.kind);
        let subresources = row.sub.into_iter().filter(|sub| !UNSERVED.contains(&sub.name.as_str())).collect();
        Self {
            group: row.group,
            version: row.version,
            kind: row.kind,
            resource: row.plural,
            singular: row.singular,
            namespaced: row.scope == "Namespaced",
            verbs: row.verbs,
            short_names: row.short,
            categories: row.categories,
            subresources,
            columns: row.columns,
            type_id,
        }
    }
}

/// All resources served, in the order of discovery.
pub fn all() -> impl Iterator<Item = &'static KindFacts> {
    facts().iter().filter(|facts| !facts.resource.is_empty())
}

/// The kind behind `group/version/resource`.
pub fn by_resource(group: &str, version: &str, resource: &str) -> Option<&'static KindFacts> {
    all().find(|facts| facts.resource == resource && facts.group == group && facts.version == version)
}

/// The kind with this group, version and name, bodies of subresources (Scale, TokenRequest, Eviction, DeleteOptions, Status) included.
pub fn by_kind(group: &str, version: &str, kind: &str) -> Option<&'static KindFacts> {
    facts().iter().find(|facts| facts.kind == kind && facts.group == group && facts.version == version)
}

/// The kind of an object's `apiVersion` and `kind`.
pub fn by_gvk(gvk: &Gvk) -> Option<&'static KindFacts> {
    by_kind(&gvk.group, &gvk.version, &gvk.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookups() {
        let deployment = by_resource("apps", "v1", "deployments").expect("served");
        assert_eq!(deployment.group_resource(), "deployments.apps");
        assert!(deployment.namespaced && deployment.has_status() && deployment.has_verb("watch"));
        assert_eq!(deployment.columns.len(), 8);
        assert!(by_kind("autoscaling", "v1", "Scale").is_some());
        assert!(all().all(|facts| !facts.verbs.is_empty()));
        assert_eq!(all().count(), 25);
    }
}
