//! The node's lease, renewed by a task of its own so that nothing else can delay it
//! (k8s.io/component-helpers/apimachinery/lease, v1.37).

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::Api;
use kube::api::PostParams;
use tokio_util::sync::CancellationToken;

use crate::kubelet::Kubelet;

const NAMESPACE: &str = "kube-node-lease";
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(7);

/// Renews until cancelled, at a quarter of the lease's duration.
pub async fn run(kubelet: Arc<Kubelet>, cancel: CancellationToken) {
    let period = Duration::from_secs(u64::from(kubelet.config.node_lease_duration_seconds)) / 4;
    let mut held: Option<Lease> = None;
    let mut retry = RETRY_MIN;
    loop {
        let renewed = tokio::time::timeout(WRITE_TIMEOUT, renew(&kubelet, held.take())).await;
        let wait = match renewed {
            Ok(Ok(lease)) => {
                held = Some(lease);
                retry = RETRY_MIN;
                period
            }
            failed => {
                if let Ok(Err(error)) = failed {
                    tracing::warn!(%error, "failed to renew the node's lease");
                } else {
                    tracing::warn!("renewing the node's lease took longer than 10 s");
                }
                let wait = retry;
                retry = (retry * 2).min(RETRY_MAX);
                wait
            }
        };
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn renew(kubelet: &Kubelet, held: Option<Lease>) -> Result<Lease, kube::Error> {
    let api: Api<Lease> = Api::namespaced(kubelet.client.clone(), NAMESPACE);
    let name = &kubelet.node_name;
    let found = match held {
        Some(lease) => Some(lease),
        None => api.get_opt(name).await?,
    };
    let params = PostParams::default();
    let owner = kubelet.node.list().first().and_then(|node| {
        Some(OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: name.clone(),
            uid: node.metadata.uid.clone()?,
            ..OwnerReference::default()
        })
    });
    let exists = found.is_some();
    let mut lease = found.unwrap_or_else(|| Lease {
        metadata: ObjectMeta { name: Some(name.clone()), namespace: Some(NAMESPACE.to_owned()), ..ObjectMeta::default() },
        spec: None,
    });
    if lease.metadata.owner_references.as_ref().is_none_or(Vec::is_empty) {
        lease.metadata.owner_references = owner.map(|o| vec![o]);
    }
    let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
    spec.holder_identity = Some(name.clone());
    let seconds = kubelet.config.node_lease_duration_seconds;
    spec.lease_duration_seconds = i32::try_from(seconds).ok();
    spec.renew_time = Some(MicroTime(Timestamp::now()));
    if exists { api.replace(name, &params, &lease).await } else { api.create(&params, &lease).await }
}
