//! What is known of nodes' health, and which taints follow from it: pure (`pkg/controller/nodelifecycle`, 1.37).

use std::collections::BTreeMap;
use std::time::Duration;

use client::placement::{tolerates, tolerations};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use tokio::time::Instant;

use crate::objects::wire_time;

/// A node that never reported is given this long (upstream's `--node-startup-grace-period`).
const STARTUP_GRACE: Duration = Duration::from_secs(60);
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Conditions that only a kubelet knows, and that become Unknown without one.
const REPORTED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];
/// Taints of conditions that are True.
const PRESSURE: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
];

/// When a node was last heard of, by this process's clock; nobody else's is trusted.
#[derive(Debug, Clone)]
pub struct Health {
    heard: Instant,
    heartbeat: Option<Time>,
    renewed: Option<MicroTime>,
}

/// A node's condition.
pub fn condition<'a>(node: &'a Node, kind: &str) -> Option<&'a NodeCondition> {
    node.status.as_ref()?.conditions.iter().flatten().find(|condition| condition.type_ == kind)
}

/// `True`, `False`, `Unknown`, or empty where the node never reported.
pub fn ready(node: &Node) -> &str {
    condition(node, "Ready").map(|condition| condition.status.as_str()).unwrap_or_default()
}

/// Takes a look at a node; a status that moved or a lease that was renewed is a sign of life.
pub fn observe(before: Option<&Health>, node: &Node, lease: Option<&Lease>, now: Instant) -> Health {
    let heartbeat = condition(node, "Ready").and_then(|condition| condition.last_heartbeat_time.clone());
    let renewed = lease.and_then(|lease| lease.spec.as_ref()?.renew_time.clone());
    let alive = before.is_none_or(|before| before.heartbeat != heartbeat || before.renewed < renewed);
    let heard = before.filter(|_| !alive).map_or(now, |before| before.heard);
    Health { heard, heartbeat, renewed }
}

/// The conditions of a node that has been silent for too long; `None`: leave them.
pub fn silent(node: &Node, health: &Health, grace: Duration, now: Instant, wall: Timestamp) -> Option<Vec<NodeCondition>> {
    let grace = if condition(node, "Ready").is_some() { grace } else { STARTUP_GRACE.max(grace) };
    if now.saturating_duration_since(health.heard) <= grace {
        return None;
    }
    let mut conditions = node.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let before = conditions.clone();
    for kind in REPORTED {
        match conditions.iter_mut().find(|condition| condition.type_ == kind) {
            Some(condition) if condition.status != "Unknown" => {
                condition.status = "Unknown".to_owned();
                condition.reason = Some("NodeStatusUnknown".to_owned());
                condition.message = Some("Kubelet stopped posting node status.".to_owned());
                condition.last_transition_time = Some(wire_time(wall));
            }
            Some(_) => {}
            None => conditions.push(NodeCondition {
                type_: kind.to_owned(),
                status: "Unknown".to_owned(),
                reason: Some("NodeStatusNeverUpdated".to_owned()),
                message: Some("Kubelet never posted node status.".to_owned()),
                last_heartbeat_time: node.metadata.creation_timestamp.clone(),
                last_transition_time: Some(wire_time(wall)),
            }),
        }
    }
    (conditions != before).then_some(conditions)
}

/// How well the nodes of a zone do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zone {
    /// Nodes that fail are drained one after the other.
    Normal,
    /// More than half have failed: rather the network than they; large zones are drained slowly, small ones not at all.
    Partial,
    /// All have failed.
    Full,
}

/// A node's zone.
pub fn zone(node: &Node) -> (String, String) {
    let label = |key: &str| node.metadata.labels.as_ref().and_then(|labels| labels.get(key)).cloned().unwrap_or_default();
    (label("topology.kubernetes.io/region"), label("topology.kubernetes.io/zone"))
}

/// Each zone's state and number of nodes, by region and zone.
pub type Zones = BTreeMap<(String, String), (Zone, usize)>;

/// The zones, and whether no node of any is ready (then nobody is evicted: there is nowhere to go).
pub fn zones<'a>(nodes: impl IntoIterator<Item = &'a Node>) -> (Zones, bool) {
    let mut counts: BTreeMap<(String, String), (usize, usize)> = BTreeMap::new();
    for node in nodes {
        let (good, bad) = counts.entry(zone(node)).or_default();
        *(if ready(node) == "True" { good } else { bad }) += 1;
    }
    let state = |good: usize, bad: usize| match (good, bad) {
        (0, bad) if bad > 0 => Zone::Full,
        // 55 % (`--unhealthy-zone-threshold`).
        (good, bad) if bad > 2 && bad * 100 >= (good + bad) * 55 => Zone::Partial,
        _ => Zone::Normal,
    };
    let zones: BTreeMap<_, _> = counts.into_iter().map(|(zone, (good, bad))| (zone, (state(good, bad), good + bad))).collect();
    let all_full = !zones.is_empty() && zones.values().all(|(zone, _)| *zone == Zone::Full);
    (zones, all_full)
}

