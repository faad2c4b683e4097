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
    let mut options = Options { duration: Duration::ZERO, rounds: usize::MAX, deaths: None, etcd: false, seed: 0 };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let mut number = || -> Result<u64> {
            let given = arguments.next().with_context(|| format!("{flag} takes a number"))?;
            given.parse().with_context(|| format!("{flag} takes a number, not {given:?}"))
        };
        match flag.as_str() {
            "--minutes" => options.duration = Duration::from_secs(number()? * 60),
            "--deaths" => options.deaths = Some(usize::try_from(number()?)?),
            "--seed" => options.seed = number()?,
            "--etcd" => options.etcd = true,
            _ => bail!("run this by `cargo xtask soak`: {flag:?} is no flag"),
        }
    }
    let seed = options.seed;
    let summary = soak::run("soak", options).with_context(|| format!("seed {seed}"))?;
    println!("{summary} (seed {seed})");
    Ok(summary.is_clean())
}
