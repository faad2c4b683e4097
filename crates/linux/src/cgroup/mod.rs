//! Control groups: v1, hybrid and v2 hosts behind one handle.
//!
//! On v1 and hybrid hosts a [`Cgroup`] is one directory in each v1 hierarchy that is mounted (they may be split or
//! missing); on v2 hosts it is one directory. Limits are planned purely ([`v1::plan`], [`v2::plan`]) and then written.
//! Source: Linux Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst.
//!
//! **Invariant**: nothing here remounts, moves or empties what others made: groups are made below the hierarchies that
//! are there, and only the group of the handle (and those below it) is ever removed.

pub mod devices;
mod files;
mod resources;
mod stats;
pub mod v1;
pub mod v2;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::{Error, Result, mountinfo};
use files::{read, write};

pub use resources::{BlockIo, Cpu, DeviceLimit, Memory, Network, Rdma, Resources};
pub use stats::{CpuStats, IoEntry, MemoryStats, PidsStats, Stats};

/// One planned write: the controller (v1 hierarchy) it is of, the file, the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// `memory`, `cpu`...
    pub controller: &'static str,
    /// The file's name.
    pub file: String,
    /// What is written.
    pub value: String,
}

/// How cgroups are mounted on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// v1 hierarchies only.
    V1,
    /// v1 hierarchies, with a v2 one beside them.
    Hybrid,
    /// v2 only.
    V2,
}

/// A mounted v1 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Its controllers (`cpu`, `cpuacct`), or its one name (`name=systemd`).
    pub controllers: Vec<String>,
    /// Where it is mounted.
    pub mount: PathBuf,
}

/// What is mounted on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// v1 hierarchies.
    pub v1: Vec<Hierarchy>,
    /// The v2 hierarchy's mount.
    pub v2: Option<PathBuf>,
}

impl Host {
    /// Finds the hierarchies in this process' mount namespace.
    ///
    /// # Errors
    /// When the mounts cannot be read, or there is no hierarchy at all.
    pub fn detect() -> Result<Self> {
        Self::from_mounts(&mountinfo::read()?)
    }

    /// Finds the hierarchies among these mounts; the first mount of each counts.
    ///
    /// # Errors
    /// When there is none.
    pub fn from_mounts(mounts: &[mountinfo::Mount]) -> Result<Self> {
        let mut host = Self { v1: Vec::new(), v2: None };
        for mount in mounts {
            match mount.fstype.as_str() {
                "cgroup2" if host.v2.is_none() => host.v2 = Some(mount.target.clone()),
                "cgroup" => {
                    let controllers = controllers_of(&mount.super_options);
                    if !controllers.is_empty() && !host.v1.iter().any(|known| known.controllers == controllers) {
                        host.v1.push(Hierarchy { controllers, mount: mount.target.clone() });
                    }
                }
                _ => {}
            }
        }
        if host.v1.is_empty() && host.v2.is_none() {
            return Err(Error::invalid("find cgroup mounts", "", "no cgroup hierarchy is mounted"));
        }
        Ok(host)
    }

    /// How cgroups are mounted.
    pub fn mode(&self) -> Mode {
        match (self.v1.is_empty(), &self.v2) {
            (true, _) => Mode::V2,
            (false, None) => Mode::V1,
            (false, Some(_)) => Mode::Hybrid,
        }
    }
}

/// The controllers in a v1 mount's superblock options.
fn controllers_of(options: &str) -> Vec<String> {
    const OTHERS: [&str; 9] = ["rw", "ro", "clone_children", "noprefix", "xattr", "cpuset_v2_mode", "none", "favordynmods", "seclabel"];
    options
        .split(',')
        .filter(|option| !OTHERS.contains(option) && (!option.contains('=') || option.starts_with("name=")))
        .map(str::to_owned)
        .collect()
}

/// A control group: the same path in every hierarchy of the host.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// v1: a directory for each hierarchy.
    v1: Vec<(Vec<String>, PathBuf)>,
    /// v2: the mount; the directory is below it.
    v2: Option<PathBuf>,
    /// Hybrid: the directory in the v2 hierarchy beside v1. It limits nothing, but belongs to the group, as runc has it
    /// (opencontainers/cgroups v0.1.0, `fs.NameGroup`), so that `/proc/PID/cgroup` names the group and eBPF programs by
    /// cgroup find it.
    unified: Option<PathBuf>,
}

