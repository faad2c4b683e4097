//! Who was killed, so that an exit that nobody saw can be laid to the very deaths that excuse it.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::process::Command;

use anyhow::{Context, Result};

/// A container whose first process was killed.
#[derive(Clone, Debug)]
pub struct Victim {
    /// Its pod's name.
    pub pod: String,
    /// Its pod's UID.
    pub uid: String,
    /// Its id.
    pub container: String,
    /// Its first process.
    pub pid: u32,
}

/// The deaths of a round. All that ends in a round is judged at the end of it.
#[derive(Debug, Default)]
pub struct Killed {
    /// The kernel tells how a process ended that others have reaped (Linux 6.15).
    kernel_tells: bool,
    keeper_ever: bool,
    keeper: bool,
    /// The sandboxes whose shims were killed.
    shims: BTreeSet<String>,
    /// The containers that were killed.
    pub containers: Vec<Victim>,
}

impl Killed {
    /// Nobody yet.
    pub fn new() -> Result<Killed> {
        Ok(Killed { kernel_tells: kernel_tells()?, ..Killed::default() })
    }

    /// A round begins.
    pub fn begin(&mut self) {
        self.keeper = false;
        self.shims.clear();
        self.containers.clear();
    }

    /// The keeper is about to die.
    pub fn keeper(&mut self) {
        (self.keeper, self.keeper_ever) = (true, true);
    }

    /// The shim of a sandbox is about to die.
    pub fn shim(&mut self, sandbox: &str) {
        self.shims.insert(sandbox.to_owned());
    }

    /// Why nobody may have seen an exit in this sandbox: DESIGN.md, section 4, "an exit while keeper and shim are both dead". Before
    /// Linux 6.15 a keeper cannot see the exits of those that lost an earlier keeper.
    pub fn excuse(&self, sandbox: &str) -> Option<&'static str> {
        if !self.shims.contains(sandbox) {
            None
        } else if self.keeper {
            Some("this round killed its shim and the keeper")
        } else {
            (self.keeper_ever && !self.kernel_tells).then_some("this round killed its shim, an earlier one the keeper, on an old kernel")
        }
    }
}

fn kernel_tells() -> Result<bool> {
    let mut child = Command::new("true").spawn().context("failed to run true")?;
    let pidfd = linux::pidfd::open(i32::try_from(child.id())?).context("failed to open a pidfd")?;
    child.wait().context("failed to wait for true")?;
    Ok(linux::child::exit_status_of(pidfd.as_fd()) == Some(0))
}
