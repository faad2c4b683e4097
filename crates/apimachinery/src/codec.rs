//! Encodings of objects: protobuf, JSON and YAML, with upstream's errors for what cannot be read.

pub mod protobuf;
pub mod strict;

use serde_json::Value;

use crate::kinds::Gvk;
use crate::normalize::normalize;
use crate::schema::{TypeId, schema};
use crate::status::Status;
use crate::tree::Tree;

/// A body's encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Media {
    /// `application/json`.
    Json,
    /// `application/yaml`.
    Yaml,
    /// `application/vnd.kubernetes.protobuf`.
    Protobuf,
}

impl Media {
    /// From a media type without parameters.
    pub fn parse(media_type: &str) -> Option<Self> {
        match media_type {
            "application/json" => Some(Self::Json),
            "application/yaml" => Some(Self::Yaml),
            "application/vnd.kubernetes.protobuf" => Some(Self::Protobuf),
            _ => None,
        }
    }

    /// The media type.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Yaml => "application/yaml",
            Self::Protobuf => "application/vnd.kubernetes.protobuf",
        }
    }
}

/// A decoded body.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// The object in canonical form, its apiVersion and kind set.
    pub object: Value,
    /// What strict decoding objects to, in document order: `unknown field "spec.foo"`, `duplicate field "spec.x"`.
    pub strict: Vec<String>,
}

impl Decoded {
    /// The 400 of `fieldValidation=Strict`, if there is anything to object to.
    pub fn strict_error(&self, gvk: &Gvk) -> Option<Status> {
        let list = self.strict.join(", ");
        (!self.strict.is_empty()).then(|| cannot_handle(gvk, &gvk.kind, &format!("strict decoding error: {list}")))
    }
}

fn cannot_handle(found: &Gvk, wanted: &str, why: &str) -> Status {
    Status::bad_request(format!("{} in version \"{}\" cannot be handled as a {wanted}: {why}", found.kind, found.version))
}

fn unrecognized(body: &[u8], wanted: &Gvk, why: &str) -> Status {
    let summary = match body {
        [] => "<empty>".to_owned(),
        [b'{', ..] if body.len() > 30 => format!("{} ...", String::from_utf8_lossy(&body[..30])),
        [b'{', ..] => String::from_utf8_lossy(body).into_owned(),
        _ => {
            let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            if body.len() > 30 { format!("{} ...", hex(&body[..30])) } else { hex(body) }
        }
    };
    Status::bad_request(format!("the object provided is unrecognized (must be of type {}): {why} ({summary})", wanted.kind))
}

/// Decodes the body of a request that must hold a `wanted`. A body without apiVersion or kind is taken to be one.
///
/// Source of the texts: k8s.io/apiserver v0.37 `pkg/endpoints/handlers/rest.go`, `transformDecodeError`.
pub fn decode(media: Media, body: &[u8], wanted: &Gvk) -> Result<Decoded, Status> {
    let id = schema()
        .by_kind(&wanted.group, &wanted.version, &wanted.kind)
        .ok_or_else(|| Status::internal(format!("kind {wanted} has no schema")))?;
    if media == Media::Protobuf {
        return decode_protobuf(body, wanted);
    }
    let parsed = match media {
        Media::Yaml => strict::parse_yaml(body, id),
        _ => strict::parse_json(body, id),
    };
    let strict::Parsed { mut value, errors } = parsed.map_err(|why| {
        let text = format!("couldn't get version/kind; json parse error: {why}");
        unrecognized(body, wanted, &text)
    })?;
    let gvk = adopt_kind(&mut value, body, wanted)?;
    check_kind(&gvk, wanted)?;
    normalize(id, &mut value).map_err(|error| cannot_handle(&gvk, &wanted.kind, &error.to_string()))?;
    Ok(Decoded { object: value, strict: errors })
}

fn decode_protobuf(body: &[u8], wanted: &Gvk) -> Result<Decoded, Status> {
    let (gvk, object) = protobuf::decode_or(body, Some(wanted)).map_err(|error| match &error {
        protobuf::Error::UnknownKind { kind, version } => {
            let found = Gvk::new(version, kind);
            cannot_handle(&found, &wanted.kind, &not_registered(&found))
        }
        other => unrecognized(body, wanted, &other.to_string()),
    })?;
    check_kind(&gvk, wanted)?;
    Ok(Decoded { object, strict: Vec::new() })
}

