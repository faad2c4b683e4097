//! Objects as bytes: how they are stored, and how the resourceVersion is spliced in.
//!
//! What is stored is JSON in the order that upstream writes it (`kind`, `apiVersion`, `metadata`, the rest) and without
//! `metadata.resourceVersion`, so that GET, LIST and WATCH copy bytes and never parse.

use apimachinery::tree::Tree;
use serde_json::Value;

const METADATA: &[u8] = b"\"metadata\":{";

/// Encodes an object for the store. `metadata.resourceVersion` and `metadata.selfLink` are left out.
///
/// # Errors
/// Only those of serialization, which a [`Value`] does not have.
pub fn encode(object: &Value) -> Result<Vec<u8>, serde_json::Error> {
    let mut out = Vec::with_capacity(512);
    let empty = Value::String(String::new());
    out.extend_from_slice(b"{\"kind\":");
    serde_json::to_writer(&mut out, object.get("kind").unwrap_or(&empty))?;
    out.extend_from_slice(b",\"apiVersion\":");
    serde_json::to_writer(&mut out, object.get("apiVersion").unwrap_or(&empty))?;
    out.extend_from_slice(b",\"metadata\":{");
    let mut first = true;
    for (key, value) in object.get("metadata").and_then(Value::as_object).into_iter().flatten() {
        if key != "resourceVersion" && key != "selfLink" {
            field(&mut out, &mut first, key, value)?;
        }
    }
    out.push(b'}');
    let mut first = false;
    for (key, value) in object.as_object().into_iter().flatten() {
        if !matches!(key.as_str(), "kind" | "apiVersion" | "metadata") {
            field(&mut out, &mut first, key, value)?;
        }
    }
    out.push(b'}');
    Ok(out)
}

fn field(out: &mut Vec<u8>, first: &mut bool, key: &str, value: &Value) -> Result<(), serde_json::Error> {
    if !std::mem::take(first) {
        out.push(b',');
    }
    serde_json::to_writer(&mut *out, key)?;
    out.push(b':');
    serde_json::to_writer(out, value)
}

/// Appends stored bytes with the resourceVersion in them (0: what was never stored has none). `skip` leaves out so many bytes after the opening brace (the
/// `kind` and `apiVersion` of list items; see [`type_prefix`]).
pub fn splice(out: &mut Vec<u8>, stored: &[u8], revision: i64, skip: usize) {
    use std::io::Write as _;
    let Some(at) = stored.windows(METADATA.len()).position(|window| window == METADATA) else {
        out.extend_from_slice(stored);
        return;
    };
    let at = at + METADATA.len();
    out.push(b'{');
    out.extend_from_slice(&stored[1 + skip..at]);
    if revision == 0 {
        out.extend_from_slice(&stored[at..]);
        return;
    }
    // Writing into a Vec does not fail.
    let _ = write!(out, "\"resourceVersion\":\"{revision}\"");
    if stored.get(at) != Some(&b'}') {
        out.push(b',');
    }
    out.extend_from_slice(&stored[at..]);
}

/// Length of `"kind":"K","apiVersion":"V",` after the opening brace, if the object starts with it.
pub fn type_prefix(stored: &[u8], prefix: &str) -> usize {
    if stored.get(1..).is_some_and(|rest| rest.starts_with(prefix.as_bytes())) { prefix.len() } else { 0 }
}

/// Parses stored bytes, with the resourceVersion in them.
///
/// # Errors
/// When the stored bytes are no JSON: the store is damaged or was written by something else.
pub fn parse(stored: &[u8], revision: i64) -> Result<Value, serde_json::Error> {
    let mut value: Value = serde_json::from_slice(stored)?;
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut).filter(|_| revision > 0) {
        metadata.insert("resourceVersion".to_owned(), revision.to_string().into());
    }
    Ok(value)
}

/// The same without copying texts.
///
/// # Errors
/// As [`parse`].
pub fn tree(stored: &[u8], revision: i64) -> Result<Tree<'_>, serde_json::Error> {
    let mut tree = Tree::read(stored)?;
    if let Some(metadata) = tree.get_mut("metadata").and_then(Tree::as_object_mut).filter(|_| revision > 0) {
        metadata.set("resourceVersion".into(), Tree::String(revision.to_string().into()));
    }
    Ok(tree)
}

/// A string at a path of keys; empty when there is none.
pub fn text<'a>(object: &'a Value, path: &[&str]) -> &'a str {
    path.iter().try_fold(object, |value, key| value.get(key)).and_then(Value::as_str).unwrap_or("")
}

/// `metadata.name`.
pub fn name(object: &Value) -> &str {
    text(object, &["metadata", "name"])
}

/// The metadata map, made if it is missing.
pub fn metadata_mut(object: &mut Value) -> Option<&mut serde_json::Map<String, Value>> {
    let object = object.as_object_mut()?;
    let metadata = object.entry("metadata").or_insert_with(|| Value::Object(serde_json::Map::new()));
    if metadata.is_null() {
        *metadata = Value::Object(serde_json::Map::new());
    }
    metadata.as_object_mut()
}

/// Whether `metadata.deletionTimestamp` is set.
pub fn is_deleting(object: &Value) -> bool {
    object.pointer("/metadata/deletionTimestamp").is_some_and(|time| !time.is_null())
}

/// `metadata.finalizers`.
pub fn finalizers(object: &Value) -> Vec<&str> {
    object.pointer("/metadata/finalizers").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn resource_version_is_spliced_and_not_stored() {
        let object = json!({"apiVersion": "v1", "data": {"metadata": "x"}, "kind": "ConfigMap",
            "metadata": {"name": "a", "resourceVersion": "3"}});
        let stored = encode(&object).expect("serializable");
        assert!(stored.starts_with(b"{\"kind\":\"ConfigMap\",\"apiVersion\":\"v1\",\"metadata\":{"));
        let mut out = Vec::new();
        splice(&mut out, &stored, 17, 0);
        let back: Value = serde_json::from_slice(&out).expect("json");
        assert_eq!(back["metadata"], json!({"name": "a", "resourceVersion": "17"}));
        assert_eq!(back["data"], object["data"]);
        let skip = type_prefix(&stored, "\"kind\":\"ConfigMap\",\"apiVersion\":\"v1\",");
        let mut item = Vec::new();
        splice(&mut item, &stored, 17, skip);
        let item: Value = serde_json::from_slice(&item).expect("json");
        assert!(item.get("kind").is_none() && item["metadata"]["name"] == "a");
    }
}
