//! What runs in forked children, so that the loop never waits: mounts, runtime commands, set-up of the sandbox.
//!
//! A child reports through a pipe: its first line are facts that the shim keeps (`own-pid-namespace`), the rest is the text of
//! its error. Its exit status says whether it succeeded.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use linux::{child, pipes};
use protocols::shim::types::Mount;
use serde::Deserialize;

use crate::runtime::Line;

/// The status of a child whose own work failed (the runtime's own failures have other numbers).
pub const FAILED: u8 = 125;
/// The first line of a report, if the container has a PID namespace of its own.
pub const OWN_PID_NAMESPACE: &str = "own-pid-namespace\n";

/// The container's side of its streams.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// The terminal's socket; then the others are unused.
    pub terminal: bool,
    /// FIFO to read.
    pub stdin: Option<PathBuf>,
    /// FIFO to write.
    pub stdout: Option<PathBuf>,
    /// FIFO to write.
    pub stderr: Option<PathBuf>,
}

/// A container or an exec to be made.
#[derive(Debug)]
pub struct Launch {
    /// The container's bundle.
    pub bundle: PathBuf,
    /// What to mount on BUNDLE/rootfs, in order.
    pub mounts: Vec<Mount>,
    /// Its streams.
    pub ends: Ends,
    /// An exec's OCI process, and the file it goes to for the runtime.
    pub process: Option<(PathBuf, Vec<u8>)>,
    /// The runtime's command.
    pub line: Line,
}

/// The parts of an OCI config.json that a shim reads.
#[derive(Debug, Default, Deserialize)]
pub struct Config {
    /// The process.
    pub process: Option<ConfigProcess>,
    /// Linux' part.
    #[serde(default)]
    pub linux: ConfigLinux,
    /// Annotations.
    #[serde(default)]
    pub annotations: std::collections::BTreeMap<String, String>,
}

/// An OCI process.
#[derive(Debug, Default, Deserialize)]
pub struct ConfigProcess {
    /// Its user.
    #[serde(default)]
    pub user: ConfigUser,
}

/// An OCI user.
#[derive(Debug, Default, Deserialize)]
pub struct ConfigUser {
    /// Inside the container.
    #[serde(default)]
    pub uid: u32,
    /// Inside the container.
    #[serde(default)]
    pub gid: u32,
}

/// OCI's `linux`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConfigLinux {
    /// The namespaces.
    #[serde(default)]
    pub namespaces: Vec<ConfigNamespace>,
    /// Users' mapping.
    #[serde(default)]
    pub uid_mappings: Vec<ConfigMapping>,
    /// Groups' mapping.
    #[serde(default)]
    pub gid_mappings: Vec<ConfigMapping>,
}

/// An OCI namespace.
#[derive(Debug, Deserialize)]
pub struct ConfigNamespace {
    /// "pid", "network"...
    #[serde(rename = "type")]
    pub kind: String,
    /// One to join; empty: a new one.
    #[serde(default)]
    pub path: String,
}

/// An OCI id mapping.
#[derive(Debug, Deserialize)]
pub struct ConfigMapping {
    /// First id inside.
    #[serde(rename = "containerID")]
    pub container_id: u32,
    /// First id outside.
    #[serde(rename = "hostID")]
    pub host_id: u32,
    /// How many.
    pub size: u32,
}

impl Config {
    /// Reads a bundle's config.json.
    ///
    /// # Errors
    /// Reading the file, or its being no such JSON.
    pub fn read(bundle: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&std::fs::read(bundle.join("config.json"))?)?)
    }

    /// Whether the container has a PID namespace of its own.
    #[must_use]
    pub fn own_pid_namespace(&self) -> bool {
        self.linux.namespaces.iter().any(|namespace| namespace.kind == "pid" && namespace.path.is_empty())
    }

    /// A user and group of the container, as the host has them.
    #[must_use]
    pub fn on_host(&self, user: &ConfigUser) -> (u32, u32) {
        (mapped(&self.linux.uid_mappings, user.uid), mapped(&self.linux.gid_mappings, user.gid))
    }
}

