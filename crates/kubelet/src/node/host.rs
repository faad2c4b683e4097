//! What the host is: memory, CPUs, ids, kernel, addresses. Blocks on procfs.

use std::net::{IpAddr, UdpSocket};
use std::path::Path;

/// Ticks a second in which the kernel tells times; the same on every architecture that we run on (time(7)).
const USER_HZ: f64 = 100.0;

/// The architecture in Go's word.
pub fn go_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Memory of the host in bytes; 0 when it cannot be read.
pub fn memory_bytes() -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    meminfo(&text, "MemTotal:").unwrap_or(0)
}

/// Memory that may still be used, in bytes.
pub fn memory_available_bytes() -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    meminfo(&text, "MemAvailable:").unwrap_or(0)
}

fn meminfo(text: &str, field: &str) -> Option<i64> {
    let line = text.lines().find(|l| l.starts_with(field))?;
    let kib: i64 = line.split_whitespace().nth(1)?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Processor time that the host has spent on work since its start, in seconds.
pub fn cpu_seconds() -> Option<f64> {
    busy_ticks(&line_of("/proc/stat")).map(|ticks| ticks as f64 / USER_HZ)
}

/// The busy ones of the first line of /proc/stat: user, nice, system, irq, softirq, steal (proc_stat(5)).
fn busy_ticks(line: &str) -> Option<u64> {
    let ticks: Vec<u64> = line.strip_prefix("cpu ")?.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    (ticks.len() >= 8).then(|| ticks[..3].iter().chain(&ticks[5..8]).sum())
}

/// CPUs that this process may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// First line of a file, trimmed; empty when it cannot be read.
pub fn line_of(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or("").trim().to_owned()
}

/// `PRETTY_NAME` of os-release.
pub fn os_image() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("PRETTY_NAME="));
    line.map_or("Linux".to_owned(), |l| l.trim_matches('"').to_owned())
}

/// The host's name, in lower case.
pub fn host_name() -> String {
    line_of("/proc/sys/kernel/hostname").to_lowercase()
}

/// The address of the interface that the default route leaves by; nothing is sent.
pub fn default_ip() -> Option<IpAddr> {
    // A connected UDP socket takes the source address of the route. The destinations are documentation ranges.
    for (bind, to) in [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")] {
        let found = UdpSocket::bind(bind).and_then(|s| {
            s.connect(to)?;
            s.local_addr()
        });
        if let Ok(address) = found
            && !address.ip().is_unspecified()
            && !address.ip().is_loopback()
        {
            return Some(address.ip());
        }
    }
    None
}

/// Capacity and free bytes of the filesystem at `path`, and its inodes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk {
    /// Size, bytes.
    pub capacity_bytes: u64,
    /// Free to unprivileged users, bytes.
    pub available_bytes: u64,
    /// Inodes.
    pub inodes: u64,
    /// Free inodes.
    pub inodes_free: u64,
}

/// The filesystem at `path`; zeros when it cannot be read.
pub fn disk(path: &Path) -> Disk {
    match rustix::fs::statvfs(path) {
        Ok(s) => Disk {
            capacity_bytes: s.f_blocks.saturating_mul(s.f_frsize),
            available_bytes: s.f_bavail.saturating_mul(s.f_frsize),
            inodes: s.f_files,
            inodes_free: s.f_ffree,
        },
        Err(_) => Disk::default(),
    }
}

/// Most process ids that there may be, and how many are in use (upstream pkg/kubelet/stats/pidlimit); `None` when procfs
/// does not tell.
pub fn pids() -> Option<(i64, i64)> {
    let number = |path: &str| line_of(path).parse::<i64>().ok();
    let most = [number("/proc/sys/kernel/pid_max"), number("/proc/sys/kernel/threads-max")].into_iter().flatten().min()?;
    let load = line_of("/proc/loadavg");
    let (_, total) = load.split_whitespace().nth(3)?.split_once('/')?;
    Some((most, total.parse().ok()?))
}

/// Sizes of huge pages as cgroup files name them (`2MB`, `1GB`).
pub fn hugepage_sizes() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/sys/kernel/mm/hugepages") else {
        return Vec::new();
    };
    let mut kib: Vec<u64> = entries
        .filter_map(|e| {
            let name = e.ok()?.file_name().into_string().ok()?;
            name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()
        })
        .collect();
    kib.sort_unstable();
    kib.into_iter()
        .map(|k| match k {
            k if k >= 1 << 20 => format!("{}GB", k >> 20),
            k if k >= 1 << 10 => format!("{}MB", k >> 10),
            k => format!("{k}KB"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_waiting_are_no_work() {
        assert_eq!(busy_ticks("cpu  1 2 4 1000 2000 8 16 32 0 0"), Some(63));
        assert_eq!(busy_ticks("cpu 1 2"), None);
    }
}
