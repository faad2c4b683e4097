//! Rows as `kubectl get` shows them.

use super::*;
use crate::kinds;

fn cells(group: &str, kind: &str, object: &Value) -> String {
    let facts = kinds::by_kind(group, "v1", kind).expect("served");
    let now = "2026-01-01T01:00:00Z".parse().expect("a time");
    let cells = row(facts, &Tree::from(object), now).cells;
    assert_eq!(cells.len(), columns(facts).len(), "{kind}: a cell per column");
    cells.iter().map(|cell| cell.as_str().map_or_else(|| cell.to_string(), str::to_owned)).collect::<Vec<_>>().join(" | ")
}

fn pod(spec: Value, status: Value) -> String {
    let metadata = json!({"name": "p", "creationTimestamp": "2026-01-01T00:00:00Z"});
    let all = cells("", "Pod", &json!({"metadata": metadata, "spec": spec, "status": status}));
    all.split(" | ").skip(1).take(3).collect::<Vec<_>>().join(" | ")
}

#[test]
fn pods() {
    let two = json!({"containers": [{"name": "a"}, {"name": "b"}]});
    let running = |name: &str| json!({"name": name, "ready": true, "restartCount": 0, "state": {"running": {}}});
    for (spec, status, want) in [
        (two.clone(), json!({"phase": "Pending"}), "0/2 | Pending | 0"),
        (two.clone(), json!({"phase": "Running", "containerStatuses": [running("a"), running("b")]}), "2/2 | Running | 0"),
        (
            two.clone(),
            json!({"phase": "Running", "containerStatuses": [running("a"), {"name": "b", "restartCount": 3,
                "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": {"finishedAt": "2026-01-01T00:59:55Z"}}}]}),
            "1/2 | CrashLoopBackOff | 3 (5s ago)",
        ),
        (
            json!({"containers": [{"name": "a"}], "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}]}),
            json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"terminated": {"exitCode": 0}}},
                {"name": "s", "state": {"waiting": {"reason": "PodInitializing"}}}]}),
            "0/2 | Init:1/2 | 0",
        ),
        (
            json!({"containers": [{"name": "a"}], "initContainers": [{"name": "i"}]}),
            json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "restartCount": 2, "state": {"terminated": {"exitCode": 1}}}]}),
            "0/1 | Init:ExitCode:1 | 2",
        ),
        (
            json!({"containers": [{"name": "a"}]}),
            json!({"phase": "Succeeded", "containerStatuses": [{"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}]}),
            "0/1 | Completed | 0",
        ),
        (two, json!({"phase": "Failed", "reason": "Evicted"}), "0/2 | Evicted | 0"),
    ] {
        assert_eq!(pod(spec, status), want);
    }
}

#[test]
fn other_kinds() {
    let metadata = || json!({"name": "x", "creationTimestamp": "2026-01-01T00:00:00Z"});
    let template = json!({"spec": {"containers": [{"name": "c", "image": "i:1"}, {"name": "d", "image": "j"}]}});
    let selector = json!({"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "c", "operator": "In", "values": ["e", "d"]}]});
    for (group, kind, object, want) in [
        (
            "apps",
            "Deployment",
            json!({"metadata": metadata(), "spec": {"replicas": 3, "template": template, "selector": selector},
                "status": {"readyReplicas": 1, "updatedReplicas": 2, "availableReplicas": 1}}),
            "x | 1/3 | 2 | 1 | 60m | c,d | i:1,j | a=b,c in (d,e)",
        ),
        (
            "",
            "Service",
            json!({"metadata": metadata(), "spec": {"type": "NodePort", "clusterIPs": ["10.0.0.1"], "selector": {"a": "b"},
                "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30000}, {"port": 53, "protocol": "UDP"}]}}),
            "x | NodePort | 10.0.0.1 | <none> | 80:30000/TCP,53/UDP | 60m | a=b",
        ),
        (
            "",
            "Node",
            json!({"metadata": {"name": "n", "labels": {"node-role.kubernetes.io/control-plane": ""}}, "spec": {"unschedulable": true},
                "status": {"conditions": [{"type": "Ready", "status": "True"}], "addresses": [{"type": "InternalIP", "address": "1.2.3.4"}],
                    "nodeInfo": {"kubeletVersion": "v1", "osImage": "Debian", "kernelVersion": "6.1", "architecture": "amd64"}}}),
            "n | Ready,SchedulingDisabled | control-plane | <unknown> | v1 | 1.2.3.4 | <none> | Debian | 6.1 (amd64) | <unknown>",
        ),
        (
            "",
            "Event",
            json!({"metadata": metadata(), "involvedObject": {"kind": "Pod", "name": "p"}, "reason": "R", "type": "Normal", "message": " m\n",
                "firstTimestamp": "2026-01-01T00:00:00Z", "lastTimestamp": "2026-01-01T00:59:50Z", "source": {"component": "k", "host": "h"}}),
            "10s | Normal | R | pod/p |  | k, h | m | 60m | 1 | x",
        ),
        (
            "discovery.k8s.io",
            "EndpointSlice",
            json!({"metadata": metadata(), "addressType": "IPv4", "endpoints": [{"addresses": ["1", "2"]}, {"addresses": ["3", "4", "5"]}]}),
            "x | IPv4 | <unset> | 1,2,3 + 2 more... | 60m",
        ),
        (
            "rbac.authorization.k8s.io",
            "ClusterRoleBinding",
            json!({"metadata": metadata(), "roleRef": {"kind": "ClusterRole", "name": "admin"},
                "subjects": [{"kind": "User", "name": "u"}, {"kind": "ServiceAccount", "name": "s", "namespace": "n"}]}),
            "x | ClusterRole/admin | 60m | u |  | n/s",
        ),
        ("rbac.authorization.k8s.io", "Role", json!({"metadata": metadata()}), "x | 2026-01-01T00:00:00Z"),
        ("", "ConfigMap", json!({"metadata": metadata(), "data": {"a": "b"}, "binaryData": {"c": ""}}), "x | 2 | 60m"),
    ] {
        assert_eq!(cells(group, kind, &object), want);
    }
}
