//! Build, gate, test, demonstrate and measure Coracle.

mod generate;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
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

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Generate { what: Generate::Apimachinery { reference, modules, version } } => {
            generate::apimachinery(&reference, &modules, &version, &PathBuf::from("crates/apimachinery/data"))
        }
    }
}
