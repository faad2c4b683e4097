//! Strategic merge patch: a merge patch that merges lists by the merge keys of the schema.
//!
//! Directives: `$patch` (replace, delete, merge), `$retainKeys`, `$setElementOrder/FIELD`, `$deleteFromPrimitiveList/FIELD`.
//! Source: k8s.io/apimachinery v0.37 `pkg/util/strategicpatch/patch.go` (server's side: parallel lists are merged, unmatched nulls dropped).

use serde_json::{Map, Value};

use super::Error;
use crate::schema::{Container, Field, Item, Schema, TypeId, schema};

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const ORDER_PREFIX: &str = "$setElementOrder/";
const DELETE_PREFIX: &str = "$deleteFromPrimitiveList/";

/// Applies `patch` to `target`, an object of type `id`. On an error the target is left half patched: work on a copy.
pub fn apply(id: TypeId, target: &mut Value, patch: Value) -> Result<(), Error> {
    let Value::Object(patch) = patch else {
        return Err(Error::Malformed("json: cannot unmarshal array into Go value of type map[string]interface {}".to_owned()));
    };
    let original = match target.take() {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    *target = Value::Object(Merge { schema: schema() }.map(Lookup::Type(id), original, patch)?);
    Ok(())
}

/// Where the merge is: in a type with known fields, in a map of such types, or below what has no fields.
#[derive(Clone, Copy)]
enum Lookup {
    Type(TypeId),
    MapOf(Option<TypeId>),
    Free,
}

/// What the schema says of a list or map.
#[derive(Clone, Copy)]
struct Meta {
    inner: Lookup,
    merge: bool,
    replace: bool,
    merge_key: Option<&'static str>,
}

struct Merge {
    schema: &'static Schema,
}

fn malformed(text: &str) -> Error {
    Error::Malformed(text.to_owned())
}

fn bad_order() -> Error {
    malformed("invalid patch format of setElementOrder list")
}

fn no_merge_key(map: &Value, key: &str) -> Error {
    Error::Internal(format!("map: {map} does not contain declared merge key: {key}"))
}

fn kind_name(value: &Value) -> &'static str {
    match value {
        Value::Object(_) => "map",
        Value::Array(_) => "slice",
        Value::String(_) => "string",
        Value::Number(_) => "float64",
        Value::Bool(_) => "bool",
        Value::Null => "null",
    }
}

fn list(value: Value) -> Result<Vec<Value>, Error> {
    match value {
        Value::Array(items) => Ok(items),
        other => Err(Error::Internal(format!("expected a slice, but received a {}", kind_name(&other)))),
    }
}

impl Merge {
    fn meta(&self, lookup: Lookup, key: &str) -> Result<Meta, Error> {
        let free = |inner| Meta { inner, merge: false, replace: false, merge_key: None };
        let id = match lookup {
            Lookup::Type(id) => id,
            Lookup::MapOf(Some(id)) => return Ok(free(Lookup::Type(id))),
            Lookup::MapOf(None) | Lookup::Free => return Ok(free(Lookup::Free)),
        };
        let found = self.schema.get(id);
        let Some(field) = found.field(key) else {
            if found.fields.is_empty() {
                return Ok(free(Lookup::Free));
            }
            let name = found.name.rsplit('.').next().unwrap_or("");
            return Err(Error::Internal(format!("unable to find api field in struct {name} for the json field \"{key}\"")));
        };
        Ok(Meta { inner: inner(field), merge: field.patch_merge, replace: false, merge_key: field.merge_key })
    }

    fn map(&self, lookup: Lookup, mut original: Map<String, Value>, mut patch: Map<String, Value>) -> Result<Map<String, Value>, Error> {
        if let Some(directive) = patch.remove(PATCH) {
            return match directive.as_str() {
                Some("replace") => Ok(patch),
                Some("delete") => Ok(Map::new()),
                Some("merge") => self.map(lookup, original, patch),
                _ => Err(Error::Internal(format!("unknown patch type: {directive} in map: {}", Value::Object(patch)))),
            };
        }
        retain_keys(&mut original, &mut patch)?;
        self.ordered_lists(lookup, &mut original, &mut patch)?;
        for (key, value) in patch {
            let deletes = key.strip_prefix(DELETE_PREFIX).map(str::to_owned);
            let is_delete_list = deletes.is_some();
            let key = deletes.unwrap_or(key);
            if value.is_null() {
                original.remove(&key);
                continue;
            }
            match original.remove(&key) {
                None if is_delete_list => {}
                None => insert_new(&mut original, key, value),
                Some(before) if kind_name(&before) != kind_name(&value) => {
                    if is_delete_list {
                        original.insert(key, before);
                    } else {
                        insert_new(&mut original, key, value);
                    }
                }
                Some(before) => {
                    let merged = self.values(lookup, &key, before, value, is_delete_list)?;
                    original.insert(key, merged);
                }
            }
        }
        Ok(original)
    }

