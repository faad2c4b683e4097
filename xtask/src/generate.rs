//! `cargo xtask generate apimachinery`: turns the reference facts of the Kubernetes API into the compact tables that `apimachinery` includes.
//!
//! Inputs: `schema.json` and `kinds.json` of the reference folder, and the Go struct declarations of `k8s.io/api` and
//! `k8s.io/apimachinery` (only field names, tags and whether a field is a pointer are read; no text of theirs is kept).
//! Outputs: `schema.tsv` and `kinds.json` in `crates/apimachinery/data`. Only what is reachable from [`ROOTS`] is kept.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Kinds whose types (and lists) are kept, as short names (see [`short`]).
const ROOTS: &[&str] = &[
    "core.v1.Namespace",
    "core.v1.Node",
    "core.v1.Pod",
    "core.v1.Binding",
    "core.v1.Service",
    "core.v1.ConfigMap",
    "core.v1.Secret",
    "core.v1.ServiceAccount",
    "core.v1.Event",
    "apps.v1.Deployment",
    "apps.v1.ReplicaSet",
    "discovery.v1.EndpointSlice",
    "coordination.v1.Lease",
    "events.v1.Event",
    "scheduling.v1.PriorityClass",
    "rbac.v1.Role",
    "rbac.v1.ClusterRole",
    "rbac.v1.RoleBinding",
    "rbac.v1.ClusterRoleBinding",
    "authentication.v1.TokenReview",
    "authentication.v1.TokenRequest",
    "authentication.v1.SelfSubjectReview",
    "authorization.v1.SubjectAccessReview",
    "authorization.v1.SelfSubjectAccessReview",
    "authorization.v1.LocalSubjectAccessReview",
    "authorization.v1.SelfSubjectRulesReview",
    "autoscaling.v1.Scale",
    "policy.v1.Eviction",
    "meta.v1.Status",
    "meta.v1.DeleteOptions",
    "meta.v1.WatchEvent",
    "meta.v1.Patch",
    "meta.v1.APIGroup",
    "meta.v1.APIGroupList",
    "meta.v1.APIResourceList",
    "meta.v1.APIVersions",
    "version.Info",
];

/// Resources served, as `group/plural`.
const RESOURCES: &[&str] = &[
    "/namespaces",
    "/nodes",
    "/pods",
    "/bindings",
    "/services",
    "/configmaps",
    "/secrets",
    "/serviceaccounts",
    "/events",
    "apps/deployments",
    "apps/replicasets",
    "discovery.k8s.io/endpointslices",
    "coordination.k8s.io/leases",
    "events.k8s.io/events",
    "scheduling.k8s.io/priorityclasses",
    "rbac.authorization.k8s.io/roles",
    "rbac.authorization.k8s.io/clusterroles",
    "rbac.authorization.k8s.io/rolebindings",
    "rbac.authorization.k8s.io/clusterrolebindings",
    "authentication.k8s.io/tokenreviews",
    "authentication.k8s.io/selfsubjectreviews",
    "authorization.k8s.io/subjectaccessreviews",
    "authorization.k8s.io/selfsubjectaccessreviews",
    "authorization.k8s.io/localsubjectaccessreviews",
    "authorization.k8s.io/selfsubjectrulesreviews",
];

/// How a Go struct field writes its zero value.
#[derive(Clone, Default)]
struct GoField {
    pointer: bool,
    omit_empty: bool,
    omit_zero: bool,
}

/// Go facts: package path (short, `core.v1`) and struct name to its JSON fields; embedded structs under `embeds`.
#[derive(Default)]
struct GoTypes {
    fields: HashMap<String, BTreeMap<String, GoField>>,
    embeds: HashMap<String, Vec<String>>,
}

/// Writes `schema.tsv` and `kinds.json` into `out`.
///
/// `reference` is the folder of the Kubernetes reference facts, `modules` the folder that holds `api@VERSION` and
/// `apimachinery@VERSION` (a Go module cache's `k8s.io`).
pub fn apimachinery(reference: &Path, modules: &Path, version: &str, out: &Path) -> Result<()> {
    let schema: BTreeMap<String, Value> = read_json(&reference.join("schema.json"))?;
    let kinds: Vec<Value> = read_json(&reference.join("kinds.json"))?;
    let go = go_types(modules, version)?;
    let types: BTreeMap<String, Value> = schema.into_iter().map(|(name, value)| (short(&name), value)).collect();
    let mut text = String::new();
    for name in reachable(&types) {
        write_type(&mut text, &types, &go, &name).with_context(|| format!("type {name}"))?;
    }
    fs::create_dir_all(out)?;
    fs::write(out.join("schema.tsv"), text)?;
    let kept: Vec<String> = kinds.iter().filter(|kind| served(kind)).map(Value::to_string).collect();
    fs::write(out.join("kinds.json"), format!("[\n{}\n]\n", kept.join(",\n")))?;
    Ok(())
}

