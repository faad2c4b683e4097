//! OpenAPI v3 documents of the served group-versions, made from the schema facts.
//!
//! They carry what clients look at: schemas with the `x-kubernetes-*` extensions (explain, client-side validation, merge keys), and paths with
//! their kinds, actions and query parameters (`kubectl apply` and `create` look there for `fieldValidation`). Descriptions are left out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use serde_json::{Map, Value, json};

use crate::kinds::{self, Gvk, KindFacts, Subresource};
use crate::schema::{Container, Field, Item, ListType, Shape, Type, TypeId, openapi_name, schema};

mod paths;

/// A document and the hash that its URL carries.
#[derive(Debug)]
pub struct Document {
    /// JSON text.
    pub json: String,
    /// Upper-case hexadecimal hash of the text; the same for the same text in every build.
    pub hash: String,
}

/// The documents by their path below `/openapi/v3`: `api/v1`, `apis/apps/v1`.
pub fn documents() -> &'static BTreeMap<String, Document> {
    static DOCUMENTS: OnceLock<BTreeMap<String, Document>> = OnceLock::new();
    DOCUMENTS.get_or_init(|| {
        let versions: BTreeSet<(String, String)> = kinds::all().map(|kind| (kind.group.clone(), kind.version.clone())).collect();
        versions.into_iter().map(|(group, version)| (path_of(&group, &version), document(&group, &version))).collect()
    })
}

/// The index served at `/openapi/v3`.
pub fn v3_index() -> Value {
    let entry = |(path, document): (&String, &Document)| {
        (path.clone(), json!({"serverRelativeURL": format!("/openapi/v3/{path}?hash={}", document.hash)}))
    };
    json!({"paths": documents().iter().map(entry).collect::<Map<_, _>>()})
}

/// The document of a path below `/openapi/v3`, as `apis/apps/v1`.
pub fn v3_document(path: &str) -> Option<&'static Document> {
    documents().get(path)
}

fn path_of(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

fn document(group: &str, version: &str) -> Document {
    let kinds: Vec<&KindFacts> = kinds::all().filter(|kind| kind.group == group && kind.version == version).collect();
    let mut roots: Vec<TypeId> = Vec::new();
    for name in ["meta.v1.DeleteOptions", "meta.v1.Patch", "meta.v1.Status", "meta.v1.WatchEvent", "meta.v1.APIResourceList"] {
        roots.extend(schema().by_name(name));
    }
    let mut operations = Map::new();
    for kind in &kinds {
        roots.push(kind.type_id);
        roots.extend(list_type(kind));
        roots.extend(kind.subresources.iter().filter_map(|sub| body_type(kind, sub)));
        paths::add(&mut operations, kind);
    }
    let schemas: Map<String, Value> = reachable(roots)
        .into_iter()
        .map(|name| {
            let id = schema().by_name(name).expect("names of reachable types come from the schema");
            (openapi_name(name), type_schema(schema().get(id), group, version))
        })
        .collect();
    let bearer = json!({"type": "apiKey", "description": "Bearer Token authentication", "name": "authorization", "in": "header"});
    let document = json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "1.37"},
        "paths": operations,
        "components": {"schemas": schemas, "securitySchemes": {"BearerToken": bearer}},
    });
    let json = document.to_string();
    Document { hash: hash(json.as_bytes()), json }
}

/// FNV-1a, 128 bits: names a text, protects nothing.
fn hash(bytes: &[u8]) -> String {
    let offset: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    let prime: u128 = 0x0100_0000_0000_0000_0000_013b;
    format!("{:032X}", bytes.iter().fold(offset, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(prime)))
}

/// The list type of a kind.
fn list_type(kind: &KindFacts) -> Option<TypeId> {
    schema().by_kind(&kind.group, &kind.version, &format!("{}List", kind.kind))
}

/// The kind of a subresource's body.
fn subresource_gvk(kind: &KindFacts, sub: &Subresource) -> Gvk {
    if sub.kind.version.is_empty() {
        return Gvk { group: kind.group.clone(), version: kind.version.clone(), kind: sub.kind.kind.clone() };
    }
    Gvk { group: sub.kind.group.clone(), version: sub.kind.version.clone(), kind: sub.kind.kind.clone() }
}

