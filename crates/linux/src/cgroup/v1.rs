//! Limits on cgroup v1. Source: Linux Documentation/admin-guide/cgroup-v1.

use std::path::{Path, PathBuf};

use super::files::{read, write};
use super::{Cgroup, DeviceLimit, Resources, Write, missing};
use crate::{Error, Result};

/// The writes that make these limits, in order. Zero limits of memory, tasks, CPU and huge pages mean "unset", as in
/// runc.
///
/// # Errors
/// For what v1 has no word for.
pub fn plan(resources: &Resources) -> Result<Vec<Write>> {
    let mut writes = Vec::new();
    let mut add = |controller, file: &str, value: String| {
        writes.push(Write { controller, file: file.to_owned(), value });
    };
    let cpu = &resources.cpu;
    if let Some(value) = cpu.shares.filter(|v| *v != 0) {
        add("cpu", "cpu.shares", value.to_string());
    }
    if let Some(value) = cpu.period.filter(|v| *v != 0) {
        add("cpu", "cpu.cfs_period_us", value.to_string());
    }
    if let Some(value) = cpu.quota.filter(|v| *v != 0) {
        add("cpu", "cpu.cfs_quota_us", value.to_string());
    }
    if let Some(value) = cpu.burst {
        add("cpu", "cpu.cfs_burst_us", value.to_string());
    }
    if let Some(value) = cpu.realtime_period.filter(|v| *v != 0) {
        add("cpu", "cpu.rt_period_us", value.to_string());
    }
    if let Some(value) = cpu.realtime_runtime.filter(|v| *v != 0) {
        add("cpu", "cpu.rt_runtime_us", value.to_string());
    }
    if let Some(value) = cpu.idle {
        add("cpu", "cpu.idle", value.to_string());
    }
    if let Some(value) = cpu.cpus.as_ref().filter(|v| !v.is_empty()) {
        add("cpuset", "cpuset.cpus", value.clone());
    }
    if let Some(value) = cpu.mems.as_ref().filter(|v| !v.is_empty()) {
        add("cpuset", "cpuset.mems", value.clone());
    }
    memory(resources, &mut add);
    match resources.pids_limit {
        Some(limit) if limit > 0 => add("pids", "pids.max", limit.to_string()),
        Some(limit) if limit < 0 => add("pids", "pids.max", "max".to_owned()),
        _ => {}
    }
    block_io(resources, &mut add);
    for (size, bytes) in &resources.hugepages {
        add("hugetlb", &format!("hugetlb.{size}.limit_in_bytes"), bytes.to_string());
    }
    if let Some(class) = resources.network.class_id.filter(|v| *v != 0) {
        add("net_cls", "net_cls.classid", class.to_string());
    }
    for (interface, priority) in &resources.network.priorities {
        add("net_prio", "net_prio.ifpriomap", format!("{interface} {priority}"));
    }
    for rdma in &resources.rdma {
        add("rdma", "rdma.max", rdma.line());
    }
    if let Some(file) = resources.unified.keys().next() {
        return Err(Error::invalid("limit by cgroup v2 file", file, "this host's controllers are on cgroup v1"));
    }
    Ok(writes)
}

