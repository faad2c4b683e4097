//! Empties a namespace that is being deleted, then lets it go.
//!
//! ```text
//! Terminating ─> delete all of each deletable kind (discovery) ─> something left ─> status says what; look again
//!                                                              └> nothing left ──> finalizer `kubernetes` taken off
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use client::{ObjectKey, Requeue, WorkQueue, run_workers};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition};
use kube::api::{DeleteParams, ListParams, PartialObjectMeta, PostParams};
use kube::core::{ApiResource, DynamicObject};
use kube::{Api, Client};

use crate::context::{Context, Starting};
use crate::discovery::{Discovered, discover};
use crate::objects::wire_time;

const FINALIZER: &str = "kubernetes";
const WORKERS: usize = 5;
/// How soon a namespace with something left is looked at again.
const RETRY: Duration = Duration::from_secs(1);
/// Pods end within their grace period; looking more often than this is no use.
const RETRY_MAX: Duration = Duration::from_secs(15);

/// What was found of one kind.
#[derive(Debug, Default, Clone, PartialEq)]
struct Found {
    /// Number of objects left of each kind.
    left: BTreeMap<String, usize>,
    /// Number of objects held by each finalizer.
    finalizers: BTreeMap<String, usize>,
    discovery_errors: Vec<String>,
    deletion_errors: Vec<String>,
}

/// The conditions of a namespace that is being deleted. Pure.
fn conditions(found: &Found, old: &[NamespaceCondition], now: Timestamp) -> Vec<NamespaceCondition> {
    let list = |map: &BTreeMap<String, usize>, each: &dyn Fn(&String, &usize) -> String| {
        map.iter().map(|(name, count)| each(name, count)).collect::<Vec<_>>().join(", ")
    };
    let (discovery, deletion) = (found.discovery_errors.join("; "), found.deletion_errors.join("; "));
    let left = list(&found.left, &|kind, count| format!("{kind} has {count} resource instances"));
    let held = list(&found.finalizers, &|name, count| format!("{name} in {count} resource instances"));
    let table = [
        (
            "NamespaceDeletionDiscoveryFailure",
            discovery.is_empty(),
            "ResourcesDiscovered",
            "All resources successfully discovered",
            "DiscoveryFailed",
            discovery,
        ),
        (
            "NamespaceDeletionGroupVersionParsingFailure",
            true,
            "ParsedGroupVersions",
            "All legacy kube types successfully parsed",
            "",
            String::new(),
        ),
        (
            "NamespaceDeletionContentFailure",
            deletion.is_empty(),
            "ContentDeleted",
            "All content successfully deleted, may be waiting on finalization",
            "ContentDeletionFailed",
            deletion,
        ),
        (
            "NamespaceContentRemaining",
            found.left.is_empty(),
            "ContentRemoved",
            "All content successfully removed",
            "SomeResourcesRemain",
            format!("Some resources are remaining: {left}"),
        ),
        (
            "NamespaceFinalizersRemaining",
            found.finalizers.is_empty(),
            "ContentHasNoFinalizers",
            "All content-preserving finalizers finished",
            "SomeFinalizersRemain",
            format!("Some content in the namespace has finalizers remaining: {held}"),
        ),
    ];
    let made = table.map(|(kind, fine, fine_reason, fine_message, reason, message)| {
        let status = if fine { "False" } else { "True" };
        let since = old.iter().find(|c| c.type_ == kind && c.status == status).and_then(|c| c.last_transition_time.clone());
        NamespaceCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(if fine { fine_reason } else { reason }.to_owned()),
            message: Some(if fine { fine_message.to_owned() } else { message }),
            last_transition_time: Some(since.unwrap_or_else(|| wire_time(now))),
        }
    });
    let others = old.iter().filter(|c| !made.iter().any(|new| new.type_ == c.type_)).cloned();
    others.chain(made.iter().cloned()).collect()
}

/// Registers with the informers; the answer runs the controller.
pub(crate) fn start(context: Arc<Context>) -> Starting {
    let queue = WorkQueue::<ObjectKey>::default();
    let add = queue.clone();
    context.informers.namespaces.on_change(move |delta| {
        if delta.object().metadata.deletion_timestamp.is_some() {
            add.add(ObjectKey::of(&**delta.object()));
        }
    });
    Box::pin(async move {
        let Some((client, _)) = context.identity("namespace-controller").await else { return };
        let namespaces = context.informers.namespaces.clone();
        run_workers("namespace", queue, WORKERS, context.cancel.clone(), move |key: ObjectKey| {
            let (client, namespace) = (client.clone(), namespaces.get(&key));
            async move {
                match namespace {
                    Some(namespace) if namespace.metadata.deletion_timestamp.is_some() => sync(&client, &namespace).await,
                    _ => Ok(Requeue::No),
                }
            }
        })
        .await;
    })
}

