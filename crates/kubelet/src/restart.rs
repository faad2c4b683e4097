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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn policies_and_rules() {
        let check = |policy: &str, own: Value, codes: [(i32, bool); 3]| {
            let pod: Pod = serde_json::from_value(json!({"spec": {"restartPolicy": policy, "containers": []}})).expect("a pod");
            let mut container = json!({"name": "c"});
            container.as_object_mut().expect("an object").extend(own.as_object().expect("an object").clone());
            let spec: ContainerSpec = serde_json::from_value(container).expect("a container");
            for (code, expected) in codes {
                assert_eq!(after_exit(&spec, &pod, code), expected, "{policy} {own} {code}");
            }
        };
        check("Always", json!({}), [(0, true), (1, true), (42, true)]);
        check("OnFailure", json!({}), [(0, false), (1, true), (42, true)]);
        check("Never", json!({}), [(0, false), (1, false), (42, false)]);
        check("Never", json!({"restartPolicy": "Always"}), [(0, true), (1, true), (42, true)]);
        check("Always", json!({"restartPolicy": "OnFailure"}), [(0, false), (1, true), (42, true)]);
        let rule = |operator: &str| json!([{"action": "Restart", "exitCodes": {"operator": operator, "values": [42, 0]}}]);
        check("Never", json!({"restartPolicy": "Never", "restartPolicyRules": rule("In")}), [(0, true), (1, false), (42, true)]);
        check("Never", json!({"restartPolicy": "Never", "restartPolicyRules": rule("NotIn")}), [(0, false), (1, true), (42, false)]);
    }
}