    /// Merges two values of one JSON type.
    fn values(&self, lookup: Lookup, key: &str, before: Value, value: Value, is_delete_list: bool) -> Result<Value, Error> {
        match (before, value) {
            (Value::Object(before), Value::Object(value)) => {
                let meta = self.meta(lookup, key)?;
                if meta.replace {
                    return Ok(Value::Object(value));
                }
                self.map(meta.inner, before, value).map(Value::Object)
            }
            (Value::Array(before), Value::Array(value)) => {
                let meta = self.meta(lookup, key)?;
                if meta.merge || is_delete_list { self.lists(meta, before, value, is_delete_list) } else { Ok(Value::Array(value)) }
            }
            (_, value) => Ok(value),
        }
    }

    /// Handles `$setElementOrder/FIELD` of a patch, with the field it orders.
    fn ordered_lists(&self, lookup: Lookup, original: &mut Map<String, Value>, patch: &mut Map<String, Value>) -> Result<(), Error> {
        let keys: Vec<String> = patch.keys().filter(|key| key.starts_with(ORDER_PREFIX)).cloned().collect();
        for order_key in keys {
            let order = list(patch.remove(&order_key).unwrap_or_default())?;
            let key = order_key.strip_prefix(ORDER_PREFIX).unwrap_or_default().to_owned();
            let before = original.remove(&key).map(list).transpose()?;
            let change = patch.remove(&key).map(list).transpose()?;
            let meta = self.meta(lookup, &key)?;
            if let Some(change) = &change {
                check_order(change, &order, meta.merge_key)?;
            }
            let before_list = before.clone().unwrap_or_default();
            let merged = match (before, change) {
                (None, None) => continue,
                (Some(before), None) => before,
                (None, Some(change)) => {
                    let mut value = Value::Array(change);
                    remove_directives(&mut value);
                    list(value)?
                }
                (Some(before), Some(change)) if meta.merge => list(self.lists(meta, before, change, false)?)?,
                (Some(_), Some(change)) => change,
            };
            let (in_order, server_only) = partition(merged, &order, meta.merge_key)?;
            original.insert(key, Value::Array(in_sequence(in_order, server_only, &order, &before_list, meta.merge_key)));
        }
        Ok(())
    }

    fn lists(&self, meta: Meta, original: Vec<Value>, patch: Vec<Value>, is_delete_list: bool) -> Result<Value, Error> {
        if original.is_empty() && patch.is_empty() {
            return Ok(Value::Array(original));
        }
        let mut kinds = original.iter().chain(&patch).map(kind_name);
        let first = kinds.next().unwrap_or("null");
        if first == "slice" {
            return Err(Error::Unprocessable("lists of lists are not supported".to_owned()));
        }
        if kinds.any(|kind| kind != first) {
            return Err(Error::Internal(format!("list element types are not identical: {}", Value::Array(patch))));
        }
        if first != "map" {
            return Ok(Value::Array(scalars(original, patch, is_delete_list)));
        }
        let Some(merge_key) = meta.merge_key else {
            return Err(Error::Internal("cannot merge lists without merge key".to_owned()));
        };
        let (original, patch) = special_elements(original, patch, merge_key)?;
        let before = original.clone();
        let merged = self.items(meta, original, &patch, merge_key)?;
        let (in_order, server_only) = partition(merged, &patch, Some(merge_key))?;
        Ok(Value::Array(in_sequence(in_order, server_only, &patch, &before, Some(merge_key))))
    }

    /// Merges a patch's items into those with the same key, and appends the others.
    fn items(&self, meta: Meta, mut original: Vec<Value>, patch: &[Value], merge_key: &str) -> Result<Vec<Value>, Error> {
        for item in patch {
            let Some(key) = item.get(merge_key) else { return Err(no_merge_key(item, merge_key)) };
            match original.iter().position(|known| known.get(merge_key) == Some(key)) {
                Some(index) => {
                    let (Value::Object(before), Value::Object(change)) = (original[index].take(), item.clone()) else {
                        return Err(Error::Internal(format!("value for key {merge_key} is not a map")));
                    };
                    original[index] = Value::Object(self.map(meta.inner, before, change)?);
                }
                None => original.push(item.clone()),
            }
        }
        Ok(original)
    }
}

