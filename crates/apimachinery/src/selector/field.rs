//! Field selectors: `metadata.name=x,spec.nodeName!=y`, over the fields that each kind offers.
//!
//! Sources: k8s.io/apimachinery v0.37 `pkg/fields/selector.go`, kubernetes v1.37 `pkg/apis/core/v1/conversion.go` and the kinds' strategies.

use serde_json::Value;

use crate::KindFacts;
use crate::kinds;

/// One requirement.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Term {
    field: String,
    value: String,
    equal: bool,
}

/// A parsed field selector.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    terms: Vec<Term>,
}

/// Fields of every kind.
const META: &[&str] = &["metadata.name", "metadata.namespace"];

/// Fields of a kind, and whether the kind has a list of its own (its error text differs).
fn fields(kind: &KindFacts) -> (&'static [&'static str], bool) {
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Pod") => (
            &[
                "metadata.name",
                "metadata.namespace",
                "spec.nodeName",
                "spec.restartPolicy",
                "spec.schedulerName",
                "spec.serviceAccountName",
                "spec.hostNetwork",
                "status.phase",
                "status.podIP",
                "status.podIPs",
                "status.nominatedNodeName",
            ],
            true,
        ),
        ("", "Node") => (&["metadata.name", "spec.unschedulable"], true),
        ("", "Namespace") => (&["metadata.name", "status.phase"], true),
        ("", "Secret") => (&["metadata.name", "metadata.namespace", "type"], true),
        ("", "Service") => (&["metadata.name", "metadata.namespace", "spec.clusterIP", "spec.type"], true),
        ("", "Event") => (
            &[
                "involvedObject.kind",
                "involvedObject.namespace",
                "involvedObject.name",
                "involvedObject.uid",
                "involvedObject.apiVersion",
                "involvedObject.resourceVersion",
                "involvedObject.fieldPath",
                "reason",
                "reportingComponent",
                "source",
                "type",
                "metadata.name",
                "metadata.namespace",
            ],
            true,
        ),
        ("events.k8s.io", "Event") => (
            &[
                "regarding.kind",
                "regarding.namespace",
                "regarding.name",
                "regarding.uid",
                "regarding.apiVersion",
                "regarding.resourceVersion",
                "regarding.fieldPath",
                "reason",
                "reportingController",
                "type",
                "metadata.name",
                "metadata.namespace",
            ],
            true,
        ),
        _ => (META, false),
    }
}

/// Splits at commas that no backslash stands before.
fn split_terms(text: &str) -> Vec<&str> {
    let mut terms = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (at, letter) in text.char_indices() {
        match letter {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                terms.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    terms.push(&text[start..]);
    terms
}

fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\\' => match letters.next() {
                Some(escaped @ ('\\' | ',' | '=')) => out.push(escaped),
                Some(other) => return Err(format!("invalid field selector: invalid escape sequence: \\{other}")),
                None => return Err("invalid field selector: invalid escape sequence: \\".to_owned()),
            },
            ',' | '=' => return Err(format!("invalid field selector: unescaped character in value: {letter}")),
            other => out.push(other),
        }
    }
    Ok(out)
}

impl FieldSelector {
    /// Parses a selector for `kind`. The error is the message of a 400.
    pub fn parse(kind: &KindFacts, text: &str) -> Result<Self, String> {
        let mut parts = split_terms(text);
        parts.sort_unstable();
        let mut terms = Vec::new();
        for part in parts.into_iter().filter(|part| !part.is_empty()) {
            let Some(at) = part.find(['!', '=']).filter(|at| part[*at..].starts_with('=') || part[*at..].starts_with("!=")) else {
                return Err(format!("invalid selector: '{text}'; can't understand '{part}'"));
            };
            let (name, rest) = part.split_at(at);
            let (equal, value) = match rest.strip_prefix("!=") {
                Some(value) => (false, value),
                None => (true, rest.strip_prefix("==").unwrap_or(&rest[1..])),
            };
            terms.push(Term { field: name.to_owned(), value: unescape(value)?, equal });
        }
        let (known, own) = fields(kind);
        for term in &mut terms {
            if term.field == "spec.host" && kind.kind == "Pod" {
                "spec.nodeName".clone_into(&mut term.field);
            }
            if !known.contains(&term.field.as_str()) {
                return Err(if own {
                    format!("field label not supported: {}", term.field)
                } else {
                    format!("\"{}\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\"", term.field)
                });
            }
        }
        Ok(Self { terms })
    }

