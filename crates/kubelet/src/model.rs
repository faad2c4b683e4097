//! What the runtime was seen to hold of one pod: the kubelet's own words for CRI's answers.
//!
//! Everything that decides (`plan`, `status`) reads these types, never CRI messages.

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container as ContainerSpec, Pod};
use protocols::cri::v1 as cri;

/// Labels and annotations that bind CRI objects to pods (upstream pkg/kubelet/kuberuntime/labels.go).
pub mod labels {
    /// Label: name of the pod.
    pub const POD_NAME: &str = "io.kubernetes.pod.name";
    /// Label: namespace of the pod.
    pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    /// Label: uid of the pod.
    pub const POD_UID: &str = "io.kubernetes.pod.uid";
    /// Label: name of the container.
    pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
    /// Annotation: hash over the fields that make a new container when they change, hexadecimal.
    pub const HASH: &str = "io.kubernetes.container.hash";
    /// Annotation: how often the container was restarted, decimal.
    pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
    /// Annotation: path of the termination message inside the container.
    pub const TERMINATION_PATH: &str = "io.kubernetes.container.terminationMessagePath";
    /// Annotation: `File` or `FallbackToLogsOnError`.
    pub const TERMINATION_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
    /// Annotation: the container's ports as JSON.
    pub const PORTS: &str = "io.kubernetes.container.ports";
    /// Annotation: the preStop handler as JSON.
    pub const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
    /// Annotation: the pod's termination grace period, in seconds.
    pub const GRACE_PERIOD: &str = "io.kubernetes.pod.terminationGracePeriod";
}

/// State of a container as the runtime tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Made, not started.
    Created,
    /// Started, not ended.
    Running,
    /// Ended.
    Exited,
    /// The runtime does not know.
    Unknown,
}

/// A pod sandbox.
#[derive(Clone, Debug, Default)]
pub struct Sandbox {
    /// The runtime's id.
    pub id: String,
    /// Counted up with each new sandbox of the same pod.
    pub attempt: u32,
    /// True for `SANDBOX_READY`.
    pub ready: bool,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// True when it shares the node's network namespace.
    pub host_network: bool,
    /// True when the runtime reported a network status.
    pub has_network_status: bool,
    /// Addresses, the primary one first.
    pub ips: Vec<String>,
}

