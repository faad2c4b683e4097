//! A CRI v1 runtime: pods, containers, images.
//!
//! Above it any kubelet, crictl or critest, over gRPC on a unix socket (seam 4). Below it one shim per pod, over ttrpc
//! (seam 5), the pod network (seam 7) and the image store (seam 8). It is off the data path: shims write the logs and hold the
//! processes, so that a server that stops, dies or is replaced ends no container and loses no line.
//!
//! ```text
//! RunPodSandbox: record -> network namespace -> network || shim -> Ready
//! CreateContainer: snapshot -> users -> spec (pure) -> bundle -> record
//! StartContainer: Task.Create -> Task.Start -> Running -> Task.Wait -> Exited
//! start of the server: records + shims -> plan (pure) -> apply
//! ```
//!
//! What is on disk: `--root` holds images and snapshots; `--state` holds a record per pod and container, stamped with the boot id
//! and never synced, and what the kernel forgets at a reboot. No request waits for an fsync of this crate.
//!
//! **Invariant**: no Kubernetes object is known here, and no process of a container is a child of this one.

#![forbid(unsafe_code)]

mod apply;
mod config;
mod container;
mod error;
mod exec;
#[cfg(test)]
mod fuzz;
mod handler;
mod host;
mod image_service;
mod images;
mod info;
mod oci;
mod plan;
mod portforward;
mod pump;
mod record;
mod sandbox;
mod server;
mod service;
mod shim;
mod spec;
mod state;
mod stats;
mod status;
mod stdio;
mod streaming;
mod volumes;

pub use config::{Config, SHIM_NAME};
pub use error::Error;

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use camino::Utf8Path;
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;

use crate::error::Result;
use crate::handler::Handlers;
use crate::host::kernel;
use crate::images::Images;
use crate::server::{Engines, Server};
use crate::shim::Launcher;

/// How long requests that are at work may go on when the server stops.
const DRAIN: Duration = Duration::from_secs(10);
/// How long the keeper may take to end.
const KEEPER_END: Duration = Duration::from_secs(10);
/// Out-of-memory events that may wait.
const OOMS_MAX: usize = 64;

/// Serves CRI until cancelled. Pods go on without it, and the next server takes them over.
///
/// # Errors
/// [`Error`] for a bad configuration, directories or sockets that are taken, and engines that do not open. Nothing is bound before
/// the configuration is found good.
pub async fn run(config: Config, cancel: CancellationToken) -> Result<()> {
    config.validate()?;
    let shim = config.find_shim()?;
    let handlers = Handlers::load(&config, &shim)?;
    let _lock = lock_state(&config.state)?;
    let listener = listen(&config.address)?;
    let address = SocketAddr::new(config.stream_server_address, config.stream_server_port);
    let failed = |source: std::io::Error| Error::Serve { endpoint: address.to_string(), source: source.into() };
    let streams = TcpListener::bind(address).await.map_err(failed)?;
    let stream_url = format!("http://{}", streams.local_addr().map_err(failed)?);
    // Requests in flight are allowed to end after `cancel`; shims' watchers and streams are not waited for.
    let server = Arc::new(open(config, shim, handlers, stream_url, cancel.clone()).await?);
    let background = serve_background(&server, streams)?;
    server.launcher.ensure_keeper().await?;
    server.reconcile().await?;
    let address = server.config.address.clone();
    tracing::info!(%address, "serving CRI");
    let served = tonic::transport::Server::builder().serve_with_incoming_shutdown(
        service::both(&server),
        UnixListenerStream::new(listener),
        cancel.clone().cancelled_owned(),
    );
    let outcome = tokio::select! {
        outcome = served => outcome,
        () = async { cancel.cancelled().await; tokio::time::sleep(DRAIN).await } => Ok(()),
    };
    cancel.cancel();
    server.tasks.close();
    if tokio::time::timeout(DRAIN, server.tasks.wait()).await.is_err() {
        tracing::warn!("some requests were still at work at the end");
    }
    for task in background {
        task.abort();
    }
    // A successor may have bound the path already only if it held the lock, which is ours.
    let _ = fs::remove_file(&address);
    outcome.map_err(|source| Error::Serve { endpoint: address.into_string(), source: source.into() })
}

/// Removes all pods, containers, networks and the keeper of this state directory. Images stay.
///
/// # Errors
/// The first failure; all steps were tried, and the call can be repeated. [`Error::Config`] if a server still runs.
pub async fn down(config: Config) -> Result<()> {
    config.validate()?;
    if !config.state.is_dir() {
        return Ok(());
    }
    let shim = config.find_shim()?;
    let handlers = Handlers::load(&config, &shim)?;
    let _lock = lock_state(&config.state)?;
    let state = config.state.clone();
    let cancel = CancellationToken::new();
    let _end = cancel.clone().drop_guard();
    let server = Arc::new(open(config, shim, handlers, String::new(), cancel).await?);
    let mut failures = Vec::new();
    failures.extend(server.reconcile().await.err());
    for sandbox in server.registry(|registry| registry.sandboxes()) {
        failures.extend(server.remove_pod_sandbox(&sandbox.id).await.err());
    }
    let network = Arc::clone(&server.network);
    let removed = server
        .blocking(move || {
            network.remove_all().map_err(|source| Error::Network {
                act: "remove the networks",
                id: "all".to_owned(),
                source: Box::new(source),
            })
        })
        .await;
    failures.extend(removed.err());
    failures.extend(end_keeper(&server.launcher).await.err());
    if let Some(error) = failures.into_iter().next() {
        return Err(error);
    }
    sandbox::remove_dir(&state)
}

