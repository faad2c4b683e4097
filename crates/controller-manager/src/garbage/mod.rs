//! Garbage collection: deletes what has lost all its owners, and carries out foreground and orphan deletion.
//!
//! One metadata watch for each kind that can be listed, watched and deleted feeds the [`graph`]; discovery is asked
//! again every 30 s.

mod graph;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use client::{Delta, Informer, Requeue, WorkQueue, run_workers};
use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions, PropagationPolicy};
use kube::core::{ApiResource, DynamicObject, PartialObjectMeta};
use kube::runtime::watcher;
use kube::{Api, Client};
use tokio_util::sync::CancellationToken;

use self::graph::{FOREGROUND, Graph, ORPHAN, Object, Owner, Plan, plan};
use crate::context::{Context, Starting};
use crate::discovery::{Discovered, discover};

const WORKERS: usize = 20;
const DISCOVERY_PERIOD: Duration = Duration::from_secs(30);
/// How soon an object whose owner's kind is unknown is looked at again.
const UNKNOWN_KIND_RETRY: Duration = Duration::from_secs(30);
/// Kinds whose objects come and go by themselves and own nothing (upstream's ignored resources).
const IGNORED: [&str; 2] = ["events", "events.events.k8s.io"];

/// What the collector knows.
#[derive(Default)]
struct State {
    graph: Mutex<Graph>,
    /// Kinds by API version and kind, namespaced or not.
    kinds: Mutex<HashMap<(String, String), (ApiResource, bool)>>,
}

impl State {
    fn graph(&self) -> MutexGuard<'_, Graph> {
        // Each change of the graph is complete before anything can panic.
        self.graph.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kind(&self, api_version: &str, kind: &str) -> Option<(ApiResource, bool)> {
        let kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let exact = kinds.get(&(api_version.to_owned(), kind.to_owned())).cloned();
        // An owner may be named by a version that is not the preferred one.
        let group = |version: &str| version.split_once('/').map_or(String::new(), |(group, _)| group.to_owned());
        exact.or_else(|| {
            let same = |(found, name): &(&(String, String), &(ApiResource, bool))| {
                found.1 == kind && group(&found.0) == group(api_version) && !name.0.plural.is_empty()
            };
            kinds.iter().find(same).map(|(_, found)| found.clone())
        })
    }
}

/// The answer runs the controller.
pub(crate) fn start(context: Arc<Context>) -> Starting {
    Box::pin(async move {
        let Some((client, _)) = context.identity("generic-garbage-collector").await else { return };
        let state = Arc::new(State::default());
        let queue = WorkQueue::<String>::default();
        let watches = watch_all(client.clone(), state.clone(), queue.clone(), context.cancel.clone());
        let cancel = context.cancel.clone();
        let work = run_workers("garbage-collector", queue.clone(), WORKERS, cancel, move |uid: String| {
            let (client, state, queue) = (client.clone(), state.clone(), queue.clone());
            async move { sync(&client, &state, &queue, &uid).await }
        });
        futures::join!(watches, work);
    })
}

/// Keeps a watch on each kind; looks for new kinds, and for kinds that are gone.
async fn watch_all(client: Client, state: Arc<State>, queue: WorkQueue<String>, cancel: CancellationToken) {
    let mut watches: HashMap<(String, String), CancellationToken> = HashMap::new();
    let tasks = tokio_util::task::TaskTracker::new();
    loop {
        let (found, errors) = discover(&client).await;
        let complete = errors.is_empty();
        for error in errors {
            tracing::debug!(error, "discovery is incomplete");
        }
        {
            let mut kinds = state.kinds.lock().unwrap_or_else(PoisonError::into_inner);
            for Discovered { resource, namespaced, .. } in &found {
                let key = (resource.api_version.clone(), resource.kind.clone());
                kinds.insert(key, (resource.clone(), *namespaced));
            }
        }
        let collected = |found: &&Discovered| {
            let name = format!("{}.{}", found.resource.plural, found.resource.group);
            ["list", "watch", "delete"].iter().all(|verb| found.can(verb)) && !IGNORED.contains(&name.trim_end_matches('.'))
        };
        let wanted: Vec<&Discovered> = found.iter().filter(collected).collect();
        let key = |resource: &ApiResource| (resource.group.clone(), resource.plural.clone());
        if complete {
            watches.retain(|watched, stop| {
                let stays = wanted.iter().any(|found| key(&found.resource) == *watched);
                if !stays {
                    stop.cancel();
                }
                stays
            });
        }
        for discovered in wanted {
            watches.entry(key(&discovered.resource)).or_insert_with(|| {
                let stop = cancel.child_token();
                let resource = discovered.resource.clone();
                tasks.spawn(watch_kind(client.clone(), resource, state.clone(), queue.clone(), stop.clone()));
                stop
            });
        }
        tokio::select! {
            () = cancel.cancelled() => break,
            () = tokio::time::sleep(DISCOVERY_PERIOD) => {}
        }
    }
    tasks.close();
    tasks.wait().await;
}

