//! Whole lists of what a host has, before and after: what a test leaves behind is their difference. And a host of one's own for a test:
//! network and mount namespaces, and a cgroup root.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use linux::nftables::{Nftables, TableFamily};
use linux::rtnl::Route;

/// What can be left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum List {
    /// "PID command line" of every process.
    Processes,
    /// Mount points of this mount namespace, with their file system type.
    Mounts,
    /// Network namespaces that some process or pin holds: "net:[INODE]".
    NetworkNamespaces,
    /// Links of this network namespace.
    Links,
    /// Directories below all cgroup mounts.
    Cgroups,
    /// nftables tables (ip and ip6) of this network namespace.
    Tables,
    /// Values of `/proc/sys/net/ipv4` and `/proc/sys/kernel`.
    Sysctls,
    /// Files directly below /tmp, /run, /var/lib and /var/run.
    TemporaryFiles,
}

/// All lists.
pub const ALL: [List; 8] =
    [List::Processes, List::Mounts, List::NetworkNamespaces, List::Links, List::Cgroups, List::Tables, List::Sysctls, List::TemporaryFiles];

/// The lists at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lists(BTreeMap<List, BTreeSet<String>>);

impl Lists {
    /// Takes the lists asked for, as the calling thread's namespaces show them.
    ///
    /// # Errors
    /// When a list can't be read.
    pub fn take(which: &[List]) -> io::Result<Self> {
        let mut lists = BTreeMap::new();
        for list in which {
            lists.insert(*list, take(*list)?);
        }
        Ok(Self(lists))
    }

    /// What is in `after` and not here ("+ links: cv123"), or here and not in `after` ("- …"), but for lines that contain one of `ignore`.
    pub fn difference(&self, after: &Self, ignore: &[&str]) -> Vec<String> {
        let mut lines = Vec::new();
        let empty = BTreeSet::new();
        for (list, before) in &self.0 {
            let now = after.0.get(list).unwrap_or(&empty);
            lines.extend(now.difference(before).map(|item| format!("+ {list:?}: {item}")));
            lines.extend(before.difference(now).map(|item| format!("- {list:?}: {item}")));
        }
        lines.retain(|line| !ignore.iter().any(|part| line.contains(part)));
        lines
    }

    /// Takes the same lists again until nothing differs or the deadline has passed, for some things end a little later (a namespace's links).
    ///
    /// # Errors
    /// What still differs, a line each; or a list that can't be read.
    pub fn expect_same(&self, ignore: &[&str], deadline: Duration) -> Result<(), String> {
        self.expect(deadline, |now| self.difference(now, ignore))
    }

    /// As [`Lists::expect_same`], for a whole machine: a process of somebody else's that has ended meanwhile is nothing left behind.
    ///
    /// # Errors
    /// What is left, a line each; or a list that can't be read.
    pub fn expect_nothing_left(&self, ignore: &[&str], deadline: Duration) -> Result<(), String> {
        self.expect(deadline, |now| {
            let mut lines = self.difference(now, ignore);
            lines.retain(|line| !line.starts_with(&format!("- {:?}:", List::Processes)));
            lines
        })
    }

