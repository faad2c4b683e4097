//! Services and pods in, slices out.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use serde_json::{Value, json};

use super::plan::{Observed, Plan, plan};
use super::tracker::Tracker;
use client::ObjectKey;

fn service(spec: Value) -> Service {
    let mut spec = spec;
    let defaults = json!({"clusterIP": "10.96.0.9", "ipFamilies": ["IPv4"], "selector": {"app": "web"},
        "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]});
    for (key, value) in defaults.as_object().expect("object") {
        spec.as_object_mut().expect("object").entry(key).or_insert(value.clone());
    }
    serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "d", "uid": "s1", "labels": {"team": "a"}}, "spec": spec}))
        .expect("service")
}

fn pod_with(number: usize, change: Value) -> Arc<Pod> {
    let mut pod = json!({"metadata": {"name": format!("p{number:03}"), "namespace": "d", "uid": format!("u{number}")},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 9000 + number % 2}]}]},
        "status": {"phase": "Running", "podIP": format!("10.0.{}.{}", number / 250, number % 250),
            "podIPs": [{"ip": format!("10.0.{}.{}", number / 250, number % 250)}],
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:05Z"}]}});
    merge(&mut pod, change);
    Arc::new(serde_json::from_value(pod).expect("pod"))
}

fn merge(into: &mut Value, change: Value) {
    match (into, change) {
        (Value::Object(into), Value::Object(change)) => {
            for (key, value) in change {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, change) => *into = change,
    }
}

fn pod(number: usize) -> Arc<Pod> {
    pod_with(number, json!({}))
}

fn run(service: &Service, pods: &[Arc<Pod>], slices: &[Arc<EndpointSlice>]) -> Plan {
    let node = |name: &str| {
        let node: Node =
            serde_json::from_value(json!({"metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": "z1"}}})).expect("node");
        (name == "n1").then(|| Arc::new(node))
    };
    plan(&Observed { service, pods, slices, node: &node, endpoints_max: 100 })
}

/// Plays the API server: names what is new.
fn carry_out(plan: Plan, before: &[Arc<EndpointSlice>]) -> Vec<Arc<EndpointSlice>> {
    let gone: Vec<_> = plan.delete.iter().chain(&[]).map(|slice| slice.metadata.name.clone()).collect();
    let changed = |slice: &Arc<EndpointSlice>| plan.update.iter().any(|new| new.metadata.name == slice.metadata.name);
    let mut after: Vec<_> = before.iter().filter(|slice| !gone.contains(&slice.metadata.name) && !changed(slice)).cloned().collect();
    after.extend(plan.update.iter().cloned().map(Arc::new));
    for (at, mut slice) in plan.create.into_iter().enumerate() {
        slice.metadata.name = Some(format!("web-{}-{at}", after.len()));
        after.push(Arc::new(slice));
    }
    after
}

fn endpoints(slice: &EndpointSlice) -> &[Endpoint] {
    slice.endpoints.as_deref().unwrap_or_default()
}

fn conditions(endpoint: &Endpoint) -> [bool; 3] {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    [conditions.ready, conditions.serving, conditions.terminating].map(|condition| condition.expect("set"))
}

#[test]
fn a_slice_says_all_that_it_should() {
    let plan = run(&service(json!({})), &[pod(1)], &[]);
    assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (1, 0, 0));
    let expected = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"generateName": "web-", "namespace": "d",
            "labels": {"team": "a", "kubernetes.io/service-name": "web", "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": "web", "uid": "s1", "controller": true, "blockOwnerDeletion": true}]},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.0.0.1"], "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": "n1", "zone": "z1", "targetRef": {"kind": "Pod", "namespace": "d", "name": "p001", "uid": "u1"}}],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]});
    assert_eq!(serde_json::to_value(&plan.create[0]).expect("json"), expected);
}

#[test]
fn conditions_follow_the_pod() {
    let gone = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    let unready = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
    let of = |spec: Value, change: &Value| {
        let plan = run(&service(spec), &[pod_with(1, change.clone())], &[]);
        endpoints(&plan.create[0]).first().map(conditions)
    };
    assert_eq!(of(json!({}), &json!({})), Some([true, true, false]));
    assert_eq!(of(json!({}), &gone), Some([false, true, true]));
    assert_eq!(of(json!({}), &unready), Some([false, false, false]));
    assert_eq!(of(json!({"publishNotReadyAddresses": true}), &unready), Some([true, false, false]));
    assert_eq!(of(json!({"publishNotReadyAddresses": true}), &gone), Some([true, true, true]));
    assert_eq!(of(json!({}), &json!({"status": {"phase": "Succeeded"}})), None);
    assert_eq!(of(json!({}), &json!({"status": {"podIP": null, "podIPs": null}})), None);
    // A pod whose node is not known is looked at again later.
    let plan = run(&service(json!({})), &[pod_with(1, json!({"spec": {"nodeName": "n2"}}))], &[]);
    assert_eq!(plan.homeless, ["p001"]);
}

#[test]
fn named_ports_make_groups_and_headless_services_are_marked() {
    let spec = json!({"clusterIP": "None", "ports": [{"name": "http", "port": 80, "targetPort": "web", "protocol": "TCP"}]});
    let named = pod_with(3, json!({"spec": {"hostname": "h", "subdomain": "web"}}));
    let plan = run(&service(spec), &[pod(1), pod(2), named], &[]);
    let mut ports: Vec<_> = plan.create.iter().map(|slice| (slice.ports.clone().expect("ports")[0].port, endpoints(slice).len())).collect();
    ports.sort();
    assert_eq!(ports, [(Some(9000), 1), (Some(9001), 2)]);
    assert!(
        plan.create.iter().all(|slice| slice.metadata.labels.as_ref().is_some_and(|l| l.contains_key("service.kubernetes.io/headless")))
    );
    assert!(plan.create.iter().flat_map(endpoints).any(|endpoint| endpoint.hostname.as_deref() == Some("h")));
}

