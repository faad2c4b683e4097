//! Protobuf bytes to values.

use base64::Engine as _;
use serde_json::{Map, Value};

use super::{Error, PREFIX};
use crate::schema::{Container, Field, Item, Shape, Type, TypeId, Wire, schema};
use crate::time;

/// A reader over one message.
struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
    message: &'static str,
}

/// One field as the wire has it.
enum Payload<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32,
    Bytes(&'a [u8]),
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8], message: &'static str) -> Self {
        Self { bytes, offset: 0, message }
    }

    fn malformed(&self) -> Error {
        Error::Malformed { message: self.message, offset: self.offset }
    }

    fn varint(&mut self) -> Result<u64, Error> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.bytes.get(self.offset).ok_or_else(|| self.malformed())?;
            self.offset += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.malformed())
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Error> {
        let end = self.offset.checked_add(length).ok_or_else(|| self.malformed())?;
        let taken = self.bytes.get(self.offset..end).ok_or_else(|| self.malformed())?;
        self.offset = end;
        Ok(taken)
    }

    /// The next field's number and payload; `None` at the end.
    fn next(&mut self) -> Result<Option<(u32, Payload<'a>)>, Error> {
        if self.offset == self.bytes.len() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).ok().filter(|number| *number != 0).ok_or_else(|| self.malformed())?;
        let payload = match tag & 7 {
            0 => Payload::Varint(self.varint()?),
            1 => {
                let bytes = self.take(8)?;
                Payload::Fixed64(u64::from_le_bytes(bytes.try_into().map_err(|_| self.malformed())?))
            }
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| self.malformed())?;
                Payload::Bytes(self.take(length)?)
            }
            5 => {
                self.take(4)?;
                Payload::Fixed32
            }
            _ => return Err(self.malformed()),
        };
        Ok(Some((number, payload)))
    }
}

/// `runtime.Unknown`.
#[derive(Default)]
pub(super) struct Unknown<'a> {
    pub(super) api_version: String,
    pub(super) kind: String,
    pub(super) raw: &'a [u8],
}

pub(super) fn unknown(bytes: &[u8]) -> Result<Unknown<'_>, Error> {
    let mut found = Unknown::default();
    let mut reader = Reader::new(bytes, "runtime.Unknown");
    while let Some((number, payload)) = reader.next()? {
        match (number, payload) {
            (1, Payload::Bytes(meta)) => {
                let mut reader = Reader::new(meta, "runtime.TypeMeta");
                while let Some((number, payload)) = reader.next()? {
                    match (number, payload) {
                        (1, Payload::Bytes(text)) => found.api_version = string("apiVersion", text)?,
                        (2, Payload::Bytes(text)) => found.kind = string("kind", text)?,
                        _ => {}
                    }
                }
            }
            (2, Payload::Bytes(raw)) => found.raw = raw,
            _ => {}
        }
    }
    Ok(found)
}

fn string(field: &'static str, bytes: &[u8]) -> Result<String, Error> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Error::Utf8 { field })
}

/// Decodes a message of type `id`.
pub(super) fn message(id: TypeId, bytes: &[u8]) -> Result<Value, Error> {
    let schema = schema();
    let found = schema.get(id);
    match found.shape {
        Shape::Object => {
            let mut map = Map::new();
            fill(found, &mut map, bytes)?;
            Ok(Value::Object(map))
        }
        Shape::Quantity => first_bytes(found, bytes).and_then(|text| {
            let text = string("string", text.unwrap_or(b"0"))?;
            Ok(Value::String(if text.is_empty() { "0".to_owned() } else { text }))
        }),
        Shape::Time | Shape::MicroTime => timestamp(found, bytes),
        Shape::IntOrString => int_or_string(found, bytes),
        Shape::RawExtension | Shape::FieldsV1 => match first_bytes(found, bytes)? {
            None => Ok(Value::Null),
            Some(raw) if raw.starts_with(PREFIX) => super::decode(raw).map(|(_, object)| object),
            Some(raw) => serde_json::from_slice(raw).map_err(|_| Error::Malformed { message: found.name, offset: 0 }),
        },
        Shape::Free => Ok(Value::Object(Map::new())),
    }
}

/// The last value of field 1.
fn first_bytes<'a>(found: &Type, bytes: &'a [u8]) -> Result<Option<&'a [u8]>, Error> {
    let mut reader = Reader::new(bytes, found.name);
    let mut last = None;
    while let Some((number, payload)) = reader.next()? {
        if let (1, Payload::Bytes(value)) = (number, payload) {
            last = Some(value);
        }
    }
    Ok(last)
}

fn timestamp(found: &Type, bytes: &[u8]) -> Result<Value, Error> {
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    let mut reader = Reader::new(bytes, found.name);
    let (mut seconds, mut nanos) = (0i64, 0i32);
    while let Some((number, payload)) = reader.next()? {
        match (number, payload) {
            (1, Payload::Varint(value)) => seconds = value as i64,
            (2, Payload::Varint(value)) => nanos = value as i32,
            _ => {}
        }
    }
    let time = jiff::Timestamp::new(seconds, nanos).map_err(|_| reader.malformed())?;
    Ok(Value::String(if found.shape == Shape::Time { time::format_seconds(time) } else { time::format_micros(time) }))
}

