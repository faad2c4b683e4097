//! Where a pod goes: a pure function of the pod and the cluster.

use std::collections::BTreeMap;

use crate::cache::{Cache, NodeInfo, PodInfo};
use crate::filter::Filters;
use crate::score::scores;

/// What is decided for a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Bind it to this node.
    Bind(String),
    /// No node can take it: the text of its event and condition.
    Unschedulable(String),
}

/// Decides. Of equally good nodes, `tie` (any number) chooses.
pub fn decide(pod: &PodInfo, cache: &Cache, tie: usize) -> Decision {
    let filters = Filters::new(pod, cache);
    let mut refused: BTreeMap<String, usize> = BTreeMap::new();
    let mut feasible: Vec<&NodeInfo> = Vec::new();
    for node in cache.nodes() {
        let reasons = filters.refuse(node);
        if reasons.is_empty() {
            feasible.push(node);
        }
        for reason in reasons {
            *refused.entry(reason).or_default() += 1;
        }
    }
    match feasible.as_slice() {
        [] => Decision::Unschedulable(explain(cache.nodes().count(), &refused)),
        [only] => Decision::Bind(only.name().to_owned()),
        _ => {
            let scores = scores(pod, &feasible, cache);
            let best = scores.iter().max().copied().unwrap_or(0);
            let best: Vec<&&NodeInfo> = feasible.iter().zip(&scores).filter(|(_, score)| **score == best).map(|(node, _)| node).collect();
            Decision::Bind(best[tie % best.len()].name().to_owned())
        }
    }
}

