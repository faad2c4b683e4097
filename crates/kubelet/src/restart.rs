//! Restart policies: the pod's, the container's own and its rules
//! (upstream pkg/api/v1/pod `ContainerShouldRestart`, v1.37).

use k8s_openapi::api::core::v1::{Container as ContainerSpec, Pod};

use crate::model::{PodRuntime, RunState};

/// The pod's restart policy; `Always` when unset.
pub fn pod_policy(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|s| s.restart_policy.as_deref()).unwrap_or("Always")
}

/// True when a container that ended with `exit_code` is to be started again.
pub fn after_exit(container: &ContainerSpec, pod: &Pod, exit_code: i32) -> bool {
    let policy = match container.restart_policy.as_deref() {
        Some(own) => {
            if let Some(restart) = matching_rule(container, exit_code) {
                return restart;
            }
            own
        }
        None => pod_policy(pod),
    };
    match policy {
        "Always" => true,
        "OnFailure" => exit_code != 0,
        _ => false,
    }
}

/// True when a container that is killed while running (probe) is to be started again.
pub fn after_kill(container: &ContainerSpec, pod: &Pod) -> bool {
    container.restart_policy.as_deref().unwrap_or_else(|| pod_policy(pod)) != "Never"
}

/// True when the container is absent or ended and its policy wants it running.
pub fn wanted(container: &ContainerSpec, pod: &Pod, runtime: &PodRuntime) -> bool {
    if pod.metadata.deletion_timestamp.is_some() {
        return false;
    }
    match runtime.find(&container.name) {
        None => true,
        Some(status) => match status.state {
            RunState::Running => false,
            RunState::Created | RunState::Unknown => true,
            RunState::Exited => after_exit(container, pod, status.exit_code),
        },
    }
}

/// What the first matching rule says; `None` when no rule matches.
fn matching_rule(container: &ContainerSpec, exit_code: i32) -> Option<bool> {
    let rules = container.restart_policy_rules.as_ref()?;
    rules.iter().find_map(|rule| {
        let codes = rule.exit_codes.as_ref()?;
        let listed = codes.values.as_ref().is_some_and(|v| v.contains(&exit_code));
        let matches = match codes.operator.as_str() {
            "In" => listed,
            "NotIn" => !listed,
            _ => false,
        };
        matches.then_some(rule.action == "Restart")
    })
}
