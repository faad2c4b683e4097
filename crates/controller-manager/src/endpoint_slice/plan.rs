//! Which EndpointSlices a Service is to have. Pure. Source: `k8s.io/endpointslice` v0.37, `reconciler.go` and `utils.go`.
//!
//! Hints follow `spec.trafficDistribution`; the deprecated annotation `service.kubernetes.io/topology-mode` gives none.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::ObjectMeta;

use crate::objects::{controller_ref, is_ready, is_terminal};

/// The value of the label `managed-by` on slices of this controller.
pub const CONTROLLER: &str = "endpointslice-controller.k8s.io";
/// Label with the Service's name.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label with the name of whoever keeps a slice.
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Label of the slices of a headless Service.
const HEADLESS: &str = "service.kubernetes.io/headless";
const ZONE: &str = "topology.kubernetes.io/zone";
const TOPOLOGY_ANNOTATIONS: [&str; 2] = ["service.kubernetes.io/topology-aware-hints", "service.kubernetes.io/topology-mode"];
const SUBDOMAIN_LEN_MAX: usize = 253;

/// What is known when a Service is looked at.
pub struct Observed<'a> {
    /// The Service; it has a selector.
    pub service: &'a Service,
    /// The pods that it selects, in a steady order.
    pub pods: &'a [Arc<Pod>],
    /// Its slices of this controller that are not being deleted.
    pub slices: &'a [Arc<EndpointSlice>],
    /// Nodes by name.
    pub node: &'a dyn Fn(&str) -> Option<Arc<Node>>,
    /// Most endpoints of one slice.
    pub endpoints_max: usize,
}

/// The changes that lead there.
#[derive(Debug, Default)]
pub struct Plan {
    /// Slices to be made.
    pub create: Vec<EndpointSlice>,
    /// Slices to be written over; they carry the resourceVersion that they were read at.
    pub update: Vec<EndpointSlice>,
    /// Slices to be deleted.
    pub delete: Vec<Arc<EndpointSlice>>,
    /// Pods that were left out because their node is not known (yet): look again later.
    pub homeless: Vec<String>,
}

/// Endpoints with the same ports.
#[derive(Default)]
struct Group {
    ports: Vec<EndpointPort>,
    endpoints: BTreeMap<Identity, Endpoint>,
}

/// What makes an endpoint the same one although its state changed: addresses, hostname, namespace and name of its pod.
type Identity = (Vec<String>, String, String, String);

/// Compares what is with what should be.
pub fn plan(observed: &Observed<'_>) -> Plan {
    let types = address_types(observed.service);
    let mut plan = Plan::default();
    let (kept, strange): (Vec<_>, Vec<_>) = observed.slices.iter().cloned().partition(|slice| types.contains(slice.address_type.as_str()));
    for address_type in types {
        let existing: Vec<_> = kept.iter().filter(|slice| slice.address_type == address_type).cloned().collect();
        plan_address_type(observed, address_type, &existing, &mut plan);
    }
    plan.delete.extend(strange);
    if observed.service.metadata.deletion_timestamp.is_some() {
        // The garbage collector takes the slices away; new ones would be in its way.
        plan.create.clear();
    }
    plan
}

fn plan_address_type(observed: &Observed<'_>, address_type: &'static str, existing: &[Arc<EndpointSlice>], plan: &mut Plan) {
    let service = observed.service;
    let (owned, mut delete): (Vec<_>, Vec<_>) = existing.iter().cloned().partition(|slice| owned_by(slice, service));
    let mut by_ports: BTreeMap<String, Vec<Arc<EndpointSlice>>> = BTreeMap::new();
    for slice in owned {
        by_ports.entry(ports_key(slice.ports.as_deref().unwrap_or_default())).or_default().push(slice);
    }
    let (mut create, mut update) = (Vec::new(), Vec::new());
    for (key, group) in wanted(observed, address_type, &mut plan.homeless) {
        let slices = by_ports.remove(&key).unwrap_or_default();
        let changes = fill(observed, address_type, &slices, group);
        create.extend(changes.create);
        update.extend(changes.update);
        delete.extend(changes.delete);
    }
    delete.extend(by_ports.into_values().flatten());
    if existing.len() == delete.len() && create.is_empty() {
        // There is always a slice, so that who looks sees that the controller was here.
        let empty = new_slice(service, address_type, Vec::new());
        match delete.as_slice() {
            [only] if is_same_placeholder(only, &empty) => delete.clear(),
            _ => create.push(empty),
        }
    }
    reuse(service, &mut create, &mut update, &mut delete);
    plan.create.extend(create);
    plan.update.extend(update);
    plan.delete.extend(delete);
}