fn not_registered(found: &Gvk) -> String {
    format!("no kind \"{}\" is registered for version \"{}\" in scheme \"pkg/runtime/scheme.go:111\"", found.kind, found.api_version())
}

/// Gives the value the wanted apiVersion and kind where it has none, and says what it is.
fn adopt_kind(value: &mut Value, body: &[u8], wanted: &Gvk) -> Result<Gvk, Status> {
    // Go takes null for an object in which nothing is set.
    if value.is_null() {
        *value = Value::Object(serde_json::Map::new());
    }
    let Value::Object(map) = value else {
        let found = match value {
            Value::Array(_) => "array",
            Value::String(_) => "string",
            Value::Number(_) => "number",
            _ => "bool",
        };
        let why = format!(
            "couldn't get version/kind; json parse error: json: cannot unmarshal {found} into Go value of type struct {{ APIVersion string \
             \"json:\\\"apiVersion,omitempty\\\"\"; Kind string \"json:\\\"kind,omitempty\\\"\" }}"
        );
        return Err(unrecognized(body, wanted, &why));
    };
    let text = |map: &serde_json::Map<String, Value>, key: &str| match map.get(key) {
        Some(Value::String(text)) if !text.is_empty() => Ok(Some(text.clone())),
        None | Some(Value::Null | Value::String(_)) => Ok(None),
        Some(_) => Err(unrecognized(body, wanted, &format!("couldn't get version/kind; json parse error: field {key} is no string"))),
    };
    let api_version = text(map, "apiVersion")?.unwrap_or_else(|| wanted.api_version());
    let kind = text(map, "kind")?.unwrap_or_else(|| wanted.kind.clone());
    map.insert("apiVersion".to_owned(), api_version.clone().into());
    map.insert("kind".to_owned(), kind.clone().into());
    Ok(Gvk::new(&api_version, &kind))
}

fn check_kind(found: &Gvk, wanted: &Gvk) -> Result<(), Status> {
    // Options belong to every group and version.
    let any_group = matches!(wanted.kind.as_str(), "DeleteOptions");
    if found == wanted || (any_group && found.kind == wanted.kind) {
        return Ok(());
    }
    if schema().by_kind(&found.group, &found.version, &found.kind).is_none() {
        return Err(cannot_handle(found, &wanted.kind, &not_registered(found)));
    }
    let internal = |gvk: &Gvk| match gvk.group.split('.').next().unwrap_or("") {
        "" => "core".to_owned(),
        group => group.to_owned(),
    };
    let why = format!("converting ({}.{}) to ({}.{}): unknown conversion", found.version, found.kind, internal(wanted), wanted.kind);
    Err(cannot_handle(found, &wanted.kind, &why))
}

/// Encodes an object of kind `gvk`.
pub fn encode(media: Media, gvk: &Gvk, object: &Value) -> Result<Vec<u8>, Status> {
    encode_tree(media, gvk, &Tree::from(object))
}

/// The same of a document.
pub fn encode_tree(media: Media, gvk: &Gvk, object: &Tree<'_>) -> Result<Vec<u8>, Status> {
    match media {
        Media::Json => serde_json::to_vec(object).map_err(|error| Status::internal(error.to_string())),
        Media::Yaml => serde_yaml_ng::to_string(object).map(String::into_bytes).map_err(|error| Status::internal(error.to_string())),
        Media::Protobuf => protobuf::encode_tree(gvk, object).map_err(|error| Status::internal(error.to_string())),
    }
}

