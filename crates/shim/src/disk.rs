//! What the shim leaves on disk: for `delete`, for a successor, and for whoever asks after its death.
//!
//! In each bundle `task.json` (what runs, how, with which pid) and `exit.json` or `EXEC.exit.json` (how it ended), in the
//! sandbox' bundle `sandbox.json`. Written as temporary file and rename, never synced: it means nothing after a reboot.

use std::io::{self, Write};
use std::path::Path;

use protocols::ttrpc::{RpcError, code};
use serde::{Deserialize, Serialize};

use crate::daemon::Shim;
use crate::process::{Exit, Process, State, Stdio};
use crate::runtime::Runtime;

/// The files' format.
pub const VERSION: u32 = 1;

/// `task.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// [`VERSION`].
    pub version: u32,
    /// The container.
    pub id: String,
    /// What runs it.
    pub runtime: Runtime,
    /// The shim's socket.
    pub socket: std::path::PathBuf,
    /// The shim has mounted its rootfs.
    pub mounted: bool,
    /// It has a PID namespace of its own.
    pub own_pid_namespace: bool,
    /// Its first process.
    pub init: TaskProcess,
    /// The execs that were started.
    pub execs: Vec<TaskProcess>,
}

/// A process of a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskProcess {
    /// Empty: the first.
    pub exec_id: String,
    /// Its streams.
    pub stdio: Stdio,
    /// Its pid.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`, to tell it from a later one of the same pid; 0: it has ended.
    pub start_time: u64,
    /// "created", "running", "paused" or "stopped".
    pub state: String,
}

/// `exit.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// [`VERSION`].
    pub version: u32,
    /// Whose.
    pub pid: u32,
    /// How.
    pub exit: Exit,
}

/// Writes a file whole or not at all.
///
/// # Errors
/// Writing the temporary file, renaming it.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let mut file = std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    let done = file.write_all(bytes).and_then(|()| std::fs::rename(&temporary, path));
    if done.is_err() {
        // What stays goes with the bundle.
        let _ = std::fs::remove_file(&temporary);
    }
    done
}

/// Writes a record as JSON.
///
/// # Errors
/// As [`replace`].
pub fn write(path: &Path, record: &impl Serialize) -> io::Result<()> {
    replace(path, &serde_json::to_vec(record)?)
}

/// Reads a record; `None` if there is none.
///
/// # Errors
/// Reading the file but for its absence; its being no such JSON.
pub fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> io::Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads a pid file as runc writes it.
///
/// # Errors
/// `Unknown`, with the file's name.
pub fn read_pid(path: &Path) -> Result<u32, RpcError> {
    let said = |why: String| RpcError::new(code::UNKNOWN, format!("failed to read pid file {}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| said(error.to_string()))?;
    text.trim().parse().map_err(|_| said(format!("{text:?} is no pid")))
}

/// Field 22 of `/proc/PID/stat`: when the process began, in ticks since boot. 0 if there is none.
#[must_use]
pub fn start_time(pid: u32) -> u64 {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return 0 };
    // The name, field 2, may hold anything; it ends with the last parenthesis.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    rest.split_whitespace().nth(19).and_then(|field| field.parse().ok()).unwrap_or(0)
}

/// Removes what a deleted task's records were.
pub fn remove_task(bundle: &Path) {
    for name in ["task.json", "init.pid", "resources.json"] {
        // What is not there need not go, and what stays goes with the bundle.
        let _ = std::fs::remove_file(bundle.join(name));
    }
}

impl Shim {
    /// Writes a container's `task.json`. A failure is told once: the shim itself does not need the file.
    pub(crate) fn write_task(&mut self, id: &str) {
        let Some(container) = self.containers.get(id) else { return };
        let process = |process: &Process| TaskProcess {
            exec_id: process.exec_id.clone(),
            stdio: process.stdio.clone(),
            pid: process.pid,
            start_time: if process.state.exit().is_some() { 0 } else { start_time(process.pid) },
            state: Self::status_word(process.state).to_owned(),
        };
        let task = Task {
            version: VERSION,
            id: container.id.clone(),
            runtime: container.runtime.clone(),
            socket: self.setting.socket.clone(),
            mounted: container.mounted,
            own_pid_namespace: container.own_pid_namespace,
            init: process(&container.init),
            execs: container.execs.values().filter(|exec| exec.pid != 0 && exec.state != State::Creating).map(process).collect(),
        };
        let path = container.bundle.join("task.json");
        if let Err(error) = write(&path, &task) {
            say!("failed to write {}: {error}", path.display());
        }
    }

    /// Writes how a process ended, before it is reaped.
    pub(crate) fn record_exit(&mut self, id: &str, exec_id: &str, exit: Exit) {
        let Some(container) = self.containers.get(id) else { return };
        let Ok(process) = container.process(exec_id) else { return };
        let path = container.bundle.join(process.file("exit.json"));
        let record = ExitRecord { version: VERSION, pid: process.pid, exit };
        if let Err(error) = write(&path, &record) {
            say!("failed to write {}: {error}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_start_time_is_found() {
        assert_ne!(start_time(std::process::id()), 0);
        assert_eq!(start_time(u32::MAX), 0);
    }
}
