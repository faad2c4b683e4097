//! Measuring the node and its pods.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use protocols::cri::v1 as cri;

use crate::apply::blocking;
use crate::cri::log_directory;
use crate::eviction::plan::{Observation, Observations};
use crate::eviction::rank::{Candidate, ContainerUsage, PodUsage};
use crate::eviction::thresholds::Signal;
use crate::kubelet::Kubelet;
use crate::model::{self, labels};
use crate::node::host;
use crate::volume::usage;

/// What the node has.
pub struct Node {
    /// By signal.
    pub seen: Observations,
    /// Images are on another filesystem than the kubelet's directory.
    pub dedicated_image_fs: bool,
}

/// Measures the node.
pub async fn node(kubelet: &Kubelet) -> Node {
    let image_root = image_root(kubelet).await;
    let root = kubelet.config.root_dir.clone();
    let measured = blocking(move || Ok(measure(&root, image_root.as_deref()))).await;
    measured.unwrap_or(Node { seen: Observations::new(), dedicated_image_fs: false })
}

/// Where the runtime keeps images.
pub async fn image_root(kubelet: &Kubelet) -> Option<PathBuf> {
    let info = kubelet.runtime.image_fs_info().await.ok()?;
    let first = info.image_filesystems.first()?.fs_id.as_ref()?;
    (!first.mountpoint.is_empty()).then(|| PathBuf::from(&first.mountpoint))
}

fn measure(root: &Path, image_root: Option<&Path>) -> Node {
    let mut seen = Observations::new();
    let whole = |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX);
    let mut disk = |path: &Path, bytes: Signal, inodes: Signal| {
        let disk = host::disk(path);
        if disk.capacity_bytes > 0 {
            let observation = Observation { capacity: whole(disk.capacity_bytes), available: whole(disk.available_bytes) };
            seen.insert(bytes, observation);
        }
        // Some filesystems (btrfs) count no inodes.
        if disk.inodes > 0 {
            seen.insert(inodes, Observation { capacity: whole(disk.inodes), available: whole(disk.inodes_free) });
        }
    };
    disk(root, Signal::NodeFsAvailable, Signal::NodeFsInodesFree);
    if let Some(image_root) = image_root {
        disk(image_root, Signal::ImageFsAvailable, Signal::ImageFsInodesFree);
    }
    let memory = host::memory_bytes();
    if memory > 0 {
        seen.insert(Signal::MemoryAvailable, Observation { capacity: memory, available: host::memory_available_bytes() });
    }
    if let Some((max, running)) = host::pids() {
        seen.insert(Signal::PidAvailable, Observation { capacity: max, available: max - running });
    }
    let device = |path: &Path| path.metadata().map(|m| m.dev()).ok();
    let dedicated_image_fs = image_root.is_some_and(|path| device(path).is_some() && device(path) != device(root));
    Node { seen, dedicated_image_fs }
}

/// Measures pods; one of which the runtime knows nothing has no usage.
pub async fn pods(kubelet: &Arc<Kubelet>, pods: Vec<Arc<Pod>>) -> Vec<Candidate> {
    let mut by_pod: HashMap<String, Vec<cri::ContainerStats>> = HashMap::new();
    match kubelet.runtime.container_stats().await {
        Ok(stats) => {
            for container in stats {
                let uid = container.attributes.as_ref().and_then(|a| a.labels.get(labels::POD_UID).cloned());
                by_pod.entry(uid.unwrap_or_default()).or_default().push(container);
            }
        }
        Err(error) => tracing::warn!(%error, "failed to measure containers"),
    }
    let shared = kubelet.clone();
    let count = pods.clone();
    let measured = blocking(move || {
        let one = |pod: Arc<Pod>| {
            let usage = by_pod.get(model::uid(&pod)).map(|stats| pod_usage(&shared, &pod, stats));
            (pod, usage)
        };
        Ok(count.into_iter().map(one).collect())
    });
    measured.await.unwrap_or_else(|_| pods.into_iter().map(|pod| (pod, None)).collect())
}

fn pod_usage(kubelet: &Kubelet, pod: &Pod, stats: &[cri::ContainerStats]) -> PodUsage {
    let logs = log_directory(&kubelet.facts.log_root, pod);
    let whole = |value: Option<cri::UInt64Value>| value.and_then(|v| i64::try_from(v.value).ok()).unwrap_or(0);
    let containers = stats.iter().map(|stats| {
        let name = stats.attributes.as_ref().and_then(|a| a.labels.get(labels::CONTAINER_NAME).cloned()).unwrap_or_default();
        let layer = stats.writable_layer.as_ref();
        ContainerUsage {
            memory_bytes: whole(stats.memory.as_ref().and_then(|m| m.working_set_bytes)),
            layer: (whole(layer.and_then(|l| l.used_bytes)), whole(layer.and_then(|l| l.inodes_used))),
            logs: usage::used(&Path::new(&logs).join(&name)),
            name,
        }
    });
    let mut volumes = (0, 0);
    for volume in usage::empty_dirs(&kubelet.config.root_dir, pod) {
        let used = usage::used(&volume);
        volumes = (volumes.0 + used.0, volumes.1 + used.1);
    }
    PodUsage { containers: containers.collect(), volumes, processes: crate::cgroups::processes(pod, &kubelet.facts) }
}
