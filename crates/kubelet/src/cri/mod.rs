//! CRI configurations from the pod's spec: what RunPodSandbox and CreateContainer are sent
//! (recorded in reference/seams/kubelet-cri.md; upstream pkg/kubelet/kuberuntime, v1.37). Pure but for file reads
//! that the caller has done.

pub mod container;
pub mod dns;
pub mod hosts;
pub mod sandbox;
pub mod security;
#[cfg(test)]
mod tests;

/// What the configurations need of the node.
#[derive(Clone, Debug, Default)]
pub struct NodeFacts {
    /// Memory of the node, bytes.
    pub memory_bytes: i64,
    /// The runtime's cgroup path below which pods are: `/kubepods` or with `--cgroup-root` before it; empty without
    /// `--cgroups-per-qos`.
    pub cgroup_root: String,
    /// Below it are the logs of pods.
    pub log_root: String,
    /// Sizes of huge pages that the node has, as `2MB`.
    pub hugepage_sizes: Vec<String>,
    /// The memory cgroup can limit swap.
    pub swap_limit: bool,
    /// The host uses cgroup v2.
    pub cgroup_v2: bool,
    /// Directory of localhost seccomp profiles.
    pub seccomp_root: String,
    /// `--cluster-domain`.
    pub cluster_domain: String,
}

/// The pod's log directory: `ROOT/NS_NAME_UID`.
pub fn log_directory(root: &str, pod: &k8s_openapi::api::core::v1::Pod) -> String {
    use crate::model;
    format!("{root}/{}_{}_{}", model::namespace(pod), model::name(pod), model::uid(pod))
}
