//! Cgroups of a container: its processes, what they use, and running out of memory.
//!
//! Paths come from `/proc/PID/cgroup` of its first process, so they are right whatever the runtime made of `cgroupsPath`.
//! Files: Linux `Documentation/admin-guide/cgroup-v1/` and `cgroup-v2.rst`.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use linux::event::{Interest, Ready};
use prost::Message;
use protocols::shim::cgroups::{v1, v2};
use protocols::shim::events as event;

use crate::daemon::{OOM, Shim};

/// The name that cgroup v2 goes by in [`cgroups_of`].
const UNIFIED: &str = "";

/// A container's cgroups: controller (empty: v2) and directory.
pub type Cgroups = [(String, PathBuf)];

/// The cgroups of a process, as far as their hierarchies are mounted.
#[must_use]
pub fn cgroups_of(pid: u32) -> Vec<(String, PathBuf)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    directories(&text, &hierarchies(&mounts))
}

/// A cgroup path (`/a/b`) in every hierarchy that is mounted and has it.
#[must_use]
pub fn cgroups_at(path: &str) -> Vec<(String, PathBuf)> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<(String, PathBuf)> = hierarchies(&mounts)
        .into_iter()
        .map(|(controller, root)| (controller, root.join(path.trim_start_matches('/'))))
        .filter(|(_, dir)| dir.is_dir())
        .collect();
    found.sort();
    found
}

/// Controller to mount point, from `/proc/self/mountinfo`; bind mounts of parts of a hierarchy are passed over.
fn hierarchies(mountinfo: &str) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let mut fields = left.split(' ').skip(3);
        let (Some("/"), Some(point)) = (fields.next(), fields.next()) else { continue };
        let mut kind = right.split(' ');
        match kind.next() {
            Some("cgroup2") => {
                found.entry(UNIFIED.to_owned()).or_insert_with(|| PathBuf::from(point));
            }
            Some("cgroup") => {
                for option in kind.nth(1).unwrap_or_default().split(',').filter(|option| *option != "rw") {
                    found.entry(option.to_owned()).or_insert_with(|| PathBuf::from(point));
                }
            }
            _ => {}
        }
    }
    found
}

fn directories(cgroup: &str, hierarchies: &BTreeMap<String, PathBuf>) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        for controller in controllers.split(',') {
            if let Some(root) = hierarchies.get(controller) {
                found.push((controller.to_owned(), root.join(path.trim_start_matches('/'))));
            }
        }
    }
    found
}

fn dir<'a>(cgroups: &'a Cgroups, controller: &str) -> Option<&'a Path> {
    cgroups.iter().find(|(name, _)| name == controller).map(|(_, dir)| dir.as_path())
}

/// Whether the resource controllers are cgroup v2's.
fn is_v2(cgroups: &Cgroups) -> bool {
    dir(cgroups, "memory").is_none() && dir(cgroups, "cpu").is_none() && dir(cgroups, UNIFIED).is_some()
}

/// The processes in a container's cgroup and those below it.
#[must_use]
pub fn pids(cgroups: &Cgroups) -> Vec<u32> {
    let places = if is_v2(cgroups) { [UNIFIED, UNIFIED, UNIFIED] } else { ["devices", "memory", "pids"] };
    let Some(top) = places.iter().find_map(|place| dir(cgroups, place)) else { return Vec::new() };
    let mut found = Vec::new();
    let mut below = vec![top.to_owned()];
    while let Some(dir) = below.pop() {
        let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        found.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
        let children = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        below.extend(children.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()));
    }
    found.sort_unstable();
    found
}

/// What Task.Stats answers for these cgroups.
#[must_use]
pub fn metrics(cgroups: &Cgroups) -> prost_types::Any {
    if is_v2(cgroups) {
        let dir = dir(cgroups, UNIFIED).unwrap_or(Path::new("/nonexistent"));
        prost_types::Any { type_url: v2::TYPE_URL.to_owned(), value: metrics_v2(dir).encode_to_vec() }
    } else {
        prost_types::Any { type_url: v1::TYPE_URL.to_owned(), value: metrics_v1(cgroups).encode_to_vec() }
    }
}

