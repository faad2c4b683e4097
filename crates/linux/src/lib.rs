//! The one door to the kernel: mounts, namespaces, cgroups, netlink, nftables, pidfds, terminals, seccomp.

pub mod child;
pub mod event;
pub mod pipes;
pub mod podns;
pub mod rootfs;
pub mod scm;