async fn sync(client: &Client, namespace: &Namespace) -> Result<Requeue, kube::Error> {
    let name = namespace.metadata.name.as_deref().unwrap_or_default();
    let finalizers = namespace.spec.as_ref().and_then(|spec| spec.finalizers.clone()).unwrap_or_default();
    if finalizers.is_empty() {
        return Ok(Requeue::No);
    }
    let api: Api<Namespace> = Api::all(client.clone());
    let mut current = namespace.clone();
    let status = current.status.get_or_insert_default();
    if status.phase.as_deref() != Some("Terminating") {
        status.phase = Some("Terminating".to_owned());
        match api.replace_status(name, &PostParams::default(), &current).await {
            // Whoever changed or finished it wakes us again.
            Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => return Ok(Requeue::After(RETRY)),
            answer => current = answer?,
        }
    }
    let found = empty(client, name).await;
    if found == Found::default() {
        return finalize(client, current, finalizers).await;
    }
    let old = current.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let new = conditions(&found, &old, Timestamp::now());
    if new != old {
        current.status.get_or_insert_default().conditions = Some(new);
        match api.replace_status(name, &PostParams::default(), &current).await {
            Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 409) => {}
            answer => _ = answer?,
        }
    }
    let age = namespace.metadata.deletion_timestamp.as_ref().map(|time| Timestamp::now().duration_since(time.0));
    let age = age.and_then(|age| Duration::try_from(age).ok()).unwrap_or_default();
    Ok(Requeue::After((age / 4).clamp(RETRY, RETRY_MAX)))
}

/// Takes our finalizer off; the server removes the namespace with the last one.
async fn finalize(client: &Client, mut namespace: Namespace, finalizers: Vec<String>) -> Result<Requeue, kube::Error> {
    let name = namespace.metadata.name.clone().unwrap_or_default();
    let left = finalizers.into_iter().filter(|finalizer| finalizer != FINALIZER).collect();
    namespace.spec.get_or_insert_default().finalizers = Some(left);
    let api: Api<Namespace> = Api::all(client.clone());
    match api.replace_subresource("finalize", &name, &PostParams::default(), &namespace).await {
        Err(kube::Error::Api(answer)) if answer.code == 404 => Ok(Requeue::No),
        answer => answer.map(|_| Requeue::No),
    }
}

/// Deletes everything of a namespace; answers what is left of it.
async fn empty(client: &Client, namespace: &str) -> Found {
    let mut found = Found::default();
    let (resources, errors) = discover(client).await;
    found.discovery_errors = errors;
    let mut resources: Vec<Discovered> = resources.into_iter().filter(|found| found.namespaced && found.can("delete")).collect();
    // Pods last: their owners must not make them anew.
    resources.sort_by_key(|found| found.resource.kind == "Pod");
    for discovered in resources {
        let resource = &discovered.resource;
        if let Err(error) = empty_one(client, namespace, &discovered, &mut found).await {
            found.deletion_errors.push(format!("failed to delete {}: {error}", resource.plural));
        }
    }
    found
}

async fn empty_one(client: &Client, namespace: &str, discovered: &Discovered, found: &mut Found) -> Result<(), kube::Error> {
    let resource: &ApiResource = &discovered.resource;
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, resource);
    let delete = DeleteParams::background();
    if discovered.can("deletecollection") {
        match api.delete_collection(&delete, &ListParams::default()).await {
            Err(kube::Error::Api(answer)) if matches!(answer.code, 404 | 405) => {}
            answer => _ = answer?,
        }
    }
    let left = api.list_metadata(&ListParams::default()).await?.items;
    if !discovered.can("deletecollection") {
        for object in left.iter().filter(|object| object.metadata.deletion_timestamp.is_none()) {
            match api.delete(object.metadata.name.as_deref().unwrap_or_default(), &delete).await {
                Err(kube::Error::Api(answer)) if answer.code == 404 => {}
                answer => _ = answer?,
            }
        }
    }
    count(&left, discovered, found);
    Ok(())
}

fn count(left: &[PartialObjectMeta<DynamicObject>], discovered: &Discovered, found: &mut Found) {
    if left.is_empty() {
        return;
    }
    let resource = &discovered.resource;
    let name = if resource.group.is_empty() { format!("{}.", resource.plural) } else { format!("{}.{}", resource.plural, resource.group) };
    *found.left.entry(name).or_default() += left.len();
    for finalizer in left.iter().flat_map(|object| object.metadata.finalizers.iter().flatten()) {
        *found.finalizers.entry(finalizer.clone()).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_say_what_is_left() {
        let mut found = Found::default();
        found.left.insert("pods.".to_owned(), 2);
        let now = Timestamp::from_second(1000).expect("time");
        let made = conditions(&found, &[], now);
        let remaining = made.iter().find(|c| c.type_ == "NamespaceContentRemaining").expect("there");
        assert_eq!(remaining.status, "True");
        assert_eq!(remaining.message.as_deref(), Some("Some resources are remaining: pods. has 2 resource instances"));
        assert_eq!(made.iter().filter(|c| c.status == "True").count(), 1);
        let later = Timestamp::from_second(2000).expect("time");
        assert_eq!(conditions(&found, &made, later), made, "times stay while nothing changes");
    }
}