/// A file of one number; "max" is the largest. 0 if it cannot be read.
fn number(dir: &Path, file: &str) -> u64 {
    let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
    match text.trim() {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

/// A file of lines `NAME NUMBER`.
fn table(dir: &Path, file: &str) -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?)))
        .collect()
}

fn metrics_v1(cgroups: &Cgroups) -> v1::Metrics {
    let cpu = dir(cgroups, "cpuacct").map(|usage| v1::CpuStat {
        usage: Some(cpu_usage_v1(usage)),
        throttling: dir(cgroups, "cpu").map(|dir| {
            let stat = table(dir, "cpu.stat");
            let of = |name: &str| stat.get(name).copied().unwrap_or(0);
            v1::Throttle { periods: of("nr_periods"), throttled_periods: of("nr_throttled"), throttled_time: of("throttled_time") }
        }),
    });
    let pids = dir(cgroups, "pids").map(|dir| v1::PidsStat {
        current: number(dir, "pids.current"),
        // containerd writes an absent limit as 0.
        limit: Some(number(dir, "pids.max")).filter(|limit| *limit != u64::MAX).unwrap_or(0),
    });
    let memory_oom_control = dir(cgroups, "memory").map(|dir| {
        let control = table(dir, "memory.oom_control");
        let of = |name: &str| control.get(name).copied().unwrap_or(0);
        v1::MemoryOomControl { oom_kill_disable: of("oom_kill_disable"), under_oom: of("under_oom"), oom_kill: of("oom_kill") }
    });
    v1::Metrics {
        pids,
        cpu,
        memory: dir(cgroups, "memory").map(memory_v1),
        blkio: dir(cgroups, "blkio").map(blkio_v1),
        memory_oom_control,
        ..v1::Metrics::default()
    }
}

fn cpu_usage_v1(dir: &Path) -> v1::CpuUsage {
    /// Nanoseconds of a clock tick: USER_HZ is 100 on every architecture of ours.
    const TICK_NANOS: u64 = 10_000_000;
    let stat = table(dir, "cpuacct.stat");
    let of = |name: &str| stat.get(name).copied().unwrap_or(0) * TICK_NANOS;
    let per_cpu = std::fs::read_to_string(dir.join("cpuacct.usage_percpu")).unwrap_or_default();
    v1::CpuUsage {
        total: number(dir, "cpuacct.usage"),
        kernel: of("system"),
        user: of("user"),
        per_cpu: per_cpu.split_whitespace().filter_map(|field| field.parse().ok()).collect(),
    }
}

