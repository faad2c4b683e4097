//! Whole-system tests: a cluster in namespaces of its own, and the real clients that drive it.
//!
//! `cargo xtask test` builds the executables and tells where they are: `CORACLE_BIN` is the folder of ours, `CORACLE_PEERS` that
//! of upstream's. A test that lacks one says so as skipped; `skips.toml` says when that is allowed.

#![forbid(unsafe_code)]

pub mod api;
pub mod cluster;
pub mod containerd;
pub mod cri;
pub mod http;
pub mod images;
pub mod kubectl;
pub mod ledger;
pub mod node;
pub mod parts;
pub mod script;
pub mod servers;
pub mod soak;
pub mod sockets;
pub mod specs;
pub mod table;
pub mod terminal;

use std::path::PathBuf;

/// Our executable of this name; an error tells how to build it.
pub fn ours(name: &str) -> anyhow::Result<PathBuf> {
    let folder =
        std::env::var_os("CORACLE_BIN").ok_or_else(|| anyhow::anyhow!("CORACLE_BIN is not set: run this by `cargo xtask test`"))?;
    let path = PathBuf::from(folder).join(name);
    anyhow::ensure!(path.is_file(), "{} is missing: run this by `cargo xtask test`", path.display());
    Ok(path)
}

/// Upstream's program of this name, where it could be built.
pub fn peer(name: &str) -> Option<PathBuf> {
    std::env::var_os("CORACLE_PEERS").map(|folder| PathBuf::from(folder).join(name)).filter(|path| path.is_file())
}

/// Says that a test is skipped, in the form that `cargo xtask test` counts.
pub fn skip(test: &str, reason: &str) {
    println!("SKIPPED: {test}: {reason}");
}
