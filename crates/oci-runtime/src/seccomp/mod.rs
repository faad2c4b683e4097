//! Seccomp: profiles are compiled by the runtime, and loaded by the container's process as late as may be.
//!
//! - [`arch`]: architectures and the numbers of system calls
//! - [`compile`]: a profile to a program, purely

pub mod arch;
pub mod compile;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use linux::bpf::Instruction;
use serde_json::json;

use crate::error::{Context, Result, refuse};
use crate::spec::Seccomp;
use crate::state::{Container, Status};

/// A compiled profile.
pub struct Filter {
    program: Vec<Instruction>,
    flags: u64,
    notifies: bool,
}

impl Filter {
    /// Compiles a profile.
    ///
    /// # Errors
    /// When it has an unknown word, is too long, or asks for a listener without saying where that is.
    pub fn compile(from: &Seccomp) -> Result<Self> {
        let profile = compile::Profile::read(from)?;
        if profile.notifies && from.listener_path.is_empty() {
            return refuse("seccomp: SCMP_ACT_NOTIFY needs listenerPath");
        }
        if !profile.notifies && !from.listener_path.is_empty() {
            return refuse("seccomp: listenerPath is set, but no rule has SCMP_ACT_NOTIFY");
        }
        let flags = profile.flags | if profile.notifies { linux::seccomp::flags::NEW_LISTENER } else { 0 };
        Ok(Self { program: profile.program(true)?, flags, notifies: profile.notifies })
    }

    /// Whether it has a listener.
    pub fn notifies(&self) -> bool {
        self.notifies
    }

    /// Loads it into this process; answers the listener if there is to be one.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn load(&self) -> Result<Option<OwnedFd>> {
        linux::seccomp::load(&self.program, self.flags).during(|| "unable to init seccomp".to_owned())
    }
}

/// Fetches the listener, descriptor `number` of process `pid`, and sends it to the agent at the profile's
/// `listenerPath` with the state of the process (`config-linux.md`, "The Container Process State").
///
/// # Errors
/// When the listener cannot be fetched or the agent does not take it.
pub fn pass_listener(profile: Option<&Seccomp>, pid: i32, number: &str, container: &Container) -> Result<()> {
    let Some(profile) = profile else { return refuse("a seccomp listener without a profile") };
    let Ok(number) = number.parse() else { return refuse(format!("{number:?} is no descriptor's number")) };
    let pidfd = linux::pidfd::open(pid)?;
    let listener = linux::pidfd::get_fd(pidfd.as_fd(), number)?;
    let status = if container.record.complete { Status::Running } else { Status::Creating };
    let state: serde_json::Value = serde_json::from_str(&container.state_json(status)).during(|| "encode state".to_owned())?;
    let message = json!({
        "ociVersion": container.record.oci_version,
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": profile.listener_metadata,
        "state": state,
    });
    let act = || format!("send the seccomp listener to {}", profile.listener_path);
    let agent = linux::unix::connect(linux::unix::Kind::Stream, Path::new(&profile.listener_path)).during(act)?;
    linux::unix::send(agent.as_fd(), message.to_string().as_bytes(), &[listener.as_fd()]).during(act)
}

/// What `features` says of seccomp.
pub fn features() -> serde_json::Value {
    let flags = [
        "SECCOMP_FILTER_FLAG_TSYNC",
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
        "SECCOMP_FILTER_FLAG_LOG",
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
    ];
    json!({
        "enabled": true,
        "actions": compile::ACTIONS.map(|(word, _)| word),
        "operators": compile::OPERATORS,
        "archs": arch::Arch::ALL.map(arch::Arch::word),
        "knownFlags": flags,
        "supportedFlags": flags,
    })
}
