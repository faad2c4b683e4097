//! What one port of a Service contributes to the table. Pure. Source: upstream's `pkg/proxy/nftables/proxier.go`, `syncProxyRules`, v1.37.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use linux::nftables::{Expr, Verdict, match_network};

use crate::config::Cidr;
use crate::layout::{AFFINITY, Map, REJECT, SOURCE, from_host, mark, port_word, register, source};
use crate::plan::{Desk, slot_key};
use crate::service::{Endpoint, ServicePort, Usable};

/// A key of a map.
pub type ElementKey = (Map, Vec<u8>);

/// The rules of a chain, each a list of expressions.
pub type Rules = Vec<Vec<Expr>>;

/// What stands behind a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Nothing: a set's element.
    None,
    /// Address and port.
    Bytes(Vec<u8>),
    /// What happens to the packet.
    Verdict(Verdict),
}

/// Elements and chains.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fragment {
    /// Elements of maps and sets.
    pub elements: BTreeMap<ElementKey, Value>,
    /// Chains with all their rules.
    pub chains: BTreeMap<String, Rules>,
}

/// What fragments depend on beside their Service.
#[derive(Debug, Default)]
pub struct Surroundings {
    /// `--cluster-cidr`.
    pub cluster_cidr: Vec<Cidr>,
    /// The node's primary address.
    pub node_ip: Option<Ipv4Addr>,
}

/// Names of a port's chains.
struct Chains {
    cluster: String,
    local: String,
    external: String,
    firewall: String,
}

/// Builds the fragment of one port.
pub fn fragment(port: &ServicePort, usable: &Usable<'_>, around: &Surroundings, desk: &mut Desk<'_>) -> Fragment {
    let chain = |kind: &str| format!("{kind}/{}", port.name);
    let chains = Chains { cluster: chain("service"), local: chain("local"), external: chain("external"), firewall: chain("firewall") };
    let mut fragment = Fragment::default();
    if usable.any {
        let service = desk.number(&port.name);
        for (name, list) in [(&chains.cluster, &usable.cluster), (&chains.local, &usable.local)] {
            if !list.is_empty() {
                let group = Group { service, group: desk.number(name), affinity_ms: port.affinity_ms };
                fragment.add_group(name, &group, list, desk);
            }
        }
        fragment.add_hairpin(port, usable);
        if port.is_external() {
            fragment.chains.insert(chains.external.clone(), external_rules(port, usable, around, &chains));
        }
    }
    fragment.add_ways(port, usable, &chains);
    if !port.load_balancer_ips.is_empty() && !port.source_ranges.is_empty() {
        fragment.chains.insert(chains.firewall.clone(), firewall_rules(port, around));
    }
    fragment
}

struct Group {
    service: u32,
    group: u32,
    affinity_ms: Option<u64>,
}

impl Fragment {
    fn set(&mut self, map: Map, key: Vec<u8>, value: Value) {
        self.elements.insert((map, key), value);
    }

    fn go(&mut self, map: Map, key: Vec<u8>, chain: &str) {
        self.set(map, key, Value::Verdict(Verdict::Goto(chain.to_owned())));
    }

    /// A chain that leads to one of some endpoints.
    fn add_group(&mut self, chain: &str, group: &Group, endpoints: &[&Endpoint], desk: &Desk<'_>) {
        let targets = endpoints.iter().map(|endpoint| [endpoint.address.octets(), port_word(endpoint.port)].concat()).collect();
        for (slot, target) in (0..).zip(desk.arrange(group.group, targets)) {
            if group.affinity_ms.is_some() {
                self.set(Map::AffinityEndpoints, [&group.group.to_ne_bytes()[..], &target].concat(), Value::None);
            }
            self.set(Map::Endpoints, slot_key(group.group, slot), Value::Bytes(target));
        }
        let count = u32::try_from(endpoints.len()).unwrap_or(u32::MAX);
        self.chains.insert(chain.to_owned(), balancing_rules(group, count));
    }

    /// Endpoints of this node that reach themselves through the Service: the answer must pass the host.
    fn add_hairpin(&mut self, port: &ServicePort, usable: &Usable<'_>) {
        for endpoint in usable.cluster.iter().chain(&usable.local).filter(|endpoint| endpoint.local) {
            let address = endpoint.address.octets();
            let key = [address, address, [port.protocol.number(), 0, 0, 0], port_word(endpoint.port)].concat();
            self.set(Map::Hairpin, key, Value::None);
        }
    }

