//! What tests share: images made in memory, a registry on loopback to serve them, hosts of their own, upstream's containerd, a fuzzer, what a
//! process holds, and whole lists of what is there before and after.

#![forbid(unsafe_code)]

pub mod containerd;
pub mod critest;
pub mod fuzz;
pub mod host;
pub mod image;
pub mod poll;
pub mod powercut;
pub mod process;
pub mod registry;
pub mod tar;