fn memory(resources: &Resources, add: &mut impl FnMut(&'static str, &str, String)) {
    let memory = &resources.memory;
    if let Some(value) = memory.limit.filter(|v| *v != 0) {
        add("memory", "memory.limit_in_bytes", value.to_string());
    }
    if let Some(value) = memory.swap.filter(|v| *v != 0) {
        add("memory", "memory.memsw.limit_in_bytes", value.to_string());
    } else if memory.limit == Some(-1) {
        // No limit of memory means none of both together: the kernel keeps the two in order.
        add("memory", "memory.memsw.limit_in_bytes", "-1".to_owned());
    }
    if let Some(value) = memory.reservation.filter(|v| *v != 0) {
        add("memory", "memory.soft_limit_in_bytes", value.to_string());
    }
    if let Some(value) = memory.kernel_tcp.filter(|v| *v != 0) {
        add("memory", "memory.kmem.tcp.limit_in_bytes", value.to_string());
    }
    if memory.disable_oom_killer == Some(true) {
        add("memory", "memory.oom_control", "1".to_owned());
    }
    // u64::MAX is how some callers write "-1": unset.
    if let Some(value) = memory.swappiness.filter(|v| *v != u64::MAX) {
        add("memory", "memory.swappiness", value.to_string());
    }
}

fn block_io(resources: &Resources, add: &mut impl FnMut(&'static str, &str, String)) {
    let io = &resources.block_io;
    if let Some(value) = io.weight.filter(|v| *v != 0) {
        add("blkio", "blkio.weight", value.to_string());
    }
    if let Some(value) = io.leaf_weight.filter(|v| *v != 0) {
        add("blkio", "blkio.leaf_weight", value.to_string());
    }
    let lists: [(&str, &[DeviceLimit]); 6] = [
        ("blkio.weight_device", &io.weight_devices),
        ("blkio.leaf_weight_device", &io.leaf_weight_devices),
        ("blkio.throttle.read_bps_device", &io.read_bps),
        ("blkio.throttle.write_bps_device", &io.write_bps),
        ("blkio.throttle.read_iops_device", &io.read_iops),
        ("blkio.throttle.write_iops_device", &io.write_iops),
    ];
    for (file, limits) in lists {
        for limit in limits {
            add("blkio", file, format!("{}:{} {}", limit.major, limit.minor, limit.value));
        }
    }
}

/// Carries the plan out in the directories of `cgroup`.
pub(super) fn apply(cgroup: &Cgroup, resources: &Resources) -> Result<()> {
    if resources.memory.check_before_update {
        check_usage(cgroup, resources)?;
    }
    let mut postponed: Option<(PathBuf, String)> = None;
    for step in plan(resources)? {
        let Some(dir) = cgroup.v1_directory(step.controller) else {
            if can_pass_over(&step) {
                continue;
            }
            return Err(missing(step.controller));
        };
        let mut file = dir.join(&step.file);
        if step.file.starts_with("blkio.weight") && !file.exists() {
            // The weights of the BFQ scheduler, where the older scheduler's are gone (Linux 5.0).
            file = dir.join(step.file.replacen("blkio.", "blkio.bfq.", 1));
        }
        if step.file == "memory.memsw.limit_in_bytes" && step.value == "-1" && !file.exists() {
            continue;
        }
        // Two pairs (period and quota; memory, and memory with swap) are checked against each other by the kernel: what
        // it refuses is tried again after its partner.
        match write(&file, &step.value) {
            Ok(()) => {}
            Err(e) if e.is(libc::EINVAL) && is_first_of_pair(&step.file) && postponed.is_none() => {
                postponed = Some((file, step.value));
                continue;
            }
            Err(e) => return Err(e),
        }
        if let Some((file, value)) = postponed.take() {
            write(&file, &value)?;
        }
    }
    match postponed {
        Some((file, value)) => write(&file, &value),
        None => Ok(()),
    }
}

fn is_first_of_pair(file: &str) -> bool {
    matches!(file, "cpu.cfs_period_us" | "memory.limit_in_bytes" | "cpu.rt_period_us")
}

/// A limit that asks for nothing of a controller that is not there (DESIGN.md's closed list).
fn can_pass_over(step: &Write) -> bool {
    step.controller == "hugetlb" && step.value == "0" || step.value == "-1" || step.value == "max"
}

fn check_usage(cgroup: &Cgroup, resources: &Resources) -> Result<()> {
    let Some(limit) = resources.memory.limit.and_then(|v| u64::try_from(v).ok()).filter(|v| *v != 0) else {
        return Ok(());
    };
    let Some(dir) = cgroup.v1_directory("memory") else { return Err(missing("memory")) };
    let usage = read(&dir.join("memory.usage_in_bytes"))?.trim().parse::<u64>().unwrap_or(0);
    if usage > limit {
        let object = format!("to {limit}");
        return Err(Error::invalid("limit memory", object, &format!("{usage} bytes are used already")));
    }
    Ok(())
}

/// Makes a `cpuset` group and those above it; a new one may not be joined before it has CPUs and memory nodes, which it
/// gets from its parent.
pub(super) fn create_cpuset(dir: &Path, path: &Path) -> Result<()> {
    let depth = path.components().count();
    let chain: Vec<&Path> = dir.ancestors().take(depth + 1).collect();
    for pair in chain.windows(2).rev() {
        let (child, parent) = (pair[0], pair[1]);
        match std::fs::create_dir(child) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::new("mkdir", child.display().to_string(), e));
            }
            _ => {}
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if read(&child.join(file))?.trim().is_empty() {
                write(&child.join(file), read(&parent.join(file))?.trim())?;
            }
        }
    }
    Ok(())
}
