//! A Deployment's status and conditions (`pkg/controller/deployment/{sync,progress}.go`, 1.37).

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{DeploymentCondition, DeploymentStatus, ReplicaSet};

use super::plan::{Target, available, size};
use crate::objects::wire_time;

/// How far a sync went, and so which conditions it may judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Paused, scaling or being deleted: progress is not judged.
    Untouched,
    /// A roll-out step was taken or found to be done.
    Checked,
}

/// Whether everything that was asked for is there.
pub(super) fn is_complete(target: &Target<'_>, status: &DeploymentStatus) -> bool {
    let all = Some(target.replicas);
    let or_zero = |value: Option<i32>| Some(value.unwrap_or(0));
    or_zero(status.updated_replicas) == all
        && or_zero(status.replicas) == all
        && or_zero(status.available_replicas) == all
        && status.observed_generation.unwrap_or(0) >= target.d.metadata.generation.unwrap_or(0)
}

fn find<'a>(status: &'a DeploymentStatus, kind: &str) -> Option<&'a DeploymentCondition> {
    status.conditions.iter().flatten().find(|condition| condition.type_.as_deref() == Some(kind))
}

/// A count as the wire has it: 0 is left out.
fn count(value: i32) -> Option<i32> {
    (value != 0).then_some(value)
}

/// Sets a condition; its times move only as upstream moves them.
fn set(status: &mut DeploymentStatus, kind: &str, value: &str, reason: &str, message: String, now: Timestamp) {
    let current = find(status, kind);
    if current.is_some_and(|c| c.status.as_deref() == Some(value) && c.reason.as_deref() == Some(reason)) {
        return;
    }
    let unchanged = current.filter(|current| current.status.as_deref() == Some(value));
    let transition = unchanged.and_then(|current| current.last_transition_time.clone());
    let condition = DeploymentCondition {
        type_: Some(kind.to_owned()),
        status: Some(value.to_owned()),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_update_time: Some(wire_time(now)),
        last_transition_time: Some(transition.unwrap_or_else(|| wire_time(now))),
    };
    remove(status, kind);
    status.conditions.get_or_insert_default().push(condition);
}

fn remove(status: &mut DeploymentStatus, kind: &str) {
    if let Some(conditions) = &mut status.conditions {
        conditions.retain(|condition| condition.type_.as_deref() != Some(kind));
    }
    if status.conditions.as_ref().is_some_and(Vec::is_empty) {
        status.conditions = None;
    }
}

/// The status as it should be, and when progress must be looked at again.
pub(super) fn status(
    target: &Target<'_>,
    all: &[&ReplicaSet],
    new: Option<&ReplicaSet>,
    made: bool,
    progress: Progress,
    now: Timestamp,
) -> (DeploymentStatus, Option<Duration>) {
    let old = target.d.status.clone().unwrap_or_default();
    let mut status = counts(target, all, new, &old);
    let minimum = target.replicas - target.max_unavailable;
    if status.available_replicas.unwrap_or(0) >= minimum {
        let message = "Deployment has minimum availability.".to_owned();
        set(&mut status, "Available", "True", "MinimumReplicasAvailable", message, now);
    } else {
        let message = "Deployment does not have minimum availability.".to_owned();
        set(&mut status, "Available", "False", "MinimumReplicasUnavailable", message, now);
    }
    let deadline = target
        .d
        .spec
        .progress_deadline_seconds
        .filter(|seconds| *seconds != i32::MAX)
        .map(|seconds| Duration::from_secs(seconds.max(0).unsigned_abs().into()));
    note_pause(target, &mut status, deadline.is_some(), now);
    let mut requeue_after = None;
    if progress == Progress::Checked {
        requeue_after = judge_progress(target, new, made, &old, &mut status, deadline, now);
        copy_failure(all, new, &mut status);
    }
    (status, requeue_after)
}

fn counts(target: &Target<'_>, all: &[&ReplicaSet], new: Option<&ReplicaSet>, old: &DeploymentStatus) -> DeploymentStatus {
    let of = |get: fn(&k8s_openapi::api::apps::v1::ReplicaSetStatus) -> i32| -> i32 {
        all.iter().filter_map(|rs| rs.status.as_ref()).map(get).sum()
    };
    let wanted: i32 = all.iter().map(|rs| size(rs)).sum();
    let available: i32 = all.iter().map(|rs| available(rs)).sum();
    let known = |rs: &&&ReplicaSet| rs.status.as_ref().is_some_and(|s| s.observed_generation.unwrap_or(0) > 0);
    let terminating =
        all.iter().filter(known).try_fold(0, |sum, rs| Some(sum + rs.status.as_ref().and_then(|status| status.terminating_replicas)?));
    DeploymentStatus {
        observed_generation: target.d.metadata.generation,
        replicas: count(of(|status| status.replicas)),
        updated_replicas: count(new.and_then(|rs| rs.status.as_ref()).map_or(0, |status| status.replicas)),
        ready_replicas: count(of(|status| status.ready_replicas.unwrap_or(0))),
        available_replicas: count(available),
        unavailable_replicas: count((wanted - available).max(0)),
        terminating_replicas: terminating,
        collision_count: old.collision_count,
        conditions: old.conditions.clone(),
    }
}

