//! Pods and containers in memory, and the one table that finds them.
//!
//! ```text
//! sandbox:    Creating --> Ready --> NotReady --> (removed)
//! container:  Created --> Starting --> Running --> Exited --> (removed)
//!                  \          \__________________^
//!                   \____________________________________> (removed)
//! ```

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use camino::Utf8PathBuf;
use protocols::cri::v1::{ContainerConfig, ContainerState as CriState, PodSandboxConfig};
use tokio::sync::{OwnedMutexGuard, watch};

use crate::error::{Error, Result};
use crate::handler::Handler;
use crate::oci::{Resources, User};
use crate::pump::Pump;
use crate::record::{ContainerPhase, ContainerRecord, Encoded, SandboxPhase, SandboxRecord, VERSION};
use crate::shim::{Shim, StartedShim};

/// The way to a sandbox' shim.
#[derive(Clone, Debug, Default)]
pub enum Link {
    /// Not started yet, or being connected to.
    #[default]
    Pending,
    /// Connected.
    Up(Arc<Shim>),
    /// Gone for good.
    Lost,
}

/// What changes of a sandbox.
#[derive(Clone, Debug)]
pub struct SandboxFacts {
    pub phase: SandboxPhase,
    pub ips: Vec<String>,
    /// A process in the pod's namespaces; 0 if there is none.
    pub pid: u32,
    pub shim: Option<StartedShim>,
}

/// A pod sandbox.
#[derive(Debug)]
pub struct Sandbox {
    pub id: String,
    pub name: String,
    pub config: PodSandboxConfig,
    pub runtime_handler: String,
    pub created_at: i64,
    /// Its directory below the state directory.
    pub dir: Utf8PathBuf,
    /// What serves it: that of `runtime_handler`.
    pub handler: Handler,
    /// Its network namespace's pin; none on the host's network.
    pub netns: Option<Utf8PathBuf>,
    pub link: watch::Sender<Link>,
    facts: Mutex<SandboxFacts>,
}

impl Sandbox {
    /// A sandbox with these changeable facts.
    pub fn new(record: &SandboxRecord, config: PodSandboxConfig, handler: Handler, dir: Utf8PathBuf) -> Self {
        Self {
            id: record.id.clone(),
            name: sandbox_name(&config),
            config,
            runtime_handler: record.runtime_handler.clone(),
            handler,
            created_at: record.created_at,
            dir,
            netns: record.netns.clone(),
            link: watch::Sender::new(Link::Pending),
            facts: Mutex::new(SandboxFacts { phase: record.phase, ips: record.ips.clone(), pid: record.pid, shim: record.shim.clone() }),
        }
    }

    /// A copy of what changes.
    pub fn facts(&self) -> SandboxFacts {
        lock(&self.facts).clone()
    }

    /// Changes it.
    pub fn change(&self, change: impl FnOnce(&mut SandboxFacts)) {
        change(&mut lock(&self.facts));
    }

    /// Whether containers can be started in it.
    pub fn is_ready(&self) -> bool {
        lock(&self.facts).phase == SandboxPhase::Ready
    }

    /// Whether it was stopped to the end: nothing runs in it, and its network is given back.
    pub fn is_released(&self) -> bool {
        let facts = lock(&self.facts);
        facts.phase == SandboxPhase::NotReady && facts.pid == 0
    }

    /// The shim, if it is connected.
    pub fn shim(&self) -> Option<Arc<Shim>> {
        match &*self.link.borrow() {
            Link::Up(shim) if !shim.is_closed() => Some(Arc::clone(shim)),
            _ => None,
        }
    }

    /// The shim's bundle. Shims take its name for its id.
    pub fn bundle(&self) -> Utf8PathBuf {
        self.dir.join(&self.id)
    }

