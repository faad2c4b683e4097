//! Limits on cgroup v2. Source: Linux Documentation/admin-guide/cgroup-v2.rst.

use std::path::Path;

use super::files::{read, read_optional, write};
use super::{DeviceLimit, Resources, Write, missing};
use crate::{Error, Result};

/// The weight that stands for v1 shares: the curve through (2, 1), (1024, 100) and (262144, 10000) that runc uses since
/// opencontainers/cgroups v0.0.5.
pub fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0 => 0,
        1 | 2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            10f64.powf(exponent).ceil() as u64
        }
    }
}

/// The writes that make these limits, in order.
///
/// # Errors
/// For what v2 has no word for.
pub fn plan(resources: &Resources) -> Result<Vec<Write>> {
    let mut writes = Vec::new();
    let mut add = |controller, file: &str, value: String| {
        writes.push(Write { controller, file: file.to_owned(), value });
    };
    cpu(resources, &mut add)?;
    memory(resources, &mut add)?;
    match resources.pids_limit {
        Some(limit) if limit > 0 => add("pids", "pids.max", limit.to_string()),
        Some(limit) if limit < 0 => add("pids", "pids.max", "max".to_owned()),
        _ => {}
    }
    block_io(resources, &mut add)?;
    for (size, bytes) in &resources.hugepages {
        add("hugetlb", &format!("hugetlb.{size}.max"), bytes.to_string());
    }
    if resources.network.class_id.is_some_and(|v| v != 0) || !resources.network.priorities.is_empty() {
        return Err(unknown("network class and priorities"));
    }
    for rdma in &resources.rdma {
        add("rdma", "rdma.max", rdma.line());
    }
    for (file, value) in &resources.unified {
        if file.contains('/') || file.starts_with('.') {
            return Err(Error::invalid("limit by cgroup v2 file", file, "it is not the name of a file"));
        }
        add("unified", file, value.clone());
    }
    Ok(writes)
}

fn unknown(what: &str) -> Error {
    Error::invalid("limit by cgroup v2", what, "cgroup v2 has no such limit")
}

