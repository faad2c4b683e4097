//! ConfigMaps and Secrets that a pod refers to, fetched before they are needed so that deciding stays pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, Secret};
use kube::Api;

use crate::model;

/// What was fetched: an object, that it is absent, or why it could not be read.
type Fetched<T> = Result<Option<T>, String>;

/// ConfigMaps and Secrets of one namespace by name.
#[derive(Clone, Debug, Default)]
pub struct Lookup {
    config_maps: BTreeMap<String, Fetched<ConfigMap>>,
    secrets: BTreeMap<String, Fetched<Secret>>,
}

impl Lookup {
    /// One that holds a single Secret.
    #[cfg(test)]
    pub fn of_secret(name: &str, secret: Secret) -> Self {
        Self { secrets: BTreeMap::from([(name.to_owned(), Ok(Some(secret)))]), ..Self::default() }
    }

    /// The ConfigMap; `Ok(None)` when absent and optional. The error text is upstream's.
    pub fn config_map(&self, name: &str, optional: bool) -> Fetched<&ConfigMap> {
        get(&self.config_maps, "configmap", name, optional)
    }

    /// The Secret; `Ok(None)` when absent and optional. The error text is upstream's.
    pub fn secret(&self, name: &str, optional: bool) -> Fetched<&Secret> {
        get(&self.secrets, "secret", name, optional)
    }
}

fn get<'a, T>(objects: &'a BTreeMap<String, Fetched<T>>, kind: &str, name: &str, optional: bool) -> Fetched<&'a T> {
    match objects.get(name) {
        Some(Ok(Some(object))) => Ok(Some(object)),
        Some(Err(error)) => Err(error.clone()),
        Some(Ok(None)) | None if optional => Ok(None),
        Some(Ok(None)) | None => Err(format!("{kind} \"{name}\" not found")),
    }
}

/// Names of objects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// ConfigMaps.
    pub config_maps: BTreeSet<String>,
    /// Secrets.
    pub secrets: BTreeSet<String>,
}

impl Names {
    /// What a container's environment refers to.
    pub fn of_environment(container: &Container) -> Self {
        let mut names = Self::default();
        for source in container.env_from.iter().flatten() {
            names.config_maps.extend(source.config_map_ref.iter().map(|r| r.name.clone()));
            names.secrets.extend(source.secret_ref.iter().map(|r| r.name.clone()));
        }
        let sources = container.env.iter().flatten().filter_map(|e| e.value_from.as_ref());
        for source in sources {
            names.config_maps.extend(source.config_map_key_ref.iter().map(|r| r.name.clone()));
            names.secrets.extend(source.secret_key_ref.iter().map(|r| r.name.clone()));
        }
        names
    }

    /// What the pod's volumes refer to.
    pub fn of_volumes(pod: &Pod) -> Self {
        let mut names = Self::default();
        let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        for volume in volumes {
            names.config_maps.extend(volume.config_map.iter().map(|v| v.name.clone()));
            let secret = volume.secret.iter().filter_map(|v| v.secret_name.clone());
            names.secrets.extend(secret);
            let sources = volume.projected.iter().flat_map(|p| p.sources.iter().flatten());
            for source in sources {
                names.config_maps.extend(source.config_map.iter().map(|v| v.name.clone()));
                names.secrets.extend(source.secret.iter().map(|v| v.name.clone()));
            }
        }
        names
    }

    /// The pod's image pull secrets.
    pub fn of_pull_secrets(pod: &Pod) -> Self {
        let secrets = pod.spec.iter().flat_map(|s| s.image_pull_secrets.iter().flatten());
        Self { config_maps: BTreeSet::new(), secrets: secrets.map(|s| s.name.clone()).filter(|n| !n.is_empty()).collect() }
    }
}

/// Fetches the named objects of the pod's namespace.
pub async fn fetch(client: &kube::Client, pod: &Pod, names: &Names) -> Lookup {
    let namespace = model::namespace(pod);
    let mut lookup = Lookup::default();
    let config_maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    for name in &names.config_maps {
        let got = config_maps.get_opt(name).await.map_err(|e| e.to_string());
        lookup.config_maps.insert(name.clone(), got);
    }
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    for name in &names.secrets {
        let got = secrets.get_opt(name).await.map_err(|e| e.to_string());
        lookup.secrets.insert(name.clone(), got);
    }
    lookup
}
