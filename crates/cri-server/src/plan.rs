//! What a server that starts makes of what its predecessor left. Pure.
//!
//! The records say what was; the boot id says whether it can still be; shims say what is. In doubt nothing is removed.

use std::collections::BTreeSet;

use crate::record::{ContainerPhase, ContainerRecord, SandboxPhase, SandboxRecord};

/// What was heard of a sandbox' shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShimSeen {
    /// It does not answer, and no successor could be started; or it is of another boot.
    Gone,
    /// It answers; `pid` is in the pod's namespaces.
    Alive { ready: bool, pid: u32 },
}

/// What was heard of a container's task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskSeen {
    /// Its shim is gone, or was not asked.
    Unknown,
    /// Its shim knows no such task.
    Missing,
    /// Created, not started.
    Created,
    /// It runs.
    Running { pid: u32 },
    /// It has ended.
    Stopped { status: u32, at: i64 },
}

/// All that was found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    pub boot_id: String,
    pub sandboxes: Vec<(SandboxRecord, Option<ShimSeen>)>,
    pub containers: Vec<(ContainerRecord, Option<TaskSeen>)>,
    /// Some record could not be read.
    pub has_unreadable: bool,
    /// Container ids whose snapshot is in the image store.
    pub snapshots: Vec<String>,
    /// Container directories without a record.
    pub bare_containers: Vec<String>,
    /// Sandbox directories without a record.
    pub bare_sandboxes: Vec<String>,
}

/// What becomes of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxAction {
    /// Nobody knows its id: it is removed.
    Unmake,
    /// It goes on.
    Keep { pid: u32 },
    /// It is not ready any more; what it held is given back.
    Stop,
    /// It was stopped before.
    Rest,
}

/// What becomes of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContainerAction {
    /// Nobody knows its id, or its sandbox is unmade.
    Unmake,
    /// It is as it was recorded.
    Keep,
    /// It is recorded as ended, and only its task is still to be deleted.
    DeleteTask,
    /// It runs, and is watched.
    Watch { pid: u32 },
    /// It ended while nobody looked: with this status at that time, or unknown.
    Exited { exit: Option<(u32, i64)> },
    /// Its start was cut off before anything ran: it is again as CreateContainer left it.
    NotStarted,
    /// Its start was cut off, and nobody knows how far it came: what there is of it is deleted.
    StartFailed,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub sandboxes: Vec<(String, SandboxAction)>,
    pub containers: Vec<(String, ContainerAction)>,
    pub remove_snapshots: Vec<String>,
    pub remove_containers: Vec<String>,
    pub remove_sandboxes: Vec<String>,
    /// Sandboxes whose network stays; the others' may go only if this is known to be all.
    pub networks: Option<BTreeSet<String>>,
}

/// Decides.
pub fn plan(found: &Found) -> Plan {
    let mut plan = Plan::default();
    for (record, seen) in &found.sandboxes {
        plan.sandboxes.push((record.id.clone(), sandbox(record, *seen, &found.boot_id)));
    }
    let unmade: BTreeSet<&str> =
        plan.sandboxes.iter().filter(|(_, action)| *action == SandboxAction::Unmake).map(|(id, _)| id.as_str()).collect();
    let known: BTreeSet<&str> = plan.sandboxes.iter().map(|(id, _)| id.as_str()).collect();
    for (record, seen) in &found.containers {
        let orphan = !known.contains(record.sandbox_id.as_str()) && !found.has_unreadable;
        let action = if unmade.contains(record.sandbox_id.as_str()) || orphan {
            ContainerAction::Unmake
        } else {
            container(record, *seen, &found.boot_id)
        };
        plan.containers.push((record.id.clone(), action));
    }
    if found.has_unreadable {
        return plan;
    }
    let recorded: BTreeSet<&str> = found.containers.iter().map(|(record, _)| record.id.as_str()).collect();
    plan.remove_snapshots = found.snapshots.iter().filter(|key| !recorded.contains(key.as_str())).cloned().collect();
    plan.remove_containers = found.bare_containers.clone();
    plan.remove_sandboxes = found.bare_sandboxes.clone();
    plan.networks =
        Some(plan.sandboxes.iter().filter(|(_, action)| matches!(action, SandboxAction::Keep { .. })).map(|(id, _)| id.clone()).collect());
    plan
}

fn sandbox(record: &SandboxRecord, seen: Option<ShimSeen>, boot_id: &str) -> SandboxAction {
    match (record.phase, seen) {
        (SandboxPhase::Creating, _) => SandboxAction::Unmake,
        (SandboxPhase::NotReady, _) => SandboxAction::Rest,
        (SandboxPhase::Ready, _) if record.boot_id != boot_id => SandboxAction::Stop,
        (SandboxPhase::Ready, Some(ShimSeen::Alive { ready: true, pid })) => SandboxAction::Keep { pid },
        (SandboxPhase::Ready, _) => SandboxAction::Stop,
    }
}

