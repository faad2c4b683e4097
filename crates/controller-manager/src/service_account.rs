//! Keeps a ServiceAccount `default` in each namespace.

use std::sync::Arc;

use client::{ObjectKey, Requeue, WorkQueue, run_workers};
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::Api;
use kube::api::{ObjectMeta, PostParams};

use crate::context::{Context, Starting};

/// The accounts that each namespace has.
const NAMES: [&str; 1] = ["default"];

/// Whether a namespace is there to stay.
pub(crate) fn is_alive(namespace: &Namespace) -> bool {
    namespace.metadata.deletion_timestamp.is_none()
        && namespace.status.as_ref().and_then(|status| status.phase.as_deref()) != Some("Terminating")
}

/// The accounts that a namespace lacks. Pure.
fn missing(namespace: Option<&Namespace>, has: impl Fn(&str) -> bool) -> Vec<&'static str> {
    match namespace {
        Some(namespace) if is_alive(namespace) => NAMES.into_iter().filter(|name| !has(name)).collect(),
        _ => Vec::new(),
    }
}

/// Registers with the informers; the answer runs the controller.
pub(crate) fn start(context: Arc<Context>) -> Starting {
    let queue = WorkQueue::<ObjectKey>::default();
    let add = queue.clone();
    context.informers.namespaces.on_change(move |delta| add.add(ObjectKey::of(&**delta.object())));
    let add = queue.clone();
    context.informers.service_accounts.on_change(move |delta| {
        if let client::Delta::Deleted(account) = delta {
            add.add(ObjectKey::new("", account.metadata.namespace.clone().unwrap_or_default()));
        }
    });
    Box::pin(async move {
        let Some((client, _)) = context.identity("service-account-controller").await else { return };
        let (namespaces, accounts) = (context.informers.namespaces.clone(), context.informers.service_accounts.clone());
        run_workers("serviceaccount", queue, 1, context.cancel.clone(), move |key: ObjectKey| {
            let (client, namespaces, accounts) = (client.clone(), namespaces.clone(), accounts.clone());
            async move {
                let has = |name: &str| accounts.get(&ObjectKey::new(&*key.name, name)).is_some();
                let api: Api<ServiceAccount> = Api::namespaced(client, &key.name);
                for name in missing(namespaces.get(&key).as_deref(), has) {
                    let account = ServiceAccount {
                        metadata: ObjectMeta { name: Some(name.to_owned()), namespace: Some(key.name.clone()), ..ObjectMeta::default() },
                        ..ServiceAccount::default()
                    };
                    match api.create(&PostParams::default(), &account).await {
                        // There already, or the namespace has begun to go.
                        Err(kube::Error::Api(answer)) if matches!(answer.code, 403 | 409) => {}
                        answer => _ = answer?,
                    }
                }
                Ok::<_, kube::Error>(Requeue::No)
            }
        })
        .await;
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_live_namespaces_lack_one() {
        let namespace = |phase: &str| -> Namespace {
            serde_json::from_value(serde_json::json!({"metadata": {"name": "a"}, "status": {"phase": phase}})).expect("ns")
        };
        assert_eq!(missing(Some(&namespace("Active")), |_| false), ["default"]);
        assert!(missing(Some(&namespace("Active")), |_| true).is_empty());
        assert!(missing(Some(&namespace("Terminating")), |_| false).is_empty());
        assert!(missing(None, |_| false).is_empty());
    }
}
