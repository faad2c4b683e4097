//! The canonical form of an object: what is left when upstream's server reads JSON into its Go type and writes it again.
//!
//! Unknown fields are dropped, zero values leave or enter as the Go tags say, quantities and times take their canonical texts. A value
//! of a wrong JSON type is an error with the text of upstream's decoder (sigs.k8s.io/json).

use base64::Engine as _;
use serde_json::{Map, Value};

use crate::quantity::Quantity;
use crate::schema::{Container, Field, Item, Schema, Shape, Type, TypeId, schema};
use crate::time;

/// A value that does not fit its field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Wrong JSON type.
    #[error("json: cannot unmarshal {found} into Go {place} of type {wanted}")]
    Type {
        /// `string`, `number`, `number 1.5`, `bool`, `object`, `array`.
        found: String,
        /// `struct field Container.spec.containers.name` or `value`.
        place: String,
        /// The Go type.
        wanted: String,
    },
    /// The text of a field's own parser (quantity, time, base64).
    #[error("{0}")]
    Text(String),
}

/// Brings `value` into the canonical form of type `id`, in place.
pub fn normalize(id: TypeId, value: &mut Value) -> Result<(), Error> {
    let mut walk = Walk { schema: schema(), path: Vec::new() };
    walk.value(id, value, "")
}

/// Sets the fields of an object of type `id` that Go always writes and that are absent; nothing below is looked at.
pub fn fill(id: TypeId, object: &mut Value) {
    let mut walk = Walk { schema: schema(), path: Vec::new() };
    let Value::Object(map) = object else { return };
    for field in schema().get(id).fields.iter().filter(|field| always(schema(), field)) {
        if !map.contains_key(field.name)
            && let Ok(zero) = walk.zero(field)
        {
            map.insert(field.name.to_owned(), zero);
        }
    }
}

struct Walk<'a> {
    schema: &'static Schema,
    path: Vec<&'a str>,
}

fn found(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "bool".to_owned(),
        Value::Number(number) if number.is_i64() => "number".to_owned(),
        Value::Number(number) => format!("number {number}"),
        Value::String(_) => "string".to_owned(),
        Value::Array(_) => "array".to_owned(),
        Value::Object(_) => "object".to_owned(),
    }
}

/// The Go spelling of a type's short name: `v1.Container`.
fn go_name(short: &str) -> String {
    let mut parts = short.rsplit('.');
    let name = parts.next().unwrap_or("");
    parts.next().map_or_else(|| name.to_owned(), |package| format!("{package}.{name}"))
}

