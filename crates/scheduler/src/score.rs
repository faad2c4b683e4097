//! Scores: which of the nodes that a pod can run on is best, with upstream's formulas and weights
//! (`pkg/scheduler/framework/plugins`, `pkg/scheduler/apis/config/v1/default_plugins.go`, v1.37).

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::{Pod, PodAffinityTerm, TopologySpreadConstraint, WeightedPodAffinityTerm};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::cache::{Cache, NodeInfo, PodInfo, normalized_image};
use crate::filter::{counts_for, intolerable_preferences, matching_pods};
use crate::labels::{affinity_term_matches, selects, term_matches};

/// The best score of one plugin.
const MAX: i64 = 100;
const HOSTNAME: &str = "kubernetes.io/hostname";
const ZONE: &str = "topology.kubernetes.io/zone";
/// Images smaller than this together do not count; a container's image counts up to the second bound, in bytes.
const IMAGE_BYTES_MIN: i64 = 23 << 20;
const IMAGE_BYTES_MAX: i64 = 1000 << 20;

/// The total score of each of the nodes, in their order.
pub fn scores(pod: &PodInfo, feasible: &[&NodeInfo], cache: &Cache) -> Vec<i64> {
    let each = |score: &dyn Fn(&NodeInfo) -> i64| -> Vec<i64> { feasible.iter().map(|node| score(node)).collect() };
    let plugins: [(i64, Vec<i64>); 7] = [
        (3, normalize(each(&|node| intolerable_preferences(&pod.pod, node)), true)),
        (2, normalize(each(&|node| preferred_terms(&pod.pod, node)), false)),
        (1, each(&|node| least_allocated(pod, node))),
        (2, spread(&pod.pod, feasible, cache)),
        (2, pod_affinity(&pod.pod, feasible, cache)),
        (1, each(&|node| balanced(pod, node))),
        (1, each(&|node| images(&pod.pod, node, cache))),
    ];
    let total = |index: usize| plugins.iter().map(|(weight, scores)| weight * scores[index]).sum();
    (0..feasible.len()).map(total).collect()
}

/// To 0..100 by the largest; reversed where less is better (upstream: `helper.DefaultNormalizeScore`).
fn normalize(mut scores: Vec<i64>, reverse: bool) -> Vec<i64> {
    let max = scores.iter().copied().max().unwrap_or(0);
    for score in &mut scores {
        *score = if max == 0 { 0 } else { *score * MAX / max };
        if reverse {
            *score = MAX - *score;
        }
    }
    scores
}

fn preferred_terms(pod: &Pod, node: &NodeInfo) -> i64 {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref()).and_then(|affinity| affinity.node_affinity.as_ref());
    let terms = affinity.and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_ref());
    terms.into_iter().flatten().filter(|term| term_matches(&term.preference, &node.node)).map(|term| i64::from(term.weight)).sum()
}

fn least_allocated(pod: &PodInfo, node: &NodeInfo) -> i64 {
    let (mut sum, mut weights) = (0, 0);
    for name in ["cpu", "memory"] {
        let (capacity, requested) = (node.allocatable.get(name), node.scored.get(name) + pod.scored.get(name));
        if capacity > 0 {
            sum += if requested > capacity { 0 } else { (capacity - requested) * MAX / capacity };
            weights += 1;
        }
    }
    if weights == 0 { 0 } else { sum / weights }
}

fn balanced(pod: &PodInfo, node: &NodeInfo) -> i64 {
    if ["cpu", "memory"].iter().all(|name| pod.requests.get(name) == 0) {
        return 0;
    }
    let balance = |with_pod: bool| {
        let fractions: Vec<f64> = ["cpu", "memory"]
            .iter()
            .filter(|name| node.allocatable.get(name) > 0)
            .map(|name| {
                let requested = node.requested.get(name) + if with_pod { pod.requests.get(name) } else { 0 };
                (requested as f64 / node.allocatable.get(name) as f64).min(1.0)
            })
            .collect();
        let deviation = match fractions.as_slice() {
            [one, other] => ((one - other) / 2.0).abs(),
            _ => 0.0,
        };
        ((1.0 - deviation) * MAX as f64) as i64
    };
    MAX / 2 + (MAX / 2 + balance(true) - balance(false)) / 2
}

