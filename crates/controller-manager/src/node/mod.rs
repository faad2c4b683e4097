//! Node lifecycle: marks silent nodes Unknown, taints nodes by their conditions, marks their pods not ready.

mod eviction;
mod plan;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use client::{Delta, EventRecorder, EventType, Informer, ObjectKey, Requeue, WorkQueue, run_workers};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use tokio::time::Instant;

use self::plan::{Health, evicting, eviction_interval, has, observe, ready, silent, taints, zone, zones};
use crate::context::{BY_NODE, Context, Starting};
use crate::objects::{is_ready, wire_time};

pub(crate) use self::eviction::start as start_eviction;

const WORKERS: usize = 8;

/// What was noticed of the nodes so far.
#[derive(Debug, Default)]
struct Memory {
    health: HashMap<String, Health>,
    /// When a zone last got an evicting taint.
    evicted: HashMap<(String, String), Instant>,
    /// Nodes whose pods could not all be marked.
    unmarked: HashMap<String, ()>,
}

struct Controller {
    client: Client,
    recorder: EventRecorder,
    nodes: Informer<Node>,
    pods: Informer<Pod>,
    leases: Informer<Lease>,
    memory: Mutex<Memory>,
    grace: Duration,
    period: Duration,
}

/// Registers with the informers; the answer runs the controller.
pub(crate) fn start(context: Arc<Context>) -> Starting {
    let queue = WorkQueue::<ObjectKey>::default();
    let (add, registered) = (queue.clone(), Arc::new(Mutex::new(Vec::<(Arc<Node>, bool)>::new())));
    let told = registered.clone();
    context.informers.nodes.on_change(move |delta| {
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        match delta {
            Delta::Added(node) => told.push((node.clone(), true)),
            Delta::Deleted(node) => told.push((node.clone(), false)),
            Delta::Updated { .. } => {}
        }
        add.add(ObjectKey::of(&**delta.object()));
    });
    Box::pin(async move {
        let Some((client, recorder)) = context.identity("node-controller").await else { return };
        let informers = &context.informers;
        let controller = Arc::new(Controller {
            client,
            recorder,
            nodes: informers.nodes.clone(),
            pods: informers.pods.clone(),
            leases: informers.node_leases.clone(),
            memory: Mutex::default(),
            grace: context.config.node_monitor_grace_period,
            period: context.config.node_monitor_period,
        });
        run_workers("node", queue, WORKERS, context.cancel.clone(), move |key| {
            let (controller, registered) = (controller.clone(), registered.clone());
            async move {
                let news = std::mem::take(&mut *registered.lock().unwrap_or_else(PoisonError::into_inner));
                controller.tell(&news);
                controller.sync(&key).await
            }
        })
        .await;
    })
}

/// A reference by which events name a node: its name is its UID there, as kubelets have it.
fn reference(name: &str) -> ObjectReference {
    ObjectReference { kind: Some("Node".to_owned()), name: Some(name.to_owned()), uid: Some(name.to_owned()), ..ObjectReference::default() }
}

