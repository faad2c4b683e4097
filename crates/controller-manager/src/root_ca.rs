//! Publishes the cluster's root certificate in each namespace, as the ConfigMap `kube-root-ca.crt`.

use std::sync::Arc;

use client::{ObjectKey, Requeue, WorkQueue, run_workers};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::{ObjectMeta, PostParams};

use crate::context::{Context, Starting};
use crate::service_account::is_alive;

/// The ConfigMap's name.
pub(crate) const NAME: &str = "kube-root-ca.crt";
const KEY: &str = "ca.crt";
const DESCRIPTION: &str = "kubernetes.io/description";
const DESCRIPTION_TEXT: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of Kubernetes clusters.";

/// What to do about one namespace's ConfigMap.
#[derive(Debug, PartialEq)]
enum Plan {
    Nothing,
    Create(Box<ConfigMap>),
    Replace(Box<ConfigMap>),
}

fn plan(namespace: &str, alive: bool, found: Option<&ConfigMap>, root_ca: &str) -> Plan {
    if !alive {
        return Plan::Nothing;
    }
    let data = Some([(KEY.to_owned(), root_ca.to_owned())].into());
    let Some(found) = found else {
        return Plan::Create(Box::new(ConfigMap {
            metadata: ObjectMeta {
                name: Some(NAME.to_owned()),
                namespace: Some(namespace.to_owned()),
                annotations: Some([(DESCRIPTION.to_owned(), DESCRIPTION_TEXT.to_owned())].into()),
                ..ObjectMeta::default()
            },
            data,
            ..ConfigMap::default()
        }));
    };
    let described = found.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(DESCRIPTION));
    if found.data == data && described {
        return Plan::Nothing;
    }
    let mut replaced = found.clone();
    replaced.data = data;
    replaced.binary_data = None;
    replaced.metadata.annotations.get_or_insert_default().insert(DESCRIPTION.to_owned(), DESCRIPTION_TEXT.to_owned());
    Plan::Replace(Box::new(replaced))
}

/// Registers with the informers; the answer runs the controller.
pub(crate) fn start(context: Arc<Context>, root_ca: String) -> Starting {
    let queue = WorkQueue::<ObjectKey>::default();
    let add = queue.clone();
    context.informers.namespaces.on_change(move |delta| add.add(ObjectKey::of(&**delta.object())));
    let add = queue.clone();
    context.informers.root_ca_config_maps.on_change(move |delta| {
        add.add(ObjectKey::new("", delta.object().metadata.namespace.clone().unwrap_or_default()));
    });
    Box::pin(async move {
        let Some((client, _)) = context.identity("root-ca-cert-publisher").await else { return };
        let (namespaces, config_maps) = (context.informers.namespaces.clone(), context.informers.root_ca_config_maps.clone());
        let root_ca: Arc<str> = root_ca.into();
        run_workers("root-ca-certificate-publisher", queue, 1, context.cancel.clone(), move |key: ObjectKey| {
            let alive = namespaces.get(&key).is_some_and(|namespace| is_alive(&namespace));
            let found = config_maps.get(&ObjectKey::new(&*key.name, NAME));
            let plan = plan(&key.name, alive, found.as_deref(), &root_ca);
            let api: Api<ConfigMap> = Api::namespaced(client.clone(), &key.name);
            async move {
                let answer = match &plan {
                    Plan::Nothing => return Ok(Requeue::No),
                    Plan::Create(made) => api.create(&PostParams::default(), made).await,
                    Plan::Replace(made) => api.replace(NAME, &PostParams::default(), made).await,
                };
                match answer {
                    // The namespace has begun to go.
                    Err(kube::Error::Api(answer)) if matches!(answer.code, 403 | 404) => Ok(Requeue::No),
                    answer => answer.map(|_| Requeue::No),
                }
            }
        })
        .await;
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_mended_and_left_alone() {
        let Plan::Create(made) = plan("a", true, None, "PEM") else { panic!("there is none") };
        assert_eq!(plan("a", true, Some(&made), "PEM"), Plan::Nothing);
        assert!(matches!(plan("a", true, Some(&made), "NEW"), Plan::Replace(_)));
        assert_eq!(plan("a", false, None, "PEM"), Plan::Nothing);
    }
}
