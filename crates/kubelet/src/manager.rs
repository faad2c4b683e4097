//! The set of workers: pods of this node from the API, wake-ups from the runtime, and what the runtime holds of pods
//! that the API does not know any more.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use client::{Delta, Informer};
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::admission;
use crate::apply::blocking;
use crate::cgroups;
use crate::eviction::Eviction;
use crate::kill;
use crate::kubelet::Kubelet;
use crate::model::{self, PodRuntime, labels};
use crate::pleg::{self, Signal};
use crate::runtime;
use crate::status::Verdict;
use crate::status_writer::{self, Wanted};
use crate::volume;
use crate::worker::{self, Desired, Worker};

/// How often the whole runtime is listed when it sends events, and when it does not.
const RELIST_WITH_EVENTS: Duration = Duration::from_secs(30);
const RELIST: Duration = Duration::from_secs(1);
/// How often directories of pods that are gone are looked for.
const HOUSEKEEPING: Duration = Duration::from_secs(60);
/// How long workers and status writers may take to end.
const DRAIN: Duration = Duration::from_secs(5);

struct Handle {
    desired: watch::Sender<Desired>,
    wake: Arc<Notify>,
}

/// The manager.
pub struct Manager {
    kubelet: Arc<Kubelet>,
    pods: Informer<Pod>,
    evictions: mpsc::Receiver<Eviction>,
    changed: Arc<Notify>,
    /// The last state of pods that have gone from the API since the last look, by UID: it tells the grace period.
    gone: Arc<Mutex<HashMap<String, Arc<Pod>>>>,
    handles: HashMap<String, Handle>,
    workers: JoinSet<String>,
    writers: JoinSet<()>,
    orphans: JoinSet<String>,
    orphaned: HashSet<String>,
    /// Last seen state of the runtime by pod: what a relist compares.
    seen: HashMap<String, u64>,
}

impl Manager {
    /// Over an informer of this node's pods, which the caller runs; pods that are to be evicted come through `evictions`.
    pub fn new(kubelet: Arc<Kubelet>, pods: Informer<Pod>, evictions: mpsc::Receiver<Eviction>) -> Self {
        let changed = Arc::new(Notify::new());
        let wake = changed.clone();
        let gone: Arc<Mutex<HashMap<String, Arc<Pod>>>> = Arc::default();
        let last = gone.clone();
        pods.on_change(move |delta| {
            if let Delta::Deleted(pod) = delta {
                last.lock().unwrap_or_else(PoisonError::into_inner).insert(model::uid(pod).to_owned(), pod.clone());
            }
            wake.notify_one();
        });
        Self {
            kubelet,
            pods,
            evictions,
            changed,
            gone,
            handles: HashMap::new(),
            workers: JoinSet::new(),
            writers: JoinSet::new(),
            orphans: JoinSet::new(),
            orphaned: HashSet::new(),
            seen: HashMap::new(),
        }
    }

    /// Runs until cancelled. Pods go on running.
    pub async fn run(mut self, cancel: CancellationToken) {
        if !self.pods.wait_synced(&cancel).await {
            return;
        }
        self.reconcile(&cancel).await;
        let (mut signals, feed) = pleg::stream(self.kubelet.runtime.clone(), cancel.child_token());
        self.writers.spawn(feed);
        let mut period = RELIST;
        let mut next_relist = tokio::time::Instant::now();
        let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
        loop {
            tokio::select! {
                () = cancel.cancelled() => break,
                () = self.changed.notified() => self.reconcile(&cancel).await,
                Some(signal) = signals.recv() => match signal {
                    Signal::Up => period = RELIST_WITH_EVENTS,
                    Signal::Down => {
                        period = RELIST;
                        next_relist = tokio::time::Instant::now();
                    }
                    Signal::Pod(uid) => self.wake(uid.as_deref()),
                },
                () = tokio::time::sleep_until(next_relist) => {
                    self.relist(&cancel).await;
                    next_relist = tokio::time::Instant::now() + period;
                }
                Some((uid, verdict)) = self.evictions.recv() => {
                    if let Some(handle) = self.handles.get(&uid) {
                        handle.desired.send_modify(|desired| desired.evicted = Some(verdict));
                    }
                }
                _ = housekeeping.tick() => self.housekeeping().await,
                Some(done) = self.workers.join_next() => {
                    if let Ok(uid) = done {
                        self.handles.remove(&uid);
                    }
                }
                Some(done) = self.orphans.join_next() => {
                    if let Ok(uid) = done {
                        self.orphaned.remove(&uid);
                    }
                }
                Some(_) = self.writers.join_next() => {}
            }
        }
        self.drain().await;
    }

