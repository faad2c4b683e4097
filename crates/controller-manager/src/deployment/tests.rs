//! Golden plans: a Deployment and its ReplicaSets in, what is done in words out.

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use serde_json::{Value, json};

use super::plan::{Action, Plan, plan};

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

fn deployment(replicas: i32, more: Value) -> Deployment {
    let mut value = json!({"metadata": {"name": "web", "namespace": "ns", "uid": "d", "generation": 1},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
            "progressDeadlineSeconds": 600, "revisionHistoryLimit": 10,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "new"}]}}}});
    merge(&mut value, more);
    serde_json::from_value(value).expect("deployment")
}

/// A ReplicaSet: name, image, wanted and available replicas, the Deployment's replicas when it was last scaled.
fn rs(name: &str, image: &str, (wanted, available, desired): (i32, i32, i32), revision: i64) -> ReplicaSet {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "ns", "uid": name, "generation": 1,
            "creationTimestamp": format!("2026-01-01T00:00:{revision:02}Z"),
            "annotations": {"deployment.kubernetes.io/revision": revision.to_string(),
                "deployment.kubernetes.io/desired-replicas": desired.to_string(),
                "deployment.kubernetes.io/max-replicas": (desired + (desired + 3) / 4).to_string()}},
        "spec": {"replicas": wanted, "selector": {"matchLabels": {"app": "web", "pod-template-hash": name}},
            "template": {"metadata": {"labels": {"app": "web", "pod-template-hash": name}},
                "spec": {"containers": [{"name": "c", "image": image}]}}},
        "status": {"replicas": wanted.min(available.max(wanted)), "availableReplicas": available,
            "readyReplicas": available, "observedGeneration": 1, "terminatingReplicas": 0},
    }))
    .expect("replica set")
}

fn now() -> Timestamp {
    Timestamp::from_second(1_800_000_000).expect("time")
}

fn told(plan: &Plan) -> Vec<String> {
    plan.actions
        .iter()
        .map(|action| match action {
            Action::Create(rs) => format!("create {}", rs.spec.replicas.unwrap_or(0)),
            Action::Update { rs, scaled } => {
                let name = rs.metadata.name.as_deref().unwrap_or_default();
                match scaled {
                    Some((from, to)) => format!("{name} {from}->{to}"),
                    None => format!("{name} annotated"),
                }
            }
            Action::Delete(name) => format!("delete {name}"),
        })
        .collect()
}

fn check(d: &Deployment, owned: &[ReplicaSet], wanted: &[&str]) {
    assert_eq!(told(&plan(d, owned, false, now())), wanted);
}

fn reason(plan: &Plan, kind: &str) -> Option<String> {
    let mut conditions = plan.status.conditions.iter().flatten();
    conditions.find(|condition| condition.type_.as_deref() == Some(kind)).and_then(|condition| condition.reason.clone())
}

#[test]
fn the_first_replica_set() {
    let made = plan(&deployment(3, json!({})), &[], false, now());
    assert_eq!(told(&made), ["create 3"]);
    assert_eq!(made.revision.as_deref(), Some("1"));
    assert_eq!(reason(&made, "Progressing").as_deref(), Some("NewReplicaSetCreated"));
    assert_eq!(reason(&made, "Available").as_deref(), Some("MinimumReplicasUnavailable"));
    let Action::Create(rs) = &made.actions[0] else { panic!("{made:?}") };
    let hash = rs.metadata.labels.as_ref().expect("labels")["pod-template-hash"].clone();
    assert_eq!(rs.metadata.name.as_deref(), Some(format!("web-{hash}").as_str()));
    assert_eq!(rs.spec.selector.match_labels.as_ref().expect("labels")["pod-template-hash"], hash);
}

