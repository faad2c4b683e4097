//! The effects: informers feed the cache and the queue, decisions become bindings, events and conditions.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use client::{Delta, EventRecorder, EventType, Informer, ObjectKey};
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cache::{Cache, PodInfo};
use crate::plan::{Decision, decide};
use crate::queue::Queue;

/// Bindings under way at once, at most.
const BINDS_MAX: usize = 32;
/// How long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// What the informers write and the loop reads.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    cache: Cache,
    queue: Queue,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Scheduler {
    client: Client,
    recorder: EventRecorder,
    shared: Arc<Shared>,
    pods: Informer<Pod>,
}

/// Schedules until `cancel`.
pub async fn schedule(client: Client, scheduler_name: String, recorder: EventRecorder, cancel: CancellationToken) {
    let shared = Arc::new(Shared::default());
    let mut informers = JoinSet::new();
    let pods = watch_pods(&shared, scheduler_name);
    watch_cluster(&client, &shared, &mut informers, &cancel);
    // Pods that have ended take nothing of a node (upstream: `NewInformerFactory`).
    let living = watcher::Config::default().fields("status.phase!=Succeeded,status.phase!=Failed");
    informers.spawn(pods.clone().run(Api::all(client.clone()), living, cancel.clone()));
    let scheduler = Arc::new(Scheduler { client, recorder, shared, pods });
    if scheduler.pods.wait_synced(&cancel).await {
        scheduler.run(&cancel).await;
    }
    while informers.join_next().await.is_some() {}
}

fn watch_pods(shared: &Arc<Shared>, scheduler_name: String) -> Informer<Pod> {
    let (informer, shared) = (Informer::<Pod>::new(), shared.clone());
    informer.on_change(move |delta| {
        let mut guard = shared.state();
        let state = &mut *guard;
        let pod = delta.object();
        let key = ObjectKey::of(pod.as_ref());
        if matches!(delta, Delta::Deleted(_)) || has_ended(pod) {
            let freed = state.cache.place_of(&key).is_some();
            state.cache.remove_pod(&key);
            state.queue.remove(&key);
            if freed {
                state.queue.cluster_changed();
            }
        } else if let Some(node) = node_of(pod) {
            state.cache.set_pod(node, pod.clone());
            state.queue.remove(&key);
        } else if is_ours(pod, &scheduler_name) {
            if delta.before().is_some_and(|old| old.spec != pod.spec) {
                state.queue.remove(&key);
            }
            state.queue.add(key, pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0));
        }
        shared.changed.notify_one();
    });
    informer
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|name| !name.is_empty())
}

fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn is_ours(pod: &Pod, scheduler_name: &str) -> bool {
    let Some(spec) = &pod.spec else { return false };
    spec.scheduler_name.as_deref().unwrap_or("default-scheduler") == scheduler_name
        && spec.scheduling_gates.as_ref().is_none_or(Vec::is_empty)
        && pod.metadata.deletion_timestamp.is_none()
}