/// Time between two evicting taints of a zone; `None`: none now (`--node-eviction-rate` 0.1 and its kin).
pub fn eviction_interval(zone: Zone, size: usize) -> Option<Duration> {
    match zone {
        Zone::Normal | Zone::Full => Some(Duration::from_secs(10)),
        Zone::Partial if size > 50 => Some(Duration::from_secs(100)),
        Zone::Partial => None,
    }
}

/// The evicting taint that a node's condition asks for.
pub fn evicting(node: &Node) -> Option<&'static str> {
    match ready(node) {
        "False" => Some(NOT_READY),
        "Unknown" => Some(UNREACHABLE),
        _ => None,
    }
}

/// Whether a node has the taint.
pub fn has(node: &Node, key: &str, effect: &str) -> bool {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    taints.into_iter().any(|taint| taint.key == key && taint.effect == effect)
}

/// The taints as they should be; `None`: as they are. `evict`: the evicting taint may be added now.
pub fn taints(node: &Node, evict: bool, keep_evicting: bool, now: Timestamp) -> Option<Vec<Taint>> {
    let spec = node.spec.clone().unwrap_or_default();
    let before = spec.taints.unwrap_or_default();
    let status_of = |kind: &str| condition(node, kind).map(|condition| condition.status.as_str()).unwrap_or_default();
    let no_schedule = [
        (NOT_READY, ready(node) == "False"),
        (UNREACHABLE, ready(node) == "Unknown"),
        (UNSCHEDULABLE, spec.unschedulable.unwrap_or(false)),
    ]
    .into_iter()
    .chain(PRESSURE.map(|(kind, key)| (key, status_of(kind) == "True")));
    let wanted = evicting(node);
    // A node that has never reported keeps what its kubelet or the API server gave it.
    let reported = condition(node, "Ready").is_some();
    let mut after = before.clone();
    for (key, holds) in no_schedule {
        let about_ready = key == NOT_READY || key == UNREACHABLE;
        if reported || !about_ready {
            set(&mut after, key, "NoSchedule", holds, now);
        }
    }
    for key in [NOT_READY, UNREACHABLE] {
        let there = has(node, key, "NoExecute");
        // One evicting taint is exchanged for the other at once; a first one waits its turn.
        let other = has(node, if key == NOT_READY { UNREACHABLE } else { NOT_READY }, "NoExecute");
        let holds = wanted == Some(key) && keep_evicting && (there || other || evict);
        if reported {
            set(&mut after, key, "NoExecute", holds, now);
        }
    }
    (after != before).then_some(after)
}

fn set(taints: &mut Vec<Taint>, key: &str, effect: &str, holds: bool, now: Timestamp) {
    let at = taints.iter().position(|taint| taint.key == key && taint.effect == effect);
    match (at, holds) {
        (Some(at), false) => _ = taints.remove(at),
        (None, true) => taints.push(Taint {
            key: key.to_owned(),
            effect: effect.to_owned(),
            // Upstream's NoSchedule taints carry no time.
            time_added: (effect == "NoExecute").then(|| wire_time(now)),
            value: None,
        }),
        _ => {}
    }
}

/// How long a pod may stay on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stay {
    /// As long as it likes.
    Forever,
    /// So long after the taint was noticed.
    For(Duration),
}

