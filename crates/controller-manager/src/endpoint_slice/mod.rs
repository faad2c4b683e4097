//! Publishes the pods that a Service selects as EndpointSlices, which kube-proxy reads.
//!
//! A Service without selector, and one of type ExternalName, gets none. The slices of a deleted Service go with it by their owner
//! reference.

mod plan;
#[cfg(test)]
mod tests;
mod tracker;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use client::{Delta, EventRecorder, EventType, Informer, ObjectKey, Requeue, WorkQueue, run_workers};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, Client};

use self::plan::{CONTROLLER, MANAGED_BY, Observed, Plan, plan};
use self::tracker::{Tracker, service_of};
use crate::context::{Context, Starting};
use crate::objects::is_ready;

/// Index of slices by `NAMESPACE/SERVICE`.
pub(crate) const BY_SERVICE: &str = "service";
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// When a copy that lags behind our own writes is looked at again.
const STALE_RETRY: Duration = Duration::from_millis(50);

struct Controller {
    client: Client,
    recorder: EventRecorder,
    tracker: Arc<Tracker>,
    services: Informer<Service>,
    pods: Informer<Pod>,
    nodes: Informer<Node>,
    slices: Informer<EndpointSlice>,
    endpoints_max: usize,
}

/// Why a Service's slices are not as they should be.
#[derive(Debug, thiserror::Error)]
enum SyncError {
    #[error("failed to {act} an EndpointSlice of the Service")]
    Write { act: &'static str, source: Box<kube::Error> },
    #[error("the node of the pods {} is not known", pods.join(", "))]
    Homeless { pods: Vec<String> },
}

/// Under which value the index [`BY_SERVICE`] has a slice.
pub(crate) fn service_index(slice: &EndpointSlice) -> Vec<String> {
    service_of(slice).map(|key| key.to_string()).into_iter().collect()
}

fn is_ours(slice: &EndpointSlice) -> bool {
    slice.metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY)).is_some_and(|name| name == CONTROLLER)
}

/// Registers with the informers; the answer runs the controller.
pub(crate) fn start(context: Arc<Context>) -> Starting {
    let queue = WorkQueue::<ObjectKey>::default();
    let tracker = Arc::new(Tracker::default());
    let add = queue.clone();
    context.informers.services.on_change(move |delta| add.add(ObjectKey::of(&**delta.object())));
    let (add, services, delay) = (queue.clone(), context.informers.services.clone(), context.config.endpointslice_updates_batch_period);
    context.informers.pods.on_change(move |delta| {
        for key in services_of_pod(delta, &services) {
            add.add_after(key, delay);
        }
    });
    let (add, written) = (queue.clone(), tracker.clone());
    context.informers.endpoint_slices.on_change(move |delta| {
        for key in services_of_slice(delta, &written) {
            add.add(key);
        }
    });
    Box::pin(async move {
        let Some((client, recorder)) = context.identity("endpointslice-controller").await else { return };
        let controller = Arc::new(Controller {
            client,
            recorder,
            tracker,
            services: context.informers.services.clone(),
            pods: context.informers.pods.clone(),
            nodes: context.informers.nodes.clone(),
            slices: context.informers.endpoint_slices.clone(),
            endpoints_max: context.config.max_endpoints_per_slice,
        });
        let workers = context.config.concurrent_service_endpoint_syncs;
        run_workers("endpointslice", queue, workers, context.cancel.clone(), move |key| {
            let controller = controller.clone();
            async move { controller.sync(&key).await }
        })
        .await;
    })
}

fn selects(service: &Service, labels: Option<&BTreeMap<String, String>>) -> bool {
    let selector = service.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    selector.is_some_and(|selector| {
        !selector.is_empty() && selector.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
    })
}

/// The Services that a change of a pod concerns.
fn services_of_pod(delta: &Delta<Pod>, services: &Informer<Service>) -> Vec<ObjectKey> {
    let pod = delta.object();
    let before = match delta {
        Delta::Updated { old, .. } if !matters(old, pod) => return Vec::new(),
        Delta::Updated { old, .. } => old.metadata.labels.as_ref(),
        Delta::Added(_) | Delta::Deleted(_) => None,
    };
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let all = services.list_namespace(namespace).into_iter();
    let concerned = all.filter(|service| selects(service, pod.metadata.labels.as_ref()) || selects(service, before));
    concerned.map(|service| ObjectKey::of(&*service)).collect()
}

