//! The node agent: pods of one node, through any CRI runtime.
//!
//! Seams: the API server (seam 1, as a client, and 9: its HTTPS API for logs and exec), the runtime (seam 4, CRI).
//!
//! ```text
//!   API pods --watch--> manager --> a worker a pod: observe (CRI) -> plan (pure) -> apply -> observe -> status
//!   CRI events, relist --^                                               status writer, a task a pod --> API
//! ```
//!
//! **Invariant**: a restart of the kubelet, or a server that is away, ends and restarts no container. What runs is
//! read from the runtime each time; nothing is kept on disk that could disagree with it.
#![forbid(unsafe_code)]

mod admission;
mod apply;
mod backoff;
mod cgroups;
mod config;
mod credentials;
pub mod cri;
pub mod downward;
mod env;
mod ephemeral;
mod events;
mod eviction;
#[cfg(test)]
mod fuzz;
mod gc;
mod image_gc;
mod images;
mod kill;
mod kubelet;
mod logs;
mod manager;
pub mod model;
mod node;
mod objects;
pub mod plan;
mod pleg;
pub mod probe;
mod qos;
mod quantity;
mod restart;
mod rotate;
mod runtime;
mod server;
pub mod status;
mod status_writer;
mod termination;
mod volume;
mod worker;
#[cfg(test)]
mod worker_tests;

use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use client::{EventRecorder, Informer};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::Api;
use kube::runtime::watcher;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use backoff::BackOff;
pub use config::{Config, Invalid};

use crate::cri::NodeFacts;
use crate::kubelet::{Kubelet, Live};
use crate::runtime::Runtime;

