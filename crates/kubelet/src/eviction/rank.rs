//! Which pod goes first, and what it is told (upstream pkg/kubelet/eviction/helpers.go `rank*Pressure`, `evictionMessage`,
//! `localStorageEviction`, v1.37). Pure.

use std::cmp::{Ordering, Reverse};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::eviction::plan::Observations;
use crate::eviction::thresholds::{Signal, Threshold};
use crate::model;
use crate::qos;
use crate::quantity;

/// What one container uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerUsage {
    /// Its name.
    pub name: String,
    /// Working set, bytes.
    pub memory_bytes: i64,
    /// Its writable layer, bytes and inodes.
    pub layer: (i64, i64),
    /// Its logs, bytes and inodes.
    pub logs: (i64, i64),
}

/// What one pod uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodUsage {
    /// Its containers.
    pub containers: Vec<ContainerUsage>,
    /// Its volumes on the node's disk, bytes and inodes.
    pub volumes: (i64, i64),
    /// Its processes.
    pub processes: i64,
}

impl PodUsage {
    fn memory_bytes(&self) -> i64 {
        self.containers.iter().map(|c| c.memory_bytes).sum()
    }

    /// What it uses of the disk that the signal is about.
    fn disk(&self, signal: Signal, dedicated_image_fs: bool) -> i64 {
        let inodes = matches!(signal, Signal::NodeFsInodesFree | Signal::ImageFsInodesFree);
        let pick = |pair: (i64, i64)| if inodes { pair.1 } else { pair.0 };
        let layers: i64 = self.containers.iter().map(|c| pick(c.layer)).sum();
        let others: i64 = self.containers.iter().map(|c| pick(c.logs)).sum::<i64>() + pick(self.volumes);
        let on_image_fs = matches!(signal, Signal::ImageFsAvailable | Signal::ImageFsInodesFree);
        match (dedicated_image_fs, on_image_fs) {
            (true, true) => layers,
            (true, false) => others,
            (false, _) => layers + others,
        }
    }
}

/// A pod with what it uses; `None` when that is not known.
pub type Candidate = (Arc<Pod>, Option<PodUsage>);

/// Sorts the pods: who is to go first comes first.
pub fn rank(pods: &mut [Candidate], signal: Signal, dedicated_image_fs: bool) {
    let priority = |pod: &Pod| pod.spec.as_ref().and_then(|s| s.priority).unwrap_or(0);
    pods.sort_by(|(a, a_usage), (b, b_usage)| {
        let key = |pod: &Pod, usage: &Option<PodUsage>| -> (bool, i64) {
            // A pod of which nothing is known goes before all others.
            let Some(usage) = usage else { return (true, i64::MAX) };
            let (used, asked) = match signal {
                Signal::MemoryAvailable => (usage.memory_bytes(), qos::pod_resources(pod).memory_request_bytes),
                Signal::PidAvailable => (usage.processes, 0),
                _ => (usage.disk(signal, dedicated_image_fs), ephemeral(pod, |r| r.requests.as_ref()).unwrap_or(0)),
            };
            (used > asked, used - asked)
        };
        let (a_key, b_key) = (key(a, a_usage), key(b, b_usage));
        let exceeding = match signal {
            Signal::PidAvailable => Ordering::Equal,
            _ => Reverse(a_key.0).cmp(&Reverse(b_key.0)),
        };
        exceeding.then(priority(a).cmp(&priority(b))).then(b_key.1.cmp(&a_key.1))
    });
}

type Resources = k8s_openapi::api::core::v1::ResourceRequirements;
type List = std::collections::BTreeMap<String, Quantity>;

/// The sum of the containers' ephemeral storage of requests or limits; `None` when no container says any.
fn ephemeral(pod: &Pod, pick: impl Fn(&Resources) -> Option<&List>) -> Option<i64> {
    let sidecars = model::init_containers(pod).iter().filter(|c| model::is_sidecar(c));
    let all = model::containers(pod).iter().chain(sidecars);
    let amounts = all.filter_map(|c| quantity::value(pick(c.resources.as_ref()?)?.get("ephemeral-storage")?));
    amounts.fold(None, |sum, amount| Some(sum.unwrap_or(0) + amount))
}

/// True when the pod, or a container of it, may use only so much of the node's disk.
pub fn has_ephemeral_limit(pod: &Pod) -> bool {
    ephemeral(pod, |r| r.limits.as_ref()).is_some()
}

/// The message for a pod that uses more of the node's disk than its limits, or a container's, allow.
pub fn over_ephemeral_limit(pod: &Pod, usage: &PodUsage, dedicated_image_fs: bool) -> Option<String> {
    let of_container = |c: &ContainerUsage| c.logs.0 + if dedicated_image_fs { 0 } else { c.layer.0 };
    if let Some(limit) = ephemeral(pod, |r| r.limits.as_ref()) {
        let used: i64 = usage.containers.iter().map(of_container).sum::<i64>() + usage.volumes.0;
        if used > limit {
            return Some(format!("Pod ephemeral local storage usage exceeds the total limit of containers {}. ", binary(limit)));
        }
    }
    let sidecars = model::init_containers(pod).iter().filter(|c| model::is_sidecar(c));
    model::containers(pod).iter().chain(sidecars).find_map(|container| {
        let limit = container.resources.as_ref()?.limits.as_ref()?.get("ephemeral-storage")?;
        let bytes = quantity::value(limit).filter(|bytes| *bytes > 0)?;
        let used = usage.containers.iter().find(|c| c.name == container.name).map(of_container)?;
        let text = format!("Container {} exceeded its local ephemeral storage limit \"{}\". ", container.name, limit.0);
        (used > bytes).then_some(text)
    })
}

