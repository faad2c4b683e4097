//! Container statuses (upstream pkg/kubelet/kubelet_pods.go `convertToAPIContainerStatuses` and
//! pkg/kubelet/prober `UpdatePodStatus`, v1.37).

use k8s_openapi::api::core::v1::{
    Container as ContainerSpec, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    ContainerUser, LinuxContainerUser, Pod, VolumeMountStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::model::{self, Container, PodRuntime, RunState};
use crate::probe::{Kind as ProbeKind, Outcome};
use crate::restart;
use crate::status::{Inputs, truncate};

/// Statuses of the three lists of containers.
pub struct Lists {
    /// Regular ones, by name.
    pub regular: Vec<ContainerStatus>,
    /// Init containers, in the order of the spec.
    pub init: Vec<ContainerStatus>,
    /// Ephemeral ones, by name.
    pub ephemeral: Vec<ContainerStatus>,
}

/// Which list is made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ListOf {
    Regular,
    Init,
    Ephemeral,
}

/// Makes the statuses of all containers.
pub fn generate(pod: &Pod, runtime: &PodRuntime, inputs: &Inputs<'_>) -> Lists {
    let list = |of: ListOf, specs: &[ContainerSpec], previous: &Option<Vec<ContainerStatus>>| {
        let previous = previous.as_deref().unwrap_or_default();
        specs
            .iter()
            .map(|spec| {
                let old = previous.iter().find(|s| s.name == spec.name);
                let mut status = one(pod, runtime, inputs, of, spec, old);
                apply_probes(&mut status, spec, of, old, inputs);
                status
            })
            .collect::<Vec<_>>()
    };
    let previous = inputs.previous;
    let mut regular = list(ListOf::Regular, model::containers(pod), &previous.container_statuses);
    regular.sort_by(|a, b| a.name.cmp(&b.name));
    let mut ephemeral = list(ListOf::Ephemeral, &crate::ephemeral::containers(pod), &previous.ephemeral_container_statuses);
    ephemeral.sort_by(|a, b| a.name.cmp(&b.name));
    Lists { regular, init: list(ListOf::Init, model::init_containers(pod), &previous.init_container_statuses), ephemeral }
}

fn one(
    pod: &Pod,
    runtime: &PodRuntime,
    inputs: &Inputs<'_>,
    of: ListOf,
    spec: &ContainerSpec,
    old: Option<&ContainerStatus>,
) -> ContainerStatus {
    let mut seen = runtime.containers.iter().filter(|c| c.name == spec.name);
    let newest = seen.next();
    let mut status = match newest {
        Some(container) => {
            let mut status = from_runtime(container, spec, old, inputs);
            let before = seen.next().map(|c| state_of(c, None, inputs));
            if let Some(before) = before {
                status.last_state = Some(before);
            }
            status
        }
        None => absent(pod, spec, old),
    };
    if of == ListOf::Init {
        if newest.is_some_and(|c| c.state == RunState::Exited && c.exit_code == 0) && !model::is_sidecar(spec) {
            return status;
        }
        if newest.is_none() && infer_completed(pod, runtime, spec, &mut status) {
            return status;
        }
    }
    if restart::wanted(spec, pod, runtime)
        && let Some(waiting) = inputs.waiting.get(&spec.name)
    {
        let state = status.state.take();
        if state.as_ref().is_some_and(|s| s.terminated.is_some()) {
            status.last_state = state;
        }
        status.state = Some(waiting_state(&waiting.reason, &waiting.message));
    }
    status
}

