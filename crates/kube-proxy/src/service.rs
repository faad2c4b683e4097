//! What the proxy needs of Services and EndpointSlices, and which endpoints traffic may go to. Pure.
//! Source: upstream's `pkg/proxy/{serviceport,endpointslicecache,topology}.go`, v1.37.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Service, ServicePort as ApiPort};
use k8s_openapi::api::discovery::v1::EndpointSlice;

use crate::config::Cidr;

/// Services with this label belong to another proxy.
pub const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label of headless Services' slices.
pub const HEADLESS: &str = "service.kubernetes.io/headless";
/// Label with the Service's name.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
const AFFINITY_SECONDS: i32 = 10_800;

/// A layer 4 protocol that Services know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    fn parse(text: Option<&str>) -> Option<Self> {
        match text {
            None | Some("" | "TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some("SCTP") => Some(Self::Sctp),
            Some(_) => None,
        }
    }

    /// IANA's number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// `NAMESPACE/SERVICE/PROTOCOL/PORT NAME`.
    pub name: String,
    /// The port's name; may be empty.
    pub port_name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// The Service's address.
    pub cluster_ip: Ipv4Addr,
    /// The port at that address.
    pub port: u16,
    /// The port on nodes.
    pub node_port: Option<u16>,
    /// Addresses that lead here from outside.
    pub external_ips: Vec<Ipv4Addr>,
    /// Addresses of a load balancer that leaves them as the packets' destination.
    pub load_balancer_ips: Vec<Ipv4Addr>,
    /// Who may use the load balancer; empty for everybody.
    pub source_ranges: Vec<Cidr>,
    /// How long a client stays with its endpoint, in milliseconds.
    pub affinity_ms: Option<u64>,
    /// internalTrafficPolicy: Local.
    pub internal_local: bool,
    /// externalTrafficPolicy: Local.
    pub external_local: bool,
}

impl ServicePort {
    /// Whether there is a way from outside.
    pub fn is_external(&self) -> bool {
        self.node_port.is_some() || !self.external_ips.is_empty() || !self.load_balancer_ips.is_empty()
    }

    /// Traffic policy Cluster is needed: for the cluster IP, or as the short way of local traffic to external addresses.
    pub fn uses_cluster(&self) -> bool {
        !self.internal_local || self.is_external()
    }

    /// Traffic policy Local is needed.
    pub fn uses_local(&self) -> bool {
        self.internal_local || (self.external_local && self.is_external())
    }
}

/// One endpoint of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it is.
    pub address: Ipv4Addr,
    /// Its port.
    pub port: u16,
    /// Whether it takes traffic.
    pub ready: bool,
    /// Whether it could: ready but for being terminated.
    pub serving: bool,
    /// Whether its pod is being deleted.
    pub terminating: bool,
    /// Whether it is on this node.
    pub local: bool,
    zones: Vec<String>,
    nodes: Vec<String>,
}

/// Where this proxy is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// Name of the node.
    pub node: String,
    /// The node's zone; empty if unknown.
    pub zone: String,
}

/// The ports of a Service that this proxy serves.
pub fn ports(service: &Service) -> Vec<ServicePort> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let label = service.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(PROXY_NAME));
    let Some(cluster_ip) = spec.cluster_ip.as_deref().and_then(|address| address.parse().ok()) else { return Vec::new() };
    if label || spec.type_.as_deref() == Some("ExternalName") {
        return Vec::new();
    }
    let affinity = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    let affinity = affinity.unwrap_or(AFFINITY_SECONDS).max(1).unsigned_abs();
    let ranges: Vec<Cidr> = spec.load_balancer_source_ranges.iter().flatten().filter_map(|range| range.parse().ok()).collect();
    let external = spec.type_.as_deref() != Some("ClusterIP") || spec.external_ips.iter().flatten().next().is_some();
    let port = |port: &ApiPort| {
        let protocol = Protocol::parse(port.protocol.as_deref())?;
        let port_name = port.name.clone().unwrap_or_default();
        let (namespace, name) = (service.metadata.namespace.as_deref(), service.metadata.name.as_deref());
        Some(ServicePort {
            name: format!("{}/{}/{}/{port_name}", namespace.unwrap_or_default(), name.unwrap_or_default(), protocol.name()),
            port_name,
            protocol,
            cluster_ip,
            port: u16::try_from(port.port).ok()?,
            node_port: port.node_port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0),
            external_ips: spec.external_ips.iter().flatten().filter_map(|address| address.parse().ok()).collect(),
            load_balancer_ips: load_balancer_ips(service),
            source_ranges: if ranges.iter().any(|range| range.prefix_len == 0) { Vec::new() } else { ranges.clone() },
            affinity_ms: (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| u64::from(affinity) * 1000),
            internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            external_local: external && spec.external_traffic_policy.as_deref() == Some("Local"),
        })
    };
    spec.ports.iter().flatten().filter_map(port).collect()
}

