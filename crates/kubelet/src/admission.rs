//! Whether the node takes a pod that was bound to it (upstream pkg/kubelet/lifecycle/predicate.go, v1.37). Pure.

use client::placement;
use k8s_openapi::api::core::v1::{Node, Pod, Taint};

use crate::eviction::Pressure;
use crate::model;
use crate::qos;
use crate::quantity::{list_milli, list_value};
use crate::status::Verdict;

/// Decides; `others` are the pods that the node has taken and that are not over, `pressures` what the node is short of. The
/// error is the pod's failure.
pub fn admit(pod: &Pod, node: &Node, others: &[std::sync::Arc<Pod>], pressures: &[Pressure]) -> Result<(), Verdict> {
    let spec = pod.spec.as_ref();
    if let Some(os) = spec.and_then(|s| s.os.as_ref()).filter(|os| os.name != "linux") {
        return Err(verdict("PodOSNotSupported", format!("Failed to admit pod as the OS field doesn't match node OS ({})", os.name)));
    }
    if let Some(field) = unsupported(pod) {
        let text = format!("this kubelet does not carry out {field}");
        return Err(verdict("PodFeatureUnsupported", text));
    }
    if !placement::node_allowed(pod, node) {
        return Err(verdict("NodeAffinity", "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector".to_owned()));
    }
    ports(pod, others)?;
    resources(pod, node, others)?;
    taints(pod, node)?;
    under_pressure(pod, pressures)
}

/// A node that is short of something takes critical pods only; one that is short of memory alone also those that ask for
/// some, or tolerate it (pkg/kubelet/eviction `Admit`).
fn under_pressure(pod: &Pod, pressures: &[Pressure]) -> Result<(), Verdict> {
    if pressures.is_empty() || model::is_critical(pod) {
        return Ok(());
    }
    if pressures == [Pressure::Memory] {
        let taint = Taint { key: "node.kubernetes.io/memory-pressure".to_owned(), effect: "NoSchedule".to_owned(), ..Taint::default() };
        let tolerated = placement::tolerations(pod).iter().any(|toleration| placement::tolerates(toleration, &taint));
        if qos::class(pod) != qos::Class::BestEffort || tolerated {
            return Ok(());
        }
    }
    let names: Vec<&str> = pressures.iter().map(|pressure| pressure.condition()).collect();
    Err(verdict("Evicted", format!("The node had condition: [{}]. ", names.join(" "))))
}

/// A field that the kubelet cannot carry out, which would otherwise be ignored in silence.
fn unsupported(pod: &Pod) -> Option<&'static str> {
    let spec = pod.spec.as_ref()?;
    if spec.host_users == Some(false) {
        return Some("spec.hostUsers false (user namespaces)");
    }
    if spec.resource_claims.as_ref().is_some_and(|c| !c.is_empty()) {
        return Some("spec.resourceClaims (dynamic resource allocation)");
    }
    let ephemeral = crate::ephemeral::containers(pod);
    let mut all = model::containers(pod).iter().chain(model::init_containers(pod)).chain(&ephemeral);
    all.find_map(|container| {
        let devices = container.volume_devices.as_ref().is_some_and(|d| !d.is_empty());
        let resources = container.resources.as_ref();
        let foreign = resources.and_then(|r| r.limits.as_ref()).is_some_and(|l| l.keys().any(|k| k.contains('/')));
        match () {
            () if devices => Some("containers[].volumeDevices (block volumes)"),
            () if foreign => Some("extended resources in containers[].resources (device plugins)"),
            () => None,
        }
    })
}

fn verdict(reason: &str, message: String) -> Verdict {
    Verdict { reason: reason.to_owned(), message: format!("Pod was rejected: {message}"), ..Verdict::default() }
}

fn resources(pod: &Pod, node: &Node, others: &[std::sync::Arc<Pod>]) -> Result<(), Verdict> {
    let allocatable = node.status.as_ref().and_then(|s| s.allocatable.as_ref());
    let insufficient = |name: &str, word: &str, wanted: i64, used: i64, capacity: i64| {
        let text = format!("Node didn't have enough resource: {name}, requested: {wanted}, used: {used}, capacity: {capacity}");
        Err(verdict(&format!("OutOf{word}"), text))
    };
    let count = i64::try_from(others.len()).unwrap_or(i64::MAX);
    let pods = list_value(allocatable, "pods");
    if pods > 0 && count + 1 > pods {
        return insufficient("pods", "pods", 1, count, pods);
    }
    let wanted = qos::pod_resources(pod);
    let used: Vec<qos::PodResources> = others.iter().map(|p| qos::pod_resources(p)).collect();
    let cpu_used: i64 = used.iter().map(|r| r.cpu_request_milli).sum();
    let cpu = list_milli(allocatable, "cpu");
    if wanted.cpu_request_milli > 0 && cpu_used + wanted.cpu_request_milli > cpu {
        return insufficient("cpu", "cpu", wanted.cpu_request_milli, cpu_used, cpu);
    }
    let memory_used: i64 = used.iter().map(|r| r.memory_request_bytes).sum();
    let memory = list_value(allocatable, "memory");
    if wanted.memory_request_bytes > 0 && memory_used + wanted.memory_request_bytes > memory {
        return insufficient("memory", "memory", wanted.memory_request_bytes, memory_used, memory);
    }
    Ok(())
}

