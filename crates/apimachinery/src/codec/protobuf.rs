//! The protobuf encoding of objects: a `k8s\0` prefix, a `runtime.Unknown` and the object's own message.
//!
//! Encoding is byte for byte what upstream's generated code writes: fields in ascending order of numbers, zero values of fields that are no pointers
//! included, maps sorted by key. Source: k8s.io/apimachinery v0.37 `pkg/runtime/serializer/protobuf`, and the field numbers of the
//! `generated.proto` files.

mod decode;
mod encode;

use serde_json::{Value, json};

use crate::kinds::Gvk;
use crate::normalize::normalize;
use crate::schema::{Field, TypeId, schema};
use crate::tree::Tree;

/// What an enveloped body starts with.
pub const PREFIX: &[u8; 4] = b"k8s\0";

/// Why bytes are no object.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No `k8s\0` prefix.
    #[error("provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]")]
    Prefix,
    /// Nothing after the prefix, or nothing at all.
    #[error("empty data")]
    Empty,
    /// A message that ends in the middle of a field, or whose wire types do not fit.
    #[error("proto: malformed message {message} at byte {offset}")]
    Malformed {
        /// Short name of the message's type.
        message: &'static str,
        /// Offset in that message.
        offset: usize,
    },
    /// Strings are UTF-8.
    #[error("proto: field {field} has invalid UTF-8")]
    Utf8 {
        /// JSON name of the field.
        field: &'static str,
    },
    /// The envelope has no kind or no version.
    #[error("Object 'Kind' is missing in '{0}'")]
    MissingKind(String),
    /// The kind is not known.
    #[error("no kind \"{kind}\" is registered for version \"{version}\"")]
    UnknownKind {
        /// Kind.
        kind: String,
        /// `group/version`.
        version: String,
    },
    /// A value that does not fit its field (only on encoding).
    #[error("cannot encode {field}: {value} does not fit")]
    Unfit {
        /// JSON name of the field.
        field: &'static str,
        /// The value.
        value: String,
    },
    /// The decoded object is not well-formed.
    #[error(transparent)]
    Normalize(#[from] crate::normalize::Error),
}

fn type_of(gvk: &Gvk) -> Result<TypeId, Error> {
    schema()
        .by_kind(&gvk.group, &gvk.version, &gvk.kind)
        .ok_or_else(|| Error::UnknownKind { kind: gvk.kind.clone(), version: gvk.api_version() })
}

/// Decodes an enveloped object. `apiVersion` and `kind` of the value are the envelope's.
pub fn decode(bytes: &[u8]) -> Result<(Gvk, Value), Error> {
    decode_or(bytes, None)
}

/// Like [`decode`], with a kind for envelopes that name none.
pub fn decode_or(bytes: &[u8], default: Option<&Gvk>) -> Result<(Gvk, Value), Error> {
    if bytes.is_empty() {
        return Err(Error::Empty);
    }
    let body = bytes.strip_prefix(PREFIX).ok_or(Error::Prefix)?;
    if body.is_empty() {
        return Err(Error::Empty);
    }
    let unknown = decode::unknown(body)?;
    let gvk = match (unknown.kind.is_empty() || unknown.api_version.is_empty(), default) {
        (false, _) => Gvk::new(&unknown.api_version, &unknown.kind),
        (true, Some(default)) => default.clone(),
        (true, None) => return Err(Error::MissingKind(format!("apiVersion={} kind={}", unknown.api_version, unknown.kind))),
    };
    let mut value = decode_raw(type_of(&gvk)?, unknown.raw)?;
    if let Value::Object(map) = &mut value {
        map.insert("apiVersion".to_owned(), gvk.api_version().into());
        map.insert("kind".to_owned(), gvk.kind.clone().into());
    }
    Ok((gvk, value))
}

