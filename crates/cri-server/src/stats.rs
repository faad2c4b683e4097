//! What containers and pods use: the shim's cgroup metrics, the pod's own cgroup, its network and its writable layers.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use prost::Message;
use protocols::cri::v1::{
    ContainerAttributes, ContainerStats, CpuUsage, FilesystemIdentifier, FilesystemUsage, LinuxPodSandboxStats, MemoryUsage,
    NetworkInterfaceUsage, NetworkUsage, PodSandboxAttributes, PodSandboxStats, ProcessUsage, SwapUsage, UInt64Value,
};
use protocols::shim::cgroups::{v1, v2};

use crate::error::{Error, Result};
use crate::host;
use crate::server::Server;
use crate::state::{Container, Sandbox, lock};

/// Two looks at processor time must be this far apart to make a rate, in nanoseconds.
const RATE_WINDOW_MIN: i64 = 100_000_000;

/// Counters of a cgroup, whatever its version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub cpu_ns: u64,
    pub memory_bytes: u64,
    pub memory_limit_bytes: u64,
    pub working_set_bytes: u64,
    pub rss_bytes: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
    pub swap_bytes: u64,
    pub swap_limit_bytes: u64,
    pub processes: u64,
}

impl Usage {
    /// Reads the shim's metrics; `None` if they are of no known type.
    pub fn of_metrics(metrics: &prost_types::Any) -> Option<Self> {
        let kind = metrics.type_url.rsplit('/').next().unwrap_or("");
        if kind == v1::TYPE_URL {
            let metrics = v1::Metrics::decode(metrics.value.as_slice()).ok()?;
            let memory = metrics.memory.unwrap_or_default();
            let (usage, swap) = (memory.usage.unwrap_or_default(), memory.swap.unwrap_or_default());
            return Some(Self {
                cpu_ns: metrics.cpu.and_then(|cpu| cpu.usage).map_or(0, |usage| usage.total),
                memory_bytes: usage.usage,
                memory_limit_bytes: usage.limit,
                working_set_bytes: usage.usage.saturating_sub(memory.total_inactive_file),
                rss_bytes: memory.total_rss,
                page_faults: memory.total_pg_fault,
                major_page_faults: memory.total_pg_maj_fault,
                // v1 counts memory and swap together.
                swap_bytes: swap.usage.saturating_sub(usage.usage),
                swap_limit_bytes: swap.limit.saturating_sub(usage.limit),
                processes: metrics.pids.map_or(0, |pids| pids.current),
            });
        }
        if kind == v2::TYPE_URL {
            let metrics = v2::Metrics::decode(metrics.value.as_slice()).ok()?;
            let memory = metrics.memory.unwrap_or_default();
            return Some(Self {
                cpu_ns: metrics.cpu.map_or(0, |cpu| cpu.usage_usec.saturating_mul(1000)),
                memory_bytes: memory.usage,
                memory_limit_bytes: memory.usage_limit,
                working_set_bytes: memory.usage.saturating_sub(memory.inactive_file),
                rss_bytes: memory.anon,
                page_faults: memory.pgfault,
                major_page_faults: memory.pgmajfault,
                swap_bytes: memory.swap_usage,
                swap_limit_bytes: memory.swap_limit,
                processes: metrics.pids.map_or(0, |pids| pids.current),
            });
        }
        None
    }

    /// Reads a cgroup of this host.
    fn of_cgroup(stats: &linux::cgroup::Stats) -> Self {
        let memory = &stats.memory;
        let stat = |name: &str| memory.stat.get(&format!("total_{name}")).or_else(|| memory.stat.get(name)).copied().unwrap_or(0);
        Self {
            cpu_ns: stats.cpu.usage_ns,
            memory_bytes: memory.usage_bytes,
            memory_limit_bytes: memory.limit_bytes,
            working_set_bytes: memory.working_set_bytes(),
            rss_bytes: memory.rss_bytes(),
            page_faults: stat("pgfault"),
            major_page_faults: stat("pgmajfault"),
            processes: stats.pids.current,
            ..Self::default()
        }
    }
}

/// The last look at the processor time of each id, and the rate it gave.
#[derive(Debug, Default)]
pub struct Samples(HashMap<String, Sample>);

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: i64,
    cpu_ns: u64,
    nano_cores: Option<u64>,
}

