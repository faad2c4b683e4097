//! Keeps a ReplicaSet for the template of each Deployment, and moves the replicas from the old ones to it.

mod annotations;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use client::{EventRecorder, EventType, Informer, ObjectKey, Requeue, WorkQueue, run_workers};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Client};

use self::plan::{Action, Plan, plan, same_template};
use crate::claim::{Claim, carry_out, claim};
use crate::context::{Context, Starting};
use crate::objects::{controller_of, is_terminal};
use crate::trace::Span;

const WORKERS: usize = 5;

struct Controller {
    client: Client,
    recorder: EventRecorder,
    deployments: Informer<Deployment>,
    replica_sets: Informer<ReplicaSet>,
    pods: Informer<Pod>,
}

/// Registers with the informers; the answer runs the controller.
pub(crate) fn start(context: Arc<Context>) -> Starting {
    let queue = WorkQueue::<ObjectKey>::default();
    let informers = &context.informers;
    let add = queue.clone();
    informers.deployments.on_change(move |delta| add.add(ObjectKey::of(&**delta.object())));
    let (add, deployments) = (queue.clone(), informers.deployments.clone());
    informers.replica_sets.on_change(move |delta| {
        for rs in [Some(delta.object()), delta.before()].into_iter().flatten() {
            owners_of(&deployments, rs).into_iter().for_each(|key| add.add(key));
        }
    });
    // Recreate waits for the last old pod to go.
    let (add, deployments, replica_sets) = (queue.clone(), informers.deployments.clone(), informers.replica_sets.clone());
    informers.pods.on_change(move |delta| {
        if matches!(delta, client::Delta::Deleted(_)) || is_terminal(delta.object()) {
            let meta = &delta.object().metadata;
            let rs = controller_of(meta)
                .filter(|owner| owner.kind == "ReplicaSet")
                .and_then(|owner| replica_sets.get(&ObjectKey::new(meta.namespace.clone().unwrap_or_default(), &*owner.name)));
            rs.iter().flat_map(|rs| owners_of(&deployments, rs)).for_each(|key| add.add(key));
        }
    });
    Box::pin(async move {
        let Some((client, recorder)) = context.identity("deployment-controller").await else { return };
        let controller = Arc::new(Controller {
            client,
            recorder,
            deployments: context.informers.deployments.clone(),
            replica_sets: context.informers.replica_sets.clone(),
            pods: context.informers.pods.clone(),
        });
        run_workers("deployment", queue, WORKERS, context.cancel.clone(), move |key| {
            let controller = controller.clone();
            async move { controller.sync(&key).await }
        })
        .await;
    })
}

/// The Deployments that a ReplicaSet's change concerns: its owner, or for an orphan all that might adopt it.
fn owners_of(deployments: &Informer<Deployment>, rs: &ReplicaSet) -> Vec<ObjectKey> {
    let namespace = rs.metadata.namespace.clone().unwrap_or_default();
    match controller_of(&rs.metadata) {
        Some(owner) if owner.kind == "Deployment" => vec![ObjectKey::new(namespace, &*owner.name)],
        Some(_) => Vec::new(),
        None => {
            let adopts = |d: &Arc<Deployment>| crate::objects::selects(&d.spec.selector, rs.metadata.labels.as_ref());
            deployments.list_namespace(&namespace).iter().filter(|d| adopts(d)).map(|d| ObjectKey::of(&**d)).collect()
        }
    }
}

impl Controller {
    async fn sync(&self, key: &ObjectKey) -> Result<Requeue, kube::Error> {
        let Some(d) = self.deployments.get(key) else { return Ok(Requeue::No) };
        let owned = self.claim(key, &d).await?;
        let plan = plan(&d, &owned, self.others_pods(key, &d, &owned), Timestamp::now());
        self.apply(&d, plan).await
    }

    /// The ReplicaSets that are this Deployment's, after adoption and release.
    async fn claim(&self, key: &ObjectKey, d: &Deployment) -> Result<Vec<ReplicaSet>, kube::Error> {
        let api: Api<ReplicaSet> = Api::namespaced(self.client.clone(), &key.namespace);
        let mut owned = Vec::new();
        for rs in self.replica_sets.list_namespace(&key.namespace) {
            let wanted = claim(&d.metadata, &d.spec.selector, &rs.metadata);
            if wanted == Claim::Adopt && !self.is_fresh(key, d).await? {
                continue;
            }
            if carry_out(&api, d, &*rs, wanted).await? {
                owned.push((*rs).clone());
            }
        }
        Ok(owned)
    }