    async fn drain(mut self) {
        self.handles.clear();
        let ended = async {
            while self.workers.join_next().await.is_some() {}
            while self.writers.join_next().await.is_some() {}
        };
        if tokio::time::timeout(DRAIN, ended).await.is_err() {
            tracing::warn!("pod workers did not end in time");
        }
    }

    /// Brings the set of workers in line with the API's pods.
    async fn reconcile(&mut self, cancel: &CancellationToken) {
        let pods: BTreeMap<String, Arc<Pod>> = self.pods.list().into_iter().map(|pod| (model::uid(&pod).to_owned(), pod)).collect();
        let mut gone = std::mem::take(&mut *self.gone.lock().unwrap_or_else(PoisonError::into_inner));
        for (uid, handle) in &self.handles {
            match pods.get(uid) {
                Some(pod) => {
                    handle.desired.send_if_modified(|desired| {
                        let old = std::mem::replace(&mut desired.pod, pod.clone());
                        wants_more(&old, pod)
                    });
                }
                None => {
                    let last = gone.remove(uid);
                    handle.desired.send_if_modified(|desired| {
                        let told = last.is_some();
                        desired.pod = last.unwrap_or_else(|| desired.pod.clone());
                        !std::mem::replace(&mut desired.removed, true) || told
                    });
                }
            }
        }
        let mut fresh: Vec<&Arc<Pod>> =
            pods.iter().filter(|(uid, _)| !self.handles.contains_key(*uid) && !uid.is_empty()).map(|(_, pod)| pod).collect();
        fresh.sort_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|t| t.0));
        for pod in fresh {
            let rejected = self.admit(pod, &pods).await;
            self.start(pod.clone(), rejected, cancel);
        }
    }

    fn start(&mut self, pod: Arc<Pod>, rejected: Option<Verdict>, cancel: &CancellationToken) {
        let uid = model::uid(&pod).to_owned();
        let (desired, desired_rx) = watch::channel(Desired { pod, removed: false, evicted: None });
        let (statuses, statuses_rx) = watch::channel(Wanted::default());
        let wake = Arc::new(Notify::new());
        let worker = Worker::new(self.kubelet.clone(), desired_rx, wake.clone(), statuses, rejected);
        self.writers.spawn(status_writer::run(self.kubelet.client.clone(), statuses_rx));
        let token = cancel.child_token();
        let id = uid.clone();
        self.workers.spawn(async move {
            worker.run(token).await;
            id
        });
        self.handles.insert(uid, Handle { desired, wake });
    }

    /// The admission's verdict on a pod that was not started yet.
    async fn admit(&self, pod: &Arc<Pod>, all: &BTreeMap<String, Arc<Pod>>) -> Option<Verdict> {
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
        let started = pod.status.as_ref().is_some_and(|s| s.start_time.is_some());
        let leaving = pod.metadata.deletion_timestamp.is_some();
        if started || leaving || model::is_terminal_phase(phase) {
            return None;
        }
        let node = self.kubelet.node.list().into_iter().next()?;
        let others: Vec<Arc<Pod>> = all
            .values()
            .filter(|p| self.handles.contains_key(model::uid(p)) && model::uid(p) != model::uid(pod))
            .filter(|p| {
                let phase = p.status.as_ref().and_then(|s| s.phase.as_deref());
                !model::is_terminal_phase(phase)
            })
            .cloned()
            .collect();
        let verdict = admission::admit(pod, &node, &others, &self.kubelet.live().pressures).err()?;
        let target = crate::events::Target::pod(pod);
        self.kubelet.recorder.warning(&target, &verdict.reason, &verdict.message);
        Some(verdict)
    }

    /// Wakes the pod's worker, or all when it is not told whose event it was.
    fn wake(&self, uid: Option<&str>) {
        match uid {
            Some(uid) => {
                if let Some(handle) = self.handles.get(uid) {
                    handle.wake.notify_one();
                }
            }
            None => {
                for handle in self.handles.values() {
                    handle.wake.notify_one();
                }
            }
        }
    }

    /// Lists the runtime, wakes the workers of pods that changed, and ends pods that the API does not know.
    async fn relist(&mut self, cancel: &CancellationToken) {
        let runtime = &self.kubelet.runtime;
        let listed = tokio::try_join!(runtime.list_sandboxes(None), runtime.list_containers(None));
        let (sandboxes, containers) = match listed {
            Ok(listed) => listed,
            Err(error) => {
                tracing::warn!(%error, cause = runtime::message(&error), "failed to list the runtime's pods");
                return;
            }
        };
        let mut seen: HashMap<String, u64> = HashMap::new();
        let mut note = |labels_map: &HashMap<String, String>, id: &str, state: i32| {
            let Some(uid) = labels_map.get(labels::POD_UID) else {
                return;
            };
            use std::hash::{DefaultHasher, Hash, Hasher};
            let mut hasher = DefaultHasher::new();
            (id, state).hash(&mut hasher);
            let entry = seen.entry(uid.clone()).or_default();
            *entry = entry.wrapping_add(hasher.finish());
        };
        for sandbox in &sandboxes {
            note(&sandbox.labels, &sandbox.id, sandbox.state);
        }
        for container in &containers {
            note(&container.labels, &container.id, container.state);
        }
        for (uid, handle) in &self.handles {
            if seen.get(uid) != self.seen.get(uid) {
                handle.wake.notify_one();
            }
        }
        let known: HashSet<String> = self.pods.list().iter().map(|p| model::uid(p).to_owned()).collect();
        let orphans = seen.keys().filter(|uid| !self.handles.contains_key(*uid) && !known.contains(*uid));
        for uid in orphans {
            if self.orphaned.insert(uid.clone()) {
                let (kubelet, uid, token) = (self.kubelet.clone(), uid.clone(), cancel.child_token());
                self.orphans.spawn(async move {
                    tokio::select! {
                        () = token.cancelled() => {}
                        () = end_orphan(&kubelet, &uid) => {}
                    }
                    uid
                });
            }
        }
        self.seen = seen;
    }

    /// Removes directories of pods that neither the API nor the runtime knows.
    async fn housekeeping(&self) {
        let root = self.kubelet.config.root_dir.clone();
        let mut kept: HashSet<String> = self.handles.keys().cloned().collect();
        kept.extend(self.pods.list().iter().map(|p| model::uid(p).to_owned()));
        kept.extend(self.seen.keys().cloned());
        kept.extend(self.orphaned.iter().cloned());
        let Ok(sandboxes) = self.kubelet.runtime.list_sandboxes(None).await else {
            return;
        };
        kept.extend(sandboxes.iter().filter_map(|s| s.labels.get(labels::POD_UID).cloned()));
        let logs = self.kubelet.config.pod_logs_dir.clone();
        let cgroup_root = self.kubelet.facts.cgroup_root.clone();
        let done = blocking(move || {
            remove_logs(&logs, &kept);
            cgroups::remove_unknown(&cgroup_root, &kept).map_err(|e| e.to_string())?;
            let Ok(entries) = std::fs::read_dir(root.join("pods")) else {
                return Ok(());
            };
            let names = entries.filter_map(|e| e.ok()?.file_name().into_string().ok());
            for uid in names.filter(|uid| !kept.contains(uid)) {
                volume::tear_down(&root, &uid)?;
            }
            Ok(())
        });
        if let Err(error) = done.await {
            tracing::warn!(error, "failed to remove directories of pods that are gone");
        }
    }
}

