//! Pod garbage collection: ended pods beyond the limit, pods of nodes that are gone, pods deleted before they had a node
//! (`pkg/controller/podgc`, 1.37).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use client::ObjectKey;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use tokio::time::Instant;

use crate::context::{Context, Starting};
use crate::objects::{by_creation, is_terminal, wire_time};

const PERIOD: Duration = Duration::from_secs(20);
/// A node must be gone this long before its pods are.
const QUARANTINE: Duration = Duration::from_secs(40);
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// Why a pod goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Surplus,
    Orphan,
    Unscheduled,
    OutOfService,
}

fn node_name(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
}

/// The pods that go. `gone` says since when a node is missing.
fn plan<'a>(
    pods: &'a [Arc<Pod>],
    node: impl Fn(&str) -> Option<Arc<Node>>,
    gone: &HashMap<String, Instant>,
    threshold: usize,
    now: Instant,
) -> Vec<(&'a Arc<Pod>, Why)> {
    let mut going = Vec::new();
    let mut ended: Vec<&Arc<Pod>> = pods.iter().filter(|pod| is_terminal(pod) && pod.metadata.deletion_timestamp.is_none()).collect();
    if threshold > 0 && ended.len() > threshold {
        ended.sort_by(|a, b| by_creation(&a.metadata, &b.metadata));
        going.extend(ended.iter().take(ended.len() - threshold).map(|pod| (*pod, Why::Surplus)));
    }
    for pod in pods {
        let name = node_name(pod);
        let deleting = pod.metadata.deletion_timestamp.is_some();
        if name.is_empty() {
            if deleting {
                going.push((pod, Why::Unscheduled));
            }
            continue;
        }
        match node(name) {
            None if gone.get(name).is_some_and(|since| now - *since >= QUARANTINE) => going.push((pod, Why::Orphan)),
            Some(node) if deleting && is_out_of_service(&node) => going.push((pod, Why::OutOfService)),
            _ => {}
        }
    }
    going
}

fn is_out_of_service(node: &Node) -> bool {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready = conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    !ready && taints.into_iter().any(|taint| taint.key == OUT_OF_SERVICE)
}

/// The answer runs the controller.
pub(crate) fn start(context: Arc<Context>) -> Starting {
    Box::pin(async move {
        let Some((client, _)) = context.identity("pod-garbage-collector").await else { return };
        let (pods, nodes) = (context.informers.pods.clone(), context.informers.nodes.clone());
        let mut gone: HashMap<String, Instant> = HashMap::new();
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = context.cancel.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let now = Instant::now();
            let all = pods.list();
            let node = |name: &str| nodes.get(&ObjectKey::new("", name));
            gone.retain(|name, _| node(name).is_none() && all.iter().any(|pod| node_name(pod) == name));
            for pod in all.iter().filter(|pod| !node_name(pod).is_empty() && node(node_name(pod)).is_none()) {
                gone.entry(node_name(pod).to_owned()).or_insert(now);
            }
            for (pod, why) in plan(&all, node, &gone, context.config.terminated_pod_gc_threshold, now) {
                if context.cancel.is_cancelled() {
                    return;
                }
                if let Err(error) = remove(&client, pod, why).await {
                    tracing::warn!(pod = %ObjectKey::of(&**pod), error = &error as &dyn std::error::Error,
                        "failed to remove a pod; trying again");
                }
            }
        }
    })
}

async fn remove(client: &Client, pod: &Pod, why: Why) -> Result<(), kube::Error> {
    let api: Api<Pod> = Api::namespaced(client.clone(), pod.metadata.namespace.as_deref().unwrap_or_default());
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    if why == Why::Orphan {
        // The node may have come back under the same name meanwhile.
        let nodes: Api<Node> = Api::all(client.clone());
        if nodes.get_opt(node_name(pod)).await?.is_some() {
            return Ok(());
        }
    }
    if !is_terminal(pod) {
        let mut status = serde_json::json!({"phase": "Failed"});
        if why == Why::Orphan {
            status["conditions"] = serde_json::json!([{
                "type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC",
                "message": "PodGC: node no longer exists", "lastTransitionTime": wire_time(Timestamp::now()),
            }]);
        }
        let patch = serde_json::json!({"metadata": {"uid": pod.metadata.uid}, "status": status});
        match api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
            Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => return Ok(()),
            answer => _ = answer?,
        }
    }
    let preconditions = Preconditions { uid: pod.metadata.uid.clone(), ..Preconditions::default() };
    match api.delete(name, &DeleteParams::default().grace_period(0).preconditions(preconditions)).await {
        Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => Ok(()),
        answer => answer.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, node: &str, phase: &str, deleting: bool) -> Arc<Pod> {
        let deleting = deleting.then_some("2026-01-01T00:00:00Z");
        Arc::new(
            serde_json::from_value(json!({"metadata": {"name": name, "deletionTimestamp": deleting,
                "creationTimestamp": format!("2026-01-01T00:00:0{}Z", name)},
                "spec": {"containers": [], "nodeName": node}, "status": {"phase": phase}}))
            .expect("pod"),
        )
    }

    #[test]
    fn who_goes() {
        let pods = [
            pod("1", "n", "Succeeded", false),
            pod("2", "n", "Failed", false),
            pod("3", "lost", "Running", false),
            pod("4", "", "Pending", true),
            pod("5", "", "Pending", false),
            pod("6", "n", "Running", true),
            pod("7", "just-lost", "Running", false),
        ];
        let node = |name: &str| (name == "n").then(|| Arc::new(Node::default()));
        let now = Instant::now() + QUARANTINE;
        let gone = [("lost".to_owned(), now - QUARANTINE), ("just-lost".to_owned(), now)].into();
        let told: Vec<_> =
            plan(&pods, node, &gone, 1, now).into_iter().map(|(pod, why)| (pod.metadata.name.clone().unwrap_or_default(), why)).collect();
        let wanted = [("1", Why::Surplus), ("3", Why::Orphan), ("4", Why::Unscheduled)];
        assert_eq!(told, wanted.map(|(name, why)| (name.to_owned(), why)));
    }
}