/// How long a pod may stay on a node with these taints (`pkg/controller/tainteviction`).
pub fn stay(pod: &Pod, node: &Node) -> Stay {
    let tolerations = tolerations(pod);
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let mut used = Vec::new();
    for taint in taints.into_iter().filter(|taint| taint.effect == "NoExecute") {
        match tolerations.iter().find(|toleration| tolerates(toleration, taint)) {
            None => return Stay::For(Duration::ZERO),
            Some(toleration) => used.push(toleration.toleration_seconds),
        }
    }
    match used.into_iter().flatten().min() {
        None => Stay::Forever,
        Some(seconds) => Stay::For(Duration::from_secs(u64::try_from(seconds).unwrap_or(0))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn node(ready: Option<&str>, taints: serde_json::Value) -> Node {
        let conditions: Vec<_> =
            ready.map(|ready| json!({"type": "Ready", "status": ready, "lastHeartbeatTime": "2026-01-01T00:00:00Z"})).into_iter().collect();
        serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": {"taints": taints},
            "status": {"conditions": conditions}}))
        .expect("node")
    }

    fn wall() -> Timestamp {
        Timestamp::from_second(1_800_000_000).expect("time")
    }

    fn told(taints: Option<Vec<Taint>>) -> Option<Vec<String>> {
        taints.map(|all| {
            all.iter().map(|taint| format!("{}:{}", taint.key.trim_start_matches("node.kubernetes.io/"), taint.effect)).collect()
        })
    }

    #[test]
    fn silence_is_judged_by_our_own_clock() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let grace = Duration::from_secs(40);
        let running = node(Some("True"), json!([]));
        // Its heartbeat is months old, but it has only just been seen.
        let health = observe(None, &running, None, start);
        assert!(silent(&running, &health, grace, at(40), wall()).is_none());
        let lease = |time: &str| -> Lease { serde_json::from_value(json!({"spec": {"renewTime": time}})).expect("lease") };
        let health = observe(Some(&health), &running, Some(&lease("2026-01-01T00:00:10.000000Z")), at(30));
        assert!(silent(&running, &health, grace, at(70), wall()).is_none(), "a lease is a sign of life");
        let health = observe(Some(&health), &running, Some(&lease("2026-01-01T00:00:10.000000Z")), at(71));
        let conditions = silent(&running, &health, grace, at(71), wall()).expect("too long");
        assert_eq!(conditions.len(), 4);
        assert!(conditions.iter().all(|condition| condition.status == "Unknown"));
        assert_eq!(conditions[0].reason.as_deref(), Some("NodeStatusUnknown"));
        assert_eq!(conditions[1].reason.as_deref(), Some("NodeStatusNeverUpdated"));
    }

    #[test]
    fn taints_follow_conditions() {
        let none = json!([]);
        assert_eq!(told(taints(&node(Some("True"), none.clone()), true, true, wall())), None);
        let unknown = node(Some("Unknown"), none.clone());
        assert_eq!(told(taints(&unknown, false, true, wall())).expect("changed"), ["unreachable:NoSchedule"]);
        assert_eq!(told(taints(&unknown, true, true, wall())).expect("changed"), ["unreachable:NoSchedule", "unreachable:NoExecute"]);
        let made = taints(&unknown, true, true, wall()).expect("changed");
        assert!(made.iter().all(|taint| taint.time_added.is_some() == (taint.effect == "NoExecute")), "{made:?}");
        let swapped = node(Some("False"), json!([{"key": UNREACHABLE, "effect": "NoExecute"}, {"key": "own", "effect": "NoSchedule"}]));
        assert_eq!(
            told(taints(&swapped, false, true, wall())).expect("changed"),
            ["own:NoSchedule", "not-ready:NoSchedule", "not-ready:NoExecute"]
        );
        assert_eq!(
            told(taints(&swapped, false, false, wall())).expect("changed"),
            ["own:NoSchedule", "not-ready:NoSchedule"],
            "nobody is evicted when no node is ready"
        );
        let fresh = node(None, json!([{"key": NOT_READY, "effect": "NoSchedule"}]));
        assert_eq!(told(taints(&fresh, true, true, wall())), None);
    }

    #[test]
    fn zones_and_their_states() {
        let (good, bad) = (node(Some("True"), json!([])), node(Some("Unknown"), json!([])));
        let state = |good_count: usize, bad_count: usize| {
            let nodes = std::iter::repeat_n(&good, good_count).chain(std::iter::repeat_n(&bad, bad_count));
            let (zones, all) = zones(nodes);
            (zones.values().next().map(|(zone, _)| *zone), all)
        };
        assert_eq!(state(0, 1), (Some(Zone::Full), true));
        assert_eq!(state(2, 2), (Some(Zone::Normal), false));
        assert_eq!(state(2, 3), (Some(Zone::Partial), false));
        assert_eq!(state(0, 0), (None, false));
    }

    #[test]
    fn pods_stay_as_long_as_they_tolerate() {
        let tainted = node(Some("Unknown"), json!([{"key": UNREACHABLE, "effect": "NoExecute"}, {"key": "x", "effect": "NoSchedule"}]));
        let pod = |tolerations: serde_json::Value| -> Pod {
            serde_json::from_value(json!({"spec": {"containers": [], "tolerations": tolerations}})).expect("pod")
        };
        assert_eq!(stay(&pod(json!([])), &tainted), Stay::For(Duration::ZERO));
        let seconds = json!([{"key": UNREACHABLE, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}]);
        assert_eq!(stay(&pod(seconds), &tainted), Stay::For(Duration::from_secs(300)));
        assert_eq!(stay(&pod(json!([{"operator": "Exists"}])), &tainted), Stay::Forever);
        assert_eq!(stay(&pod(json!([])), &node(Some("True"), json!([]))), Stay::Forever);
    }
}