impl Cgroup {
    /// The handle of the group at `path` (relative to the root of each hierarchy; a leading slash and `..` mean
    /// nothing). Makes nothing.
    pub fn new(host: &Host, path: &Path) -> Self {
        let mut clean = PathBuf::new();
        for component in path.components() {
            match component {
                std::path::Component::Normal(part) => clean.push(part),
                std::path::Component::ParentDir => {
                    clean.pop();
                }
                _ => {}
            }
        }
        let v1 = host.v1.iter().map(|h| (h.controllers.clone(), h.mount.join(&clean))).collect();
        let (v2, unified) = if host.v1.is_empty() { (host.v2.clone(), None) } else { (None, host.v2.as_ref().map(|m| m.join(&clean))) };
        Self { path: clean, v1, v2, unified }
    }

    /// The path below the hierarchies' roots, without a leading slash.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this is a v2 group.
    pub fn is_v2(&self) -> bool {
        self.v2.is_some()
    }

    /// The v2 directory.
    pub fn v2_directory(&self) -> Option<PathBuf> {
        self.v2.as_ref().map(|mount| mount.join(&self.path))
    }

    /// The directory of the v2 hierarchy in which a process can be born ([`crate::process::CloneOptions`]), also on hybrid hosts. That costs nothing;
    /// to be moved there later waits until every processor has gone by (the kernel's `cgroup_threadgroup_rwsem`), some 6 ms.
    pub fn birthplace(&self) -> Option<PathBuf> {
        self.v2_directory().or_else(|| self.unified.clone())
    }

    /// The directories, each once: with its controllers on v1 (`name=systemd` among them), with none in a v2 hierarchy,
    /// which comes last on hybrid hosts.
    pub fn directories(&self) -> Vec<(Vec<String>, PathBuf)> {
        let v2 = self.birthplace();
        self.v1.iter().cloned().chain(v2.map(|dir| (Vec::new(), dir))).collect()
    }

    /// The v1 directory of a controller.
    pub fn v1_directory(&self, controller: &str) -> Option<&Path> {
        self.v1.iter().find(|(names, _)| names.iter().any(|name| name == controller)).map(|(_, dir)| dir.as_path())
    }

    /// Whether any of its directories exists.
    pub fn exists(&self) -> bool {
        self.directories().iter().any(|(_, dir)| dir.is_dir())
    }

    /// Makes the group, and those above it, in every hierarchy. On v2 all controllers are handed down as far as that
    /// is possible (not on hybrid hosts, where processes are to stand in groups above others); on v1 new `cpuset` groups
    /// get their parent's CPUs and memory nodes.
    ///
    /// # Errors
    /// The kernel's answer, with the directory.
    pub fn create(&self) -> Result<()> {
        if let Some(mount) = &self.v2 {
            return v2::create(mount, &self.path);
        }
        for (names, dir) in self.directories() {
            if names.iter().any(|name| name == "cpuset") {
                v1::create_cpuset(&dir, &self.path)?;
            } else {
                std::fs::create_dir_all(&dir).map_err(|e| Error::new("mkdir", dir.display().to_string(), e))?;
            }
        }
        Ok(())
    }

    /// Writes the limits.
    ///
    /// # Errors
    /// The kernel's answer, with file and value; a limit of a controller that the host does not have is an error.
    pub fn apply(&self, resources: &Resources) -> Result<()> {
        match self.v2_directory() {
            Some(dir) => v2::apply(&dir, resources),
            None => v1::apply(self, resources),
        }
    }

