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

    /// Two nodes alike but for their names and zones, `a` in 1 and `b` in 2.
    fn twins(pods: Vec<(&str, Arc<Pod>)>) -> Cache {
        cluster(vec![node("a", json!({ "zone": "1" }), json!({}), "8"), node("b", json!({ "zone": "2" }), json!({}), "8")], pods)
    }

    fn bound(spec: Value, cache: &Cache) -> String {
        match decide(pod("p", json!({ "app": "x" }), spec.clone()), cache) {
            Decision::Bind(node) => node,
            Decision::Unschedulable(text) => format!("{spec}: {text}"),
        }
    }

    #[test]
    fn wishes_weigh() {
        let zone = |value: &str| json!({ "matchExpressions": [{ "key": "zone", "operator": "In", "values": [value] }] });
        let wish = |weights: [i32; 2]| {
            json!({ "affinity": { "nodeAffinity": { "preferredDuringSchedulingIgnoredDuringExecution": [
                { "weight": weights[0], "preference": zone("1") }, { "weight": weights[1], "preference": zone("2") }] } } })
        };
        assert_eq!(bound(wish([10, 90]), &twins(Vec::new())), "b");
        assert_eq!(bound(wish([90, 10]), &twins(Vec::new())), "a");
        let near = |kind: &str, weights: [i32; 2]| {
            let term = |weight: i32, app: &str| json!({ "weight": weight, "podAffinityTerm": { "topologyKey": "zone", "labelSelector": { "matchLabels": { "app": app } } } });
            json!({ "affinity": { kind: { "preferredDuringSchedulingIgnoredDuringExecution": [
                term(weights[0], "one"), term(weights[1], "two")] } } })
        };
        let there = |app: &str| pod(app, json!({ "app": app }), json!({}));
        let cache = twins(vec![("a", there("one")), ("b", there("two"))]);
        assert_eq!(bound(near("podAffinity", [10, 90]), &cache), "b");
        assert_eq!(bound(near("podAffinity", [90, 10]), &cache), "a");
        assert_eq!(bound(near("podAntiAffinity", [10, 90]), &cache), "a");
        assert_eq!(bound(near("podAntiAffinity", [90, 10]), &cache), "b");
    }

    #[test]
    fn affinity_looks_into_other_namespaces_when_told() {
        let apart = |more: Value| {
            let mut term = json!({ "topologyKey": "zone", "labelSelector": { "matchLabels": { "app": "y" } } });
            term.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({ "affinity": { "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": [term] } },
                "nodeSelector": { "zone": "1" } })
        };
        let mut other = Pod::clone(&pod("other", json!({ "app": "y" }), json!({})));
        other.metadata.namespace = Some("other".to_owned());
        let mut cache = twins(vec![("a", Arc::new(other))]);
        cache.namespaces = BTreeMap::from([("other".to_owned(), BTreeMap::from([("team".to_owned(), "red".to_owned())]))]);
        let refused = |more: Value| bound(apart(more), &cache).contains("didn't match pod anti-affinity rules");
        assert!(!refused(json!({})), "its own namespace only");
        assert!(refused(json!({ "namespaces": ["other"] })));
        assert!(!refused(json!({ "namespaces": ["another"] })));
        assert!(refused(json!({ "namespaceSelector": { "matchLabels": { "team": "red" } } })));
        assert!(!refused(json!({ "namespaceSelector": { "matchLabels": { "team": "blue" } } })));
        assert!(refused(json!({ "namespaceSelector": {} })));
        assert!(!refused(json!({ "namespaces": ["other"], "topologyKey": "rack" })), "no node has that key");
    }

    #[test]
    fn spreading_counts_the_domains_that_it_is_told() {
        let one = |name: &str| pod(name, json!({ "app": "x" }), json!({}));
        let spread = |more: Value, spec: Value| {
            let mut constraint = json!({ "topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": { "matchLabels": { "app": "x" } } });
            constraint.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let mut spec = spec;
            spec["topologySpreadConstraints"] = json!([constraint]);
            spec
        };
        let even = || vec![("a", one("one")), ("b", one("two"))];
        let fits = |more: Value, spec: Value, cache: &Cache| ["a", "b"].contains(&bound(spread(more, spec), cache).as_str());
        assert!(fits(json!({}), json!({}), &twins(even())));
        assert!(!fits(json!({ "minDomains": 3 }), json!({}), &twins(even())), "the third domain is empty");
        assert!(fits(json!({ "minDomains": 3, "maxSkew": 2 }), json!({}), &twins(even())));
        assert_eq!(bound(spread(json!({}), json!({})), &twins(vec![("a", one("one"))])), "b");
        assert_eq!(bound(spread(json!({ "whenUnsatisfiable": "ScheduleAnyway" }), json!({})), &twins(vec![("a", one("one"))])), "b");
        assert_eq!(
            bound(spread(json!({ "whenUnsatisfiable": "ScheduleAnyway" }), json!({ "nodeSelector": { "zone": "1" } })), &twins(even())),
            "a"
        );
        // A third, empty zone that the pod may not use: by its affinity, by a taint.
        let nodes = |spec: Value| {
            let mut cache = twins(even());
            cache.set_node(Arc::new(node("c", json!({ "zone": "3" }), spec, "8")));
            cache
        };
        let only = json!({ "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": [
            { "matchExpressions": [{ "key": "zone", "operator": "In", "values": ["1", "2"] }] }] } } } });
        assert!(fits(json!({}), only.clone(), &nodes(json!({}))));
        assert!(!fits(json!({ "nodeAffinityPolicy": "Ignore" }), only, &nodes(json!({}))));
        let tainted = || nodes(json!({ "taints": [{ "key": "k", "effect": "NoSchedule" }] }));
        assert!(!fits(json!({}), json!({}), &tainted()));
        assert!(fits(json!({ "nodeTaintsPolicy": "Honor" }), json!({}), &tainted()));
    }
}