fn body_type(kind: &KindFacts, sub: &Subresource) -> Option<TypeId> {
    let gvk = subresource_gvk(kind, sub);
    schema().by_kind(&gvk.group, &gvk.version, &gvk.kind)
}

fn reachable(roots: Vec<TypeId>) -> BTreeSet<&'static str> {
    let schema = schema();
    let mut seen = BTreeSet::new();
    let mut queue = roots;
    while let Some(id) = queue.pop() {
        let found = schema.get(id);
        if seen.insert(found.name) {
            queue.extend(found.fields.iter().filter_map(|field| match field.item {
                Item::Type(id) => Some(id),
                _ => None,
            }));
        }
    }
    seen
}

fn type_schema(found: &'static Type, group: &str, version: &str) -> Value {
    match found.shape {
        Shape::Quantity => return json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
        Shape::IntOrString => return json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]}),
        Shape::Time | Shape::MicroTime => return json!({"type": "string", "format": "date-time"}),
        Shape::RawExtension | Shape::FieldsV1 | Shape::Free => return json!({"type": "object"}),
        Shape::Object => {}
    }
    let mut map = Map::new();
    map.insert("type".to_owned(), "object".into());
    let required: Vec<&str> = found.fields.iter().filter(|field| field.required).map(|field| field.name).collect();
    if !required.is_empty() {
        map.insert("required".to_owned(), required.into());
    }
    let properties: Map<String, Value> = found.fields.iter().map(|field| (field.name.to_owned(), field_schema(found, field))).collect();
    map.insert("properties".to_owned(), Value::Object(properties));
    let gvks: Vec<Value> = if found.gvks == "all" {
        let kind = found.name.rsplit('.').next().unwrap_or("");
        vec![json!({"group": group, "kind": kind, "version": version})]
    } else {
        found.gvks.split(',').filter(|gvk| !gvk.is_empty()).map(gvk_value).collect()
    };
    if !gvks.is_empty() {
        map.insert("x-kubernetes-group-version-kind".to_owned(), gvks.into());
    }
    if found.map_atomic {
        map.insert("x-kubernetes-map-type".to_owned(), "atomic".into());
    }
    if let Ok(unions) = serde_json::from_str::<Value>(found.unions) {
        map.insert("x-kubernetes-unions".to_owned(), unions);
    }
    Value::Object(map)
}

fn gvk_value(joined: &str) -> Value {
    let mut parts = joined.split('/');
    let mut next = || parts.next().unwrap_or("");
    let (group, version, kind) = (next(), next(), next());
    json!({"group": group, "kind": kind, "version": version})
}

fn reference(id: TypeId) -> Value {
    json!({"$ref": format!("#/components/schemas/{}", schema().get(id).openapi_name())})
}

/// The schema of an item that is no named type.
fn basic(spelling: &str) -> Value {
    match spelling.split_once('/') {
        Some((name, format)) => json!({"type": name, "format": format}),
        None => json!({"type": spelling}),
    }
}

fn item_schema(field: &Field) -> Value {
    match field.item {
        Item::Type(id) => reference(id),
        Item::Strings => json!({"type": "array", "items": {"type": "string", "default": ""}}),
        _ => basic(field.spelling),
    }
}

/// Declared defaults that are zero values, which the reference data does not have.
const ZERO_DEFAULTS: &[(&str, &str)] = &[
    ("core.v1.AzureDiskVolumeSource", "readOnly"),
    ("core.v1.ConfigMapEnvSource", "name"),
    ("core.v1.ConfigMapKeySelector", "name"),
    ("core.v1.ConfigMapProjection", "name"),
    ("core.v1.ConfigMapVolumeSource", "name"),
    ("core.v1.FileKeySelector", "optional"),
    ("core.v1.GRPCAction", "service"),
    ("core.v1.LocalObjectReference", "name"),
    ("core.v1.SecretEnvSource", "name"),
    ("core.v1.SecretKeySelector", "name"),
    ("core.v1.SecretProjection", "name"),
    ("autoscaling.v1.ScaleSpec", "replicas"),
];