    /// Whether everything matches.
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    /// Whether an object of `kind` matches.
    pub fn matches(&self, kind: &KindFacts, object: &Value) -> bool {
        self.terms.iter().all(|term| (value_of(kind, &term.field, object) == term.value) == term.equal)
    }

    /// The value that a field must have, if the selector fixes one (`metadata.name` of single-object watches, `spec.nodeName` of kubelets).
    pub fn exact(&self, field: &str) -> Option<&str> {
        self.terms.iter().find(|term| term.equal && term.field == field).map(|term| term.value.as_str())
    }
}

/// A field's value as text; empty when it is absent.
pub fn value_of(kind: &KindFacts, field: &str, object: &Value) -> String {
    let is_event = kind.kind == "Event";
    let text = |path: &str| {
        let found = path.split('.').try_fold(object, |value, key| value.get(key));
        match found {
            Some(Value::String(text)) => text.clone(),
            None | Some(Value::Null) => String::new(),
            Some(other) => other.to_string(),
        }
    };
    match field {
        // Booleans of Go are never absent.
        "spec.unschedulable" | "spec.hostNetwork" => {
            if text(field) == "true" {
                "true".to_owned()
            } else {
                "false".to_owned()
            }
        }
        "status.podIPs" => {
            let list = object.pointer("/status/podIPs").and_then(Value::as_array);
            let ips = list.into_iter().flatten().filter_map(|item| item.get("ip")?.as_str());
            ips.collect::<Vec<_>>().join(",")
        }
        // An event's source is its component, else the controller that reported it.
        "source" if is_event => {
            Some(text("source.component")).filter(|text| !text.is_empty()).unwrap_or_else(|| text("reportingComponent"))
        }
        other => text(other),
    }
}

/// Parses for a kind given by its resource; for tests and callers without facts at hand.
pub fn parse_for(group: &str, version: &str, resource: &str, text: &str) -> Result<FieldSelector, String> {
    let kind = kinds::by_resource(group, version, resource).ok_or_else(|| format!("unknown resource {resource}"))?;
    FieldSelector::parse(kind, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn matches() {
        let pods = kinds::by_resource("", "v1", "pods").expect("served");
        let pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}});
        for (text, want) in [
            ("", true),
            ("metadata.name=p", true),
            ("metadata.name==p,spec.nodeName!=m", true),
            ("spec.nodeName=", false),
            ("status.phase!=Running", false),
            ("spec.host=n", true),
            ("spec.hostNetwork=false", true),
        ] {
            assert_eq!(FieldSelector::parse(pods, text).expect(text).matches(pods, &pod), want, "{text}");
        }
        let selector = FieldSelector::parse(pods, "metadata.name=p").expect("valid");
        assert_eq!(selector.exact("metadata.name"), Some("p"));
    }

    /// Recorded from kube-apiserver v1.37.2.
    #[test]
    fn errors_read_as_upstream() {
        for (group, resource, text, want) in [
            ("", "pods", "foo=bar", "field label not supported: foo"),
            ("", "configmaps", "foo=bar", "\"foo\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\""),
            ("", "pods", "foo", "invalid selector: 'foo'; can't understand 'foo'"),
            ("events.k8s.io", "events", "involvedObject.name=x", "field label not supported: involvedObject.name"),
        ] {
            assert_eq!(parse_for(group, "v1", resource, text).expect_err(text), want);
        }
    }
}
