//! The table's fixed part: base chains, maps, and the rules that lead from one to the other. The shape is that of upstream's nftables
//! mode (`pkg/proxy/nftables/proxier.go`, v1.37), so that `nft list table` reads alike; endpoints are a map here, not chains.
//!
//! ```text
//! prerouting, output (nat): services ── cluster-ips, not from a pod? mark
//!                               ├── service-ips:       address . protocol . port ─> goto service/… | local/… | external/…
//!                               └── service-nodeports: protocol . port           ─> goto external/…
//! service/…: endpoints[group . random slot] ─> dnat          (affinity[service . client] before it)
//! input, forward, output (filter): no-endpoint-services, no-endpoint-nodeports ─> reject | drop
//! postrouting (nat): marked, or from an endpoint to itself ─> masquerade
//! ```

use std::net::Ipv4Addr;

use linux::nftables::{BaseChain, DataType, Expr, Hook, REG_0, REG_1, REG_2, Set, Transaction, match_network};

use crate::config::Cidr;

/// The chain that marks a table of this layout. A table without it is replaced as a whole.
pub const LAYOUT: &str = "layout-1";
/// Rejects.
pub const REJECT: &str = "reject-chain";
/// Sticky clients: (service, address) to (address, port).
pub const AFFINITY: &str = "affinity";
/// Most sticky clients of all services; more are led as if there were no affinity.
const AFFINITY_MAX: u32 = 1 << 20;
/// The mark of packets to be masqueraded (upstream's default bit 14).
const MASQUERADE_MARK: u32 = 1 << 14;

/// Offset of the source address in an IPv4 header.
pub const SOURCE: u32 = 12;
const DESTINATION: u32 = 16;
const CT_STATE_NEW: u32 = 8;
const IPS_DST_NAT: u32 = 1 << 5;
/// `RTN_LOCAL`.
const RTN_LOCAL: u32 = 2;

const SERVICES: &str = "services";
const SERVICE_CHECK: &str = "service-endpoints-check";
const NODE_PORT_CHECK: &str = "nodeport-endpoints-check";
const CLUSTER_IP_CHECK: &str = "cluster-ips-check";
const FIREWALL_CHECK: &str = "firewall-check";
const MASQUERADING: &str = "masquerading";

/// The sets and maps whose elements follow from Services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Map {
    /// Address, protocol, port: what to do.
    ServiceIps,
    /// Protocol, port: what to do.
    NodePorts,
    /// Address, protocol, port: reject or drop.
    NoEndpointServices,
    /// Protocol, port: reject or drop.
    NoEndpointNodePorts,
    /// Address, protocol, port: who may pass.
    FirewallIps,
    /// All cluster IPs.
    ClusterIps,
    /// Addresses of this node.
    NodePortIps,
    /// Source, destination, protocol, port of an endpoint that reaches itself.
    Hairpin,
    /// Group, slot: address, port.
    Endpoints,
    /// Group, address, port: what a sticky client may be led to.
    AffinityEndpoints,
}

use DataType::{InetProto, InetService, Ipv4Addr as Address, Mark};

impl Map {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::ServiceIps,
        Self::NodePorts,
        Self::NoEndpointServices,
        Self::NoEndpointNodePorts,
        Self::FirewallIps,
        Self::ClusterIps,
        Self::NodePortIps,
        Self::Hairpin,
        Self::Endpoints,
        Self::AffinityEndpoints,
    ];

    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::ServiceIps => "service-ips",
            Self::NodePorts => "service-nodeports",
            Self::NoEndpointServices => "no-endpoint-services",
            Self::NoEndpointNodePorts => "no-endpoint-nodeports",
            Self::FirewallIps => "firewall-ips",
            Self::ClusterIps => "cluster-ips",
            Self::NodePortIps => "nodeport-ips",
            Self::Hairpin => "hairpin-connections",
            Self::Endpoints => "endpoints",
            Self::AffinityEndpoints => "affinity-endpoints",
        }
    }

    fn key(self) -> &'static [DataType] {
        match self {
            Self::ServiceIps | Self::NoEndpointServices | Self::FirewallIps => &[Address, InetProto, InetService],
            Self::NodePorts | Self::NoEndpointNodePorts => &[InetProto, InetService],
            Self::ClusterIps | Self::NodePortIps => &[Address],
            Self::Hairpin => &[Address, Address, InetProto, InetService],
            Self::Endpoints => &[Mark, Mark],
            Self::AffinityEndpoints => &[Mark, Address, InetService],
        }
    }

    /// Whether its values are verdicts.
    pub fn is_verdict(self) -> bool {
        matches!(self, Self::ServiceIps | Self::NodePorts | Self::NoEndpointServices | Self::NoEndpointNodePorts | Self::FirewallIps)
    }
}