fn memory_v1(dir: &Path) -> v1::MemoryStat {
    let stat = table(dir, "memory.stat");
    let of = |name: &str| stat.get(name).copied().unwrap_or(0);
    let entry = |part: &str| {
        let file = |what: &str| format!("memory.{part}{what}");
        dir.join(file("usage_in_bytes")).exists().then(|| v1::MemoryEntry {
            limit: number(dir, &file("limit_in_bytes")),
            usage: number(dir, &file("usage_in_bytes")),
            max: number(dir, &file("max_usage_in_bytes")),
            failcnt: number(dir, &file("failcnt")),
        })
    };
    v1::MemoryStat {
        cache: of("cache"),
        rss: of("rss"),
        rss_huge: of("rss_huge"),
        mapped_file: of("mapped_file"),
        dirty: of("dirty"),
        writeback: of("writeback"),
        pg_pg_in: of("pgpgin"),
        pg_pg_out: of("pgpgout"),
        pg_fault: of("pgfault"),
        pg_maj_fault: of("pgmajfault"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        hierarchical_memory_limit: of("hierarchical_memory_limit"),
        hierarchical_swap_limit: of("hierarchical_memsw_limit"),
        total_cache: of("total_cache"),
        total_rss: of("total_rss"),
        total_rss_huge: of("total_rss_huge"),
        total_mapped_file: of("total_mapped_file"),
        total_dirty: of("total_dirty"),
        total_writeback: of("total_writeback"),
        total_pg_pg_in: of("total_pgpgin"),
        total_pg_pg_out: of("total_pgpgout"),
        total_pg_fault: of("total_pgfault"),
        total_pg_maj_fault: of("total_pgmajfault"),
        total_inactive_anon: of("total_inactive_anon"),
        total_active_anon: of("total_active_anon"),
        total_inactive_file: of("total_inactive_file"),
        total_active_file: of("total_active_file"),
        total_unevictable: of("total_unevictable"),
        usage: entry(""),
        swap: entry("memsw."),
        kernel: entry("kmem."),
        kernel_tcp: entry("kmem.tcp."),
    }
}

fn blkio_v1(dir: &Path) -> v1::BlkIoStat {
    let entries = |file: &str| {
        let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        text.lines()
            .filter_map(|line| {
                let mut fields = line.split_whitespace();
                let (major, minor) = fields.next()?.split_once(':')?;
                Some(v1::BlkIoEntry {
                    major: major.parse().ok()?,
                    minor: minor.parse().ok()?,
                    op: fields.next()?.to_owned(),
                    value: fields.next()?.parse().ok()?,
                    device: String::new(),
                })
            })
            .collect()
    };
    v1::BlkIoStat {
        io_service_bytes_recursive: entries("blkio.throttle.io_service_bytes_recursive"),
        io_serviced_recursive: entries("blkio.throttle.io_serviced_recursive"),
        ..v1::BlkIoStat::default()
    }
}

fn metrics_v2(dir: &Path) -> v2::Metrics {
    let cpu = table(dir, "cpu.stat");
    let of = |name: &str| cpu.get(name).copied().unwrap_or(0);
    let events = table(dir, "memory.events");
    let event = |name: &str| events.get(name).copied().unwrap_or(0);
    v2::Metrics {
        pids: Some(v2::PidsStat {
            current: number(dir, "pids.current"),
            limit: Some(number(dir, "pids.max")).filter(|limit| *limit != u64::MAX).unwrap_or(0),
        }),
        cpu: Some(v2::CpuStat {
            usage_usec: of("usage_usec"),
            user_usec: of("user_usec"),
            system_usec: of("system_usec"),
            nr_periods: of("nr_periods"),
            nr_throttled: of("nr_throttled"),
            throttled_usec: of("throttled_usec"),
            nr_bursts: of("nr_bursts"),
            burst_usec: of("burst_usec"),
            psi: pressure(dir, "cpu.pressure"),
        }),
        memory: Some(memory_v2(dir)),
        io: Some(v2::IoStat { usage: io_v2(dir), psi: pressure(dir, "io.pressure") }),
        memory_events: Some(v2::MemoryEvents {
            low: event("low"),
            high: event("high"),
            max: event("max"),
            oom: event("oom"),
            oom_kill: event("oom_kill"),
            oom_group_kill: event("oom_group_kill"),
        }),
        ..v2::Metrics::default()
    }
}

fn memory_v2(dir: &Path) -> v2::MemoryStat {
    let stat = table(dir, "memory.stat");
    let of = |name: &str| stat.get(name).copied().unwrap_or(0);
    v2::MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_refault: of("workingset_refault_anon") + of("workingset_refault_file"),
        workingset_activate: of("workingset_activate_anon") + of("workingset_activate_file"),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: number(dir, "memory.current"),
        usage_limit: number(dir, "memory.max"),
        swap_usage: number(dir, "memory.swap.current"),
        swap_limit: number(dir, "memory.swap.max"),
        max_usage: number(dir, "memory.peak"),
        swap_max_usage: number(dir, "memory.swap.peak"),
        psi: pressure(dir, "memory.pressure"),
    }
}

fn io_v2(dir: &Path) -> Vec<v2::IoEntry> {
    let text = std::fs::read_to_string(dir.join("io.stat")).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (device, rest) = line.split_once(' ')?;
            let (major, minor) = device.split_once(':')?;
            let fields: BTreeMap<&str, u64> = rest
                .split_whitespace()
                .filter_map(|field| field.split_once('='))
                .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
                .collect();
            let of = |name: &str| fields.get(name).copied().unwrap_or(0);
            Some(v2::IoEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                rbytes: of("rbytes"),
                wbytes: of("wbytes"),
                rios: of("rios"),
                wios: of("wios"),
            })
        })
        .collect()
}