/// Writes over slices that would go, instead of making others beside them.
fn reuse(service: &Service, create: &mut Vec<EndpointSlice>, update: &mut Vec<EndpointSlice>, delete: &mut Vec<Arc<EndpointSlice>>) {
    delete.retain(|old| {
        if !owned_by(old, service) {
            return true;
        }
        let Some(mut new) = create.pop() else { return true };
        new.metadata.name.clone_from(&old.metadata.name);
        new.metadata.resource_version.clone_from(&old.metadata.resource_version);
        update.push(new);
        false
    });
}

fn wanted(observed: &Observed<'_>, address_type: &str, homeless: &mut Vec<String>) -> BTreeMap<String, Group> {
    let service = observed.service;
    let spec = service.spec.clone().unwrap_or_default();
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for pod in observed.pods.iter().filter(|pod| has_endpoint(pod)) {
        let ports = endpoint_ports(service, pod);
        let group = groups.entry(ports_key(&ports)).or_insert_with(|| Group { ports, ..Group::default() });
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).and_then(|name| (observed.node)(name));
        if node.is_none() && spec.publish_not_ready_addresses != Some(true) {
            homeless.push(pod.metadata.name.clone().unwrap_or_default());
            continue;
        }
        let endpoint = endpoint(service, pod, node.as_deref(), address_type);
        if !endpoint.addresses.is_empty() {
            group.endpoints.insert(identity(&endpoint), endpoint);
        }
    }
    groups
}

/// Whether a pod stands in a slice at all, ready or not.
fn has_endpoint(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let first = status.and_then(|status| status.pod_ip.as_deref()).unwrap_or_default();
    let more = status.and_then(|status| status.pod_ips.as_deref()).unwrap_or_default();
    !(is_terminal(pod) || first.is_empty() && more.is_empty())
}

fn endpoint(service: &Service, pod: &Pod, node: Option<&Node>, address_type: &str) -> Endpoint {
    let publish = service.spec.as_ref().and_then(|spec| spec.publish_not_ready_addresses) == Some(true);
    let serving = is_ready(pod);
    let terminating = pod.metadata.deletion_timestamp.is_some();
    let ready = publish || (serving && !terminating);
    let spec = pod.spec.clone().unwrap_or_default();
    let zone = node.and_then(|node| node.metadata.labels.as_ref()?.get(ZONE)).filter(|zone| !zone.is_empty()).cloned();
    let node_name = spec.node_name.filter(|name| !name.is_empty());
    let named = spec.subdomain.is_some() && spec.subdomain == service.metadata.name && pod.metadata.namespace == service.metadata.namespace;
    Endpoint {
        addresses: addresses(pod, address_type),
        conditions: Some(EndpointConditions { ready: Some(ready), serving: Some(serving), terminating: Some(terminating) }),
        hints: hints(service, ready, zone.as_deref(), node_name.as_deref()),
        hostname: spec.hostname.filter(|name| named && !name.is_empty()),
        node_name,
        zone,
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    }
}

fn addresses(pod: &Pod, address_type: &str) -> Vec<String> {
    let all = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten()).filter_map(|ip| ip.ip.parse::<IpAddr>().ok());
    let mut of_type: Vec<String> = all.filter(|ip| ip.is_ipv4() == (address_type == "IPv4")).map(|ip| ip.to_string()).collect();
    of_type.sort();
    of_type
}

/// Where traffic to an endpoint should come from (`trafficdist.go`).
fn hints(service: &Service, ready: bool, zone: Option<&str>, node: Option<&str>) -> Option<EndpointHints> {
    let distribution = service.spec.as_ref()?.traffic_distribution.as_deref()?;
    let annotations = service.metadata.annotations.as_ref();
    let mode = TOPOLOGY_ANNOTATIONS.iter().find_map(|name| annotations?.get(*name));
    if !ready || mode.is_some_and(|mode| mode == "Auto" || mode == "auto") {
        return None;
    }
    let by_node = match distribution {
        "PreferClose" | "PreferSameZone" => false,
        "PreferSameNode" => true,
        _ => return None,
    };
    let for_zones = zone.map(|zone| vec![ForZone { name: zone.to_owned() }]);
    let for_nodes = node.filter(|_| by_node).map(|node| vec![ForNode { name: node.to_owned() }]);
    (for_zones.is_some() || for_nodes.is_some()).then_some(EndpointHints { for_nodes, for_zones })
}