fn read_json<T: serde::de::DeserializeOwned>(path: &PathBuf) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("failed to parse {}", path.display()))
}

fn served(kind: &Value) -> bool {
    let id = format!("{}/{}", kind["group"].as_str().unwrap_or(""), kind["plural"].as_str().unwrap_or(""));
    RESOURCES.contains(&id.as_str())
}

/// The short form of an OpenAPI type name: `core.v1.Pod`, `meta.v1.Time`, `resource.Quantity`.
fn short(name: &str) -> String {
    let name = name.trim_start_matches('.');
    let name = name.strip_prefix("k8s.io.").or_else(|| name.strip_prefix("io.k8s.")).unwrap_or(name);
    for (prefix, to) in [
        ("api.", ""),
        ("apimachinery.pkg.apis.", ""),
        ("apimachinery.pkg.api.", ""),
        ("apimachinery.pkg.util.", ""),
        ("apimachinery.pkg.", ""),
    ] {
        if let Some(rest) = name.strip_prefix(prefix) {
            return format!("{to}{rest}");
        }
    }
    name.to_owned()
}

/// The type a field's `t` names, without its container, if it is no basic type.
fn referenced(field_type: &str) -> Option<String> {
    let mut item = field_type;
    while let Some(rest) = item.strip_prefix("[]").or_else(|| item.strip_prefix("map:")) {
        item = rest;
    }
    item.starts_with("io.k8s.").then(|| short(item))
}

fn reachable(types: &BTreeMap<String, Value>) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut queue: Vec<String> = Vec::new();
    for root in ROOTS {
        queue.push((*root).to_owned());
        queue.push(format!("{root}List"));
    }
    while let Some(name) = queue.pop() {
        let Some(found) = types.get(&name) else { continue };
        if !seen.insert(name) {
            continue;
        }
        for field in found["f"].as_object().into_iter().flat_map(|fields| fields.values()) {
            queue.extend(field["t"].as_str().and_then(referenced));
        }
    }
    seen
}

/// The protobuf number of field `json`, with the number of the inline message that holds it (0: none).
fn number(types: &BTreeMap<String, Value>, package: &str, found: &Value, json: &str, field: &Value) -> (u64, u64) {
    if let Some(number) = field["n"].as_u64() {
        return (number, 0);
    }
    for inline in found["inline"].as_object().into_iter().flat_map(|inline| inline.values()) {
        let Some(message) = types.get(&format!("{package}.{}", inline[1].as_str().unwrap_or(""))) else { continue };
        let outer = inline[0].as_u64().unwrap_or(0);
        if let Some(number) = message["pbonly"][json][0].as_u64().or_else(|| message["f"][json]["n"].as_u64()) {
            return (number, outer);
        }
    }
    (0, 0)
}

fn write_type(text: &mut String, types: &BTreeMap<String, Value>, go: &GoTypes, name: &str) -> Result<()> {
    let found = &types[name];
    let package = name.rsplit_once('.').map_or("", |(package, _)| package);
    let gvk = match &found["gvk"] {
        Value::String(all) => all.clone(),
        Value::Array(list) => {
            let joined = |gvk: &Value| gvk.as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("/");
            list.iter().map(joined).collect::<Vec<_>>().join(",")
        }
        _ => String::new(),
    };
    let unions = if found["unions"].is_null() { String::new() } else { found["unions"].to_string() };
    let text_of = |value: &Value| value.as_str().unwrap_or("").to_owned();
    writeln!(text, "t\t{name}\t{}\t{}\t{gvk}\t{unions}", text_of(&found["type"]), text_of(&found["map"]))?;
    for (json, field) in found["f"].as_object().into_iter().flatten() {
        write_field(text, types, go, name, package, json, field)?;
    }
    Ok(())
}