    /// Nobody adopts on behalf of an owner that has gone meanwhile.
    async fn is_fresh(&self, key: &ObjectKey, d: &Deployment) -> Result<bool, kube::Error> {
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), &key.namespace);
        let fresh = api.get_opt(&key.name).await?;
        Ok(fresh.is_some_and(|fresh| fresh.metadata.uid == d.metadata.uid && fresh.metadata.deletion_timestamp.is_none()))
    }

    fn others_pods(&self, key: &ObjectKey, d: &Deployment, owned: &[ReplicaSet]) -> bool {
        let uids: Vec<&String> = owned.iter().filter(|rs| !same_template(d, rs)).filter_map(|rs| rs.metadata.uid.as_ref()).collect();
        self.pods
            .list_namespace(&key.namespace)
            .iter()
            .any(|pod| !is_terminal(pod) && controller_of(&pod.metadata).is_some_and(|owner| uids.contains(&&owner.uid)))
    }

    async fn apply(&self, d: &Deployment, plan: Plan) -> Result<Requeue, kube::Error> {
        let mut status = plan.status;
        let mut failed = None;
        for action in plan.actions {
            if let Err(error) = self.act(d, action, &mut status).await {
                failed = Some(error);
                break;
            }
        }
        let annotations = d.metadata.annotations.as_ref();
        let revision_set = plan.revision.is_none() || annotations.and_then(|all| all.get(annotations::REVISION)) == plan.revision.as_ref();
        if d.status.as_ref() != Some(&status) || !revision_set {
            let mut updated = d.clone();
            updated.status = Some(status);
            if let Some(revision) = plan.revision {
                let annotations = updated.metadata.annotations.get_or_insert_default();
                annotations.insert(annotations::REVISION.to_owned(), revision);
            }
            let namespace = d.metadata.namespace.as_deref().unwrap_or_default();
            let api: Api<Deployment> = Api::namespaced(self.client.clone(), namespace);
            let name = d.metadata.name.as_deref().unwrap_or_default();
            api.replace_status(name, &PostParams::default(), &updated).await?;
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(plan.requeue_after.map_or(Requeue::No, Requeue::After)),
        }
    }

    async fn act(
        &self,
        d: &Deployment,
        action: Action,
        status: &mut k8s_openapi::api::apps::v1::DeploymentStatus,
    ) -> Result<(), kube::Error> {
        let namespace = d.metadata.namespace.as_deref().unwrap_or_default();
        let api: Api<ReplicaSet> = Api::namespaced(self.client.clone(), namespace);
        match action {
            Action::Create(rs) => self.create(&api, d, &rs, status).await,
            Action::Update { rs, scaled } => {
                let name = rs.metadata.name.clone().unwrap_or_default();
                api.replace(&name, &PostParams::default(), &rs).await?;
                if let Some((from, to)) = scaled {
                    self.tell_scaling(d, &name, from, to);
                }
                Ok(())
            }
            Action::Delete(name) => match api.delete(&name, &DeleteParams::default()).await {
                Err(kube::Error::Api(answer)) if answer.code == 404 => Ok(()),
                answer => answer.map(drop),
            },
        }
    }

    fn tell_scaling(&self, d: &Deployment, name: &str, from: i32, to: i32) {
        let direction = if from < to { "up" } else { "down" };
        let message = format!("Scaled {direction} replica set {name} from {from} to {to}");
        self.recorder.about(d, EventType::Normal, "ScalingReplicaSet", message);
    }

    async fn create(
        &self,
        api: &Api<ReplicaSet>,
        d: &Deployment,
        rs: &ReplicaSet,
        status: &mut k8s_openapi::api::apps::v1::DeploymentStatus,
    ) -> Result<(), kube::Error> {
        let name = rs.metadata.name.clone().unwrap_or_default();
        let span = Span::start();
        let error = match api.create(&PostParams::default(), rs).await {
            Ok(_) => {
                span.end(d.metadata.uid.as_deref(), "controller.deployment");
                let size = rs.spec.replicas.unwrap_or(0);
                if size > 0 {
                    self.tell_scaling(d, &name, 0, size);
                }
                return Ok(());
            }
            Err(error) => error,
        };
        if let kube::Error::Api(answer) = &error
            && answer.code == 409
        {
            let found = api.get(&name).await?;
            let ours = controller_of(&found.metadata).is_some_and(|owner| Some(&owner.uid) == d.metadata.uid.as_ref());
            if ours && same_template(d, &found) {
                return Ok(());
            }
            // Another template of the same hash: the next try gets another name.
            status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
            return Err(error);
        }
        let message = format!("Failed to create new replica set {name:?}: {error}");
        self.recorder.about(d, EventType::Warning, "ReplicaSetCreateError", message);
        Err(error)
    }
}