    /// Applies the device rules.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn apply_devices(&self, rules: &devices::Rules) -> Result<()> {
        match (self.v2_directory(), self.v1_directory("devices")) {
            (Some(dir), _) => {
                let fd = crate::fs::open_plain(&dir, libc::O_RDONLY | libc::O_DIRECTORY)?;
                devices::apply_v2(fd, rules)
            }
            (None, Some(dir)) => devices::apply_v1(dir, rules),
            (None, None) if rules.allows_all() => Ok(()),
            (None, None) => Err(missing("devices")),
        }
    }

    /// Descriptors through which [`enter`] puts the calling process into the group, opened while one may (the rights
    /// are those of the opener). One that was `born` in the group's [`Cgroup::birthplace`] needs none for that.
    ///
    /// # Errors
    /// When a directory is missing.
    pub fn entries(&self, born: bool) -> Result<Vec<OwnedFd>> {
        let file = |names: &[String]| if names.is_empty() { "cgroup.procs" } else { "tasks" };
        let directories = self.directories();
        let needed = directories.iter().filter(|(names, _)| !(born && names.is_empty()));
        needed.map(|(names, dir)| crate::fs::open_plain(&dir.join(file(names)), libc::O_WRONLY)).collect()
    }

    /// Puts the process `pid` into the group. For oneself, [`enter`] is fifty times cheaper on v1.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn add(&self, pid: i32) -> Result<()> {
        for (_, dir) in self.directories() {
            write(&dir.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

    /// The processes in the group and in those below it, as seen from one's own PID namespace (0 is one outside).
    ///
    /// # Errors
    /// When a list cannot be read; a group that is gone has none.
    pub fn pids(&self) -> Result<Vec<i32>> {
        let mut pids = Vec::new();
        // All hierarchies hold the same processes; the one with the fewest reasons to be missing is asked.
        let directories = self.directories();
        let dir = ["devices", "pids", "freezer", "memory"]
            .iter()
            .find_map(|name| self.v1_directory(name).map(Path::to_path_buf))
            .or_else(|| directories.first().map(|(_, dir)| dir.clone()));
        if let Some(dir) = dir {
            files::walk(&dir, &mut |dir| {
                let text = files::read_optional(&dir.join("cgroup.procs"))?;
                pids.extend(text.unwrap_or_default().lines().filter_map(|line| line.parse::<i32>().ok()));
                Ok(())
            })?;
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Stops all processes of the group where they are.
    ///
    /// # Errors
    /// The kernel's answer; a group that does not freeze within ten seconds is thawed again and an error.
    pub fn freeze(&self) -> Result<()> {
        self.set_frozen(true)
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn thaw(&self) -> Result<()> {
        self.set_frozen(false)
    }

    fn set_frozen(&self, frozen: bool) -> Result<()> {
        const DEADLINE: Duration = Duration::from_secs(10);
        let (file, value) = match (self.v2_directory(), self.v1_directory("freezer")) {
            (Some(dir), _) => (dir.join("cgroup.freeze"), if frozen { "1" } else { "0" }),
            (None, Some(dir)) => (dir.join("freezer.state"), if frozen { "FROZEN" } else { "THAWED" }),
            (None, None) => return Err(missing("freezer")),
        };
        let begun = Instant::now();
        write(&file, value)?;
        while self.is_frozen()? != frozen {
            if begun.elapsed() > DEADLINE {
                // Half frozen is worse than not frozen.
                write(&file, if self.is_v2() { "0" } else { "THAWED" })?;
                return Err(Error::invalid("freeze cgroup", self.path.display().to_string(), "it took too long"));
            }
            std::thread::sleep(Duration::from_millis(1));
            if !self.is_v2() {
                // A v1 group that forks while it freezes can stay in FREEZING until it is told again.
                write(&file, value)?;
            }
        }
        Ok(())
    }

    /// Whether the group is frozen (itself, not by a group above it, on v2). One that is gone is not.
    ///
    /// # Errors
    /// When its state cannot be read.
    pub fn is_frozen(&self) -> Result<bool> {
        if let Some(dir) = self.v2_directory() {
            let wanted = files::read_optional(&dir.join("cgroup.freeze"))?.is_some_and(|t| t.trim() == "1");
            let events = files::read_optional(&dir.join("cgroup.events"))?.unwrap_or_default();
            return Ok(wanted && events.lines().any(|line| line == "frozen 1"));
        }
        let Some(dir) = self.v1_directory("freezer") else { return Ok(false) };
        Ok(files::read_optional(&dir.join("freezer.state"))?.is_some_and(|text| text.trim() == "FROZEN"))
    }

    /// Sends a signal to every process of the group; nobody forks away from it: the group is frozen meanwhile
    /// (SIGKILL on v2: `cgroup.kill`). Afterwards a frozen group goes on being frozen, but for SIGKILL, which thaws it.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn signal_all(&self, signal: i32) -> Result<()> {
        if let Some(dir) = self.v2_directory().filter(|_| signal == libc::SIGKILL) {
            return match write(&dir.join("cgroup.kill"), "1") {
                Err(e) if e.is(libc::ENOENT) => Ok(()),
                other => other,
            };
        }
        if !self.exists() {
            return Ok(());
        }
        let was_frozen = self.is_frozen()?;
        let can_freeze = self.is_v2() || self.v1_directory("freezer").is_some_and(Path::is_dir);
        if can_freeze && !was_frozen {
            // Best effort: a group with a process in uninterruptible sleep still gets its signals.
            let _ = self.freeze();
        }
        let sent = self.pids().map(|pids| {
            for pid in pids.into_iter().filter(|pid| *pid > 0) {
                // A process that is gone by now needs no signal.
                let _ = crate::process::kill(pid, signal);
            }
        });
        let thawed = if can_freeze && (!was_frozen || signal == libc::SIGKILL) { self.thaw() } else { Ok(()) };
        sent.and(thawed)
    }

    /// Removes the group and those below it from every hierarchy. Fine when it is gone. A group that is still busy
    /// (its last process is being torn down) is tried again until `patience` is over.
    ///
    /// # Errors
    /// `EBUSY` with the directory when processes remain; all hierarchies are tried before.
    pub fn remove(&self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        let mut result = Ok(());
        for (_, dir) in self.directories() {
            if self.path.as_os_str().is_empty() {
                return Err(Error::invalid("remove cgroup", "/", "the root group is never removed"));
            }
            if let Err(error) = files::remove_tree(&dir, deadline) {
                result = Err(error);
            }
        }
        result
    }

    /// What the group used so far.
    ///
    /// # Errors
    /// When a file that is there cannot be read.
    pub fn stats(&self) -> Result<Stats> {
        match self.v2_directory() {
            Some(dir) => stats::read_v2(&dir),
            None => stats::read_v1(self),
        }
    }
}

/// Puts the calling process (which has one thread) into the groups behind these descriptors of [`Cgroup::entries`].
///
/// # Errors
/// The kernel's answer.
pub fn enter(entries: &[OwnedFd]) -> Result<()> {
    use std::os::fd::AsRawFd;
    for entry in entries {
        // SAFETY: one byte of a static string is written.
        let ret = unsafe { libc::write(entry.as_raw_fd(), c"0".as_ptr().cast(), 1) };
        crate::sys::check(ret as libc::c_long).map_err(|e| Error::new("join cgroup", "", e))?;
    }
    Ok(())
}

/// The path of a process' group (0: of this one's) in a v1 hierarchy (by a controller's name, or `name=…`), or with `None` in v2.
///
/// # Errors
/// When its `/proc/PID/cgroup` cannot be read or has no such line.
pub fn path_of(pid: i32, controller: Option<&str>) -> Result<PathBuf> {
    let file = if pid == 0 { "/proc/self/cgroup".to_owned() } else { format!("/proc/{pid}/cgroup") };
    let text = read(Path::new(&file))?;
    let found = text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (names, path) = (fields.next()?, fields.next()?);
        let matches = match controller {
            Some(name) => names.split(',').any(|n| n == name),
            None => names.is_empty(),
        };
        matches.then(|| PathBuf::from(path))
    });
    found.ok_or_else(|| Error::invalid("find cgroup", file, "no such hierarchy"))
}

/// The error for a limit that the host cannot enforce.
pub(crate) fn missing(controller: &str) -> Error {
    Error::invalid("limit by cgroup controller", controller, "this host does not have it mounted or enabled")
}
