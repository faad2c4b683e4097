//! What to do for one pod: a pure function of the pod, what the runtime holds, probe results, back-off and time.
//!
//! ```text
//!             no ready sandbox                     all init containers done
//!   (nothing) ---------------> sandbox + init[0] ... ----------------------> containers ... --> all ended: stop pod
//!        ^                            |  sandbox died, network changed                 |
//!        +----------------------------+------------------------------------------------+
//! ```
//!
//! The rules are upstream's (pkg/kubelet/kuberuntime `computePodActions`, `computeInitContainerActions`, v1.37).

use std::fmt;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container as ContainerSpec, Pod};

use crate::backoff::BackOff;
use crate::model::{self, PodRuntime, RunState};
use crate::probe::{Kind as ProbeKind, Outcome, Results};
use crate::restart;

/// Why a container is ended; decides the grace period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KillReason {
    /// None of the others.
    Other,
    /// A startup probe failed.
    StartupProbe,
    /// A liveness probe failed.
    LivenessProbe,
}

/// A container to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kill {
    /// The runtime's id.
    pub id: String,
    /// Name in the spec.
    pub name: String,
    /// Text of the Killing event.
    pub message: String,
    /// Why.
    pub reason: KillReason,
}

/// Which list of the pod's spec a container is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListKind {
    /// `spec.initContainers`.
    Init,
    /// `spec.containers`.
    Regular,
    /// `spec.ephemeralContainers`.
    Ephemeral,
}

/// A container to make and start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Its list.
    pub list: ListKind,
    /// Position in the list.
    pub index: usize,
    /// Name in the spec.
    pub name: String,
    /// A restart whose back-off is to be counted from this end of the previous run.
    pub after_exit_at: Option<Timestamp>,
    /// A failure to start it ends the sync (ordinary init containers).
    pub required: bool,
}

/// A container that is not started yet because it crashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingOff {
    /// Name in the spec.
    pub name: String,
    /// Message of the waiting state.
    pub message: String,
    /// End of the delay.
    pub until: Timestamp,
}

/// A sandbox to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateSandbox {
    /// Attempt number of the new sandbox.
    pub attempt: u32,
    /// An older sandbox is replaced (event SandboxChanged).
    pub replaces: bool,
}

/// Actions, in the order in which they are carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// End every container, then every sandbox.
    pub stop_pod: bool,
    /// Single containers to end (only without `stop_pod`).
    pub kill: Vec<Kill>,
    /// Dead containers to remove first: init containers of an earlier sandbox.
    pub remove: Vec<String>,
    /// A sandbox to make.
    pub create_sandbox: Option<CreateSandbox>,
    /// Containers to start, in order.
    pub start: Vec<Start>,
    /// Containers held back.
    pub backing_off: Vec<BackingOff>,
}

/// Why the pod needs a new sandbox, or that it does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SandboxNeed {
    /// The newest one serves.
    Keep,
    /// A new one with this attempt number is needed.
    New {
        /// Attempt number of the new sandbox.
        attempt: u32,
        /// One that exists is replaced.
        replaces: bool,
        /// Message of condition PodReadyToStartContainers.
        why: &'static str,
    },
}

/// Decides whether the newest sandbox serves (upstream `PodSandboxChanged`).
pub fn sandbox_need(pod: &Pod, runtime: &PodRuntime) -> SandboxNeed {
    let Some(newest) = runtime.sandboxes.first() else {
        return SandboxNeed::New { attempt: 0, replaces: false, why: "no pod sandbox exists" };
    };
    let host_network = model::is_host_network(pod);
    let ready_count = runtime.sandboxes.iter().filter(|s| s.ready).count();
    let why = if ready_count > 1 {
        "multiple pod sandboxes are ready and need to be reconciled"
    } else if !newest.ready {
        "pod sandbox is not ready"
    } else if newest.host_network != host_network {
        "network namespace mode changed and sandbox needs to be recreated"
    } else if !host_network && newest.has_network_status && newest.ips.is_empty() {
        "pod sandbox has no IP address"
    } else {
        return SandboxNeed::Keep;
    };
    SandboxNeed::New { attempt: newest.attempt + 1, replaces: newest.host_network == host_network, why }
}