/// A port as an element has it.
pub fn port_word(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

/// Register `n` of those of 32 bits.
pub fn register(n: u32) -> u32 {
    REG_0 + n
}

/// What the fixed part depends on.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// `--cluster-cidr`.
    pub cluster_cidr: Vec<Cidr>,
    /// `--masquerade-all`.
    pub masquerade_all: bool,
    /// NodePorts on every address of the host but the loopback ones.
    pub every_node_port_address: bool,
}

const BASE: [(&str, &str, Hook, i32); 8] = [
    ("filter-prerouting-pre-dnat", "filter", Hook::Prerouting, -110),
    ("filter-output-pre-dnat", "filter", Hook::Output, -110),
    ("filter-input", "filter", Hook::Input, 0),
    ("filter-forward", "filter", Hook::Forward, 0),
    ("filter-output", "filter", Hook::Output, 0),
    ("nat-prerouting", "nat", Hook::Prerouting, -100),
    ("nat-output", "nat", Hook::Output, -100),
    ("nat-postrouting", "nat", Hook::Postrouting, 100),
];

/// From which base chain to which chain, and whether only for new flows.
const JUMPS: [(&str, &str, bool); 11] = [
    ("filter-prerouting-pre-dnat", FIREWALL_CHECK, true),
    ("filter-output-pre-dnat", FIREWALL_CHECK, true),
    ("filter-input", NODE_PORT_CHECK, true),
    ("filter-input", SERVICE_CHECK, true),
    ("filter-forward", SERVICE_CHECK, true),
    ("filter-output", SERVICE_CHECK, true),
    ("filter-forward", CLUSTER_IP_CHECK, true),
    ("filter-output", CLUSTER_IP_CHECK, true),
    ("nat-output", SERVICES, false),
    ("nat-prerouting", SERVICES, false),
    ("nat-postrouting", MASQUERADING, false),
];

const PLAIN: [&str; 8] = [SERVICES, SERVICE_CHECK, NODE_PORT_CHECK, CLUSTER_IP_CHECK, FIREWALL_CHECK, MASQUERADING, REJECT, LAYOUT];

/// The chains of the fixed part.
pub fn is_fixed(chain: &str) -> bool {
    PLAIN.contains(&chain) || BASE.iter().any(|(name, ..)| *name == chain)
}

/// Makes what is missing of the fixed part and writes its rules anew; what depends on Services stays as it is.
pub fn set_up(t: &mut Transaction, options: &Options) {
    t.add_table();
    for map in Map::ALL {
        match map {
            Map::Endpoints => t.add_set(&Set { name: map.name(), key: map.key(), value: &[Address, InetService] }),
            map if map.is_verdict() => t.add_verdict_map(map.name(), map.key()),
            map => t.add_set(&Set { name: map.name(), key: map.key(), value: &[] }),
        };
    }
    t.add_dynamic_map(&Set { name: AFFINITY, key: &[Mark, Address], value: &[Address, InetService] }, AFFINITY_MAX);
    for chain in PLAIN {
        t.add_chain(chain, None).flush_chain(chain);
    }
    for (name, kind, hook, priority) in BASE {
        t.add_chain(name, Some(BaseChain { kind, hook, priority })).flush_chain(name);
    }
    for (from, to, new) in JUMPS {
        let mut rule = if new { new_flow() } else { Vec::new() };
        rule.push(Expr::Jump(to.to_owned()));
        t.add_rule(from, &rule);
    }
    t.add_rule(REJECT, &[Expr::Reject]);
    t.add_rule(CLUSTER_IP_CHECK, &[destination(0), is_in(Map::ClusterIps), Expr::Reject]);
    for (chain, map) in [(SERVICE_CHECK, Map::NoEndpointServices), (FIREWALL_CHECK, Map::FirewallIps)] {
        t.add_rule(chain, &[destination(0), protocol(1), port(2), verdict(map)]);
    }
    add_dispatch(t, options);
    add_masquerading(t);
}

