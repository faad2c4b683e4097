//! What all requests share: the table, the engines below, and the tasks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use camino::Utf8PathBuf;
use protocols::cri::v1::{ContainerEventResponse, ContainerEventType};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::handler::Handlers;
use crate::images::Images;
use crate::shim::Launcher;
use crate::spec::HostFacts;
use crate::state::{Container, Locks, Registry, Sandbox, lock};
use crate::stats::Samples;
use crate::streaming::Tokens;
use crate::{host, record, status};

/// Events that a subscriber may be behind, before it is cut off.
const EVENTS_MAX: usize = 1024;

/// The server's heart; every request has a share of it.
#[derive(Debug)]
pub struct Server {
    pub config: Config,
    pub boot_id: String,
    pub host: HostFacts,
    pub images: Images,
    pub network: Arc<network::Network>,
    pub launcher: Launcher,
    pub handlers: Handlers,
    pub locks: Locks,
    pub events: broadcast::Sender<ContainerEventResponse>,
    /// All work that must end before the program does.
    pub tasks: TaskTracker,
    pub cancel: CancellationToken,
    pub tokens: Tokens,
    pub samples: Mutex<Samples>,
    /// `http://ADDRESS:PORT` of the stream server.
    pub stream_url: String,
    registry: Mutex<Registry>,
    /// Per image: what users its files know.
    pub user_files: Mutex<BTreeMap<String, Arc<crate::spec::user::UserFiles>>>,
}

/// What [`Server::new`] is given besides the configuration.
#[derive(Debug)]
pub struct Engines {
    pub images: Images,
    pub network: Arc<network::Network>,
    pub launcher: Launcher,
    pub handlers: Handlers,
    pub stream_url: String,
}

impl Server {
    /// A server without pods.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the host's facts cannot be read.
    pub fn new(config: Config, engines: Engines, cancel: CancellationToken) -> Result<Self> {
        Ok(Self {
            boot_id: host::boot_id()?,
            host: host::facts()?,
            images: engines.images,
            network: engines.network,
            launcher: engines.launcher,
            handlers: engines.handlers,
            locks: Locks::default(),
            events: broadcast::Sender::new(EVENTS_MAX),
            tasks: TaskTracker::new(),
            cancel,
            tokens: Tokens::default(),
            samples: Mutex::default(),
            stream_url: engines.stream_url,
            registry: Mutex::default(),
            user_files: Mutex::default(),
            config,
        })
    }

    /// Looks something up in the table, or changes it.
    pub fn registry<T>(&self, visit: impl FnOnce(&mut Registry) -> T) -> T {
        visit(&mut lock(&self.registry))
    }

    /// The directory of a sandbox.
    pub fn sandbox_dir(&self, id: &str) -> Utf8PathBuf {
        self.config.state.join("sandboxes").join(id)
    }

    /// The directory of a container.
    pub fn container_dir(&self, id: &str) -> Utf8PathBuf {
        self.config.state.join("containers").join(id)
    }

    /// Where a sandbox' network namespace is pinned.
    pub fn netns_path(&self, id: &str) -> Utf8PathBuf {
        self.config.state.join("netns").join(id)
    }

    /// Runs an effect to its end, even if the caller hangs up.
    ///
    /// # Errors
    /// Its own; [`Error::ShuttingDown`] if it was not begun, or panicked.
    pub async fn finish<T: Send + 'static>(self: &Arc<Self>, effect: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        if self.cancel.is_cancelled() {
            return Err(Error::ShuttingDown);
        }
        self.tasks.spawn(effect).await.map_err(|_| Error::ShuttingDown)?
    }

    /// Runs blocking work on a thread for it.
    ///
    /// # Errors
    /// Its own; [`Error::ShuttingDown`] if it panicked.
    pub async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        tokio::task::spawn_blocking(work).await.map_err(|_| Error::ShuttingDown)?
    }

    /// Writes a sandbox' record.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save_sandbox(&self, sandbox: &Sandbox) -> Result<()> {
        record::write(&sandbox.dir, &sandbox.record(&self.boot_id))
    }

    /// Writes a container's record.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save_container(&self, container: &Container) -> Result<()> {
        record::write(&container.dir, &container.record(&self.boot_id))
    }

    /// Tells the subscribers of GetContainerEvents. A sandbox' own events have its id as the container's.
    pub fn emit(&self, kind: ContainerEventType, id: &str, sandbox_id: &str) {
        if self.events.receiver_count() == 0 {
            return;
        }
        let (sandbox, containers) = self.registry(|registry| (registry.sandbox(sandbox_id).ok(), registry.containers_of(sandbox_id)));
        let event = ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind as i32,
            created_at: host::now(),
            pod_sandbox_status: sandbox.as_deref().map(status::sandbox_status),
            containers_statuses: containers.iter().map(|container| status::container_status(container, None)).collect(),
        };
        // There may be no subscriber any more.
        let _ = self.events.send(event);
    }
}

/// A span of a pod's road, for `coracle trace`.
#[derive(Debug)]
pub struct Span {
    pod_uid: String,
    hop: &'static str,
    start: i64,
    began: std::time::Instant,
}

impl Span {
    /// Begins a hop.
    pub fn begin(pod_uid: &str, hop: &'static str) -> Self {
        Self { pod_uid: pod_uid.to_owned(), hop, start: host::now() / 1000, began: std::time::Instant::now() }
    }

    /// Ends it and tells of it.
    pub fn end(self) {
        let duration_us = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let start_us = u64::try_from(self.start).unwrap_or(0);
        tracing::info!(target: "coracle::span", pod_uid = %self.pod_uid, hop = self.hop, start_us, duration_us);
    }
}

/// The pod's UID in a sandbox config.
pub fn pod_uid(config: &protocols::cri::v1::PodSandboxConfig) -> &str {
    config.metadata.as_ref().map_or("", |metadata| metadata.uid.as_str())
}

/// How long a process that was sent SIGKILL may take to end.
pub const KILL_WAIT: Duration = Duration::from_secs(120);