fn note_pause(target: &Target<'_>, status: &mut DeploymentStatus, has_deadline: bool, now: Timestamp) {
    let current = find(status, "Progressing").and_then(|condition| condition.reason.clone());
    if !has_deadline || target.d.metadata.deletion_timestamp.is_some() || current.as_deref() == Some("ProgressDeadlineExceeded") {
        return;
    }
    let paused = target.d.spec.paused.unwrap_or(false);
    let noted = current.as_deref() == Some("DeploymentPaused");
    if paused && !noted {
        set(status, "Progressing", "Unknown", "DeploymentPaused", "Deployment is paused".to_owned(), now);
    } else if !paused && noted {
        set(status, "Progressing", "Unknown", "DeploymentResumed", "Deployment is resumed".to_owned(), now);
    }
}

fn judge_progress(
    target: &Target<'_>,
    new: Option<&ReplicaSet>,
    made: bool,
    old: &DeploymentStatus,
    status: &mut DeploymentStatus,
    deadline: Option<Duration>,
    now: Timestamp,
) -> Option<Duration> {
    let Some(deadline) = deadline else {
        remove(status, "Progressing");
        return None;
    };
    let subject = match new.and_then(|rs| rs.metadata.name.as_deref()) {
        Some(name) => format!("ReplicaSet {name:?}"),
        None => format!("Deployment {:?}", target.d.metadata.name.as_deref().unwrap_or_default()),
    };
    let current = find(status, "Progressing").cloned();
    if let Some(name) = new.and_then(|rs| rs.metadata.name.as_deref()).filter(|_| made) {
        set(status, "Progressing", "True", "NewReplicaSetCreated", format!("Created new replica set {name:?}"), now);
        return Some(deadline);
    }
    if current.is_none()
        && let Some(name) = new.and_then(|rs| rs.metadata.name.as_deref())
    {
        set(status, "Progressing", "True", "FoundNewReplicaSet", format!("Found new replica set {name:?}"), now);
    }
    let reason = |status: &DeploymentStatus| find(status, "Progressing").and_then(|c| c.reason.clone());
    let was_complete =
        status.replicas == status.updated_replicas && current.as_ref().and_then(|c| c.reason.as_deref()) == Some("NewReplicaSetAvailable");
    if was_complete {
        return None;
    }
    if is_complete(target, status) {
        let message = format!("{subject} has successfully progressed.");
        set(status, "Progressing", "True", "NewReplicaSetAvailable", message, now);
        return None;
    }
    if has_progressed(old, status) {
        // Only the update time moves while it stays True: the deadline counts from it.
        let since =
            find(status, "Progressing").filter(|c| c.status.as_deref() == Some("True")).and_then(|c| c.last_transition_time.clone());
        remove(status, "Progressing");
        set(status, "Progressing", "True", "ReplicaSetUpdated", format!("{subject} is progressing."), now);
        if let (Some(since), Some(last)) = (since, status.conditions.as_mut().and_then(|all| all.last_mut())) {
            last.last_transition_time = Some(since);
        }
        return Some(deadline);
    }
    if reason(status).as_deref() == Some("ProgressDeadlineExceeded") {
        return None;
    }
    let updated = find(status, "Progressing").and_then(|c| c.last_update_time.as_ref())?.0;
    let ends = updated + deadline;
    if ends < now {
        let message = format!("{subject} has timed out progressing.");
        set(status, "Progressing", "False", "ProgressDeadlineExceeded", message, now);
        return None;
    }
    Some(Duration::try_from(now.until(ends).ok()?).unwrap_or_default() + Duration::from_secs(1))
}

fn has_progressed(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    let get = |value: Option<i32>| value.unwrap_or(0);
    let outdated = |status: &DeploymentStatus| get(status.replicas) - get(status.updated_replicas);
    get(new.updated_replicas) > get(old.updated_replicas)
        || outdated(new) < outdated(old)
        || get(new.ready_replicas) > get(old.ready_replicas)
        || get(new.available_replicas) > get(old.available_replicas)
}

/// Takes a ReplicaSet's failure over, the newest one's first.
fn copy_failure(all: &[&ReplicaSet], new: Option<&ReplicaSet>, status: &mut DeploymentStatus) {
    let failures = new.into_iter().chain(all.iter().copied());
    let failure = failures
        .filter_map(|rs| rs.status.as_ref())
        .flat_map(|status| status.conditions.iter().flatten())
        .find(|condition| condition.type_.as_deref() == Some("ReplicaFailure"));
    let Some(failure) = failure else { return remove(status, "ReplicaFailure") };
    let current = find(status, "ReplicaFailure");
    if current.is_some_and(|c| c.status == failure.status && c.reason == failure.reason) {
        return;
    }
    let condition = DeploymentCondition {
        type_: failure.type_.clone(),
        status: failure.status.clone(),
        reason: failure.reason.clone(),
        message: failure.message.clone(),
        last_update_time: failure.last_transition_time.clone(),
        last_transition_time: failure.last_transition_time.clone(),
    };
    remove(status, "ReplicaFailure");
    status.conditions.get_or_insert_default().push(condition);
}
