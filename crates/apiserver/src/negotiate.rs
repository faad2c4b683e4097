//! Which encoding and shape an answer has, and which a body has (`apiserver/pkg/endpoints/handlers/negotiation`, v1.37).

use apimachinery::codec::Media;
use apimachinery::status::Status;
use http::HeaderMap;
use http::header::{ACCEPT, CONTENT_TYPE};

/// What an answer's objects are turned into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Themselves.
    Object,
    /// `meta.k8s.io/v1` Table.
    Table,
    /// `meta.k8s.io/v1` PartialObjectMetadata.
    Partial,
}

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// Encoding.
    pub media: Media,
    /// Shape.
    pub shape: Shape,
    /// `;stream=watch` was asked for.
    pub stream: bool,
    /// JSON is indented.
    pub pretty: bool,
}

impl Default for Accepted {
    fn default() -> Self {
        Self { media: Media::Json, shape: Shape::Object, stream: false, pretty: false }
    }
}

/// Media types that objects can have.
pub const MEDIA_TYPES: &[&str] = &["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"];

/// One clause of an Accept header.
#[derive(Debug)]
pub struct Clause<'a> {
    /// `application/json`, `*/*`.
    pub media_type: &'a str,
    /// Parameters but `q`.
    pub parameters: Vec<(&'a str, &'a str)>,
    quality_milli: u32,
}

impl Clause<'_> {
    /// A parameter's value; empty when it is absent.
    pub fn parameter(&self, name: &str) -> &str {
        self.parameters.iter().find(|(key, _)| *key == name).map_or("", |(_, value)| value)
    }
}

/// The clauses of an Accept header, most wanted first.
pub fn clauses(header: &str) -> Vec<Clause<'_>> {
    let mut found: Vec<Clause<'_>> = header.split(',').filter(|clause| !clause.trim().is_empty()).map(clause).collect();
    found.sort_by_key(|clause| std::cmp::Reverse(clause.quality_milli));
    found
}

fn clause(text: &str) -> Clause<'_> {
    let mut parts = text.split(';').map(str::trim);
    let media_type = parts.next().unwrap_or("");
    let mut quality_milli = 1000;
    let mut parameters = Vec::new();
    for part in parts {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        if key.trim() == "q" {
            let quality = value.trim().parse::<f64>().unwrap_or(1.0).clamp(0.0, 1.0);
            // Between 0 and 1000, so that nothing is cut off.
            quality_milli = (quality * 1000.0) as u32;
        } else {
            parameters.push((key.trim(), value.trim()));
        }
    }
    Clause { media_type, parameters, quality_milli }
}

/// The text of all Accept headers.
pub fn accept_header(headers: &HeaderMap) -> String {
    let values: Vec<&str> = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect();
    if values.is_empty() { "*/*".to_owned() } else { values.join(",") }
}

/// Negotiates the answer to a request for objects.
///
/// # Errors
/// 406 when no clause can be met.
pub fn accept(headers: &HeaderMap, watch: bool, pretty: bool) -> Result<Accepted, Status> {
    let header = accept_header(headers);
    for clause in clauses(&header) {
        let media = match clause.media_type {
            "*/*" => Some(Media::Json),
            other => Media::parse(other),
        };
        let Some(media) = media.filter(|media| !(watch && *media == Media::Yaml)) else { continue };
        let shape = match (clause.parameter("as"), clause.parameter("g"), clause.parameter("v")) {
            ("", _, _) => Shape::Object,
            ("Table", "meta.k8s.io", "v1") if media != Media::Protobuf => Shape::Table,
            ("PartialObjectMetadata" | "PartialObjectMetadataList", "meta.k8s.io", "v1") if media != Media::Protobuf => Shape::Partial,
            _ => continue,
        };
        return Ok(Accepted { media, shape, stream: clause.parameter("stream") == "watch", pretty });
    }
    let message = format!("406: Not Acceptable\n\nAvailable representations: {}", MEDIA_TYPES.join(", "));
    Err(Status { code: 406, reason: "NotAcceptable", message, details: Some(serde_json::json!({})) })
}

/// Negotiates the encoding of an error or of an answer that no Accept can refuse.
pub fn accept_or_json(headers: &HeaderMap) -> Media {
    accept(headers, false, false).map_or(Media::Json, |accepted| accepted.media)
}

/// The media type of a body, without parameters; JSON when there is none.
pub fn content_type(headers: &HeaderMap) -> &str {
    let text = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let media_type = text.split(';').next().unwrap_or("").trim();
    if media_type.is_empty() { "application/json" } else { media_type }
}

/// The encoding of a body that holds an object.
///
/// # Errors
/// 415 for another.
pub fn body_media(headers: &HeaderMap) -> Result<Media, Status> {
    Media::parse(content_type(headers)).ok_or_else(|| Status::unsupported_media_type(MEDIA_TYPES))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(header: &str) -> Result<(Media, Shape), u16> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, header.parse().expect("header"));
        accept(&headers, false, false).map(|accepted| (accepted.media, accepted.shape)).map_err(|status| status.code)
    }

    #[test]
    fn headers_of_real_clients() {
        let table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(read(table), Ok((Media::Json, Shape::Table)));
        assert_eq!(read("application/vnd.kubernetes.protobuf, */*"), Ok((Media::Protobuf, Shape::Object)));
        assert_eq!(read("text/html, application/yaml;q=0.1, application/json;q=0.5"), Ok((Media::Json, Shape::Object)));
        let partial = "application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
        assert_eq!(read(partial), Ok((Media::Json, Shape::Partial)));
        assert_eq!(read("text/html"), Err(406));
    }
}
