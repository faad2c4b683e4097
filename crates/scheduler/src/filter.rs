//! Filters: whether a pod can run on a node at all, with upstream's reasons (`pkg/scheduler/framework/plugins`, v1.37).

use std::collections::{BTreeMap, HashSet};

use client::placement::{tolerates, tolerations};
use k8s_openapi::api::core::v1::{Pod, PodAffinityTerm, Taint, Toleration, TopologySpreadConstraint};

use crate::cache::{Cache, HostPort, NodeInfo, PodInfo};
use crate::labels::{Labels, affinity_term_matches, node_allowed, selects};

const UNSCHEDULABLE_TAINT: &str = "node.kubernetes.io/unschedulable";

/// What the filters share for one pod, computed once over all nodes.
pub struct Filters<'a> {
    pod: &'a PodInfo,
    affinity: Affinity<'a>,
    spread: Vec<Spread<'a>>,
}

/// A hard topology spread constraint with its counts.
struct Spread<'a> {
    constraint: &'a TopologySpreadConstraint,
    counts: BTreeMap<&'a str, i32>,
}

impl Spread<'_> {
    fn minimum(&self) -> i32 {
        let too_few = self.constraint.min_domains.is_some_and(|wanted| self.counts.len() < usize::try_from(wanted).unwrap_or(0));
        if too_few { 0 } else { self.counts.values().copied().min().unwrap_or(0) }
    }
}

/// Topology values (key and value) that the pods already there allow or forbid.
#[derive(Default)]
struct Affinity<'a> {
    /// Where an existing pod does not want this one.
    refused: HashSet<(&'a str, &'a str)>,
    /// Where a pod is that this one wants to be near.
    wanted: HashSet<(&'a str, &'a str)>,
    /// Where a pod is that this one does not want to be near.
    unwanted: HashSet<(&'a str, &'a str)>,
    /// The pod wants to be near its own kind and is the first of it.
    is_first: bool,
}

impl<'a> Filters<'a> {
    /// Looks at the whole cluster once for this pod.
    pub fn new(pod: &'a PodInfo, cache: &'a Cache) -> Self {
        Filters { pod, affinity: affinity(&pod.pod, cache), spread: spread(&pod.pod, cache) }
    }

    /// Why the pod cannot run on a node: the reasons of the first filter that refuses it; empty where none does.
    pub fn refuse(&self, node: &NodeInfo) -> Vec<String> {
        let pod = &self.pod.pod;
        let one = |text: &str| vec![text.to_owned()];
        if unschedulable(pod, node) {
            return one("node(s) were unschedulable");
        }
        let wanted = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
        if !wanted.is_empty() && wanted != node.name() {
            return one("node(s) didn't match the requested node name");
        }
        if untolerated(pod, node, &["NoSchedule", "NoExecute"]).is_some() {
            return one("node(s) had untolerated taint(s)");
        }
        if !node_allowed(pod, &node.node) {
            return one("node(s) didn't match Pod's node affinity/selector");
        }
        if ports_conflict(&self.pod.host_ports, node) {
            return one("node(s) didn't have free ports for the requested pod ports");
        }
        let insufficient = insufficient(self.pod, node);
        if !insufficient.is_empty() {
            return insufficient;
        }
        self.refuse_by_spread(node).or_else(|| self.refuse_by_affinity(node)).map(one).unwrap_or_default()
    }

    fn refuse_by_spread(&self, node: &NodeInfo) -> Option<&'static str> {
        let pod_labels = self.pod.pod.metadata.labels.as_ref();
        for spread in &self.spread {
            let Some(value) = node.label(&spread.constraint.topology_key) else {
                return Some("node(s) didn't match pod topology spread constraints (missing required label)");
            };
            let own = i32::from(selects(spread.constraint.label_selector.as_ref(), pod_labels.unwrap_or(&Labels::new())));
            let count = spread.counts.get(value).copied().unwrap_or(0);
            if count + own - spread.minimum() > spread.constraint.max_skew {
                return Some("node(s) didn't match pod topology spread constraints");
            }
        }
        None
    }

    fn refuse_by_affinity(&self, node: &NodeInfo) -> Option<&'static str> {
        let at = |key: &str, values: &HashSet<(&str, &str)>| node.label(key).is_some_and(|value| values.contains(&(key, value)));
        let (near, apart) = (required(&self.pod.pod, false), required(&self.pod.pod, true));
        let all_near = near.iter().all(|term| at(&term.topology_key, &self.affinity.wanted));
        let has_keys = near.iter().all(|term| node.label(&term.topology_key).is_some());
        if !(near.is_empty() || all_near || self.affinity.is_first && has_keys) {
            return Some("node(s) didn't match pod affinity rules");
        }
        if apart.iter().any(|term| at(&term.topology_key, &self.affinity.unwanted)) {
            return Some("node(s) didn't match pod anti-affinity rules");
        }
        let refused = self.affinity.refused.iter().any(|(key, value)| node.label(key) == Some(value));
        refused.then_some("node(s) didn't satisfy existing pods anti-affinity rules")
    }
}

fn unschedulable(pod: &Pod, node: &NodeInfo) -> bool {
    let cordoned = node.node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
    let taint = Taint { key: UNSCHEDULABLE_TAINT.to_owned(), effect: "NoSchedule".to_owned(), ..Taint::default() };
    cordoned && !tolerations(pod).iter().any(|toleration| tolerates(toleration, &taint))
}

/// The first taint of these effects that the pod does not tolerate.
pub fn untolerated<'a>(pod: &Pod, node: &'a NodeInfo, effects: &[&str]) -> Option<&'a Taint> {
    taints(node)
        .iter()
        .filter(|taint| effects.contains(&taint.effect.as_str()))
        .find(|taint| !tolerations(pod).iter().any(|toleration| tolerates(toleration, taint)))
}