fn add_dispatch(t: &mut Transaction, options: &Options) {
    let to_cluster_ip = [destination(0), is_in(Map::ClusterIps)];
    if options.masquerade_all {
        t.add_rule(SERVICES, &[&to_cluster_ip[..], &mark()].concat());
    } else if !options.cluster_cidr.is_empty() {
        // From outside of the cluster: the answer must come back this way.
        let elsewhere = options.cluster_cidr.iter().flat_map(|range| match_network(SOURCE, range.network, range.prefix_len, false));
        let rule: Vec<Expr> = to_cluster_ip.iter().cloned().chain(elsewhere).chain(mark()).collect();
        t.add_rule(SERVICES, &rule);
    }
    t.add_rule(SERVICES, &[destination(0), protocol(1), port(2), verdict(Map::ServiceIps)]);
    let to_node = if options.every_node_port_address {
        let local = [Expr::DestinationType { to: REG_0 }, Expr::Equal { from: REG_0, bytes: RTN_LOCAL.to_ne_bytes().to_vec() }];
        [&local[..], &match_network(DESTINATION, Ipv4Addr::new(127, 0, 0, 0), 8, false)].concat()
    } else {
        vec![destination(0), is_in(Map::NodePortIps)]
    };
    for (chain, map) in [(SERVICES, Map::NodePorts), (NODE_PORT_CHECK, Map::NoEndpointNodePorts)] {
        t.add_rule(chain, &[&to_node[..], &[protocol(0), port(1), verdict(map)]].concat());
    }
}

fn add_masquerading(t: &mut Transaction) {
    let bit = MASQUERADE_MARK.to_ne_bytes().to_vec();
    let marked = [
        Expr::Mark { to: REG_0 },
        Expr::Mask { register: REG_0, mask: bit.clone() },
        Expr::NotEqual { from: REG_0, bytes: vec![0; 4] },
        Expr::Mark { to: REG_1 },
        Expr::Bitwise { register: REG_1, mask: vec![0xff; 4], xor: bit },
        Expr::SetMark { from: REG_1 },
        Expr::MasqueradeRandom,
    ];
    t.add_rule(MASQUERADING, &marked);
    let translated = [
        Expr::CtStatus { to: REG_0 },
        Expr::Mask { register: REG_0, mask: IPS_DST_NAT.to_ne_bytes().to_vec() },
        Expr::NotEqual { from: REG_0, bytes: vec![0; 4] },
    ];
    let to_itself = [source(0), destination(1), protocol(2), port(3), is_in(Map::Hairpin), Expr::MasqueradeRandom];
    t.add_rule(MASQUERADING, &[&translated[..], &to_itself].concat());
}

fn new_flow() -> Vec<Expr> {
    vec![
        Expr::CtState { to: REG_0 },
        Expr::Mask { register: REG_0, mask: CT_STATE_NEW.to_ne_bytes().to_vec() },
        Expr::NotEqual { from: REG_0, bytes: vec![0; 4] },
    ]
}

/// Marks the packet to be masqueraded.
pub fn mark() -> Vec<Expr> {
    let register = register(3);
    let (mask, xor) = ((!MASQUERADE_MARK).to_ne_bytes().to_vec(), MASQUERADE_MARK.to_ne_bytes().to_vec());
    vec![Expr::Mark { to: register }, Expr::Bitwise { register, mask, xor }, Expr::SetMark { from: register }]
}

/// Goes on for packets of this host itself.
pub fn from_host() -> Vec<Expr> {
    vec![Expr::SourceType { to: REG_2 }, Expr::Equal { from: REG_2, bytes: RTN_LOCAL.to_ne_bytes().to_vec() }]
}

/// Loads the source address into register `n`.
pub fn source(n: u32) -> Expr {
    Expr::Network { offset: SOURCE, len: 4, to: register(n) }
}

fn destination(n: u32) -> Expr {
    Expr::Network { offset: DESTINATION, len: 4, to: register(n) }
}

fn protocol(n: u32) -> Expr {
    Expr::L4Proto { to: register(n) }
}

fn port(n: u32) -> Expr {
    Expr::Transport { offset: 2, len: 2, to: register(n) }
}

fn is_in(map: Map) -> Expr {
    Expr::Lookup { set: map.name().to_owned(), from: REG_0, to: None }
}

fn verdict(map: Map) -> Expr {
    Expr::Verdict { map: map.name().to_owned(), from: REG_0 }
}
