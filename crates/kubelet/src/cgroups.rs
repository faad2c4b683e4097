//! Cgroups of QoS classes and pods (upstream pkg/kubelet/cm/{qos,pod}_container_manager_linux.go, v1.37). Blocks.

use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use linux::cgroup::{Cgroup, Host, Resources};

use crate::cri::{NodeFacts, sandbox};
use crate::qos;

/// How long a pod's cgroup may stay busy after its last process ended.
const PATIENCE: Duration = Duration::from_secs(2);

/// Makes the tiers for QoS classes below the root.
pub fn make_tiers(root: &str) -> Result<(), linux::Error> {
    let host = Host::detect()?;
    let tier = |path: &str| -> Result<Cgroup, linux::Error> {
        let group = Cgroup::new(&host, Path::new(path));
        group.create()?;
        Ok(group)
    };
    tier(root)?;
    let best_effort = tier(&format!("{root}/besteffort"))?;
    let mut least = Resources::default();
    least.cpu.shares = Some(2);
    best_effort.apply(&least)?;
    tier(&format!("{root}/burstable"))?;
    Ok(())
}

/// Makes the pod's cgroup with its limits; nothing when it is there or cgroups are off.
pub fn make_pod(pod: &Pod, node: &NodeFacts) -> Result<(), linux::Error> {
    let path = sandbox::cgroup_parent(pod, node);
    if path.is_empty() {
        return Ok(());
    }
    let group = Cgroup::new(&Host::detect()?, Path::new(&path));
    if !group.exists() {
        group.create()?;
        group.apply(&limits(pod))?;
    }
    Ok(())
}

fn limits(pod: &Pod) -> Resources {
    let sums = qos::pod_resources(pod);
    let mut resources = Resources::default();
    let shares = qos::cpu_shares(sums.cpu_request_milli);
    resources.cpu.shares = u64::try_from(shares).ok();
    if let Some(limit) = sums.cpu_limit_milli.filter(|l| *l > 0) {
        resources.cpu.quota = Some(qos::cpu_quota_us(limit));
        resources.cpu.period = u64::try_from(qos::CPU_PERIOD_US).ok();
    }
    resources.memory.limit = sums.memory_limit_bytes.filter(|l| *l > 0);
    resources
}

/// How many processes the pod has; 0 when that cannot be told.
pub fn processes(pod: &Pod, node: &NodeFacts) -> i64 {
    let path = sandbox::cgroup_parent(pod, node);
    if path.is_empty() {
        return 0;
    }
    let pids = Host::detect().and_then(|host| Cgroup::new(&host, Path::new(&path)).pids());
    pids.map_or(0, |pids| i64::try_from(pids.len()).unwrap_or(i64::MAX))
}

/// Removes the pod's cgroup; fine when it is gone.
pub fn remove_pod(pod: &Pod, node: &NodeFacts) -> Result<(), linux::Error> {
    let path = sandbox::cgroup_parent(pod, node);
    if path.is_empty() {
        return Ok(());
    }
    Cgroup::new(&Host::detect()?, Path::new(&path)).remove(PATIENCE)
}

/// Removes cgroups of pods whose uid is not among `kept`; one that is busy is left for the next time.
pub fn remove_unknown(root: &str, kept: &std::collections::HashSet<String>) -> Result<(), linux::Error> {
    if root.is_empty() {
        return Ok(());
    }
    let host = Host::detect()?;
    for tier in ["", "/burstable", "/besteffort"] {
        let path = format!("{root}{tier}");
        let mut names = std::collections::BTreeSet::new();
        for (_, directory) in Cgroup::new(&host, Path::new(&path)).directories() {
            let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
            names.extend(entries.filter_map(|e| e.file_name().into_string().ok()));
        }
        for name in names {
            let gone = name.strip_prefix("pod").is_some_and(|uid| uid.len() == 36 && !kept.contains(uid));
            if gone && let Err(error) = Cgroup::new(&host, Path::new(&format!("{path}/{name}"))).remove(Duration::ZERO) {
                tracing::debug!(%error, "a cgroup of a pod that is gone cannot be removed yet");
            }
        }
    }
    Ok(())
}