/// A node's taints.
pub fn taints(node: &NodeInfo) -> &[Taint] {
    node.node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default()
}

/// How many taints that only ask to be avoided the pod does not tolerate.
pub fn intolerable_preferences(pod: &Pod, node: &NodeInfo) -> i64 {
    let preferring: Vec<&Toleration> = tolerations(pod)
        .iter()
        .filter(|toleration| matches!(toleration.effect.as_deref().unwrap_or_default(), "" | "PreferNoSchedule"))
        .collect();
    let soft = taints(node).iter().filter(|taint| taint.effect == "PreferNoSchedule");
    soft.filter(|taint| !preferring.iter().any(|toleration| tolerates(toleration, taint))).count() as i64
}

fn ports_conflict(wanted: &[HostPort], node: &NodeInfo) -> bool {
    const ALL: &str = "0.0.0.0";
    let used = || node.pods.values().flat_map(|pod| pod.host_ports.iter());
    wanted.iter().any(|(protocol, address, port)| {
        used().any(|(other, bound, number)| other == protocol && number == port && (bound == address || bound == ALL || address == ALL))
    })
}

fn insufficient(pod: &PodInfo, node: &NodeInfo) -> Vec<String> {
    let mut reasons = Vec::new();
    if node.pods.len() as i64 + 1 > node.allocatable.get("pods") {
        reasons.push("Too many pods".to_owned());
    }
    for (name, amount) in pod.requests.0.iter().filter(|(_, amount)| **amount > 0) {
        if *amount > node.allocatable.get(name) - node.requested.get(name) {
            reasons.push(format!("Insufficient {name}"));
        }
    }
    reasons
}

/// A pod's required terms: to be near others, or apart from them.
fn required(pod: &Pod, apart: bool) -> &[PodAffinityTerm] {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref());
    let terms = match apart {
        false => affinity
            .and_then(|all| all.pod_affinity.as_ref())
            .and_then(|near| near.required_during_scheduling_ignored_during_execution.as_ref()),
        true => affinity
            .and_then(|all| all.pod_anti_affinity.as_ref())
            .and_then(|apart| apart.required_during_scheduling_ignored_during_execution.as_ref()),
    };
    terms.map(Vec::as_slice).unwrap_or_default()
}

fn affinity<'a>(pod: &'a Pod, cache: &'a Cache) -> Affinity<'a> {
    let mut found = Affinity::default();
    let (near, apart) = (required(pod, false), required(pod, true));
    for node in cache.nodes() {
        for other in node.pods.values().map(|info| info.pod.as_ref()) {
            for term in required(other, true) {
                if let Some(value) = node.label(&term.topology_key)
                    && affinity_term_matches(term, other, pod, &cache.namespaces)
                {
                    found.refused.insert((&term.topology_key, value));
                }
            }
            if !near.is_empty() && near.iter().all(|term| affinity_term_matches(term, pod, other, &cache.namespaces)) {
                found.wanted.extend(near.iter().filter_map(|term| Some((term.topology_key.as_str(), node.label(&term.topology_key)?))));
            }
            for term in apart {
                if let Some(value) = node.label(&term.topology_key)
                    && affinity_term_matches(term, pod, other, &cache.namespaces)
                {
                    found.unwanted.insert((&term.topology_key, value));
                }
            }
        }
    }
    found.is_first = found.wanted.is_empty() && near.iter().all(|term| affinity_term_matches(term, pod, pod, &cache.namespaces));
    found
}

fn spread<'a>(pod: &'a Pod, cache: &'a Cache) -> Vec<Spread<'a>> {
    let all = pod.spec.as_ref().and_then(|spec| spec.topology_spread_constraints.as_deref()).unwrap_or_default();
    let hard: Vec<&TopologySpreadConstraint> = all.iter().filter(|constraint| constraint.when_unsatisfiable == "DoNotSchedule").collect();
    let has_all_keys = |node: &NodeInfo| hard.iter().all(|constraint| node.label(&constraint.topology_key).is_some());
    let count = |constraint: &&'a TopologySpreadConstraint| {
        let mut counts = BTreeMap::new();
        for node in cache.nodes().filter(|node| has_all_keys(node) && counts_for(constraint, pod, node)) {
            let value = node.label(&constraint.topology_key).unwrap_or_default();
            *counts.entry(value).or_insert(0) += matching_pods(node, pod, constraint.label_selector.as_ref());
        }
        Spread { constraint, counts }
    };
    hard.iter().map(count).collect()
}

/// Whether a constraint's policies count a node: by default those that the pod's node affinity allows, tainted or not.
pub fn counts_for(constraint: &TopologySpreadConstraint, pod: &Pod, node: &NodeInfo) -> bool {
    (constraint.node_affinity_policy.as_deref() == Some("Ignore") || node_allowed(pod, &node.node))
        && (constraint.node_taints_policy.as_deref() != Some("Honor") || untolerated(pod, node, &["NoSchedule", "NoExecute"]).is_none())
}

/// How many pods of the pod's namespace a selector selects on a node; those that are going do not count.
pub fn matching_pods(node: &NodeInfo, pod: &Pod, selector: Option<&k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector>) -> i32 {
    let empty = Labels::new();
    let counted = node.pods.values().map(|info| &info.pod.metadata).filter(|other| {
        other.namespace == pod.metadata.namespace
            && other.deletion_timestamp.is_none()
            && selects(selector, other.labels.as_ref().unwrap_or(&empty))
    });
    counted.count() as i32
}
