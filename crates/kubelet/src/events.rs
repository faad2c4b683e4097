//! Events of the kubelet: what they are about, and the recorder (client's, which correlates and writes them).

use client::{EventRecorder, EventType};
use k8s_openapi::api::core::v1::{Container, ObjectReference, Pod};

use crate::model;

/// The object that an event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    kind: &'static str,
    namespace: String,
    name: String,
    uid: String,
    field_path: Option<String>,
}

impl Target {
    /// A pod.
    pub fn pod(pod: &Pod) -> Self {
        Self {
            kind: "Pod",
            namespace: model::namespace(pod).to_owned(),
            name: model::name(pod).to_owned(),
            uid: model::uid(pod).to_owned(),
            field_path: None,
        }
    }

    /// A container of a pod: the pod with a field path.
    pub fn container(pod: &Pod, container: &Container) -> Self {
        let name = &container.name;
        let list = if model::containers(pod).iter().any(|c| &c.name == name) {
            "containers"
        } else if model::init_containers(pod).iter().any(|c| &c.name == name) {
            "initContainers"
        } else {
            "ephemeralContainers"
        };
        Self { field_path: Some(format!("spec.{list}{{{name}}}")), ..Self::pod(pod) }
    }

    /// The node; upstream puts its name in the uid.
    pub fn node(name: &str) -> Self {
        Self { kind: "Node", namespace: String::new(), name: name.to_owned(), uid: name.to_owned(), field_path: None }
    }
}

impl From<&Target> for ObjectReference {
    fn from(target: &Target) -> Self {
        let some = |s: &str| (!s.is_empty()).then(|| s.to_owned());
        Self {
            api_version: Some("v1".to_owned()),
            kind: Some(target.kind.to_owned()),
            namespace: some(&target.namespace),
            name: some(&target.name),
            uid: some(&target.uid),
            field_path: target.field_path.clone(),
            // Left out: each version of the object would make the same event another one.
            resource_version: None,
        }
    }
}

/// Where events are recorded. Clones share the queue.
#[derive(Clone)]
pub struct Recorder(EventRecorder);

impl Recorder {
    /// Over the client's recorder.
    pub fn new(recorder: EventRecorder) -> Self {
        Self(recorder)
    }

    /// Records a Normal event.
    pub fn normal(&self, target: &Target, reason: &str, message: impl Into<String>) {
        self.0.event(target.into(), EventType::Normal, reason, message);
    }

    /// Records a Warning event.
    pub fn warning(&self, target: &Target, reason: &str, message: impl Into<String>) {
        self.0.event(target.into(), EventType::Warning, reason, message);
    }
}