async fn watch_kind(client: Client, resource: ApiResource, state: Arc<State>, queue: WorkQueue<String>, cancel: CancellationToken) {
    let informer = Informer::<PartialObjectMeta<DynamicObject>>::new();
    let kind = resource.clone();
    informer.on_change(move |delta| {
        let mut graph = state.graph();
        // One name may have had another object before: that one is gone.
        let old = delta.before().and_then(|before| before.metadata.uid.clone());
        let new = delta.object().metadata.uid.clone().unwrap_or_default();
        let mut look = Vec::new();
        if let Some(old) = old.filter(|old| *old != new) {
            look.extend(graph.remove(&old));
        }
        if matches!(delta, Delta::Deleted(_)) {
            look.extend(graph.remove(&new));
        } else {
            let meta = slim(&delta.object().metadata);
            look.extend(graph.set(Object { resource: kind.clone(), meta }));
        }
        drop(graph);
        look.into_iter().for_each(|uid| queue.add(uid));
    });
    let api: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(client, &resource);
    let events = watcher(api, watcher::Config::default()).boxed();
    informer.run_stream(&resource.plural, events, cancel).await;
}

/// What the graph needs of an object's metadata.
fn slim(meta: &ObjectMeta) -> ObjectMeta {
    ObjectMeta {
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        uid: meta.uid.clone(),
        owner_references: meta.owner_references.clone(),
        finalizers: meta.finalizers.clone(),
        deletion_timestamp: meta.deletion_timestamp.clone(),
        ..ObjectMeta::default()
    }
}

fn api_of(client: &Client, resource: &ApiResource, namespace: Option<&str>) -> Api<DynamicObject> {
    match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, resource),
        None => Api::all_with(client.clone(), resource),
    }
}

async fn sync(client: &Client, state: &State, queue: &WorkQueue<String>, uid: &str) -> Result<Requeue, kube::Error> {
    let Some(known) = state.graph().get(uid).cloned() else { return Ok(Requeue::No) };
    let api = api_of(client, &known.resource, known.meta.namespace.as_deref());
    let name = known.meta.name.clone().unwrap_or_default();
    // Decisions are made on the object as it is, not as it was seen.
    let live = match api.get_metadata_opt(&name).await? {
        Some(live) if live.metadata.uid.as_deref() == Some(uid) => live,
        _ => {
            let look = state.graph().remove(uid);
            look.into_iter().for_each(|uid| queue.add(uid));
            return Ok(Requeue::No);
        }
    };
    let mut owners: HashMap<String, Owner> = HashMap::new();
    for reference in live.metadata.owner_references.iter().flatten() {
        let Some(owner) = look_up(client, state, &live.metadata, reference).await? else {
            tracing::debug!(uid, kind = reference.kind, "an owner's kind is unknown; keeping its dependent");
            return Ok(Requeue::After(UNKNOWN_KIND_RETRY));
        };
        owners.insert(reference.uid.clone(), owner);
    }
    let object = Object { resource: known.resource, meta: live.metadata };
    let decided = {
        let graph = state.graph();
        plan(&graph, uid, &object, |reference| owners.get(&reference.uid).copied().unwrap_or(Owner::Solid))
    };
    apply(client, state, queue, uid, &object, decided).await
}

/// What is known of an owner: from the graph, else from the server. `None`: its kind is unknown.
async fn look_up(client: &Client, state: &State, dependent: &ObjectMeta, reference: &OwnerReference) -> Result<Option<Owner>, kube::Error> {
    let judge = |object: &Object| if object.deletes_dependents() { Owner::Waiting } else { Owner::Solid };
    let seen = state.graph().get(&reference.uid).map(|object| (judge(object), object.meta.namespace.clone()));
    if let Some((owner, namespace)) = seen {
        // An owner in another namespace is none.
        let same = namespace.is_none() || namespace == dependent.namespace;
        return Ok(Some(if same { owner } else { Owner::Dangling }));
    }
    let Some((resource, namespaced)) = state.kind(&reference.api_version, &reference.kind) else { return Ok(None) };
    if namespaced && dependent.namespace.is_none() {
        return Ok(Some(Owner::Dangling));
    }
    let api = api_of(client, &resource, dependent.namespace.as_deref().filter(|_| namespaced));
    let live = api.get_metadata_opt(&reference.name).await?;
    let live = live.filter(|live| live.metadata.uid.as_deref() == Some(&reference.uid));
    Ok(Some(live.map_or(Owner::Dangling, |live| judge(&Object { resource, meta: live.metadata }))))
}