fn images(pod: &Pod, node: &NodeInfo, cache: &Cache) -> i64 {
    let Some(spec) = &pod.spec else { return 0 };
    let names = spec.init_containers.iter().flatten().chain(&spec.containers).filter_map(|container| container.image.as_deref());
    let names: Vec<String> = names.map(normalized_image).collect();
    let nodes = cache.nodes().count().max(1);
    let scaled = |name: &String| {
        let Some(size) = node.images.get(name) else { return 0 };
        let having = cache.nodes().filter(|node| node.images.contains_key(name)).count();
        (*size as f64 * having as f64 / nodes as f64) as i64
    };
    let max = IMAGE_BYTES_MAX * names.len().max(1) as i64;
    let sum: i64 = names.iter().map(scaled).sum();
    MAX * (sum.clamp(IMAGE_BYTES_MIN, max) - IMAGE_BYTES_MIN) / (max - IMAGE_BYTES_MIN)
}

/// The constraints that are only wished for: the pod's own, else the default ones over the selectors of its services and its
/// replica set. The second value is whether a node must have all topology keys to be scored.
fn soft_constraints(pod: &Pod, cache: &Cache) -> (Vec<TopologySpreadConstraint>, bool) {
    let own = pod.spec.as_ref().and_then(|spec| spec.topology_spread_constraints.as_deref()).unwrap_or_default();
    if !own.is_empty() {
        return (own.iter().filter(|constraint| constraint.when_unsatisfiable == "ScheduleAnyway").cloned().collect(), true);
    }
    let Some(selector) = default_selector(pod, cache) else { return (Vec::new(), false) };
    let constraint = |topology_key: &str, max_skew: i32| TopologySpreadConstraint {
        topology_key: topology_key.to_owned(),
        max_skew,
        when_unsatisfiable: "ScheduleAnyway".to_owned(),
        label_selector: Some(selector.clone()),
        ..TopologySpreadConstraint::default()
    };
    (vec![constraint(HOSTNAME, 3), constraint(ZONE, 5)], false)
}

/// The selectors of the services and of the owner that select the pod, all together (upstream: `helper.DefaultSelector`).
fn default_selector(pod: &Pod, cache: &Cache) -> Option<LabelSelector> {
    let empty = BTreeMap::new();
    let labels = pod.metadata.labels.as_ref().unwrap_or(&empty);
    let owner = pod.metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
    let mut merged = LabelSelector::default();
    let mut any = false;
    for ((kind, key), selector) in &cache.selectors {
        let same_namespace = Some(&key.namespace) == pod.metadata.namespace.as_ref();
        let owns = *kind == "Service" || owner.is_some_and(|owner| owner.kind == *kind && owner.name == key.name);
        if !same_namespace || !owns || !selects(Some(selector), labels) {
            continue;
        }
        any = true;
        merged.match_labels.get_or_insert_default().extend(selector.match_labels.clone().unwrap_or_default());
        merged.match_expressions.get_or_insert_default().extend(selector.match_expressions.clone().unwrap_or_default());
    }
    any.then_some(merged)
}

