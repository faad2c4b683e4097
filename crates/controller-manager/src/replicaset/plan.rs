//! How many pods to make, which to delete, and what the status says: pure (`pkg/controller/replicaset`, 1.37).

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::objects::{available_at, controller_ref, is_active, is_available, is_ready, phase, ready_since, wire_time};

/// Most pods made or deleted in one sync.
pub const BURST: usize = 500;
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// What to do about the number of pods.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// So many more.
    Create(usize),
    /// These go, first to last.
    Delete(Vec<Arc<Pod>>),
}

/// Wanted replicas.
pub fn wanted(rs: &ReplicaSet) -> usize {
    let replicas = rs.spec.replicas.unwrap_or(1);
    usize::try_from(replicas).unwrap_or(0)
}

/// Decides about the number. `active` are the ReplicaSet's own; `related` those of all ReplicaSets of its owner.
pub fn plan(rs: &ReplicaSet, active: &[Arc<Pod>], related: &[Arc<Pod>], now: Timestamp) -> Option<Action> {
    let wanted = wanted(rs);
    match active.len().cmp(&wanted) {
        Ordering::Equal => None,
        Ordering::Less => Some(Action::Create((wanted - active.len()).min(BURST))),
        Ordering::Greater => {
            let surplus = (active.len() - wanted).min(BURST);
            Some(Action::Delete(rank(active, related, now).into_iter().take(surplus).collect()))
        }
    }
}

/// The pods in the order in which they are dispensable.
pub fn rank(active: &[Arc<Pod>], related: &[Arc<Pod>], now: Timestamp) -> Vec<Arc<Pod>> {
    let mut on_node: HashMap<&str, usize> = HashMap::new();
    for pod in related.iter().filter(|pod| is_active(pod)) {
        *on_node.entry(node(pod)).or_default() += 1;
    }
    let doubled = |pod: &Pod| on_node.get(node(pod)).copied().unwrap_or(0);
    let mut ranked = active.to_vec();
    ranked.sort_by(|a, b| {
        (!node(a).is_empty())
            .cmp(&!node(b).is_empty())
            .then(ordinal(a).cmp(&ordinal(b)))
            .then(is_ready(a).cmp(&is_ready(b)))
            .then(cost(a).cmp(&cost(b)))
            .then(doubled(b).cmp(&doubled(a)))
            .then_with(|| match (ready_since(a), ready_since(b)) {
                (Some(x), Some(y)) => age_order(x, y, a, b, now),
                _ => Ordering::Equal,
            })
            .then_with(|| restarts(b).cmp(&restarts(a)))
            .then_with(|| {
                let created = |pod: &Pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
                age_order(created(a), created(b), a, b, now)
            })
    });
    ranked
}

fn node(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
}

fn ordinal(pod: &Pod) -> u8 {
    match phase(pod) {
        "Unknown" => 1,
        "Running" => 2,
        _ => 0,
    }
}

fn cost(pod: &Pod) -> i32 {
    let annotation = pod.metadata.annotations.as_ref().and_then(|all| all.get(DELETION_COST));
    annotation.and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Restarts of the regular containers, the largest first.
fn restarts(pod: &Pod) -> i32 {
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    statuses.map(|status| status.restart_count).max().unwrap_or(0)
}

/// The younger first, ages compared by their power of two; within the same power by UID, so that what goes is spread.
fn age_order(a: Option<Timestamp>, b: Option<Timestamp>, pod_a: &Pod, pod_b: &Pod, now: Timestamp) -> Ordering {
    let (Some(x), Some(y)) = (a, b) else {
        // One without a time counts as youngest.
        return a.is_some().cmp(&b.is_some());
    };
    if x == y {
        return Ordering::Equal;
    }
    let power = |time: Timestamp| {
        let age = now.duration_since(time).as_nanos();
        if age > 0 { age.ilog2().cast_signed() } else { -1 }
    };
    power(x).cmp(&power(y)).then_with(|| pod_a.metadata.uid.cmp(&pod_b.metadata.uid))
}

/// The pod that a ReplicaSet's template asks for.
pub fn pod_of(rs: &ReplicaSet) -> Pod {
    let template = rs.spec.template.clone().unwrap_or_default();
    let meta = template.metadata.unwrap_or_default();
    let name = rs.metadata.name.as_deref().unwrap_or_default();
    let mut prefix = format!("{name}-");
    if prefix.len() > 63 {
        // Upstream tries the prefix as a DNS label and takes the bare name when that is none.
        prefix = name.to_owned();
    }
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(prefix),
            namespace: rs.metadata.namespace.clone(),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![controller_ref(rs)]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    }
}

/// The status as it should be. `failure` is what went wrong with making or deleting pods.
pub fn status(rs: &ReplicaSet, active: &[Arc<Pod>], terminating: usize, failure: Option<&str>, now: Timestamp) -> ReplicaSetStatus {
    let spec = &rs.spec;
    let labels = spec.template.as_ref().and_then(|t| t.metadata.as_ref()?.labels.clone()).unwrap_or_default();
    let min_ready = spec.min_ready_seconds.unwrap_or(0);
    let count = |holds: &dyn Fn(&Pod) -> bool| active.iter().filter(|pod| holds(pod)).count();
    let labelled = count(&|pod| labels.iter().all(|(key, value)| pod.metadata.labels.as_ref().and_then(|all| all.get(key)) == Some(value)));
    let wire = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
    let optional = |count: usize| Some(wire(count)).filter(|count| *count != 0);
    let old = rs.status.clone().unwrap_or_default();
    let mut conditions = old.conditions.unwrap_or_default();
    let failed = conditions.iter().any(|condition| condition.type_.as_deref() == Some("ReplicaFailure"));
    match failure {
        Some(message) if !failed => {
            let reason = if active.len() < wanted(rs) { "FailedCreate" } else { "FailedDelete" };
            conditions.push(ReplicaSetCondition {
                type_: Some("ReplicaFailure".to_owned()),
                status: Some("True".to_owned()),
                reason: Some(reason.to_owned()),
                message: Some(message.to_owned()),
                last_transition_time: Some(wire_time(now)),
            });
        }
        None => conditions.retain(|condition| condition.type_.as_deref() != Some("ReplicaFailure")),
        Some(_) => {}
    }
    ReplicaSetStatus {
        replicas: wire(active.len()),
        fully_labeled_replicas: optional(labelled),
        ready_replicas: optional(count(&is_ready)),
        available_replicas: optional(count(&|pod| is_available(pod, min_ready, now))),
        terminating_replicas: Some(wire(terminating)),
        observed_generation: rs.metadata.generation,
        conditions: Some(conditions).filter(|conditions| !conditions.is_empty()),
    }
}

/// When the next ready pod becomes available.
pub fn next_available(rs: &ReplicaSet, active: &[Arc<Pod>], now: Timestamp) -> Option<Duration> {
    let min_ready = rs.spec.min_ready_seconds.filter(|seconds| *seconds > 0)?;
    let pending = active.iter().filter(|pod| !is_available(pod, min_ready, now));
    let next = pending.filter_map(|pod| available_at(pod, min_ready)).min()?;
    Some(Duration::try_from(next.duration_since(now)).unwrap_or_default() + Duration::from_millis(10))
}
