//! Defaults that the server fills in, on reads of what clients send.
//!
//! One walk over the object by its schema: each type has its rules in [`rules`], and the defaults that OpenAPI declares are filled in on the
//! way. Source: kubernetes v1.37 `pkg/apis/*/v1/defaults.go`. Defaults must be set on an object in canonical form ([`crate::normalize`]).

mod rules;

use serde_json::{Map, Value};

use crate::KindFacts;
use crate::schema::{Container, Field, Item, Schema, Shape, Type, TypeId, schema};

/// Fills in the defaults of an object, in place. Idempotent.
pub fn default(kind: &KindFacts, object: &mut Value) {
    walk(schema(), kind.type_id, object);
}

fn walk(schema: &'static Schema, id: TypeId, value: &mut Value) {
    let found = schema.get(id);
    let (Shape::Object, Value::Object(map)) = (found.shape, value) else { return };
    rules::apply(found, map);
    declared(found, map);
    for field in &found.fields {
        let Item::Type(inner) = field.item else { continue };
        let Some(value) = map.get_mut(field.name) else { continue };
        match (field.container, value) {
            (Container::Single, value) => walk(schema, inner, value),
            (Container::List, Value::Array(items)) => items.iter_mut().for_each(|item| walk(schema, inner, item)),
            (Container::Map, Value::Object(items)) => items.values_mut().for_each(|item| walk(schema, inner, item)),
            _ => {}
        }
    }
    rules::apply_after(found, map);
}

/// The defaults that OpenAPI declares.
fn declared(found: &Type, map: &mut Map<String, Value>) {
    let missing = |field: &&Field| !field.default.is_empty() && map.get(field.name).is_none_or(empty);
    let fields: Vec<&Field> = found.fields.iter().filter(missing).collect();
    for field in fields {
        if let Ok(default) = serde_json::from_str(field.default) {
            map.insert(field.name.to_owned(), default);
        }
    }
}

fn empty(value: &Value) -> bool {
    value.is_null() || value.as_str() == Some("")
}

/// A tag of an image reference as the image pull policy sees it: `latest` when there is neither tag nor digest, empty when there is only
/// a digest or the reference is malformed.
pub fn image_tag(image: &str) -> &str {
    let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let (path, tag) = match name[last..].rfind(':') {
        Some(colon) => (&name[..last + colon], &name[last + colon + 1..]),
        None => (name, ""),
    };
    let domain = path.split_once('/').filter(|(first, _)| first.contains(['.', ':']) || *first == "localhost");
    let remainder = domain.map_or(path, |(_, rest)| rest);
    let well_formed = !remainder.is_empty()
        && remainder.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-/".contains(&byte));
    match (well_formed, digest) {
        (false, _) => "",
        (true, None) if tag.is_empty() => "latest",
        (true, _) => tag,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags() {
        for (image, tag) in [
            ("nginx", "latest"),
            ("nginx:1", "1"),
            ("a.b:5000/c", "latest"),
            ("a.b:5000/c:v2", "v2"),
            ("nginx@sha256:aa", ""),
            ("nginx:1@sha256:aa", "1"),
            ("Nginx", ""),
            ("", ""),
            ("localhost/x:latest", "latest"),
        ] {
            assert_eq!(image_tag(image), tag, "{image}");
        }
    }
}