fn cpu(resources: &Resources, add: &mut impl FnMut(&'static str, &str, String)) -> Result<()> {
    let cpu = &resources.cpu;
    if cpu.realtime_period.is_some_and(|v| v != 0) || cpu.realtime_runtime.is_some_and(|v| v != 0) {
        return Err(unknown("real-time period and runtime"));
    }
    if let Some(value) = cpu.idle {
        add("cpu", "cpu.idle", value.to_string());
    }
    if let Some(shares) = cpu.shares.filter(|v| *v != 0 && cpu.idle != Some(1)) {
        add("cpu", "cpu.weight", weight_of_shares(shares).to_string());
    }
    if cpu.quota.is_some_and(|v| v != 0) || cpu.period.is_some_and(|v| v != 0) {
        let quota = match cpu.quota {
            Some(quota) if quota > 0 => quota.to_string(),
            _ => "max".to_owned(),
        };
        let period = cpu.period.filter(|v| *v != 0).unwrap_or(100_000);
        add("cpu", "cpu.max", format!("{quota} {period}"));
    }
    if let Some(value) = cpu.burst {
        add("cpu", "cpu.max.burst", value.to_string());
    }
    if let Some(value) = cpu.cpus.as_ref().filter(|v| !v.is_empty()) {
        add("cpuset", "cpuset.cpus", value.clone());
    }
    if let Some(value) = cpu.mems.as_ref().filter(|v| !v.is_empty()) {
        add("cpuset", "cpuset.mems", value.clone());
    }
    Ok(())
}

fn bytes_or_max(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn memory(resources: &Resources, add: &mut impl FnMut(&'static str, &str, String)) -> Result<()> {
    let memory = &resources.memory;
    if memory.kernel_tcp.is_some_and(|v| v > 0) {
        return Err(unknown("kernel memory of TCP"));
    }
    if memory.disable_oom_killer == Some(true) {
        return Err(unknown("disabled OOM killer"));
    }
    if memory.swappiness.is_some_and(|v| v != u64::MAX) {
        return Err(unknown("swappiness"));
    }
    let limit = memory.limit.filter(|v| *v != 0);
    match memory.swap.filter(|v| *v != 0) {
        None if limit == Some(-1) => add("memory", "memory.swap.max", "max".to_owned()),
        None => {}
        Some(swap) if swap < 0 => add("memory", "memory.swap.max", "max".to_owned()),
        Some(swap) => {
            // v1 counts memory and swap together, v2 apart.
            let limit = limit
                .filter(|v| *v > 0)
                .ok_or_else(|| Error::invalid("limit swap", swap.to_string(), "a limit of swap needs a limit of memory"))?;
            if swap < limit {
                return Err(Error::invalid("limit swap", swap.to_string(), "it is lower than the limit of memory"));
            }
            add("memory", "memory.swap.max", (swap - limit).to_string());
        }
    }
    if let Some(limit) = limit {
        add("memory", "memory.max", bytes_or_max(limit));
    }
    if let Some(value) = memory.reservation.filter(|v| *v != 0) {
        add("memory", "memory.low", bytes_or_max(value));
    }
    Ok(())
}

fn block_io(resources: &Resources, add: &mut impl FnMut(&'static str, &str, String)) -> Result<()> {
    let io = &resources.block_io;
    if io.leaf_weight.is_some_and(|v| v != 0) || !io.leaf_weight_devices.is_empty() {
        return Err(unknown("leaf weight"));
    }
    if let Some(weight) = io.weight.filter(|v| *v != 0) {
        add("io", "io.bfq.weight", weight.to_string());
    }
    for limit in &io.weight_devices {
        add("io", "io.bfq.weight", format!("{}:{} {}", limit.major, limit.minor, limit.value));
    }
    let lists: [(&str, &[DeviceLimit]); 4] =
        [("rbps", &io.read_bps), ("wbps", &io.write_bps), ("riops", &io.read_iops), ("wiops", &io.write_iops)];
    for (word, limits) in lists {
        for limit in limits {
            add("io", "io.max", format!("{}:{} {word}={}", limit.major, limit.minor, limit.value));
        }
    }
    Ok(())
}

/// Carries the plan out in `dir`.
pub(super) fn apply(dir: &Path, resources: &Resources) -> Result<()> {
    if resources.memory.check_before_update {
        let usage = read(&dir.join("memory.current"))?.trim().parse::<i64>().unwrap_or(0);
        if resources.memory.limit.is_some_and(|limit| limit > 0 && usage > limit) {
            return Err(Error::invalid("limit memory", "", &format!("{usage} bytes are used already")));
        }
    }
    let mut postponed = None;
    for step in plan(resources)? {
        let file = dir.join(&step.file);
        if !file.exists() {
            // A kernel without swap has nothing to keep from it.
            let nothing = step.controller == "hugetlb" || step.file == "memory.swap.max";
            if step.value == "max" || nothing && step.value == "0" {
                continue;
            }
            if step.file == "io.bfq.weight" {
                write(&dir.join("io.weight"), &io_weight(&step.value))?;
                continue;
            }
            return Err(missing(if step.controller == "unified" { &step.file } else { step.controller }));
        }
        match write(&file, &step.value) {
            // A quota is never below the burst that stands: both are lowered from the burst on.
            Err(e) if e.is(libc::EINVAL) && step.file == "cpu.max" && resources.cpu.burst.is_some() => {
                postponed = Some((file, step.value));
            }
            other => other?,
        }
    }
    postponed.map_or(Ok(()), |(file, value)| write(&file, &value))
}

/// `io.weight` (1 to 10000) for a BFQ weight (10 to 1000), with the device before it when there is one.
fn io_weight(value: &str) -> String {
    let (device, weight) = value.rsplit_once(' ').unwrap_or(("default", value));
    let weight = weight.parse::<u64>().unwrap_or(100).max(10);
    format!("{device} {}", 1 + (weight - 10) * 9999 / 990)
}

/// Makes the group `path` below `mount` and hands the controllers down to it.
pub(super) fn create(mount: &Path, path: &Path) -> Result<()> {
    let mut dir = mount.to_path_buf();
    for part in path.components() {
        hand_down(&dir)?;
        dir.push(part);
        match std::fs::create_dir(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::new("mkdir", dir.display().to_string(), e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Enables all controllers of `dir` for its children. One that cannot be enabled (it is in use on v1, or processes are
/// in `dir`) is left; a limit that needs it is an error later.
fn hand_down(dir: &Path) -> Result<()> {
    let available = read(&dir.join("cgroup.controllers"))?;
    let file = dir.join("cgroup.subtree_control");
    let enabled = read_optional(&file)?.unwrap_or_default();
    let wanted: Vec<String> = available
        .split_whitespace()
        .filter(|name| !enabled.split_whitespace().any(|e| e == *name))
        .map(|name| format!("+{name}"))
        .collect();
    if wanted.is_empty() || write(&file, &wanted.join(" ")).is_ok() {
        return Ok(());
    }
    for name in wanted {
        let _ = write(&file, &name);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::Memory;

    #[test]
    fn weights() {
        for (shares, weight) in [(0, 0), (2, 1), (1024, 100), (262_144, 10_000), (500_000, 10_000)] {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
    }

    #[test]
    fn swap_is_counted_apart() {
        let memory = Memory { limit: Some(100), swap: Some(150), ..Memory::default() };
        let writes = plan(&Resources { memory, ..Resources::default() }).expect("a plan");
        let lines: Vec<String> = writes.iter().map(|w| format!("{}={}", w.file, w.value)).collect();
        assert_eq!(lines, ["memory.swap.max=50", "memory.max=100"]);
        let memory = Memory { limit: Some(100), swap: Some(50), ..Memory::default() };
        assert!(plan(&Resources { memory, ..Resources::default() }).is_err());
    }
}
