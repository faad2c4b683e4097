//! Ephemeral containers (`kubectl debug`) as ordinary container specs.

use k8s_openapi::api::core::v1::{Container, Pod};

/// The pod's ephemeral containers; all their fields but `targetContainerName` are a container's.
pub fn containers(pod: &Pod) -> Vec<Container> {
    let ephemeral = pod.spec.iter().flat_map(|s| s.ephemeral_containers.iter().flatten());
    ephemeral.filter_map(|c| serde_json::from_value(serde_json::to_value(c).ok()?).ok()).collect()
}

/// The container whose PID namespace the ephemeral container joins.
pub fn target_name<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    let ephemeral = pod.spec.iter().flat_map(|s| s.ephemeral_containers.iter().flatten());
    ephemeral.filter(|c| c.name == name).find_map(|c| c.target_container_name.as_deref()).filter(|target| !target.is_empty())
}
