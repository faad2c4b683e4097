//! Build, gate, test, demonstrate and measure Coracle: `cargo xtask`.

#![forbid(unsafe_code)]

mod bench;
mod build;
mod demo;
mod gate;
mod generate;
mod guest;
mod readme;
mod setup;
mod sh;
mod skips;
mod soak;
mod test;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Build, gate, test, demonstrate and measure Coracle")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The gate: format, clippy, licences, bans and sources of dependencies, tidy.
    Ci,
    /// Only the checks of our own: rows, heads, `unsafe`, sizes.
    Tidy,
    /// The gate and all tests.
    Test(test::Args),
    /// Build, run a cluster, apply examples/hello.yaml, ask a pod, draw its waterfall.
    Demo(demo::Args),
    /// Measure pods beside containerd and runc, and the whole program: a table and JSON lines on stdout.
    Bench(bench::Args),
    /// Kill processes of ours and containers at random during pod churn; nothing may be lost, leaked or stuck.
    Soak(soak::Args),
    /// Build the executables: the release `coracle`, and the static shim and OCI runtime beside it.
    Build,
    /// Build upstream's programs for tests and benchmarks, where Go is.
    Peers,
    /// Write generated data files.
    Generate {
        #[command(subcommand)]
        what: Generate,
    },
}

#[derive(Subcommand)]
enum Generate {
    /// The API facts of crates/apimachinery/data.
    Apimachinery {
        /// Folder with schema.json and kinds.json.
        #[arg(long)]
        reference: PathBuf,
        /// Folder with api@VERSION and apimachinery@VERSION (a Go module cache's k8s.io).
        #[arg(long)]
        modules: PathBuf,
        /// Version of the k8s.io modules.
        #[arg(long, default_value = "v0.37.2")]
        version: String,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Ci => gate::run(),
        Command::Tidy => tidy::run(),
        Command::Test(args) => test::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Soak(args) => soak::run(&args),
        Command::Build => build::all(build::Profile::Release).map(|executables| println!("{}", executables.directory.display())),
        Command::Peers => {
            let host = setup::prepare(setup::Need::Tests)?;
            host.missing.iter().for_each(|missing| eprintln!("missing: {missing}"));
            Ok(())
        }
        Command::Generate { what: Generate::Apimachinery { reference, modules, version } } => {
            generate::apimachinery(&reference, &modules, &version, &sh::root().join("crates/apimachinery/data"))
        }
    }
}
