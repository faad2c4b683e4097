//! Golden plans: how many, and which pods are dispensable.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::plan::{Action, next_available, plan, pod_of, rank, status};

fn now() -> Timestamp {
    "2026-01-01T01:00:00Z".parse().expect("time")
}

fn rs(replicas: i32, min_ready: i32) -> ReplicaSet {
    serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "ns", "uid": "r", "generation": 4},
        "spec": {"replicas": replicas, "minReadySeconds": min_ready, "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c"}]}}}}))
    .expect("replica set")
}

/// A pod that is ready since a time of the hour before now; more is merged in.
fn pod(name: &str, ready_since: Option<&str>, more: Value) -> Arc<Pod> {
    let conditions: Vec<Value> = ready_since
        .map(|since| json!({"type": "Ready", "status": "True", "lastTransitionTime": format!("2026-01-01T00:{since}Z")}))
        .into_iter()
        .collect();
    let mut value = json!({"metadata": {"name": name, "uid": name, "labels": {"app": "web"},
            "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"containers": [], "nodeName": "n"}, "status": {"phase": "Running", "conditions": conditions}});
    for (key, value_of) in more.as_object().into_iter().flatten() {
        for (inner, new) in value_of.as_object().into_iter().flatten() {
            value[key][inner] = new.clone();
        }
    }
    Arc::new(serde_json::from_value(value).expect("pod"))
}

fn names(pods: &[Arc<Pod>]) -> Vec<&str> {
    pods.iter().filter_map(|pod| pod.metadata.name.as_deref()).collect()
}

#[test]
fn counts() {
    let two = [pod("a", Some("10:00"), json!({})), pod("b", Some("10:00"), json!({}))];
    assert_eq!(plan(&rs(2, 0), &two, &two, now()), None);
    assert_eq!(plan(&rs(5, 0), &two, &two, now()), Some(Action::Create(3)));
    assert_eq!(plan(&rs(10_000, 0), &two, &two, now()), Some(Action::Create(500)));
    let Some(Action::Delete(going)) = plan(&rs(1, 0), &two, &two, now()) else { panic!("one too many") };
    assert_eq!(going.len(), 1);
}

#[test]
fn the_dispensable_go_first() {
    let restarts = |count: i32| {
        json!({"status": {"containerStatuses": [
        {"name": "c", "image": "", "imageID": "", "ready": true, "restartCount": count}]}})
    };
    let pods = [
        pod("old", Some("01:00"), json!({})),
        pod("young", Some("59:00"), json!({})),
        pod("unready", None, json!({})),
        pod("pending", None, json!({"status": {"phase": "Pending"}})),
        pod("unplaced", None, json!({"spec": {"nodeName": ""}, "status": {"phase": "Pending"}})),
        pod("cheap", Some("01:00"), json!({"metadata": {"annotations": {"controller.kubernetes.io/pod-deletion-cost": "-5"}}})),
        pod("restarted", Some("01:00"), restarts(3)),
    ];
    assert_eq!(names(&rank(&pods, &pods, now())), ["unplaced", "pending", "unready", "cheap", "young", "restarted", "old"]);
}

#[test]
fn crowded_nodes_are_thinned() {
    let on = |name: &str, node: &str| pod(name, Some("01:00"), json!({"spec": {"nodeName": node}}));
    let own = [on("a", "one"), on("b", "two")];
    let related = [own[0].clone(), own[1].clone(), on("x", "two")];
    assert_eq!(names(&rank(&own, &related, now())), ["b", "a"]);
}

#[test]
fn status_counts_and_waits_for_min_ready() {
    let pods = [
        pod("a", Some("10:00"), json!({})),
        pod("b", Some("59:50"), json!({})),
        pod("c", None, json!({"metadata": {"labels": {"app": "other"}}})),
    ];
    let rs = rs(3, 30);
    let told = status(&rs, &pods, 1, None, now());
    assert_eq!((told.replicas, told.fully_labeled_replicas, told.ready_replicas), (3, Some(2), Some(2)));
    assert_eq!((told.available_replicas, told.terminating_replicas, told.observed_generation), (Some(1), Some(1), Some(4)));
    assert_eq!(next_available(&rs, &pods, now()).map(|wait| wait.as_secs()), Some(20));
    let failed = status(&rs, &pods[..1], 0, Some("quota"), now());
    let condition = &failed.conditions.as_ref().expect("conditions")[0];
    assert_eq!((condition.reason.as_deref(), condition.message.as_deref()), (Some("FailedCreate"), Some("quota")));
    let over = ReplicaSet { status: Some(failed), ..rs };
    assert_eq!(status(&over, &pods, 0, None, now()).conditions, None);
}

#[test]
fn the_pod_is_the_templates_and_owned() {
    let pod = pod_of(&rs(1, 0));
    assert_eq!(pod.metadata.generate_name.as_deref(), Some("web-"));
    let owner = &pod.metadata.owner_references.expect("owners")[0];
    assert_eq!((owner.kind.as_str(), owner.uid.as_str(), owner.controller), ("ReplicaSet", "r", Some(true)));
}
