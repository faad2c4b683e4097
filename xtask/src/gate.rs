//! `cargo xtask ci`: what every commit must pass before a test is run.

use std::process::Command;

use anyhow::{Context, Result};

use crate::{setup, sh, tidy};

/// The version of cargo-deny that judges licences, bans and sources.
const CARGO_DENY: &str = "0.20.2";

/// Runs the gate. The first failure ends it.
pub fn run() -> Result<()> {
    sh::run("fmt", &mut sh::cargo(["fmt", "--all", "--check"]))?;
    tidy::run()?;
    deny()?;
    sh::run("clippy", &mut sh::cargo(["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

/// Licences, bans and sources. No advisory database can be had offline.
fn deny() -> Result<()> {
    let root = setup::cache().join("tools");
    let program = root.join("bin/cargo-deny");
    let version = Command::new(&program).arg("--version").output().map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    if !version.is_ok_and(|version| version.trim().ends_with(CARGO_DENY)) {
        let mut install = sh::cargo(["install", "--locked", "--debug", "--version", CARGO_DENY, "--root"]);
        install.arg(&root).arg("cargo-deny").env("CARGO_PROFILE_DEV_DEBUG", "false").current_dir(std::env::temp_dir());
        sh::run("install cargo-deny", &mut install).context("cargo-deny is needed by the gate")?;
    }
    let mut check = Command::new(&program);
    check.args(["--offline", "check", "licenses", "bans", "sources"]).current_dir(sh::root());
    sh::run("deny", &mut check)
}
