//! What every part of the kubelet shares.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use client::Informer;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Service};

use crate::config::Config;
use crate::cri::NodeFacts;
use crate::cri::dns::ClusterDns;
use crate::downward::Facts;
use crate::events::Recorder;
use crate::runtime::Runtime;

/// Shared by all tasks.
pub struct Kubelet {
    /// The flags.
    pub config: Config,
    /// The API server.
    pub client: kube::Client,
    /// The container runtime.
    pub runtime: Runtime,
    /// Events.
    pub recorder: Recorder,
    /// The node's name.
    pub node_name: String,
    /// Facts for CRI configurations.
    pub facts: NodeFacts,
    /// Services, for environment variables.
    pub services: Informer<Service>,
    /// The own Node object.
    pub node: Informer<Node>,
    /// When this kubelet started.
    pub started: Timestamp,
    /// Images, as garbage collection has seen them.
    pub images: Mutex<crate::image_gc::Records>,
    /// What changes while it runs.
    pub live: RwLock<Live>,
}

/// What changes while the kubelet runs.
#[derive(Clone, Debug, Default)]
pub struct Live {
    /// The node's addresses, the primary one first.
    pub host_ips: Vec<String>,
    /// The runtime's name.
    pub runtime_name: String,
    /// What pods may use.
    pub allocatable: std::collections::BTreeMap<String, k8s_openapi::apimachinery::pkg::api::resource::Quantity>,
    /// What the node is short of.
    pub pressures: Vec<crate::eviction::Pressure>,
    /// Why the runtime's network is not ready, if it is not.
    pub network_error: Option<String>,
}

impl Kubelet {
    /// A copy of what changes.
    pub fn live(&self) -> Live {
        self.live.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what changes.
    pub fn update_live(&self, change: impl FnOnce(&mut Live)) {
        change(&mut self.live.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Directory of a pod.
    pub fn pod_directory(&self, uid: &str) -> PathBuf {
        crate::volume::pod_directory(&self.config.root_dir, uid)
    }

    /// `--cluster-dns` and `--cluster-domain`.
    pub fn cluster_dns(&self) -> ClusterDns {
        ClusterDns {
            servers: self.config.cluster_dns.iter().map(ToString::to_string).collect(),
            domain: self.config.cluster_domain.clone(),
        }
    }

    /// Facts for the downward API of a pod with these addresses.
    pub fn downward_facts(&self, pod_ips: Vec<String>) -> Facts {
        let live = self.live();
        Facts { pod_ips, host_ips: live.host_ips, allocatable: live.allocatable }
    }

    /// All services that have a cluster IP.
    pub fn services(&self) -> Vec<Arc<Service>> {
        self.services.list()
    }
}
