//! Seccomp profiles: compiled here, loaded by the container's process.

use std::os::fd::OwnedFd;

use crate::error::{Result, refuse};
use crate::spec::Seccomp;
use crate::state::Container;

/// A compiled profile.
pub struct Filter {
    program: Vec<linux::bpf::Instruction>,
    flags: u64,
    notifies: bool,
}

impl Filter {
    /// Compiles a profile.
    ///
    /// # Errors
    /// Not implemented yet.
    pub fn compile(_profile: &Seccomp) -> Result<Self> {
        refuse("seccomp profiles are not implemented yet")
    }

    /// Whether it has a listener.
    pub fn notifies(&self) -> bool {
        self.notifies
    }

    /// Loads it into this process.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn load(&self) -> Result<Option<OwnedFd>> {
        Ok(linux::seccomp::load(&self.program, self.flags)?)
    }
}

/// Passes a listener on.
///
/// # Errors
/// Not implemented yet.
pub fn pass_listener(_profile: Option<&Seccomp>, _pid: i32, _number: &str, _container: &Container) -> Result<()> {
    refuse("seccomp listeners are not implemented yet")
}

/// What `features` says of seccomp.
pub fn features() -> serde_json::Value {
    serde_json::json!({ "enabled": false })
}
