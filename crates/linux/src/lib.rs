//! The one door to the kernel: mounts, namespaces, cgroups, netlink, nftables, pidfds, terminals, seccomp.
