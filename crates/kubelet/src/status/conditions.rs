//! The pod's conditions (upstream pkg/kubelet/status/generate.go, v1.37).

use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::model::{self, PodRuntime};
use crate::plan::{SandboxNeed, sandbox_need};
use crate::status::{Inputs, all_statuses, truncate};

/// Conditions that the kubelet owns, in the order in which it writes them.
pub const OWNED: [&str; 5] = ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

/// A condition's status with its reason and message.
struct Said {
    status: bool,
    reason: &'static str,
    message: String,
}

impl Said {
    fn yes() -> Self {
        Self::no_message(true, "")
    }

    fn no_message(status: bool, reason: &'static str) -> Self {
        Self { status, reason, message: String::new() }
    }
}

/// All conditions of the new status: foreign ones are kept as the API has them.
pub fn generate(pod: &Pod, runtime: &PodRuntime, inputs: &Inputs<'_>, status: &PodStatus) -> Vec<PodCondition> {
    let api = pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
    let mut conditions: Vec<PodCondition> = api.filter(|c| !OWNED.contains(&c.type_.as_str())).cloned().collect();
    let phase = status.phase.as_deref().unwrap_or("Pending");
    let statuses: Vec<&ContainerStatus> = all_statuses(status).collect();
    let ready_to_start = match sandbox_need(pod, runtime) {
        SandboxNeed::Keep => Said::yes(),
        SandboxNeed::New { why, .. } => Said { status: false, reason: "PodSandboxNotReady", message: why.to_owned() },
    };
    let containers_ready = containers_ready(pod, &statuses, phase);
    let ready = ready(pod, &conditions, &containers_ready);
    let said = [ready_to_start, initialized(pod, &statuses, phase), ready, containers_ready, Said::yes()];
    for (type_, said) in OWNED.into_iter().zip(said) {
        conditions.push(condition(pod, inputs, type_, said));
    }
    conditions
}

/// Says in condition DisruptionTarget that the kubelet takes the pod away.
pub fn set_disruption(pod: &Pod, inputs: &Inputs<'_>, status: &mut PodStatus, message: &str) {
    const TYPE: &str = "DisruptionTarget";
    let said = Said { status: true, reason: "TerminationByKubelet", message: message.to_owned() };
    let list = status.conditions.get_or_insert_default();
    list.retain(|condition| condition.type_ != TYPE);
    list.insert(0, condition(pod, inputs, TYPE, said));
}

fn condition(pod: &Pod, inputs: &Inputs<'_>, type_: &str, said: Said) -> PodCondition {
    let status = if said.status { "True" } else { "False" };
    let old = inputs.previous.conditions.iter().flatten().find(|c| c.type_ == type_);
    let since = old.filter(|c| c.status == status).and_then(|c| c.last_transition_time.clone()).unwrap_or(Time(truncate(inputs.now)));
    let some = |s: &str| (!s.is_empty()).then(|| s.to_owned());
    PodCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: some(said.reason),
        message: some(&said.message),
        observed_generation: pod.metadata.generation,
        last_transition_time: Some(since),
        last_probe_time: None,
    }
}

fn containers_ready(pod: &Pod, statuses: &[&ContainerStatus], phase: &str) -> Said {
    let sidecars = model::init_containers(pod).iter().filter(|c| model::is_sidecar(c));
    let mut unknown = Vec::new();
    let mut unready = Vec::new();
    for container in sidecars.chain(model::containers(pod)) {
        match find(statuses, &container.name) {
            None => unknown.push(container.name.as_str()),
            Some(status) if !status.ready => unready.push(container.name.as_str()),
            Some(_) => {}
        }
    }
    match phase {
        "Succeeded" if unknown.is_empty() => return Said::no_message(false, "PodCompleted"),
        "Failed" => return Said::no_message(false, "PodFailed"),
        _ => {}
    }
    not_ready("ContainersNotReady", &[("containers with unknown status", unknown), ("containers with unready status", unready)])
}

fn initialized(pod: &Pod, statuses: &[&ContainerStatus], phase: &str) -> Said {
    let mut unknown = Vec::new();
    let mut incomplete = Vec::new();
    for container in model::init_containers(pod) {
        match find(statuses, &container.name) {
            None => unknown.push(container.name.as_str()),
            Some(status) => {
                let done = if model::is_sidecar(container) { status.started == Some(true) } else { status.ready };
                if !done {
                    incomplete.push(container.name.as_str());
                }
            }
        }
    }
    if phase == "Succeeded" && unknown.is_empty() {
        return Said::no_message(true, "PodCompleted");
    }
    let any_started = model::containers(pod).iter().filter_map(|c| find(statuses, &c.name)).any(has_started);
    if any_started {
        return Said::yes();
    }
    not_ready("ContainersNotInitialized", &[("containers with unknown status", unknown), ("containers with incomplete status", incomplete)])
}

fn ready(pod: &Pod, conditions: &[PodCondition], containers_ready: &Said) -> Said {
    if !containers_ready.status {
        return Said { status: false, reason: containers_ready.reason, message: containers_ready.message.clone() };
    }
    let gates = pod.spec.iter().flat_map(|s| s.readiness_gates.iter().flatten());
    let messages: Vec<String> = gates
        .filter_map(|gate| {
            let type_ = &gate.condition_type;
            match conditions.iter().find(|c| &c.type_ == type_) {
                None => Some(format!("corresponding condition of pod readiness gate \"{type_}\" does not exist.")),
                Some(c) if c.status != "True" => {
                    Some(format!("the status of pod readiness gate \"{type_}\" is not \"True\", but {}", c.status))
                }
                Some(_) => None,
            }
        })
        .collect();
    if messages.is_empty() {
        return Said::yes();
    }
    Said { status: false, reason: "ReadinessGatesNotReady", message: messages.join(", ") }
}

/// True unless a list names containers; the message lists them as Go prints a slice.
fn not_ready(reason: &'static str, lists: &[(&str, Vec<&str>)]) -> Said {
    let messages: Vec<String> =
        lists.iter().filter(|(_, names)| !names.is_empty()).map(|(what, names)| format!("{what}: [{}]", names.join(" "))).collect();
    if messages.is_empty() {
        return Said::yes();
    }
    Said { status: false, reason, message: messages.join(", ") }
}

fn has_started(status: &ContainerStatus) -> bool {
    let state = status.state.as_ref();
    state.is_some_and(|s| s.running.is_some() || s.terminated.is_some())
}

fn find<'a>(statuses: &[&'a ContainerStatus], name: &str) -> Option<&'a ContainerStatus> {
    statuses.iter().find(|s| s.name == name).copied()
}