impl Samples {
    /// Notes a look; the rate in billionths of a processor since the last one, once there was one.
    pub fn rate(&mut self, id: &str, at: i64, cpu_ns: u64) -> Option<u64> {
        let Some(last) = self.0.get(id).copied() else {
            self.0.insert(id.to_owned(), Sample { at, cpu_ns, nano_cores: None });
            return None;
        };
        let passed = at - last.at;
        if passed < RATE_WINDOW_MIN {
            return last.nano_cores;
        }
        let used = u128::from(cpu_ns.saturating_sub(last.cpu_ns)) * 1_000_000_000;
        let nano_cores = u64::try_from(used / u128::from(passed.unsigned_abs())).ok();
        self.0.insert(id.to_owned(), Sample { at, cpu_ns, nano_cores });
        nano_cores
    }

    /// Forgets what is gone.
    pub fn forget(&mut self, id: &str) {
        self.0.remove(id);
    }
}

fn value(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

fn cpu(at: i64, usage: &Usage, rate: Option<u64>) -> CpuUsage {
    CpuUsage { timestamp: at, usage_core_nano_seconds: value(usage.cpu_ns), usage_nano_cores: rate.and_then(value), psi: None }
}

fn memory(at: i64, usage: &Usage) -> MemoryUsage {
    // A limit beyond any machine's memory is none.
    let limit = Some(usage.memory_limit_bytes).filter(|limit| *limit > 0 && *limit < 1 << 62);
    MemoryUsage {
        timestamp: at,
        working_set_bytes: value(usage.working_set_bytes),
        available_bytes: value(limit.map_or(0, |limit| limit.saturating_sub(usage.working_set_bytes))),
        usage_bytes: value(usage.memory_bytes),
        rss_bytes: value(usage.rss_bytes),
        page_faults: value(usage.page_faults),
        major_page_faults: value(usage.major_page_faults),
        psi: None,
    }
}

impl Server {
    /// What a container uses; one that does not run uses no processor and memory.
    ///
    /// # Errors
    /// [`Error::Shim`] if its shim does not answer.
    pub async fn container_stats(self: &Arc<Self>, container: &Arc<Container>) -> Result<ContainerStats> {
        let at = host::now();
        let mut stats = ContainerStats {
            attributes: Some(ContainerAttributes {
                id: container.id.clone(),
                metadata: container.config.metadata.clone(),
                labels: container.config.labels.clone(),
                annotations: container.config.annotations.clone(),
            }),
            writable_layer: self.writable_layer(&container.id, at).await,
            ..ContainerStats::default()
        };
        if !matches!(container.state(), crate::state::ContainerState::Running { .. }) {
            return Ok(stats);
        }
        let sandbox = self.registry(|registry| registry.sandbox(&container.sandbox_id))?;
        let Some(shim) = sandbox.shim() else { return Ok(stats) };
        let metrics = match shim.stats(&container.id).await {
            Ok(metrics) => metrics,
            // It has ended meanwhile.
            Err(error) if error.is_not_found() => None,
            Err(source) => return Err(Error::Shim { act: "ask for the stats of container", id: container.id.clone(), source }),
        };
        if let Some(usage) = metrics.as_ref().and_then(Usage::of_metrics) {
            let rate = lock(&self.samples).rate(&container.id, at, usage.cpu_ns);
            stats.cpu = Some(cpu(at, &usage, rate));
            stats.memory = Some(memory(at, &usage));
            stats.swap = Some(SwapUsage {
                timestamp: at,
                swap_available_bytes: value(usage.swap_limit_bytes.saturating_sub(usage.swap_bytes)),
                swap_usage_bytes: value(usage.swap_bytes),
            });
        }
        Ok(stats)
    }

    async fn writable_layer(&self, id: &str, at: i64) -> Option<FilesystemUsage> {
        let usage = self.images.snapshot_usage(id).await?;
        Some(FilesystemUsage {
            timestamp: at,
            fs_id: Some(FilesystemIdentifier { mountpoint: self.config.root.to_string() }),
            used_bytes: value(usage.bytes),
            inodes_used: value(usage.inodes),
        })
    }

    /// What a pod uses, with its containers.
    ///
    /// # Errors
    /// As [`Server::container_stats`].
    pub async fn sandbox_stats(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<PodSandboxStats> {
        let at = host::now();
        let containers = self.registry(|registry| registry.containers_of(&sandbox.id));
        let running = containers.iter().filter(|container| matches!(container.state(), crate::state::ContainerState::Running { .. }));
        let mut stats = Vec::new();
        for container in running {
            stats.push(self.container_stats(container).await?);
        }
        let parent = sandbox.config.linux.as_ref().map(|linux| linux.cgroup_parent.clone()).unwrap_or_default();
        let pid = sandbox.facts().pid;
        let has_network = sandbox.netns.is_some() && sandbox.is_ready();
        let (usage, network) = self
            .blocking(move || {
                let usage = if parent.is_empty() { None } else { pod_usage(&parent) };
                Ok((usage, if has_network { network_usage(pid, at) } else { None }))
            })
            .await?;
        let usage = usage.unwrap_or_else(|| sum(&stats));
        let rate = lock(&self.samples).rate(&sandbox.id, at, usage.cpu_ns);
        Ok(PodSandboxStats {
            attributes: Some(PodSandboxAttributes {
                id: sandbox.id.clone(),
                metadata: sandbox.config.metadata.clone(),
                labels: sandbox.config.labels.clone(),
                annotations: sandbox.config.annotations.clone(),
            }),
            linux: Some(LinuxPodSandboxStats {
                cpu: Some(cpu(at, &usage, rate)),
                memory: Some(memory(at, &usage)),
                network,
                process: Some(ProcessUsage { timestamp: at, process_count: value(usage.processes) }),
                containers: stats,
                io: None,
            }),
            windows: None,
        })
    }
}

/// The sum over containers, of a pod without a cgroup of its own.
fn sum(containers: &[ContainerStats]) -> Usage {
    let number = |value: &Option<UInt64Value>| value.as_ref().map_or(0, |value| value.value);
    containers.iter().fold(Usage::default(), |mut sum, stats| {
        if let Some(cpu) = &stats.cpu {
            sum.cpu_ns += number(&cpu.usage_core_nano_seconds);
        }
        if let Some(memory) = &stats.memory {
            sum.memory_bytes += number(&memory.usage_bytes);
            sum.working_set_bytes += number(&memory.working_set_bytes);
            sum.rss_bytes += number(&memory.rss_bytes);
            sum.page_faults += number(&memory.page_faults);
            sum.major_page_faults += number(&memory.major_page_faults);
        }
        sum
    })
}

fn pod_usage(parent: &str) -> Option<Usage> {
    let cgroups = linux::cgroup::Host::detect().ok()?;
    let group = linux::cgroup::Cgroup::new(&cgroups, Path::new(parent));
    if !group.exists() {
        return None;
    }
    group.stats().ok().map(|stats| Usage::of_cgroup(&stats))
}

fn network_usage(pid: u32, at: i64) -> Option<NetworkUsage> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).ok()?;
    let mut interfaces = interfaces(&text);
    let default = interfaces.iter().position(|interface| interface.name == "eth0").map(|place| interfaces.remove(place));
    Some(NetworkUsage { timestamp: at, default_interface: default, interfaces })
}

