//! Taint eviction: pods leave nodes whose NoExecute taints they do not tolerate, or not for longer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use client::{EventRecorder, EventType, Informer, ObjectKey, Requeue, WorkQueue, run_workers};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use tokio::time::Instant;

use super::plan::{Stay, stay};
use crate::context::{BY_NODE, Context, Starting};
use crate::objects::wire_time;

const WORKERS: usize = 8;

struct Controller {
    client: Client,
    recorder: EventRecorder,
    nodes: Informer<Node>,
    pods: Informer<Pod>,
    /// Since when a pod, by its UID, is to leave.
    since: Mutex<HashMap<ObjectKey, (String, Instant)>>,
}

/// Registers with the informers; the answer runs the controller.
pub(crate) fn start(context: Arc<Context>) -> Starting {
    let queue = WorkQueue::<ObjectKey>::default();
    let add = queue.clone();
    context.informers.pods.on_change(move |delta| add.add(ObjectKey::of(&**delta.object())));
    let (add, pods) = (queue.clone(), context.informers.pods.clone());
    context.informers.nodes.on_change(move |delta| {
        let taints = |node: &Node| node.spec.as_ref().and_then(|spec| spec.taints.clone());
        if delta.before().is_none_or(|old| taints(old) != taints(delta.object())) {
            let name = delta.object().metadata.name.as_deref().unwrap_or_default();
            pods.by_index(BY_NODE, name).iter().for_each(|pod| add.add(ObjectKey::of(&**pod)));
        }
    });
    Box::pin(async move {
        let Some((client, recorder)) = context.identity("node-controller").await else { return };
        let controller = Arc::new(Controller {
            client,
            recorder,
            nodes: context.informers.nodes.clone(),
            pods: context.informers.pods.clone(),
            since: Mutex::default(),
        });
        run_workers("taint-eviction", queue, WORKERS, context.cancel.clone(), move |key| {
            let controller = controller.clone();
            async move { controller.sync(&key).await }
        })
        .await;
    })
}

impl Controller {
    fn forget(&self, key: &ObjectKey) -> bool {
        self.since.lock().unwrap_or_else(PoisonError::into_inner).remove(key).is_some()
    }

    async fn sync(&self, key: &ObjectKey) -> Result<Requeue, kube::Error> {
        let pod = self.pods.get(key).filter(|pod| pod.metadata.deletion_timestamp.is_none());
        let node = pod.as_ref().and_then(|pod| pod.spec.as_ref()?.node_name.clone());
        let node = node.and_then(|name| self.nodes.get(&ObjectKey::new("", name)));
        let (Some(pod), Some(node)) = (pod, node) else {
            self.forget(key);
            return Ok(Requeue::No);
        };
        let Stay::For(allowed) = stay(&pod, &node) else {
            if self.forget(key) {
                let message = format!("Cancelling deletion of Pod {key}");
                self.recorder.about(&*pod, EventType::Normal, "TaintManagerEviction", message);
            }
            return Ok(Requeue::No);
        };
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let now = Instant::now();
        let since = {
            let mut all = self.since.lock().unwrap_or_else(PoisonError::into_inner);
            let entry = all.entry(key.clone()).or_insert_with(|| (uid.clone(), now));
            if entry.0 != uid {
                *entry = (uid, now);
            }
            entry.1
        };
        let left = (since + allowed).saturating_duration_since(now);
        if !left.is_zero() {
            return Ok(Requeue::After(left));
        }
        self.evict(key, &pod).await?;
        self.forget(key);
        Ok(Requeue::No)
    }

    async fn evict(&self, key: &ObjectKey, pod: &Pod) -> Result<(), kube::Error> {
        let message = format!("Marking for deletion Pod {key}");
        self.recorder.about(pod, EventType::Normal, "TaintManagerEviction", message);
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        let patch = serde_json::json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [{
            "type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager",
            "message": "Taint manager: deleting due to NoExecute taint",
            "lastTransitionTime": wire_time(Timestamp::now()),
        }]}});
        match api.patch_status(&key.name, &PatchParams::default(), &Patch::Strategic(patch)).await {
            Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => return Ok(()),
            answer => _ = answer?,
        }
        let preconditions = Preconditions { uid: pod.metadata.uid.clone(), ..Preconditions::default() };
        match api.delete(&key.name, &DeleteParams::default().preconditions(preconditions)).await {
            Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => Ok(()),
            answer => answer.map(drop),
        }
    }
}
