//! Values to protobuf bytes.
//!
//! The buffer is filled from its end, so that lengths are known when they are written; it is turned around once, at the end.

use base64::Engine as _;
use serde_json::Value;

use super::{Error, PREFIX};
use crate::kinds::Gvk;
use crate::schema::{Container, Field, Item, Schema, Shape, Type, TypeId, Wire, schema};
use crate::time;

const NULL: &Value = &Value::Null;

/// Appends a varint (forward).
pub(super) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A buffer of reversed bytes.
#[derive(Default)]
struct Backward(Vec<u8>);

impl Backward {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend(bytes.iter().rev());
    }

    fn varint(&mut self, value: u64) {
        let start = self.0.len();
        put_varint(&mut self.0, value);
        self.0[start..].reverse();
    }

    fn tag(&mut self, number: u32, wire_type: u32) {
        self.varint(u64::from(number << 3 | wire_type));
    }

    /// Ends a length-delimited field whose payload began at `start`.
    fn close(&mut self, number: u32, start: usize) {
        let length = self.0.len() - start;
        self.varint(length as u64);
        self.tag(number, 2);
    }

    fn string(&mut self, number: u32, text: &str) {
        let start = self.0.len();
        self.bytes(text.as_bytes());
        self.close(number, start);
    }

    fn number(&mut self, number: u32, value: i64) {
        self.varint(value as u64);
        self.tag(number, 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.0.reverse();
        self.0
    }
}

pub(super) fn bare(id: TypeId, object: &Value) -> Result<Vec<u8>, Error> {
    let mut out = Backward::default();
    message(schema(), id, object, &mut out)?;
    Ok(out.finish())
}

pub(super) fn enveloped(id: TypeId, gvk: &Gvk, object: &Value) -> Result<Vec<u8>, Error> {
    let mut out = Backward::default();
    out.string(4, "");
    out.string(3, "");
    let start = out.0.len();
    message(schema(), id, object, &mut out)?;
    out.close(2, start);
    let start = out.0.len();
    out.string(2, &gvk.kind);
    out.string(1, &gvk.api_version());
    out.close(1, start);
    out.bytes(PREFIX);
    Ok(out.finish())
}

fn unfit(field: &'static str, value: &Value) -> Error {
    Error::Unfit { field, value: value.to_string() }
}

fn message(schema: &'static Schema, id: TypeId, value: &Value, out: &mut Backward) -> Result<(), Error> {
    let found = schema.get(id);
    match found.shape {
        Shape::Object => object(schema, found, value, out),
        Shape::Quantity => {
            out.string(1, value.as_str().unwrap_or("0"));
            Ok(())
        }
        Shape::Time | Shape::MicroTime => timestamp(found, value, out),
        Shape::IntOrString => {
            let text = value.as_str();
            let number = value.as_i64().unwrap_or(0);
            out.string(3, text.unwrap_or(""));
            out.number(2, number);
            out.number(1, i64::from(text.is_some()));
            Ok(())
        }
        Shape::RawExtension | Shape::FieldsV1 => {
            if !value.is_null() {
                out.string(1, &value.to_string());
            }
            Ok(())
        }
        Shape::Free => Ok(()),
    }
}

fn timestamp(found: &'static Type, value: &Value, out: &mut Backward) -> Result<(), Error> {
    let Value::String(text) = value else {
        return if value.is_null() { Ok(()) } else { Err(unfit(found.name, value)) };
    };
    let time = time::parse(text).ok_or_else(|| unfit(found.name, value))?;
    let micros = time.as_microsecond();
    let nanos = if found.shape == Shape::Time { 0 } else { micros.rem_euclid(1_000_000) * 1000 };
    out.number(2, nanos);
    out.number(1, micros.div_euclid(1_000_000));
    Ok(())
}

fn object(schema: &'static Schema, found: &'static Type, value: &Value, out: &mut Backward) -> Result<(), Error> {
    if !value.is_object() && !value.is_null() {
        return Err(unfit(found.name, value));
    }
    for wire in found.wire.iter().rev() {
        match wire {
            Wire::Field(index) => member(schema, &found.fields[usize::from(*index)], value, out)?,
            Wire::Inline(number, indices) => {
                let start = out.0.len();
                for index in indices.iter().rev() {
                    member(schema, &found.fields[usize::from(*index)], value, out)?;
                }
                out.close(*number, start);
            }
        }
    }
    Ok(())
}

fn member(schema: &'static Schema, field: &'static Field, owner: &Value, out: &mut Backward) -> Result<(), Error> {
    let value = owner.get(field.name).unwrap_or(NULL);
    match field.container {
        Container::Single => {
            if value.is_null() && (field.pointer || field.item == Item::Bytes) {
                return Ok(());
            }
            item(schema, field, field.number, value, out)
        }
        Container::List => match value {
            Value::Array(items) => items.iter().rev().try_for_each(|value| item(schema, field, field.number, value, out)),
            Value::Null => Ok(()),
            other => Err(unfit(field.name, other)),
        },
        Container::Map => match value {
            Value::Object(items) => {
                let mut pairs: Vec<(&String, &Value)> = items.iter().collect();
                pairs.sort_unstable_by_key(|(key, _)| *key);
                for (key, value) in pairs.into_iter().rev() {
                    let start = out.0.len();
                    item(schema, field, 2, value, out)?;
                    out.string(1, key);
                    out.close(field.number, start);
                }
                Ok(())
            }
            Value::Null => Ok(()),
            other => Err(unfit(field.name, other)),
        },
    }
}

/// Writes one item with a tag of `number`; null is the zero value.
fn item(schema: &'static Schema, field: &'static Field, number: u32, value: &Value, out: &mut Backward) -> Result<(), Error> {
    let null = value.is_null();
    match field.item {
        Item::String => {
            let text = if null { "" } else { value.as_str().ok_or_else(|| unfit(field.name, value))? };
            out.string(number, text);
        }
        Item::Bool => {
            let set = if null { false } else { value.as_bool().ok_or_else(|| unfit(field.name, value))? };
            out.number(number, i64::from(set));
        }
        Item::Int32 | Item::Int64 => {
            let value = if null { 0 } else { value.as_i64().ok_or_else(|| unfit(field.name, value))? };
            out.number(number, value);
        }
        Item::Double => {
            let value = if null { 0.0 } else { value.as_f64().ok_or_else(|| unfit(field.name, value))? };
            out.bytes(&value.to_bits().to_le_bytes());
            out.tag(number, 1);
        }
        Item::Bytes => {
            let text = if null { "" } else { value.as_str().ok_or_else(|| unfit(field.name, value))? };
            let bytes = base64::engine::general_purpose::STANDARD.decode(text).map_err(|_| unfit(field.name, value))?;
            let start = out.0.len();
            out.bytes(&bytes);
            out.close(number, start);
        }
        Item::Strings => {
            let start = out.0.len();
            for text in value.as_array().into_iter().flatten().rev() {
                out.string(1, text.as_str().ok_or_else(|| unfit(field.name, value))?);
            }
            out.close(number, start);
        }
        Item::Type(id) => {
            let start = out.0.len();
            message(schema, id, value, out)?;
            out.close(number, start);
        }
    }
    Ok(())
}
