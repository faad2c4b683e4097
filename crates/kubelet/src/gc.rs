//! Which dead containers and sandboxes of a living pod are removed (upstream pkg/kubelet/kuberuntime/kuberuntime_gc.go
//! with its default of one dead container a name, v1.37). Pure.

use std::collections::HashSet;

use crate::model::{PodRuntime, RunState};

/// Ids of all ended containers but the newest of each name.
pub fn dead_containers(seen: &PodRuntime) -> Vec<String> {
    let mut kept = HashSet::new();
    seen.containers
        .iter()
        .filter(|c| matches!(c.state, RunState::Exited | RunState::Created))
        .filter(|c| {
            // A created one beside a newer one of its name failed to start.
            let newest = seen.find(&c.name).is_some_and(|n| n.id == c.id);
            match c.state {
                RunState::Created => !newest,
                _ => !kept.insert(c.name.as_str()),
            }
        })
        .map(|c| c.id.clone())
        .collect()
}

/// Ids of all spent sandboxes but the newest, unless containers of them are kept.
pub fn dead_sandboxes(seen: &PodRuntime) -> Vec<String> {
    let removed: HashSet<String> = dead_containers(seen).into_iter().collect();
    seen.sandboxes
        .iter()
        .skip(1)
        .filter(|s| !s.ready)
        .filter(|s| {
            let mut own = seen.containers.iter().filter(|c| c.sandbox_id == s.id);
            own.all(|c| removed.contains(&c.id))
        })
        .map(|s| s.id.clone())
        .collect()
}