/// The ports of a pod that a Service leads to; a named port that the pod does not have is left out.
fn endpoint_ports(service: &Service, pod: &Pod) -> Vec<EndpointPort> {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    let of_pod = |port: &ServicePort| {
        Some(EndpointPort {
            name: Some(port.name.clone().unwrap_or_default()),
            port: Some(target_port(pod, port)?),
            protocol: Some(protocol(port.protocol.as_deref()).to_owned()),
            app_protocol: port.app_protocol.clone(),
        })
    };
    ports.filter_map(of_pod).collect()
}

fn protocol(given: Option<&str>) -> &str {
    given.filter(|protocol| !protocol.is_empty()).unwrap_or("TCP")
}

fn target_port(pod: &Pod, port: &ServicePort) -> Option<i32> {
    let name = match &port.target_port {
        Some(IntOrString::Int(number)) => return Some(*number),
        Some(IntOrString::String(name)) => name,
        // The server defaults it to the Service's own port.
        None => return Some(port.port),
    };
    let spec = pod.spec.as_ref()?;
    let sidecars = spec.init_containers.iter().flatten().filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let mut ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    let same = |found: &&k8s_openapi::api::core::v1::ContainerPort| {
        found.name.as_ref() == Some(name) && protocol(found.protocol.as_deref()) == protocol(port.protocol.as_deref())
    };
    ports.find(same).map(|found| found.container_port)
}

/// Ports as a key: their order means nothing.
fn ports_key(ports: &[EndpointPort]) -> String {
    let words: BTreeSet<String> = ports
        .iter()
        .map(|port| {
            let [name, protocol, app] = [&port.name, &port.protocol, &port.app_protocol].map(|text| text.as_deref().unwrap_or_default());
            format!("{name}\n{protocol}\n{app}\n{}", port.port.unwrap_or_default())
        })
        .collect();
    words.into_iter().collect::<Vec<_>>().join("\n\n")
}

fn identity(endpoint: &Endpoint) -> Identity {
    let mut addresses = endpoint.addresses.clone();
    addresses.sort();
    let target = endpoint.target_ref.clone().unwrap_or_default();
    (addresses, endpoint.hostname.clone().unwrap_or_default(), target.namespace.unwrap_or_default(), target.name.unwrap_or_default())
}

/// Whether an endpoint of a slice says what it should.
fn says_the_same(a: &Endpoint, b: &Endpoint) -> bool {
    let target = |endpoint: &Endpoint| endpoint.target_ref.clone().map(|target| ObjectReference { resource_version: None, ..target });
    (&a.node_name, &a.zone, &a.conditions, &a.hints) == (&b.node_name, &b.zone, &b.conditions, &b.hints) && target(a) == target(b)
}

/// Distributes the endpoints of one group over its slices: first what is there stays in place, then slices that change anyway are
/// filled, the fullest first, then one that is not touched yet, then new ones.
fn fill(observed: &Observed<'_>, address_type: &'static str, existing: &[Arc<EndpointSlice>], group: Group) -> Plan {
    let (service, max) = (observed.service, observed.endpoints_max);
    let mut left = group.endpoints;
    let (mut update, mut delete, mut same): (Vec<EndpointSlice>, Vec<_>, Vec<_>) = Default::default();
    for slice in existing {
        let before = slice.endpoints.as_deref().unwrap_or_default();
        let found: Vec<_> = before.iter().filter_map(|old| Some((old, left.remove(&identity(old))?))).collect();
        let changed = found.len() != before.len() || found.iter().any(|(old, new)| !says_the_same(old, new));
        let endpoints: Vec<Endpoint> = found.into_iter().map(|(_, new)| new).collect();
        if changed && endpoints.is_empty() {
            delete.push(slice.clone());
        } else if changed || foreign_labels(slice.metadata.labels.as_ref()) != foreign_labels(service.metadata.labels.as_ref()) {
            update.push(rewritten(slice, service, endpoints));
        } else {
            same.push(slice.clone());
        }
    }
    update.sort_by_key(|slice| std::cmp::Reverse(slice.endpoints.as_ref().map_or(0, Vec::len)));
    for slice in &mut update {
        top_up(slice, &mut left, max);
    }
    let mut create = Vec::new();
    while !left.is_empty() {
        let room = |slice: &Arc<EndpointSlice>| max.checked_sub(left.len() + slice.endpoints.as_ref().map_or(0, Vec::len));
        let best = if left.len() < max {
            same.iter().enumerate().filter_map(|(at, slice)| Some((room(slice)?, at))).filter(|(room, _)| *room < max).min()
        } else {
            None
        };
        let (mut slice, list) = match best {
            Some((_, at)) => {
                let slice = same.swap_remove(at);
                (rewritten(&slice, service, slice.endpoints.clone().unwrap_or_default()), &mut update)
            }
            None => (new_slice(service, address_type, group.ports.clone()), &mut create),
        };
        top_up(&mut slice, &mut left, max);
        list.push(slice);
    }
    Plan { create, update, delete, homeless: Vec::new() }
}

