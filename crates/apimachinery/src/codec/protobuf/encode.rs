//! Objects to protobuf bytes.
//!
//! The buffer is filled from its end, so that lengths are known when they are written.

use base64::Engine as _;

use super::{Error, PREFIX};
use crate::kinds::Gvk;
use crate::schema::{Container, Field, Item, Schema, Shape, Type, TypeId, Wire, schema};
use crate::time;
use crate::tree::Tree;

static NULL: Tree<'static> = Tree::Null;

/// Appends a varint (forward).
pub(super) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Bytes in front of which more are put.
pub(super) struct Backward {
    buffer: Vec<u8>,
    /// Where what was put begins.
    start: usize,
}

impl Backward {
    /// With room for so many bytes before it grows.
    pub(super) fn with_capacity(bytes: usize) -> Self {
        Self { buffer: vec![0; bytes], start: bytes }
    }

    fn len(&self) -> usize {
        self.buffer.len() - self.start
    }

    fn bytes(&mut self, bytes: &[u8]) {
        if self.start < bytes.len() {
            self.grow(bytes.len());
        }
        let end = self.start;
        self.start -= bytes.len();
        self.buffer[self.start..end].copy_from_slice(bytes);
    }

    #[cold]
    fn grow(&mut self, more: usize) {
        let mut buffer = vec![0; (self.len() + more).max(self.buffer.len() * 2).max(256)];
        let start = buffer.len() - self.len();
        buffer[start..].copy_from_slice(&self.buffer[self.start..]);
        (self.buffer, self.start) = (buffer, start);
    }

    fn varint(&mut self, mut value: u64) {
        const BYTES_MAX: usize = 10;
        let (mut bytes, mut count) = ([0; BYTES_MAX], 0);
        while value >= 0x80 {
            bytes[count] = value as u8 | 0x80;
            value >>= 7;
            count += 1;
        }
        bytes[count] = value as u8;
        self.bytes(&bytes[..=count]);
    }

    fn tag(&mut self, number: u32, wire_type: u32) {
        self.varint(u64::from(number << 3 | wire_type));
    }

    /// Ends a length-delimited field behind which there were `length` bytes.
    fn close(&mut self, number: u32, length: usize) {
        self.varint((self.len() - length) as u64);
        self.tag(number, 2);
    }

    fn string(&mut self, number: u32, text: &str) {
        let length = self.len();
        self.bytes(text.as_bytes());
        self.close(number, length);
    }

    fn number(&mut self, number: u32, value: i64) {
        self.varint(value as u64);
        self.tag(number, 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.buffer.drain(..self.start);
        self.buffer
    }
}

pub(super) fn bare(id: TypeId, object: &Tree<'_>) -> Result<Vec<u8>, Error> {
    let mut out = Backward::with_capacity(0);
    message(schema(), id, object, &mut out)?;
    Ok(out.finish())
}

pub(super) fn enveloped(id: TypeId, gvk: &Gvk, object: &Tree<'_>) -> Result<Vec<u8>, Error> {
    let mut out = Backward::with_capacity(1024);
    let length = open(&mut out);
    message(schema(), id, object, &mut out)?;
    Ok(close(out, length, gvk))
}

/// Puts what stands behind the object in its envelope.
pub(super) fn open(out: &mut Backward) -> usize {
    out.string(4, "");
    out.string(3, "");
    out.len()
}

/// Puts what stands in front of the object in its envelope.
pub(super) fn close(mut out: Backward, length: usize, gvk: &Gvk) -> Vec<u8> {
    out.close(2, length);
    let length = out.len();
    out.string(2, &gvk.kind);
    out.string(1, &gvk.api_version());
    out.close(1, length);
    out.bytes(PREFIX);
    out.finish()
}

fn unfit(field: &'static str, value: &Tree<'_>) -> Error {
    Error::Unfit { field, value: value.to_string() }
}

pub(super) fn message(schema: &'static Schema, id: TypeId, value: &Tree<'_>, out: &mut Backward) -> Result<(), Error> {
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

fn timestamp(found: &'static Type, value: &Tree<'_>, out: &mut Backward) -> Result<(), Error> {
    let Tree::String(text) = value else {
        return if value.is_null() { Ok(()) } else { Err(unfit(found.name, value)) };
    };
    let time = time::parse(text).ok_or_else(|| unfit(found.name, value))?;
    let micros = time.as_microsecond();
    let nanos = if found.shape == Shape::Time { 0 } else { micros.rem_euclid(1_000_000) * 1000 };
    out.number(2, nanos);
    out.number(1, micros.div_euclid(1_000_000));
    Ok(())
}

fn object(schema: &'static Schema, found: &'static Type, value: &Tree<'_>, out: &mut Backward) -> Result<(), Error> {
    if !matches!(value, Tree::Object(_) | Tree::Null) {
        return Err(unfit(found.name, value));
    }
    for wire in found.wire.iter().rev() {
        match wire {
            Wire::Field(index) => member(schema, &found.fields[usize::from(*index)], value, out)?,
            Wire::Inline(number, indices) => {
                let length = out.len();
                for index in indices.iter().rev() {
                    member(schema, &found.fields[usize::from(*index)], value, out)?;
                }
                out.close(*number, length);
            }
        }
    }
    Ok(())
}

fn member(schema: &'static Schema, field: &'static Field, owner: &Tree<'_>, out: &mut Backward) -> Result<(), Error> {
    let value = owner.get(field.name).unwrap_or(&NULL);
    match field.container {
        Container::Single => {
            if value.is_null() && (field.pointer || field.item == Item::Bytes) {
                return Ok(());
            }
            item(schema, field, field.number, value, out)
        }
        Container::List => match value {
            Tree::List(items) => items.iter().rev().try_for_each(|value| item(schema, field, field.number, value, out)),
            Tree::Null => Ok(()),
            other => Err(unfit(field.name, other)),
        },
        Container::Map => match value {
            Tree::Object(items) => {
                for (key, value) in items.iter().rev() {
                    let length = out.len();
                    item(schema, field, 2, value, out)?;
                    out.string(1, key);
                    out.close(field.number, length);
                }
                Ok(())
            }
            Tree::Null => Ok(()),
            other => Err(unfit(field.name, other)),
        },
    }
}

/// Writes one item with a tag of `number`; null is the zero value.
pub(super) fn item(schema: &'static Schema, field: &'static Field, number: u32, value: &Tree<'_>, out: &mut Backward) -> Result<(), Error> {
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
            let length = out.len();
            out.bytes(&bytes);
            out.close(number, length);
        }
        Item::Strings => {
            let length = out.len();
            for text in value.as_list().into_iter().flatten().rev() {
                out.string(1, text.as_str().ok_or_else(|| unfit(field.name, value))?);
            }
            out.close(number, length);
        }
        Item::Type(id) => {
            let length = out.len();
            message(schema, id, value, out)?;
            out.close(number, length);
        }
    }
    Ok(())
}