/// Plans one sync of a pod that is to run.
pub fn plan(pod: &Pod, runtime: &PodRuntime, probes: &Results, backoff: &BackOff, now: Timestamp) -> Plan {
    let mut plan = match sandbox_need(pod, runtime) {
        SandboxNeed::New { attempt, replaces, .. } => plan_new_sandbox(pod, runtime, attempt, replaces),
        SandboxNeed::Keep => plan_in_sandbox(pod, runtime, probes),
    };
    hold_back(&mut plan, pod, runtime, backoff, now);
    plan
}

fn plan_new_sandbox(pod: &Pod, runtime: &PodRuntime, attempt: u32, replaces: bool) -> Plan {
    let mut plan = Plan { stop_pod: true, ..Plan::default() };
    let restarts = restart::pod_policy(pod) != "Never";
    if !restarts && attempt != 0 && !runtime.containers.is_empty() {
        return plan;
    }
    let succeeded = |c: &ContainerSpec| runtime.find(&c.name).is_some_and(|s| s.state == RunState::Exited && s.exit_code == 0);
    let to_start: Vec<(usize, &ContainerSpec)> = model::containers(pod)
        .iter()
        .enumerate()
        .filter(|(_, c)| {
            let policy = c.restart_policy.as_deref();
            let once = policy.unwrap_or_else(|| restart::pod_policy(pod)) == "OnFailure";
            !(once && succeeded(c))
        })
        .collect();
    let initialized = model::containers(pod).iter().any(|c| runtime.find(&c.name).is_some());
    if to_start.is_empty() && initialized {
        return plan;
    }
    plan.create_sandbox = Some(CreateSandbox { attempt, replaces });
    plan.stop_pod = runtime.running().next().is_some() || !runtime.sandboxes.is_empty();
    let inits = model::init_containers(pod);
    plan.remove = runtime.containers.iter().filter(|c| inits.iter().any(|i| i.name == c.name)).map(|c| c.id.clone()).collect();
    if inits.is_empty() {
        plan.start = to_start.into_iter().map(|(index, c)| start(ListKind::Regular, index, c)).collect();
    } else {
        plan.start.push(start(ListKind::Init, 0, &inits[0]));
    }
    plan
}

fn plan_in_sandbox(pod: &Pod, runtime: &PodRuntime, probes: &Results) -> Plan {
    let mut plan = Plan::default();
    for (index, name) in ephemeral_names(pod).enumerate() {
        if runtime.find(name).is_none() {
            plan.start.push(Start { list: ListKind::Ephemeral, index, name: name.to_owned(), after_exit_at: None, required: false });
        }
    }
    let mut init = InitPlan::default();
    let initialized = plan_init(pod, runtime, probes, &mut init);
    plan.stop_pod = init.stop_pod;
    plan.kill.append(&mut init.kill);
    let mut keep_count = 0;
    let mut regular = Vec::new();
    if initialized && !plan.stop_pod {
        for (index, container) in model::containers(pod).iter().enumerate() {
            match plan_regular(pod, container, runtime, probes, &mut plan.kill) {
                Regular::Keep => keep_count += 1,
                Regular::Start => regular.push(start(ListKind::Regular, index, container)),
                Regular::Leave => {}
            }
        }
        if keep_count == 0 && regular.is_empty() {
            plan.stop_pod = true;
            init.start.clear();
        }
    }
    let inits = model::init_containers(pod);
    init.start.sort_unstable();
    init.start.dedup();
    plan.start.extend(init.start.iter().map(|&index| start(ListKind::Init, index, &inits[index])));
    plan.start.extend(regular);
    if plan.stop_pod {
        plan.kill.clear();
        plan.start.clear();
    }
    plan
}

enum Regular {
    Keep,
    Start,
    Leave,
}

