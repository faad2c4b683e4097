//! Pods and containers in CRI's words, and the filters of lists. Pure.

use std::collections::HashMap;

use protocols::cri::v1::{
    Container as CriContainer, ContainerFilter, ContainerResources, ContainerStatus, ContainerUser, ImageSpec, LinuxContainerUser,
    LinuxPodSandboxStatus, Namespace, PodIp, PodSandbox, PodSandboxFilter, PodSandboxNetworkStatus, PodSandboxState, PodSandboxStatus,
};

use crate::record::SandboxPhase;
use crate::spec::{resources, sandbox_namespaces, signal};
use crate::state::{Container, ContainerState, Sandbox};

/// What a container's image is called now, if it is still there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageNames {
    pub tag: Option<String>,
    pub digest: Option<String>,
}

fn sandbox_state(sandbox: &Sandbox) -> PodSandboxState {
    match sandbox.facts().phase {
        SandboxPhase::Ready => PodSandboxState::SandboxReady,
        SandboxPhase::Creating | SandboxPhase::NotReady => PodSandboxState::SandboxNotready,
    }
}

/// An entry of ListPodSandbox.
pub fn sandbox_entry(sandbox: &Sandbox) -> PodSandbox {
    PodSandbox {
        id: sandbox.id.clone(),
        metadata: sandbox.config.metadata.clone(),
        state: sandbox_state(sandbox) as i32,
        created_at: sandbox.created_at,
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: sandbox.runtime_handler.clone(),
    }
}

/// The answer of PodSandboxStatus.
pub fn sandbox_status(sandbox: &Sandbox) -> PodSandboxStatus {
    let mut ips = sandbox.facts().ips.into_iter();
    PodSandboxStatus {
        id: sandbox.id.clone(),
        metadata: sandbox.config.metadata.clone(),
        state: sandbox_state(sandbox) as i32,
        created_at: sandbox.created_at,
        network: Some(PodSandboxNetworkStatus { ip: ips.next().unwrap_or_default(), additional_ips: ips.map(|ip| PodIp { ip }).collect() }),
        linux: Some(LinuxPodSandboxStatus { namespaces: Some(Namespace { options: Some(sandbox_namespaces(&sandbox.config)) }) }),
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: sandbox.runtime_handler.clone(),
    }
}

/// An entry of ListContainers.
pub fn container_entry(container: &Container) -> CriContainer {
    CriContainer {
        id: container.id.clone(),
        pod_sandbox_id: container.sandbox_id.clone(),
        metadata: container.config.metadata.clone(),
        image: container.config.image.clone(),
        image_ref: container.image_id.clone(),
        image_id: container.image_id.clone(),
        state: container.state().to_cri() as i32,
        created_at: container.created_at,
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
    }
}

/// The answer of ContainerStatus.
pub fn container_status(container: &Container, names: Option<&ImageNames>) -> ContainerStatus {
    let state = container.state();
    let (started_at, ended) = match &state {
        ContainerState::Created | ContainerState::Starting => (0, Default::default()),
        ContainerState::Running { started_at, .. } => (*started_at, Default::default()),
        ContainerState::Exited(ended) => (ended.started_at, ended.clone()),
    };
    let (limits, oom_score_adj) = container.limits();
    let image = names.and_then(|names| names.tag.clone()).map(|image| ImageSpec { image, ..ImageSpec::default() });
    ContainerStatus {
        id: container.id.clone(),
        metadata: container.config.metadata.clone(),
        state: state.to_cri() as i32,
        created_at: container.created_at,
        started_at,
        finished_at: ended.finished_at,
        exit_code: ended.exit_code,
        image: image.or_else(|| container.config.image.clone()),
        image_ref: names.and_then(|names| names.digest.clone()).unwrap_or_else(|| container.image_id.clone()),
        reason: ended.reason,
        message: ended.message,
        labels: container.config.labels.clone(),
        annotations: container.config.annotations.clone(),
        mounts: container.config.mounts.clone(),
        log_path: container.log_path.clone(),
        resources: Some(ContainerResources { linux: Some(resources::to_cri(&limits, oom_score_adj)), windows: None }),
        image_id: container.image_id.clone(),
        user: Some(ContainerUser {
            linux: Some(LinuxContainerUser {
                uid: container.user.uid.into(),
                gid: container.user.gid.into(),
                supplemental_groups: container.user.additional_gids.iter().map(|gid| i64::from(*gid)).collect(),
            }),
        }),
        stop_signal: signal::to_cri(container.stop_signal.unwrap_or(signal::SIGTERM)) as i32,
    }
}

/// Whether all labels of a selector are there.
pub fn has_labels(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether a sandbox is asked for; an id may be a prefix.
pub fn sandbox_matches(sandbox: &PodSandbox, filter: Option<&PodSandboxFilter>) -> bool {
    let Some(filter) = filter else { return true };
    sandbox.id.starts_with(&filter.id)
        && filter.state.as_ref().is_none_or(|state| state.state == sandbox.state)
        && has_labels(&sandbox.labels, &filter.label_selector)
}

/// Whether a container is asked for; ids may be prefixes.
pub fn container_matches(container: &CriContainer, filter: Option<&ContainerFilter>) -> bool {
    let Some(filter) = filter else { return true };
    container.id.starts_with(&filter.id)
        && container.pod_sandbox_id.starts_with(&filter.pod_sandbox_id)
        && filter.state.as_ref().is_none_or(|state| state.state == container.state)
        && has_labels(&container.labels, &filter.label_selector)
}

#[cfg(test)]
mod tests {
    use protocols::cri::v1::{ContainerState as CriState, ContainerStateValue, PodSandboxStateValue};

    use super::*;

    #[test]
    fn filters() {
        let container = CriContainer {
            id: "abc".into(),
            pod_sandbox_id: "def".into(),
            state: CriState::ContainerRunning as i32,
            labels: [("k".to_owned(), "v".to_owned())].into(),
            ..CriContainer::default()
        };
        let filter = ContainerFilter::default;
        assert!(container_matches(&container, None) && container_matches(&container, Some(&filter())));
        for (filter, expected) in [
            (ContainerFilter { id: "ab".into(), ..filter() }, true),
            (ContainerFilter { id: "b".into(), ..filter() }, false),
            (ContainerFilter { pod_sandbox_id: "de".into(), ..filter() }, true),
            (ContainerFilter { state: Some(ContainerStateValue::default()), ..filter() }, false),
            (ContainerFilter { label_selector: [("k".to_owned(), "v".to_owned())].into(), ..filter() }, true),
            (ContainerFilter { label_selector: [("k".to_owned(), "w".to_owned())].into(), ..filter() }, false),
        ] {
            assert_eq!(container_matches(&container, Some(&filter)), expected, "{filter:?}");
        }
        let sandbox = PodSandbox { id: "abc".into(), state: 1, ..PodSandbox::default() };
        // READY is zero: a filter with a state is not one without.
        let ready = PodSandboxFilter { state: Some(PodSandboxStateValue::default()), ..PodSandboxFilter::default() };
        assert!(!sandbox_matches(&sandbox, Some(&ready)));
    }
}
