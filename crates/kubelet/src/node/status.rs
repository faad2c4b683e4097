//! Node status: conditions, capacity, addresses, runtime, images.

use std::collections::BTreeMap;
use std::path::Path;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeFeatures, NodeRuntimeHandler,
    NodeRuntimeHandlerFeatures, NodeStatus, NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use protocols::cri::v1 as cri;
use serde_json::{Value, json};

use crate::eviction::Pressure;
use crate::eviction::thresholds::Signal;
use crate::kubelet::Kubelet;
use crate::node::host;
use crate::quantity;
use crate::runtime;
use crate::status::truncate;

/// Images listed in status (upstream's nodeStatusMaxImages).
const IMAGES_MAX: usize = 50;
/// Names of an image.
const NAMES_MAX: usize = 5;
/// Version that is reported: the API's that this kubelet serves.
const VERSION: &str = "v1.37.2";

type Resources = BTreeMap<String, Quantity>;

/// Computes the status, and updates what the kubelet keeps of it.
pub async fn compute(kubelet: &Kubelet, previous: Option<&NodeStatus>) -> NodeStatus {
    let runtime_status = kubelet.runtime.status().await;
    let version = kubelet.runtime.version().await.ok();
    let images = kubelet.runtime.list_images().await.unwrap_or_default();
    let ip = kubelet.config.node_ip.or_else(host::default_ip);
    let host_ips: Vec<String> = ip.map(|i| i.to_string()).into_iter().collect();
    let capacity = capacity(kubelet);
    let allocatable = allocatable(kubelet, &capacity);
    let network = network_error(&runtime_status);
    kubelet.update_live(|live| {
        live.host_ips.clone_from(&host_ips);
        if let Some(version) = &version {
            live.runtime_name.clone_from(&version.runtime_name);
        }
        live.allocatable.clone_from(&allocatable);
        live.network_error = network;
    });
    let answer = runtime_status.as_ref().ok();
    NodeStatus {
        conditions: Some(conditions(kubelet, &runtime_status, previous)),
        capacity: Some(capacity),
        allocatable: Some(allocatable),
        addresses: Some(addresses(kubelet, &host_ips)),
        daemon_endpoints: Some(NodeDaemonEndpoints { kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(kubelet.config.port) }) }),
        node_info: Some(info(version.as_ref())),
        images: Some(image_list(&images)),
        runtime_handlers: answer.map(handlers).filter(|h| !h.is_empty()),
        features: answer.and_then(|a| a.features).map(|f| NodeFeatures { supplemental_groups_policy: Some(f.supplemental_groups_policy) }),
        ..NodeStatus::default()
    }
}

/// True when condition Ready is.
pub fn is_ready(status: &NodeStatus) -> bool {
    let mut conditions = status.conditions.iter().flatten();
    conditions.any(|c| c.type_ == "Ready" && c.status == "True")
}

/// True when the two differ in more than heartbeat times.
pub fn differs(a: &NodeStatus, b: &NodeStatus) -> bool {
    let bare = |status: &NodeStatus| {
        let mut status = status.clone();
        for condition in status.conditions.iter_mut().flatten() {
            condition.last_heartbeat_time = None;
        }
        status
    };
    bare(a) != bare(b)
}

/// The strategic merge patch that brings the server to this status.
pub fn patch(status: &NodeStatus) -> Value {
    let mut body = json!({ "status": status });
    let conditions = status.conditions.iter().flatten();
    let order: Vec<Value> = conditions.map(|c| json!({"type": c.type_})).collect();
    body["status"]["$setElementOrder/conditions"] = Value::Array(order);
    if let Some(addresses) = body["status"]["addresses"].as_array_mut() {
        // Addresses merge by type: the list is replaced so that an old one goes.
        addresses.insert(0, json!({"$patch": "replace"}));
    }
    body
}

fn quantity_of(value: i64) -> Quantity {
    Quantity(value.to_string())
}

fn kib(bytes: i64) -> Quantity {
    Quantity(format!("{}Ki", bytes / 1024))
}

