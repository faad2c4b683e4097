//! Selectors over labels: of pods, of nodes, and of pods in other namespaces.

use std::collections::BTreeMap;

use client::placement::holds;
pub use client::placement::{Labels, node_allowed, term_matches};
use k8s_openapi::api::core::v1::{Pod, PodAffinityTerm};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

/// Whether labels match a selector; one that is empty matches all, one that is missing none.
pub fn selects(selector: Option<&LabelSelector>, labels: &Labels) -> bool {
    let Some(selector) = selector else { return false };
    let equal = selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    equal
        && selector
            .match_expressions
            .iter()
            .flatten()
            .all(|expression| holds(&expression.operator, labels.get(&expression.key), expression.values.as_deref().unwrap_or_default()))
}

/// Whether a pod is one that an affinity term of `owner` means; `namespaces` are the labels of all namespaces.
pub fn affinity_term_matches(term: &PodAffinityTerm, owner: &Pod, pod: &Pod, namespaces: &BTreeMap<String, Labels>) -> bool {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let named = term.namespaces.as_deref().unwrap_or_default();
    let in_scope = match (&term.namespace_selector, named) {
        (None, []) => owner.metadata.namespace.as_deref().unwrap_or_default() == namespace,
        (selector, named) => {
            named.iter().any(|name| name == namespace)
                || selector.is_some() && selects(selector.as_ref(), namespaces.get(namespace).unwrap_or(&Labels::new()))
        }
    };
    in_scope && selects(term.label_selector.as_ref(), pod.metadata.labels.as_ref().unwrap_or(&Labels::new()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Node;
    use serde_json::{Value, json};

    fn node(labels: Value) -> Node {
        serde_json::from_value(json!({ "metadata": { "name": "n", "labels": labels } })).unwrap()
    }

    #[test]
    fn node_selectors() {
        let allowed = |spec: Value, labels: Value| {
            let pod: Pod = serde_json::from_value(json!({ "spec": spec })).unwrap();
            node_allowed(&pod, &node(labels))
        };
        let affinity = |term: Value| json!({ "containers": [], "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": [term] } } } });
        let one = |operator: &str, values: Value| {
            affinity(json!({ "matchExpressions": [{ "key": "a", "operator": operator, "values": values }] }))
        };
        assert!(allowed(json!({ "containers": [], "nodeSelector": { "a": "1" } }), json!({ "a": "1" })));
        assert!(!allowed(json!({ "containers": [], "nodeSelector": { "a": "1" } }), json!({})));
        for (operator, values, labels, wanted) in [
            ("In", json!(["1"]), json!({ "a": "1" }), true),
            ("In", json!(["1"]), json!({}), false),
            ("NotIn", json!(["1"]), json!({}), true),
            ("Exists", json!([]), json!({ "a": "x" }), true),
            ("DoesNotExist", json!([]), json!({ "a": "x" }), false),
            ("Gt", json!(["5"]), json!({ "a": "7" }), true),
            ("Lt", json!(["5"]), json!({ "a": "7" }), false),
            ("Gt", json!(["5"]), json!({ "a": "x" }), false),
        ] {
            assert_eq!(allowed(one(operator, values), labels.clone()), wanted, "{operator} {labels}");
        }
        assert!(!allowed(affinity(json!({})), json!({})));
        assert!(allowed(affinity(json!({ "matchFields": [{ "key": "metadata.name", "operator": "In", "values": ["n"] }] })), json!({})));
    }
}