fn load_balancer_ips(service: &Service) -> Vec<Ipv4Addr> {
    let ingress = service.status.iter().flat_map(|status| &status.load_balancer).flat_map(|balancer| balancer.ingress.iter().flatten());
    let vips = ingress.filter(|ingress| ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"));
    vips.filter_map(|ingress| ingress.ip.as_deref()?.parse().ok()).collect()
}

/// The endpoints of a port, by address and port.
pub fn endpoints(port: &ServicePort, slices: &[Arc<EndpointSlice>], node: &str) -> Vec<Endpoint> {
    let mut found: BTreeMap<(Ipv4Addr, u16), Endpoint> = BTreeMap::new();
    for slice in slices.iter().filter(|slice| slice.address_type == "IPv4") {
        let same = |other: &&k8s_openapi::api::discovery::v1::EndpointPort| {
            other.name.as_deref().unwrap_or_default() == port.port_name && Protocol::parse(other.protocol.as_deref()) == Some(port.protocol)
        };
        let numbers = slice.ports.iter().flatten().filter(same).filter_map(|port| u16::try_from(port.port?).ok()).filter(|port| *port != 0);
        for number in numbers {
            for endpoint in slice.endpoints.iter().flatten() {
                let Some(address) = endpoint.addresses.first().and_then(|address| address.parse::<Ipv4Addr>().ok()) else { continue };
                let conditions = endpoint.conditions.clone().unwrap_or_default();
                let hints = endpoint.hints.clone().unwrap_or_default();
                let terminating = conditions.terminating.unwrap_or(false);
                let endpoint = Endpoint {
                    address,
                    port: number,
                    ready: conditions.ready.unwrap_or(true),
                    serving: conditions.serving.unwrap_or(true),
                    terminating,
                    local: endpoint.node_name.as_deref().is_some_and(|name| !node.is_empty() && name == node),
                    zones: hints.for_zones.into_iter().flatten().map(|zone| zone.name).collect(),
                    nodes: hints.for_nodes.into_iter().flatten().map(|node| node.name).collect(),
                };
                // An address may have gone from a pod that ends to a new one, and both are listed for a while.
                if !terminating || !found.contains_key(&(address, number)) {
                    found.insert((address, number), endpoint);
                }
            }
        }
    }
    found.into_values().collect()
}

/// The endpoints that traffic may go to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Usable<'a> {
    /// By traffic policy Cluster.
    pub cluster: Vec<&'a Endpoint>,
    /// By traffic policy Local.
    pub local: Vec<&'a Endpoint>,
    /// Whether there is any, on whatever node.
    pub any: bool,
}

/// Chooses: ready ones, and those that serve while they terminate if there is no ready one; for Local and Cluster by itself.
pub fn usable<'a>(port: &ServicePort, endpoints: &'a [Endpoint], place: &Place) -> Usable<'a> {
    let fallback = |endpoint: &&Endpoint| endpoint.serving && endpoint.terminating;
    let choose = |wanted: &dyn Fn(&Endpoint) -> bool| {
        let ready: Vec<_> = endpoints.iter().filter(|endpoint| endpoint.ready && wanted(endpoint)).collect();
        if ready.is_empty() { endpoints.iter().filter(fallback).filter(|endpoint| wanted(endpoint)).collect() } else { ready }
    };
    let mut usable = Usable::default();
    if port.uses_cluster() {
        let topology = Topology::of(endpoints, place);
        let near: Vec<_> = endpoints.iter().filter(|endpoint| endpoint.ready && topology.allows(endpoint, place)).collect();
        usable.cluster = if near.is_empty() { choose(&|_| true) } else { near };
    }
    if port.uses_local() {
        usable.local = choose(&|endpoint| endpoint.local);
    }
    usable.any = endpoints.iter().any(|endpoint| endpoint.ready || fallback(&endpoint));
    usable
}

/// Which hints count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Topology {
    None,
    SameZone,
    SameNode,
}

impl Topology {
    /// Hints count if every ready endpoint has them and one is for here.
    fn of(endpoints: &[Endpoint], place: &Place) -> Self {
        let hinted = |hints: &dyn Fn(&Endpoint) -> &[String], here: &String| {
            let mut ready = endpoints.iter().filter(|endpoint| endpoint.ready).map(hints).peekable();
            let mut found = false;
            ready.peek().is_some()
                && ready.all(|hints| {
                    found |= hints.contains(here);
                    !hints.is_empty()
                })
                && found
        };
        if hinted(&|endpoint| &endpoint.nodes, &place.node) {
            Self::SameNode
        } else if hinted(&|endpoint| &endpoint.zones, &place.zone) {
            Self::SameZone
        } else {
            Self::None
        }
    }