impl Controller {
    fn memory<T>(&self, use_it: impl FnOnce(&mut Memory) -> T) -> T {
        use_it(&mut self.memory.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn tell(&self, news: &[(Arc<Node>, bool)]) {
        for (node, came) in news {
            let name = node.metadata.name.as_deref().unwrap_or_default();
            let (reason, message) = if *came {
                ("RegisteredNode", format!("Node {name} event: Registered Node {name} in Controller"))
            } else {
                ("RemovingNode", format!("Node {name} event: Removing Node {name} from Controller"))
            };
            self.recorder.event(reference(name), EventType::Normal, reason, message);
        }
    }

    async fn sync(&self, key: &ObjectKey) -> Result<Requeue, kube::Error> {
        let Some(mut node) = self.nodes.get(key) else {
            self.memory(|memory| {
                memory.health.remove(&key.name);
                memory.unmarked.remove(&key.name);
            });
            return Ok(Requeue::No);
        };
        let was_ready = ready(&node) == "True";
        let lease = self.leases.get(&ObjectKey::new("kube-node-lease", &*key.name));
        let now = Instant::now();
        let health = self.memory(|memory| {
            let health = observe(memory.health.get(&key.name), &node, lease.as_deref(), now);
            memory.health.insert(key.name.clone(), health.clone());
            health
        });
        let api: Api<Node> = Api::all(self.client.clone());
        if let Some(conditions) = silent(&node, &health, self.grace, now, Timestamp::now()) {
            if !self.is_silent_at_the_source(key, lease.as_deref()).await? {
                return Ok(Requeue::After(self.period));
            }
            let mut updated = (*node).clone();
            updated.status.get_or_insert_default().conditions = Some(conditions);
            node = Arc::new(api.replace_status(&key.name, &PostParams::default(), &updated).await?);
        }
        self.mark_pods(&node, was_ready).await?;
        self.taint(&api, &node, now).await?;
        Ok(Requeue::After(self.period))
    }

    /// Our copy of the lease may be behind: before a node is given up its lease is read anew.
    async fn is_silent_at_the_source(&self, key: &ObjectKey, seen: Option<&Lease>) -> Result<bool, kube::Error> {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), "kube-node-lease");
        let live = api.get_opt(&key.name).await?;
        let version = |lease: Option<&Lease>| lease.and_then(|lease| lease.metadata.resource_version.clone());
        Ok(live.is_none() || version(live.as_ref()) == version(seen))
    }

    async fn taint(&self, api: &Api<Node>, node: &Node, now: Instant) -> Result<(), kube::Error> {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let all = self.nodes.list();
        // The copy may be behind what was just written about this node.
        let others = all.iter().map(|other| &**other).filter(|other| other.metadata.name != node.metadata.name);
        let (zones, none_ready) = zones(others.chain([node]));
        let zone = zone(node);
        let interval = zones.get(&zone).and_then(|(state, size)| eviction_interval(*state, *size));
        let wants = !none_ready && evicting(node).is_some_and(|key| !has(node, key, "NoExecute"));
        let evict = wants
            && self.memory(|memory| {
                let last = memory.evicted.get(&zone);
                let free = interval.is_some_and(|interval| last.is_none_or(|last| now - *last >= interval));
                if free {
                    memory.evicted.insert(zone.clone(), now);
                }
                free
            });
        let Some(wanted) = taints(node, evict, !none_ready, Timestamp::now()) else { return Ok(()) };
        let patch = serde_json::json!({
            "metadata": {"resourceVersion": node.metadata.resource_version},
            "spec": {"taints": if wanted.is_empty() { serde_json::Value::Null } else { serde_json::json!(wanted) }},
        });
        match api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await {
            Err(kube::Error::Api(answer)) if answer.code == 404 => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// The pods of a node that is not ready are not ready either: their Services must not wait for them.
    async fn mark_pods(&self, node: &Node, was_ready: bool) -> Result<(), kube::Error> {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        if ready(node) == "True" || ready(node).is_empty() {
            self.memory(|memory| memory.unmarked.remove(name));
            return Ok(());
        }
        let retry = self.memory(|memory| memory.unmarked.contains_key(name));
        if !was_ready && !retry {
            return Ok(());
        }
        if was_ready {
            let message = format!("Node {name} status is now: NodeNotReady");
            self.recorder.event(reference(name), EventType::Normal, "NodeNotReady", message);
        }
        self.memory(|memory| memory.unmarked.insert(name.to_owned(), ()));
        for pod in self.pods.by_index(BY_NODE, name).iter().filter(|pod| is_ready(pod)) {
            let api: Api<Pod> = Api::namespaced(self.client.clone(), pod.metadata.namespace.as_deref().unwrap_or_default());
            let patch = serde_json::json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [
                {"type": "Ready", "status": "False", "lastTransitionTime": wire_time(Timestamp::now())}]}});
            let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
            match api.patch_status(pod_name, &PatchParams::default(), &Patch::Strategic(patch)).await {
                Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => {}
                answer => _ = answer?,
            }
            self.recorder.about(&**pod, EventType::Warning, "NodeNotReady", "Node is not ready");
        }
        self.memory(|memory| memory.unmarked.remove(name));
        Ok(())
    }
}