fn container(record: &ContainerRecord, seen: Option<TaskSeen>, boot_id: &str) -> ContainerAction {
    let seen = if record.boot_id == boot_id { seen.unwrap_or(TaskSeen::Unknown) } else { TaskSeen::Unknown };
    match (&record.phase, seen) {
        (ContainerPhase::Creating, _) => ContainerAction::Unmake,
        (ContainerPhase::Exited { .. }, TaskSeen::Stopped { .. }) => ContainerAction::DeleteTask,
        (ContainerPhase::Created | ContainerPhase::Exited { .. }, _) => ContainerAction::Keep,
        (_, TaskSeen::Running { pid }) => ContainerAction::Watch { pid },
        (_, TaskSeen::Stopped { status, at }) => ContainerAction::Exited { exit: Some((status, at)) },
        (ContainerPhase::Starting, TaskSeen::Created | TaskSeen::Missing) => ContainerAction::NotStarted,
        (ContainerPhase::Starting, TaskSeen::Unknown) => ContainerAction::StartFailed,
        // A task that was started cannot be one that was only created.
        (_, TaskSeen::Unknown | TaskSeen::Missing | TaskSeen::Created) => ContainerAction::Exited { exit: None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::{Resources, User};
    use crate::record::{Encoded, VERSION};

    fn sandbox(id: &str, phase: SandboxPhase) -> SandboxRecord {
        SandboxRecord {
            version: VERSION,
            boot_id: "now".into(),
            id: id.into(),
            phase,
            config: Encoded::default(),
            runtime_handler: String::new(),
            handler: crate::handler::Handler::default(),
            created_at: 0,
            netns: None,
            ips: Vec::new(),
            pid: 1,
            shim: None,
        }
    }

    fn container(id: &str, sandbox_id: &str, phase: ContainerPhase) -> ContainerRecord {
        ContainerRecord {
            version: VERSION,
            boot_id: "now".into(),
            id: id.into(),
            sandbox_id: sandbox_id.into(),
            phase,
            config: Encoded::default(),
            image_id: String::new(),
            log_path: String::new(),
            created_at: 0,
            user: User::default(),
            resources: Resources::default(),
            oom_score_adj: None,
            stop_signal: None,
            cgroups_path: String::new(),
        }
    }

    fn running() -> ContainerPhase {
        ContainerPhase::Running { pid: 5, started_at: 1 }
    }

    fn exited() -> ContainerPhase {
        ContainerPhase::Exited { started_at: 1, finished_at: 2, exit_code: 0, reason: String::new(), message: String::new() }
    }

    fn found() -> Found {
        let alive = Some(ShimSeen::Alive { ready: true, pid: 9 });
        Found {
            boot_id: "now".into(),
            sandboxes: vec![
                (sandbox("up", SandboxPhase::Ready), alive),
                (sandbox("dead", SandboxPhase::Ready), Some(ShimSeen::Gone)),
                (sandbox("half", SandboxPhase::Creating), alive),
                (sandbox("old", SandboxPhase::NotReady), None),
            ],
            containers: vec![
                (container("runs", "up", running()), Some(TaskSeen::Running { pid: 6 })),
                (container("ended", "up", running()), Some(TaskSeen::Stopped { status: 3, at: 7 })),
                (container("lost", "dead", running()), Some(TaskSeen::Unknown)),
                (container("cut", "up", ContainerPhase::Starting), Some(TaskSeen::Created)),
                (container("cut-lost", "dead", ContainerPhase::Starting), Some(TaskSeen::Unknown)),
                (container("cut-late", "up", ContainerPhase::Starting), Some(TaskSeen::Running { pid: 8 })),
                (container("made", "up", ContainerPhase::Created), Some(TaskSeen::Missing)),
                (container("over", "up", exited()), None),
                (container("told", "up", exited()), Some(TaskSeen::Stopped { status: 3, at: 7 })),
                (container("of-half", "half", running()), Some(TaskSeen::Running { pid: 4 })),
                (container("orphan", "nowhere", exited()), None),
            ],
            has_unreadable: false,
            snapshots: vec!["runs".into(), "leaked".into()],
            bare_containers: vec!["b".into()],
            bare_sandboxes: Vec::new(),
        }
    }

    fn actions(plan: &Plan) -> Vec<(&str, ContainerAction)> {
        plan.containers.iter().map(|(id, action)| (id.as_str(), *action)).collect()
    }

    #[test]
    fn a_restart_of_the_daemon() {
        let plan = plan(&found());
        assert_eq!(
            plan.sandboxes,
            [
                ("up".to_owned(), SandboxAction::Keep { pid: 9 }),
                ("dead".to_owned(), SandboxAction::Stop),
                ("half".to_owned(), SandboxAction::Unmake),
                ("old".to_owned(), SandboxAction::Rest),
            ]
        );
        assert_eq!(
            actions(&plan),
            [
                ("runs", ContainerAction::Watch { pid: 6 }),
                ("ended", ContainerAction::Exited { exit: Some((3, 7)) }),
                ("lost", ContainerAction::Exited { exit: None }),
                ("cut", ContainerAction::NotStarted),
                ("cut-lost", ContainerAction::StartFailed),
                ("cut-late", ContainerAction::Watch { pid: 8 }),
                ("made", ContainerAction::Keep),
                ("over", ContainerAction::Keep),
                ("told", ContainerAction::DeleteTask),
                ("of-half", ContainerAction::Unmake),
                ("orphan", ContainerAction::Unmake),
            ]
        );
        assert_eq!(plan.remove_snapshots, ["leaked"]);
        assert_eq!(plan.networks, Some(BTreeSet::from(["up".to_owned()])));
    }

    #[test]
    fn a_reboot_ends_all_that_ran() {
        let mut found = found();
        found.boot_id = "later".into();
        let plan = plan(&found);
        assert_eq!(plan.sandboxes[0].1, SandboxAction::Stop);
        assert_eq!(
            actions(&plan)[..3],
            [
                ("runs", ContainerAction::Exited { exit: None }),
                ("ended", ContainerAction::Exited { exit: None }),
                ("lost", ContainerAction::Exited { exit: None })
            ]
        );
        assert_eq!(plan.networks, Some(BTreeSet::new()));
    }

    #[test]
    fn in_doubt_nothing_is_removed() {
        let mut found = found();
        found.has_unreadable = true;
        let plan = plan(&found);
        assert!(plan.remove_snapshots.is_empty() && plan.remove_containers.is_empty() && plan.networks.is_none());
        assert_eq!(actions(&plan).last(), Some(&("orphan", ContainerAction::Keep)));
    }
}