fn capacity(kubelet: &Kubelet) -> Resources {
    let disk = host::disk(existing(&kubelet.config.root_dir));
    let disk_bytes = i64::try_from(disk.capacity_bytes).unwrap_or(i64::MAX);
    let cpus = i64::try_from(host::cpus()).unwrap_or(1);
    let mut resources = Resources::from([
        ("cpu".to_owned(), quantity_of(cpus)),
        ("memory".to_owned(), kib(kubelet.facts.memory_bytes)),
        ("ephemeral-storage".to_owned(), kib(disk_bytes)),
        ("pods".to_owned(), quantity_of(i64::from(kubelet.config.max_pods))),
    ]);
    for size in &kubelet.facts.hugepage_sizes {
        resources.insert(format!("hugepages-{}", size.replace('B', "i")), quantity_of(0));
    }
    resources
}

fn existing(path: &Path) -> &Path {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"))
}

fn allocatable(kubelet: &Kubelet, capacity: &Resources) -> Resources {
    let mut resources = capacity.clone();
    // What a hard threshold keeps free is never handed out (upstream's `hardEvictionReservation`).
    for threshold in kubelet.config.thresholds().unwrap_or_default().iter().filter(|t| t.is_hard()) {
        let name = match threshold.signal {
            Signal::MemoryAvailable => "memory",
            Signal::NodeFsAvailable => "ephemeral-storage",
            _ => continue,
        };
        let whole = capacity.get(name).and_then(quantity::value).unwrap_or(0);
        subtract(&mut resources, name, &quantity_of(threshold.value.of(whole)));
    }
    for (name, amount) in kubelet.config.reserved().unwrap_or_default() {
        subtract(&mut resources, &name, &Quantity(amount));
    }
    resources
}

fn subtract(resources: &mut Resources, name: &str, amount: &Quantity) {
    let Some(have) = resources.get(name) else {
        return;
    };
    let (Some(have), Some(less)) = (quantity::milli_value(have), quantity::milli_value(amount)) else {
        return;
    };
    let left = (have - less).max(0);
    let left = match name {
        "cpu" if left % 1000 != 0 => Quantity(format!("{left}m")),
        "memory" => kib(left / 1000),
        _ => quantity_of(left / 1000),
    };
    resources.insert(name.to_owned(), left);
}

fn addresses(kubelet: &Kubelet, ips: &[String]) -> Vec<NodeAddress> {
    let of = |type_: &str, address: &str| NodeAddress { type_: type_.to_owned(), address: address.to_owned() };
    let mut list: Vec<NodeAddress> = ips.iter().map(|ip| of("InternalIP", ip)).collect();
    list.push(of("Hostname", &kubelet.node_name));
    list
}

fn info(version: Option<&cri::VersionResponse>) -> NodeSystemInfo {
    NodeSystemInfo {
        machine_id: host::line_of("/etc/machine-id"),
        system_uuid: host::line_of("/sys/class/dmi/id/product_uuid").to_lowercase(),
        boot_id: host::line_of("/proc/sys/kernel/random/boot_id"),
        kernel_version: host::line_of("/proc/sys/kernel/osrelease"),
        os_image: host::os_image(),
        container_runtime_version: version.map(|v| format!("{}://{}", v.runtime_name, v.runtime_version)).unwrap_or_default(),
        kubelet_version: VERSION.to_owned(),
        kube_proxy_version: String::new(),
        operating_system: "linux".to_owned(),
        architecture: host::go_arch().to_owned(),
        ..NodeSystemInfo::default()
    }
}

fn image_list(images: &[cri::Image]) -> Vec<ContainerImage> {
    let mut sorted: Vec<&cri::Image> = images.iter().collect();
    sorted.sort_by_key(|i| std::cmp::Reverse(i.size));
    sorted
        .into_iter()
        .take(IMAGES_MAX)
        .map(|image| {
            let names = image.repo_digests.iter().chain(&image.repo_tags).take(NAMES_MAX);
            ContainerImage { names: Some(names.cloned().collect()), size_bytes: i64::try_from(image.size).ok() }
        })
        .collect()
}

