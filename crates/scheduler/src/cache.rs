//! What the scheduler knows of the cluster: nodes with the pods on them, bound or assumed.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use client::ObjectKey;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::labels::Labels;
use crate::resources::{Resources, requests, scored_requests};

/// A port that a pod takes on its node: protocol, host address, number.
pub type HostPort = (String, String, i32);

/// A pod with what the scheduler computes of it once.
#[derive(Clone, Debug)]
pub struct PodInfo {
    /// The pod.
    pub pod: Arc<Pod>,
    /// What it asks for.
    pub requests: Resources,
    /// What it counts as when nodes are scored.
    pub scored: Resources,
    /// The ports that it takes on its node.
    pub host_ports: Vec<HostPort>,
}

impl PodInfo {
    /// Computes.
    pub fn new(pod: Arc<Pod>) -> Self {
        PodInfo { requests: requests(&pod), scored: scored_requests(&pod), host_ports: host_ports(&pod), pod }
    }
}

fn host_ports(pod: &Pod) -> Vec<HostPort> {
    let spec = pod.spec.as_ref();
    let containers = spec.into_iter().flat_map(|spec| {
        spec.containers.iter().chain(spec.init_containers.iter().flatten().filter(|init| init.restart_policy.as_deref() == Some("Always")))
    });
    let ports = containers.flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let number = port.host_port.filter(|number| *number > 0)?;
            let address = port.host_ip.clone().filter(|address| !address.is_empty()).unwrap_or_else(|| "0.0.0.0".to_owned());
            Some((port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()), address, number))
        })
        .collect()
}

/// A node and what is on it.
#[derive(Clone, Debug)]
pub struct NodeInfo {
    /// The node.
    pub node: Arc<Node>,
    /// What pods may ask of it.
    pub allocatable: Resources,
    /// Images on it: normalized name to size in bytes.
    pub images: HashMap<String, i64>,
    /// The pods on it.
    pub pods: BTreeMap<ObjectKey, PodInfo>,
    /// What they ask for together.
    pub requested: Resources,
    /// What they count as together.
    pub scored: Resources,
}

impl NodeInfo {
    fn new(node: Arc<Node>) -> Self {
        let status = node.status.as_ref();
        let images = status.and_then(|status| status.images.as_ref()).into_iter().flatten();
        let images = images
            .flat_map(|image| image.names.iter().flatten().map(|name| (normalized_image(name), image.size_bytes.unwrap_or(0))))
            .collect();
        NodeInfo {
            allocatable: Resources::of(status.and_then(|status| status.allocatable.as_ref())),
            images,
            node,
            pods: BTreeMap::new(),
            requested: Resources::default(),
            scored: Resources::default(),
        }
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        self.node.metadata.name.as_deref().unwrap_or_default()
    }

    /// The value of one of its labels.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.node.metadata.labels.as_ref()?.get(key).map(String::as_str)
    }

    fn add(&mut self, key: ObjectKey, info: PodInfo) {
        self.requested.add(&info.requests);
        self.scored.add(&info.scored);
        self.pods.insert(key, info);
    }

    fn remove(&mut self, key: &ObjectKey) {
        if let Some(info) = self.pods.remove(key) {
            self.requested.subtract(&info.requests);
            self.scored.subtract(&info.scored);
        }
    }
}

/// An image's name with its tag.
pub fn normalized_image(name: &str) -> String {
    let tagged = name.rfind(':') > name.rfind('/');
    if tagged { name.to_owned() } else { format!("{name}:latest") }
}

/// The cluster.
#[derive(Debug, Default)]
pub struct Cache {
    nodes: BTreeMap<String, NodeInfo>,
    /// Where each pod is, and those whose node is not known yet.
    places: HashMap<ObjectKey, String>,
    orphans: HashMap<ObjectKey, PodInfo>,
    /// Labels of namespaces.
    pub namespaces: BTreeMap<String, Labels>,
    /// Selectors of services and replica sets, by their own key: what spreads pods by default.
    pub selectors: HashMap<(&'static str, ObjectKey), LabelSelector>,
}

impl Cache {
    /// The nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeInfo> {
        self.nodes.values()
    }

    /// A node was made or changed.
    pub fn set_node(&mut self, node: Arc<Node>) {
        let name = node.metadata.name.clone().unwrap_or_default();
        let mut info = NodeInfo::new(node);
        match self.nodes.remove(&name) {
            Some(old) => (info.pods, info.requested, info.scored) = (old.pods, old.requested, old.scored),
            None => {
                let here: Vec<ObjectKey> = self.orphans.keys().filter(|key| self.places.get(key) == Some(&name)).cloned().collect();
                for key in here {
                    if let Some(pod) = self.orphans.remove(&key) {
                        info.add(key, pod);
                    }
                }
            }
        }
        self.nodes.insert(name, info);
    }

    /// A node is gone; its pods are remembered, for it may come back.
    pub fn remove_node(&mut self, name: &str) {
        if let Some(info) = self.nodes.remove(name) {
            self.orphans.extend(info.pods);
        }
    }

    /// A pod is on a node, bound or assumed.
    pub fn set_pod(&mut self, node: &str, pod: Arc<Pod>) {
        let key = ObjectKey::of(pod.as_ref());
        self.remove_pod(&key);
        let info = PodInfo::new(pod);
        self.places.insert(key.clone(), node.to_owned());
        match self.nodes.get_mut(node) {
            Some(node) => node.add(key, info),
            None => drop(self.orphans.insert(key, info)),
        }
    }

    /// A pod is on no node any more.
    pub fn remove_pod(&mut self, key: &ObjectKey) {
        let Some(node) = self.places.remove(key) else { return };
        self.orphans.remove(key);
        if let Some(node) = self.nodes.get_mut(&node) {
            node.remove(key);
        }
    }

    /// Where a pod is.
    pub fn place_of(&self, key: &ObjectKey) -> Option<&str> {
        self.places.get(key).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_requested_follows_pods_and_nodes() {
        let node: Node =
            serde_json::from_value(json!({ "metadata": { "name": "n" }, "status": { "allocatable": { "cpu": "2" } } })).unwrap();
        let pod: Pod = serde_json::from_value(json!({ "metadata": { "namespace": "ns", "name": "p" }, "spec": {
            "containers": [{ "name": "c", "resources": { "requests": { "cpu": "1" } } }] } }))
        .unwrap();
        let mut cache = Cache::default();
        cache.set_pod("n", Arc::new(pod.clone()));
        cache.set_node(Arc::new(node.clone()));
        let cpu = |cache: &Cache| cache.nodes().next().map(|node| node.requested.get("cpu"));
        assert_eq!(cpu(&cache), Some(1000));
        cache.set_pod("n", Arc::new(pod.clone()));
        assert_eq!(cpu(&cache), Some(1000));
        cache.remove_node("n");
        cache.set_node(Arc::new(node));
        assert_eq!(cpu(&cache), Some(1000));
        cache.remove_pod(&ObjectKey::of(&pod));
        assert_eq!(cpu(&cache), Some(0));
    }

    #[test]
    fn images_have_a_tag() {
        assert_eq!(normalized_image("localhost:5000/a"), "localhost:5000/a:latest");
        assert_eq!(normalized_image("a:v1"), "a:v1");
    }
}