impl Walk<'_> {
    fn wrong(&self, value: &Value, owner: &str, wanted: &str) -> Error {
        let place = if self.path.is_empty() {
            "value".to_owned()
        } else {
            let owner = owner.rsplit('.').next().unwrap_or("");
            format!("struct field {owner}.{}", self.path.join("."))
        };
        let number = matches!(value, Value::Number(_)) && (wanted.starts_with("int") || wanted == "float64");
        let found = match value {
            Value::Number(number_value) if number => format!("number {number_value}"),
            Value::Number(_) => "number".to_owned(),
            other => found(other),
        };
        Error::Type { found, place, wanted: wanted.to_owned() }
    }

    fn value(&mut self, id: TypeId, value: &mut Value, owner: &str) -> Result<(), Error> {
        let schema = self.schema;
        let found = schema.get(id);
        match found.shape {
            Shape::Object => return self.object(found, value, owner),
            Shape::Quantity => {
                let text = match &*value {
                    Value::String(text) => text.trim().to_owned(),
                    Value::Number(number) => number.to_string(),
                    Value::Null => "0".to_owned(),
                    other => other.to_string(),
                };
                let quantity: Quantity = text.parse().map_err(|error: crate::quantity::ParseError| Error::Text(error.to_string()))?;
                *value = Value::String(quantity.to_string());
            }
            Shape::Time | Shape::MicroTime => self.time(found, value, owner)?,
            Shape::IntOrString => match value {
                Value::String(_) => {}
                Value::Number(number) if number.as_i64().is_some_and(|number| i32::try_from(number).is_ok()) => {}
                Value::Null => *value = Value::from(0),
                other => return Err(self.wrong(other, owner, "int32")),
            },
            Shape::RawExtension | Shape::FieldsV1 | Shape::Free => {}
        }
        Ok(())
    }

    fn time(&self, found: &Type, value: &mut Value, owner: &str) -> Result<(), Error> {
        let Value::String(text) = &*value else {
            return if value.is_null() { Ok(()) } else { Err(self.wrong(value, owner, "string")) };
        };
        let layout = if found.shape == Shape::Time { "2006-01-02T15:04:05Z07:00" } else { "2006-01-02T15:04:05.000000Z07:00" };
        let parsed = time::parse(text)
            .ok_or_else(|| Error::Text(format!("parsing time \"{text}\" as \"{layout}\": cannot parse \"{text}\" as \"2006\"")))?;
        *value = Value::String(if found.shape == Shape::Time { time::format_seconds(parsed) } else { time::format_micros(parsed) });
        Ok(())
    }

    fn object(&mut self, found: &Type, value: &mut Value, owner: &str) -> Result<(), Error> {
        if value.is_null() {
            *value = Value::Object(Map::new());
        }
        let wrong = if value.is_object() { None } else { Some(self.wrong(value, owner, &go_name(found.name))) };
        let (Value::Object(map), None) = (value, &wrong) else { return Err(wrong.expect("set for what is no object")) };
        let mut failure = None;
        map.retain(|key, value| {
            let Some(field) = found.field(key) else { return false };
            if failure.is_some() {
                return true;
            }
            self.path.push(field.name);
            let kept = self.field(found, field, value);
            self.path.pop();
            kept.unwrap_or_else(|error| {
                failure = Some(error);
                true
            })
        });
        if let Some(error) = failure {
            return Err(error);
        }
        for field in found.fields.iter().filter(|field| always(self.schema, field)) {
            if !map.contains_key(field.name) {
                map.insert(field.name.to_owned(), self.zero(field)?);
            }
        }
        Ok(())
    }

    /// Normalizes a field's value; false when Go would leave it out.
    fn field(&mut self, owner: &Type, field: &Field, value: &mut Value) -> Result<bool, Error> {
        if value.is_null() {
            if !always(self.schema, field) {
                return Ok(false);
            }
            *value = self.zero(field)?;
            return Ok(true);
        }
        match field.container {
            Container::Single => {
                self.item(owner, field, value)?;
                Ok(!(self.is_zero(field, value) && ((field.omit_empty && !is_struct(self.schema, field)) || field.omit_zero)))
            }
            Container::List => {
                let Value::Array(items) = value else {
                    return Err(self.wrong(value, owner.name, &format!("[]{}", self.go_item(field))));
                };
                for item in items.iter_mut() {
                    self.item(owner, field, item)?;
                }
                Ok(!(items.is_empty() && (field.omit_empty || field.omit_zero)))
            }
            Container::Map => {
                let Value::Object(items) = value else {
                    return Err(self.wrong(value, owner.name, &format!("map[string]{}", self.go_item(field))));
                };
                for item in items.values_mut() {
                    self.item(owner, field, item)?;
                }
                Ok(!(items.is_empty() && (field.omit_empty || field.omit_zero)))
            }
        }
    }

    fn go_item(&self, field: &Field) -> String {
        match field.item {
            Item::String => "string".to_owned(),
            Item::Bool => "bool".to_owned(),
            Item::Int32 => "int32".to_owned(),
            Item::Int64 => "int64".to_owned(),
            Item::Double => "float64".to_owned(),
            Item::Bytes => "[]uint8".to_owned(),
            Item::Strings => "[]string".to_owned(),
            Item::Type(id) => go_name(self.schema.get(id).name),
        }
    }

    fn item(&mut self, owner: &Type, field: &Field, value: &mut Value) -> Result<(), Error> {
        let fits = match field.item {
            Item::Type(id) => return self.value(id, value, owner.name),
            Item::String => value.is_string() || null_to(value, "".into()),
            Item::Bool => value.is_boolean() || null_to(value, false.into()),
            Item::Int32 => value.as_i64().is_some_and(|number| i32::try_from(number).is_ok()) || null_to(value, 0.into()),
            Item::Int64 => value.is_i64() || null_to(value, 0.into()),
            Item::Double => value.is_number() || null_to(value, 0.into()),
            Item::Bytes => return self.bytes(owner, value),
            Item::Strings => {
                null_to(value, Value::Array(Vec::new())) || value.as_array().is_some_and(|items| items.iter().all(Value::is_string))
            }
        };
        if fits { Ok(()) } else { Err(self.wrong(value, owner.name, &self.go_item(field))) }
    }

    fn bytes(&self, owner: &Type, value: &mut Value) -> Result<(), Error> {
        if null_to(value, "".into()) {
            return Ok(());
        }
        let Value::String(text) = &*value else { return Err(self.wrong(value, owner.name, "[]uint8")) };
        let engine = &base64::engine::general_purpose::STANDARD;
        if text.contains(['\r', '\n']) {
            let joined: String = text.chars().filter(|letter| !matches!(letter, '\r' | '\n')).collect();
            *value = Value::String(joined);
        }
        let text = value.as_str().unwrap_or("");
        engine.decode(text).map(drop).map_err(|error| Error::Text(illegal_base64(text, &error)))
    }

    fn is_zero(&self, field: &Field, value: &Value) -> bool {
        if field.pointer {
            return value.is_null();
        }
        match value {
            Value::Null => true,
            Value::Bool(set) => !set,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Object(map) => map.is_empty(),
        }
    }

    fn zero(&mut self, field: &Field) -> Result<Value, Error> {
        if field.pointer || field.container != Container::Single {
            return Ok(Value::Null);
        }
        Ok(match field.item {
            Item::String => "".into(),
            Item::Bool => false.into(),
            Item::Int32 | Item::Int64 | Item::Double => 0.into(),
            Item::Bytes | Item::Strings => Value::Null,
            Item::Type(id) => match self.schema.get(id).shape {
                Shape::Object => {
                    let mut value = Value::Object(Map::new());
                    self.value(id, &mut value, "")?;
                    value
                }
                Shape::Quantity => "0".into(),
                Shape::IntOrString => 0.into(),
                _ => Value::Null,
            },
        })
    }
}