#[test]
fn a_rolling_update_step_by_step() {
    // 4 replicas, surge 1, unavailable 1.
    let d = deployment(4, json!({}));
    check(&d, &[rs("old", "old", (4, 4, 4), 1)], &["create 1"]);
    let step = |old: (i32, i32), new: (i32, i32), wanted: &[&str]| {
        let owned = [rs("old", "old", (old.0, old.1, 4), 1), rs("new", "new", (new.0, new.1, 4), 2)];
        check(&d, &owned, wanted);
    };
    step((4, 4), (1, 0), &["old 4->3"]);
    step((3, 3), (1, 0), &["new 1->2"]);
    step((3, 3), (2, 0), &[]);
    step((3, 3), (2, 1), &["old 3->2"]);
    step((2, 2), (3, 2), &["old 2->1"]);
    step((0, 0), (4, 4), &[]);
    // Old replicas that are not available go first and do not count.
    step((4, 2), (1, 1), &["old 4->2"]);
    let no_surge = json!({"spec": {"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}}});
    let owned = [rs("old", "old", (4, 4, 4), 1), rs("new", "new", (0, 0, 4), 2)];
    check(&deployment(4, no_surge), &owned, &["old 4->3"]);
}

#[test]
fn undo_gives_the_old_replica_set_the_next_revision() {
    let made = plan(&deployment(2, json!({})), &[rs("back", "new", (0, 0, 2), 1), rs("bad", "bad", (2, 0, 2), 2)], false, now());
    assert_eq!(made.revision.as_deref(), Some("3"));
    let Action::Update { rs, .. } = &made.actions[0] else { panic!("{made:?}") };
    let annotations = rs.metadata.annotations.as_ref().expect("annotations");
    assert_eq!(annotations["deployment.kubernetes.io/revision-history"], "1");
    assert_eq!(told(&made), ["back 0->1"]);
}

#[test]
fn recreate_takes_all_down_first() {
    let d = deployment(2, json!({"spec": {"strategy": {"type": "Recreate", "rollingUpdate": null}}}));
    check(&d, &[rs("old", "old", (2, 2, 2), 1)], &["old 2->0"]);
    let mut down = rs("old", "old", (0, 0, 2), 1);
    assert!(plan(&d, std::slice::from_ref(&down), true, now()).actions.is_empty(), "a pod is still there");
    check(&d, std::slice::from_ref(&down), &["create 2"]);
    down.status.get_or_insert_default().replicas = 1;
    check(&d, &[down], &[]);
}

#[test]
fn scaling_in_the_middle_of_a_roll_out_is_proportional() {
    let owned = [rs("old", "old", (8, 8, 10), 1), rs("new", "new", (5, 3, 10), 2)];
    // 10 + 3 of surge grow to 20 + 5.
    check(&deployment(20, json!({})), &owned, &["new 5->10", "old 8->15"]);
    let paused = deployment(10, json!({"spec": {"paused": true}}));
    let made = plan(&paused, &[rs("old", "old", (10, 10, 10), 1)], false, now());
    assert!(made.actions.is_empty(), "a new template is not rolled out while paused: {made:?}");
    assert_eq!(reason(&made, "Progressing").as_deref(), Some("DeploymentPaused"));
    check(&deployment(3, json!({"spec": {"paused": true}})), &[rs("old", "old", (10, 10, 10), 1)], &["old 10->3"]);
}

#[test]
fn history_beyond_the_limit_goes() {
    let status = json!({"status": {"replicas": 1, "updatedReplicas": 1, "availableReplicas": 1, "observedGeneration": 1},
        "spec": {"revisionHistoryLimit": 1}});
    let owned = [rs("a", "a", (0, 0, 1), 1), rs("b", "b", (0, 0, 1), 2), rs("c", "c", (0, 0, 1), 3), rs("new", "new", (1, 1, 1), 4)];
    let d = deployment(1, status);
    check(&d, &owned, &["delete a", "delete b"]);
    let made = plan(&d, &owned, false, now());
    assert_eq!(reason(&made, "Progressing").as_deref(), Some("NewReplicaSetAvailable"));
    assert_eq!(reason(&made, "Available").as_deref(), Some("MinimumReplicasAvailable"));
}

#[test]
fn progress_has_a_deadline() {
    let since = |seconds: i64| Timestamp::from_second(1_800_000_000 - seconds).expect("time").to_string();
    let stuck = |seconds| {
        deployment(
            1,
            json!({"status": {"replicas": 1, "updatedReplicas": 1, "unavailableReplicas": 1, "observedGeneration": 1,
            "conditions": [{"type": "Progressing", "status": "True", "reason": "ReplicaSetUpdated",
                "lastUpdateTime": since(seconds), "lastTransitionTime": since(seconds)}]}}),
        )
    };
    let owned = [rs("new", "new", (1, 0, 1), 1)];
    let waiting = plan(&stuck(599), &owned, false, now());
    assert_eq!(reason(&waiting, "Progressing").as_deref(), Some("ReplicaSetUpdated"));
    assert_eq!(waiting.requeue_after.map(|after| after.as_secs()), Some(2));
    let late = plan(&stuck(601), &owned, false, now());
    assert_eq!(reason(&late, "Progressing").as_deref(), Some("ProgressDeadlineExceeded"));
    assert_eq!(late.requeue_after, None);
}

#[test]
fn one_that_is_being_deleted_is_only_looked_at() {
    let d = deployment(3, json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}));
    check(&d, &[rs("old", "old", (1, 1, 3), 1)], &[]);
}

#[test]
fn the_replica_set_is_the_deployments() {
    let more = json!({"spec": {"minReadySeconds": 5, "selector": {"matchLabels": {"app": "web"},
        "matchExpressions": [{"key": "app", "operator": "Exists"}]},
        "template": {"metadata": {"annotations": {"a": "b"}}, "spec": {"nodeName": "n"}}}});
    let d = deployment(3, more);
    let made = plan(&d, &[], false, now());
    let Action::Create(rs) = &made.actions[0] else { panic!("{made:?}") };
    assert_eq!(rs.spec.min_ready_seconds, Some(5));
    assert_eq!(rs.spec.selector.match_expressions, d.spec.selector.match_expressions);
    let template = rs.spec.template.as_ref().expect("a template");
    let own = &d.spec.template;
    assert_eq!(template.spec, own.spec);
    assert_eq!(template.metadata.as_ref().and_then(|m| m.annotations.clone()), own.metadata.as_ref().and_then(|m| m.annotations.clone()));
    // A change of minReadySeconds alone reaches the ReplicaSet that is there.
    let mut there = rs.as_ref().clone();
    there.metadata.uid = Some("new".to_owned());
    let d = deployment(
        3,
        json!({"spec": {"minReadySeconds": 6, "selector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]},
        "template": {"metadata": {"annotations": {"a": "b"}}, "spec": {"nodeName": "n"}}}}),
    );
    let made = plan(&d, &[there], false, now());
    let updated = made.actions.iter().any(|action| matches!(action, Action::Update { rs, .. } if rs.spec.min_ready_seconds == Some(6)));
    assert!(updated, "{made:?}");
}

#[test]
fn status_tells_all() {
    let mut old = rs("old", "old", (3, 2, 4), 1);
    old.status.get_or_insert_default().terminating_replicas = Some(1);
    let new = rs("new", "new", (2, 1, 4), 2);
    let d = deployment(4, json!({"metadata": {"generation": 9}, "status": {"collisionCount": 2, "observedGeneration": 8}}));
    let status = plan(&d, &[old, new], false, now()).status;
    assert_eq!((status.replicas, status.updated_replicas), (Some(5), Some(2)));
    assert_eq!(
        (status.ready_replicas, status.available_replicas, status.unavailable_replicas),
        (Some(3), Some(3), Some(1)),
        "what the plan scales counts"
    );
    assert_eq!((status.terminating_replicas, status.collision_count, status.observed_generation), (Some(1), Some(2), Some(9)));
    let conditions = status.conditions.expect("conditions");
    let available = conditions.iter().find(|condition| condition.type_.as_deref() == Some("Available")).expect("Available");
    assert_eq!((available.status.as_deref(), available.reason.as_deref()), (Some("True"), Some("MinimumReplicasAvailable")));
    assert_eq!(available.message.as_deref(), Some("Deployment has minimum availability."));
    assert_eq!(available.last_update_time.as_ref().map(|t| t.0), Some(now()));
    assert_eq!(available.last_transition_time.as_ref().map(|t| t.0), Some(now()));
}
