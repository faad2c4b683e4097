//! `cargo xtask soak`: random death during pod churn. The soak itself is e2e's; here it is built, and what it leaves on the machine
//! is looked for.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use testkit::host::Lists;

use crate::{build, setup, sh};

/// The flags of `cargo xtask soak`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// For how many minutes rounds are begun.
    #[arg(long, default_value_t = 3)]
    minutes: u64,
    /// What the actions follow from [default: another one each time, printed].
    #[arg(long)]
    seed: Option<u64>,
}

/// Runs it. Fails where something was lost, leaked or stuck.
pub fn run(args: &Args) -> Result<()> {
    let host = setup::prepare(setup::Need::Tests)?;
    for missing in &host.missing {
        eprintln!("missing: {missing}");
    }
    let executables = build::all(build::Profile::Dev)?;
    let mut soak = sh::cargo(["build", "--locked", "--package", "e2e", "--bin", "soak"]);
    sh::run("build the soak", &mut soak)?;
    let before = Lists::take(&testkit::host::ALL).context("failed to list what is on the machine")?;
    let seed = args.seed.unwrap_or_else(seed_of_now);
    println!("==> soak of {} min; again: cargo xtask soak --minutes {} --seed {seed}", args.minutes, args.minutes);
    let mut command = std::process::Command::new(build::target_directory().join("debug/soak"));
    command.args([args.minutes.to_string(), seed.to_string()]).env("CORACLE_BIN", &executables.directory);
    let status = command.status().context("failed to run the soak")?;
    let left = before.expect_nothing_left(&[], Duration::from_secs(10));
    if let Err(left) = &left {
        eprintln!("left behind:\n{left}");
    }
    if !status.success() || left.is_err() {
        bail!("the soak failed (seed {seed})");
    }
    Ok(())
}

fn seed_of_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
