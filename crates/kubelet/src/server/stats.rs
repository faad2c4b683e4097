//! `/stats/summary` from CRI's container stats (upstream pkg/kubelet/server/stats, k8s.io/kubelet/pkg/apis/stats/v1alpha1).

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use protocols::cri::v1 as cri;
use serde_json::{Value, json};

use crate::kubelet::Kubelet;
use crate::model::{self, labels};
use crate::node::host;
use crate::server::Refusal;

/// The summary of the node and its pods.
pub async fn summary(kubelet: &Kubelet, pods: &client::Informer<Pod>) -> Result<Value, Refusal> {
    let stats = kubelet.runtime.container_stats().await;
    let stats = stats.map_err(|e| Refusal::internal(crate::runtime::go_error(&e)))?;
    let mut by_pod: HashMap<String, Vec<&cri::ContainerStats>> = HashMap::new();
    for container in &stats {
        let attributes = container.attributes.as_ref();
        if let Some(uid) = attributes.and_then(|a| a.labels.get(labels::POD_UID)) {
            by_pod.entry(uid.clone()).or_default().push(container);
        }
    }
    let list = pods.list();
    let pods: Vec<Value> = list.iter().map(|pod| pod_stats(pod, by_pod.get(model::uid(pod)))).collect();
    let now = crate::status::truncate(Timestamp::now());
    let disk = host::disk(&kubelet.config.root_dir);
    Ok(json!({
        "node": {
            "nodeName": kubelet.node_name,
            "startTime": crate::status::truncate(kubelet.started).to_string(),
            "memory": {
                "time": now.to_string(),
                "availableBytes": host::memory_available_bytes(),
                "workingSetBytes": kubelet.facts.memory_bytes - host::memory_available_bytes(),
            },
            "fs": {
                "time": now.to_string(),
                "availableBytes": disk.available_bytes,
                "capacityBytes": disk.capacity_bytes,
                "usedBytes": disk.capacity_bytes.saturating_sub(disk.available_bytes),
                "inodes": disk.inodes,
                "inodesFree": disk.inodes_free,
            },
        },
        "pods": pods,
    }))
}

fn pod_stats(pod: &Pod, containers: Option<&Vec<&cri::ContainerStats>>) -> Value {
    let containers = containers.map(Vec::as_slice).unwrap_or_default();
    let cpu: u64 = containers.iter().filter_map(|c| nano_cores(c)).sum();
    let seconds: u64 = containers.iter().filter_map(|c| core_seconds(c)).sum();
    let memory: u64 = containers.iter().filter_map(|c| working_set(c)).sum();
    let time = time_of(containers.iter().filter_map(|c| c.cpu.as_ref().map(|u| u.timestamp)).max());
    let start = pod.status.as_ref().and_then(|s| s.start_time.as_ref()).map(|t| t.0.to_string());
    json!({
        "podRef": {"name": model::name(pod), "namespace": model::namespace(pod), "uid": model::uid(pod)},
        "startTime": start,
        "containers": containers.iter().map(|c| container_stats(c)).collect::<Vec<_>>(),
        "cpu": {"time": time, "usageNanoCores": cpu, "usageCoreNanoSeconds": seconds},
        "memory": {"time": time, "workingSetBytes": memory},
    })
}

fn container_stats(stats: &cri::ContainerStats) -> Value {
    let attributes = stats.attributes.as_ref();
    let name = attributes.and_then(|a| a.labels.get(labels::CONTAINER_NAME).cloned()).unwrap_or_default();
    let memory = stats.memory.as_ref();
    let layer = stats.writable_layer.as_ref();
    json!({
        "name": name,
        "cpu": {
            "time": time_of(stats.cpu.as_ref().map(|c| c.timestamp)),
            "usageNanoCores": nano_cores(stats),
            "usageCoreNanoSeconds": core_seconds(stats),
        },
        "memory": {
            "time": time_of(memory.map(|m| m.timestamp)),
            "usageBytes": memory.and_then(|m| m.usage_bytes).map(|v| v.value),
            "workingSetBytes": working_set(stats),
            "rssBytes": memory.and_then(|m| m.rss_bytes).map(|v| v.value),
            "pageFaults": memory.and_then(|m| m.page_faults).map(|v| v.value),
            "majorPageFaults": memory.and_then(|m| m.major_page_faults).map(|v| v.value),
        },
        "rootfs": {
            "time": time_of(layer.map(|l| l.timestamp)),
            "usedBytes": layer.and_then(|l| l.used_bytes).map(|v| v.value),
            "inodesUsed": layer.and_then(|l| l.inodes_used).map(|v| v.value),
        },
    })
}

fn nano_cores(stats: &cri::ContainerStats) -> Option<u64> {
    stats.cpu.as_ref()?.usage_nano_cores.map(|v| v.value)
}

fn core_seconds(stats: &cri::ContainerStats) -> Option<u64> {
    stats.cpu.as_ref()?.usage_core_nano_seconds.map(|v| v.value)
}

fn working_set(stats: &cri::ContainerStats) -> Option<u64> {
    stats.memory.as_ref()?.working_set_bytes.map(|v| v.value)
}

fn time_of(nanoseconds: Option<i64>) -> Option<String> {
    model::from_ns(nanoseconds?).map(|t| crate::status::truncate(t).to_string())
}