fn inner(field: &Field) -> Lookup {
    let item = match field.item {
        Item::Type(id) => Some(id),
        _ => None,
    };
    match field.container {
        Container::Map => Lookup::MapOf(item),
        Container::Single | Container::List => item.map_or(Lookup::Free, Lookup::Type),
    }
}

/// Puts a value that the original lacks, without nulls and directives.
fn insert_new(original: &mut Map<String, Value>, key: String, mut value: Value) {
    discard_nulls(&mut value);
    if remove_directives(&mut value) {
        original.insert(key, value);
    }
}

fn discard_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(discard_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(discard_nulls),
        _ => {}
    }
}

/// Removes maps with a `$patch` directive; false when the value itself is one.
fn remove_directives(value: &mut Value) -> bool {
    match value {
        Value::Object(map) => {
            if map.contains_key(PATCH) {
                return false;
            }
            map.retain(|_, value| remove_directives(value));
        }
        Value::Array(items) => items.retain_mut(remove_directives),
        _ => {}
    }
    true
}

fn retain_keys(original: &mut Map<String, Value>, patch: &mut Map<String, Value>) -> Result<(), Error> {
    let Some(keys) = patch.remove(RETAIN_KEYS) else { return Ok(()) };
    let bad = || malformed("invalid patch format of retainKeys");
    let Value::Array(keys) = keys else { return Err(bad()) };
    let keeps = |name: &str| keys.iter().any(|key| key == name);
    let plain = |(key, value): &(&String, &Value)| !value.is_null() && !key.starts_with(DELETE_PREFIX) && !key.starts_with(ORDER_PREFIX);
    if patch.iter().filter(plain).any(|(key, _)| !keeps(key)) {
        return Err(bad());
    }
    original.retain(|key, _| keeps(key));
    Ok(())
}

fn same_key(left: &Value, right: &Value, merge_key: Option<&str>) -> bool {
    match merge_key {
        Some(key) => left.get(key).is_some() && left.get(key) == right.get(key),
        None => left == right,
    }
}

/// The patch's items (but those to delete) must stand in the order that `$setElementOrder` gives.
fn check_order(patch: &[Value], order: &[Value], merge_key: Option<&str>) -> Result<(), Error> {
    if order.is_empty() || patch.is_empty() {
        return Ok(());
    }
    let mut order_items = order.iter();
    for item in patch.iter().filter(|item| item.get(PATCH).is_none()) {
        if let Some(key) = merge_key
            && item.get(key).is_none()
        {
            return Err(no_merge_key(item, key));
        }
        if !order_items.any(|wanted| same_key(item, wanted, merge_key)) {
            let (patch, order) = (Value::Array(patch.to_vec()), Value::Array(order.to_vec()));
            let text = format!("The order in patch list:\n{patch}\n doesn't match $setElementOrder list:\n{order}\n");
            return Err(if merge_key.is_none() && !patch.is_array() { bad_order() } else { Error::Internal(text) });
        }
    }
    Ok(())
}

/// Takes the `$patch` items out of a patch's list and carries them out.
fn special_elements(mut original: Vec<Value>, patch: Vec<Value>, merge_key: &str) -> Result<(Vec<Value>, Vec<Value>), Error> {
    let mut plain = Vec::new();
    let mut replace = false;
    for item in patch {
        match item.get(PATCH).map(|directive| directive.as_str().unwrap_or("")) {
            None => plain.push(item),
            Some("delete") => {
                let key = item.get(merge_key).ok_or_else(|| no_merge_key(&item, merge_key))?;
                original.retain(|known| known.get(merge_key) != Some(key));
            }
            Some("replace") => replace = true,
            Some("merge") => return Err(Error::Internal("merging lists cannot yet be specified in the patch".to_owned())),
            Some(other) => return Err(Error::Internal(format!("unknown patch type: {other} in map: {item}"))),
        }
    }
    Ok(if replace { (plain, Vec::new()) } else { (original, plain) })
}

fn scalars(original: Vec<Value>, patch: Vec<Value>, is_delete_list: bool) -> Vec<Value> {
    if is_delete_list {
        return original.into_iter().filter(|item| !patch.contains(item)).collect();
    }
    let mut merged: Vec<Value> = Vec::new();
    for item in original.iter().chain(&patch) {
        if !merged.contains(item) {
            merged.push(item.clone());
        }
    }
    let (in_order, server_only): (Vec<Value>, Vec<Value>) = merged.into_iter().partition(|item| patch.contains(item));
    in_sequence(in_order, server_only, &patch, &original, None)
}

