//! Which kinds the server has: the preferred version of each resource.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{APIGroup, APIResourceList};
use kube::Client;
use kube::core::ApiResource;

/// A kind that the server has.
#[derive(Debug, Clone)]
pub(crate) struct Discovered {
    pub(crate) resource: ApiResource,
    pub(crate) namespaced: bool,
    pub(crate) verbs: Vec<String>,
}

impl Discovered {
    pub(crate) fn can(&self, verb: &str) -> bool {
        self.verbs.iter().any(|can| can == verb)
    }
}

fn collect(list: APIResourceList, found: &mut BTreeMap<(String, String), Discovered>) {
    let (group, version) = match list.group_version.split_once('/') {
        Some((group, version)) => (group.to_owned(), version.to_owned()),
        None => (String::new(), list.group_version.clone()),
    };
    for resource in list.resources {
        if resource.name.contains('/') {
            continue;
        }
        let discovered = Discovered {
            resource: ApiResource {
                group: group.clone(),
                version: version.clone(),
                api_version: list.group_version.clone(),
                kind: resource.kind,
                plural: resource.name.clone(),
            },
            namespaced: resource.namespaced,
            verbs: resource.verbs,
        };
        // Versions come in the order of preference.
        found.entry((group.clone(), resource.name)).or_insert(discovered);
    }
}

/// All kinds, and what could not be found out.
pub(crate) async fn discover(client: &Client) -> (Vec<Discovered>, Vec<String>) {
    let mut found = BTreeMap::new();
    let mut errors = Vec::new();
    match client.list_core_api_versions().await {
        Ok(versions) => {
            for version in versions.versions {
                match client.list_core_api_resources(&version).await {
                    Ok(list) => collect(list, &mut found),
                    Err(error) => errors.push(format!("{version}: {error}")),
                }
            }
        }
        Err(error) => errors.push(format!("/api: {error}")),
    }
    match client.list_api_groups().await {
        Ok(groups) => {
            for group in groups.groups {
                for version in versions(group) {
                    match client.list_api_group_resources(&version).await {
                        Ok(list) => collect(list, &mut found),
                        Err(error) => errors.push(format!("{version}: {error}")),
                    }
                }
            }
        }
        Err(error) => errors.push(format!("/apis: {error}")),
    }
    (found.into_values().collect(), errors)
}

/// A group's versions, the preferred one first.
fn versions(group: APIGroup) -> Vec<String> {
    let preferred = group.preferred_version.map(|version| version.group_version);
    let mut versions: Vec<String> = group.versions.into_iter().map(|version| version.group_version).collect();
    versions.sort_by_key(|version| Some(version) != preferred.as_ref());
    versions
}