/// The default that OpenAPI gives, as the Go types imply it: `{}` for structs, the zero value for scalars that are never left out.
fn default_of(owner: &Type, field: &Field) -> Option<Value> {
    if let Ok(default) = serde_json::from_str(field.default) {
        return Some(default);
    }
    let declared = ZERO_DEFAULTS.contains(&(owner.name, field.name));
    if (field.pointer && !declared) || field.container != Container::Single {
        return None;
    }
    match field.item {
        Item::Type(id) => (schema().get(id).shape == Shape::Object).then(|| json!({})),
        _ if field.omit_empty && !declared => None,
        Item::String => Some("".into()),
        Item::Bool => Some(false.into()),
        Item::Int32 | Item::Int64 => Some(0.into()),
        _ => None,
    }
}

fn field_schema(owner: &Type, field: &Field) -> Value {
    let mut value = match (field.container, field.item) {
        (Container::Single, Item::Type(id)) => json!({"allOf": [reference(id)]}),
        (Container::Single, _) => item_schema(field),
        (Container::List, _) => json!({"type": "array", "items": item_schema(field)}),
        (Container::Map, _) => json!({"type": "object", "additionalProperties": item_schema(field)}),
    };
    if let Some(default) = default_of(owner, field) {
        value["default"] = default;
    }
    match (owner.name, field.name) {
        // Enums of a list's items, which the reference data does not have.
        ("core.v1.PersistentVolumeClaimSpec", "accessModes") => {
            value["items"]["enum"] = json!(["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"]);
        }
        ("core.v1.ServiceSpec", "ipFamilies") => value["items"]["enum"] = json!(["", "IPv4", "IPv6"]),
        _ if !field.enum_values.is_empty() => value["enum"] = field.enum_values.split(',').collect(),
        _ => {}
    }
    if let Some(key) = field.merge_key {
        value["x-kubernetes-patch-merge-key"] = key.into();
    }
    let strategies = [(field.patch_merge, "merge"), (field.patch_retain_keys, "retainKeys")];
    let strategy: Vec<&str> = strategies.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
    if !strategy.is_empty() {
        value["x-kubernetes-patch-strategy"] = strategy.join(",").into();
    }
    if let Some(list_type) = field.list_type {
        let name = match list_type {
            ListType::Atomic => "atomic",
            ListType::Set => "set",
            ListType::Map => "map",
        };
        value["x-kubernetes-list-type"] = name.into();
    }
    if !field.list_keys.is_empty() {
        value["x-kubernetes-list-map-keys"] = field.list_keys.split(',').collect();
    }
    if field.map_atomic {
        value["x-kubernetes-map-type"] = "atomic".into();
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_whole() {
        assert!(documents().len() >= 9);
        for (path, document) in documents() {
            let value: Value = serde_json::from_str(&document.json).expect("JSON");
            let schemas = value["components"]["schemas"].as_object().expect("schemas");
            // Every reference leads somewhere.
            for reference in document.json.split("#/components/schemas/").skip(1) {
                let name = reference.split('"').next().unwrap_or("");
                assert!(schemas.contains_key(name), "{path}: {name}");
            }
        }
    }

    #[test]
    fn kubectl_finds_what_it_looks_for() {
        let document: Value = serde_json::from_str(&v3_document("apis/apps/v1").expect("served").json).expect("JSON");
        let item = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"];
        let patch = &item["patch"];
        assert_eq!(patch["x-kubernetes-group-version-kind"], json!({"group": "apps", "version": "v1", "kind": "Deployment"}));
        assert!(patch["parameters"].as_array().expect("a list").iter().any(|parameter| parameter["name"] == "fieldValidation"));
        let container = &document["components"]["schemas"]["io.k8s.api.core.v1.Container"]["properties"];
        assert_eq!(
            container["ports"],
            json!({"type": "array", "items": {"$ref": "#/components/schemas/io.k8s.api.core.v1.ContainerPort"},
                "x-kubernetes-list-map-keys": ["containerPort", "protocol"], "x-kubernetes-list-type": "map",
                "x-kubernetes-patch-merge-key": "containerPort", "x-kubernetes-patch-strategy": "merge"})
        );
    }
}