/// Reads `/proc/net/dev` (proc_net(5)), without the loopback.
fn interfaces(text: &str) -> Vec<NetworkInterfaceUsage> {
    text.lines()
        .filter_map(|line| {
            let (name, numbers) = line.split_once(':')?;
            let numbers: Vec<u64> = numbers.split_whitespace().map_while(|number| number.parse().ok()).collect();
            let at = |place: usize| numbers.get(place).copied().and_then(value);
            (name.trim() != "lo").then(|| NetworkInterfaceUsage {
                name: name.trim().to_owned(),
                rx_bytes: at(0),
                rx_errors: at(2),
                tx_bytes: at(8),
                tx_errors: at(10),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_two_looks() {
        let mut samples = Samples::default();
        assert_eq!(samples.rate("a", 0, 0), None);
        assert_eq!(samples.rate("a", 1_000_000_000, 500_000_000), Some(500_000_000));
        assert_eq!(samples.rate("a", 1_000_000_001, 900_000_000), Some(500_000_000), "too soon: the last rate");
        samples.forget("a");
        assert_eq!(samples.rate("a", 2_000_000_000, 0), None);
    }

    #[test]
    fn network_counters() {
        let text = "Inter-|   Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 1 2 0 0 0 0 0 20 1 3 0 0 0 0 0\n";
        let found = interfaces(text);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].rx_bytes.map(|v| v.value), found[0].tx_bytes.map(|v| v.value)), (Some(10), Some(20)));
        assert_eq!((found[0].rx_errors.map(|v| v.value), found[0].tx_errors.map(|v| v.value)), (Some(2), Some(3)));
    }
}