/// Why the kubelet cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag.
    #[error("invalid configuration")]
    Config(#[from] Invalid),
    /// The kubeconfig.
    #[error("failed to use the kubeconfig")]
    Connect(#[from] client::ConnectError),
    /// The runtime's endpoint.
    #[error("failed to use the container runtime")]
    Runtime(#[from] runtime::Error),
    /// Cgroups of QoS classes.
    #[error("failed to make cgroups below {root}")]
    Cgroups {
        /// The root.
        root: String,
        /// Why.
        source: linux::Error,
    },
    /// A directory.
    #[error("failed to make directory {path}")]
    Directory {
        /// The directory.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The HTTPS API.
    #[error("failed to serve the kubelet's API")]
    Server(#[from] server::Error),
    /// The host has no name and none was given.
    #[error("the host has no name: give --hostname-override")]
    NoName,
}

/// How long tasks may take to end.
const DRAIN: Duration = Duration::from_secs(8);
/// How long the runtime may take to answer at start.
const RUNTIME_START: Duration = Duration::from_secs(60);

/// Runs the kubelet until cancelled; pods go on running.
///
/// # Errors
/// Whatever keeps it from starting: flags, kubeconfig, runtime endpoint, directories, cgroups.
pub async fn run(config: Config, cancel: CancellationToken) -> Result<(), Error> {
    config.validate()?;
    let client = client::connect(&config.kubeconfig, "kubelet").await?;
    let runtime = Runtime::new(&config.container_runtime_endpoint, config.image_service_endpoint.as_deref())?;
    for path in [&config.root_dir, &config.pod_logs_dir] {
        std::fs::create_dir_all(path).map_err(|source| Error::Directory { path: path.display().to_string(), source })?;
    }
    // Secrets of pods are files below it (upstream: 0750).
    std::fs::set_permissions(&config.root_dir, std::os::unix::fs::PermissionsExt::from_mode(0o750))
        .map_err(|source| Error::Directory { path: config.root_dir.display().to_string(), source })?;
    let facts = facts(&config)?;
    let version = tokio::select! {
        () = cancel.cancelled() => return Ok(()),
        version = await_runtime(&runtime) => version?,
    };
    if let Some(pod_cidr) = &config.pod_cidr {
        runtime.update_pod_cidr(pod_cidr).await?;
    }
    let node_name = config.hostname_override.clone().unwrap_or_else(node::host::host_name);
    if node_name.is_empty() {
        return Err(Error::NoName);
    }
    let recorder = EventRecorder::new("kubelet", node_name.clone());
    let kubelet = Arc::new(Kubelet {
        client: client.clone(),
        runtime,
        recorder: events::Recorder::new(recorder.clone()),
        node_name,
        facts,
        services: Informer::new(),
        node: Informer::new(),
        started: Timestamp::now(),
        images: Mutex::default(),
        live: RwLock::new(Live { runtime_name: version.runtime_name, ..Live::default() }),
        config,
    });
    node::prime(&kubelet).await;
    let pods = Informer::new();
    let server = server::Server::bind(kubelet.clone(), pods.clone(), cancel.child_token()).await?;
    let mut tasks = JoinSet::new();
    tasks.spawn(client::run_events(client, recorder, cancel.child_token()));
    if let Some(server) = server {
        tasks.spawn(server.run());
    }
    let node = events::Target::node(&kubelet.node_name);
    kubelet.recorder.normal(&node, "Starting", "Starting kubelet.");
    start(&kubelet, pods, &mut tasks, &cancel);
    cancel.cancelled().await;
    let drained = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN, drained).await.is_err() {
        tracing::warn!("tasks did not end in time");
    }
    Ok(())
}

/// Ends and removes every pod that this kubelet runs, at the runtime alone: for taking a node down for good. Volumes and cgroups
/// are the caller's.
///
/// # Errors
/// The runtime's, the first of them; all pods are tried.
pub async fn down(config: &Config) -> Result<(), Error> {
    let runtime = Runtime::new(&config.container_runtime_endpoint, config.image_service_endpoint.as_deref())?;
    // A runtime may serve others as well: what is ours has a directory.
    let own = |uid: &str| !uid.is_empty() && volume::pod_directory(&config.root_dir, uid).is_dir();
    let mut result = Ok(());
    for sandbox in runtime.list_sandboxes(None).await? {
        if sandbox.labels.get(model::labels::POD_UID).is_some_and(|uid| own(uid)) {
            let stopped = runtime.stop_sandbox(&sandbox.id).await;
            let removed = runtime.remove_sandbox(&sandbox.id).await;
            result = result.and(stopped).and(removed);
        }
    }
    Ok(result?)
}

fn start(kubelet: &Arc<Kubelet>, pods: Informer<Pod>, tasks: &mut JoinSet<()>, cancel: &CancellationToken) {
    let client = kubelet.client.clone();
    let name = &kubelet.node_name;
    let own = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let nodes: Api<Node> = Api::all(client.clone());
    tasks.spawn(kubelet.node.clone().run(nodes, own, cancel.child_token()));
    let with_ip = watcher::Config::default().fields("spec.clusterIP!=None");
    let services: Api<Service> = Api::all(client.clone());
    tasks.spawn(kubelet.services.clone().run(services, with_ip, cancel.child_token()));
    tasks.spawn(node::run(kubelet.clone(), cancel.child_token()));
    tasks.spawn(rotate::run(kubelet.clone(), cancel.child_token()));
    tasks.spawn(node::lease::run(kubelet.clone(), cancel.child_token()));
    let (evict, evictions) = tokio::sync::mpsc::channel(eviction::QUEUE);
    let manager = manager::Manager::new(kubelet.clone(), pods.clone(), evictions);
    tasks.spawn(eviction::run(kubelet.clone(), pods.clone(), evict, cancel.child_token()));
    tasks.spawn(image_gc::run(kubelet.clone(), cancel.child_token()));
    let bound = watcher::Config::default().fields(&format!("spec.nodeName={name}"));
    let api: Api<Pod> = Api::all(client);
    tasks.spawn(pods.run(api, bound, cancel.child_token()));
    let (shared, token) = (kubelet.clone(), cancel.child_token());
    tasks.spawn(async move {
        // Pods need the node's addresses, its allocatable resources and the services' variables.
        let synced = shared.node.wait_synced(&token).await && shared.services.wait_synced(&token).await;
        if synced {
            manager.run(token).await;
        }
    });
}

fn facts(config: &Config) -> Result<NodeFacts, Error> {
    let root = config.cgroup_root.trim_end_matches('/');
    let cgroup_root = if config.cgroups_per_qos { format!("{root}/kubepods") } else { String::new() };
    if config.cgroups_per_qos {
        cgroups::make_tiers(&cgroup_root).map_err(|source| Error::Cgroups { root: cgroup_root.clone(), source })?;
    }
    let v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let swap_v1 = "/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes";
    Ok(NodeFacts {
        memory_bytes: node::host::memory_bytes(),
        cgroup_root,
        log_root: config.pod_logs_dir.display().to_string(),
        hugepage_sizes: node::host::hugepage_sizes(),
        swap_limit: v2 || std::path::Path::new(swap_v1).exists(),
        cgroup_v2: v2,
        seccomp_root: config.root_dir.join("seccomp").display().to_string(),
        cluster_domain: config.cluster_domain.clone(),
    })
}

/// Waits until the runtime answers, with patience: it may be starting beside us.
async fn await_runtime(runtime: &Runtime) -> Result<protocols::cri::v1::VersionResponse, runtime::Error> {
    let deadline = tokio::time::Instant::now() + RUNTIME_START;
    loop {
        match runtime.version().await {
            Ok(version) => return Ok(version),
            Err(error) if tokio::time::Instant::now() >= deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}