    /// What is kept of it on disk.
    pub fn record(&self, boot_id: &str) -> SandboxRecord {
        let facts = self.facts();
        SandboxRecord {
            version: VERSION,
            boot_id: boot_id.to_owned(),
            id: self.id.clone(),
            phase: facts.phase,
            config: Encoded::of(&self.config),
            runtime_handler: self.runtime_handler.clone(),
            handler: self.handler.clone(),
            created_at: self.created_at,
            netns: self.netns.clone(),
            ips: facts.ips,
            pid: facts.pid,
            shim: facts.shim,
        }
    }
}

/// The states of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContainerState {
    /// Made, not started.
    Created,
    /// StartContainer is at work.
    Starting,
    /// Started at `started_at` (nanoseconds since 1970).
    Running { pid: u32, started_at: i64 },
    /// Ended.
    Exited(Ended),
}

/// How a container ended; times in nanoseconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    pub started_at: i64,
    pub finished_at: i64,
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `Unknown`.
    pub reason: String,
    pub message: String,
}

impl ContainerState {
    /// CRI's word.
    pub fn to_cri(&self) -> CriState {
        match self {
            Self::Created | Self::Starting => CriState::ContainerCreated,
            Self::Running { .. } => CriState::ContainerRunning,
            Self::Exited(_) => CriState::ContainerExited,
        }
    }

    pub fn phase(&self) -> ContainerPhase {
        match self.clone() {
            Self::Created => ContainerPhase::Created,
            Self::Starting => ContainerPhase::Starting,
            Self::Running { pid, started_at } => ContainerPhase::Running { pid, started_at },
            Self::Exited(Ended { started_at, finished_at, exit_code, reason, message }) => {
                ContainerPhase::Exited { started_at, finished_at, exit_code, reason, message }
            }
        }
    }

    /// The state of a record; none for one whose CreateContainer never answered.
    pub fn of(phase: &ContainerPhase) -> Option<Self> {
        Some(match phase.clone() {
            ContainerPhase::Creating => return None,
            ContainerPhase::Created => Self::Created,
            ContainerPhase::Starting => Self::Starting,
            ContainerPhase::Running { pid, started_at } => Self::Running { pid, started_at },
            ContainerPhase::Exited { started_at, finished_at, exit_code, reason, message } => {
                Self::Exited(Ended { started_at, finished_at, exit_code, reason, message })
            }
        })
    }
}

/// A container.
#[derive(Debug)]
pub struct Container {
    pub id: String,
    pub name: String,
    pub sandbox_id: String,
    pub config: ContainerConfig,
    pub image_id: String,
    pub log_path: String,
    pub created_at: i64,
    pub user: User,
    pub stop_signal: Option<u32>,
    pub cgroups_path: String,
    pub dir: Utf8PathBuf,
    pub state: watch::Sender<ContainerState>,
    /// The limits, and oom_score_adj.
    pub limits: Mutex<(Resources, Option<i64>)>,
    /// The stop signal was sent: it is not sent a second time.
    pub stop_signaled: AtomicBool,
    /// The kernel ended a process of it for want of memory.
    pub oom: AtomicBool,
    /// Copies its output, where the shim does not.
    pub pump: Mutex<Option<Arc<Pump>>>,
    /// It has ended, which could not be recorded yet: its shim still has its task.
    pub has_task: AtomicBool,
}

impl Container {
    /// A container of a record, in this state.
    pub fn new(
        record: &ContainerRecord,
        config: ContainerConfig,
        sandbox: &PodSandboxConfig,
        dir: Utf8PathBuf,
        state: ContainerState,
    ) -> Self {
        Self {
            id: record.id.clone(),
            name: container_name(&config, sandbox),
            sandbox_id: record.sandbox_id.clone(),
            config,
            image_id: record.image_id.clone(),
            log_path: record.log_path.clone(),
            created_at: record.created_at,
            user: record.user.clone(),
            stop_signal: record.stop_signal,
            cgroups_path: record.cgroups_path.clone(),
            dir,
            state: watch::Sender::new(state),
            limits: Mutex::new((record.resources.clone(), record.oom_score_adj)),
            stop_signaled: AtomicBool::new(false),
            oom: AtomicBool::new(false),
            pump: Mutex::default(),
            has_task: AtomicBool::new(false),
        }
    }