    fn allows(self, endpoint: &Endpoint, place: &Place) -> bool {
        match self {
            Self::None => true,
            Self::SameZone => endpoint.zones.contains(&place.zone),
            Self::SameNode => endpoint.nodes.contains(&place.node),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn service(spec: Value) -> Service {
        serde_json::from_value(json!({"metadata": {"namespace": "d", "name": "web"}, "spec": spec})).expect("service")
    }

    fn slice(endpoints: Value) -> Arc<EndpointSlice> {
        let slice = json!({"metadata": {"name": "s"}, "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}]});
        Arc::new(serde_json::from_value(slice).expect("slice"))
    }

    fn endpoint(last: u8, conditions: Value, node: &str) -> Value {
        json!({"addresses": [format!("10.0.0.{last}")], "nodeName": node, "conditions": conditions})
    }

    fn port(change: Value) -> ServicePort {
        let mut spec = json!({"clusterIP": "10.96.0.9", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]});
        for (key, value) in change.as_object().expect("object") {
            spec[key] = value.clone();
        }
        ports(&service(spec)).remove(0)
    }

    #[test]
    fn what_is_not_ours() {
        let spec = json!({"clusterIP": "None", "ports": [{"port": 80}]});
        assert!(ports(&service(spec)).is_empty());
        assert!(ports(&service(json!({"type": "ExternalName", "externalName": "x"}))).is_empty());
        let mut other = service(json!({"clusterIP": "10.96.0.9", "ports": [{"port": 80}]}));
        assert_eq!(ports(&other)[0].name, "d/web/tcp/");
        other.metadata.labels = Some([(PROXY_NAME.to_owned(), "x".to_owned())].into());
        assert!(ports(&other).is_empty());
    }

    #[test]
    fn fields() {
        let port = port(json!({"type": "NodePort", "sessionAffinity": "ClientIP", "externalTrafficPolicy": "Local",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 7}}, "internalTrafficPolicy": "Local",
            "loadBalancerSourceRanges": [" 10.0.0.0/8 "],
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30001}]}));
        assert_eq!((port.node_port, port.affinity_ms, port.internal_local, port.external_local), (Some(30001), Some(7000), true, true));
        assert_eq!(port.source_ranges, ["10.0.0.0/8".parse().expect("range")]);
    }

    #[test]
    fn endpoints_are_of_the_port_and_once_each() {
        let twice = slice(json!([
            endpoint(1, json!({"ready": false, "serving": true, "terminating": true}), "a"),
            endpoint(1, json!({"ready": true}), "b")
        ]));
        let found = endpoints(&port(json!({})), &[twice], "b");
        assert_eq!(found.len(), 1);
        assert!(found[0].ready && found[0].local && found[0].port == 8080);
    }

    #[test]
    fn ready_ones_first_then_those_that_end() {
        let place = Place { node: "a".to_owned(), zone: String::new() };
        let of = |port: &ServicePort, list: Value| {
            let endpoints = endpoints(port, &[slice(list)], "a");
            let usable = usable(port, &endpoints, &place);
            let last = |list: &[&Endpoint]| list.iter().map(|endpoint| endpoint.address.octets()[3]).collect::<Vec<_>>();
            (last(&usable.cluster), last(&usable.local), usable.any)
        };
        let ends = json!({"ready": false, "serving": true, "terminating": true});
        let ready = json!({"ready": true, "serving": true, "terminating": false});
        let broken = json!({"ready": false, "serving": false, "terminating": false});
        let list = json!([endpoint(1, ready.clone(), "b"), endpoint(2, ends.clone(), "a"), endpoint(3, broken.clone(), "a")]);
        assert_eq!(of(&port(json!({})), list.clone()), (vec![1], vec![], true));
        let local = port(json!({"internalTrafficPolicy": "Local"}));
        assert_eq!(of(&local, list.clone()), (vec![], vec![2], true), "the local one that ends is all there is");
        let both =
            port(json!({"type": "NodePort", "externalTrafficPolicy": "Local", "ports": [{"name": "http", "port": 80, "nodePort": 30001}]}));
        assert_eq!(of(&both, list), (vec![1], vec![2], true));
        assert_eq!(of(&port(json!({})), json!([endpoint(2, ends, "a"), endpoint(3, broken.clone(), "a")])), (vec![2], vec![], true));
        assert_eq!(of(&port(json!({})), json!([endpoint(3, broken, "a")])), (vec![], vec![], false));
        assert_eq!(of(&local, json!([endpoint(1, ready, "b")])), (vec![], vec![], true));
    }

    #[test]
    fn hints_count_when_all_have_them() {
        let hinted = |last: u8, zone: &str| {
            let mut endpoint = endpoint(last, json!({"ready": true}), "x");
            endpoint["hints"] = json!({"forZones": [{"name": zone}]});
            endpoint
        };
        let count = |list: Value, zone: &str| {
            let port = port(json!({}));
            let endpoints = endpoints(&port, &[slice(list)], "a");
            usable(&port, &endpoints, &Place { node: "a".to_owned(), zone: zone.to_owned() }).cluster.len()
        };
        assert_eq!(count(json!([hinted(1, "z1"), hinted(2, "z2")]), "z1"), 1);
        assert_eq!(count(json!([hinted(1, "z1"), hinted(2, "z2")]), "z3"), 2);
        assert_eq!(count(json!([hinted(1, "z1"), endpoint(2, json!({"ready": true}), "x")]), "z1"), 2);
    }
}