/// True when something that a worker acts on differs. The worker's own status writes come back through the watch:
/// they change nothing of what is wanted. Conditions of others (readiness gates) do.
fn wants_more(old: &Pod, new: &Pod) -> bool {
    let foreign = |pod: &Pod| -> Vec<(String, String)> {
        let conditions = pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
        conditions
            .filter(|c| !crate::status::OWNED_CONDITIONS.contains(&c.type_.as_str()))
            .map(|c| (c.type_.clone(), c.status.clone()))
            .collect()
    };
    let meta = |pod: &Pod| {
        let m = &pod.metadata;
        (m.generation, m.deletion_timestamp.clone(), m.deletion_grace_period_seconds, m.labels.clone(), m.annotations.clone())
    };
    let phase = |pod: &Pod| {
        let phase = pod.status.as_ref().and_then(|s| s.phase.clone());
        model::is_terminal_phase(phase.as_deref())
    };
    meta(old) != meta(new) || old.spec != new.spec || foreign(old) != foreign(new) || phase(old) != phase(new)
}

/// Removes log directories (`NS_NAME_UID`) of pods that are gone.
fn remove_logs(root: &std::path::Path, kept: &HashSet<String>) {
    let Ok(entries) = std::fs::read_dir(root) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let parts: Vec<&str> = name.split('_').collect();
        if let [_, _, uid] = parts.as_slice()
            && !kept.contains(*uid)
            && let Err(error) = linux::tree::remove(&entry.path())
        {
            tracing::warn!(directory = name, %error, "failed to remove the logs of a pod that is gone");
        }
    }
}