    /// What differs all the time until the deadline: what others do meanwhile comes and goes.
    fn expect(&self, deadline: Duration, difference: impl Fn(&Self) -> Vec<String>) -> Result<(), String> {
        let which: Vec<List> = self.0.keys().copied().collect();
        let end = Instant::now() + deadline;
        let mut left: Option<Vec<String>> = None;
        loop {
            let mut now = difference(&Self::take(&which).map_err(|e| e.to_string())?);
            if let Some(left) = &left {
                now.retain(|line| left.contains(line));
            }
            if now.is_empty() {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(now.join("\n"));
            }
            left = Some(now);
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }
}

fn take(list: List) -> io::Result<BTreeSet<String>> {
    let kernel = |e: linux::netlink::Error| io::Error::other(e.to_string());
    Ok(match list {
        List::Processes => processes()?.into_iter().map(|(pid, line)| format!("{pid} {line}")).collect(),
        List::Mounts => mounts()?.into_iter().map(|m| format!("{} {}", m.point.display(), m.kind)).collect(),
        List::NetworkNamespaces => network_namespaces()?,
        List::Links => Route::open().and_then(|mut r| r.links()).map_err(kernel)?.into_iter().map(|l| l.name).collect(),
        List::Cgroups => {
            let mut found = BTreeSet::new();
            for mount in mounts()?.iter().filter(|m| m.kind.starts_with("cgroup")) {
                directories(&mount.point, &mut found);
            }
            found
        }
        List::Tables => {
            let mut nft = Nftables::open().map_err(kernel)?;
            let mut names = BTreeSet::new();
            for (word, family) in [("ip", TableFamily::Ipv4), ("ip6", TableFamily::Ipv6)] {
                names.extend(nft.tables(family).map_err(kernel)?.into_iter().map(|name| format!("{word} {name}")));
            }
            names
        }
        List::Sysctls => {
            let mut found = BTreeSet::new();
            settings(Path::new("/proc/sys/net/ipv4"), &mut found);
            settings(Path::new("/proc/sys/kernel"), &mut found);
            found
        }
        List::TemporaryFiles => {
            let mut found = BTreeSet::new();
            for dir in ["/tmp", "/var/tmp", "/dev/shm", "/run", "/var/lib"] {
                for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                    found.insert(entry.path().display().to_string());
                }
            }
            found
        }
    })
}

fn pids() -> io::Result<Vec<u32>> {
    let entries = std::fs::read_dir("/proc")?.flatten();
    Ok(entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
}

/// All processes of this PID namespace, without kernel threads, by pid, with their command lines (the words parted by spaces).
///
/// # Errors
/// When `/proc` can't be read.
pub fn processes() -> io::Result<Vec<(u32, String)>> {
    let lines = pids()?.into_iter().map(|pid| (pid, command_line(pid)));
    Ok(lines.filter(|(_, line)| !line.is_empty()).collect())
}

/// A process's command line, its words parted by spaces; empty for a kernel thread, and for one that has ended.
pub fn command_line(pid: u32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).replace('\0', " ").trim_end().to_owned()
}

/// The processes in whose command lines all of these words stand.
///
/// # Panics
/// When `/proc` can't be read.
pub fn pids_with(words: &[&str]) -> Vec<u32> {
    let all = processes().expect("a procfs");
    all.into_iter().filter(|(_, line)| words.iter().all(|word| line.contains(word))).map(|(pid, _)| pid).collect()
}

struct MountLine {
    point: PathBuf,
    kind: String,
}

fn mounts() -> io::Result<Vec<MountLine>> {
    let text = std::fs::read_to_string("/proc/thread-self/mountinfo")?;
    let parse = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        Some(MountLine { point: left.split(' ').nth(4)?.into(), kind: right.split(' ').next()?.into() })
    };
    Ok(text.lines().filter_map(parse).collect())
}

fn network_namespaces() -> io::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for pid in pids()? {
        found.extend(std::fs::read_link(format!("/proc/{pid}/ns/net")).ok().map(|link| link.display().to_string()));
    }
    for mount in mounts()?.iter().filter(|m| m.kind == "nsfs") {
        let inode = std::fs::metadata(&mount.point).map(|m| std::os::unix::fs::MetadataExt::ino(&m));
        found.extend(inode.ok().map(|inode| format!("pin:[{inode}]")));
    }
    Ok(found)
}

fn directories(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            found.insert(entry.path().display().to_string());
            directories(&entry.path(), found);
        }
    }
}

/// Settings that change by themselves are left out.
fn settings(dir: &Path, found: &mut BTreeSet<String>) {
    const RESTLESS: [&str; 8] = ["tcp_fastopen_key", "random", "ns_last_pid", "pty", "nr", "neigh", "perf_event_max_sample_rate", "route"];
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if RESTLESS.iter().any(|r| name.to_str() == Some(r)) {
            continue;
        }
        if path.is_dir() {
            settings(&path, found);
        } else if let Ok(value) = std::fs::read_to_string(&path) {
            found.insert(format!("{}={}", path.display(), value.trim()));
        }
    }
}

/// A host of a test's own.
#[derive(Debug)]
pub struct Host {
    /// The test's cgroup, relative to the root of each hierarchy: "/coracle-test-PID-N".
    pub cgroup: String,
    roots: Vec<PathBuf>,
}

