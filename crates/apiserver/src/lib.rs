//! The Kubernetes API server: seam 1 (REST of Kubernetes v1.37) over seam 2 (a store with etcd v3's semantics).
//!
//! ```text
//! TLS ─> authenticate ─> authorize ─> dispatch ─┬─ get, list, watch ──────────────> watch cache, store ─> encode
//!                                               ├─ create, update, patch, delete ─> admit, default, validate ─> txn
//!                                               ├─ review, token, scale, binding
//!                                               └─ log, exec ─────────────────────> the kubelet
//! ```
//!
//! A kind is its facts (`apimachinery`), not a handler: every resource goes down the same path. Objects are bytes: what the
//! store holds is copied into answers, with the resourceVersion spliced in.
//!
//! **Invariant**: nothing is answered that the store has not made durable, and no list or bookmark claims a revision that the
//! watch cache has not reached.
#![forbid(unsafe_code)]

pub mod admission;
mod allocations;
mod api;
pub mod authn;
pub mod authz;
pub mod bootstrap;
mod cache;
mod cluster_ip;
pub mod compaction;
mod config;
mod delete;
mod discovery;
mod escalation;
#[cfg(test)]
mod fuzz;
mod impersonation;
mod leases;
pub mod lookup;
mod metrics;
pub mod names;
mod negotiate;
mod object;
mod proxy;
mod publish;
mod read;
mod reply;
mod request;
mod resources;
pub mod reviews;
mod router;
mod server;
mod startup;
mod subresources;
mod tables;
mod watch;
mod write;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use apimachinery::status::Status;
use serving::tls;
use store::{Embedded, Etcd, EtcdConfig, Store};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::api::{Api, CacheLookup};
use crate::authn::token::{Issuer, KeyError, Verifier};
use crate::authz::Authorizer;
use crate::cache::Cache;
use crate::cluster_ip::Ranges;
pub use crate::config::Config;
use crate::leases::EventLeases;
use crate::proxy::Kubelets;
use crate::resources::Resources;