    /// Its state now.
    pub fn state(&self) -> ContainerState {
        self.state.borrow().clone()
    }

    /// Ends when the container has ended.
    pub async fn exited(&self) {
        // The sender is in `self`, so that the channel cannot close.
        let _ = self.state.subscribe().wait_for(|state| matches!(state, ContainerState::Exited(_))).await;
    }

    /// The OCI bundle. Shims take its name for its id.
    pub fn bundle(&self) -> Utf8PathBuf {
        self.dir.join(&self.id)
    }

    /// The limits, and oom_score_adj.
    pub fn limits(&self) -> (Resources, Option<i64>) {
        lock(&self.limits).clone()
    }

    /// What is kept of it on disk.
    pub fn record(&self, boot_id: &str) -> ContainerRecord {
        let (resources, oom_score_adj) = self.limits();
        ContainerRecord {
            version: VERSION,
            boot_id: boot_id.to_owned(),
            id: self.id.clone(),
            sandbox_id: self.sandbox_id.clone(),
            phase: self.state().phase(),
            config: Encoded::of(&self.config),
            image_id: self.image_id.clone(),
            log_path: self.log_path.clone(),
            created_at: self.created_at,
            user: self.user.clone(),
            resources,
            oom_score_adj,
            stop_signal: self.stop_signal,
            cgroups_path: self.cgroups_path.clone(),
        }
    }
}

/// The name that no two sandboxes have: NAME_NAMESPACE_UID_ATTEMPT, as containerd's.
pub fn sandbox_name(config: &PodSandboxConfig) -> String {
    let pod = config.metadata.clone().unwrap_or_default();
    format!("{}_{}_{}_{}", pod.name, pod.namespace, pod.uid, pod.attempt)
}

/// The name that no two containers have: CONTAINER_NAME_NAMESPACE_UID_ATTEMPT, as containerd's.
pub fn container_name(config: &ContainerConfig, sandbox: &PodSandboxConfig) -> String {
    let container = config.metadata.clone().unwrap_or_default();
    let pod = sandbox.metadata.clone().unwrap_or_default();
    format!("{}_{}_{}_{}_{}", container.name, pod.name, pod.namespace, pod.uid, container.attempt)
}

/// A mutex whose data is valid whatever a panicking thread did to it: all changes are single assignments.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All sandboxes and containers, and the names they have.
#[derive(Debug, Default)]
pub struct Registry {
    sandboxes: BTreeMap<String, Arc<Sandbox>>,
    containers: BTreeMap<String, Arc<Container>>,
    /// Name to id.
    names: HashMap<String, String>,
}

impl Registry {
    /// Takes a name for an id.
    ///
    /// # Errors
    /// [`Error::Reserved`] if another has it.
    pub fn reserve(&mut self, name: &str, id: &str) -> Result<()> {
        match self.names.get(name) {
            Some(owner) if owner != id => Err(Error::Reserved { name: name.to_owned(), id: owner.clone() }),
            _ => {
                self.names.insert(name.to_owned(), id.to_owned());
                Ok(())
            }
        }
    }

    /// Gives back the names of an id.
    pub fn release(&mut self, id: &str) {
        self.names.retain(|_, owner| owner != id);
    }

    /// Puts a sandbox in.
    pub fn add_sandbox(&mut self, sandbox: Arc<Sandbox>) {
        self.sandboxes.insert(sandbox.id.clone(), sandbox);
    }

    /// Puts a container in.
    pub fn add_container(&mut self, container: Arc<Container>) {
        self.containers.insert(container.id.clone(), container);
    }

    /// Takes a sandbox or a container out, with its name.
    pub fn remove(&mut self, id: &str) {
        self.sandboxes.remove(id);
        self.containers.remove(id);
        self.release(id);
    }

