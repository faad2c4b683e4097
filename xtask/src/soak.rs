//! `cargo xtask soak`: random death during pod churn, and steps of the clock, a registry and an etcd that fail. The soak itself is e2e's; here it is built, and what it leaves on the machine
//! is looked for.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use testkit::host::Lists;

use crate::{build, setup, sh};

/// The flags of `cargo xtask soak`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// For how many minutes rounds are begun [default: 3; with --deaths without limit].
    #[arg(long)]
    minutes: Option<u64>,
    /// Instead of all that is known every round kills the whole `coracle up`, until so many deaths.
    #[arg(long)]
    deaths: Option<u64>,
    /// The store is a real etcd, which hangs and dies as well.
    #[arg(long)]
    etcd: bool,
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
    // A day is without limit.
    let minutes = args.minutes.unwrap_or(if args.deaths.is_some() { 24 * 60 } else { 3 });
    let mut words = vec!["--minutes".to_owned(), minutes.to_string()];
    words.extend(args.deaths.into_iter().flat_map(|deaths| ["--deaths".to_owned(), deaths.to_string()]));
    words.extend(args.etcd.then(|| "--etcd".to_owned()));
    words.extend(["--seed".to_owned(), seed.to_string()]);
    println!("==> again: cargo xtask soak {}", words.join(" "));
    let mut command = std::process::Command::new(build::target_directory().join("debug/soak"));
    command.args(&words).env("CORACLE_BIN", &executables.directory);
    command.envs(host.peers.iter().map(|peers| ("CORACLE_PEERS", peers)));
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