fn mapped(mappings: &[ConfigMapping], id: u32) -> u32 {
    mappings
        .iter()
        .find(|mapping| id >= mapping.container_id && id - mapping.container_id < mapping.size)
        .map_or(id, |mapping| mapping.host_id.saturating_add(id - mapping.container_id))
}

/// What every child does first.
fn settle() -> Result<(), String> {
    linux::process::set_parent_death_signal(9)
        .map_err(|error| format!("failed to tie the child to the shim: {}", io::Error::from(error)))?;
    child::reset_signals().map_err(|error| format!("failed to reset signals: {error}"))
}

/// Becomes the runtime with nothing open but 0, 1 and 2.
fn alone(line: Line) -> u8 {
    match linux::process::close_from(3, false) {
        Ok(()) => line.become_it(),
        Err(_) => FAILED,
    }
}

/// Tells the shim, as far as it still listens.
fn report(pipe: &OwnedFd, text: &str) {
    let _ = pipes::write(pipe, text.as_bytes());
}

/// The body of a create or exec child: becomes the runtime with the container's streams.
#[must_use]
pub fn launch(launch: Launch, pipe: OwnedFd) -> u8 {
    match prepare(launch, &pipe) {
        Ok(line) => {
            drop(pipe);
            alone(line)
        }
        Err(text) => {
            report(&pipe, &text);
            FAILED
        }
    }
}

fn prepare(launch: Launch, pipe: &OwnedFd) -> Result<Line, String> {
    settle()?;
    mount_rootfs(&launch)?;
    let config =
        Config::read(&launch.bundle).map_err(|error| format!("failed to read {}/config.json: {error}", launch.bundle.display()))?;
    let user = match &launch.process {
        Some((path, spec)) => {
            std::fs::write(path, spec).map_err(|error| format!("failed to write {}: {error}", path.display()))?;
            let process: ConfigProcess =
                serde_json::from_slice(spec).map_err(|error| format!("the exec's process is not valid: {error}"))?;
            config.on_host(&process.user)
        }
        None => {
            if config.own_pid_namespace() {
                report(pipe, OWN_PID_NAMESPACE);
            }
            config.on_host(
                &config
                    .process
                    .as_ref()
                    .map_or(ConfigUser::default(), |process| ConfigUser { uid: process.user.uid, gid: process.user.gid }),
            )
        }
    };
    connect(&launch.ends, user, pipe).map_err(|error| format!("failed to open the container's streams: {error}"))?;
    Ok(launch.line)
}

