//! Quality of service: classes, CPU shares and quotas, OOM scores
//! (upstream pkg/apis/core/v1/helper/qos, pkg/kubelet/qos/policy.go, pkg/kubelet/cm/helpers_linux.go, v1.37).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::model;
use crate::quantity::{list_milli, list_value};

/// Microseconds of a CFS period.
pub const CPU_PERIOD_US: i64 = 100_000;
const SHARES_PER_CPU: i64 = 1024;
const SHARES_MIN: i64 = 2;
const SHARES_MAX: i64 = 262_144;
const QUOTA_MIN_US: i64 = 1000;

/// Quality of service class of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Requests equal limits for CPU and memory of every container.
    Guaranteed,
    /// Some request or limit.
    Burstable,
    /// None at all.
    BestEffort,
}

impl Class {
    /// The API's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

type List = BTreeMap<String, Quantity>;

/// The pod's class: what the server computed, else computed here.
pub fn class(pod: &Pod) -> Class {
    match pod.status.as_ref().and_then(|s| s.qos_class.as_deref()) {
        Some("Guaranteed") => return Class::Guaranteed,
        Some("Burstable") => return Class::Burstable,
        Some("BestEffort") => return Class::BestEffort,
        _ => {}
    }
    let pod_level = pod.spec.as_ref().and_then(|s| s.resources.as_ref());
    let all: Vec<Option<&ResourceRequirements>> = match pod_level {
        Some(own) if requests_any(Some(own)) => vec![Some(own)],
        _ => model::containers(pod).iter().chain(model::init_containers(pod)).map(|c| c.resources.as_ref()).collect(),
    };
    if !all.iter().any(|r| requests_any(*r)) {
        return Class::BestEffort;
    }
    if all.iter().all(|r| is_guaranteed(*r)) { Class::Guaranteed } else { Class::Burstable }
}

fn requests_any(resources: Option<&ResourceRequirements>) -> bool {
    let any = |list: Option<&List>| ["cpu", "memory"].iter().any(|name| list_milli(list, name) > 0);
    resources.is_some_and(|r| any(r.requests.as_ref()) || any(r.limits.as_ref()))
}

fn is_guaranteed(resources: Option<&ResourceRequirements>) -> bool {
    let Some(resources) = resources else {
        return false;
    };
    ["cpu", "memory"].iter().all(|name| {
        let limit = list_milli(resources.limits.as_ref(), name);
        let has_request = resources.requests.as_ref().is_some_and(|r| r.contains_key(*name));
        let request = list_milli(resources.requests.as_ref(), name);
        limit > 0 && (!has_request || request == limit)
    })
}

/// CPU shares for thousandths of a CPU.
pub fn cpu_shares(milli_cpu: i64) -> i64 {
    if milli_cpu == 0 {
        return SHARES_MIN;
    }
    (milli_cpu * SHARES_PER_CPU / 1000).clamp(SHARES_MIN, SHARES_MAX)
}

/// CFS quota in microseconds a period for thousandths of a CPU; 0 is none.
pub fn cpu_quota_us(milli_cpu: i64) -> i64 {
    if milli_cpu == 0 {
        return 0;
    }
    (milli_cpu * CPU_PERIOD_US / 1000).max(QUOTA_MIN_US)
}

/// OOM score adjustment of a container; `capacity` is the node's memory in bytes.
pub fn oom_score_adj(pod: &Pod, container: &Container, capacity: i64) -> i64 {
    let class_name = pod.spec.as_ref().and_then(|s| s.priority_class_name.as_deref());
    if class_name == Some("system-node-critical") {
        return -997;
    }
    match class(pod) {
        Class::Guaranteed => -997,
        Class::BestEffort => 1000,
        Class::Burstable => {
            let request = |c: &Container| {
                let requests = c.resources.as_ref().and_then(|r| r.requests.as_ref());
                list_value(requests, "memory")
            };
            let mut own = request(container);
            if model::is_sidecar(container) {
                // A sidecar is not to be ended before the containers that it serves.
                own = own.max(model::containers(pod).iter().map(request).min().unwrap_or(0));
            }
            // Above what guaranteed pods have, below best-effort pods.
            let capacity = i128::from(capacity.max(1));
            let adj = 1000 - 1000 * i128::from(own) / capacity;
            i64::try_from(adj.clamp(3, 999)).unwrap_or(999)
        }
    }
}

/// A pod's sums over its containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodResources {
    /// Requested CPU, thousandths.
    pub cpu_request_milli: i64,
    /// CPU limit, thousandths; `None` when a container has none.
    pub cpu_limit_milli: Option<i64>,
    /// Requested memory, bytes.
    pub memory_request_bytes: i64,
    /// Memory limit, bytes; `None` when a container has none.
    pub memory_limit_bytes: Option<i64>,
}

