//! A cgroup for each side that is measured: its CPU time, its processes and their memory, and the end of all of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Where hierarchies are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";
/// The names under which the v1 hierarchy that counts CPU time is mounted.
const CPUACCT: [&str; 3] = ["cpuacct", "cpu,cpuacct", "cpuacct,cpu"];
/// How long processes and groups may take to be gone.
const END: Duration = Duration::from_secs(10);
/// How often they are looked at.
const POLL: Duration = Duration::from_millis(20);

/// A group that holds a daemon, and below it whatever the daemon starts.
pub struct Group {
    /// Its path in every hierarchy, e.g. `/coracle-bench-7/ours`.
    pub path: String,
    hierarchy: PathBuf,
    v2: bool,
}

impl Group {
    /// Makes the group where CPU time is counted.
    pub fn create(path: String) -> Result<Group> {
        let v1 = CPUACCT.iter().map(|name| Path::new(CGROUPS).join(name)).find(|hierarchy| hierarchy.join("cpuacct.usage").exists());
        let v2 = v1.is_none();
        let hierarchy = v1.unwrap_or_else(|| PathBuf::from(CGROUPS));
        let group = Group { path, hierarchy, v2 };
        fs::create_dir_all(group.daemon()).with_context(|| format!("failed to create the cgroup {}", group.path))?;
        Ok(group)
    }

    /// Where pods are put.
    pub fn pods(&self) -> String {
        format!("{}/pods", self.path)
    }

    fn directory(&self) -> PathBuf {
        self.hierarchy.join(self.path.trim_start_matches('/'))
    }

    fn daemon(&self) -> PathBuf {
        self.directory().join("daemon")
    }

    /// A command that moves itself into the group and becomes `program`.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo 0 > \"$0\" && exec \"$@\""]).arg(self.daemon().join("cgroup.procs")).arg(program);
        command
    }

    /// CPU seconds of everything that was ever in the group, also of what has ended.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let file = self.directory().join(if self.v2 { "cpu.stat" } else { "cpuacct.usage" });
        let text = fs::read_to_string(&file).with_context(|| format!("failed to read {}", file.display()))?;
        let number = if self.v2 { text.lines().find_map(|line| line.strip_prefix("usage_usec ")) } else { Some(text.as_str()) };
        let number: f64 =
            number.and_then(|number| number.trim().parse().ok()).with_context(|| format!("{} has no number", file.display()))?;
        Ok(number / if self.v2 { 1e6 } else { 1e9 })
    }

    /// Proportional set size of all processes of the group, KiB.
    pub fn pss_kib(&self) -> Result<u64> {
        // One that is gone in between holds nothing.
        Ok(members(&self.path)?.into_iter().filter_map(|pid| testkit::process::pss_kib(pid).ok()).sum())
    }

    /// How many processes are in the group.
    pub fn processes(&self) -> Result<usize> {
        Ok(members(&self.path)?.len())
    }
}

/// The processes in the group of this path or below it, in any hierarchy.
fn members(path: &str) -> Result<Vec<u32>> {
    let below = format!("{path}/");
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").context("failed to list /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(groups) = fs::read_to_string(entry.path().join("cgroup")) else { continue };
        let inside = |line: &str| line.splitn(3, ':').nth(2).is_some_and(|group| group == path || group.starts_with(&below));
        if groups.lines().any(inside) {
            pids.push(pid);
        }
    }
    Ok(pids)
}

/// Ends every process of the group and removes it from all hierarchies.
pub fn remove(path: &str) -> Result<()> {
    const KILL: u32 = 9;
    let deadline = Instant::now() + END;
    loop {
        let left = members(path)?;
        for pid in &left {
            // An error is a process that has ended since.
            let _ = linux::child::send_signal(*pid, KILL);
        }
        let failed = remove_directories(path.trim_start_matches('/'));
        if left.is_empty() && failed.is_none() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("cgroup {path} cannot be removed: {} processes left; {}", left.len(), failed.unwrap_or_default());
        }
        std::thread::park_timeout(POLL);
    }
}

/// Removes the groups; tells the last that could not be.
fn remove_directories(name: &str) -> Option<String> {
    let hierarchies = fs::read_dir(CGROUPS).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut failed = None;
    for hierarchy in std::iter::once(PathBuf::from(CGROUPS)).chain(hierarchies) {
        let group = hierarchy.join(name);
        if group.is_dir() {
            remove_tree(&group, &mut failed);
        }
    }
    failed
}

fn remove_tree(group: &Path, failed: &mut Option<String>) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path(), failed);
        }
    }
    if let Err(error) = fs::remove_dir(group) {
        *failed = Some(format!("{}: {error}", group.display()));
    }
}