/// Whether a change of a pod can change an endpoint.
fn matters(old: &Pod, new: &Pod) -> bool {
    let of = |pod: &Pod| {
        let status = pod.status.clone().unwrap_or_default();
        let spec = pod.spec.as_ref();
        let place = spec.map(|spec| (spec.hostname.clone(), spec.subdomain.clone(), spec.node_name.clone()));
        (
            pod.metadata.deletion_timestamp.is_some(),
            is_ready(pod),
            status.phase,
            status.pod_ip,
            status.pod_ips,
            place,
            pod.metadata.labels.clone(),
        )
    };
    of(old) != of(new)
}

/// The Services whose slices somebody else changed.
fn services_of_slice(delta: &Delta<EndpointSlice>, tracker: &Tracker) -> Vec<ObjectKey> {
    let slice = delta.object();
    match delta {
        Delta::Deleted(_) => service_of(slice).filter(|_| is_ours(slice) && tracker.gone(slice)).into_iter().collect(),
        Delta::Updated { old, .. } if service_of(old) != service_of(slice) => {
            [service_of(old), service_of(slice)].into_iter().flatten().collect()
        }
        _ => {
            let handed_over = delta.before().is_some_and(|old| is_ours(old) != is_ours(slice));
            let foreign = handed_over || (is_ours(slice) && tracker.is_foreign(slice));
            service_of(slice).filter(|_| foreign).into_iter().collect()
        }
    }
}

impl Controller {
    async fn sync(&self, key: &ObjectKey) -> Result<Requeue, SyncError> {
        let Some(service) = self.services.get(key) else {
            self.tracker.forget(key);
            return Ok(Requeue::No);
        };
        let spec = service.spec.clone().unwrap_or_default();
        if spec.type_.as_deref() == Some("ExternalName") || spec.selector.is_none_or(|selector| selector.is_empty()) {
            return Ok(Requeue::No);
        }
        let pods: Vec<Arc<Pod>> =
            self.pods.list_namespace(&key.namespace).into_iter().filter(|pod| selects(&service, pod.metadata.labels.as_ref())).collect();
        let mut slices = self.slices.by_index(BY_SERVICE, &key.to_string());
        slices.retain(|slice| is_ours(slice) && slice.metadata.deletion_timestamp.is_none());
        if self.tracker.is_stale(key, &slices) {
            return Ok(Requeue::After(STALE_RETRY));
        }
        let trigger = self.tracker.trigger_time(key, &service, &pods);
        let node = |name: &str| self.nodes.get(&ObjectKey::new("", name));
        let plan = plan(&Observed { service: &service, pods: &pods, slices: &slices, node: &node, endpoints_max: self.endpoints_max });
        match self.apply(key, plan, trigger).await {
            Ok(()) => Ok(Requeue::No),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
                let message = format!("Error updating Endpoint Slices for Service {key}: {error}{cause}");
                self.recorder.about(&*service, EventType::Warning, "FailedToUpdateEndpointSlices", message);
                Err(error)
            }
        }
    }

    async fn apply(&self, key: &ObjectKey, plan: Plan, trigger: Option<Timestamp>) -> Result<(), SyncError> {
        let failed = |act| move |source| SyncError::Write { act, source: Box::new(source) };
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), &key.namespace);
        for mut slice in plan.create {
            stamp(&mut slice, trigger);
            match api.create(&PostParams::default(), &slice).await {
                Ok(made) => self.tracker.wrote(key, &made),
                // In a namespace that is going away nothing can be made, and nothing need be.
                Err(kube::Error::Api(status)) if is_terminating(&status) => return Ok(()),
                Err(error) => return Err(failed("create")(error)),
            }
        }
        for mut slice in plan.update {
            stamp(&mut slice, trigger);
            let name = slice.metadata.name.clone().unwrap_or_default();
            let made = api.replace(&name, &PostParams::default(), &slice).await.map_err(failed("update"))?;
            self.tracker.wrote(key, &made);
        }
        for slice in plan.delete {
            let name = slice.metadata.name.as_deref().unwrap_or_default();
            let preconditions = Preconditions { uid: slice.metadata.uid.clone(), ..Preconditions::default() };
            match api.delete(name, &DeleteParams::default().preconditions(preconditions)).await {
                Ok(_) => self.tracker.deleted(key, &slice),
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(failed("delete")(error)),
            }
        }
        if plan.homeless.is_empty() { Ok(()) } else { Err(SyncError::Homeless { pods: plan.homeless }) }
    }
}

fn stamp(slice: &mut EndpointSlice, trigger: Option<Timestamp>) {
    let annotations = slice.metadata.annotations.get_or_insert_default();
    match trigger {
        Some(time) => drop(annotations.insert(TRIGGER_TIME.to_owned(), time.to_string())),
        None => drop(annotations.remove(TRIGGER_TIME)),
    }
}

fn is_terminating(status: &kube::core::Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    status.code == 403 && causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}
