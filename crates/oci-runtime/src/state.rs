//! A container's state on disk, and what its status is now.
//!
//! `ROOT/ID/` holds `state.json` (what was made), `config.json` (the configuration as it was at create), `lock` (held
//! by the command that changes something), `gate.lock` and `gate` (see below). It means nothing after a reboot: the
//! boot id stands in it, and nothing is synced. Whatever command dies when, the status is derived from the process:
//!
//! ```text
//! creating --create--> created --start--> running <--pause/resume--> paused
//!     \                   \                  \
//!      `------------------ `----------------- `--> stopped --delete--> (gone)
//! ```
//!
//! - stopped: there is no process, or it is a zombie
//! - created: the process holds a lock on `gate.lock`, which its execve releases
//! - paused: the cgroup is frozen
//! - creating: `create` has not come to its end

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Result, refuse};
use crate::spec::{self, Spec};

/// The version of the file's format.
const FORMAT: u32 = 1;

/// The file.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Record {
    pub version: u32,
    pub id: String,
    pub boot_id: String,
    /// 0 until there is a process.
    pub pid: i32,
    /// See `linux::process::Stat`.
    pub start_time: u64,
    pub oci_version: String,
    pub bundle: String,
    pub rootfs: String,
    pub created: String,
    pub owner: String,
    pub annotations: BTreeMap<String, String>,
    /// Relative to the root of each hierarchy.
    pub cgroup: PathBuf,
    /// Whether it has a session keyring of its own, which `exec` joins.
    #[serde(default)]
    pub keyring: bool,
    /// Whether `create` came to its end.
    pub complete: bool,
    /// Whether the container has a PID namespace of its own, so that its first process takes all others with it.
    pub own_pid_namespace: bool,
}

/// What a container is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// `create` is under way, or died.
    Creating,
    /// Its process waits for `start`.
    Created,
    /// Its process runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its process is gone.
    Stopped,
}

impl Status {
    /// The specification's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// A container's directory.
pub struct Container {
    /// The directory.
    pub dir: PathBuf,
    /// The file in it.
    pub record: Record,
}

/// Checks a container's id: what runc allows (letters, digits, `_+-.`), which keeps it one component of a path.
///
/// # Errors
/// When it is something else.
pub fn check_id(id: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id == "." || id == ".." || id.len() > 1024 || !id.chars().all(allowed) {
        return refuse(format!("invalid container ID format: {id:?}"));
    }
    Ok(())
}

/// Holds a container's `lock` until dropped.
pub struct Lock(#[allow(dead_code)] OwnedFd);

impl Container {
    /// Makes the directory of a new container.
    ///
    /// # Errors
    /// When there is one of this id.
    pub fn create(root: &Path, record: Record) -> Result<Self> {
        check_id(&record.id)?;
        let fail = || format!("make state directory below {}", root.display());
        std::fs::create_dir_all(root).during(fail)?;
        let dir = root.join(&record.id);
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o711);
        match builder.create(&dir) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => refuse("container with given ID already exists"),
            other => {
                other.during(fail)?;
                let container = Self { dir, record };
                container.save()?;
                Ok(container)
            }
        }
    }