/// An init container that the runtime has forgotten has completed if a regular one was made.
fn infer_completed(pod: &Pod, runtime: &PodRuntime, spec: &ContainerSpec, status: &mut ContainerStatus) -> bool {
    let any_regular = model::containers(pod).iter().any(|c| runtime.find(&c.name).is_some());
    let waiting = status.state.as_ref().is_some_and(|s| s.waiting.is_some());
    if !any_regular || model::is_sidecar(spec) || !waiting {
        return false;
    }
    status.state = Some(ContainerState {
        terminated: Some(ContainerStateTerminated {
            reason: Some("Completed".to_owned()),
            message: Some(
                "Unable to get init container status from container runtime and pod has been initialized, treat it as exited normally"
                    .to_owned(),
            ),
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    });
    true
}

/// The status of a container that the runtime does not hold.
fn absent(pod: &Pod, spec: &ContainerSpec, old: Option<&ContainerStatus>) -> ContainerStatus {
    let mut status = base(spec);
    let has_inits = !model::init_containers(pod).is_empty();
    let default_reason = if has_inits { "PodInitializing" } else { "ContainerCreating" };
    status.state = Some(waiting_state(default_reason, ""));
    let Some(old) = old else {
        return status;
    };
    let old_state = old.state.as_ref();
    if old_state.is_some_and(|s| s.terminated.is_some()) {
        return old.clone();
    }
    status.restart_count = old.restart_count;
    status.last_state = old.last_state.clone();
    let was_running = old_state.is_some_and(|s| s.running.is_some());
    let has_last = status.last_state.as_ref().is_some_and(|s| s.terminated.is_some());
    if was_running && !has_last {
        status.last_state = Some(ContainerState {
            terminated: Some(ContainerStateTerminated {
                reason: Some("ContainerStatusUnknown".to_owned()),
                message: Some("The container could not be located when the pod was deleted.  The container used to be Running".to_owned()),
                exit_code: 137,
                ..ContainerStateTerminated::default()
            }),
            ..ContainerState::default()
        });
        if pod.metadata.deletion_timestamp.is_none() {
            status.restart_count += 1;
        }
    }
    status
}

fn from_runtime(container: &Container, spec: &ContainerSpec, old: Option<&ContainerStatus>, inputs: &Inputs<'_>) -> ContainerStatus {
    let id = full_id(container, inputs);
    let mut status = base(spec);
    status.restart_count = container.restart_count;
    if !container.image.is_empty() {
        status.image = container.image.clone();
    }
    status.image_id = container.image_ref.clone();
    status.container_id = Some(id.clone());
    status.state = Some(state_of(container, old, inputs));
    status.user = container.user.as_ref().map(|user| ContainerUser {
        linux: Some(LinuxContainerUser {
            uid: user.uid,
            gid: user.gid,
            supplemental_groups: (!user.supplemental_groups.is_empty()).then(|| user.supplemental_groups.clone()),
        }),
    });
    status.resources = spec.resources.clone().or_else(|| Some(Default::default()));
    status.allocated_resources = spec.resources.as_ref().and_then(|r| r.requests.clone());
    if let Some(old) = old {
        status.restart_count = status.restart_count.max(old.restart_count);
        let terminated_before = old.container_id.as_deref() != Some(&id) && old.state.as_ref().is_some_and(|s| s.terminated.is_some());
        status.last_state = if terminated_before { old.state.clone() } else { old.last_state.clone() };
    }
    status
}

fn base(spec: &ContainerSpec) -> ContainerStatus {
    let mounts: Vec<VolumeMountStatus> = spec
        .volume_mounts
        .iter()
        .flatten()
        .map(|mount| VolumeMountStatus {
            name: mount.name.clone(),
            mount_path: mount.mount_path.clone(),
            read_only: mount.read_only,
            recursive_read_only: mount.read_only.filter(|ro| *ro).map(|_| "Disabled".to_owned()),
            ..VolumeMountStatus::default()
        })
        .collect();
    ContainerStatus {
        name: spec.name.clone(),
        image: spec.image.clone().unwrap_or_default(),
        volume_mounts: (!mounts.is_empty()).then_some(mounts),
        last_state: Some(ContainerState::default()),
        started: Some(false),
        ..ContainerStatus::default()
    }
}

fn state_of(container: &Container, old: Option<&ContainerStatus>, inputs: &Inputs<'_>) -> ContainerState {
    let time = |t: Option<jiff::Timestamp>| t.map(|t| Time(truncate(t))).or_else(|| jiff::Timestamp::from_second(0).ok().map(Time));
    let some = |s: &str| (!s.is_empty()).then(|| s.to_owned());
    match container.state {
        RunState::Running => {
            ContainerState { running: Some(ContainerStateRunning { started_at: time(container.started_at) }), ..ContainerState::default() }
        }
        RunState::Exited => ContainerState {
            terminated: Some(ContainerStateTerminated {
                exit_code: container.exit_code,
                reason: some(&container.reason),
                message: some(&container.message),
                started_at: time(container.started_at),
                finished_at: time(container.finished_at),
                container_id: Some(full_id(container, inputs)),
                signal: None,
            }),
            ..ContainerState::default()
        },
        RunState::Unknown if old.and_then(|o| o.state.as_ref()).is_some_and(|s| s.running.is_some()) => ContainerState {
            terminated: Some(ContainerStateTerminated {
                reason: Some("ContainerStatusUnknown".to_owned()),
                message: Some("The container could not be located when the pod was terminated".to_owned()),
                exit_code: 137,
                ..ContainerStateTerminated::default()
            }),
            ..ContainerState::default()
        },
        RunState::Created | RunState::Unknown => waiting_state("", ""),
    }
}

fn waiting_state(reason: &str, message: &str) -> ContainerState {
    let some = |s: &str| (!s.is_empty()).then(|| s.to_owned());
    ContainerState { waiting: Some(ContainerStateWaiting { reason: some(reason), message: some(message) }), ..ContainerState::default() }
}

/// `started` and `ready` from the probes.
fn apply_probes(status: &mut ContainerStatus, spec: &ContainerSpec, of: ListOf, old: Option<&ContainerStatus>, inputs: &Inputs<'_>) {
    let state = status.state.as_ref();
    let running = state.is_some_and(|s| s.running.is_some());
    let id = bare_id(status.container_id.as_deref().unwrap_or(""));
    let same = old.filter(|o| o.container_id == status.container_id && running);
    let started = running
        && match inputs.probes.get(id, ProbeKind::Startup) {
            Some(outcome) => outcome == Outcome::Success,
            None => spec.startup_probe.is_none() || same.is_some_and(|o| o.started == Some(true)),
        };
    status.started = Some(started);
    if of == ListOf::Init && !model::is_sidecar(spec) {
        let terminated = status.state.as_ref().and_then(|s| s.terminated.as_ref());
        status.ready = terminated.is_some_and(|t| t.exit_code == 0);
        return;
    }
    if of == ListOf::Ephemeral {
        status.started = None;
        status.ready = false;
        return;
    }
    status.ready = started
        && match inputs.probes.get(id, ProbeKind::Readiness) {
            Some(outcome) => outcome == Outcome::Success,
            None => spec.readiness_probe.is_none() || same.is_some_and(|o| o.ready),
        };
}

fn full_id(container: &Container, inputs: &Inputs<'_>) -> String {
    format!("{}://{}", inputs.runtime_name, container.id)
}

/// The runtime's id in `NAME://ID`.
pub fn bare_id(id: &str) -> &str {
    id.split_once("://").map_or(id, |(_, id)| id)
}
