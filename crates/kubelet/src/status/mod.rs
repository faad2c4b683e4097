//! The pod's API status: a pure function of the pod, what the runtime holds, probe results and what went wrong.
//!
//! The rules are upstream's (pkg/kubelet/kubelet_pods.go `generateAPIPodStatus`, pkg/kubelet/status/generate.go, v1.37).

mod conditions;
mod containers;
pub use conditions::OWNED as OWNED_CONDITIONS;
pub use containers::bare_id;
pub mod patch;
mod phase;

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, HostIP, Pod, PodIP, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::model::{self, PodRuntime};
use crate::probe::Results;
use crate::qos;

/// Why a container could not be started: `state.waiting` of its status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// `CrashLoopBackOff`, `ErrImagePull`, `CreateContainerConfigError`, …
    pub reason: String,
    /// The details.
    pub message: String,
}

/// What [`generate`] needs beside the pod and the runtime's view.
pub struct Inputs<'a> {
    /// The status that was computed last, or the API's at first.
    pub previous: &'a PodStatus,
    /// What went wrong in the last sync, by container name.
    pub waiting: &'a BTreeMap<String, Waiting>,
    /// Results of the probes.
    pub probes: &'a Results,
    /// Addresses of the node, the primary one first.
    pub host_ips: &'a [String],
    /// `NAME` in `NAME://ID`.
    pub runtime_name: &'a str,
    /// The pod is over: its containers will not be restarted whatever the policy.
    pub terminal: bool,
    /// The present time.
    pub now: Timestamp,
}

/// A phase with its reason that something else than the containers decided (deadline, admission, eviction).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// `status.reason`.
    pub reason: String,
    /// `status.message`.
    pub message: String,
    /// What containers get instead of the pod's own grace period, seconds.
    pub grace_seconds: Option<i64>,
    /// The node takes the pod away: condition DisruptionTarget tells so.
    pub disruption: bool,
}

/// Computes the status; `verdict` forces phase Failed.
pub fn generate(pod: &Pod, runtime: &PodRuntime, inputs: &Inputs<'_>, verdict: Option<&Verdict>) -> PodStatus {
    let previous = inputs.previous;
    let api = pod.status.clone().unwrap_or_default();
    let mut status = PodStatus {
        qos_class: Some(qos::class(pod).as_str().to_owned()),
        start_time: previous.start_time.clone().or_else(|| api.start_time.clone()).or(Some(Time(truncate(inputs.now)))),
        observed_generation: pod.metadata.generation,
        resize: None,
        ..PodStatus::default()
    };
    let lists = containers::generate(pod, runtime, inputs);
    status.container_statuses = Some(lists.regular);
    status.init_container_statuses = some_unless_empty(lists.init);
    status.ephemeral_container_statuses = some_unless_empty(lists.ephemeral);
    set_phase(&mut status, pod, runtime, inputs, &api);
    if let Some(verdict) = verdict {
        status.phase = Some("Failed".to_owned());
        status.reason = Some(verdict.reason.clone());
        status.message = Some(verdict.message.clone());
    }
    status.conditions = Some(conditions::generate(pod, runtime, inputs, &status));
    if let Some(verdict) = verdict.filter(|v| v.disruption) {
        conditions::set_disruption(pod, inputs, &mut status, &verdict.message);
    }
    set_ips(&mut status, pod, runtime, inputs);
    status.nominated_node_name = api.nominated_node_name;
    status.resource_claim_statuses = api.resource_claim_statuses;
    status
}

fn set_phase(status: &mut PodStatus, pod: &Pod, runtime: &PodRuntime, inputs: &Inputs<'_>, api: &PodStatus) {
    let all: Vec<&ContainerStatus> = all_statuses(status).collect();
    let initialized = runtime.any_active_regular_started(pod);
    let mut phase = phase::phase(pod, &all, inputs.terminal, initialized).to_owned();
    for known in [&inputs.previous.phase, &api.phase] {
        if model::is_terminal_phase(known.as_deref()) && !model::is_terminal_phase(Some(&phase)) {
            phase = known.clone().unwrap_or(phase);
        }
    }
    if model::is_terminal_phase(api.phase.as_deref()) {
        phase = api.phase.clone().unwrap_or(phase);
    }
    if inputs.previous.phase.as_deref() == Some(phase.as_str()) {
        let keep = |own: &Option<String>, api: &Option<String>| own.clone().filter(|s| !s.is_empty()).or_else(|| api.clone());
        status.reason = keep(&inputs.previous.reason, &api.reason);
        status.message = keep(&inputs.previous.message, &api.message);
    }
    status.phase = Some(phase);
}

fn set_ips(status: &mut PodStatus, pod: &Pod, runtime: &PodRuntime, inputs: &Inputs<'_>) {
    let mut ips = runtime.ips();
    if ips.is_empty() && model::is_host_network(pod) {
        ips = inputs.host_ips.to_vec();
    }
    if ips.is_empty() {
        // A pod keeps its address while its sandbox is stopped, for whoever reads the last status.
        let kept = inputs.previous.pod_ips.iter().flatten();
        ips = kept.map(|ip| ip.ip.clone()).collect();
    }
    status.pod_ip = ips.first().cloned();
    let pod_ips: Vec<PodIP> = ips.into_iter().map(|ip| PodIP { ip }).collect();
    status.pod_ips = some_unless_empty(pod_ips);
    status.host_ip = inputs.host_ips.first().cloned();
    let host_ips: Vec<HostIP> = inputs.host_ips.iter().map(|ip| HostIP { ip: ip.clone() }).collect();
    status.host_ips = some_unless_empty(host_ips);
}

/// Regular and init container statuses, regular ones first.
fn all_statuses(status: &PodStatus) -> impl Iterator<Item = &ContainerStatus> {
    status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten())
}

fn some_unless_empty<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

/// API times have whole seconds.
pub fn truncate(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}