/// Sums of requests and limits: the larger of the regular containers together (with sidecars) and the most
/// demanding init container (with the sidecars before it), plus overhead.
pub fn pod_resources(pod: &Pod) -> PodResources {
    let own = pod.spec.as_ref().and_then(|s| s.resources.as_ref());
    let overhead = pod.spec.as_ref().and_then(|s| s.overhead.as_ref());
    let cpu = aggregate(pod, "cpu", &list_milli);
    let memory = aggregate(pod, "memory", &list_value);
    let pick = |pod_level: Option<&List>, name: &str, sum: i64, read: &Reader| {
        pod_level.filter(|l| l.contains_key(name)).map_or(sum, |l| read(Some(l), name))
    };
    let requests = own.and_then(|r| r.requests.as_ref());
    let limits = own.and_then(|r| r.limits.as_ref());
    let limit = |name: &str, sum: Option<i64>, read: &Reader| {
        let has_own = limits.is_some_and(|l| l.contains_key(name));
        let base = if has_own { Some(read(limits, name)) } else { sum };
        base.map(|b| b + read(overhead, name))
    };
    PodResources {
        cpu_request_milli: pick(requests, "cpu", cpu.0, &list_milli) + list_milli(overhead, "cpu"),
        cpu_limit_milli: limit("cpu", cpu.1, &list_milli),
        memory_request_bytes: pick(requests, "memory", memory.0, &list_value) + list_value(overhead, "memory"),
        memory_limit_bytes: limit("memory", memory.1, &list_value),
    }
}

type Reader = dyn Fn(Option<&List>, &str) -> i64;

/// (sum of requests, sum of limits if every container has one).
fn aggregate(pod: &Pod, name: &str, read: &Reader) -> (i64, Option<i64>) {
    let of = |c: &Container| {
        let resources = c.resources.as_ref();
        let limits = resources.and_then(|r| r.limits.as_ref());
        let requests = resources.and_then(|r| r.requests.as_ref());
        let limit = limits.filter(|l| l.contains_key(name)).map(|l| read(Some(l), name));
        let has_request = requests.is_some_and(|r| r.contains_key(name));
        let request = if has_request { read(requests, name) } else { limit.unwrap_or(0) };
        (request, limit)
    };
    let add = |a: Option<i64>, b: Option<i64>| Some(a? + b?);
    let mut total = (0, Some(0));
    for container in model::containers(pod) {
        let (request, limit) = of(container);
        total = (total.0 + request, add(total.1, limit));
    }
    let mut sidecars = (0, Some(0));
    let mut most = (0, Some(0));
    for container in model::init_containers(pod) {
        let (request, limit) = of(container);
        let together = (sidecars.0 + request, add(sidecars.1, limit));
        if model::is_sidecar(container) {
            sidecars = together;
        }
        most.0 = most.0.max(together.0);
        most.1 = match (most.1, together.1) {
            (Some(a), Some(b)) => Some(a.max(b)),
            _ => None,
        };
    }
    total = (total.0 + sidecars.0, add(total.1, sidecars.1));
    let limit = match (total.1, most.1) {
        (Some(a), Some(b)) => Some(a.max(b)),
        _ => None,
    };
    (total.0.max(most.0), limit)
}