fn int_or_string(found: &Type, bytes: &[u8]) -> Result<Value, Error> {
    let mut reader = Reader::new(bytes, found.name);
    let (mut is_string, mut number_value, mut text) = (false, 0i32, String::new());
    while let Some((number, payload)) = reader.next()? {
        match (number, payload) {
            (1, Payload::Varint(value)) => is_string = value == 1,
            (2, Payload::Varint(value)) => number_value = value as i32,
            (3, Payload::Bytes(bytes)) => text = string("strVal", bytes)?,
            _ => {}
        }
    }
    Ok(if is_string { text.into() } else { number_value.into() })
}

/// The entry for a wire number.
fn entry(found: &'static Type, number: u32) -> Option<&'static Wire> {
    found.wire.iter().find(|entry| match entry {
        Wire::Field(index) => found.fields[usize::from(*index)].number == number,
        Wire::Inline(outer, _) => *outer == number,
    })
}

fn fill(found: &'static Type, map: &mut Map<String, Value>, bytes: &[u8]) -> Result<(), Error> {
    let mut reader = Reader::new(bytes, found.name);
    while let Some((number, payload)) = reader.next()? {
        match (entry(found, number), payload) {
            (None, _) => {}
            (Some(Wire::Field(index)), payload) => {
                put(&found.fields[usize::from(*index)], map, payload, &reader)?;
            }
            (Some(Wire::Inline(_, indices)), Payload::Bytes(inner)) => {
                let mut inner = Reader::new(inner, found.name);
                while let Some((number, payload)) = inner.next()? {
                    let field = indices.iter().map(|index| &found.fields[usize::from(*index)]).find(|field| field.number == number);
                    if let Some(field) = field {
                        put(field, map, payload, &inner)?;
                    }
                }
            }
            (Some(Wire::Inline(..)), _) => return Err(reader.malformed()),
        }
    }
    Ok(())
}

fn put(field: &'static Field, map: &mut Map<String, Value>, payload: Payload<'_>, reader: &Reader<'_>) -> Result<(), Error> {
    match field.container {
        Container::Single => {
            let value = item(field, payload, reader)?;
            map.insert(field.name.to_owned(), value);
        }
        Container::List => {
            let list = map.entry(field.name).or_insert_with(|| Value::Array(Vec::new()));
            let Value::Array(list) = list else { return Err(reader.malformed()) };
            match (field.item, payload) {
                // Packed repeated scalars are legal, though upstream does not write them.
                (Item::Int32 | Item::Int64 | Item::Bool, Payload::Bytes(packed)) => {
                    let mut packed = Reader::new(packed, reader.message);
                    while packed.offset < packed.bytes.len() {
                        let number = packed.varint()?;
                        list.push(item(field, Payload::Varint(number), reader)?);
                    }
                }
                (_, payload) => list.push(item(field, payload, reader)?),
            }
        }
        Container::Map => {
            let Payload::Bytes(pair) = payload else { return Err(reader.malformed()) };
            let (key, value) = map_entry(field, pair, reader.message)?;
            let items = map.entry(field.name).or_insert_with(|| Value::Object(Map::new()));
            let Value::Object(items) = items else { return Err(reader.malformed()) };
            items.insert(key, value);
        }
    }
    Ok(())
}

fn map_entry(field: &'static Field, pair: &[u8], message: &'static str) -> Result<(String, Value), Error> {
    let mut reader = Reader::new(pair, message);
    let (mut key, mut value) = (String::new(), None);
    while let Some((number, payload)) = reader.next()? {
        match (number, payload) {
            (1, Payload::Bytes(text)) => key = string(field.name, text)?,
            (2, payload) => value = Some(item(field, payload, &reader)?),
            _ => {}
        }
    }
    let value = match value {
        Some(value) => value,
        None => item(field, Payload::Bytes(&[]), &reader)?,
    };
    Ok((key, value))
}

fn item(field: &'static Field, payload: Payload<'_>, reader: &Reader<'_>) -> Result<Value, Error> {
    Ok(match (field.item, payload) {
        (Item::String, Payload::Bytes(text)) => string(field.name, text)?.into(),
        (Item::Bytes, Payload::Bytes(bytes)) => base64::engine::general_purpose::STANDARD.encode(bytes).into(),
        (Item::Bool, Payload::Varint(value)) => (value != 0).into(),
        (Item::Int32, Payload::Varint(value)) => (value as i32).into(),
        (Item::Int64, Payload::Varint(value)) => (value as i64).into(),
        (Item::Double, Payload::Fixed64(bits)) => f64::from_bits(bits).into(),
        (Item::Strings, Payload::Bytes(bytes)) => {
            let mut inner = Reader::new(bytes, reader.message);
            let mut items = Vec::new();
            while let Some((number, payload)) = inner.next()? {
                if let (1, Payload::Bytes(text)) = (number, payload) {
                    items.push(string(field.name, text)?.into());
                }
            }
            Value::Array(items)
        }
        (Item::Type(id), Payload::Bytes(bytes)) => message(id, bytes)?,
        _ => return Err(reader.malformed()),
    })
}
