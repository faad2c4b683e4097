//! Keeps as many pods of a template as a ReplicaSet asks for.

mod expectations;
mod plan;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use client::{Delta, EventRecorder, EventType, Informer, ObjectKey, Requeue, WorkQueue, run_workers};
use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, Client};

use self::expectations::Expectations;
use self::plan::{Action, next_available, plan, pod_of, status};
use crate::claim::{Claim, carry_out, claim};
use crate::context::{BY_CONTROLLER, Context, Starting};
use crate::objects::{controller_of, is_active, is_terminal};
use crate::trace::Span;

const WORKERS: usize = 5;

struct Controller {
    client: Client,
    recorder: EventRecorder,
    expectations: Arc<Expectations>,
    replica_sets: Informer<ReplicaSet>,
    pods: Informer<Pod>,
}

/// Registers with the informers; the answer runs the controller.
pub(crate) fn start(context: Arc<Context>) -> Starting {
    let queue = WorkQueue::<ObjectKey>::default();
    let expectations = Arc::new(Expectations::default());
    let add = queue.clone();
    let forgets = expectations.clone();
    context.informers.replica_sets.on_change(move |delta| {
        let key = ObjectKey::of(&**delta.object());
        if matches!(delta, Delta::Deleted(_)) {
            forgets.forget(&key);
        }
        add.add(key);
    });
    let (add, observed) = (queue.clone(), expectations.clone());
    let replica_sets = context.informers.replica_sets.clone();
    context.informers.pods.on_change(move |delta| observe(delta, &observed, &replica_sets, &add));
    Box::pin(async move {
        let Some((client, recorder)) = context.identity("replicaset-controller").await else { return };
        let controller = Arc::new(Controller {
            client,
            recorder,
            expectations,
            replica_sets: context.informers.replica_sets.clone(),
            pods: context.informers.pods.clone(),
        });
        run_workers("replicaset", queue, WORKERS, context.cancel.clone(), move |key| {
            let controller = controller.clone();
            async move { controller.sync(&key).await }
        })
        .await;
    })
}

fn owner_key(pod: &Pod) -> Option<ObjectKey> {
    let owner = controller_of(&pod.metadata).filter(|owner| owner.kind == "ReplicaSet")?;
    Some(ObjectKey::new(pod.metadata.namespace.clone().unwrap_or_default(), &*owner.name))
}

fn observe(delta: &Delta<Pod>, observed: &Expectations, replica_sets: &Informer<ReplicaSet>, queue: &WorkQueue<ObjectKey>) {
    let pod = delta.object();
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let owner = owner_key(pod);
    if let Some(key) = &owner {
        // A pod that is being deleted counts as deleted, whatever the event says.
        let gone = matches!(delta, Delta::Deleted(_)) || pod.metadata.deletion_timestamp.is_some();
        if gone {
            observed.deleted(key, uid);
        }
        if matches!(delta, Delta::Added(_)) {
            observed.created(key, 1);
        }
        queue.add(key.clone());
    }
    // A pod that was let go concerns its former owner too.
    if let Some(before) = delta.before().and_then(|pod| owner_key(pod)).filter(|key| Some(key) != owner.as_ref()) {
        queue.add(before);
    }
    if controller_of(&pod.metadata).is_none() && !matches!(delta, Delta::Deleted(_)) {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        for rs in replica_sets.list_namespace(namespace) {
            let labels = pod.metadata.labels.as_ref();
            if crate::objects::selects(&rs.spec.selector, labels) {
                queue.add(ObjectKey::of(&*rs));
            }
        }
    }
}

impl Controller {
    async fn sync(&self, key: &ObjectKey) -> Result<Requeue, kube::Error> {
        let Some(rs) = self.replica_sets.get(key) else {
            self.expectations.forget(key);
            return Ok(Requeue::No);
        };
        // Read before the pods: what is seen of them afterwards can only be more.
        let ready = self.expectations.satisfied(key);
        let owned = self.claim(key, &rs).await?;
        let active: Vec<Arc<Pod>> = owned.iter().filter(|pod| is_active(pod)).cloned().collect();
        let terminating = owned.iter().filter(|pod| pod.metadata.deletion_timestamp.is_some() && !is_terminal(pod)).count();
        let mut failure = None;
        if ready && rs.metadata.deletion_timestamp.is_none() {
            let now = Timestamp::now();
            match plan(&rs, &active, &self.related(&rs, &active), now) {
                Some(Action::Create(count)) => failure = self.create(key, &rs, count).await.err(),
                Some(Action::Delete(pods)) => failure = self.delete(key, &rs, pods).await.err(),
                None => {}
            }
        }
        let now = Timestamp::now();
        let message = failure.as_ref().map(ToString::to_string);
        let wanted = status(&rs, &active, terminating, message.as_deref(), now);
        if rs.status.as_ref() != Some(&wanted) {
            let updated = ReplicaSet { status: Some(wanted), ..(*rs).clone() };
            let api: Api<ReplicaSet> = Api::namespaced(self.client.clone(), &key.namespace);
            match api.replace_status(&key.name, &PostParams::default(), &updated).await {
                Err(kube::Error::Api(answer)) if answer.code == 404 => {}
                answer => _ = answer?,
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(next_available(&rs, &active, now).map_or(Requeue::No, Requeue::After)),
        }
    }

    async fn claim(&self, key: &ObjectKey, rs: &ReplicaSet) -> Result<Vec<Arc<Pod>>, kube::Error> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        let uid = rs.metadata.uid.as_deref().unwrap_or_default();
        let mut candidates = self.pods.by_index(BY_CONTROLLER, uid);
        candidates.extend(self.pods.by_index(BY_CONTROLLER, &format!("{}/", key.namespace)));
        let mut owned = Vec::new();
        for pod in candidates {
            let wanted = match claim(&rs.metadata, &rs.spec.selector, &pod.metadata) {
                Claim::Adopt if !is_active(&pod) || !self.is_fresh(key, rs).await? => continue,
                Claim::Release if !is_active(&pod) => continue,
                wanted => wanted,
            };
            if carry_out(&api, rs, &*pod, wanted).await? {
                owned.push(pod);
            }
        }
        Ok(owned)
    }

