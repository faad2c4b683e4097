//! What a group used so far, from the files of either version, in the units of the fields' names.

use std::collections::BTreeMap;
use std::path::Path;

use super::Cgroup;
use super::files::read_optional;
use crate::Result;

/// What a group used so far. Parts whose controller is missing are zero or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Processor time.
    pub cpu: CpuStats,
    /// Memory.
    pub memory: MemoryStats,
    /// Tasks.
    pub pids: PidsStats,
    /// Block devices.
    pub io: Vec<IoEntry>,
}

/// Processor time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// All, in nanoseconds.
    pub usage_ns: u64,
    /// In user mode, in nanoseconds.
    pub user_ns: u64,
    /// In the kernel, in nanoseconds.
    pub system_ns: u64,
    /// Periods of the quota that passed.
    pub periods: u64,
    /// Periods in which the quota was used up.
    pub throttled_periods: u64,
    /// How long it waited for the next period, in nanoseconds.
    pub throttled_ns: u64,
    /// By processor, in nanoseconds (v1 only).
    pub per_cpu_ns: Vec<u64>,
}

/// Memory, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// All that is charged to the group.
    pub usage_bytes: u64,
    /// The highest usage.
    pub peak_bytes: u64,
    /// The limit; `u64::MAX` for none.
    pub limit_bytes: u64,
    /// How often the limit was hit (v1: failcnt, v2: `max` of memory.events).
    pub limit_hits: u64,
    /// How many processes the OOM killer ended.
    pub oom_kills: u64,
    /// v1: memory and swap; v2: swap.
    pub swap_usage_bytes: u64,
    /// v1: memory and swap; v2: swap; `u64::MAX` for none.
    pub swap_limit_bytes: u64,
    /// `memory.stat` as it is.
    pub stat: BTreeMap<String, u64>,
}

impl MemoryStats {
    /// Usage without the page cache that can be dropped at once: what kubelet calls the working set.
    pub fn working_set_bytes(&self) -> u64 {
        let inactive = self.stat.get("total_inactive_file").or_else(|| self.stat.get("inactive_file"));
        self.usage_bytes.saturating_sub(inactive.copied().unwrap_or(0))
    }

    /// Anonymous memory.
    pub fn rss_bytes(&self) -> u64 {
        self.stat.get("total_rss").or_else(|| self.stat.get("anon")).copied().unwrap_or(0)
    }
}

/// Tasks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PidsStats {
    /// How many now.
    pub current: u64,
    /// The limit; 0 for none.
    pub limit: u64,
}

/// One counter of one block device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoEntry {
    /// Major number.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
    /// `Read`, `Write`... (v1); `rbytes`, `wios`... (v2).
    pub operation: String,
    /// Whether operations are counted, not bytes.
    pub counts_operations: bool,
    /// The counter.
    pub value: u64,
}

fn number(path: &Path) -> Result<Option<u64>> {
    Ok(read_optional(path)?.map(|text| match text.trim() {
        "max" => u64::MAX,
        other => other.parse().unwrap_or(0),
    }))
}

fn table(path: &Path) -> Result<BTreeMap<String, u64>> {
    let text = read_optional(path)?.unwrap_or_default();
    Ok(text
        .lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect())
}

/// v1 writes "no limit" as the highest multiple of a page.
fn v1_limit(value: u64) -> u64 {
    if value >= 0x7fff_ffff_ffff_0000 { u64::MAX } else { value }
}

