//! JSON patch (RFC 6902).

use serde::Deserialize;
use serde_json::Value;

use super::Error;

/// Most operations of one patch (k8s.io/apiserver v0.37, `endpoints/handlers/patch.go`).
pub const OPERATIONS_MAX: usize = 10_000;

/// Bytes of JSON that the copies of one patch may add together (`JSONPatchMaxCopyBytes` of k8s.io/apiserver v0.37): a document that
/// is copied into itself doubles with each operation.
pub const COPIED_BYTES_MAX: usize = 3 << 20;

/// One operation.
#[derive(Clone, Debug, Deserialize)]
struct Operation {
    #[serde(default)]
    op: String,
    #[serde(default)]
    path: Option<String>,
    #[serde(default)]
    from: Option<String>,
    // A null value and no value differ.
    #[serde(default, deserialize_with = "some")]
    value: Option<Value>,
}

fn some<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// Applies the patch document `patch` to `target`. On an error the target is left half patched: work on a copy.
pub fn apply(target: &mut Value, patch: Value) -> Result<(), Error> {
    if !patch.is_array() {
        let found = if patch.is_object() { "object" } else { "value" };
        let text = format!("error decoding patch: json: cannot unmarshal {found} into Go value of type []handlers.jsonPatchOp");
        return Err(Error::Malformed(text));
    }
    let operations: Vec<Operation> =
        serde_json::from_value(patch).map_err(|error| Error::Malformed(format!("error decoding patch: {error}")))?;
    if operations.len() > OPERATIONS_MAX {
        let count = operations.len();
        return Err(Error::TooLarge(format!("The allowed maximum operations in a JSON patch is {OPERATIONS_MAX}, got {count}")));
    }
    let mut copied = 0;
    operations.into_iter().try_for_each(|operation| step(target, operation, &mut copied))
}

/// Carries one operation out; `copied` counts the bytes that were copied so far.
fn step(target: &mut Value, operation: Operation, copied: &mut usize) -> Result<(), Error> {
    let path = operation.path.ok_or_else(|| unprocessable("missing path"))?;
    // Upstream's library takes an absent value for null.
    let value = operation.value.unwrap_or(Value::Null);
    let from = || operation.from.clone().ok_or_else(|| unprocessable("missing from"));
    match operation.op.as_str() {
        "add" => add(target, &path, value),
        "remove" => remove(target, &path).map(drop),
        "replace" => replace(target, &path, value),
        "move" => {
            let from = from()?;
            let value = remove(target, &from)?;
            add(target, &path, value)
        }
        "copy" => {
            let from = from()?;
            let value = find(target, &from).ok_or_else(|| missing("copy", &from))?;
            *copied += value.to_string().len();
            if *copied > COPIED_BYTES_MAX {
                let text = format!("the accumulated size increase of copy is {copied}, exceeding the limit {COPIED_BYTES_MAX}");
                return Err(unprocessable(&format!("Unable to complete the copy, {text}")));
            }
            let value = value.clone();
            add(target, &path, value)
        }
        "test" => {
            let found = find(target, &path).map_or(Value::Null, |found| found.clone());
            if found == value { Ok(()) } else { Err(unprocessable(&format!("testing value {path} failed: test failed"))) }
        }
        other => Err(unprocessable(&format!("Unexpected kind: {other}"))),
    }
}

fn unprocessable(text: &str) -> Error {
    Error::Unprocessable(text.to_owned())
}

fn missing(operation: &str, path: &str) -> Error {
    unprocessable(&format!("{operation} operation does not apply: doc is missing path: {path}: missing value"))
}

fn unescape(token: &str) -> String {
    token.replace("~1", "/").replace("~0", "~")
}

/// The place a pointer names.
fn find<'a>(target: &'a mut Value, path: &str) -> Option<&'a mut Value> {
    if path.is_empty() {
        return Some(target);
    }
    path.strip_prefix('/')?.split('/').try_fold(target, |value, token| match value {
        Value::Object(map) => map.get_mut(&unescape(token)),
        Value::Array(items) => index(token, items.len()).and_then(|index| items.get_mut(index)),
        _ => None,
    })
}

/// A list index: digits without leading zeros, or negative from the end as upstream's library takes it.
fn index(token: &str, length: usize) -> Option<usize> {
    if let Some(back) = token.strip_prefix('-') {
        return back.parse::<usize>().ok().and_then(|back| length.checked_sub(back));
    }
    if token.len() > 1 && token.starts_with('0') {
        return None;
    }
    token.parse().ok()
}

