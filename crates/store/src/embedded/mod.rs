//! The embedded engine: one directory, one writer thread, everything in memory, an append-only log on disk.
//!
//! Why a log of our own and not a B-tree file: the whole state is in memory anyway (reads and watches come from there),
//! so the disk only has to make a batch of writes durable and replay it. That is one sequential write and one fdatasync
//! per group commit, and a torn tail is the only thing that a crash can leave.
//!
//! **Invariant**: only the writer thread changes the state, so a transaction needs no locks but the short one that
//! readers share.

mod crc;
mod disk;
#[cfg(test)]
mod fuzz;
mod lease;
mod log;
mod record;
mod snapshot;
mod state;
#[cfg(test)]
mod tape;
mod txn;
mod watch;
mod writer;

use std::fs::{File, Permissions, TryLockError};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::future::{BoxFuture, FutureExt};
use futures::stream::StreamExt;
use tokio::sync::{Semaphore, oneshot};

pub(crate) use self::lease::TTL_SECONDS_MAX;
use self::log::Log;
pub use self::snapshot::{SnapshotStatus, snapshot_restore, snapshot_save, snapshot_status};
use self::state::State;
pub(crate) use self::txn::check as check_txn;
use self::watch::Signal;
use self::writer::{Command, QUEUE_MAX, Reply, Writer};
use crate::{Error, LeaseInfo, RangeRequest, RangeResponse, Store, Txn, TxnResponse, WatchRequest, WatchStream};

/// How the engine behaves; the defaults are those of an etcd behind a kube-apiserver.
#[derive(Debug, Clone)]
pub struct Options {
    /// The largest transaction, in bytes of keys and values (etcd's `--max-request-bytes`, 1.5 MiB).
    pub request_bytes_max: usize,
    /// Every so often the history older than that is compacted, as kube-apiserver does with its
    /// `--etcd-compaction-interval` (5 minutes); `None`: only [`Store::compact`] does.
    pub compaction_interval: Option<Duration>,
    /// After a compaction the log is rewritten if it is larger than this and than twice what is live.
    pub rewrite_bytes_min: u64,
    /// How often an idle watcher that asked for it is told the present revision.
    pub progress_interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            request_bytes_max: 3 << 19,
            compaction_interval: Some(Duration::from_secs(300)),
            rewrite_bytes_min: 4 << 20,
            progress_interval: Duration::from_secs(5),
        }
    }
}

/// What the handles, the watchers and the writer share.
#[derive(Debug)]
struct Shared {
    state: RwLock<State>,
    signal: tokio::sync::watch::Sender<Signal>,
    options: Options,
    /// fdatasync calls of group commits since the start, for tests and metrics.
    syncs: AtomicU64,
}

impl Shared {
    // A panic of the writer closes the store before anyone can read half a change: readers stop at `visible`.
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The embedded engine. Dropping it (or [`Embedded::close`]) finishes what is queued and releases the directory.
#[derive(Debug)]
pub struct Embedded {
    shared: Arc<Shared>,
    commands: Option<mpsc::SyncSender<Command>>,
    permits: Arc<Semaphore>,
    writer: Mutex<Option<JoinHandle<()>>>,
    next_lease: AtomicU64,
}

/// The file whose lock says that a store is open.
const LOCK_FILE: &str = "LOCK";

/// Makes a directory, and its name durable: what is synced in it is of no use where that is lost.
fn make_directory(dir: &Path) -> Result<(), Error> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_directory(parent)?;
    match std::fs::create_dir(dir) {
        Err(source) if source.kind() != std::io::ErrorKind::AlreadyExists => Err(Error::io("create directory", dir, source)),
        _ => disk::sync_dir(parent).map_err(|source| Error::io("sync", parent, source)),
    }
}

