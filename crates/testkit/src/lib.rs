//! What tests share: images made in memory, a registry on loopback to serve them, hosts of their own, a fuzzer, and whole lists of what is there
//! before and after.

#![forbid(unsafe_code)]

pub mod critest;
pub mod fuzz;
pub mod host;
pub mod image;
pub mod registry;
pub mod tar;