fn top_up(slice: &mut EndpointSlice, left: &mut BTreeMap<Identity, Endpoint>, max: usize) {
    let endpoints = slice.endpoints.get_or_insert_default();
    while endpoints.len() < max
        && let Some((_, endpoint)) = left.pop_first()
    {
        endpoints.push(endpoint);
    }
}

fn rewritten(slice: &EndpointSlice, service: &Service, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let mut new = slice.clone();
    new.endpoints = Some(endpoints);
    new.metadata.labels = Some(labels(service));
    new
}

fn new_slice(service: &Service, address_type: &str, ports: Vec<EndpointPort>) -> EndpointSlice {
    let name = service.metadata.name.as_deref().unwrap_or_default();
    let dash = if name.len() < SUBDOMAIN_LEN_MAX { "-" } else { "" };
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{name}{dash}")),
            namespace: service.metadata.namespace.clone(),
            labels: Some(labels(service)),
            owner_references: Some(vec![controller_ref(service)]),
            ..ObjectMeta::default()
        },
        address_type: address_type.to_owned(),
        endpoints: Some(Vec::new()),
        ports: Some(ports),
    }
}

fn is_same_placeholder(slice: &EndpointSlice, empty: &EndpointSlice) -> bool {
    let bare = |slice: &EndpointSlice| slice.endpoints.iter().flatten().next().is_none() && slice.ports.iter().flatten().next().is_none();
    bare(slice) && slice.metadata.labels == empty.metadata.labels && slice.metadata.owner_references == empty.metadata.owner_references
}

fn is_reserved(label: &str) -> bool {
    [SERVICE_NAME, MANAGED_BY, HEADLESS].contains(&label)
}

/// The labels that are copied from the Service.
fn foreign_labels(labels: Option<&BTreeMap<String, String>>) -> BTreeMap<&String, &String> {
    labels.into_iter().flatten().filter(|(key, _)| !is_reserved(key)).collect()
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let copied = foreign_labels(service.metadata.labels.as_ref());
    let mut labels: BTreeMap<String, String> = copied.into_iter().map(|(key, value)| (key.clone(), value.clone())).collect();
    let address = service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()).unwrap_or_default();
    if address.is_empty() || address == "None" {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    labels.insert(SERVICE_NAME.to_owned(), service.metadata.name.clone().unwrap_or_default());
    labels.insert(MANAGED_BY.to_owned(), CONTROLLER.to_owned());
    labels
}

fn owned_by(slice: &EndpointSlice, service: &Service) -> bool {
    let uid = service.metadata.uid.as_deref().unwrap_or_default();
    let owners = slice.metadata.owner_references.iter().flatten();
    owners.into_iter().any(|owner| owner.uid == uid && owner.kind == "Service" && owner.api_version == "v1")
}

/// The address types of a Service's slices.
fn address_types(service: &Service) -> BTreeSet<&'static str> {
    let Some(spec) = service.spec.as_ref() else { return BTreeSet::new() };
    let known = |family: &String| ["IPv4", "IPv6"].into_iter().find(|known| known == family);
    let families: BTreeSet<_> = spec.ip_families.iter().flatten().filter_map(known).collect();
    if !families.is_empty() {
        return families;
    }
    // An API server that knows no families: by the address, and both for a headless Service.
    match spec.cluster_ip.as_deref().and_then(|address| address.parse::<IpAddr>().ok()) {
        Some(IpAddr::V4(_)) => ["IPv4"].into(),
        Some(IpAddr::V6(_)) => ["IPv6"].into(),
        None => ["IPv4", "IPv6"].into(),
    }
}
