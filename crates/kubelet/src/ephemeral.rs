//! Ephemeral containers (`kubectl debug`) as ordinary container specs.

use k8s_openapi::api::core::v1::{Container, Pod};

/// The pod's ephemeral containers; all their fields but `targetContainerName` are a container's.
pub fn containers(pod: &Pod) -> Vec<Container> {
    let ephemeral = pod.spec.iter().flat_map(|s| s.ephemeral_containers.iter().flatten());
    ephemeral.filter_map(|c| serde_json::from_value(serde_json::to_value(c).ok()?).ok()).collect()
}

/// The container whose PID namespace the ephemeral container joins.
pub fn target_name<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    let ephemeral = pod.spec.iter().flat_map(|s| s.ephemeral_containers.iter().flatten());
    ephemeral.filter(|c| c.name == name).find_map(|c| c.target_container_name.as_deref()).filter(|target| !target.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn its_fields_are_a_containers() {
        let plain = json!({"name": "debug", "image": "i", "imagePullPolicy": "Never", "args": ["a"], "command": ["c"], "workingDir": "/w",
            "env": [{"name": "E", "value": "v"}], "envFrom": [{"prefix": "P", "configMapRef": {"name": "m"}}],
            "securityContext": {"runAsUser": 7}, "stdin": true, "stdinOnce": true, "tty": true, "terminationMessagePath": "/t",
            "terminationMessagePolicy": "File", "volumeMounts": [{"name": "v", "mountPath": "/v", "readOnly": true}]});
        let mut ephemeral = plain.clone();
        ephemeral["targetContainerName"] = json!("app");
        let pod: Pod =
            serde_json::from_value(json!({"spec": {"containers": [{"name": "app"}], "ephemeralContainers": [ephemeral]}})).expect("a pod");
        let made = containers(&pod);
        assert_eq!(serde_json::to_value(&made[0]).expect("JSON"), plain);
        assert_eq!(target_name(&pod, "debug"), Some("app"));
        assert_eq!(target_name(&pod, "app"), None);
    }
}
