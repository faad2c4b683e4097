//! Where a pod may be: node selectors, required node affinity, taints and tolerations, as the scheduler, the kubelet and
//! the taint eviction all read them (upstream k8s.io/component-helpers/scheduling/corev1, v0.37). Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, Taint, Toleration};

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// Whether one requirement (`In`, `NotIn`, `Exists`, `DoesNotExist`, `Gt`, `Lt`) holds for the value of its key.
pub fn holds(operator: &str, value: Option<&String>, wanted: &[String]) -> bool {
    let number = |text: &String| text.parse::<i64>().ok();
    match (operator, value) {
        ("In", Some(value)) => wanted.contains(value),
        ("NotIn", Some(value)) => !wanted.contains(value),
        ("NotIn" | "DoesNotExist", None) | ("Exists", Some(_)) => true,
        ("Gt", Some(value)) => number(value).zip(wanted.first().and_then(number)).is_some_and(|(value, bound)| value > bound),
        ("Lt", Some(value)) => number(value).zip(wanted.first().and_then(number)).is_some_and(|(value, bound)| value < bound),
        _ => false,
    }
}

/// Whether a node matches a term of a node selector. An empty term matches nothing.
pub fn term_matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let empty = Labels::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let (expressions, fields) = (term.match_expressions.as_deref().unwrap_or_default(), term.match_fields.as_deref().unwrap_or_default());
    let requirement = |requirement: &NodeSelectorRequirement, value: Option<&String>| {
        holds(&requirement.operator, value, requirement.values.as_deref().unwrap_or_default())
    };
    (!expressions.is_empty() || !fields.is_empty())
        && expressions.iter().all(|one| requirement(one, labels.get(&one.key)))
        && fields.iter().all(|one| one.key == "metadata.name" && requirement(one, node.metadata.name.as_ref()))
}

/// Whether a node is one that the pod's nodeSelector and required node affinity allow.
pub fn node_allowed(pod: &Pod, node: &Node) -> bool {
    let Some(spec) = &pod.spec else { return true };
    let empty = Labels::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    if !spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value)) {
        return false;
    }
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    required.is_none_or(|required| required.node_selector_terms.iter().any(|term| term_matches(term, node)))
}

/// Whether a toleration tolerates a taint. The comparing operators (`Gt`, `Lt`) tolerate nothing: their feature is off.
pub fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    let key = toleration.key.as_deref().unwrap_or_default();
    if !effect.is_empty() && effect != taint.effect || !key.is_empty() && key != taint.key {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or_default() {
        "Exists" => true,
        "" | "Equal" => !key.is_empty() && toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default(),
        _ => false,
    }
}

/// The pod's tolerations.
pub fn tolerations(pod: &Pod) -> &[Toleration] {
    pod.spec.as_ref().and_then(|spec| spec.tolerations.as_deref()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn tolerations_tolerate() {
        let taint = |key: &str, value: &str, effect: &str| -> Taint {
            serde_json::from_value(json!({"key": key, "value": value, "effect": effect})).expect("a taint")
        };
        let check = |toleration: Value, taint: &Taint, expected: bool| {
            let parsed: Toleration = serde_json::from_value(toleration.clone()).expect("a toleration");
            assert_eq!(tolerates(&parsed, taint), expected, "{toleration} {taint:?}");
        };
        let taint = taint("k", "v", "NoExecute");
        check(json!({"operator": "Exists"}), &taint, true);
        check(json!({"key": "k", "operator": "Exists"}), &taint, true);
        check(json!({"key": "other", "operator": "Exists"}), &taint, false);
        check(json!({"key": "k", "value": "v"}), &taint, true);
        check(json!({"key": "k", "operator": "Equal", "value": "w"}), &taint, false);
        check(json!({"key": "k", "value": "v", "effect": "NoExecute"}), &taint, true);
        check(json!({"key": "k", "value": "v", "effect": "NoSchedule"}), &taint, false);
        check(json!({"value": "v"}), &taint, false);
        check(json!({"key": "k", "operator": "Gt", "value": "1"}), &taint, false);
    }
}
