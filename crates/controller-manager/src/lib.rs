//! The controllers: they bring what is nearer to what was asked for.
//!
//! Seam: the Kubernetes API alone (DESIGN.md, seam 3). Each controller is informers that feed a keyed queue, a pure
//! `plan` and a thin apply, and has an identity of its own with `--use-service-account-credentials`.
//!
//! ```text
//! watch ─> informer ─> key ─> queue ─> plan(state, now) ─> apply ─> API server
//!                               ^────────── failed: back-off ─┘
//! ```
#![forbid(unsafe_code)]

mod aggregation;
mod claim;
mod config;
mod context;
mod deployment;
mod discovery;
mod endpoint_slice;
mod garbage;
mod hash;
mod namespace;
mod node;
mod objects;
mod pod_gc;
mod replicaset;
mod root_ca;
mod service_account;
mod trace;

pub use config::Config;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use client::LeaderConfig;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::context::{Context, Informers, Starting};

const USER_AGENT: &str = concat!("kube-controller-manager/coracle-", env!("CARGO_PKG_VERSION"));
/// How long running work may take to end.
const DRAIN: Duration = Duration::from_secs(5);

/// The controllers, by upstream's names.
pub const CONTROLLERS: [&str; 11] = [
    "deployment-controller",
    "replicaset-controller",
    "namespace-controller",
    "serviceaccount-controller",
    "root-ca-certificate-publisher-controller",
    "garbage-collector-controller",
    "pod-garbage-collector-controller",
    "node-lifecycle-controller",
    "taint-eviction-controller",
    "clusterrole-aggregation-controller",
    "endpointslice-controller",
];

/// Why the manager did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `--controllers` names what there is not.
    #[error("--controllers: {name:?} is not a controller (there are: {})", CONTROLLERS.join(", "))]
    UnknownController {
        /// The name.
        name: String,
    },
    /// `--root-ca-file` cannot be used.
    #[error("failed to read --root-ca-file {path}")]
    RootCa {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `--root-ca-file` holds no certificate.
    #[error("--root-ca-file {path} holds no PEM certificate")]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// `--leader-elect-*` do not fit together.
    #[error(
        "--leader-elect-lease-duration must be longer than --leader-elect-renew-deadline, and that longer than --leader-elect-retry-period"
    )]
    LeaderTimes,
    /// There is no client.
    #[error(transparent)]
    Connect(#[from] client::ConnectError),
    /// Another manager leads now.
    #[error("the leader's lease was lost")]
    LeaseLost,
}

fn check(config: &Config) -> Result<Option<String>, Error> {
    let known = |name: &str| name == "*" || CONTROLLERS.contains(&name);
    if let Some(name) = config.controllers.iter().find(|name| !known(name.strip_prefix('-').unwrap_or(name))) {
        return Err(Error::UnknownController { name: name.clone() });
    }
    let ordered = config.leader_elect_lease_duration > config.leader_elect_renew_deadline
        && config.leader_elect_renew_deadline > config.leader_elect_retry_period;
    if config.leader_elect && !ordered {
        return Err(Error::LeaderTimes);
    }
    let Some(path) = &config.root_ca_file else { return Ok(None) };
    let pem = std::fs::read_to_string(path).map_err(|source| Error::RootCa { path: path.clone(), source })?;
    if !pem.contains("-----BEGIN CERTIFICATE-----") {
        return Err(Error::NoCertificate { path: path.clone() });
    }
    Ok(Some(pem))
}

/// Runs the controllers until `cancel`; then lets what has begun end, within 5 seconds.
///
/// # Errors
/// A configuration that cannot be used, and a lost lease.
pub async fn run(config: Config, cancel: CancellationToken) -> Result<(), Error> {
    let root_ca = check(&config)?;
    let base = client::load_config(&config.kubeconfig, USER_AGENT).await?;
    if !config.leader_elect {
        lead(config, base, root_ca, cancel).await;
        return Ok(());
    }
    let leader = LeaderConfig {
        namespace: config.leader_elect_resource_namespace.clone(),
        lease_duration: config.leader_elect_lease_duration,
        renew_deadline: config.leader_elect_renew_deadline,
        retry_period: config.leader_elect_retry_period,
        ..LeaderConfig::new(config.leader_elect_resource_name.clone(), client::identity())
    };
    let client = client::connect_with_config(base.clone())?;
    let kept = client::run_as_leader(client, leader, cancel, |leading| lead(config, base, root_ca, leading)).await;
    if kept { Ok(()) } else { Err(Error::LeaseLost) }
}

async fn lead(config: Config, base: kube::Config, root_ca: Option<String>, cancel: CancellationToken) {
    let client = match client::connect_with_config(base.clone()) {
        Ok(client) => client,
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "failed to make a client");
            return;
        }
    };
    let tasks = TaskTracker::new();
    let informers = Informers::new();
    let context = Arc::new(Context { config, base, informers, tasks: tasks.clone(), cancel: cancel.clone() });
    // Registration comes before the watches, so no change is missed.
    for starting in start_all(&context, root_ca) {
        tasks.spawn(starting);
    }
    context.informers.run(&client, &tasks, &cancel);
    cancel.cancelled().await;
    tasks.close();
    if tokio::time::timeout(DRAIN, tasks.wait()).await.is_err() {
        tracing::warn!(tasks = tasks.len(), "gave up waiting for controllers to end");
    }
}

/// Registers a controller with the informers; the answer runs it.
type Start = fn(Arc<Context>) -> Starting;

fn start_all(context: &Arc<Context>, root_ca: Option<String>) -> Vec<Starting> {
    let mut starting: Vec<Starting> = Vec::new();
    let table: [(&str, Start); 10] = [
        ("deployment-controller", deployment::start),
        ("replicaset-controller", replicaset::start),
        ("namespace-controller", namespace::start),
        ("serviceaccount-controller", service_account::start),
        ("garbage-collector-controller", garbage::start),
        ("pod-garbage-collector-controller", pod_gc::start),
        ("node-lifecycle-controller", node::start),
        ("taint-eviction-controller", node::start_eviction),
        ("clusterrole-aggregation-controller", aggregation::start),
        ("endpointslice-controller", endpoint_slice::start),
    ];
    for (name, start) in table {
        if context.config.enabled(name) {
            starting.push(start(context.clone()));
        }
    }
    if let Some(root_ca) = root_ca.filter(|_| context.config.enabled("root-ca-certificate-publisher-controller")) {
        starting.push(root_ca::start(context.clone(), root_ca));
    }
    starting
}