/// Splits into items that `by` has and items that it has not.
fn partition(merged: Vec<Value>, by: &[Value], merge_key: Option<&str>) -> Result<(Vec<Value>, Vec<Value>), Error> {
    if let Some(key) = merge_key
        && let Some(item) = merged.iter().find(|item| item.get(key).is_none())
    {
        return Err(no_merge_key(item, key));
    }
    Ok(merged.into_iter().partition(|item| by.iter().any(|wanted| same_key(item, wanted, merge_key))))
}

/// Interleaves ordered items and items that only the server has: the latter keep their place before what they stood before.
fn in_sequence(
    mut in_order: Vec<Value>,
    mut server_only: Vec<Value>,
    order: &[Value],
    server_order: &[Value],
    merge_key: Option<&str>,
) -> Vec<Value> {
    let position = |list: &[Value], item: &Value| list.iter().position(|known| same_key(known, item, merge_key));
    in_order.sort_by_key(|item| position(order, item).unwrap_or(usize::MAX));
    server_only.sort_by_key(|item| position(server_order, item).unwrap_or(usize::MAX));
    let mut out = Vec::with_capacity(in_order.len() + server_only.len());
    let (mut left, mut right) = (server_only.into_iter().peekable(), in_order.into_iter().peekable());
    loop {
        let take_left = match (left.peek(), right.peek()) {
            (None, None) => return out,
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (Some(left), Some(right)) => match (position(server_order, left), position(server_order, right)) {
                (Some(left), Some(right)) => left < right,
                _ => false,
            },
        };
        out.extend(if take_left { left.next() } else { right.next() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn patched(kind: (&str, &str), mut target: Value, patch: Value) -> Result<Value, Error> {
        let id = schema().by_kind(kind.0, "v1", kind.1).expect("a kind");
        apply(id, &mut target, patch).map(|()| target)
    }

    fn pod(containers: Value) -> Value {
        json!({"spec": {"containers": containers}})
    }

    #[test]
    fn lists_merge_by_key() {
        let got = patched(
            ("", "Pod"),
            pod(json!([{"name": "a", "image": "1"}, {"name": "b", "image": "1"}])),
            pod(json!([{"name": "b", "image": "2"}, {"name": "c", "image": "3"}])),
        );
        assert_eq!(
            got.expect("applies"),
            pod(json!([{"name": "a", "image": "1"}, {"name": "b", "image": "2"}, {"name": "c", "image": "3"}]))
        );
    }

    #[test]
    fn directives() {
        let two = || pod(json!([{"name": "a", "image": "1"}, {"name": "b", "image": "1"}]));
        let got = patched(("", "Pod"), two(), pod(json!([{"name": "a", "$patch": "delete"}]))).expect("applies");
        assert_eq!(got, pod(json!([{"name": "b", "image": "1"}])));
        let got = patched(("", "Pod"), two(), pod(json!([{"$patch": "replace"}, {"name": "z"}]))).expect("applies");
        assert_eq!(got, pod(json!([{"name": "z"}])));
        let order =
            json!({"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}], "containers": [{"name": "a", "image": "9"}]}});
        let got = patched(("", "Pod"), two(), order).expect("applies");
        assert_eq!(got, pod(json!([{"name": "b", "image": "1"}, {"name": "a", "image": "9"}])));
        let got = patched(
            ("apps", "Deployment"),
            json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}),
            json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
        );
        assert_eq!(got.expect("applies"), json!({"spec": {"strategy": {"type": "Recreate"}}}));
        let got = patched(
            ("", "Pod"),
            json!({"metadata": {"finalizers": ["a", "b"]}}),
            json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"]}}),
        );
        assert_eq!(got.expect("applies"), json!({"metadata": {"finalizers": ["b"]}}));
    }

    #[test]
    fn atomic_lists_and_nulls() {
        let got = patched(
            ("", "Pod"),
            json!({"metadata": {"labels": {"a": "1", "b": "2"}}, "spec": {"tolerations": [{"key": "a"}]}}),
            json!({"metadata": {"labels": {"a": null, "c": "3"}, "annotations": {"x": null}}, "spec": {"tolerations": [{"key": "b"}]}}),
        );
        assert_eq!(
            got.expect("applies"),
            json!({"metadata": {"labels": {"b": "2", "c": "3"}, "annotations": {}}, "spec": {"tolerations": [{"key": "b"}]}})
        );
    }

    #[test]
    fn missing_merge_key() {
        let error = patched(("", "Pod"), pod(json!([{"name": "a"}])), pod(json!([{"image": "x"}]))).expect_err("no key");
        assert!(error.to_string().ends_with("does not contain declared merge key: name"), "{error}");
    }
}