fn split(path: &str) -> Result<(&str, String), Error> {
    path.rsplit_once('/').map(|(parent, last)| (parent, unescape(last))).ok_or_else(|| missing("add", path))
}

fn add(target: &mut Value, path: &str, value: Value) -> Result<(), Error> {
    if path.is_empty() {
        *target = value;
        return Ok(());
    }
    let (parent, last) = split(path)?;
    match find(target, parent) {
        Some(Value::Object(map)) => {
            map.insert(last, value);
        }
        Some(Value::Array(items)) => {
            let at = if last == "-" { Some(items.len()) } else { index(&last, items.len() + 1) };
            match at.filter(|at| *at <= items.len()) {
                Some(at) => items.insert(at, value),
                None => return Err(unprocessable(&format!("Unable to access invalid index: {last}: invalid index referenced"))),
            }
        }
        _ => return Err(missing("add", path)),
    }
    Ok(())
}

/// Replaces a value. A key that a map lacks is added: upstream's library (evanphx/json-patch v4) does so.
fn replace(target: &mut Value, path: &str, value: Value) -> Result<(), Error> {
    if let Some(place) = find(target, path) {
        *place = value;
        return Ok(());
    }
    let (parent, _) = split(path)?;
    match find(target, parent) {
        Some(Value::Object(_)) => add(target, path, value),
        _ => Err(missing("replace", path)),
    }
}

fn remove(target: &mut Value, path: &str) -> Result<Value, Error> {
    let (parent, last) = split(path).map_err(|_| missing("remove", path))?;
    let removed = match find(target, parent) {
        Some(Value::Object(map)) => map.remove(&last),
        Some(Value::Array(items)) => index(&last, items.len()).filter(|index| *index < items.len()).map(|index| items.remove(index)),
        _ => None,
    };
    removed.ok_or_else(|| missing("remove", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn patched(mut target: Value, patch: Value) -> Result<Value, Error> {
        apply(&mut target, patch).map(|()| target)
    }

    #[test]
    fn copies_cannot_double_a_document_for_ever() {
        let target = json!({"a": "x".repeat(1000)});
        let patch: Vec<Value> = (0..40).map(|number| json!({"op": "copy", "from": "", "path": format!("/b{number}")})).collect();
        let refused = patched(target.clone(), Value::Array(patch)).expect_err("too much");
        assert!(refused.to_string().contains("exceeding the limit 3145728"), "{refused}");
        assert!(patched(target, json!([{"op": "copy", "from": "", "path": "/b"}])).is_ok());
    }

    #[test]
    fn operations() {
        for (target, patch, want) in [
            (json!({"a":1}), json!([{"op":"add","path":"/b","value":null}]), json!({"a":1,"b":null})),
            (json!({"a":[1,2]}), json!([{"op":"add","path":"/a/1","value":9}]), json!({"a":[1,9,2]})),
            (json!({"a":[1,2]}), json!([{"op":"add","path":"/a/-","value":9}]), json!({"a":[1,2,9]})),
            (json!({"a":{"x/y":1}}), json!([{"op":"remove","path":"/a/x~1y"}]), json!({"a":{}})),
            (json!({"a":[1,2]}), json!([{"op":"remove","path":"/a/-1"}]), json!({"a":[1]})),
            (json!({"a":1}), json!([{"op":"move","from":"/a","path":"/b"}]), json!({"b":1})),
            (json!({"a":1}), json!([{"op":"copy","from":"/a","path":"/b"}]), json!({"a":1,"b":1})),
            (json!({"a":1}), json!([{"op":"test","path":"/a","value":1},{"op":"replace","path":"/a","value":2}]), json!({"a":2})),
        ] {
            assert_eq!(patched(target, patch).expect("applies"), want);
        }
    }

    #[test]
    fn failures() {
        for patch in [
            json!([{"op":"add","path":"/x/y","value":1}]),
            json!([{"op":"remove","path":"/x"}]),
            json!([{"op":"replace","path":"/x/y","value":1}]),
            json!([{"op":"replace","path":"/l/0","value":1}]),
            json!([{"path":"/a"}]),
            json!([{"op":"test","path":"/a","value":2}]),
            json!([{"op":"add","path":"/l/5","value":2}]),
            json!([{"op":"jump","path":"/a"}]),
        ] {
            assert!(matches!(patched(json!({"a":1,"l":[]}), patch), Err(Error::Unprocessable(_))));
        }
        assert!(matches!(patched(json!({}), json!({"a": 1})), Err(Error::Malformed(_))));
    }
}
