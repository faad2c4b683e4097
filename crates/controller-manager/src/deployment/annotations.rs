//! The annotations that the deployment controller keeps on ReplicaSets, and the revision on the Deployment
//! (`pkg/controller/deployment/util/deployment_util.go`, 1.37).

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};

/// The revision of a template.
pub const REVISION: &str = "deployment.kubernetes.io/revision";
/// The revisions that a ReplicaSet had before.
pub const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
/// The Deployment's replicas when the ReplicaSet was last scaled.
pub const DESIRED_REPLICAS: &str = "deployment.kubernetes.io/desired-replicas";
/// The same with the surge.
pub const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";

const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED_REPLICAS,
    MAX_REPLICAS,
    "deprecated.deployment.rollback.to",
];
const HISTORY_BYTES_MAX: usize = 2000;

/// A ReplicaSet's revision; 0 where there is none or it is no number.
pub fn revision(rs: &ReplicaSet) -> i64 {
    number(rs, REVISION).unwrap_or(0)
}

/// A number in an annotation.
pub fn number(rs: &ReplicaSet, key: &str) -> Option<i64> {
    rs.metadata.annotations.as_ref()?.get(key)?.parse().ok()
}

/// Sets what an annotation should be; true if it was something else.
fn set(annotations: &mut BTreeMap<String, String>, key: &str, value: &str) -> bool {
    if annotations.get(key).is_some_and(|old| old == value) {
        return false;
    }
    annotations.insert(key.to_owned(), value.to_owned());
    true
}

/// Sets the two replica annotations; true if one changed.
pub fn set_replicas(rs: &mut ReplicaSet, desired: i32, max: i32) -> bool {
    let annotations = rs.metadata.annotations.get_or_insert_default();
    let changed = set(annotations, DESIRED_REPLICAS, &desired.to_string());
    set(annotations, MAX_REPLICAS, &max.to_string()) || changed
}

/// Gives the newest ReplicaSet the Deployment's annotations and its revision; true if one changed.
pub fn set_newest(d: &Deployment, rs: &mut ReplicaSet, new_revision: i64) -> bool {
    let annotations = rs.metadata.annotations.get_or_insert_default();
    let mut changed = false;
    for (key, value) in d.metadata.annotations.iter().flatten() {
        if !NOT_COPIED.contains(&key.as_str()) {
            changed |= set(annotations, key, value);
        }
    }
    let old = annotations.get(REVISION).cloned();
    let old_number = match old.as_deref().map(str::parse::<i64>) {
        // Someone else wrote it; leave it alone.
        Some(Err(_)) => return changed,
        Some(Ok(number)) => number,
        None => 0,
    };
    if old_number >= new_revision {
        return changed;
    }
    annotations.insert(REVISION.to_owned(), new_revision.to_string());
    if let Some(old) = old {
        let history = annotations.get(REVISION_HISTORY).cloned().unwrap_or_default();
        if let Some(history) = longer_history(&history, &old) {
            annotations.insert(REVISION_HISTORY.to_owned(), history);
        }
    }
    true
}

fn longer_history(history: &str, old: &str) -> Option<String> {
    if history.is_empty() {
        return Some(old.to_owned());
    }
    let mut rest = history;
    while rest.len() + old.len() + 1 > HISTORY_BYTES_MAX {
        rest = rest.split_once(',')?.1;
    }
    Some(format!("{rest},{old}"))
}