fn ports(pod: &Pod, others: &[std::sync::Arc<Pod>]) -> Result<(), Verdict> {
    let of = |pod: &Pod| -> Vec<(String, String, i32)> {
        let ports = model::containers(pod).iter().flat_map(|c| c.ports.iter().flatten());
        ports
            .filter_map(|p| {
                let port = p.host_port.filter(|h| *h > 0)?;
                let ip = p.host_ip.clone().filter(|i| i != "0.0.0.0").unwrap_or_default();
                Some((ip, p.protocol.clone().unwrap_or_else(|| "TCP".to_owned()), port))
            })
            .collect()
    };
    let wanted = of(pod);
    let clash = others.iter().flat_map(|o| of(o)).any(|(ip, protocol, port)| {
        wanted.iter().any(|(i, p, n)| *n == port && *p == protocol && (*i == ip || i.is_empty() || ip.is_empty()))
    });
    if clash {
        let text = "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports";
        return Err(verdict("NodePorts", text.to_owned()));
    }
    Ok(())
}

fn taints(pod: &Pod, node: &Node) -> Result<(), Verdict> {
    let taints = node.spec.iter().flat_map(|s| s.taints.iter().flatten());
    for taint in taints.filter(|t| t.effect == "NoExecute") {
        let tolerated = placement::tolerations(pod).iter().any(|toleration| placement::tolerates(toleration, taint));
        if !tolerated {
            let text = "Predicate TaintToleration failed: node(s) had taints that the pod didn't tolerate";
            return Err(verdict("TaintToleration", text.to_owned()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::sync::Arc;

    fn pod(name: &str, spec: Value) -> Arc<Pod> {
        let mut spec = spec;
        if spec.get("containers").is_none() {
            spec["containers"] = json!([{"name": "c"}]);
        }
        Arc::new(serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).expect("a pod"))
    }

    fn node() -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n", "labels": {"disk": "ssd"}},
            "spec": {"taints": [{"key": "k", "value": "v", "effect": "NoExecute"}]},
            "status": {"allocatable": {"cpu": "2", "memory": "1Gi", "pods": "3"}}}))
        .expect("a node")
    }

    /// The reason of the refusal, or nothing.
    fn refused(spec: Value, others: &[Arc<Pod>], pressures: &[Pressure]) -> String {
        let mut spec = spec;
        if spec.get("tolerations").is_none() {
            spec["tolerations"] = json!([{"key": "k", "operator": "Exists"}]);
        }
        admit(&pod("p", spec), &node(), others, pressures).err().map(|verdict| verdict.reason).unwrap_or_default()
    }

    #[test]
    fn who_is_taken() {
        let affinity = |values: Value| {
            json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": "disk", "operator": "In", "values": values}]}]}}}})
        };
        let asks = |list: Value| json!({"containers": [{"name": "c", "resources": {"requests": list}}]});
        let port = |port: Value| json!({"containers": [{"name": "c", "ports": [port]}]});
        let other = [
            pod("other", port(json!({"containerPort": 1, "hostPort": 80, "hostIP": "127.0.0.1"}))),
            pod("large", asks(json!({"cpu": "1500m"}))),
        ];
        for (spec, reason) in [
            (json!({}), ""),
            (json!({"os": {"name": "linux"}}), ""),
            (json!({"os": {"name": "windows"}}), "PodOSNotSupported"),
            (json!({"hostUsers": false}), "PodFeatureUnsupported"),
            (json!({"nodeSelector": {"disk": "ssd"}}), ""),
            (json!({"nodeSelector": {"disk": "hdd"}}), "NodeAffinity"),
            (affinity(json!(["ssd", "nvme"])), ""),
            (affinity(json!(["hdd"])), "NodeAffinity"),
            (asks(json!({"cpu": "500m"})), ""),
            (asks(json!({"cpu": "501m"})), "OutOfcpu"),
            (asks(json!({"memory": "2Gi"})), "OutOfmemory"),
            (port(json!({"containerPort": 1, "hostPort": 80})), "NodePorts"),
            (port(json!({"containerPort": 1, "hostPort": 80, "hostIP": "127.0.0.2"})), ""),
            (port(json!({"containerPort": 1, "hostPort": 81})), ""),
            (json!({"tolerations": []}), "TaintToleration"),
            (json!({"tolerations": [{"key": "k", "value": "v"}]}), ""),
        ] {
            assert_eq!(refused(spec.clone(), &other, &[]), reason, "{spec}");
        }
        let full = [pod("a", json!({})), pod("b", json!({})), pod("c", json!({}))];
        assert_eq!(refused(json!({}), &full, &[]), "OutOfpods");
    }

    #[test]
    fn a_node_under_pressure_takes_little() {
        let burstable = json!({"containers": [{"name": "c", "resources": {"requests": {"memory": "1Mi"}}}]});
        let critical = json!({"priority": 2_000_000_000});
        for (pressures, spec, reason) in [
            (vec![Pressure::Disk], burstable.clone(), "Evicted"),
            (vec![Pressure::Disk], critical.clone(), ""),
            (vec![Pressure::Memory], json!({}), "Evicted"),
            (vec![Pressure::Memory], burstable.clone(), ""),
            (vec![Pressure::Memory], json!({"tolerations": [{"operator": "Exists"}]}), ""),
            (vec![Pressure::Memory, Pressure::Pid], burstable, "Evicted"),
        ] {
            assert_eq!(refused(spec.clone(), &[], &pressures), reason, "{pressures:?} {spec}");
        }
    }
}
