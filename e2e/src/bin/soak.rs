//! `cargo xtask soak` runs this: random death during pod churn, on a cluster of its own.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use e2e::soak::{self, Options};

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [minutes, seed] = &arguments[..] else { bail!("run this by `cargo xtask soak`: it takes minutes and a seed") };
    let minutes: u64 = minutes.parse().with_context(|| format!("{minutes:?} is no number of minutes"))?;
    let seed: u64 = seed.parse().with_context(|| format!("{seed:?} is no seed"))?;
    let options = Options { duration: Duration::from_secs(minutes * 60), rounds: usize::MAX, seed };
    let summary = soak::run("soak", options).with_context(|| format!("seed {seed}"))?;
    println!("{summary} (seed {seed})");
    Ok(summary.is_clean())
}