fn plan_regular(pod: &Pod, container: &ContainerSpec, runtime: &PodRuntime, probes: &Results, kill: &mut Vec<Kill>) -> Regular {
    let status = match runtime.find(&container.name) {
        Some(status) if status.state == RunState::Running => status,
        other => {
            if !restart::wanted(container, pod, runtime) {
                return Regular::Leave;
            }
            if let Some(unknown) = other.filter(|s| s.state == RunState::Unknown) {
                let message = "Container is in \"unknown\" state, try killing it before restart".to_owned();
                kill.push(kill_of(unknown, message, KillReason::Other));
            }
            return Regular::Start;
        }
    };
    let name = &container.name;
    let (message, reason, restarts) = if changed(container, status) {
        (format!("Container {name} definition changed"), KillReason::Other, true)
    } else if probes.get(&status.id, ProbeKind::Liveness) == Some(Outcome::Failure) {
        let message = format!("Container {name} failed liveness probe");
        let restarts = restart::after_kill(container, pod);
        (message, KillReason::LivenessProbe, restarts)
    } else if probes.get(&status.id, ProbeKind::Startup) == Some(Outcome::Failure) {
        let message = format!("Container {name} failed startup probe");
        let restarts = restart::after_kill(container, pod);
        (message, KillReason::StartupProbe, restarts)
    } else {
        return Regular::Keep;
    };
    let message = if restarts { format!("{message}, will be restarted") } else { message };
    kill.push(kill_of(status, message, reason));
    if restarts { Regular::Start } else { Regular::Leave }
}

#[derive(Default)]
struct InitPlan {
    stop_pod: bool,
    kill: Vec<Kill>,
    start: Vec<usize>,
}

enum InitStep {
    /// Nothing more for this container.
    Done,
    /// The pod has failed for good.
    Failed,
    /// This container has done its part of the initialization.
    Initialized,
}

/// Walks the init containers from the last to the first; true when initialization is over.
fn plan_init(pod: &Pod, runtime: &PodRuntime, probes: &Results, plan: &mut InitPlan) -> bool {
    let inits = model::init_containers(pod);
    if inits.is_empty() {
        return true;
    }
    let mut initialized = runtime.any_active_regular_started(pod);
    let mut previously = initialized;
    for (index, container) in inits.iter().enumerate().rev() {
        let sidecar = model::is_sidecar(container);
        let Some(status) = runtime.find_active(&container.name) else {
            if previously && sidecar {
                plan.start.push(index);
            }
            continue;
        };
        if previously && !sidecar {
            continue;
        }
        let step = match status.state {
            RunState::Created => {
                plan.start.push(index);
                InitStep::Done
            }
            RunState::Running if sidecar => running_sidecar(container, status, probes, plan, index),
            RunState::Running => InitStep::Done,
            RunState::Exited if sidecar => {
                plan.start.push(index);
                InitStep::Done
            }
            RunState::Exited => ended_init(pod, container, status, plan, index),
            RunState::Unknown => unknown_init(pod, container, status, plan, index),
        };
        match step {
            InitStep::Failed => {
                plan.stop_pod = true;
                plan.start.clear();
                return false;
            }
            InitStep::Initialized if index + 1 == inits.len() => initialized = true,
            InitStep::Initialized if !previously => plan.start.push(index + 1),
            InitStep::Initialized | InitStep::Done => {}
        }
        previously = true;
    }
    if !previously {
        plan.start.push(0);
    }
    initialized
}

fn running_sidecar(container: &ContainerSpec, status: &model::Container, probes: &Results, plan: &mut InitPlan, index: usize) -> InitStep {
    let name = &container.name;
    if container.startup_probe.is_some() {
        match probes.get(&status.id, ProbeKind::Startup) {
            Some(Outcome::Success) => {}
            Some(Outcome::Failure) => {
                let message = format!("Init container {name} failed startup probe");
                plan.kill.push(kill_of(status, message, KillReason::StartupProbe));
                plan.start.push(index);
                return InitStep::Done;
            }
            _ => return InitStep::Done,
        }
    }
    if changed(container, status) {
        let message = format!("Init container {name} definition changed");
        plan.kill.push(kill_of(status, message, KillReason::Other));
        plan.start.push(index);
    } else if container.liveness_probe.is_some() && probes.get(&status.id, ProbeKind::Liveness) == Some(Outcome::Failure) {
        let message = format!("Init container {name} failed liveness probe");
        plan.kill.push(kill_of(status, message, KillReason::LivenessProbe));
        plan.start.push(index);
    }
    InitStep::Initialized
}