impl Host {
    /// A command that starts in this host's cgroups (the calling thread's namespaces are inherited).
    pub fn command(&self, program: &str) -> Command {
        // The shell puts itself into the groups and then becomes the program: nothing of the program runs outside.
        let mut command = Command::new("/bin/sh");
        let procs: Vec<String> = self.roots.iter().map(|root| format!("echo 0 > '{}/cgroup.procs'", root.display())).collect();
        command.args(["-ec", &format!("{}; exec \"$0\" \"$@\"", procs.join("; "))]).arg(program);
        command
    }

    fn remove(&self) {
        for root in &self.roots {
            kill_all(root);
            let end = Instant::now() + Duration::from_secs(5);
            while !remove_groups(root) && Instant::now() < end {
                kill_all(root);
                std::thread::park_timeout(Duration::from_millis(5));
            }
        }
    }
}

/// Runs `test` on a host of its own: a new network namespace with loopback up, a new mount namespace, an empty cgroup in each hierarchy. All is
/// removed again, with every process in those cgroups, also when the test panics. Skips (`None`, told on stderr) where that is not allowed.
///
/// # Errors
/// When the host can't be made, or the test panics.
pub fn on_own_host<T: Send>(name: &str, test: impl FnOnce(&Host) -> T + Send) -> io::Result<Option<T>> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    if std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self")?) != 0 {
        eprintln!("SKIPPED: {name}: not root");
        return Ok(None);
    }
    let cgroup = format!("/coracle-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let mut host = Host { cgroup: cgroup.clone(), roots: Vec::new() };
    for mount in mounts()?.iter().filter(|m| m.kind.starts_with("cgroup")) {
        let root = mount.point.join(&cgroup[1..]);
        if std::fs::create_dir(&root).is_ok() {
            inherit_cpuset(&mount.point, &root);
            host.roots.push(root);
        }
    }
    let done = linux::netns::in_private(|| {
        Route::open().and_then(|mut route| route.set_up(1)).map_err(|e| io::Error::other(e.to_string()))?;
        Ok(test(&host))
    });
    host.remove();
    done.and_then(|done| done).map(Some)
}

/// A cpuset v1 group takes no process until it has CPUs and nodes.
fn inherit_cpuset(parent: &Path, child: &Path) {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if let Ok(value) = std::fs::read_to_string(parent.join(file)) {
            let _ = std::fs::write(child.join(file), value.trim());
        }
    }
}

fn kill_all(group: &Path) {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            kill_all(&entry.path());
        }
    }
    let procs = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    for pid in procs.lines().filter(|pid| *pid != "0") {
        let _ = Command::new("kill").args(["-9", pid]).output();
    }
}

fn remove_groups(group: &Path) -> bool {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    std::fs::remove_dir(group).is_ok() || !group.exists()
}

/// What a finished command printed, or an error with all of it.
///
/// # Errors
/// When it ended with another status than 0.
pub fn checked(output: Output) -> io::Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let how = output.status.code().map_or_else(|| format!("signal {:?}", output.status.signal()), |code| format!("status {code}"));
    Err(io::Error::other(format!("{how}\nstdout: {text}\nstderr: {}", String::from_utf8_lossy(&output.stderr))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_of_its_own_leaves_nothing() {
        let which = [List::Links, List::Tables, List::Mounts];
        let before = Lists::take(&which).unwrap();
        let seen = on_own_host("a_host_of_its_own_leaves_nothing", |host| {
            let links = Lists::take(&[List::Links]).unwrap();
            let text = checked(host.command("cat").arg("/proc/self/cgroup").output().unwrap()).unwrap();
            assert!(text.contains(&host.cgroup), "{text}");
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            let stray = host.command("sh").args(["-c", "sleep 60 >/dev/null 2>&1 &"]).status().unwrap();
            assert!(stray.success());
            links.0[&List::Links].clone()
        });
        if let Some(links) = seen.unwrap() {
            assert_eq!(links.into_iter().collect::<Vec<_>>(), ["lo"]);
        }
        before.expect_same(&[], Duration::from_secs(5)).unwrap();
        let cgroups = Lists::take(&[List::Cgroups]).unwrap();
        let mine = format!("/coracle-test-{}-", std::process::id());
        assert!(!cgroups.0[&List::Cgroups].iter().any(|c| c.contains(&mine)));
    }
}