/// Ends a pod that the API does not know: its containers get the grace period that they were made with.
async fn end_orphan(kubelet: &Kubelet, uid: &str) {
    let seen = match kubelet.runtime.observe(uid).await {
        Ok(seen) => seen,
        Err(error) => {
            tracing::warn!(pod_uid = uid, %error, "failed to observe an orphaned pod");
            return;
        }
    };
    tracing::info!(pod_uid = uid, "ending a pod that the server does not know");
    let result = stop_orphan(kubelet, uid, &seen).await;
    if let Err(error) = result {
        tracing::warn!(pod_uid = uid, error, "failed to end an orphaned pod");
    }
}

async fn stop_orphan(kubelet: &Kubelet, uid: &str, seen: &PodRuntime) -> Result<(), String> {
    let mut pod = Pod::default();
    pod.metadata.uid = Some(uid.to_owned());
    let grace = orphan_grace(kubelet, seen).await;
    let context = kill::Context { runtime: &kubelet.runtime, recorder: &kubelet.recorder, pod: &pod, pod_ip: "" };
    kill::stop_pod(&context, seen, Some(grace)).await.map_err(|e| runtime::go_error(&e))?;
    worker::remove_all(kubelet, seen).await?;
    let root = kubelet.config.root_dir.clone();
    let uid = uid.to_owned();
    blocking(move || volume::tear_down(&root, &uid)).await
}

async fn orphan_grace(kubelet: &Kubelet, seen: &PodRuntime) -> i64 {
    const DEFAULT_SECONDS: i64 = 30;
    let Some(container) = seen.running().next() else {
        return DEFAULT_SECONDS;
    };
    let status = kubelet.runtime.container_status(&container.id).await.ok();
    status.and_then(|s| s.annotations.get(labels::GRACE_PERIOD)?.parse().ok()).unwrap_or(DEFAULT_SECONDS)
}