/// A container, alive or dead.
#[derive(Clone, Debug)]
pub struct Container {
    /// The runtime's id.
    pub id: String,
    /// Name in the pod's spec.
    pub name: String,
    /// Sandbox it belongs to.
    pub sandbox_id: String,
    /// State.
    pub state: RunState,
    /// How often it was restarted, from its annotation.
    pub restart_count: i32,
    /// Hash of the spec it was made from; `None` when the annotation is absent.
    pub hash: Option<u64>,
    /// Nanoseconds since the epoch.
    pub created_at_ns: i64,
    /// Start, if started.
    pub started_at: Option<Timestamp>,
    /// End, if ended.
    pub finished_at: Option<Timestamp>,
    /// Exit code, when ended.
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`, …
    pub reason: String,
    /// The runtime's message, the termination message appended.
    pub message: String,
    /// Image name as the user gave it.
    pub image: String,
    /// Reference with digest (pod status `imageID`).
    pub image_ref: String,
    /// User that its first process runs as, if told.
    pub user: Option<cri::LinuxContainerUser>,
    /// Absolute path of its log file.
    pub log_path: String,
    /// Host path of the termination message file, if mounted.
    pub termination_file: Option<String>,
    /// True for termination policy FallbackToLogsOnError.
    pub fallback_to_logs: bool,
}

/// Everything the runtime holds of one pod.
#[derive(Clone, Debug, Default)]
pub struct PodRuntime {
    /// Newest first.
    pub sandboxes: Vec<Sandbox>,
    /// Newest first.
    pub containers: Vec<Container>,
}

impl PodRuntime {
    /// The newest container of that name, of any sandbox.
    pub fn find(&self, name: &str) -> Option<&Container> {
        self.containers.iter().find(|c| c.name == name)
    }

    /// The newest container of that name in the newest ready sandbox.
    pub fn find_active(&self, name: &str) -> Option<&Container> {
        let sandbox = self.active_sandbox()?;
        self.containers.iter().find(|c| c.name == name && c.sandbox_id == sandbox.id)
    }

    /// The newest sandbox, if it is ready.
    pub fn active_sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.first().filter(|s| s.ready)
    }

    /// True once a regular container was started in the active sandbox: initialization is over.
    pub fn any_active_regular_started(&self, pod: &Pod) -> bool {
        containers(pod).iter().any(|c| self.find_active(&c.name).is_some_and(|s| matches!(s.state, RunState::Running | RunState::Exited)))
    }

    /// Containers that run, or that may run.
    pub fn running(&self) -> impl Iterator<Item = &Container> {
        self.containers.iter().filter(|c| matches!(c.state, RunState::Running | RunState::Unknown))
    }

    /// Addresses of the pod: those of the newest sandbox that has any.
    pub fn ips(&self) -> Vec<String> {
        self.sandboxes.first().filter(|s| s.ready).map(|s| s.ips.clone()).unwrap_or_default()
    }

    /// Sorts newest first, as every reader expects.
    pub fn sort(&mut self) {
        self.sandboxes.sort_by_key(|s| std::cmp::Reverse((s.created_at_ns, s.attempt)));
        self.containers.sort_by_key(|c| std::cmp::Reverse((c.created_at_ns, c.restart_count)));
    }
}

impl Sandbox {
    /// From CRI's PodSandboxStatus.
    pub fn from_cri(status: &cri::PodSandboxStatus) -> Self {
        let network = status.network.as_ref();
        let mut ips: Vec<String> = network.map(|n| n.ip.clone()).filter(|ip| !ip.is_empty()).into_iter().collect();
        ips.extend(network.into_iter().flat_map(|n| n.additional_ips.iter().map(|i| i.ip.clone())).filter(|ip| !ip.is_empty()));
        let network_mode = status
            .linux
            .as_ref()
            .and_then(|l| l.namespaces.as_ref())
            .and_then(|n| n.options.as_ref())
            .map(|o| o.network)
            .unwrap_or_default();
        Self {
            id: status.id.clone(),
            attempt: status.metadata.as_ref().map_or(0, |m| m.attempt),
            ready: status.state == cri::PodSandboxState::SandboxReady as i32,
            created_at_ns: status.created_at,
            host_network: network_mode == cri::NamespaceMode::Node as i32,
            has_network_status: network.is_some(),
            ips,
        }
    }
}

impl Container {
    /// From CRI's ContainerStatus; the status itself does not name the sandbox.
    pub fn from_cri(status: &cri::ContainerStatus, sandbox_id: &str) -> Self {
        let annotation = |key: &str| status.annotations.get(key).map(String::as_str);
        let termination_path = annotation(labels::TERMINATION_PATH).unwrap_or("");
        Self {
            id: status.id.clone(),
            name: container_name(&status.labels, status.metadata.as_ref()),
            sandbox_id: sandbox_id.to_owned(),
            state: run_state(status.state),
            restart_count: annotation(labels::RESTART_COUNT)
                .and_then(|v| v.parse().ok())
                .or_else(|| {
                    let attempt = status.metadata.as_ref()?.attempt;
                    i32::try_from(attempt).ok()
                })
                .unwrap_or(0),
            hash: annotation(labels::HASH).and_then(|v| u64::from_str_radix(v, 16).ok()),
            created_at_ns: status.created_at,
            started_at: from_ns(status.started_at),
            finished_at: from_ns(status.finished_at),
            exit_code: status.exit_code,
            reason: status.reason.clone(),
            message: status.message.clone(),
            image: image_name(status),
            image_ref: status.image_ref.clone(),
            user: status.user.as_ref().and_then(|u| u.linux.clone()),
            log_path: status.log_path.clone(),
            termination_file: status
                .mounts
                .iter()
                .find(|m| !termination_path.is_empty() && m.container_path == termination_path)
                .map(|m| m.host_path.clone()),
            fallback_to_logs: annotation(labels::TERMINATION_POLICY) == Some("FallbackToLogsOnError"),
        }
    }
}

fn image_name(status: &cri::ContainerStatus) -> String {
    let Some(image) = status.image.as_ref() else {
        return String::new();
    };
    if image.user_specified_image.is_empty() { image.image.clone() } else { image.user_specified_image.clone() }
}

fn container_name(labels_map: &HashMap<String, String>, metadata: Option<&cri::ContainerMetadata>) -> String {
    labels_map.get(labels::CONTAINER_NAME).cloned().or_else(|| metadata.map(|m| m.name.clone())).unwrap_or_default()
}

fn run_state(state: i32) -> RunState {
    match cri::ContainerState::try_from(state) {
        Ok(cri::ContainerState::ContainerCreated) => RunState::Created,
        Ok(cri::ContainerState::ContainerRunning) => RunState::Running,
        Ok(cri::ContainerState::ContainerExited) => RunState::Exited,
        _ => RunState::Unknown,
    }
}

/// Nanoseconds since the epoch as a time; 0 means "never".
pub fn from_ns(nanoseconds: i64) -> Option<Timestamp> {
    (nanoseconds > 0).then(|| Timestamp::from_nanosecond(i128::from(nanoseconds)).ok()).flatten()
}

/// Regular containers of a pod.
pub fn containers(pod: &Pod) -> &[ContainerSpec] {
    pod.spec.as_ref().map_or(&[], |s| s.containers.as_slice())
}

/// Init containers of a pod, sidecars included.
pub fn init_containers(pod: &Pod) -> &[ContainerSpec] {
    pod.spec.as_ref().and_then(|s| s.init_containers.as_deref()).unwrap_or_default()
}

/// The container's spec by name, init containers included.
pub fn container_spec<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerSpec> {
    containers(pod).iter().chain(init_containers(pod)).find(|c| c.name == name)
}

/// A sidecar: an init container that is restarted always.
pub fn is_sidecar(container: &ContainerSpec) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// True when the pod shares the node's network namespace.
pub fn is_host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|s| s.host_network).unwrap_or(false)
}

/// True for a pod that the node must not lose for want of resources: its priority is a system one, or it is a static
/// pod's mirror (pkg/kubelet/types `IsCriticalPod`, v1.37).
pub fn is_critical(pod: &Pod) -> bool {
    const SYSTEM_CRITICAL_PRIORITY: i32 = 2_000_000_000;
    let mirror = pod.metadata.annotations.as_ref().is_some_and(|a| a.contains_key("kubernetes.io/config.mirror"));
    mirror || pod.spec.as_ref().and_then(|s| s.priority).is_some_and(|priority| priority >= SYSTEM_CRITICAL_PRIORITY)
}

/// The pod's uid; empty for an object that no server made.
pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or("")
}

/// The pod's namespace.
pub fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

/// The pod's name.
pub fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or("")
}

/// `NAME_NAMESPACE(UID)`, as upstream's messages name a pod (pkg/kubelet/util/format).
pub fn format_pod(pod: &Pod) -> String {
    format!("{}_{}({})", name(pod), namespace(pod), uid(pod))
}

/// Hash over what makes a new container when it changes: name and image.
pub fn container_hash(container: &ContainerSpec) -> u64 {
    let image = container.image.as_deref().unwrap_or("");
    let mut hash: u32 = 0x811c_9dc5;
    for byte in container.name.bytes().chain([0]).chain(image.bytes()) {
        hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    }
    u64::from(hash)
}

/// True when the phase is Succeeded or Failed.
pub fn is_terminal_phase(phase: Option<&str>) -> bool {
    matches!(phase, Some("Succeeded" | "Failed"))
}
