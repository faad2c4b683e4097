//! Coracle: a complete Kubernetes in one program.
//!
//! `coracle up` runs every part in one process; each part runs alone by its own name with upstream's flags. The parts meet only
//! over their public protocols (the API server's REST, CRI): `up` gives each the flags that an operator would.

#![forbid(unsafe_code)]

mod apply;
mod components;
mod down;
mod etcd;
mod pki;
mod progress;
mod settings;
mod trace;
mod up;

/// How this program names itself to the API server.
const USER_AGENT: &str = concat!("coracle/", env!("CARGO_PKG_VERSION"));

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use camino::Utf8PathBuf;
use clap::{Parser, Subcommand};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::settings::Settings;

#[derive(Parser)]
#[command(name = "coracle", version, about = "A complete Kubernetes in one program")]
struct Cli {
    /// What is logged to stderr, as in RUST_LOG [default: info for a part on its own, else warn].
    #[arg(long, global = true, env = "CORACLE_LOG")]
    log: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a whole cluster on this machine. Ctrl-C stops it and leaves pods running.
    Up(Settings),
    /// Make the keys and kubeconfigs of a cluster of one node, and print the command line of each part, to be run as a process of its own.
    /// Takes the flags of `up`. Stop the parts before `down`, which removes what they made.
    Parts(Settings),
    /// Stop a cluster and remove everything that it made: pods, network, cgroups, data.
    Down {
        /// Where the cluster's data are.
        #[arg(long, default_value = "/var/lib/coracle")]
        data_dir: Utf8PathBuf,
    },
    /// Draw the road of an object from the request to the running process.
    Trace(trace::Args),
    /// Create or change the objects of a file, and wait until its Deployments are available.
    Apply(apply::Args),
    /// Print what the API server answers to a GET of a path.
    Get(apply::GetArgs),
    /// What one does with the store beside running it.
    #[command(subcommand)]
    Etcd(etcd::Command),
    /// The API server.
    Apiserver(apiserver::Config),
    /// The controllers.
    ControllerManager(controller_manager::Config),
    /// The scheduler.
    Scheduler(scheduler::Config),
    /// The node agent.
    Kubelet(kubelet::Config),
    /// The proxy that leads traffic for Services to their endpoints.
    KubeProxy(kube_proxy::Config),
    /// The container runtime: CRI on a unix socket.
    Cri(cri_server::Config),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = accept_signals().and_then(|()| start(cli));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // stderr may be a file on a full disk.
            let _ = writeln!(std::io::stderr(), "coracle: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whoever started this may have blocked the signals that stop it, as one does who waits for them. The runtime's threads inherit what is set here.
fn accept_signals() -> Result<()> {
    let stopping: Vec<i32> = ["INT", "TERM"].into_iter().filter_map(linux::signal::parse).collect();
    linux::signal::unblock(&stopping).context("failed to unblock SIGINT and SIGTERM")
}

fn start(cli: Cli) -> Result<()> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("failed to start the async runtime")
        .and_then(|runtime| runtime.block_on(run(cli)))
}

async fn run(cli: Cli) -> Result<()> {
    let spans = match &cli.command {
        Command::Up(settings) => Some(settings.spans()),
        _ => None,
    };
    let alone = matches!(
        cli.command,
        Command::Apiserver(_)
            | Command::ControllerManager(_)
            | Command::Scheduler(_)
            | Command::Kubelet(_)
            | Command::KubeProxy(_)
            | Command::Cri(_)
    );
    // kube logs every answer that is no success as an error, also those that its caller expects.
    let default = if alone { "info,kube_client=off" } else { "warn,kube_client=off" };
    let filter = EnvFilter::try_new(cli.log.as_deref().unwrap_or(default)).context("--log: bad filter")?;
    let stderr = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).log_internal_errors(false).with_filter(filter);
    tracing_subscriber::registry().with(stderr).with(spans.map(trace::SpanLayer::new)).init();

    let cancel = CancellationToken::new();
    let signals = cancel_on_signal(cancel.clone());
    let command = async {
        match cli.command {
            Command::Up(settings) => up::run(settings, cancel.clone()).await,
            Command::Parts(settings) => up::print_parts(&settings),
            Command::Down { data_dir } => down::run(&data_dir).await,
            Command::Trace(args) => trace::run(args).await,
            Command::Apply(args) => apply::run(args).await,
            Command::Get(args) => apply::get(args).await,
            Command::Etcd(command) => etcd::run(command).await,
            Command::Apiserver(config) => Ok(apiserver::run(config, cancel.clone()).await?),
            Command::ControllerManager(config) => Ok(controller_manager::run(config, cancel.clone()).await?),
            Command::Scheduler(config) => Ok(scheduler::run(config, cancel.clone()).await?),
            Command::Kubelet(config) => Ok(kubelet::run(config, cancel.clone()).await?),
            Command::KubeProxy(config) => Ok(kube_proxy::run(config, cancel.clone()).await?),
            Command::Cri(config) => Ok(cri_server::run(config, cancel.clone()).await?),
        }
    };
    tokio::select! {
        result = command => result,
        result = signals => result,
    }
}

/// Cancels on the first SIGINT or SIGTERM; never returns otherwise: what was cancelled drains and returns.
async fn cancel_on_signal(cancel: CancellationToken) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to watch for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("failed to watch for SIGTERM")?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    cancel.cancel();
    // A second signal ends at once what does not drain.
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    anyhow::bail!("stopped before everything was drained")
}
