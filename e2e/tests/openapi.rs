//! Our OpenAPI documents against those of the real kube-apiserver 1.37.

use anyhow::{Context, Result};
use apimachinery::openapi;
use e2e::http::Request;
use e2e::servers::{make_keys, start_real};
use serde_json::Value;

/// Drops what our documents leave out, and sorts what has no order.
fn strip(value: &mut Value) {
    match value {
        Value::Object(map) => {
            // A field named description has a schema; a description is a text.
            if map.get("description").is_some_and(Value::is_string) {
                map.remove("description");
            }
            map.values_mut().for_each(strip);
            if let Some(Value::Array(required)) = map.get_mut("required") {
                required.sort_by_key(Value::to_string);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(strip),
        _ => {}
    }
}

/// Items of lists and maps, without defaults.
fn plain_items(value: &mut Value) {
    if let Value::Object(map) = value {
        for key in ["items", "additionalProperties"] {
            if let Some(Value::Object(item)) = map.get_mut(key) {
                item.remove("default");
                if item.len() == 1
                    && let Some(inner) = item.get("allOf").and_then(|all| all.get(0)).cloned()
                    && let Value::Object(inner) = inner
                {
                    *item = inner;
                }
            }
        }
        map.values_mut().for_each(plain_items);
    }
}

#[test]
fn schemas_are_upstreams() -> Result<()> {
    let folder = tempfile::tempdir()?;
    make_keys(folder.path())?;
    let Some(mut real) = start_real(folder.path())? else {
        e2e::skip("schemas_are_upstreams", "there is no kube-apiserver or etcd: they are built by Go");
        return Ok(());
    };
    let mut different = Vec::new();
    for (path, document) in openapi::documents() {
        let path_of_document = format!("/openapi/v3/{path}");
        let headers = vec!["Accept: application/json".to_owned()];
        let answer = real.ask(&Request { method: "GET", path: &path_of_document, headers, ..Request::default() })?;
        let mut theirs: Value = serde_json::from_slice(&answer.body).with_context(|| format!("{path_of_document} is no JSON"))?;
        let mut ours: Value = serde_json::from_str(&document.json)?;
        for side in [&mut ours, &mut theirs] {
            strip(side);
            plain_items(side);
        }
        compare_schemas(path, &ours, &theirs, &mut different);
        compare_operations(path, &ours, &theirs, &mut different);
    }
    anyhow::ensure!(different.is_empty(), "{} differences:\n{}", different.len(), different.join("\n"));
    Ok(())
}

fn compare_schemas(path: &str, ours: &Value, theirs: &Value, different: &mut Vec<String>) {
    let their_schemas = &theirs["components"]["schemas"];
    for (name, schema) in ours["components"]["schemas"].as_object().into_iter().flatten() {
        let mut theirs = their_schemas[name].clone();
        let mut schema = schema.clone();
        // DeleteOptions and WatchEvent are kinds of every group; we name the document's own.
        for side in [&mut schema, &mut theirs] {
            if let (Value::Object(map), true) = (side, name.ends_with("DeleteOptions") || name.ends_with("WatchEvent")) {
                map.remove("x-kubernetes-group-version-kind");
            }
        }
        // Upstream's documents of review-only groups lack the types of deletion and patches.
        if schema != theirs && !theirs.is_null() {
            different.push(format!("{path} {name}\n  ours:   {schema}\n  theirs: {theirs}"));
        }
    }
}

fn compare_operations(document: &str, ours: &Value, theirs: &Value, different: &mut Vec<String>) {
    for (path, item) in ours["paths"].as_object().into_iter().flatten() {
        for (method, operation) in item.as_object().into_iter().flatten().filter(|(method, _)| *method != "parameters") {
            let theirs = &theirs["paths"][path][method];
            for key in ["operationId", "x-kubernetes-action", "x-kubernetes-group-version-kind"] {
                if operation[key] != theirs[key] {
                    different.push(format!("{document} {path} {method} {key}: ours {} theirs {}", operation[key], theirs[key]));
                }
            }
        }
    }
}