fn handlers(status: &cri::StatusResponse) -> Vec<NodeRuntimeHandler> {
    let of = |handler: &cri::RuntimeHandler| NodeRuntimeHandler {
        name: Some(handler.name.clone()),
        features: handler.features.map(|f| NodeRuntimeHandlerFeatures {
            recursive_read_only_mounts: Some(f.recursive_read_only_mounts),
            // This kubelet makes no user namespaces, whatever the runtime can do.
            user_namespaces: Some(false),
        }),
    };
    status.runtime_handlers.iter().map(of).collect()
}

type Answer = Result<cri::StatusResponse, runtime::Error>;

/// A condition of the runtime that is not true: its message.
fn unmet(answer: &Answer, type_: &str) -> Option<String> {
    let status = match answer {
        Ok(answer) => answer.status.as_ref(),
        Err(error) => return Some(format!("container runtime is down: {}", runtime::message(error))),
    };
    let condition = status.and_then(|s| s.conditions.iter().find(|c| c.r#type == type_));
    match condition {
        Some(condition) if condition.status => None,
        Some(condition) => {
            let what = if type_ == "NetworkReady" { "container runtime network not ready" } else { "container runtime not ready" };
            Some(format!("{what}: {type_}={} reason:{} message:{}", condition.status, condition.reason, condition.message))
        }
        None => Some(format!("container runtime did not report {type_}")),
    }
}

fn network_error(answer: &Answer) -> Option<String> {
    // While the runtime is away its network's state is unknown, and no pod can be started anyway.
    answer.as_ref().ok()?;
    unmet(answer, "NetworkReady")
}

fn conditions(kubelet: &Kubelet, answer: &Answer, previous: Option<&NodeStatus>) -> Vec<NodeCondition> {
    let pressures = kubelet.live().pressures;
    let [memory_low, disk_low, pids_low] = [Pressure::Memory, Pressure::Disk, Pressure::Pid].map(|one| pressures.contains(&one));
    let pressure = |low: bool, yes: &'static str, no: &'static str, noun: &str| {
        let text = if low { format!("kubelet has {noun} pressure") } else { no_pressure(noun) };
        (low, if low { yes } else { no }, text)
    };
    let unmet: Vec<String> = ["RuntimeReady", "NetworkReady"].iter().filter_map(|type_| unmet(answer, type_)).collect();
    let ready = if unmet.is_empty() {
        (true, "KubeletReady", "kubelet is posting ready status".to_owned())
    } else {
        (false, "KubeletNotReady", unmet.join(", "))
    };
    let all = [
        ("MemoryPressure", pressure(memory_low, "KubeletHasInsufficientMemory", "KubeletHasSufficientMemory", "memory")),
        ("DiskPressure", pressure(disk_low, "KubeletHasDiskPressure", "KubeletHasNoDiskPressure", "disk")),
        ("PIDPressure", pressure(pids_low, "KubeletHasInsufficientPID", "KubeletHasSufficientPID", "PID")),
        ("Ready", ready),
    ];
    all.into_iter().map(|(type_, (yes, reason, message))| condition(type_, yes, reason, message, previous)).collect()
}

fn no_pressure(noun: &str) -> String {
    match noun {
        "memory" => "kubelet has sufficient memory available".to_owned(),
        "disk" => "kubelet has no disk pressure".to_owned(),
        _ => "kubelet has sufficient PID available".to_owned(),
    }
}

fn condition(type_: &str, yes: bool, reason: &str, message: String, previous: Option<&NodeStatus>) -> NodeCondition {
    let now = Time(truncate(Timestamp::now()));
    let status = if yes { "True" } else { "False" };
    let old = previous.iter().flat_map(|s| s.conditions.iter().flatten()).find(|c| c.type_ == type_ && c.status == status);
    NodeCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_heartbeat_time: Some(now.clone()),
        last_transition_time: old.and_then(|c| c.last_transition_time.clone()).or(Some(now)),
    }
}