    /// Finds a container.
    ///
    /// # Errors
    /// "container does not exist" when there is none of this id.
    pub fn load(root: &Path, id: &str) -> Result<Self> {
        check_id(id)?;
        let dir = root.join(id);
        let text = match std::fs::read_to_string(dir.join("state.json")) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if !dir.is_dir() {
                    return refuse("container does not exist");
                }
                // Its create died before it had made anything.
                let record = Record { id: id.to_owned(), ..Record::default() };
                return Ok(Self { dir, record });
            }
            Err(e) => return Err(e).during(|| format!("read state of container {id}")),
        };
        let record: Record = serde_json::from_str(&text).during(|| format!("read state of container {id}"))?;
        if record.version != FORMAT {
            return refuse(format!("the state of container {id} has version {}, not {FORMAT}", record.version));
        }
        Ok(Self { dir, record })
    }

    /// Writes the file, all or nothing.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self) -> Result<()> {
        let mut record = self.record.clone();
        record.version = FORMAT;
        let text = serde_json::to_vec(&record).during(|| "encode state".to_owned())?;
        write_whole(&self.dir.join("state.json"), &text)
    }

    /// Reads the file again.
    ///
    /// # Errors
    /// As [`Container::load`].
    pub fn reload(&mut self) -> Result<()> {
        let root = self.dir.parent().unwrap_or(Path::new("/")).to_path_buf();
        *self = Self::load(&root, &self.record.id.clone())?;
        Ok(())
    }

    /// Waits for other commands that change this container, and keeps them waiting.
    ///
    /// # Errors
    /// "container does not exist" when the one before removed it.
    pub fn lock(&self) -> Result<Lock> {
        let path = self.dir.join("lock");
        let file = match File::options().create(true).truncate(false).write(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return refuse("container does not exist"),
            other => other.during(|| format!("open {}", path.display()))?,
        };
        linux::fs::lock_exclusive(file.as_fd(), true)?;
        if !path.exists() {
            return refuse("container does not exist");
        }
        Ok(Lock(file.into()))
    }

    /// The configuration as it was at create.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn spec(&self) -> Result<Spec> {
        let path = self.dir.join("config.json");
        let text = std::fs::read_to_string(&path).during(|| format!("read {}", path.display()))?;
        spec::parse(&text).during(|| format!("read {}", path.display()))
    }

    /// The process' pid, when it is there and no zombie.
    pub fn live_pid(&self) -> Option<i32> {
        let record = &self.record;
        let alive = record.pid > 0
            && linux::process::is_running(record.pid, record.start_time)
            && linux::process::boot_id().is_ok_and(|boot| boot == record.boot_id);
        alive.then_some(record.pid)
    }

    /// A descriptor of the process.
    ///
    /// # Errors
    /// "container not running" when it is gone.
    pub fn pidfd(&self) -> Result<OwnedFd> {
        if self.live_pid().is_none() {
            return refuse("container not running");
        }
        linux::process::open_verified(self.record.pid, self.record.start_time).during(|| "container not running".to_owned())
    }

    /// The status now.
    ///
    /// # Errors
    /// When the cgroup's state cannot be read.
    pub fn status(&self) -> Result<Status> {
        if self.live_pid().is_none() {
            // A create that is under way holds the lock; one that died does not.
            let creating = !self.record.complete && self.record.pid == 0 && self.is_locked();
            return Ok(if creating { Status::Creating } else { Status::Stopped });
        }
        if !self.record.complete {
            return Ok(Status::Creating);
        }
        if self.cgroup()?.is_frozen()? {
            return Ok(Status::Paused);
        }
        Ok(if self.waits_at_gate() { Status::Created } else { Status::Running })
    }

    fn is_locked(&self) -> bool {
        let Ok(file) = File::open(self.dir.join("lock")) else { return false };
        linux::fs::is_locked(file.as_fd()).unwrap_or(false)
    }

    /// Whether the process has not been started.
    pub fn waits_at_gate(&self) -> bool {
        let Ok(file) = File::open(self.dir.join("gate.lock")) else { return false };
        linux::fs::is_locked(file.as_fd()).unwrap_or(false)
    }

    /// The control group.
    ///
    /// # Errors
    /// When this host has no cgroups.
    pub fn cgroup(&self) -> Result<linux::cgroup::Cgroup> {
        Ok(linux::cgroup::Cgroup::new(&linux::cgroup::Host::detect()?, &self.record.cgroup))
    }

    /// The state as the specification has it.
    ///
    /// # Errors
    /// When the status cannot be told.
    pub fn state_json(&self, status: Status) -> String {
        let pid = if status == Status::Stopped { 0 } else { self.record.pid };
        let state = spec::State {
            oci_version: &self.record.oci_version,
            id: &self.record.id,
            status: status.as_str(),
            pid,
            bundle: &self.record.bundle,
            annotations: &self.record.annotations,
        };
        // Strings, a number and a map of strings: there is nothing in it that has no JSON.
        serde_json::to_string(&state).unwrap_or_default()
    }

    /// Removes the directory.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove_directory(&self) -> Result<()> {
        match std::fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).during(|| format!("remove {}", self.dir.display())),
            _ => Ok(()),
        }
    }
}

/// Writes a file by way of a temporary one, so that readers find all of it or what was before.
///
/// # Errors
/// When it cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".tmp{}", std::process::id()));
    let temporary = PathBuf::from(temporary);
    std::fs::write(&temporary, bytes)
        .and_then(|()| std::fs::rename(&temporary, path))
        .inspect_err(|_| {
            let _ = std::fs::remove_file(&temporary);
        })
        .during(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::check_id;

    #[test]
    fn ids_are_one_component() {
        for id in ["a", "A-b_c.d+e", "0123"] {
            check_id(id).expect(id);
        }
        for id in ["", ".", "..", "a/b", "a b", "ä"] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
