//! ContainerConfig (recorded in reference/seams/kubelet-cri.md, section 3). Pure.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::{Container, Pod, VolumeMount};
use protocols::cri::v1 as cri;

use crate::cri::security::{self, ImageUser};
use crate::cri::{NodeFacts, sandbox};
use crate::env::expand_with;
use crate::model::{self, labels};
use crate::qos;
use crate::quantity::{list_milli, list_value};

/// What the configuration is made from, beside the spec.
pub struct Inputs<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// How often the container was restarted.
    pub restart_count: u32,
    /// The image as the runtime names it.
    pub image_ref: &'a str,
    /// User of the image.
    pub image_user: &'a ImageUser,
    /// The environment.
    pub environment: &'a [(String, String)],
    /// Mounts, made by [`mount`] and by the kubelet's own files.
    pub mounts: Vec<cri::Mount>,
    /// The container whose PID namespace an ephemeral container joins.
    pub target_id: Option<&'a str>,
    /// The node.
    pub node: &'a NodeFacts,
}

/// Makes the configuration; the error is the message of `CreateContainerConfigError`.
pub fn config(container: &Container, inputs: Inputs<'_>) -> Result<cri::ContainerConfig, String> {
    security::verify_non_root(inputs.pod, container, inputs.image_user)?;
    let mut context = security::context(inputs.pod, container, inputs.image_user, inputs.node)?;
    if let (Some(target), Some(options)) = (inputs.target_id, context.namespace_options.as_mut())
        && options.pid == cri::NamespaceMode::Container as i32
    {
        options.pid = cri::NamespaceMode::Target as i32;
        options.target_id = target.to_owned();
    }
    let environment = inputs.environment;
    let expand =
        |words: &Option<Vec<String>>| -> Vec<String> { words.iter().flatten().map(|word| expand_with(word, environment)).collect() };
    let mut all_labels: HashMap<String, String> = sandbox::pod_labels(inputs.pod).into_iter().collect();
    all_labels.insert(labels::CONTAINER_NAME.to_owned(), container.name.clone());
    let image = container.image.clone().unwrap_or_default();
    Ok(cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: container.name.clone(), attempt: inputs.restart_count }),
        image: Some(cri::ImageSpec { image: inputs.image_ref.to_owned(), user_specified_image: image, ..Default::default() }),
        command: expand(&container.command),
        args: expand(&container.args),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: environment.iter().map(|(key, value)| cri::KeyValue { key: key.clone(), value: value.clone().into() }).collect(),
        mounts: inputs.mounts,
        labels: all_labels,
        annotations: annotations(inputs.pod, container, inputs.restart_count)?,
        log_path: format!("{}/{}.log", container.name, inputs.restart_count),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        stop_signal: stop_signal(container)?,
        linux: Some(cri::LinuxContainerConfig {
            resources: Some(resources(inputs.pod, container, inputs.node)),
            security_context: Some(context),
        }),
        ..Default::default()
    })
}

/// `lifecycle.stopSignal` in CRI's numbering; 0 is the image's own.
fn stop_signal(container: &Container) -> Result<i32, String> {
    let Some(name) = container.lifecycle.as_ref().and_then(|l| l.stop_signal.as_deref()) else {
        return Ok(0);
    };
    // CRI writes SIGRTMIN+1 as SIGRTMINPLUS1.
    let word = name.replace('+', "PLUS").replace("MAX-", "MAXMINUS");
    let signal = cri::Signal::from_str_name(&word);
    signal.map(|s| s as i32).ok_or_else(|| format!("lifecycle.stopSignal {name:?} is unknown"))
}

