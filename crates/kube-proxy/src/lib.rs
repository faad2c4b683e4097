//! Leads traffic for Services to their endpoints: kube-proxy's nftables mode.
//!
//! ```text
//! watch Services, EndpointSlices, this Node ─> keys ─> fragments ─> difference ─> one nftables transaction
//!                                                          ^                              │
//!                                 what the kernel holds ───┴──── after an error, or at the start
//! ```
//!
//! Seams: the API server, with the identity `system:kube-proxy` and no more than the role `system:node-proxier`; the kernel through
//! netlink, no `nft` program. A change costs the messages of what changed. A restart takes the table over as it is: traffic and sticky
//! clients do not notice. IPv4 only, as the cluster is.
//!
//! **Invariant**: stopping the proxy removes nothing. Packets are led by the kernel; [`remove`] ends that.

#![forbid(unsafe_code)]

mod apply;
mod config;
mod flows;
mod fragment;
mod health;
mod layout;
mod plan;
mod service;
#[cfg(test)]
mod tests;
mod worker;

pub use config::{Cidr, Config, Listen, NodePortAddress};

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use client::{Delta, ObjectKey};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::runtime::watcher;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::health::Health;
use crate::worker::{BY_SERVICE, Sources, Worker};

const USER_AGENT: &str = concat!("kube-proxy/coracle-", env!("CARGO_PKG_VERSION"));
/// The taint of a node that an autoscaler is about to delete.
const DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
/// How often the table is looked at.
const CHECK: Duration = Duration::from_secs(30);
/// How long after it fell idle a chain is deleted.
const SWEEP: Duration = Duration::from_secs(1);
/// First and longest wait after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// How long running work may take to end.
const DRAIN: Duration = Duration::from_secs(5);