    /// The ways to the Service: its cluster IP, other addresses, and the node's port.
    fn add_ways(&mut self, port: &ServicePort, usable: &Usable<'_>, chains: &Chains) {
        let protocol = [port.protocol.number(), 0, 0, 0];
        let key = |address: Ipv4Addr| [address.octets(), protocol, port_word(port.port)].concat();
        // None anywhere is told to the client; none here is silence, for the client may be led to a node that has one.
        let refused = if usable.any { Verdict::Drop } else { Verdict::Goto(REJECT.to_owned()) };
        let refuse = |fragment: &mut Self, map: Map, key: Vec<u8>| fragment.set(map, key, Value::Verdict(refused.clone()));

        self.set(Map::ClusterIps, port.cluster_ip.octets().to_vec(), Value::None);
        let (chain, here) = if port.internal_local { (&chains.local, &usable.local) } else { (&chains.cluster, &usable.cluster) };
        if here.is_empty() {
            refuse(self, Map::NoEndpointServices, key(port.cluster_ip));
        } else {
            self.go(Map::ServiceIps, key(port.cluster_ip), chain);
        }
        let outside = if port.external_local { &usable.local } else { &usable.cluster };
        for address in port.external_ips.iter().chain(&port.load_balancer_ips) {
            if usable.any {
                self.go(Map::ServiceIps, key(*address), &chains.external);
            }
            if outside.is_empty() {
                refuse(self, Map::NoEndpointServices, key(*address));
            }
        }
        if !port.source_ranges.is_empty() {
            for address in &port.load_balancer_ips {
                self.go(Map::FirewallIps, key(*address), &chains.firewall);
            }
        }
        if let Some(number) = port.node_port {
            let key = [protocol, port_word(number)].concat();
            if usable.any {
                self.go(Map::NodePorts, key.clone(), &chains.external);
            }
            if outside.is_empty() {
                refuse(self, Map::NoEndpointNodePorts, key);
            }
        }
    }
}

/// Rules that choose an endpoint: the one that the client had, else one by chance, which is remembered if there is room.
///
/// Registers: 0 service, 1 client, 2 group, 3 endpoint's address, 4 endpoint's port, 5 group, 6 slot.
fn balancing_rules(group: &Group, count: u32) -> Rules {
    let number = |to: u32, value: u32| Expr::Load { to: register(to), bytes: value.to_ne_bytes().to_vec() };
    let lookup = |set: &str, from: u32, to: Option<u32>| Expr::Lookup { set: set.to_owned(), from: register(from), to: to.map(register) };
    let translate = Expr::Dnat { address: register(3), port: register(4) };
    let choose = [number(5, group.group), Expr::Random { modulus: count, to: register(6) }, lookup(Map::Endpoints.name(), 5, Some(3))];
    let mut rules = Vec::new();
    if let Some(timeout_ms) = group.affinity_ms {
        let client = [number(0, group.service), source(1)];
        let (map, key, value) = (AFFINITY.to_owned(), register(0), register(3));
        let remember = Expr::Update { map: map.clone(), key, value, timeout_ms };
        // The endpoint of old may be gone, or out of this chain's reach.
        let known = [lookup(AFFINITY, 0, Some(3)), number(2, group.group), lookup(Map::AffinityEndpoints.name(), 2, None)];
        rules.push([&client[..], &known, &[remember.clone(), translate.clone()]].concat());
        rules.push([&client[..], &choose, &[Expr::Forget { map, key, value }, remember, translate.clone()]].concat());
    }
    rules.push([&choose[..], &[translate]].concat());
    rules
}

/// Rules for traffic to external addresses and node ports.
fn external_rules(port: &ServicePort, usable: &Usable<'_>, around: &Surroundings, chains: &Chains) -> Rules {
    let go = |chain: &str| Expr::Goto(chain.to_owned());
    if !port.external_local {
        // The endpoint may be on another node: its answer must come back here.
        let mut rules = vec![mark()];
        if !usable.cluster.is_empty() {
            rules.push(vec![go(&chains.cluster)]);
        }
        return rules;
    }
    let mut rules = Vec::new();
    if !usable.cluster.is_empty() {
        // Pods and the host take the short way: as if they had gone out to a load balancer and come back at a good node.
        for range in &around.cluster_cidr {
            let mut rule = match_network(SOURCE, range.network, range.prefix_len, true);
            rule.push(go(&chains.cluster));
            rules.push(rule);
        }
        rules.push([from_host(), mark()].concat());
        rules.push([from_host(), vec![go(&chains.cluster)]].concat());
    }
    if !usable.local.is_empty() {
        rules.push(vec![go(&chains.local)]);
    }
    rules
}

/// Lets the source ranges pass and drops the rest.
fn firewall_rules(port: &ServicePort, around: &Surroundings) -> Rules {
    let mut ranges = port.source_ranges.clone();
    if around.node_ip.is_some_and(|node| ranges.iter().any(|range| range.contains(node))) {
        // The address may be a local one: then it is also the source of this node's own packets.
        ranges.extend(port.load_balancer_ips.iter().map(|address| Cidr { network: *address, prefix_len: 32 }));
    }
    let pass = ranges.iter().map(|range| {
        let mut rule = match_network(SOURCE, range.network, range.prefix_len, true);
        rule.push(Expr::Return);
        rule
    });
    pass.chain([vec![Expr::Drop]]).collect()
}