fn pressure(dir: &Path, file: &str) -> Option<v2::PsiStats> {
    let text = std::fs::read_to_string(dir.join(file)).ok()?;
    let line = |kind: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let of = |name: &str| rest.split_whitespace().find_map(|field| field.strip_prefix(name));
        let average = |name: &str| of(name).and_then(|value| value.parse::<f64>().ok()).unwrap_or(0.0);
        Some(v2::PsiData {
            avg10: average("avg10="),
            avg60: average("avg60="),
            avg300: average("avg300="),
            total: of("total=").and_then(|value| value.parse().ok()).unwrap_or(0),
        })
    };
    Some(v2::PsiStats { some: line("some"), full: line("full") })
}

/// The watch for a container that runs out of memory.
#[derive(Debug)]
pub struct OomWatch {
    id: u32,
    fd: OwnedFd,
    /// v2: the directory, and the kills that were told.
    v2: Option<(PathBuf, u64)>,
}

impl Shim {
    /// Watches a container's memory cgroup. Without one, or where that is refused, there are no OOM events.
    pub(crate) fn watch_oom(&mut self, id: &str) {
        let number = self.next_socket;
        let Some(container) = self.containers.get_mut(id) else { return };
        let watch = if let Some(dir) = dir(&container.cgroups, "memory") {
            linux::event::eventfd().and_then(|fd| {
                linux::event::watch_oom_v1(dir, std::os::fd::AsFd::as_fd(&fd))?;
                self.epoll.add(&fd, OOM | u64::from(number), Interest::READ)?;
                Ok(OomWatch { id: number, fd, v2: None })
            })
        } else if let Some(dir) = dir(&container.cgroups, UNIFIED) {
            std::fs::File::open(dir.join("memory.events")).and_then(|file| {
                let fd = OwnedFd::from(file);
                self.epoll.add(&fd, OOM | u64::from(number), Interest::PRIORITY_EDGE)?;
                Ok(OomWatch { id: number, fd, v2: Some((dir.to_owned(), 0)) })
            })
        } else {
            return;
        };
        match watch {
            Ok(watch) => {
                container.oom = Some(watch);
                self.next_socket = self.next_socket.wrapping_add(1);
            }
            Err(error) => say!("no OOM events of container {id}: {error}"),
        }
    }

    pub(crate) fn on_oom(&mut self, ready: Ready) {
        let number = u32::try_from(ready.token & 0xffff_ffff).unwrap_or(u32::MAX);
        let found = self.containers.values_mut().find(|one| one.oom.as_ref().is_some_and(|oom| oom.id == number));
        let Some(container) = found else { return };
        let gone = stats_gone(&container.cgroups);
        let Some(oom) = container.oom.as_mut() else { return };
        let told = match oom.v2.as_mut() {
            // The kernel raises it once more when the cgroup is removed.
            None => linux::pipes::read(&oom.fd, &mut [0u8; 8]).is_ok() && !gone,
            Some((dir, kills)) => {
                let now = table(dir, "memory.events").get("oom_kill").copied().unwrap_or(*kills);
                now > std::mem::replace(kills, now)
            }
        };
        if told {
            let id = container.id.clone();
            self.publish("/tasks/oom", "TaskOOM", &event::TaskOom { container_id: id });
        }
    }
}

fn stats_gone(cgroups: &Cgroups) -> bool {
    dir(cgroups, "memory").is_some_and(|dir| !dir.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_a_hybrid_host() {
        let mounts = hierarchies(
            "30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
31 25 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
33 25 0:27 /sub /elsewhere rw - cgroup cgroup rw,memory",
        );
        let dirs = directories("9:memory:/a/b\n8:cpu,cpuacct:/a\n7:pids:/x\n0::/\n", &mounts);
        let text: Vec<String> = dirs.iter().map(|(name, dir)| format!("{name}={}", dir.display())).collect();
        assert_eq!(
            text,
            [
                "memory=/sys/fs/cgroup/memory/a/b",
                "cpu=/sys/fs/cgroup/cpu,cpuacct/a",
                "cpuacct=/sys/fs/cgroup/cpu,cpuacct/a",
                "=/sys/fs/cgroup/unified/"
            ]
        );
        assert!(!is_v2(&dirs));
        assert!(is_v2(&[(String::new(), "/sys/fs/cgroup/x".into())]));
    }
}