fn annotations(pod: &Pod, container: &Container, restart_count: u32) -> Result<HashMap<String, String>, String> {
    let path = container.termination_message_path.clone().unwrap_or_default();
    let policy = container.termination_message_policy.clone().unwrap_or_default();
    let hash = model::container_hash(container);
    let mut map = HashMap::from([
        (labels::HASH.to_owned(), format!("{hash:x}")),
        (labels::RESTART_COUNT.to_owned(), restart_count.to_string()),
        (labels::TERMINATION_PATH.to_owned(), path),
        (labels::TERMINATION_POLICY.to_owned(), policy),
    ]);
    if let Some(grace) = pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds) {
        map.insert(labels::GRACE_PERIOD.to_owned(), grace.to_string());
    }
    let json = |value: serde_json::Result<String>| value.map_err(|e| e.to_string());
    if let Some(hook) = container.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref()) {
        map.insert(labels::PRE_STOP.to_owned(), json(serde_json::to_string(hook))?);
    }
    if let Some(ports) = container.ports.as_ref().filter(|p| !p.is_empty()) {
        map.insert(labels::PORTS.to_owned(), json(serde_json::to_string(ports))?);
    }
    Ok(map)
}

fn resources(pod: &Pod, container: &Container, node: &NodeFacts) -> cri::LinuxContainerResources {
    let own = container.resources.as_ref();
    let limits = own.and_then(|r| r.limits.as_ref());
    let requests = own.and_then(|r| r.requests.as_ref());
    let pod_limits = pod.spec.as_ref().and_then(|s| s.resources.as_ref()).and_then(|r| r.limits.as_ref());
    let or_pod = |own: i64, of_pod: i64| if own == 0 { of_pod } else { own };
    let cpu_limit = or_pod(list_milli(limits, "cpu"), list_milli(pod_limits, "cpu"));
    let memory_limit = or_pod(list_value(limits, "memory"), list_value(pod_limits, "memory"));
    let has_request = requests.is_some_and(|r| r.contains_key("cpu"));
    let cpu_request = if has_request { list_milli(requests, "cpu") } else { cpu_limit };
    let unified = if node.cgroup_v2 {
        // All processes of a container are ended together when it runs out of memory.
        HashMap::from([("memory.oom.group".to_owned(), "1".to_owned())])
    } else {
        HashMap::new()
    };
    cri::LinuxContainerResources {
        cpu_period: qos::CPU_PERIOD_US,
        cpu_quota: qos::cpu_quota_us(cpu_limit),
        cpu_shares: qos::cpu_shares(cpu_request),
        memory_limit_in_bytes: memory_limit,
        memory_swap_limit_in_bytes: if node.swap_limit { memory_limit } else { 0 },
        oom_score_adj: qos::oom_score_adj(pod, container, node.memory_bytes),
        hugepage_limits: hugepages(limits, node),
        unified,
        ..Default::default()
    }
}

fn hugepages(
    limits: Option<&std::collections::BTreeMap<String, k8s_openapi::apimachinery::pkg::api::resource::Quantity>>,
    node: &NodeFacts,
) -> Vec<cri::HugepageLimit> {
    node.hugepage_sizes
        .iter()
        .map(|size| {
            // The API says hugepages-2Mi where the kernel's cgroup files say 2MB.
            let name = format!("hugepages-{}", size.replace('B', "i"));
            let limit = u64::try_from(list_value(limits, &name)).unwrap_or(0);
            cri::HugepageLimit { page_size: size.clone(), limit }
        })
        .collect()
}

/// A mount of a volume; `host_path` has the sub path applied.
pub fn mount(mount: &VolumeMount, host_path: &str, volume_readonly: bool) -> cri::Mount {
    let path = &mount.mount_path;
    let container_path = if path.starts_with('/') { path.clone() } else { format!("/{path}") };
    cri::Mount {
        container_path,
        host_path: host_path.to_owned(),
        readonly: mount.read_only.unwrap_or(false) || volume_readonly,
        propagation: match mount.mount_propagation.as_deref() {
            Some("HostToContainer") => cri::MountPropagation::PropagationHostToContainer,
            Some("Bidirectional") => cri::MountPropagation::PropagationBidirectional,
            _ => cri::MountPropagation::PropagationPrivate,
        } as i32,
        mount_options: mount.bind_mount_options.clone().unwrap_or_default(),
        ..Default::default()
    }
}
