//! The one door to the kernel: mounts, namespaces, cgroups, netlink, nftables, pidfds, terminals, seccomp.
//!
//! Every call is synchronous, takes and gives descriptors as `OwnedFd`/`BorrowedFd`, sets close-on-exec, and
//! fails with an error that names the call and its object. Linux 5.15 and later, x86_64 and arm64.
//!
//! **Invariant**: `unsafe` exists in this crate only, and no type of this crate is `Serialize`: what is written to
//! disk or to a wire is defined by the crate that writes it.

mod error;
mod sys;

pub mod bpf;
pub mod caps;
pub mod cgroup;
pub mod child;
pub mod confine;
pub mod conntrack;
pub mod event;
pub mod exe;
pub mod fs;
pub mod mount;
pub mod mountinfo;
pub mod namespace;
pub mod netlink;
pub mod netns;
pub mod nftables;
pub mod pidfd;
pub mod pipes;
pub mod process;
pub mod pty;
pub mod rlimit;
pub mod rootfs;
pub mod rtnl;
pub mod sched;
pub mod scm;
pub mod seccomp;
pub mod signal;
pub mod sysctl;
pub mod tree;
pub mod unix;

pub use error::{Error, Result};