#[test]
fn slices_hold_a_hundred_and_change_little() {
    let service = service(json!({}));
    let pods: Vec<_> = (0..250).map(pod).collect();
    let slices = carry_out(run(&service, &pods, &[]), &[]);
    let mut sizes: Vec<_> = slices.iter().map(|slice| endpoints(slice).len()).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [50, 100, 100]);
    let again = run(&service, &pods, &slices);
    assert!(again.create.is_empty() && again.update.is_empty() && again.delete.is_empty(), "{again:?}");
    // One pod less and one more: one slice is written.
    let mut moved = pods.clone();
    moved[7] = pod(300);
    let plan = run(&service, &moved, &slices);
    assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (0, 1, 0));
    // 40 more fit into the slice of 50.
    let more: Vec<_> = (0..290).map(pod).collect();
    let plan = run(&service, &more, &slices);
    assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (0, 1, 0));
    assert_eq!(endpoints(&plan.update[0]).len(), 90);
    // None at all: what is there becomes the placeholder.
    let after = carry_out(run(&service, &[], &slices), &slices);
    assert_eq!(after.iter().map(|slice| endpoints(slice).len()).collect::<Vec<_>>(), [0]);
    let again = run(&service, &[], &after);
    assert!(again.create.is_empty() && again.update.is_empty() && again.delete.is_empty(), "{again:?}");
    let plan = run(&service, &[pod(1)], &after);
    assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (0, 1, 0), "the placeholder is written over");
}

#[test]
fn labels_families_and_owners() {
    let first = service(json!({}));
    let slices = carry_out(run(&first, &[pod(1)], &[]), &[]);
    let mut renamed = first.clone();
    renamed.metadata.labels = Some([("team".to_owned(), "b".to_owned())].into());
    let plan = run(&renamed, &[pod(1)], &slices);
    assert_eq!(plan.update[0].metadata.labels.as_ref().and_then(|labels| labels.get("team")).map(String::as_str), Some("b"));
    // A Service of the same name, made anew: the slices of the old one go.
    let mut other = first.clone();
    other.metadata.uid = Some("s2".to_owned());
    let plan = run(&other, &[pod(1)], &slices);
    assert_eq!((plan.create.len(), plan.update.len(), plan.delete.len()), (1, 0, 1));
    // A Service that is going away gets nothing new.
    let mut going = first.clone();
    going.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).expect("time");
    assert!(run(&going, &[pod(1)], &[]).create.is_empty());
    let both = run(&service(json!({"ipFamilies": ["IPv4", "IPv6"]})), &[pod(1)], &[]);
    let mut types: Vec<_> = both.create.iter().map(|slice| (slice.address_type.clone(), endpoints(slice).len())).collect();
    types.sort();
    assert_eq!(types, [("IPv4".to_owned(), 1), ("IPv6".to_owned(), 0)]);
}

#[test]
fn hints_follow_the_traffic_distribution() {
    let hints = |distribution: &str| {
        let plan = run(&service(json!({"trafficDistribution": distribution})), &[pod(1)], &[]);
        serde_json::to_value(&endpoints(&plan.create[0])[0].hints).expect("json")
    };
    assert_eq!(hints("PreferClose"), json!({"forZones": [{"name": "z1"}]}));
    assert_eq!(hints("PreferSameNode"), json!({"forZones": [{"name": "z1"}], "forNodes": [{"name": "n1"}]}));
    let service = service(json!({}));
    let with = carry_out(run(&self::service(json!({"trafficDistribution": "PreferClose"})), &[pod(1)], &[]), &[]);
    assert_eq!(run(&service, &[pod(1)], &with).update.len(), 1, "hints that are not wanted any more go");
}

#[test]
fn a_copy_that_lags_is_known_as_such() {
    let (tracker, key) = (Tracker::default(), ObjectKey::new("d", "web"));
    let mut slice = run(&service(json!({})), &[pod(1)], &[]).create.remove(0);
    slice.metadata.uid = Some("e1".to_owned());
    slice.metadata.generation = Some(1);
    assert!(!tracker.is_stale(&key, &[]) && tracker.is_foreign(&slice));
    tracker.wrote(&key, &slice);
    assert!(tracker.is_stale(&key, &[]), "the new slice is not seen yet");
    let seen = [Arc::new(slice.clone())];
    assert!(!tracker.is_stale(&key, &seen) && !tracker.is_foreign(&slice));
    slice.metadata.generation = Some(2);
    assert!(tracker.is_foreign(&slice));
    tracker.wrote(&key, &slice);
    assert!(tracker.is_stale(&key, &seen));
    tracker.deleted(&key, &slice);
    assert!(tracker.is_stale(&key, &seen) && !tracker.is_stale(&key, &[]));
    assert!(!tracker.gone(&slice), "our own deletion");
    let times = |pods: &[Arc<Pod>]| tracker.trigger_time(&key, &service(json!({})), pods).map(|time| time.to_string());
    assert_eq!(times(&[]), None, "first: the Service's creation");
    assert_eq!(times(&[pod(1)]).as_deref(), Some("2026-01-01T00:00:05Z"));
    assert_eq!(times(&[pod(1)]), None);
}