/// Upstream's text (`pkg/scheduler/framework/types.go`: `FitError`).
fn explain(nodes: usize, refused: &BTreeMap<String, usize>) -> String {
    if nodes == 0 {
        return "no nodes available to schedule pods".to_owned();
    }
    let mut reasons: Vec<String> = refused.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    reasons.sort();
    format!("0/{nodes} nodes are available: {}.", reasons.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{Node, Pod};
    use serde_json::{Value, json};
    use std::sync::Arc;

    fn node(name: &str, labels: Value, spec: Value, cpu: &str) -> Node {
        let mut labels = labels;
        labels["kubernetes.io/hostname"] = json!(name);
        serde_json::from_value(json!({ "metadata": { "name": name, "labels": labels }, "spec": spec,
            "status": { "allocatable": { "cpu": cpu, "memory": "8Gi", "pods": "10" } } }))
        .unwrap()
    }

    fn pod(name: &str, labels: Value, spec: Value) -> Arc<Pod> {
        let mut spec = spec;
        if spec.get("containers").is_none() {
            spec["containers"] = json!([{ "name": "c", "resources": { "requests": { "cpu": "1" } } }]);
        }
        Arc::new(
            serde_json::from_value(json!({ "metadata": { "namespace": "ns", "name": name, "labels": labels }, "spec": spec })).unwrap(),
        )
    }

    fn cluster(nodes: Vec<Node>, pods: Vec<(&str, Arc<Pod>)>) -> Cache {
        let mut cache = Cache::default();
        nodes.into_iter().for_each(|node| cache.set_node(Arc::new(node)));
        pods.into_iter().for_each(|(node, pod)| cache.set_pod(node, pod));
        cache
    }

    fn decide(pod: Arc<Pod>, cache: &Cache) -> Decision {
        super::decide(&PodInfo::new(pod), cache, 0)
    }

    fn unschedulable(text: &str) -> Decision {
        Decision::Unschedulable(text.to_owned())
    }

    #[test]
    fn every_filter_says_why() {
        let plain = || node("a", json!({}), json!({}), "4");
        let full = pod(
            "full",
            json!({}),
            json!({ "containers": [{ "name": "c", "ports": [{ "containerPort": 80, "hostPort": 80 }],
            "resources": { "requests": { "cpu": "3500m" } } }] }),
        );
        let cache = cluster(vec![plain()], vec![("a", full)]);
        assert_eq!(decide(pod("p", json!({}), json!({})), &cache), unschedulable("0/1 nodes are available: 1 Insufficient cpu."));
        let port = json!({ "containers": [{ "name": "c", "ports": [{ "containerPort": 8080, "hostPort": 80, "hostIP": "127.0.0.1" }] }] });
        assert_eq!(
            decide(pod("p", json!({}), port), &cache),
            unschedulable("0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports.")
        );
        let selector = json!({ "nodeSelector": { "disk": "ssd" } });
        let tainted = node("b", json!({ "disk": "ssd" }), json!({ "taints": [{ "key": "k", "value": "v", "effect": "NoSchedule" }] }), "4");
        let cordoned = node("c", json!({ "disk": "ssd" }), json!({ "unschedulable": true }), "4");
        let cache = cluster(vec![plain(), tainted, cordoned], Vec::new());
        assert_eq!(
            decide(pod("p", json!({}), selector.clone()), &cache),
            unschedulable(
                "0/3 nodes are available: 1 node(s) didn't match Pod's node affinity/selector, 1 node(s) had untolerated taint(s), 1 node(s) were unschedulable."
            )
        );
        let mut tolerant = selector;
        tolerant["tolerations"] = json!([{ "key": "k", "operator": "Exists" }]);
        assert_eq!(decide(pod("p", json!({}), tolerant), &cache), Decision::Bind("b".into()));
        assert_eq!(decide(pod("p", json!({}), json!({})), &Cache::default()), unschedulable("no nodes available to schedule pods"));
    }

    #[test]
    fn pods_keep_together_and_apart() {
        let nodes = || vec![node("a", json!({ "zone": "1" }), json!({}), "8"), node("b", json!({ "zone": "2" }), json!({}), "8")];
        let term = |kind: &str| {
            json!({ "affinity": { kind: { "requiredDuringSchedulingIgnoredDuringExecution": [
                { "topologyKey": "zone", "labelSelector": { "matchLabels": { "app": "x" } } }] } } })
        };
        let there = pod("there", json!({ "app": "x" }), json!({}));
        let cache = cluster(nodes(), vec![("a", there.clone())]);
        assert_eq!(decide(pod("p", json!({}), term("podAffinity")), &cache), Decision::Bind("a".into()));
        assert_eq!(decide(pod("p", json!({}), term("podAntiAffinity")), &cache), Decision::Bind("b".into()));
        // The first of a kind that wants its own kind near goes anywhere; one that wants others near goes nowhere.
        let empty = cluster(nodes(), Vec::new());
        assert!(matches!(decide(pod("p", json!({ "app": "x" }), term("podAffinity")), &empty), Decision::Bind(_)));
        assert_eq!(
            decide(pod("p", json!({}), term("podAffinity")), &empty),
            unschedulable("0/2 nodes are available: 2 node(s) didn't match pod affinity rules.")
        );
        // What is there does not want the newcomer.
        let shy = pod("shy", json!({}), term("podAntiAffinity"));
        let cache = cluster(nodes(), vec![("a", shy)]);
        assert_eq!(decide(pod("p", json!({ "app": "x" }), json!({})), &cache), Decision::Bind("b".into()));
    }

    #[test]
    fn pods_are_spread() {
        let nodes = vec![node("a", json!({ "zone": "1" }), json!({}), "8"), node("b", json!({ "zone": "2" }), json!({}), "1")];
        let constraint = json!({ "topologySpreadConstraints": [{ "topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": { "matchLabels": { "app": "x" } } }] });
        let one = pod("one", json!({ "app": "x" }), json!({}));
        let filler = pod("filler", json!({}), json!({}));
        let cache = cluster(nodes, vec![("a", one), ("b", filler)]);
        assert_eq!(
            decide(pod("p", json!({ "app": "x" }), constraint), &cache),
            unschedulable("0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match pod topology spread constraints.")
        );
    }

    #[test]
    fn the_emptier_node_is_better() {
        let nodes = vec![node("a", json!({}), json!({}), "8"), node("b", json!({}), json!({}), "8")];
        let cache = cluster(nodes, vec![("a", pod("one", json!({}), json!({})))]);
        assert_eq!(decide(pod("p", json!({}), json!({})), &cache), Decision::Bind("b".into()));
    }
}