/// What the pod is told.
pub fn message(pod: &Pod, usage: Option<&PodUsage>, cause: &Threshold, seen: &Observations) -> String {
    let resource = cause.signal.resource();
    let mut text = format!("The node was low on resource: {resource}. ");
    if let Some(seen) = seen.get(&cause.signal) {
        let bound = binary(cause.value.of(seen.capacity));
        text += &format!("Threshold quantity: {bound}, available: {}. ", binary_or_plain(cause.signal, seen.available));
    }
    for container in usage.iter().flat_map(|u| &u.containers) {
        let used = match resource {
            "memory" => container.memory_bytes,
            "ephemeral-storage" => container.layer.0 + container.logs.0,
            _ => continue,
        };
        let spec = model::container_spec(pod, &container.name);
        let Some(spec) = spec else { continue };
        let requests = spec.resources.as_ref().and_then(|r| r.requests.as_ref());
        let request = requests.and_then(|list| list.get(resource));
        if used > request.and_then(quantity::value).unwrap_or(0) {
            let request = request.map_or("0", |quantity| quantity.0.as_str());
            let name = &container.name;
            text += &format!("Container {name} was using {}, request is {request}, has larger consumption of {resource}. ", binary(used));
        }
    }
    text
}

fn binary_or_plain(signal: Signal, amount: i64) -> String {
    if matches!(signal.resource(), "inodes" | "pids") { amount.to_string() } else { binary(amount) }
}

/// A number of bytes as upstream prints a binary quantity: with the largest suffix that keeps it whole.
pub fn binary(bytes: i64) -> String {
    let mut amount = bytes;
    let mut suffix = "";
    for next in ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"] {
        if amount == 0 || amount % 1024 != 0 {
            break;
        }
        amount /= 1024;
        suffix = next;
    }
    format!("{amount}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::plan::Observation;
    use crate::eviction::thresholds::parse;
    use serde_json::{Value, json};

    fn pod(name: &str, priority: i32, resources: &Value) -> Arc<Pod> {
        let spec = json!({"priority": priority, "containers": [{"name": "c", "resources": resources}]});
        Arc::new(serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).expect("a pod"))
    }

    fn uses(memory_bytes: i64, layer: i64, processes: i64) -> Option<PodUsage> {
        let container = ContainerUsage { name: "c".to_owned(), memory_bytes, layer: (layer, 1), logs: (10, 1) };
        Some(PodUsage { containers: vec![container], volumes: (0, 0), processes })
    }

    fn order(signal: Signal, mut pods: Vec<Candidate>) -> String {
        rank(&mut pods, signal, false);
        pods.iter().map(|(pod, _)| model::name(pod)).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn ranks_as_upstream() {
        let asks = json!({"requests": {"memory": "100", "ephemeral-storage": "100"}});
        let all = || {
            vec![
                (pod("within", 0, &asks), uses(90, 20, 1)),
                (pod("over-high", 10, &asks), uses(900, 900, 2)),
                (pod("over", 0, &asks), uses(150, 150, 3)),
                (pod("over-more", 0, &json!({})), uses(300, 300, 4)),
                (pod("unknown", 20, &asks), None),
            ]
        };
        // Above the request first, then by priority, then by how far above.
        assert_eq!(order(Signal::MemoryAvailable, all()), "over-more over over-high unknown within");
        assert_eq!(order(Signal::NodeFsAvailable, all()), "over-more over over-high unknown within");
        assert_eq!(order(Signal::PidAvailable, all()), "over-more over within over-high unknown");
    }

    #[test]
    fn messages_as_upstream() {
        let thresholds = parse(&["memory.available<100Mi".to_owned()], &[], &[], &[]).expect("a flag");
        let seen = Observations::from([(Signal::MemoryAvailable, Observation { capacity: 1 << 30, available: 50 << 20 })]);
        let pod = pod("p", 0, &json!({"requests": {"memory": "1Mi"}}));
        let text = message(&pod, uses(3 << 20, 0, 0).as_ref(), &thresholds[0], &seen);
        assert_eq!(
            text,
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. Container c was using 3Mi, request is 1Mi, \
             has larger consumption of memory. "
        );
        assert_eq!(binary(1500), "1500");
        assert_eq!(binary(0), "0");
    }

    #[test]
    fn ephemeral_storage_has_limits() {
        let pod = pod("p", 0, &json!({"limits": {"ephemeral-storage": "1Ki"}}));
        let over = |usage: Option<PodUsage>| over_ephemeral_limit(&pod, &usage.expect("known"), false);
        assert_eq!(over(uses(0, 1014, 0)), None);
        let text = over(uses(0, 1015, 0)).expect("over the limit");
        assert_eq!(text, "Pod ephemeral local storage usage exceeds the total limit of containers 1Ki. ");
    }
}