fn lock(dir: &Path) -> Result<File, Error> {
    make_directory(dir)?;
    // Whoever reads it reads every Secret.
    std::fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(|source| Error::io("set the mode of", dir, source))?;
    let path = dir.join(LOCK_FILE);
    let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(|source| Error::io("open", &path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { path: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(Error::io("lock", &path, source)),
    }
}

impl Embedded {
    /// Opens the store in `dir`, makes it where there is none, and replays its log. Blocks; the cost is that of
    /// reading the log.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::Corrupt`], [`Error::Version`], [`Error::Io`].
    pub fn open(dir: impl Into<PathBuf>, options: Options) -> Result<Self, Error> {
        let dir = dir.into();
        let lock = lock(&dir)?;
        let mut state = State::default();
        let log = Log::open(&dir, |record| state.apply(&record))?;
        state.recovered();
        let expired = state.leases.tick(Instant::now());
        debug_assert!(expired.is_empty(), "a lease gets its whole time at start-up");
        let visible = state.visible;
        let shared = Arc::new(Shared {
            state: RwLock::new(state),
            signal: tokio::sync::watch::Sender::new(Signal { visible, closed: false }),
            options,
            syncs: AtomicU64::new(0),
        });
        let permits = Arc::new(Semaphore::new(QUEUE_MAX));
        let (commands, queue) = mpsc::sync_channel(QUEUE_MAX + 1);
        let path = dir.clone();
        let writer = Writer::new(dir, lock, log, shared.clone(), queue);
        let handle = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run())
            .map_err(|source| Error::io("start a thread for", &path, source))?;
        Ok(Self { shared, commands: Some(commands), permits, writer: Mutex::new(Some(handle)), next_lease: AtomicU64::new(seed()) })
    }

    /// Finishes what is queued, ends all watches and releases the directory.
    pub async fn close(mut self) {
        self.commands = None;
        let handle = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(handle) = handle {
            // The thread ends once the queue is empty; a panic in it has been reported by the panic hook.
            let _ = tokio::task::spawn_blocking(move || handle.join()).await;
        }
    }

    /// fdatasync calls of group commits since the start.
    pub fn syncs(&self) -> u64 {
        self.shared.syncs.load(Ordering::Relaxed)
    }

    async fn send<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Error> {
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| Error::Closed)?;
        let (sender, receiver) = oneshot::channel();
        let commands = self.commands.as_ref().ok_or(Error::Closed)?;
        // There are as many permits as places, so this never blocks.
        commands.send(command(Reply { sender, _permit: permit })).map_err(|_| Error::Closed)?;
        receiver.await.map_err(|_| Error::Closed)?
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.commands = None;
        let handle = self.writer.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(handle) = handle {
            // The thread ends once the queue is empty; a panic in it has been reported by the panic hook.
            let _ = handle.join();
        }
    }
}

/// Where lease ids start: different at each start, so that ids of an earlier run do not come again.
fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id()) >> 2
}

impl Store for Embedded {
    fn range(&self, request: RangeRequest) -> BoxFuture<'_, Result<RangeResponse, Error>> {
        let state = self.shared.read();
        let answer = state.range(&request, state.visible);
        futures::future::ready(answer).boxed()
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnResponse, Error>> {
        async move {
            check_txn(&txn, self.shared.options.request_bytes_max)?;
            self.send(|reply| Command::Txn(txn, reply)).await
        }
        .boxed()
    }

    fn watch(&self, request: WatchRequest) -> BoxFuture<'_, Result<WatchStream, Error>> {
        let answer = if request.key.is_empty() { Err(Error::EmptyKey) } else { Ok(watch::stream(self.shared.clone(), request).boxed()) };
        futures::future::ready(answer).boxed()
    }

    fn compact(&self, revision: i64) -> BoxFuture<'_, Result<(), Error>> {
        self.send(move |reply| Command::Compact(revision, reply)).boxed()
    }

    fn lease_grant(&self, id: i64, ttl_seconds: i64) -> BoxFuture<'_, Result<LeaseInfo, Error>> {
        async move {
            if !(1..=TTL_SECONDS_MAX).contains(&ttl_seconds) {
                return Err(Error::LeaseTtl { ttl_seconds });
            }
            let id = match id {
                0 => i64::try_from(self.next_lease.fetch_add(1, Ordering::Relaxed) & (i64::MAX as u64)).unwrap_or(1),
                id => id,
            };
            self.send(move |reply| Command::LeaseGrant { id, ttl_seconds, reply }).await
        }
        .boxed()
    }

    fn lease_revoke(&self, id: i64) -> BoxFuture<'_, Result<(), Error>> {
        self.send(move |reply| Command::LeaseRevoke { id, reply: Some(reply) }).boxed()
    }

    fn lease_keepalive(&self, id: i64) -> BoxFuture<'_, Result<LeaseInfo, Error>> {
        let answer = self.shared.write().leases.keepalive(id, Instant::now());
        futures::future::ready(answer).boxed()
    }

    fn lease_time_to_live(&self, id: i64) -> BoxFuture<'_, Result<LeaseInfo, Error>> {
        let answer = self.shared.read().leases.info(id, Instant::now());
        futures::future::ready(answer).boxed()
    }

    fn revision(&self) -> BoxFuture<'_, Result<i64, Error>> {
        futures::future::ready(Ok(self.shared.read().visible)).boxed()
    }
}