fn null_to(value: &mut Value, zero: Value) -> bool {
    let null = value.is_null();
    if null {
        *value = zero;
    }
    null
}

/// The text of Go's base64 decoder.
fn illegal_base64(text: &str, error: &base64::DecodeError) -> String {
    let offset = match error {
        base64::DecodeError::InvalidByte(offset, _) | base64::DecodeError::InvalidLastSymbol(offset, _) => *offset,
        base64::DecodeError::InvalidLength(_) | base64::DecodeError::InvalidPadding => text.len() / 4 * 4,
    };
    format!("illegal base64 data at input byte {offset}")
}

/// A struct held by value: `omitempty` has no effect on it.
fn is_struct(schema: &Schema, field: &Field) -> bool {
    match field.item {
        Item::Type(id) if field.container == Container::Single && !field.pointer => !matches!(schema.get(id).shape, Shape::Free),
        _ => false,
    }
}

/// Whether Go writes the field even when it is empty.
fn always(schema: &Schema, field: &Field) -> bool {
    !field.omit_zero && (!field.omit_empty || is_struct(schema, field))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn normalized(kind: (&str, &str, &str), mut value: Value) -> Result<Value, Error> {
        let id = schema().by_kind(kind.0, kind.1, kind.2).expect("a kind");
        normalize(id, &mut value).map(|()| value)
    }

    #[test]
    fn zero_values_come_and_go_as_in_go() {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": {}, "namespace": ""},
            "spec": {"nodeName": "", "containers": [{"name": "c", "image": "i", "resources": {"limits": {"cpu": 0.5, "memory": "1024Mi"}}}],
                "terminationGracePeriodSeconds": 0, "volumes": null, "nope": 1}});
        assert_eq!(
            normalized(("", "v1", "Pod"), pod).expect("fits"),
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"},
                "spec": {"containers": [{"name": "c", "image": "i", "resources": {"limits": {"cpu": "500m", "memory": "1Gi"}}}],
                    "terminationGracePeriodSeconds": 0}, "status": {}})
        );
        let deployment = json!({"spec": {"selector": null, "replicas": 0}});
        assert_eq!(
            normalized(("apps", "v1", "Deployment"), deployment).expect("fits"),
            json!({"metadata": {}, "spec": {"replicas": 0, "selector": null, "strategy": {},
                "template": {"metadata": {}, "spec": {"containers": null}}}, "status": {}})
        );
    }

    #[test]
    fn wrong_types_read_as_upstream() {
        let error = normalized(("apps", "v1", "Deployment"), json!({"spec": {"replicas": "x"}})).expect_err("a string");
        assert_eq!(error.to_string(), "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32");
        let error = normalized(("", "v1", "Secret"), json!({"data": {"a": "!"}})).expect_err("no base64");
        assert_eq!(error.to_string(), "illegal base64 data at input byte 0");
    }
}
