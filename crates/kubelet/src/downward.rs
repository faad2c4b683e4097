//! The downward API: fields and resources of a pod as text
//! (upstream pkg/fieldpath, pkg/api/v1/resource, v1.37). Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::model;
use crate::quantity;

/// What is known of the node and the pod's network.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The pod's addresses, the primary one first.
    pub pod_ips: Vec<String>,
    /// The node's addresses, the primary one first.
    pub host_ips: Vec<String>,
    /// What pods may use of the node; limits that are not set default to it.
    pub allocatable: BTreeMap<String, Quantity>,
}

/// A reference that cannot be resolved.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// No such field.
    #[error("unsupported fieldPath: {0}")]
    Field(String),
    /// No such resource.
    #[error("unsupported container resource : {0}")]
    Resource(String),
    /// No such container.
    #[error("container {0} not found")]
    Container(String),
}

/// The value of a `fieldRef` (both of environment variables and of volumes).
pub fn field(pod: &Pod, facts: &Facts, path: &str) -> Result<String, Error> {
    let spec = pod.spec.as_ref();
    if let Some((field, key)) = subscript(path) {
        let map = match field {
            "metadata.labels" => pod.metadata.labels.as_ref(),
            "metadata.annotations" => pod.metadata.annotations.as_ref(),
            _ => return Err(Error::Field(path.to_owned())),
        };
        return Ok(map.and_then(|m| m.get(key)).cloned().unwrap_or_default());
    }
    let text = |s: Option<&str>| Ok(s.unwrap_or("").to_owned());
    match path {
        "metadata.name" => text(pod.metadata.name.as_deref()),
        "metadata.namespace" => text(pod.metadata.namespace.as_deref()),
        "metadata.uid" => text(pod.metadata.uid.as_deref()),
        "metadata.labels" => Ok(format_map(pod.metadata.labels.as_ref())),
        "metadata.annotations" => Ok(format_map(pod.metadata.annotations.as_ref())),
        "spec.nodeName" => text(spec.and_then(|s| s.node_name.as_deref())),
        "spec.serviceAccountName" => text(spec.and_then(|s| s.service_account_name.as_deref())),
        "status.hostIP" => text(facts.host_ips.first().map(String::as_str)),
        "status.hostIPs" => Ok(facts.host_ips.join(",")),
        "status.podIP" => text(facts.pod_ips.first().map(String::as_str)),
        "status.podIPs" => Ok(facts.pod_ips.join(",")),
        _ => Err(Error::Field(path.to_owned())),
    }
}

/// The value of a `resourceFieldRef`; `own` is the container that refers (volumes have none and name one).
pub fn resource(pod: &Pod, own: Option<&Container>, facts: &Facts, selector: &ResourceFieldSelector) -> Result<String, Error> {
    let named = selector.container_name.as_deref().filter(|n| !n.is_empty());
    let container = match named {
        Some(name) => model::container_spec(pod, name).or(own.filter(|c| c.name == name)),
        None => own,
    };
    let container = container.ok_or_else(|| Error::Container(named.unwrap_or_default().to_owned()))?;
    let unsupported = || Error::Resource(selector.resource.clone());
    let (list, name) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    let known = matches!(name, "cpu" | "memory" | "ephemeral-storage");
    if !known && !name.starts_with("hugepages-") {
        return Err(unsupported());
    }
    let resources = container.resources.as_ref();
    let limits = resources.and_then(|r| r.limits.as_ref());
    let requests = resources.and_then(|r| r.requests.as_ref());
    let quantity = match list {
        "limits" => limits.and_then(|l| l.get(name)).or_else(|| facts.allocatable.get(name)),
        "requests" => requests.and_then(|l| l.get(name)).or_else(|| limits.and_then(|l| l.get(name))),
        _ => return Err(unsupported()),
    };
    let divisor = selector.divisor.as_ref();
    let read = |q: &Quantity| {
        if name == "cpu" { quantity::milli_value(q) } else { quantity::value(q) }
    };
    let unit = if name == "cpu" { 1000 } else { 1 };
    let divisor = divisor.and_then(read).filter(|d| *d > 0).unwrap_or(unit);
    let amount = quantity.and_then(read).unwrap_or(0);
    Ok((amount + divisor - 1).div_euclid(divisor).to_string())
}

/// `metadata.labels['key']` as (field, key).
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (field, rest) = path.split_once("['")?;
    Some((field, rest.strip_suffix("']")?))
}

/// One `key="value"` a line, by key, values quoted as Go quotes.
fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> = map.into_iter().flatten().map(|(key, value)| format!("{key}={}", go_quote(value))).collect();
    lines.join("\n")
}

/// A string as Go's `%q` prints it.
fn go_quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => {
                out.push_str(&format!("\\x{:02x}", c as u32));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"a": "x\"y", "b": "1"}},
            "spec": {"nodeName": "node", "containers": [
                {"name": "c", "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}}}]}
        }))
        .expect("a literal pod")
    }

    #[test]
    fn fields_and_resources() {
        let facts = Facts { allocatable: BTreeMap::from([("ephemeral-storage".into(), Quantity("10Gi".into()))]), ..Facts::default() };
        let field = |path: &str| field(&pod(), &facts, path);
        assert_eq!(field("metadata.labels").as_deref(), Ok("a=\"x\\\"y\"\nb=\"1\""));
        assert_eq!(field("metadata.labels['b']").as_deref(), Ok("1"));
        assert_eq!(field("spec.nodeName").as_deref(), Ok("node"));
        assert!(field("spec.containers").is_err());
        for (name, divisor, expected) in [
            ("limits.cpu", "0", "2"),
            ("requests.cpu", "1m", "1500"),
            ("limits.memory", "1Mi", "64"),
            ("limits.ephemeral-storage", "1Gi", "10"),
        ] {
            let selector =
                ResourceFieldSelector { container_name: Some("c".into()), resource: name.into(), divisor: Some(Quantity(divisor.into())) };
            let got = resource(&pod(), None, &facts, &selector);
            assert_eq!(got.as_deref(), Ok(expected), "{name}");
        }
    }
}