fn watch_cluster(client: &Client, shared: &Arc<Shared>, informers: &mut JoinSet<()>, cancel: &CancellationToken) {
    let nodes = Informer::<Node>::new();
    let own = shared.clone();
    nodes.on_change(move |delta| {
        let mut state = own.state();
        match delta {
            Delta::Deleted(node) => state.cache.remove_node(node.metadata.name.as_deref().unwrap_or_default()),
            Delta::Added(node) | Delta::Updated { new: node, .. } => state.cache.set_node(node.clone()),
        }
        if delta.before().is_none_or(|old| makes_room(old, delta.object())) {
            state.queue.cluster_changed();
        }
        own.changed.notify_one();
    });
    informers.spawn(nodes.run(Api::all(client.clone()), watcher::Config::default(), cancel.clone()));

    let namespaces = Informer::<Namespace>::new();
    let own = shared.clone();
    namespaces.on_change(move |delta| {
        let name = delta.object().metadata.name.clone().unwrap_or_default();
        let mut state = own.state();
        match delta {
            Delta::Deleted(_) => drop(state.cache.namespaces.remove(&name)),
            _ => drop(state.cache.namespaces.insert(name, delta.object().metadata.labels.clone().unwrap_or_default())),
        }
    });
    informers.spawn(namespaces.run(Api::all(client.clone()), watcher::Config::default(), cancel.clone()));

    let services = Informer::<Service>::new();
    watch_selectors(&services, shared, "Service", |service| {
        let labels = service.spec.as_ref()?.selector.clone().filter(|labels| !labels.is_empty())?;
        Some(LabelSelector { match_labels: Some(labels), match_expressions: None })
    });
    informers.spawn(services.run(Api::all(client.clone()), watcher::Config::default(), cancel.clone()));

    let sets = Informer::<ReplicaSet>::new();
    watch_selectors(&sets, shared, "ReplicaSet", |set| Some(set.spec.selector.clone()));
    informers.spawn(sets.run(Api::all(client.clone()), watcher::Config::default(), cancel.clone()));
}

/// Whether a node can take more than before. Heartbeats cannot.
fn makes_room(old: &Node, new: &Node) -> bool {
    let allocatable = |node: &Node| node.status.as_ref().and_then(|status| status.allocatable.clone());
    old.metadata.labels != new.metadata.labels || old.spec != new.spec || allocatable(old) != allocatable(new)
}

fn watch_selectors<K>(
    informer: &Informer<K>,
    shared: &Arc<Shared>,
    kind: &'static str,
    selector: impl Fn(&K) -> Option<LabelSelector> + Send + Sync + 'static,
) where
    K: kube::Resource + 'static,
{
    let shared = shared.clone();
    informer.on_change(move |delta| {
        let key = (kind, ObjectKey::of(delta.object().as_ref()));
        let mut state = shared.state();
        match (delta, selector(delta.object())) {
            (Delta::Added(_) | Delta::Updated { .. }, Some(selector)) => drop(state.cache.selectors.insert(key, selector)),
            _ => drop(state.cache.selectors.remove(&key)),
        }
    });
}

/// A decision, with what is needed to carry it out.
struct Task {
    key: ObjectKey,
    pod: Arc<Pod>,
    decision: Decision,
    start_us: u64,
}

impl Scheduler {
    async fn run(self: &Arc<Self>, cancel: &CancellationToken) {
        let mut tasks = JoinSet::new();
        let mut tie = 0;
        while !cancel.is_cancelled() {
            while tasks.try_join_next().is_some() {}
            if tasks.len() >= BINDS_MAX {
                tasks.join_next().await;
                continue;
            }
            tie += 1;
            if let Some(task) = self.next(tie) {
                let scheduler = self.clone();
                tasks.spawn(async move { scheduler.carry_out(task).await });
                continue;
            }
            let wake = self.shared.state().queue.next_wake().unwrap_or_else(|| Instant::now() + REQUEST_TIMEOUT);
            tokio::select! {
                () = self.shared.changed.notified() => {}
                () = tokio::time::sleep_until(wake.into()) => {}
                () = cancel.cancelled() => {}
            }
        }
        while tasks.join_next().await.is_some() {}
    }

    /// Takes the next pod and decides; a node that is chosen is assumed to have the pod from now on.
    fn next(&self, tie: usize) -> Option<Task> {
        let start_us = now_us();
        let mut guard = self.shared.state();
        let state = &mut *guard;
        let key = state.queue.pop(Instant::now())?;
        let Some(pod) = self.pods.get(&key).filter(|pod| node_of(pod).is_none()) else {
            state.queue.remove(&key);
            return None;
        };
        let decision = decide(&PodInfo::new(pod.clone()), &state.cache, tie);
        match &decision {
            Decision::Bind(node) => state.cache.set_pod(node, pod.clone()),
            Decision::Unschedulable(_) => state.queue.failed(&key, false, Instant::now()),
        }
        Some(Task { key, pod, decision, start_us })
    }