fn write_field(
    text: &mut String,
    types: &BTreeMap<String, Value>,
    go: &GoTypes,
    name: &str,
    package: &str,
    json: &str,
    field: &Value,
) -> Result<()> {
    let (number, inline) = number(types, package, &types[name], json, field);
    let mut flags = String::new();
    if !matches!(json, "apiVersion" | "kind") || number != 0 {
        let known = go.find(name, json).with_context(|| format!("no Go field for {name}.{json}"))?;
        for (flag, set) in [('P', known.pointer), ('E', known.omit_empty), ('Z', known.omit_zero)] {
            if set {
                flags.push(flag);
            }
        }
    } else {
        flags.push('E');
    }
    if field["req"] == 1 {
        flags.push('R');
    }
    let kind = field["t"].as_str().context("field without type")?;
    let item = referenced(kind).map_or_else(
        || kind.to_owned(),
        |to| {
            let prefix = kind.find("io.k8s.").unwrap_or(0);
            format!("{}{to}", &kind[..prefix])
        },
    );
    let list = |value: &Value| value.as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join(",");
    let plain = |value: &Value| value.as_str().unwrap_or("").to_owned();
    let default = if field["def"].is_null() { String::new() } else { field["def"].to_string() };
    let row = [
        "f".to_owned(),
        json.to_owned(),
        item,
        number.to_string(),
        inline.to_string(),
        flags,
        plain(&field["mk"]),
        plain(&field["ms"]),
        plain(&field["lt"]),
        list(&field["lk"]),
        plain(&field["mt"]),
        list(&field["enum"]),
        default,
    ];
    writeln!(text, "{}", row.join("\t").trim_end())?;
    Ok(())
}

impl GoTypes {
    /// The Go field behind `json` of type `name`, looked for in embedded structs too.
    fn find(&self, name: &str, json: &str) -> Option<&GoField> {
        if let Some(field) = self.fields.get(name).and_then(|fields| fields.get(json)) {
            return Some(field);
        }
        self.embeds.get(name)?.iter().find_map(|embedded| self.find(embedded, json))
    }
}

fn go_types(modules: &Path, version: &str) -> Result<GoTypes> {
    let mut go = GoTypes::default();
    let api = modules.join(format!("api@{version}"));
    let machinery = modules.join(format!("apimachinery@{version}"));
    let packages = [
        ("core", "v1"),
        ("apps", "v1"),
        ("discovery", "v1"),
        ("coordination", "v1"),
        ("events", "v1"),
        ("scheduling", "v1"),
        ("rbac", "v1"),
        ("authentication", "v1"),
        ("authorization", "v1"),
        ("autoscaling", "v1"),
    ];
    for (group, version) in packages {
        read_package(&mut go, &api.join(group).join(version), &format!("{group}.{version}"))?;
    }
    read_package(&mut go, &machinery.join("pkg/apis/meta/v1"), "meta.v1")?;
    read_package(&mut go, &machinery.join("pkg/version"), "version")?;
    Ok(go)
}

fn read_package(go: &mut GoTypes, folder: &Path, package: &str) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("failed to read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let file = path.file_name().and_then(|name| name.to_str()).unwrap_or("").to_owned();
        if !file.ends_with(".go") || file.ends_with("_test.go") || file.starts_with("zz_") || file.contains("generated") {
            continue;
        }
        let mut current: Option<String> = None;
        for line in fs::read_to_string(&path)?.lines() {
            if let Some(rest) = line.strip_prefix("type ") {
                current = rest.strip_suffix(" struct {").map(|name| format!("{package}.{name}"));
            } else if line.starts_with('}') {
                current = None;
            } else if let Some(name) = &current {
                read_line(go, name, package, line)?;
            }
        }
    }
    Ok(())
}

/// Reads one line of a struct declaration: `Name Type ` and its tag, or `Embedded ` and its tag.
fn read_line(go: &mut GoTypes, name: &str, package: &str, line: &str) -> Result<()> {
    let line = line.trim();
    if line.starts_with("//") {
        return Ok(());
    }
    let Some((before, tag)) = line.split_once('`') else { return Ok(()) };
    let Some((_, json)) = tag.split_once("json:\"") else { return Ok(()) };
    let Some((json, _)) = json.split_once('"') else { bail!("unclosed tag in {name}: {line}") };
    let words: Vec<&str> = before.split_whitespace().collect();
    let (json_name, options) = json.split_once(',').unwrap_or((json, ""));
    if words.len() == 1 && json_name.is_empty() {
        go.embeds.entry(name.to_owned()).or_default().push(format!("{package}.{}", words[0].trim_start_matches('*')));
        return Ok(());
    }
    let has = |option: &str| options.split(',').any(|word| word == option);
    let field = GoField {
        pointer: words.last().is_some_and(|word| word.starts_with('*')),
        omit_empty: has("omitempty"),
        omit_zero: has("omitzero"),
    };
    go.fields.entry(name.to_owned()).or_default().insert(json_name.to_owned(), field);
    Ok(())
}
