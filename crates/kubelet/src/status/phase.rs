//! The pod's phase from its container statuses (upstream pkg/kubelet/kubelet_pods.go `getPhase`, v1.37).

use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod};

use crate::{model, restart};

#[derive(Default)]
struct Counts {
    pending_init: usize,
    pending_sidecar: usize,
    init_failed_for_good: usize,
    unknown: usize,
    running: usize,
    waiting: usize,
    stopped: usize,
    stopped_for_good: usize,
    succeeded: usize,
}

/// What a container's status says about it.
enum Seen {
    Absent,
    Running { started: bool },
    Terminated(i32),
    WaitingAfter(i32),
    Waiting,
    Nothing,
}

/// The phase: Pending, Running, Succeeded or Failed.
pub fn phase(pod: &Pod, statuses: &[&ContainerStatus], terminal: bool, initialized: bool) -> &'static str {
    let mut counts = Counts::default();
    for container in model::init_containers(pod) {
        let seen = seen(statuses, &container.name);
        if model::is_sidecar(container) {
            count_sidecar(&mut counts, &seen);
        } else {
            count_init(&mut counts, pod, container, &seen);
        }
    }
    for container in model::containers(pod) {
        count_regular(&mut counts, pod, container, &seen(statuses, &container.name));
    }
    decide(&counts, terminal, initialized)
}

fn decide(c: &Counts, terminal: bool, initialized: bool) -> &'static str {
    if c.init_failed_for_good > 0 {
        return "Failed";
    }
    if c.pending_init > 0 || (c.pending_sidecar > 0 && !initialized) || c.waiting > 0 {
        return "Pending";
    }
    if c.running > 0 && c.unknown == 0 {
        return "Running";
    }
    if c.running == 0 && c.stopped > 0 && c.unknown == 0 {
        if !terminal && c.stopped != c.stopped_for_good {
            return "Running";
        }
        return if c.stopped == c.succeeded { "Succeeded" } else { "Failed" };
    }
    "Pending"
}

fn count_init(counts: &mut Counts, pod: &Pod, container: &Container, seen: &Seen) {
    match *seen {
        Seen::Terminated(code) | Seen::WaitingAfter(code) => {
            if code != 0 && !restart::after_exit(container, pod, code) {
                counts.init_failed_for_good += 1;
            }
        }
        Seen::Absent | Seen::Running { .. } | Seen::Waiting | Seen::Nothing => {
            counts.pending_init += 1;
        }
    }
}

fn count_sidecar(counts: &mut Counts, seen: &Seen) {
    match *seen {
        Seen::Absent => counts.unknown += 1,
        Seen::Running { started } => {
            counts.running += 1;
            counts.pending_sidecar += usize::from(!started);
        }
        Seen::Terminated(_) | Seen::WaitingAfter(_) => {}
        Seen::Waiting => {
            counts.pending_sidecar += 1;
            counts.waiting += 1;
        }
        Seen::Nothing => {
            counts.pending_sidecar += 1;
            counts.unknown += 1;
        }
    }
}

fn count_regular(counts: &mut Counts, pod: &Pod, container: &Container, seen: &Seen) {
    match *seen {
        Seen::Absent | Seen::Nothing => counts.unknown += 1,
        Seen::Running { .. } => counts.running += 1,
        Seen::Waiting => counts.waiting += 1,
        Seen::Terminated(code) | Seen::WaitingAfter(code) => {
            counts.stopped += 1;
            if !restart::after_exit(container, pod, code) {
                counts.stopped_for_good += 1;
            }
            if code == 0 && matches!(seen, Seen::Terminated(_)) {
                counts.succeeded += 1;
            }
        }
    }
}

fn seen(statuses: &[&ContainerStatus], name: &str) -> Seen {
    let Some(status) = statuses.iter().find(|s| s.name == name) else {
        return Seen::Absent;
    };
    let Some(state) = status.state.as_ref() else {
        return Seen::Nothing;
    };
    if state.running.is_some() {
        return Seen::Running { started: status.started == Some(true) };
    }
    if let Some(terminated) = &state.terminated {
        return Seen::Terminated(terminated.exit_code);
    }
    if state.waiting.is_none() {
        return Seen::Nothing;
    }
    let last = status.last_state.as_ref();
    match last.and_then(|s| s.terminated.as_ref()) {
        Some(terminated) => Seen::WaitingAfter(terminated.exit_code),
        None => Seen::Waiting,
    }
}