/// Why the proxy did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no kubeconfig.
    #[error("--kubeconfig is needed")]
    NoKubeconfig,
    /// There is no client.
    #[error("failed to read --kubeconfig")]
    Connect(#[from] client::ConnectError),
    /// The host has no name.
    #[error("failed to read this host's name; give a --hostname-override")]
    HostName(#[source] std::io::Error),
    /// The health port is taken.
    #[error("--healthz-bind-address: failed to listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The kernel refused.
    #[error("failed to {act}")]
    Kernel {
        /// What.
        act: String,
        /// Why.
        #[source]
        source: linux::netlink::Error,
    },
    /// A bug.
    #[error("the worker panicked")]
    Panicked(#[source] tokio::task::JoinError),
}

/// The keys of Services that changed.
#[derive(Debug, Clone, Default)]
struct Dirty(Arc<(Mutex<BTreeSet<ObjectKey>>, Notify)>);

impl Dirty {
    fn add(&self, key: ObjectKey) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
        self.0.1.notify_one();
    }

    fn take(&self) -> BTreeSet<ObjectKey> {
        std::mem::take(&mut *self.0.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put_back(&self, keys: BTreeSet<ObjectKey>) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).extend(keys);
    }

    async fn wait(&self) {
        self.0.1.notified().await;
    }
}

/// Removes the table of a configuration, if it is there.
///
/// # Errors
/// A refusal of the kernel.
pub fn remove(config: &Config) -> Result<(), Error> {
    apply::Table::new(config.nftables_table.clone(), layout::Options::default()).remove()
}

/// Leads traffic until `cancel`; what stands in the kernel stays. With `--cleanup` it is removed, and nothing else done.
///
/// # Errors
/// A configuration that cannot be used, and a health port that is taken.
pub async fn run(config: Config, cancel: CancellationToken) -> Result<(), Error> {
    if config.cleanup {
        return tokio::task::spawn_blocking(move || remove(&config)).await.map_err(Error::Panicked)?;
    }
    let kubeconfig = config.kubeconfig.clone().ok_or(Error::NoKubeconfig)?;
    let node = match &config.hostname_override {
        Some(name) => name.trim().to_lowercase(),
        None => std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(Error::HostName)?.trim().to_lowercase(),
    };
    let listener = match config.healthz_bind_address {
        Some(address) => Some(health::bind(address).await?),
        None => None,
    };
    let (health, dirty, tasks) = (Health::default(), Dirty::default(), TaskTracker::new());
    let sources = watch(&kubeconfig, &node, &dirty, &health, &tasks, &cancel).await?;
    if let Some(listener) = listener {
        tasks.spawn(health::serve(listener, health.clone(), cancel.child_token()));
    }
    let worker = Worker::new(config, node, sources.clone());
    let result = if synced(&sources, &cancel).await { lead(worker, dirty, health, &cancel).await } else { Ok(()) };
    cancel.cancel();
    tasks.close();
    if tokio::time::timeout(DRAIN, tasks.wait()).await.is_err() {
        tracing::warn!(tasks = tasks.len(), "gave up waiting for watches to end");
    }
    result
}

/// Nothing is written before all is known: a half table would cut off what the old one leads well.
async fn synced(sources: &Sources, cancel: &CancellationToken) -> bool {
    sources.services.wait_synced(cancel).await && sources.slices.wait_synced(cancel).await && sources.node.wait_synced(cancel).await
}

async fn watch(
    kubeconfig: &Path,
    node: &str,
    dirty: &Dirty,
    health: &Health,
    tasks: &TaskTracker,
    cancel: &CancellationToken,
) -> Result<Sources, Error> {
    let client = client::connect(kubeconfig, USER_AGENT).await?;
    let sources = Sources::default();
    let (mark, told) = (dirty.clone(), health.clone());
    sources.services.on_change(move |delta| {
        told.queued(Timestamp::now());
        mark.add(ObjectKey::of(&**delta.object()));
    });
    sources.slices.add_index(BY_SERVICE, |slice| service_of(slice).map(|key| key.to_string()).into_iter().collect());
    let (mark, told) = (dirty.clone(), health.clone());
    sources.slices.on_change(move |delta| {
        for key in [delta.before().and_then(|slice| service_of(slice)), service_of(delta.object())].into_iter().flatten() {
            told.queued(Timestamp::now());
            mark.add(key);
        }
    });
    let (mark, told) = (dirty.clone(), health.clone());
    sources.node.on_change(move |delta| {
        told.set_eligible(!matches!(delta, Delta::Deleted(_)) && is_eligible(delta.object()));
        // The worker looks at the node itself.
        mark.add(ObjectKey::default());
    });
    let ours = watcher::Config::default().labels(&format!("!{},!{}", service::PROXY_NAME, service::HEADLESS));
    let only = watcher::Config::default().fields(&format!("metadata.name={node}"));
    tasks.spawn(sources.services.clone().run(Api::all(client.clone()), ours.clone(), cancel.child_token()));
    tasks.spawn(sources.slices.clone().run(Api::all(client.clone()), ours, cancel.child_token()));
    tasks.spawn(sources.node.clone().run(Api::all(client), only, cancel.child_token()));
    Ok(sources)
}

fn service_of(slice: &EndpointSlice) -> Option<ObjectKey> {
    let name = slice.metadata.labels.as_ref()?.get(service::SERVICE_NAME).filter(|name| !name.is_empty())?;
    Some(ObjectKey::new(slice.metadata.namespace.clone().unwrap_or_default(), name))
}

fn is_eligible(node: &Node) -> bool {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    node.metadata.deletion_timestamp.is_none() && taints.into_iter().all(|taint| taint.key != DELETED_TAINT)
}

/// Syncs whenever something changed.
async fn lead(worker: Worker, dirty: Dirty, health: Health, cancel: &CancellationToken) -> Result<(), Error> {
    let mut worker = worker;
    let mut check = tokio::time::interval(CHECK);
    check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut retry = None;
    let mut now = true;
    loop {
        if now {
            let keys = dirty.take();
            let (given, asked) = (keys.clone(), Timestamp::now());
            let (back, result) = blocking(worker, move |worker| worker.sync(keys)).await?;
            worker = back;
            retry = match result {
                Ok(cost) => {
                    tracing::debug!(messages = cost.messages, elements = cost.elements, "synced");
                    health.updated(asked);
                    None
                }
                Err(error) => {
                    dirty.put_back(given);
                    let wait = retry.map_or(RETRY.0, |wait: Duration| (wait * 2).min(RETRY.1));
                    tracing::warn!(error = &error as &dyn std::error::Error, wait_ms = wait.as_millis(), "failed to sync; trying again");
                    Some(wait)
                }
            };
        }
        let sweep = worker.has_idle();
        now = tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            () = dirty.wait(), if retry.is_none() => true,
            () = tokio::time::sleep(retry.unwrap_or_default()), if retry.is_some() => true,
            () = tokio::time::sleep(SWEEP), if sweep => {
                worker = blocking(worker, Worker::sweep).await?.0;
                false
            }
            _ = check.tick() => {
                let (back, result) = blocking(worker, Worker::check).await?;
                worker = back;
                result.inspect_err(|error| tracing::warn!(error = error as &dyn std::error::Error, "failed to check the table")).unwrap_or(true)
            }
        };
    }
}

async fn blocking<T: Send + 'static>(worker: Worker, act: impl FnOnce(&mut Worker) -> T + Send + 'static) -> Result<(Worker, T), Error> {
    let mut worker = worker;
    let work = move || {
        let result = act(&mut worker);
        (worker, result)
    };
    tokio::task::spawn_blocking(work).await.map_err(Error::Panicked)
}
