//! Answers: objects, lists and errors in the encoding and shape that was negotiated.

use apimachinery::codec::protobuf::ListEncoder;
use apimachinery::codec::{self, Media};
use apimachinery::status::Status;
use apimachinery::tree::Tree;
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

/// What a resourceVersion adds to an object's stored bytes, at most.
const REVISION_BYTES: usize = 48;

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

/// Appends a JSON text.
pub fn put(out: &mut Vec<u8>, value: &impl serde::Serialize) -> Result<(), Status> {
    serde_json::to_writer(out, value).map_err(|error| Status::internal(format!("failed to encode an object: {error}")))
}

/// Turns compact JSON into the text that was asked for: as it is, indented, or YAML.
fn laid_out(accepted: Accepted, json: Vec<u8>) -> Result<Vec<u8>, Status> {
    let failed = |error: &dyn std::fmt::Display| Status::internal(format!("failed to encode an object: {error}"));
    match accepted.media {
        Media::Json if !accepted.pretty => Ok(json),
        Media::Json => {
            let value: Value = serde_json::from_slice(&json).map_err(|error| failed(&error))?;
            serde_json::to_vec_pretty(&value).map_err(|error| failed(&error))
        }
        media => codec::encode(media, &Gvk::default(), &serde_json::from_slice(&json).map_err(|error| failed(&error))?),
    }
}

/// Appends the `PartialObjectMetadata` of an object.
pub fn put_partial(out: &mut Vec<u8>, object: &Tree<'_>) -> Result<(), Status> {
    out.extend_from_slice(b"{\"kind\":\"PartialObjectMetadata\",\"apiVersion\":\"meta.k8s.io/v1\",\"metadata\":");
    match &object["metadata"] {
        Tree::Null => out.extend_from_slice(b"{}"),
        metadata => put(out, metadata)?,
    }
    out.push(b'}');
    Ok(())
}

/// An object of any kind (a review, a Scale, a Status), unless it is a served resource asked for in another shape.
pub fn value(code: u16, accepted: Accepted, object: &Value) -> Result<Response<Body>, Status> {
    let gvk = Gvk::of(object).unwrap_or_default();
    let body = match accepted.media {
        Media::Json => {
            let mut out = Vec::new();
            put(&mut out, object)?;
            laid_out(accepted, out)?
        }
        media => codec::encode(media, &gvk, object)?,
    };
    Ok(bytes(code, accepted.media.as_str(), body))
}

/// Shows a stored object as the version that was asked for.
fn with_tree<T>(resource: &Resource, stored: &[u8], revision: i64, act: impl FnOnce(&Tree<'_>) -> Result<T, Status>) -> Result<T, Status> {
    if resource.converted {
        let mut object = parse(stored, revision)?;
        apimachinery::convert::convert(&mut object, &resource.facts.gvk());
        return act(&Tree::from(&object));
    }
    let tree = object::tree(stored, revision);
    act(&tree.map_err(|error| Status::internal(format!("failed to decode a stored object: {error}")))?)
}

/// Encodes one stored object in the negotiated shape; bytes are copied where they can be. `first` tells whether a Table carries its column
/// definitions.
pub fn render_stored(
    resource: &Resource,
    accepted: Accepted,
    stored: &[u8],
    revision: i64,
    include: tables::Include,
    first: bool,
) -> Result<Vec<u8>, Status> {
    let mut out = Vec::new();
    if accepted.shape == Shape::Object && accepted.media != Media::Protobuf && !resource.converted {
        out.reserve(stored.len() + REVISION_BYTES);
        object::splice(&mut out, stored, revision, 0);
        return laid_out(accepted, out);
    }
    with_tree(resource, stored, revision, |object| match (accepted.shape, accepted.media) {
        (Shape::Object, Media::Protobuf) => codec::encode_tree(Media::Protobuf, &resource.facts.gvk(), object),
        (Shape::Object, _) => {
            put(&mut out, object)?;
            laid_out(accepted, out)
        }
        (Shape::Partial, _) => {
            put_partial(&mut out, object)?;
            laid_out(accepted, out)
        }
        (Shape::Table, _) => {
            let metadata = json!({"resourceVersion": object["metadata"]["resourceVersion"].as_str().unwrap_or("")});
            tables::put_head(&mut out, resource.facts, &metadata, first);
            tables::put_row(&mut out, resource.facts, object, jiff::Timestamp::now(), include)?;
            out.extend_from_slice(b"]}");
            laid_out(accepted, out)
        }
    })
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
    items: impl DoubleEndedIterator<Item = (&'a [u8], i64)> + Clone,
    list_meta: &ListMeta,
    include: tables::Include,
) -> Result<Vec<u8>, Status> {
    let facts: &KindFacts = resource.facts;
    let metadata = list_meta.to_value();
    // Neither encoding is longer than what is stored, but for the revisions.
    let size: usize = items.clone().map(|(stored, _)| stored.len() + REVISION_BYTES).sum();
    if (accepted.shape, accepted.media) == (Shape::Object, Media::Protobuf) {
        let unfit = |error: codec::protobuf::Error| Status::internal(error.to_string());
        let gvk = Gvk::new(&facts.api_version(), &format!("{}List", facts.kind));
        let mut list = ListEncoder::new(&gvk, size).map_err(unfit)?;
        for (stored, revision) in items.rev() {
            with_tree(resource, stored, revision, |object| list.push_front(object).map_err(unfit))?;
        }
        return list.finish(&metadata).map_err(unfit);
    }
    let mut out = Vec::with_capacity(if accepted.shape == Shape::Object { size } else { size / 4 });
    let now = jiff::Timestamp::now();
    match accepted.shape {
        Shape::Table => tables::put_head(&mut out, facts, &metadata, true),
        shape => {
            let (kind, version) = match shape {
                Shape::Partial => ("PartialObjectMetadataList".to_owned(), "meta.k8s.io/v1".to_owned()),
                _ => (format!("{}List", facts.kind), facts.api_version()),
            };
            out.extend_from_slice(
                format!("{{\"kind\":\"{kind}\",\"apiVersion\":\"{version}\",\"metadata\":{metadata},\"items\":[").as_bytes(),
            );
        }
    }
    for (index, (stored, revision)) in items.enumerate() {
        if index > 0 {
            out.push(b',');
        }
        match accepted.shape {
            Shape::Object if !resource.converted => {
                object::splice(&mut out, stored, revision, object::type_prefix(stored, &storage.type_prefix));
            }
            Shape::Object => with_tree(resource, stored, revision, |object| put_item(&mut out, object))?,
            Shape::Partial => with_tree(resource, stored, revision, |object| put_partial(&mut out, object))?,
            Shape::Table => with_tree(resource, stored, revision, |object| tables::put_row(&mut out, facts, object, now, include))?,
        }
    }
    out.extend_from_slice(b"]}");
    laid_out(accepted, out)
}

/// Appends an object without kind and apiVersion: the list has them.
fn put_item(out: &mut Vec<u8>, object: &Tree<'_>) -> Result<(), Status> {
    let mut object = object.clone();
    if let Some(members) = object.as_object_mut() {
        members.remove("kind");
        members.remove("apiVersion");
    }
    put(out, &object)
}
