//! The Node object: registration, status, lease (upstream pkg/kubelet/kubelet_node_status.go, pkg/kubelet/nodestatus,
//! v1.37).

pub mod host;
pub mod lease;
mod status;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, NodeSpec, NodeStatus, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use tokio_util::sync::CancellationToken;

use crate::events::Target;
use crate::kubelet::Kubelet;

/// Status is written at least this often (upstream's nodeStatusReportFrequency).
const REPORT: SignedDuration = SignedDuration::from_mins(5);
/// Wait between tries while the node is not registered or not ready.
const QUICK: Duration = Duration::from_millis(500);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Finds out what pods need to know of the node, before any is looked at.
pub async fn prime(kubelet: &Kubelet) {
    // The status itself is computed again, with what the server has, when it is written.
    let _ = status::compute(kubelet, None).await;
}

/// Registers the node and keeps its status until cancelled.
pub async fn run(kubelet: Arc<Kubelet>, cancel: CancellationToken) {
    let mut keeper = Keeper { kubelet, registered: false, last: None, ready: None };
    loop {
        let wait = keeper.pass().await;
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

struct Keeper {
    kubelet: Arc<Kubelet>,
    registered: bool,
    last: Option<(Timestamp, NodeStatus)>,
    ready: Option<bool>,
}

impl Keeper {
    /// One look; how long to wait for the next.
    async fn pass(&mut self) -> Duration {
        let previous =
            self.last.as_ref().map(|(_, s)| s.clone()).or_else(|| self.kubelet.node.list().first().and_then(|n| n.status.clone()));
        let status = status::compute(&self.kubelet, previous.as_ref()).await;
        let ready = status::is_ready(&status);
        let slow = self.kubelet.config.node_status_update_frequency;
        if !self.registered {
            match self.register(&status).await {
                Ok(()) => self.registered = true,
                Err(error) => {
                    tracing::warn!(error, "failed to register the node");
                    return QUICK;
                }
            }
        }
        match self.write(&status).await {
            Ok(()) => {
                self.tell(ready);
                if ready { slow } else { QUICK.min(slow) }
            }
            Err(error) => {
                tracing::warn!(error, "failed to write node status");
                // The object may have been deleted: a node that runs is registered again.
                self.registered = false;
                self.last = None;
                QUICK * 4
            }
        }
    }

    fn tell(&mut self, ready: bool) {
        if self.ready == Some(ready) {
            return;
        }
        self.ready = Some(ready);
        let name = &self.kubelet.node_name;
        let (reason, word) = if ready { ("NodeReady", "NodeReady") } else { ("NodeNotReady", "NodeNotReady") };
        let text = format!("Node {name} status is now: {word}");
        self.kubelet.recorder.normal(&Target::node(name), reason, text);
    }

    async fn register(&self, status: &NodeStatus) -> Result<(), String> {
        let api: Api<Node> = Api::all(self.kubelet.client.clone());
        if !self.kubelet.config.register_node {
            return Ok(());
        }
        let node = self.node(status)?;
        let params = PostParams::default();
        let created = tokio::time::timeout(WRITE_TIMEOUT, api.create(&params, &node)).await;
        match created {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(kube::Error::Api(answer))) if answer.code == 409 => {
                let labels = node.metadata.labels.unwrap_or_default();
                let patch = serde_json::json!({"metadata": {"labels": labels}});
                let params = PatchParams::default();
                let patch = Patch::Strategic(patch);
                let name = &self.kubelet.node_name;
                api.patch(name, &params, &patch).await.map(|_| ()).map_err(|e| e.to_string())
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no answer within 10 s".to_owned()),
        }
    }

    fn node(&self, status: &NodeStatus) -> Result<Node, String> {
        let config = &self.kubelet.config;
        let name = &self.kubelet.node_name;
        let arch = host::go_arch();
        let mut labels: BTreeMap<String, String> = [
            ("kubernetes.io/hostname", name.as_str()),
            ("kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", arch),
            ("beta.kubernetes.io/os", "linux"),
            ("beta.kubernetes.io/arch", arch),
        ]
        .into_iter()
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
        labels.extend(config.labels().map_err(|e| e.to_string())?);
        let taints: Vec<Taint> = config
            .taints()
            .map_err(|e| e.to_string())?
            .into_iter()
            .map(|(key, value, effect)| Taint { key, value: (!value.is_empty()).then_some(value), effect, time_added: None })
            .collect();
        let attach = "volumes.kubernetes.io/controller-managed-attach-detach".to_owned();
        Ok(Node {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some(labels),
                annotations: Some(BTreeMap::from([(attach, "true".to_owned())])),
                ..ObjectMeta::default()
            },
            spec: Some(NodeSpec { taints: (!taints.is_empty()).then_some(taints), ..NodeSpec::default() }),
            status: Some(status.clone()),
        })
    }

    /// Writes the status when it changed or is due.
    async fn write(&mut self, status: &NodeStatus) -> Result<(), String> {
        let now = Timestamp::now();
        let due = self.last.as_ref().is_none_or(|(at, last)| now.duration_since(*at) >= REPORT || status::differs(last, status));
        if !due {
            return Ok(());
        }
        let api: Api<Node> = Api::all(self.kubelet.client.clone());
        let body = status::patch(status);
        let params = PatchParams::default();
        let patch = Patch::Strategic(body);
        let call = api.patch_status(&self.kubelet.node_name, &params, &patch);
        match tokio::time::timeout(WRITE_TIMEOUT, call).await {
            Ok(Ok(_)) => {
                self.last = Some((now, status.clone()));
                Ok(())
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no answer within 10 s".to_owned()),
        }
    }
}