/// Why the server did not start or did not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Certificates or keys of TLS.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// A file of the configuration cannot be read.
    #[error("failed to read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The keys of service account tokens.
    #[error("failed to use the service account keys")]
    Keys(#[source] KeyError),
    /// The store.
    #[error("failed to open the store in {path}")]
    Store {
        /// Its directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: store::Error,
    },
    /// A real etcd.
    #[error("--etcd-servers")]
    Etcd(#[source] store::Error),
    /// The address is taken or not ours.
    #[error("failed to listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The objects that a cluster begins with.
    #[error("failed to prepare the cluster")]
    Bootstrap(#[source] Status),
}

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

/// Runs the server until cancelled, then drains and closes the store.
///
/// # Errors
/// [`Error`]; a bad configuration fails before a socket is bound or the store is opened.
pub async fn run(config: Config, cancel: CancellationToken) -> Result<(), Error> {
    let clients = tls::clients(&config.client_ca_file)?;
    let tls = tls::server(&config.tls_cert_file, &config.tls_private_key_file, Some(&clients), &["h2", "http/1.1"])?;
    let client_ca = read(&config.client_ca_file)?;
    let parts = Parts::read(&config)?;
    let address = SocketAddr::new(config.bind_address, config.secure_port);
    let listener = TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?;
    let port = listener.local_addr().map_err(|source| Error::Listen { address, source })?.port();
    let opened = Opened::open(&config, &cancel).await?;
    let closing = CancellationToken::new();
    let api = Arc::new(build(&config, parts, opened.store(), port, closing.clone()));
    let place = startup::Place { address: config.advertised(), port, cluster_ip: config.service_cluster_ip_range.first(), client_ca };
    let tls = server::Tls { acceptor: TlsAcceptor::from(Arc::new(tls)), clients };
    let outcome = serve(&api, listener, tls, &place, &cancel).await;
    drop(api);
    opened.close().await;
    outcome
}

/// The store that the flags name.
enum Opened {
    Embedded(Arc<Embedded>),
    Etcd { store: Arc<Etcd>, compaction: tokio::task::JoinHandle<()> },
}

impl Opened {
    async fn open(config: &Config, cancel: &CancellationToken) -> Result<Self, Error> {
        if config.etcd_servers.is_empty() {
            let path = config.data_dir.clone();
            let opened = tokio::task::spawn_blocking(move || Embedded::open(path, store::Options::default())).await;
            let opened = opened.unwrap_or(Err(store::Error::Closed));
            let store = opened.map_err(|source| Error::Store { path: config.data_dir.clone(), source })?;
            return Ok(Self::Embedded(Arc::new(store)));
        }
        let optional = |path: &Option<PathBuf>| path.as_deref().map(read).transpose();
        let identity = optional(&config.etcd_certfile)?.zip(optional(&config.etcd_keyfile)?);
        let etcd = EtcdConfig { endpoints: config.etcd_servers.clone(), ca: optional(&config.etcd_cafile)?, identity };
        let connected = tokio::select! {
            connected = Etcd::connect(&etcd) => connected,
            () = cancel.cancelled() => Err(store::Error::Closed),
        };
        let store = Arc::new(connected.map_err(Error::Etcd)?);
        let compaction = tokio::spawn(compaction::run(store.clone(), config.etcd_compaction_interval, cancel.clone()));
        Ok(Self::Etcd { store, compaction })
    }

    fn store(&self) -> Arc<dyn Store> {
        match self {
            Self::Embedded(store) => store.clone(),
            Self::Etcd { store, .. } => store.clone(),
        }
    }

    async fn close(self) {
        match self {
            Self::Embedded(store) => {
                if let Some(store) = Arc::into_inner(store) {
                    store.close().await;
                }
            }
            Self::Etcd { compaction, .. } => {
                compaction.abort();
                // Aborted: there is nothing to learn from it.
                let _ = compaction.await;
            }
        }
    }
}

/// What is read from files before anything is begun.
struct Parts {
    verifier: Verifier,
    issuer: Issuer,
    kubelets: Kubelets,
}

impl Parts {
    fn read(config: &Config) -> Result<Self, Error> {
        let public = config.service_account_key_file.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
        let private = read(&config.service_account_signing_key_file)?;
        let issuer = config.service_account_issuer.clone();
        Ok(Self {
            verifier: Verifier::new(public.iter().map(String::as_str), issuer.clone(), config.audiences()).map_err(Error::Keys)?,
            issuer: Issuer::new(&private, &public.join("\n"), issuer).map_err(Error::Keys)?,
            kubelets: Kubelets::new(
                config.kubelet_certificate_authority.as_deref(),
                config.kubelet_client_certificate.as_deref(),
                config.kubelet_client_key.as_deref(),
                config.kubelet_preferred_address_types.clone(),
            )?,
        })
    }
}

fn build(config: &Config, parts: Parts, store: Arc<dyn Store>, port: u16, closing: CancellationToken) -> Api {
    let resources = Arc::new(Resources::new(&config.etcd_prefix));
    let cache = Arc::new(Cache::new(resources.root(), resources.storages()));
    let lookup = Arc::new(CacheLookup { resources: resources.clone(), cache: cache.clone() });
    Api {
        resources,
        store,
        cache,
        authorizer: Arc::new(Authorizer::new(lookup.clone())),
        lookup,
        verifier: parts.verifier,
        issuer: parts.issuer,
        audiences: config.audiences(),
        services: Ranges { addresses: config.service_cluster_ip_range, ports: config.service_node_port_range.clone() },
        kubelets: parts.kubelets,
        looks: metrics::Looks::default(),
        event_leases: EventLeases::new(config.event_ttl),
        advertise: format!("{}:{port}", config.advertised()),
        places: tokio::sync::Semaphore::new(config.max_requests_inflight),
        watches: Arc::new(tokio::sync::Semaphore::new(config.max_watches)),
        request_timeout: config.request_timeout,
        ready: AtomicBool::new(false),
        closing,
    }
}

async fn serve(
    api: &Arc<Api>,
    listener: TcpListener,
    tls: server::Tls,
    place: &startup::Place,
    cancel: &CancellationToken,
) -> Result<(), Error> {
    let feeding = CancellationToken::new();
    let filled = Arc::new(tokio::sync::Notify::new());
    let feed = tokio::spawn({
        let (api, feeding, filled) = (api.clone(), feeding.clone(), filled.clone());
        async move {
            let changed = |keyspace: usize| {
                if api.resources.storages()[keyspace].facts.group == "rbac.authorization.k8s.io" {
                    api.authorizer.invalidate();
                }
            };
            api.cache.feed(api.store.as_ref(), changed, || filled.notify_one(), feeding).await;
        }
    });
    let ended = CancellationToken::new();
    let server = tokio::spawn(server::serve(api.clone(), listener, tls, ended.clone()));
    let mut publisher = publish::Publisher::default();
    let started = async {
        filled.notified().await;
        startup::run(api, place, &mut publisher).await
    };
    let outcome = tokio::select! {
        outcome = started => outcome.map_err(Error::Bootstrap),
        () = cancel.cancelled() => Ok(()),
    };
    if outcome.is_ok() && !cancel.is_cancelled() {
        api.ready.store(true, Ordering::Release);
        tracing::info!(address = %api.advertise, "ready");
        publisher.run(api.clone(), place.clone(), cancel.clone()).await;
    }
    api.closing.cancel();
    ended.cancel();
    for task in [server, feed] {
        feeding.cancel();
        if let Err(error) = task.await {
            tracing::error!(%error, "a task of the server panicked");
        }
    }
    outcome
}