    async fn is_fresh(&self, key: &ObjectKey, rs: &ReplicaSet) -> Result<bool, kube::Error> {
        let api: Api<ReplicaSet> = Api::namespaced(self.client.clone(), &key.namespace);
        let fresh = api.get_opt(&key.name).await?;
        Ok(fresh.is_some_and(|fresh| fresh.metadata.uid == rs.metadata.uid && fresh.metadata.deletion_timestamp.is_none()))
    }

    /// Pods of all ReplicaSets of the same owner: they decide which node is crowded.
    fn related(&self, rs: &ReplicaSet, own: &[Arc<Pod>]) -> Vec<Arc<Pod>> {
        let Some(owner) = controller_of(&rs.metadata) else { return own.to_vec() };
        let namespace = rs.metadata.namespace.as_deref().unwrap_or_default();
        let siblings = self.replica_sets.list_namespace(namespace).into_iter();
        siblings
            .filter(|other| controller_of(&other.metadata).is_some_and(|reference| reference.uid == owner.uid))
            .flat_map(|other| self.pods.by_index(BY_CONTROLLER, other.metadata.uid.as_deref().unwrap_or_default()))
            .collect()
    }

    /// Makes pods in batches that double as long as they succeed: a template that is refused is refused once.
    async fn create(&self, key: &ObjectKey, rs: &ReplicaSet, count: usize) -> Result<(), kube::Error> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        let pod = pod_of(rs);
        self.expectations.expect(key, count, []);
        let mut left = count;
        let mut batch = 1;
        while left > 0 {
            let size = batch.min(left);
            let results = join_all((0..size).map(|_| self.create_one(&api, rs, &pod))).await;
            left -= size;
            let failed = results.iter().filter(|result| result.is_err()).count();
            if let Some(Err(error)) = results.into_iter().find(Result::is_err) {
                self.expectations.created(key, failed + left);
                // In a namespace that is going away nothing can be made, and nothing need be.
                return if is_terminating(&error) { Ok(()) } else { Err(error) };
            }
            batch *= 2;
        }
        Ok(())
    }

    async fn create_one(&self, api: &Api<Pod>, rs: &ReplicaSet, pod: &Pod) -> Result<(), kube::Error> {
        let span = Span::start();
        match api.create(&PostParams::default(), pod).await {
            Ok(made) => {
                span.end(made.metadata.uid.as_deref(), "controller.replicaset");
                let name = made.metadata.name.unwrap_or_default();
                self.recorder.about(rs, EventType::Normal, "SuccessfulCreate", format!("Created pod: {name}"));
                Ok(())
            }
            Err(error) => {
                if !is_terminating(&error) {
                    let message = format!("Error creating: {}", told(&error));
                    self.recorder.about(rs, EventType::Warning, "FailedCreate", message);
                }
                Err(error)
            }
        }
    }

    async fn delete(&self, key: &ObjectKey, rs: &ReplicaSet, pods: Vec<Arc<Pod>>) -> Result<(), kube::Error> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &key.namespace);
        self.expectations.expect(key, 0, pods.iter().filter_map(|pod| pod.metadata.uid.clone()));
        let deletions = pods.iter().map(|pod| self.delete_one(&api, key, rs, pod));
        join_all(deletions).await.into_iter().find(Result::is_err).unwrap_or(Ok(()))
    }

    async fn delete_one(&self, api: &Api<Pod>, key: &ObjectKey, rs: &ReplicaSet, pod: &Pod) -> Result<(), kube::Error> {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let uid = pod.metadata.uid.clone();
        let preconditions = Preconditions { uid: uid.clone(), ..Preconditions::default() };
        match api.delete(name, &DeleteParams::default().preconditions(preconditions)).await {
            Ok(_) => {
                self.recorder.about(rs, EventType::Normal, "SuccessfulDelete", format!("Deleted pod: {name}"));
                Ok(())
            }
            Err(error) => {
                self.expectations.deleted(key, uid.as_deref().unwrap_or_default());
                if matches!(&error, kube::Error::Api(answer) if answer.code == 404) {
                    return Ok(());
                }
                let message = format!("Error deleting: {}", told(&error));
                self.recorder.about(rs, EventType::Warning, "FailedDelete", message);
                Err(error)
            }
        }
    }
}

/// What the server said, without kube's frame around it.
fn told(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// Refused because the namespace is being deleted.
fn is_terminating(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else { return false };
    let causes = status.details.iter().flat_map(|details| &details.causes);
    status.code == 403 && causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}