fn mount_rootfs(launch: &Launch) -> Result<(), String> {
    let rootfs = launch.bundle.join("rootfs");
    if launch.mounts.is_empty() {
        return Ok(());
    }
    let said = |error: io::Error| format!("failed to mount rootfs {}: {error}", rootfs.display());
    std::fs::create_dir_all(&rootfs).map_err(said)?;
    for mount in &launch.mounts {
        let target = if mount.target.is_empty() {
            rootfs.clone()
        } else {
            // containerd's targets are below the rootfs; a component that leads out of it is not taken.
            let inside = mount.target.trim_start_matches('/');
            if inside.split('/').any(|part| part == "..") {
                return Err(format!("mount target {:?} leads out of the rootfs", mount.target));
            }
            rootfs.join(inside)
        };
        linux::rootfs::mount(&mount.r#type, &mount.source, &mount.options, &target).map_err(said)?;
    }
    Ok(())
}

/// Makes 0, 1 and 2 what the container's process is to have, and closes all the rest but the report.
fn connect(ends: &Ends, user: (u32, u32), pipe: &OwnedFd) -> io::Result<()> {
    let null = || std::fs::File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
    let fifo = |path: &Option<PathBuf>, access| match path {
        None => null(),
        Some(path) => {
            pipes::give_to(path, user.0, user.1)?;
            let fd = pipes::open_fifo(path, access)?;
            pipes::set_nonblocking(&fd, false)?;
            Ok(fd)
        }
    };
    if ends.terminal {
        let text = pipe.try_clone()?;
        pipes::set_nonblocking(&text, false)?;
        child::dup_to(null()?.as_fd(), 0)?;
        child::dup_to(text.as_fd(), 1)?;
        child::dup_to(text.as_fd(), 2)?;
    } else {
        let stdin = fifo(&ends.stdin, pipes::Access::Read)?;
        let stdout = fifo(&ends.stdout, pipes::Access::Both)?;
        let stderr = fifo(&ends.stderr, pipes::Access::Both)?;
        child::dup_to(stdin.as_fd(), 0)?;
        child::dup_to(stdout.as_fd(), 1)?;
        child::dup_to(stderr.as_fd(), 2)?;
    }
    Ok(())
}

/// The body of a child that runs one command of the runtime, its text going to the report.
#[must_use]
pub fn command(line: Line, stdin: Option<&Path>, pipe: OwnedFd) -> u8 {
    match settle().and_then(|()| quiet(stdin, &pipe).map_err(|error| format!("failed to set up streams: {error}"))) {
        Ok(()) => {
            drop(pipe);
            alone(line)
        }
        Err(text) => {
            report(&pipe, &text);
            FAILED
        }
    }
}

fn quiet(stdin: Option<&Path>, pipe: &OwnedFd) -> io::Result<()> {
    let stdin = std::fs::File::open(stdin.unwrap_or(Path::new("/dev/null")))?;
    let text = pipe.try_clone()?;
    pipes::set_nonblocking(&text, false)?;
    child::dup_to(stdin.as_fd(), 0)?;
    child::dup_to(text.as_fd(), 1)?;
    child::dup_to(text.as_fd(), 2)
}

/// The body of a child that removes a container: by the runtime (if it is to), then its mounts and FIFOs.
#[must_use]
pub fn remove(line: Option<Line>, bundle: &Path, unmount: bool, pipe: OwnedFd) -> u8 {
    let done = settle().and_then(|()| quiet(None, &pipe).map_err(|error| error.to_string())).and_then(|()| {
        if let Some(code) = line.map(Line::run).filter(|code| *code != 0) {
            return Ok(code);
        }
        if unmount {
            let rootfs = bundle.join("rootfs");
            linux::mount::unmount_all(&rootfs, true)
                .map_err(|error| format!("failed to unmount {}: {}", rootfs.display(), io::Error::from(error)))?;
        }
        for name in ["stdin", "stdout", "stderr"] {
            // Left ones go with the bundle.
            let _ = std::fs::remove_file(bundle.join(name));
        }
        Ok(0)
    });
    match done {
        Ok(code) => code,
        Err(text) => {
            report(&pipe, &text);
            FAILED
        }
    }
}

/// The body of a child that does something of ours.
#[must_use]
pub fn work(body: impl FnOnce() -> Result<(), String>, pipe: &OwnedFd) -> u8 {
    match settle().and_then(|()| body()) {
        Ok(()) => 0,
        Err(text) => {
            report(pipe, &text);
            FAILED
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_mapped() {
        let config: Config = serde_json::from_str(
            r#"{"process":{"user":{"uid":5}},"linux":{"namespaces":[{"type":"pid"},{"type":"ipc","path":"/x"}],
                "uidMappings":[{"containerID":0,"hostID":1000,"size":10}]}}"#,
        )
        .expect("valid");
        assert!(config.own_pid_namespace());
        assert_eq!(config.on_host(&ConfigUser { uid: 5, gid: 6 }), (1005, 6));
        assert_eq!(config.on_host(&ConfigUser { uid: 10, gid: 6 }), (10, 6));
    }

    #[test]
    fn a_joined_pid_namespace_is_not_its_own() {
        let config: Config = serde_json::from_str(r#"{"linux":{"namespaces":[{"type":"pid","path":"/p"}]}}"#).expect("valid");
        assert!(!config.own_pid_namespace());
    }
}