/// The canonical form of a patched object, or upstream's 422 for what does not fit. `patch` is the patch as text.
pub fn refit(id: TypeId, object: &mut Value, patch: &str) -> Result<(), Status> {
    normalize(id, object).map_err(|error| Status::invalid_patch(patch, &error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(body: &str) -> Result<Decoded, String> {
        decode(Media::Json, body.as_bytes(), &Gvk::new("v1", "Pod")).map_err(|status| status.message)
    }

    /// Recorded from kube-apiserver v1.37.2.
    #[test]
    fn refusals_read_as_upstream() {
        for (body, want) in [
            (
                r#"{"apiVersion":"v1","kind":"Pod""#,
                "the object provided is unrecognized (must be of type Pod): couldn't get version/kind; json parse error: unexpected end of \
                 JSON input ({\"apiVersion\":\"v1\",\"kind\":\"Pod ...)",
            ),
            (
                "",
                "the object provided is unrecognized (must be of type Pod): couldn't get version/kind; json parse error: unexpected end of \
                 JSON input (<empty>)",
            ),
            (
                r#"{"apiVersion":"v1","kind":"Foo"}"#,
                "Foo in version \"v1\" cannot be handled as a Pod: no kind \"Foo\" is registered for version \"v1\" in scheme \
                 \"pkg/runtime/scheme.go:111\"",
            ),
            (
                r#"{"apiVersion":"apps/v1","kind":"Deployment"}"#,
                "Deployment in version \"v1\" cannot be handled as a Pod: converting (v1.Deployment) to (core.Pod): unknown conversion",
            ),
            (
                r#"{"apiVersion":"v1","kind":"Pod","spec":{"containers":{}}}"#,
                "Pod in version \"v1\" cannot be handled as a Pod: json: cannot unmarshal object into Go struct field \
                 PodSpec.spec.containers of type []v1.Container",
            ),
            (
                r#"{"apiVersion":"v1","kind":"Pod","spec":{"priority":1.5}}"#,
                "Pod in version \"v1\" cannot be handled as a Pod: json: cannot unmarshal number 1.5 into Go struct field \
                 PodSpec.spec.priority of type int32",
            ),
            (
                r#"{"apiVersion":"v1","kind":"Pod","metadata":{"labels":{"a":1}}}"#,
                "Pod in version \"v1\" cannot be handled as a Pod: json: cannot unmarshal number into Go struct field \
                 ObjectMeta.metadata.labels of type string",
            ),
            (
                r#"{"apiVersion":"v1","kind":"Pod","metadata":{"creationTimestamp":"x"}}"#,
                "Pod in version \"v1\" cannot be handled as a Pod: parsing time \"x\" as \"2006-01-02T15:04:05Z07:00\": cannot parse \"x\" as \
                 \"2006\"",
            ),
            (
                r#"{"apiVersion":"v1","kind":"Pod","spec":"x"}"#,
                "Pod in version \"v1\" cannot be handled as a Pod: json: cannot unmarshal string into Go struct field Pod.spec of type \
                 v1.PodSpec",
            ),
            (
                "[]",
                "the object provided is unrecognized (must be of type Pod): couldn't get version/kind; json parse error: json: cannot \
                 unmarshal array into Go value of type struct { APIVersion string \"json:\\\"apiVersion,omitempty\\\"\"; Kind string \
                 \"json:\\\"kind,omitempty\\\"\" } (5b5d)",
            ),
        ] {
            assert_eq!(pod(body).expect_err(body), want);
        }
    }

    #[test]
    fn strict_errors_read_as_upstream() {
        let body = r#"{"metadata":{"name":"p"},"spec":{"foo":1,"containers":[{"name":"c","image":"i","bar":2,"name":"d"}]}}"#;
        let decoded = pod(body).expect("decodes");
        assert_eq!(
            decoded.strict_error(&Gvk::new("v1", "Pod")).expect("errors").message,
            "Pod in version \"v1\" cannot be handled as a Pod: strict decoding error: unknown field \"spec.foo\", unknown field \
             \"spec.containers[0].bar\", duplicate field \"spec.containers[0].name\""
        );
        assert_eq!(decoded.object["spec"]["containers"][0]["name"], "d");
        assert_eq!(decoded.object["kind"], "Pod");
    }

    #[test]
    fn yaml() {
        let body =
            b"apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  labels: {1: 'x'}\nspec:\n  containers:\n  - name: c\n    image: i\n";
        let decoded = decode(Media::Yaml, body, &Gvk::new("v1", "Pod")).expect("decodes");
        assert_eq!(decoded.object["metadata"]["labels"]["1"], "x");
        assert!(decoded.strict.is_empty());
        assert!(decode(Media::Yaml, b"a: [", &Gvk::new("v1", "Pod")).is_err());
    }
}
