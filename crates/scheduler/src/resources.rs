//! What a pod asks of a node and what a node has (upstream: `component-helpers/resource`, `pkg/scheduler/util`).

use std::collections::BTreeMap;

use apimachinery::quantity::Quantity as Parsed;
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// What a container that asks for none counts as when nodes are scored: a tenth of a CPU, in thousandths.
const DEFAULT_MILLI_CPU: i64 = 100;
/// What a container that asks for none counts as when nodes are scored, in bytes.
const DEFAULT_MEMORY_BYTES: i64 = 200 * 1024 * 1024;

/// Amounts by resource name: CPU in thousandths of one, all else in whole units (bytes for memory).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources(pub BTreeMap<String, i64>);

impl Resources {
    /// Reads a resource list. What does not parse counts as nothing: the API server refuses it.
    pub fn of(list: Option<&BTreeMap<String, Quantity>>) -> Self {
        let amount = |name: &str, quantity: &Quantity| {
            let Ok(parsed) = quantity.0.parse::<Parsed>() else { return 0 };
            if name == "cpu" { parsed.milli_value() } else { parsed.value() }
        };
        Resources(list.into_iter().flatten().map(|(name, quantity)| (name.clone(), amount(name, quantity))).collect())
    }

    /// The amount of a resource; 0 where it is not named.
    pub fn get(&self, name: &str) -> i64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Adds another list.
    pub fn add(&mut self, other: &Resources) {
        for (name, amount) in &other.0 {
            *self.0.entry(name.clone()).or_default() += amount;
        }
    }

    /// Takes another list away.
    pub fn subtract(&mut self, other: &Resources) {
        for (name, amount) in &other.0 {
            *self.0.entry(name.clone()).or_default() -= amount;
        }
    }

    fn raise_to(&mut self, other: &Resources) {
        for (name, amount) in &other.0 {
            let own = self.0.entry(name.clone()).or_default();
            *own = (*own).max(*amount);
        }
    }
}

/// What a pod asks for: the larger of what its containers need together and what any of its init containers needs while it
/// runs (restartable ones stay), and its overhead.
pub fn requests(pod: &Pod) -> Resources {
    total(pod, |container| Resources::of(container.resources.as_ref().and_then(|resources| resources.requests.as_ref())))
}

/// The same for scoring, where what asks for nothing still counts.
pub fn scored_requests(pod: &Pod) -> Resources {
    total(pod, |container| {
        let mut own = Resources::of(container.resources.as_ref().and_then(|resources| resources.requests.as_ref()));
        own.0.entry("cpu".to_owned()).or_insert(DEFAULT_MILLI_CPU);
        own.0.entry("memory".to_owned()).or_insert(DEFAULT_MEMORY_BYTES);
        own
    })
}

fn total(pod: &Pod, of: impl Fn(&Container) -> Resources) -> Resources {
    let Some(spec) = &pod.spec else { return Resources::default() };
    let mut running = Resources::default();
    for container in &spec.containers {
        running.add(&of(container));
    }
    let mut sidecars = Resources::default();
    let mut peak = Resources::default();
    for container in spec.init_containers.iter().flatten() {
        let own = of(container);
        if container.restart_policy.as_deref() == Some("Always") {
            running.add(&own);
            sidecars.add(&own);
            peak.raise_to(&sidecars);
        } else {
            let mut at_once = sidecars.clone();
            at_once.add(&own);
            peak.raise_to(&at_once);
        }
    }
    running.raise_to(&peak);
    // What the pod asks for as a whole stands for what its containers ask for.
    let whole = Resources::of(spec.resources.as_ref().and_then(|resources| resources.requests.as_ref()));
    running.0.extend(whole.0);
    running.add(&Resources::of(spec.overhead.as_ref()));
    running
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_containers_count_while_they_run() {
        let pod: Pod = serde_json::from_value(serde_json::json!({ "spec": {
            "overhead": { "cpu": "10m" },
            "initContainers": [
                { "name": "side", "restartPolicy": "Always", "resources": { "requests": { "cpu": "100m", "memory": "1Mi" } } },
                { "name": "once", "resources": { "requests": { "cpu": "1", "memory": "1Mi" } } } ],
            "containers": [{ "name": "a", "resources": { "requests": { "cpu": "500m", "memory": "8Mi" } } }, { "name": "b" }] } }))
        .unwrap();
        let all = requests(&pod);
        assert_eq!((all.get("cpu"), all.get("memory")), (1110, 9 << 20));
        assert_eq!(scored_requests(&pod).get("memory"), (9 << 20) + DEFAULT_MEMORY_BYTES);
    }

    #[test]
    fn what_the_pod_asks_for_as_a_whole_counts() {
        let pod: Pod = serde_json::from_value(serde_json::json!({ "spec": {
            "resources": { "requests": { "cpu": "2" }, "limits": { "cpu": "4" } },
            "containers": [{ "name": "a", "resources": { "requests": { "cpu": "500m", "memory": "8Mi" } } }, { "name": "b" }] } }))
        .unwrap();
        let all = requests(&pod);
        assert_eq!((all.get("cpu"), all.get("memory")), (2000, 8 << 20));
        assert_eq!(scored_requests(&pod).get("cpu"), 2000);
    }
}
