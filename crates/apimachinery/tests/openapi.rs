//! Our OpenAPI documents against those of a real kube-apiserver v1.37.
//!
//! Set `CORACLE_OPENAPI_DUMP` to a folder with the answers to `GET /openapi/v3/PATH`, each in a file named PATH with `_` for `/` and `.json`.

use apimachinery::openapi;
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
fn schemas_are_upstreams() {
    let Some(folder) = std::env::var_os("CORACLE_OPENAPI_DUMP") else {
        eprintln!("SKIPPED: schemas_are_upstreams: CORACLE_OPENAPI_DUMP is not set");
        return;
    };
    let mut different = Vec::new();
    for (path, document) in openapi::documents() {
        let file = std::path::Path::new(&folder).join(format!("{}.json", path.replace('/', "_")));
        let mut theirs: Value = serde_json::from_slice(&std::fs::read(&file).expect("a dump of every document")).expect("JSON");
        let mut ours: Value = serde_json::from_str(&document.json).expect("JSON");
        for side in [&mut ours, &mut theirs] {
            strip(side);
            plain_items(side);
        }
        let their_schemas = &theirs["components"]["schemas"];
        for (name, schema) in ours["components"]["schemas"].as_object().expect("an object") {
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
        for (path, item) in ours["paths"].as_object().expect("an object") {
            for (method, operation) in item.as_object().expect("an object").iter().filter(|(method, _)| *method != "parameters") {
                let theirs = &theirs["paths"][path][method];
                for key in ["operationId", "x-kubernetes-action", "x-kubernetes-group-version-kind"] {
                    if operation[key] != theirs[key] {
                        different.push(format!("{path} {method} {key}: ours {} theirs {}", operation[key], theirs[key]));
                    }
                }
            }
        }
    }
    assert!(different.is_empty(), "{} differences:\n{}", different.len(), different.join("\n"));
}
