//! Answers: objects, lists and errors in the encoding and shape that was negotiated.

use apimachinery::codec::{self, Media};
use apimachinery::status::Status;
use apimachinery::{Gvk, KindFacts};
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER, WARNING};
use http::{Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use serde_json::{Value, json};

use crate::negotiate::{Accepted, Shape};
use crate::resources::{Resource, Storage};
use crate::{object, tables};

/// A response's body: whole, or a stream.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// A body that is whole.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A response with bytes of a media type.
pub fn bytes(code: u16, media_type: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(body));
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    response.headers_mut().insert("cache-control", HeaderValue::from_static("no-cache, private"));
    response
}

/// Plain text.
pub fn text(code: u16, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = bytes(code, "text/plain; charset=utf-8", body);
    response.headers_mut().insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}

/// An error.
pub fn error(status: &Status, media: Media) -> Response<Body> {
    let value = status.to_value();
    let gvk = Gvk::new("v1", "Status");
    let (media, body) = match codec::encode(media, &gvk, &value) {
        Ok(body) => (media, body),
        Err(_) => (Media::Json, value.to_string().into_bytes()),
    };
    let mut response = bytes(status.code, media.as_str(), body);
    if let Some(seconds) = status.retry_after_seconds() {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// A JSON answer whatever was asked for (discovery, OpenAPI, version).
pub fn json(value: &Value) -> Response<Body> {
    bytes(200, "application/json", value.to_string())
}

/// Adds `Warning` headers (RFC 7234, code 299).
pub fn warn(response: &mut Response<Body>, warnings: &[String]) {
    for warning in warnings {
        let quoted: String = warning
            .chars()
            .flat_map(|letter| match letter {
                '"' | '\\' => vec!['\\', letter],
                letter if letter.is_control() => vec![' '],
                letter => vec![letter],
            })
            .collect();
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            response.headers_mut().append(WARNING, value);
        }
    }
}

fn encode(accepted: Accepted, gvk: &Gvk, value: &Value) -> Result<Vec<u8>, Status> {
    match accepted.media {
        Media::Json if accepted.pretty => {
            serde_json::to_vec_pretty(value).map_err(|error| Status::internal(format!("failed to encode {gvk}: {error}")))
        }
        media => codec::encode(media, gvk, value),
    }
}

/// `PartialObjectMetadata` of an object.
pub fn partial(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object.get("metadata").cloned().unwrap_or(json!({}))})
}

fn meta(kind: &str) -> Gvk {
    Gvk::new("meta.k8s.io/v1", kind)
}

/// An object of any kind (a review, a Scale, a Status), unless it is a served resource asked for in another shape.
pub fn value(code: u16, accepted: Accepted, object: &Value) -> Result<Response<Body>, Status> {
    let gvk = Gvk::of(object).unwrap_or_default();
    Ok(bytes(code, accepted.media.as_str(), encode(accepted, &gvk, object)?))
}

/// Encodes one object of a resource in the negotiated shape. `first` tells whether a Table carries its column definitions.
pub fn render(resource: &Resource, accepted: Accepted, object: Value, include: tables::Include, first: bool) -> Result<Vec<u8>, Status> {
    let object = as_served(resource, object);
    match accepted.shape {
        Shape::Object => encode(accepted, &resource.facts.gvk(), &object),
        Shape::Partial => encode(accepted, &meta("PartialObjectMetadata"), &partial(&object)),
        Shape::Table => {
            let metadata = json!({"resourceVersion": object::text(&object, &["metadata", "resourceVersion"])});
            let table = tables::table(resource.facts, &[object], metadata, include, first);
            encode(accepted, &meta("Table"), &table)
        }
    }
}

/// Encodes one stored object: bytes are copied where they can be.
pub fn render_stored(
    resource: &Resource,
    accepted: Accepted,
    stored: &[u8],
    revision: i64,
    include: tables::Include,
    first: bool,
) -> Result<Vec<u8>, Status> {
    if accepted == (Accepted { stream: accepted.stream, ..Accepted::default() }) && !resource.converted {
        let mut out = Vec::with_capacity(stored.len() + 48);
        object::splice(&mut out, stored, revision, 0);
        return Ok(out);
    }
    render(resource, accepted, parse(stored, revision)?, include, first)
}

fn as_served(resource: &Resource, mut object: Value) -> Value {
    if resource.converted {
        apimachinery::convert::convert(&mut object, &resource.facts.gvk());
    }
    object
}

/// Parses what the store holds.
pub fn parse(stored: &[u8], revision: i64) -> Result<Value, Status> {
    object::parse(stored, revision).map_err(|error| Status::internal(format!("failed to decode a stored object: {error}")))
}

/// A list's metadata.
#[derive(Debug, Clone, Default)]
pub struct ListMeta {
    /// Revision.
    pub revision: i64,
    /// Continue token; empty for none.
    pub next: String,
    /// Objects that remain, where known.
    pub remaining: Option<i64>,
}

impl ListMeta {
    fn to_value(&self) -> Value {
        let mut value = json!({"resourceVersion": self.revision.to_string()});
        if !self.next.is_empty() {
            value["continue"] = self.next.clone().into();
        }
        if let Some(remaining) = self.remaining {
            value["remainingItemCount"] = remaining.into();
        }
        value
    }
}

/// Encodes a list of stored objects, as pairs of bytes and revision.
pub fn list<'a>(
    resource: &Resource,
    storage: &Storage,
    accepted: Accepted,
    items: impl Iterator<Item = (&'a [u8], i64)>,
    list_meta: &ListMeta,
    include: tables::Include,
) -> Result<Vec<u8>, Status> {
    let facts: &KindFacts = resource.facts;
    let list_kind = format!("{}List", facts.kind);
    if accepted == Accepted::default() && !resource.converted {
        let mut out = Vec::with_capacity(4096);
        let metadata = list_meta.to_value();
        out.extend_from_slice(
            format!("{{\"kind\":\"{list_kind}\",\"apiVersion\":\"{}\",\"metadata\":{metadata},\"items\":[", facts.api_version()).as_bytes(),
        );
        for (index, (stored, revision)) in items.enumerate() {
            if index > 0 {
                out.push(b',');
            }
            object::splice(&mut out, stored, revision, object::type_prefix(stored, &storage.type_prefix));
        }
        out.extend_from_slice(b"]}");
        return Ok(out);
    }
    let parsed = items.map(|(stored, revision)| Ok(as_served(resource, parse(stored, revision)?)));
    let mut objects = parsed.collect::<Result<Vec<Value>, Status>>()?;
    let (gvk, value) = match accepted.shape {
        Shape::Table => (meta("Table"), tables::table(facts, &objects, list_meta.to_value(), include, true)),
        Shape::Partial => {
            let items: Vec<Value> = objects.iter().map(partial).collect();
            let gvk = meta("PartialObjectMetadataList");
            let value = json!({"kind": gvk.kind, "apiVersion": "meta.k8s.io/v1", "metadata": list_meta.to_value(), "items": items});
            (gvk, value)
        }
        Shape::Object => {
            for object in objects.iter_mut().filter_map(Value::as_object_mut) {
                object.remove("kind");
                object.remove("apiVersion");
            }
            let gvk = Gvk::new(&facts.api_version(), &list_kind);
            (gvk, json!({"kind": list_kind, "apiVersion": facts.api_version(), "metadata": list_meta.to_value(), "items": objects}))
        }
    };
    encode(accepted, &gvk, &value)
}