async fn end_keeper(launcher: &Launcher) -> Result<()> {
    let Some(pid) = launcher.keeper_pid().await.and_then(|pid| i32::try_from(pid).ok()) else { return Ok(()) };
    linux::process::kill(pid, 15).map_err(kernel(format!("end the keeper {pid}")))?;
    let deadline = tokio::time::Instant::now() + KEEPER_END;
    while launcher.keeper_pid().await.is_some() {
        if tokio::time::Instant::now() > deadline {
            return Err(Error::Deadline { act: "the end", id: format!("keeper {pid}"), seconds: KEEPER_END.as_secs() });
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Makes the state directory and takes it for this process alone.
fn lock_state(state: &Utf8Path) -> Result<File> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o711).create(state).map_err(Error::io("make directory", state))?;
    // Environments of containers are in there.
    builder.mode(0o700);
    for dir in ["sandboxes", "containers", "netns", "s", "oci", "network"] {
        let dir = state.join(dir);
        builder.create(&dir).map_err(Error::io("make directory", dir))?;
    }
    let path = state.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(Error::io("open", &path))?;
    if linux::fs::lock_exclusive(file.as_fd(), false).map_err(kernel(format!("lock {path}")))? {
        return Ok(file);
    }
    Err(Error::Config { flag: "--state", reason: format!("{state} is in use by another server") })
}

/// Binds the CRI socket, for root alone; one that nobody serves any more is replaced.
fn listen(address: &Utf8Path) -> Result<UnixListener> {
    let serve = |source: std::io::Error| Error::Serve { endpoint: address.to_string(), source: source.into() };
    if let Some(parent) = address.parent() {
        fs::create_dir_all(parent).map_err(Error::io("make directory", parent))?;
    }
    if std::os::unix::net::UnixStream::connect(address).is_ok() {
        return Err(Error::Config { flag: "--address", reason: format!("{address} is served by another process") });
    }
    match fs::remove_file(address) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(serve(error)),
        _ => {}
    }
    let listener = UnixListener::bind(address).map_err(serve)?;
    fs::set_permissions(address, fs::Permissions::from_mode(0o600)).map_err(serve)?;
    Ok(listener)
}

async fn open(
    config: Config,
    shim: camino::Utf8PathBuf,
    handlers: Handlers,
    stream_url: String,
    cancel: CancellationToken,
) -> Result<Server> {
    let bad = |flag: &'static str| move |error: network::Error| Error::Config { flag, reason: error.to_string() };
    let network_config = network::Config {
        bridge: config.bridge.clone(),
        pod_cidr: config.pod_cidr.parse().map_err(bad("--pod-cidr"))?,
        nft_table: config.nftables_table.clone(),
        cni_conf_dir: config.cni_conf_dir.clone(),
        cni_bin_dirs: vec![config.cni_bin_dir.clone()],
        ..network::Config::new(config.state.join("network"))
    };
    network_config.validate().map_err(bad("--bridge"))?;
    fs::create_dir_all(&config.root).map_err(Error::io("make directory", &config.root))?;
    let options = image_store::Options {
        hosts_dir: config.registry_config_path.clone().map(camino::Utf8PathBuf::into_std_path_buf),
        ..image_store::Options::default()
    };
    let store = image_store::ImageStore::open(config.root.as_std_path(), options).await.map_err(|source| Error::Image {
        act: "open",
        object: config.root.to_string(),
        source: Box::new(source),
    })?;
    let network = tokio::task::spawn_blocking(move || network::Network::open(network_config))
        .await
        .map_err(|_| Error::ShuttingDown)?
        .map_err(|source| Error::Network { act: "open the networks", id: "all".to_owned(), source: Box::new(source) })?;
    let launcher = Launcher::new(shim, &config.address, &config.state);
    let engines = Engines { images: Images::new(Arc::new(store)), network: Arc::new(network), launcher, handlers, stream_url };
    Server::new(config, engines, cancel)
}

fn serve_background(server: &Arc<Server>, streams: TcpListener) -> Result<Vec<tokio::task::JoinHandle<()>>> {
    let events = server.launcher.events.clone();
    let _ = fs::remove_file(&events);
    let failed = |source: std::io::Error| Error::Serve { endpoint: events.to_string(), source: source.into() };
    let listener = UnixListener::bind(&events).map_err(failed)?;
    fs::set_permissions(&events, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let (ooms, mut heard) = tokio::sync::mpsc::channel::<String>(OOMS_MAX);
    let marker = Arc::clone(server);
    Ok(vec![
        tokio::spawn(shim::events::serve(listener, ooms, server.tasks.clone(), server.cancel.clone())),
        tokio::spawn(async move {
            while let Some(id) = heard.recv().await {
                if let Ok(container) = marker.registry(|registry| registry.container(&id)) {
                    container.oom.store(true, Ordering::Relaxed);
                }
            }
        }),
        tokio::spawn(streaming::serve(Arc::clone(server), streams)),
    ])
}