fn ended_init(pod: &Pod, container: &ContainerSpec, status: &model::Container, plan: &mut InitPlan, index: usize) -> InitStep {
    if status.exit_code == 0 {
        return InitStep::Initialized;
    }
    // An init container that failed under restart policy Always or OnFailure runs again until it succeeds.
    if !restart::after_exit(container, pod, status.exit_code) {
        return InitStep::Failed;
    }
    plan.start.push(index);
    InitStep::Done
}

fn unknown_init(pod: &Pod, container: &ContainerSpec, status: &model::Container, plan: &mut InitPlan, index: usize) -> InitStep {
    if !model::is_sidecar(container) && !restart::after_kill(container, pod) {
        return InitStep::Failed;
    }
    let message = "Init container is in \"unknown\" state, try killing it before restart";
    plan.kill.push(kill_of(status, message.to_owned(), KillReason::Other));
    plan.start.push(index);
    InitStep::Done
}

/// Moves containers whose crash back-off lasts from `start` to `backing_off`.
fn hold_back(plan: &mut Plan, pod: &Pod, runtime: &PodRuntime, backoff: &BackOff, now: Timestamp) {
    let mut kept = Vec::new();
    for mut start in std::mem::take(&mut plan.start) {
        let ended = runtime.containers.iter().find(|c| c.name == start.name && c.state == RunState::Exited);
        let since = ended.map(|c| c.finished_at.unwrap_or(now));
        let key = restart_key(pod, &start.name);
        if let Some(until) = since.and_then(|since| backoff.until(&key, since, now)) {
            let delay = format_delay(backoff.delay(&key));
            plan.backing_off.push(BackingOff {
                message: format!("back-off {delay} restarting failed container={} pod={}", start.name, model::format_pod(pod)),
                name: start.name,
                until,
            });
            if start.required {
                break;
            }
            continue;
        }
        start.after_exit_at = since;
        kept.push(start);
    }
    plan.start = kept;
}

/// Key of a container in the crash back-off; a changed spec has a key of its own.
pub fn restart_key(pod: &Pod, container: &str) -> String {
    let hash = model::container_spec(pod, container).map_or(0, model::container_hash);
    format!("{}_{container}_{hash:x}", model::format_pod(pod))
}

/// A delay as Go prints a duration of whole seconds (`10s`, `2m40s`, `5m0s`).
pub fn format_delay(delay: std::time::Duration) -> String {
    let seconds = delay.as_secs();
    match seconds / 60 {
        0 => format!("{seconds}s"),
        minutes => format!("{minutes}m{}s", seconds % 60),
    }
}

fn start(list: ListKind, index: usize, container: &ContainerSpec) -> Start {
    Start {
        list,
        index,
        name: container.name.clone(),
        after_exit_at: None,
        required: list == ListKind::Init && !model::is_sidecar(container),
    }
}

fn kill_of(status: &model::Container, message: String, reason: KillReason) -> Kill {
    Kill { id: status.id.clone(), name: status.name.clone(), message, reason }
}

fn changed(container: &ContainerSpec, status: &model::Container) -> bool {
    status.hash.is_some_and(|hash| hash != model::container_hash(container))
}

fn ephemeral_names(pod: &Pod) -> impl Iterator<Item = &str> {
    pod.spec.iter().flat_map(|s| s.ephemeral_containers.iter().flatten()).map(|c| c.name.as_str())
}

impl fmt::Display for Plan {
    /// One action a line: what golden tests compare.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.stop_pod {
            writeln!(f, "stop pod")?;
        }
        for kill in &self.kill {
            writeln!(f, "kill {} ({:?}): {}", kill.id, kill.reason, kill.message)?;
        }
        for id in &self.remove {
            writeln!(f, "remove {id}")?;
        }
        if let Some(sandbox) = &self.create_sandbox {
            let replaces = if sandbox.replaces { ", replacing" } else { "" };
            writeln!(f, "create sandbox attempt {}{replaces}", sandbox.attempt)?;
        }
        for start in &self.start {
            writeln!(f, "start {:?} {}", start.list, start.name)?;
        }
        for held in &self.backing_off {
            writeln!(f, "hold {}: {}", held.name, held.message)?;
        }
        Ok(())
    }
}
