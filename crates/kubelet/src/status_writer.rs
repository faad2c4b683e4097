//! Writes one pod's status to the server, the newest one only, again and again until it is there; at the end
//! deletes the pod. A task of its own, so that a server that is away holds up no container.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use tokio::sync::watch;

use crate::model;
use crate::runtime::Span;
use crate::status::patch;

/// First and longest wait after a failed write.
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(10);
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// What the server is to be told.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The pod as the watch last showed it.
    pub pod: Option<std::sync::Arc<Pod>>,
    /// The status to reach.
    pub status: Option<PodStatus>,
    /// The pod is over: delete it when the status is there.
    pub delete: bool,
}

enum Written {
    Done,
    /// The pod of this uid is not there any more.
    Gone,
}

/// Runs until the sender is dropped or the pod is gone.
pub async fn run(client: kube::Client, mut wanted: watch::Receiver<Wanted>) {
    let mut acknowledged: Option<(u64, PodStatus)> = None;
    let mut retry = RETRY_MIN;
    loop {
        let now = wanted.borrow_and_update().clone();
        let result = match (&now.pod, &now.status) {
            (Some(pod), Some(status)) => write(&client, pod, status, now.delete, &mut acknowledged).await,
            _ => Ok(Written::Done),
        };
        match result {
            Ok(Written::Gone) => return,
            Ok(Written::Done) => {
                retry = RETRY_MIN;
                if wanted.changed().await.is_err() {
                    return;
                }
            }
            Err(error) => {
                let pod = now.pod.as_deref().map(model::format_pod).unwrap_or_default();
                tracing::warn!(pod, error, "failed to write pod status");
                tokio::select! {
                    () = tokio::time::sleep(retry) => {}
                    changed = wanted.changed() => if changed.is_err() { return },
                }
                retry = (retry * 2).min(RETRY_MAX);
            }
        }
    }
}

async fn write(
    client: &kube::Client,
    pod: &Pod,
    status: &PodStatus,
    delete: bool,
    acknowledged: &mut Option<(u64, PodStatus)>,
) -> Result<Written, String> {
    let api: Api<Pod> = Api::namespaced(client.clone(), model::namespace(pod));
    let (name, uid) = (model::name(pod), model::uid(pod));
    let seen_version = version(pod);
    let base = match acknowledged {
        Some((version, status)) if *version >= seen_version => status.clone(),
        _ => pod.status.clone().unwrap_or_default(),
    };
    if let Some(body) = patch::patch(uid, &base, status) {
        let span = Span::start(uid, "kubelet.status");
        let params = PatchParams::default();
        let patch = Patch::Strategic(&body);
        let call = tokio::time::timeout(WRITE_TIMEOUT, api.patch_status(name, &params, &patch));
        match call.await {
            Ok(Ok(pod)) if model::uid(&pod) != uid => return Ok(Written::Gone),
            Ok(Ok(pod)) => {
                *acknowledged = Some((version(&pod), pod.status.unwrap_or_default()));
                span.end();
            }
            Ok(Err(kube::Error::Api(status))) if status.code == 404 || is_other_uid(&status) => {
                return Ok(Written::Gone);
            }
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err("no answer within 30 s".to_owned()),
        }
    }
    if !delete {
        return Ok(Written::Done);
    }
    let params = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions { uid: Some(uid.to_owned()), resource_version: None }),
        ..DeleteParams::default()
    };
    match tokio::time::timeout(WRITE_TIMEOUT, api.delete(name, &params)).await {
        Ok(Ok(_)) => Ok(Written::Done),
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Ok(Written::Gone),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no answer within 30 s".to_owned()),
    }
}

/// A conflict because the uid is another's; other conflicts are tried again.
fn is_other_uid(status: &kube::core::Status) -> bool {
    status.code == 409 && status.message.contains("uid")
}

fn version(pod: &Pod) -> u64 {
    let version = pod.metadata.resource_version.as_deref();
    version.and_then(|v| v.parse().ok()).unwrap_or(0)
}