fn spread(pod: &Pod, feasible: &[&NodeInfo], cache: &Cache) -> Vec<i64> {
    let (constraints, need_all) = soft_constraints(pod, cache);
    if constraints.is_empty() {
        return vec![0; feasible.len()];
    }
    let ignored = |node: &NodeInfo| need_all && constraints.iter().any(|constraint| node.label(&constraint.topology_key).is_none());
    let scored = feasible.iter().filter(|node| !ignored(node)).count();
    let mut raw = vec![0.0; feasible.len()];
    for constraint in &constraints {
        let by_host = constraint.topology_key == HOSTNAME;
        let mut counts: HashMap<&str, i32> = HashMap::new();
        if !by_host {
            counts.extend(
                feasible.iter().filter(|node| !ignored(node)).map(|node| (node.label(&constraint.topology_key).unwrap_or_default(), 0)),
            );
            for node in cache.nodes().filter(|node| !ignored(node) && counts_for(constraint, pod, node)) {
                if let Some(count) = counts.get_mut(node.label(&constraint.topology_key).unwrap_or_default()) {
                    *count += matching_pods(node, pod, constraint.label_selector.as_ref());
                }
            }
        }
        let size = if by_host { scored } else { counts.len() };
        let weight = ((size + 2) as f64).ln();
        for (score, node) in raw.iter_mut().zip(feasible) {
            let Some(value) = node.label(&constraint.topology_key) else { continue };
            let count = if by_host {
                matching_pods(node, pod, constraint.label_selector.as_ref())
            } else {
                counts.get(value).copied().unwrap_or(0)
            };
            *score += f64::from(count) * weight + f64::from(constraint.max_skew - 1);
        }
    }
    let rounded: Vec<Option<i64>> = raw.iter().zip(feasible).map(|(score, node)| (!ignored(node)).then(|| score.round() as i64)).collect();
    let (min, max) = (rounded.iter().flatten().min().copied().unwrap_or(0), rounded.iter().flatten().max().copied().unwrap_or(0));
    rounded.into_iter().map(|score| score.map_or(0, |score| if max == 0 { MAX } else { MAX * (max + min - score) / max })).collect()
}

fn pod_affinity(pod: &Pod, feasible: &[&NodeInfo], cache: &Cache) -> Vec<i64> {
    let mut topology: HashMap<(&str, &str), i64> = HashMap::new();
    for node in cache.nodes() {
        for other in node.pods.values().map(|info| info.pod.as_ref()) {
            let mut count = |term: &PodAffinityTerm, owner: &Pod, target: &Pod, weight: i64| {
                // The labels of the node outlive this loop, the term's key is looked up there.
                let Some((key, value)) = node.node.metadata.labels.as_ref().and_then(|labels| labels.get_key_value(&term.topology_key))
                else {
                    return;
                };
                if affinity_term_matches(term, owner, target, &cache.namespaces) {
                    *topology.entry((key, value)).or_default() += weight;
                }
            };
            for (term, weight) in preferred(pod) {
                count(term, pod, other, weight);
            }
            for (term, weight) in preferred(other) {
                count(term, other, pod, weight);
            }
            for term in required_near(other) {
                count(term, other, pod, 1);
            }
        }
    }
    if topology.is_empty() {
        return vec![0; feasible.len()];
    }
    let sum = |node: &&NodeInfo| {
        let labels = node.node.metadata.labels.iter().flatten();
        labels.filter_map(|(key, value)| topology.get(&(key.as_str(), value.as_str()))).sum::<i64>()
    };
    let raw: Vec<i64> = feasible.iter().map(sum).collect();
    let (min, max) = (raw.iter().min().copied().unwrap_or(0), raw.iter().max().copied().unwrap_or(0));
    raw.into_iter().map(|score| if max == min { 0 } else { (MAX as f64 * ((score - min) as f64 / (max - min) as f64)) as i64 }).collect()
}

/// A pod's wishes: terms with their weight, negative where it wants to be apart.
fn preferred(pod: &Pod) -> impl Iterator<Item = (&PodAffinityTerm, i64)> {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref());
    let near = affinity
        .and_then(|all| all.pod_affinity.as_ref())
        .and_then(|near| near.preferred_during_scheduling_ignored_during_execution.as_ref());
    let apart = affinity
        .and_then(|all| all.pod_anti_affinity.as_ref())
        .and_then(|apart| apart.preferred_during_scheduling_ignored_during_execution.as_ref());
    let signed = |sign: i64| move |term: &'_ WeightedPodAffinityTerm| sign * i64::from(term.weight);
    let near = near.into_iter().flatten().map(move |term| (&term.pod_affinity_term, signed(1)(term)));
    near.chain(apart.into_iter().flatten().map(move |term| (&term.pod_affinity_term, signed(-1)(term))))
}

fn required_near(pod: &Pod) -> &[PodAffinityTerm] {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref()).and_then(|affinity| affinity.pod_affinity.as_ref());
    affinity.and_then(|near| near.required_during_scheduling_ignored_during_execution.as_deref()).unwrap_or_default()
}