    /// The sandbox of this id, or of the only one that begins so.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Invalid`] for what is no id, or the beginning of several.
    pub fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>> {
        by_prefix(&self.sandboxes, "sandbox", id)
    }

    /// The container of this id, or of the only one that begins so.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Invalid`] for what is no id, or the beginning of several.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        by_prefix(&self.containers, "container", id)
    }

    /// All sandboxes.
    pub fn sandboxes(&self) -> Vec<Arc<Sandbox>> {
        self.sandboxes.values().cloned().collect()
    }

    /// All containers.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.containers.values().cloned().collect()
    }

    /// The containers of a sandbox.
    pub fn containers_of(&self, sandbox_id: &str) -> Vec<Arc<Container>> {
        self.containers.values().filter(|container| container.sandbox_id == sandbox_id).cloned().collect()
    }
}

fn by_prefix<T>(map: &BTreeMap<String, Arc<T>>, kind: &'static str, prefix: &str) -> Result<Arc<T>> {
    if prefix.is_empty() {
        return Err(Error::Invalid(format!("the {kind}'s id is empty")));
    }
    let mut matching = map.range(prefix.to_owned()..).take_while(|(id, _)| id.starts_with(prefix));
    match (matching.next(), matching.next()) {
        (None, _) => Err(Error::NotFound { kind, id: prefix.to_owned() }),
        (Some((id, first)), second) if id == prefix || second.is_none() => Ok(Arc::clone(first)),
        _ => Err(Error::Invalid(format!("{kind} id {prefix:?} is the beginning of several"))),
    }
}

/// One operation at a time on each key.
#[derive(Debug, Default)]
pub struct Locks(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Locks {
    /// Waits until nobody else works on the key.
    pub async fn acquire(&self, key: &str) -> OwnedMutexGuard<()> {
        let mutex = {
            let mut map = lock(&self.0);
            map.retain(|_, mutex| mutex.strong_count() > 0);
            match map.get(key).and_then(Weak::upgrade) {
                Some(mutex) => mutex,
                None => {
                    let mutex = Arc::new(tokio::sync::Mutex::new(()));
                    map.insert(key.to_owned(), Arc::downgrade(&mutex));
                    mutex
                }
            }
        };
        mutex.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_find_only_one() {
        let map: BTreeMap<String, Arc<u8>> =
            [("ab1", 1), ("ab2", 2), ("c", 3), ("cd", 4)].into_iter().map(|(id, value)| (id.to_owned(), Arc::new(value))).collect();
        for (prefix, expected) in [("ab1", 1), ("c", 3), ("cd", 4), ("ab2", 2)] {
            assert_eq!(by_prefix(&map, "pod", prefix).map(|value| *value).ok(), Some(expected), "{prefix:?}");
        }
        // What is not there may be taken for removed; what is no name of one thing may not.
        assert!(matches!(by_prefix(&map, "pod", "x"), Err(Error::NotFound { .. })));
        for prefix in ["", "ab"] {
            assert!(matches!(by_prefix(&map, "pod", prefix), Err(Error::Invalid(_))), "{prefix:?}");
        }
    }

    #[test]
    fn a_name_has_one_owner() {
        let mut registry = Registry::default();
        registry.reserve("n", "1").expect("free");
        registry.reserve("n", "1").expect("its own");
        assert!(matches!(registry.reserve("n", "2"), Err(Error::Reserved { .. })));
        registry.release("1");
        registry.reserve("n", "2").expect("free again");
    }

    #[tokio::test]
    async fn a_key_is_locked_by_one() {
        let locks = Locks::default();
        let held = locks.acquire("a").await;
        let _other = locks.acquire("b").await;
        assert!(tokio::time::timeout(std::time::Duration::from_millis(10), locks.acquire("a")).await.is_err());
        drop(held);
        let _again = locks.acquire("a").await;
    }
}