/// Decodes a bare message of type `id` (no envelope).
pub fn decode_raw(id: TypeId, bytes: &[u8]) -> Result<Value, Error> {
    let mut value = decode::message(id, bytes)?;
    normalize(id, &mut value)?;
    Ok(value)
}

/// Encodes an object with its envelope.
pub fn encode(gvk: &Gvk, object: &Value) -> Result<Vec<u8>, Error> {
    encode_tree(gvk, &Tree::from(object))
}

/// The same of a document.
pub fn encode_tree(gvk: &Gvk, object: &Tree<'_>) -> Result<Vec<u8>, Error> {
    encode::enveloped(type_of(gvk)?, gvk, object)
}

/// Encodes a bare message of type `id` (no envelope).
pub fn encode_raw(id: TypeId, object: &Value) -> Result<Vec<u8>, Error> {
    encode::bare(id, &Tree::from(object))
}

/// Encodes a list with its envelope, one item after another, from the last to the first.
pub struct ListEncoder<'a> {
    gvk: &'a Gvk,
    metadata: &'static Field,
    items: &'static Field,
    out: encode::Backward,
    behind: usize,
}

impl<'a> ListEncoder<'a> {
    /// Begins a list of kind `gvk`, with room for `bytes` before it needs more.
    ///
    /// # Errors
    /// [`Error::UnknownKind`] for what is no list.
    pub fn new(gvk: &'a Gvk, bytes: usize) -> Result<Self, Error> {
        let found = schema().get(type_of(gvk)?);
        let (Some(metadata), Some(items)) = (found.field("metadata"), found.field("items")) else {
            return Err(Error::UnknownKind { kind: gvk.kind.clone(), version: gvk.api_version() });
        };
        let mut out = encode::Backward::with_capacity(bytes);
        let behind = encode::open(&mut out);
        Ok(Self { gvk, metadata, items, out, behind })
    }

    /// Puts an item in front of those that are there.
    ///
    /// # Errors
    /// [`Error::Unfit`] for what does not fit the item's type.
    pub fn push_front(&mut self, item: &Tree<'_>) -> Result<(), Error> {
        encode::item(schema(), self.items, self.items.number, item, &mut self.out)
    }

    /// Ends the list.
    ///
    /// # Errors
    /// [`Error::Unfit`] for metadata that is no ListMeta.
    pub fn finish(mut self, metadata: &Value) -> Result<Vec<u8>, Error> {
        encode::item(schema(), self.metadata, self.metadata.number, &Tree::from(metadata), &mut self.out)?;
        Ok(encode::close(self.out, self.behind, self.gvk))
    }
}

/// One event of a protobuf watch stream: a 4-byte big-endian length and a bare `WatchEvent` whose object is enveloped.
///
/// `object` is what [`encode`] gave (bookmarks and error Statuses alike).
pub fn watch_frame(event_type: &str, object: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(object.len() + event_type.len() + 16);
    body.push(0x0a);
    encode::put_varint(&mut body, event_type.len() as u64);
    body.extend_from_slice(event_type.as_bytes());
    let mut raw = vec![0x0a];
    encode::put_varint(&mut raw, object.len() as u64);
    body.push(0x12);
    encode::put_varint(&mut body, (raw.len() + object.len()) as u64);
    body.extend_from_slice(&raw);
    body.extend_from_slice(object);
    let mut frame = Vec::with_capacity(body.len() + 4);
    frame.extend_from_slice(&(body.len() as u32).to_be_bytes());
    frame.extend_from_slice(&body);
    frame
}

/// Decodes a bare `WatchEvent` (a frame without its length): the event's type and object.
pub fn decode_watch_event(bytes: &[u8]) -> Result<(String, Value), Error> {
    let event = decode_raw(type_of(&Gvk::new("v1", "WatchEvent"))?, bytes)?;
    let object = event.get("object").cloned().unwrap_or_else(|| json!({}));
    Ok((event.get("type").and_then(Value::as_str).unwrap_or("").to_owned(), object))
}