pub(super) fn read_v1(cgroup: &Cgroup) -> Result<Stats> {
    let mut stats = Stats::default();
    if let Some(dir) = cgroup.v1_directory("cpuacct") {
        stats.cpu.usage_ns = number(&dir.join("cpuacct.usage"))?.unwrap_or(0);
        stats.cpu.user_ns = number(&dir.join("cpuacct.usage_user"))?.unwrap_or(0);
        stats.cpu.system_ns = number(&dir.join("cpuacct.usage_sys"))?.unwrap_or(0);
        let per_cpu = read_optional(&dir.join("cpuacct.usage_percpu"))?.unwrap_or_default();
        stats.cpu.per_cpu_ns = per_cpu.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    }
    if let Some(dir) = cgroup.v1_directory("cpu") {
        let table = table(&dir.join("cpu.stat"))?;
        let get = |key: &str| table.get(key).copied().unwrap_or(0);
        stats.cpu.periods = get("nr_periods");
        stats.cpu.throttled_periods = get("nr_throttled");
        stats.cpu.throttled_ns = get("throttled_time");
    }
    if let Some(dir) = cgroup.v1_directory("memory") {
        let get = |file: &str| Ok::<_, crate::Error>(number(&dir.join(file))?.unwrap_or(0));
        stats.memory = MemoryStats {
            usage_bytes: get("memory.usage_in_bytes")?,
            peak_bytes: get("memory.max_usage_in_bytes")?,
            limit_bytes: v1_limit(get("memory.limit_in_bytes")?),
            limit_hits: get("memory.failcnt")?,
            oom_kills: table(&dir.join("memory.oom_control"))?.get("oom_kill").copied().unwrap_or(0),
            swap_usage_bytes: get("memory.memsw.usage_in_bytes")?,
            swap_limit_bytes: v1_limit(get("memory.memsw.limit_in_bytes")?),
            stat: table(&dir.join("memory.stat"))?,
        };
    }
    if let Some(dir) = cgroup.v1_directory("pids") {
        stats.pids = pids(dir)?;
    }
    if let Some(dir) = cgroup.v1_directory("blkio") {
        for (file, counts_operations) in
            [("blkio.throttle.io_service_bytes_recursive", false), ("blkio.throttle.io_serviced_recursive", true)]
        {
            let text = read_optional(&dir.join(file))?.unwrap_or_default();
            stats.io.extend(text.lines().filter_map(|line| v1_io(line, counts_operations)));
        }
    }
    Ok(stats)
}

fn v1_io(line: &str, counts_operations: bool) -> Option<IoEntry> {
    let mut fields = line.split(' ');
    let (major, minor) = fields.next()?.split_once(':')?;
    Some(IoEntry {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        operation: fields.next()?.to_owned(),
        counts_operations,
        value: fields.next()?.parse().ok()?,
    })
}

fn pids(dir: &Path) -> Result<PidsStats> {
    let limit = number(&dir.join("pids.max"))?.unwrap_or(0);
    Ok(PidsStats { current: number(&dir.join("pids.current"))?.unwrap_or(0), limit: if limit == u64::MAX { 0 } else { limit } })
}

pub(super) fn read_v2(dir: &Path) -> Result<Stats> {
    let cpu = table(&dir.join("cpu.stat"))?;
    let us = |key: &str| cpu.get(key).copied().unwrap_or(0);
    let events = table(&dir.join("memory.events"))?;
    let mut stats = Stats {
        cpu: CpuStats {
            usage_ns: us("usage_usec") * 1000,
            user_ns: us("user_usec") * 1000,
            system_ns: us("system_usec") * 1000,
            periods: us("nr_periods"),
            throttled_periods: us("nr_throttled"),
            throttled_ns: us("throttled_usec") * 1000,
            per_cpu_ns: Vec::new(),
        },
        memory: MemoryStats {
            usage_bytes: number(&dir.join("memory.current"))?.unwrap_or(0),
            peak_bytes: number(&dir.join("memory.peak"))?.unwrap_or(0),
            limit_bytes: number(&dir.join("memory.max"))?.unwrap_or(u64::MAX),
            limit_hits: events.get("max").copied().unwrap_or(0),
            oom_kills: events.get("oom_kill").copied().unwrap_or(0),
            swap_usage_bytes: number(&dir.join("memory.swap.current"))?.unwrap_or(0),
            swap_limit_bytes: number(&dir.join("memory.swap.max"))?.unwrap_or(u64::MAX),
            stat: table(&dir.join("memory.stat"))?,
        },
        pids: pids(dir)?,
        io: Vec::new(),
    };
    for line in read_optional(&dir.join("io.stat"))?.unwrap_or_default().lines() {
        stats.io.extend(v2_io(line));
    }
    Ok(stats)
}

fn v2_io(line: &str) -> Vec<IoEntry> {
    let mut fields = line.split(' ');
    let Some((major, minor)) = fields.next().and_then(|device| device.split_once(':')) else { return Vec::new() };
    let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { return Vec::new() };
    fields
        .filter_map(|field| {
            let (operation, value) = field.split_once('=')?;
            Some(IoEntry {
                major,
                minor,
                operation: operation.to_owned(),
                counts_operations: operation.ends_with("ios"),
                value: value.parse().ok()?,
            })
        })
        .collect()
}