async fn apply(
    client: &Client,
    state: &State,
    queue: &WorkQueue<String>,
    uid: &str,
    object: &Object,
    decided: Plan,
) -> Result<Requeue, kube::Error> {
    match decided {
        Plan::Keep => {}
        Plan::DropOwners(gone) => drop_owners(client, object, &gone).await?,
        Plan::LookAtDependents(uids) => uids.into_iter().for_each(|uid| queue.add(uid)),
        Plan::FinishForeground => drop_finalizer(client, object, FOREGROUND).await?,
        Plan::Delete { policy } => delete(client, object, policy).await?,
        Plan::DeleteForeground { unblock } => {
            if unblock {
                let dependents: Vec<Object> = state.graph().dependents(uid).map(|(_, dependent)| dependent.clone()).collect();
                for dependent in dependents {
                    unblock_owner(client, &dependent, uid).await?;
                }
            }
            delete(client, object, "Foreground").await?;
        }
        Plan::Orphan => {
            let dependents: Vec<Object> = state.graph().dependents(uid).map(|(_, dependent)| dependent.clone()).collect();
            for dependent in dependents {
                drop_owners(client, &dependent, &[uid.to_owned()]).await?;
            }
            drop_finalizer(client, object, ORPHAN).await?;
        }
    }
    Ok(Requeue::No)
}

async fn delete(client: &Client, object: &Object, policy: &str) -> Result<(), kube::Error> {
    let params = DeleteParams {
        propagation_policy: Some(match policy {
            "Foreground" => PropagationPolicy::Foreground,
            "Orphan" => PropagationPolicy::Orphan,
            _ => PropagationPolicy::Background,
        }),
        preconditions: Some(Preconditions { uid: object.meta.uid.clone(), resource_version: object.meta.resource_version.clone() }),
        ..DeleteParams::default()
    };
    let api = api_of(client, &object.resource, object.meta.namespace.as_deref());
    match api.delete(object.meta.name.as_deref().unwrap_or_default(), &params).await {
        Err(kube::Error::Api(answer)) if answer.code == 404 => Ok(()),
        answer => answer.map(drop),
    }
}

/// Writes the metadata that `change` makes of an object as it is now; nothing when it is gone.
async fn patch_metadata(client: &Client, object: &Object, change: impl Fn(&ObjectMeta) -> serde_json::Value) -> Result<(), kube::Error> {
    let api = api_of(client, &object.resource, object.meta.namespace.as_deref());
    let name = object.meta.name.as_deref().unwrap_or_default();
    let Some(live) = api.get_metadata_opt(name).await? else { return Ok(()) };
    if live.metadata.uid != object.meta.uid {
        return Ok(());
    }
    let mut meta = change(&live.metadata);
    meta["resourceVersion"] = serde_json::json!(live.metadata.resource_version);
    meta["uid"] = serde_json::json!(live.metadata.uid);
    let patch = serde_json::json!({"metadata": meta});
    match api.patch_metadata(name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Err(kube::Error::Api(answer)) if answer.code == 404 => Ok(()),
        answer => answer.map(drop),
    }
}

async fn drop_owners(client: &Client, object: &Object, gone: &[String]) -> Result<(), kube::Error> {
    patch_metadata(client, object, |live| {
        let owners = live.owner_references.iter().flatten();
        let left: Vec<&OwnerReference> = owners.filter(|owner| !gone.contains(&owner.uid)).collect();
        serde_json::json!({"ownerReferences": left})
    })
    .await
}

async fn unblock_owner(client: &Client, object: &Object, uid: &str) -> Result<(), kube::Error> {
    patch_metadata(client, object, |live| {
        let mut owners = live.owner_references.clone().unwrap_or_default();
        owners.iter_mut().filter(|owner| owner.uid == uid).for_each(|owner| owner.block_owner_deletion = Some(false));
        serde_json::json!({"ownerReferences": owners})
    })
    .await
}

async fn drop_finalizer(client: &Client, object: &Object, name: &str) -> Result<(), kube::Error> {
    patch_metadata(client, object, |live| {
        let finalizers = live.finalizers.iter().flatten();
        let left: Vec<&String> = finalizers.filter(|finalizer| *finalizer != name).collect();
        serde_json::json!({"finalizers": left})
    })
    .await
}