    async fn carry_out(&self, task: Task) {
        match &task.decision {
            Decision::Bind(node) => {
                let result = self.bind(&task, node).await;
                let uid = task.pod.metadata.uid.as_deref().unwrap_or_default();
                tracing::info!(target: "coracle::span", pod_uid = %uid, hop = "scheduler.bind", start_us = task.start_us, duration_us = now_us() - task.start_us);
                match result {
                    Ok(()) => {
                        let text = format!("Successfully assigned {} to {node}", task.key);
                        self.recorder.about(task.pod.as_ref(), EventType::Normal, "Scheduled", text);
                    }
                    Err(why) => self.bind_failed(&task, &why),
                }
            }
            Decision::Unschedulable(why) => {
                self.recorder.about(task.pod.as_ref(), EventType::Warning, "FailedScheduling", why.clone());
                self.set_unschedulable(&task, why).await;
            }
        }
    }

    async fn bind(&self, task: &Task, node: &str) -> Result<(), String> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &task.key.namespace);
        let binding = json!({
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": { "name": task.key.name, "namespace": task.key.namespace, "uid": task.pod.metadata.uid },
            "target": { "apiVersion": "v1", "kind": "Node", "name": node },
        });
        let params = PostParams::default();
        let request = api.create_subresource::<Value, Value>("binding", &task.key.name, &params, &binding);
        match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs())),
        }
    }

    /// The pod is not on the node after all, unless the informer has seen it there.
    fn bind_failed(&self, task: &Task, why: &str) {
        tracing::warn!(pod = %task.key, "failed to bind: {why}");
        let mut state = self.shared.state();
        match self.pods.get(&task.key) {
            Some(pod) if node_of(&pod).is_some() => return,
            Some(_) => {
                state.cache.remove_pod(&task.key);
                state.queue.failed(&task.key, true, Instant::now());
            }
            None => {
                state.cache.remove_pod(&task.key);
                state.queue.remove(&task.key);
            }
        }
        drop(state);
        self.recorder.about(task.pod.as_ref(), EventType::Warning, "FailedScheduling", format!("binding rejected: {why}"));
        self.shared.changed.notify_one();
    }

    /// Writes the condition PodScheduled=False, unless it says so already.
    async fn set_unschedulable(&self, task: &Task, why: &str) {
        let conditions = task.pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        let told = conditions
            .into_iter()
            .flatten()
            .any(|condition| condition.type_ == "PodScheduled" && condition.status == "False" && condition.message.as_deref() == Some(why));
        if told {
            return;
        }
        let now = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap_or_default();
        let patch = json!({ "metadata": { "uid": task.pod.metadata.uid }, "status": { "conditions": [
            { "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why, "lastTransitionTime": now.to_string() }] } });
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &task.key.namespace);
        let (params, patch) = (PatchParams::default(), Patch::Strategic(patch));
        let request = api.patch_status(&task.key.name, &params, &patch);
        match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
            Ok(Ok(_)) => {}
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => {}
            Ok(Err(error)) => tracing::warn!(pod = %task.key, "failed to write the condition PodScheduled: {error}"),
            Err(_) => tracing::warn!(pod = %task.key, "failed to write the condition PodScheduled: no answer"),
        }
    }
}

/// Unix time in microseconds.
fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_names_its_scheduler() {
        let pod = |spec: serde_json::Value| -> Pod { serde_json::from_value(serde_json::json!({ "spec": spec })).unwrap() };
        let plain = serde_json::json!({ "containers": [] });
        assert!(is_ours(&pod(plain.clone()), "default-scheduler"));
        let mut other = plain;
        other["schedulerName"] = serde_json::json!("mine");
        assert!(!is_ours(&pod(other.clone()), "default-scheduler"));
        assert!(is_ours(&pod(other), "mine"));
    }
}
