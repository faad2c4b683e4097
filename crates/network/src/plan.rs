//! The pure part: which address a pod gets, which names and hardware addresses follow from it, which rules and elements nftables gets.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use linux::nftables::{BaseChain, DataType, Expr, Hook, REG_0, REG_1, REG_2, Set, TableFamily, Transaction, interface_name, match_network};

use crate::config::{Config, Ipv4Cidr, PortMapping};

const MAP_ANY: &str = "host_ports";
const MAP_ONE: &str = "host_ports_of_address";
const CHAIN_PORTS: &str = "host_ports";
const IP_SOURCE: u32 = 12;
const IP_DESTINATION: u32 = 16;
const IPS_DST_NAT: u32 = 1 << 5;
const RTN_LOCAL: u32 = 2;

/// The address after `last` that is in nobody's hands, or `None` if all are taken. Going on from the last one instead of taking the first
/// free one keeps an address unused for as long as possible after its pod ended.
pub fn next_address(cidr: Ipv4Cidr, last: Option<Ipv4Addr>, taken: &BTreeSet<Ipv4Addr>) -> Option<Ipv4Addr> {
    let (first, end) = cidr.pod_range();
    let start = last.map(u32::from).filter(|l| (first..end).contains(l)).map_or(first, |l| l + 1);
    (start..=end).chain(first..start).map(Ipv4Addr::from).find(|address| !taken.contains(address))
}

/// The hardware address that goes with a pod's address: the same for each pod that has it, so no neighbour entry goes stale.
pub fn hardware_address(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x0a, 0x58, a, b, c, d]
}

/// The host end's interface name: "cv" and the sandbox's hash, 15 bytes at most. FNV-1a of the id, for ids may share their beginning.
pub fn veth_name(sandbox_id: &str) -> String {
    let hash = sandbox_id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    format!("cv{:013x}", hash & 0x000f_ffff_ffff_ffff)
}

/// The name of the bridge port is [`veth_name`]'s.
pub fn is_veth_name(name: &str) -> bool {
    name.len() == 15 && name.starts_with("cv") && name[2..].bytes().all(|b| b.is_ascii_hexdigit())
}

/// One element of a host-port map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortElement {
    /// The map.
    pub map: &'static str,
    /// Protocol and port, with the host's address before them in the map for single addresses.
    pub key: Vec<u8>,
    /// The pod's address and port.
    pub value: Vec<u8>,
}

/// The map elements of one pod: two registers of value, two or three of key. IPv6 host addresses are filtered out by the caller.
pub fn port_elements(address: Ipv4Addr, mappings: &[PortMapping]) -> Vec<PortElement> {
    let mut elements = Vec::new();
    for mapping in mappings.iter().filter(|m| m.host_port != 0) {
        let mut key = Vec::with_capacity(12);
        let map = match mapping.host_ip {
            Some(IpAddr::V4(host)) if !host.is_unspecified() => {
                key.extend_from_slice(&host.octets());
                MAP_ONE
            }
            _ => MAP_ANY,
        };
        key.extend_from_slice(&[mapping.protocol.number(), 0, 0, 0]);
        key.extend_from_slice(&port_word(mapping.host_port));
        let mut value = address.octets().to_vec();
        value.extend_from_slice(&port_word(mapping.container_port));
        elements.push(PortElement { map, key, value });
    }
    elements
}

fn port_word(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

/// Whether two mappings want the same port of the same host address.
pub fn ports_collide(a: &PortMapping, b: &PortMapping) -> bool {
    let any = |m: &PortMapping| m.host_ip.is_none_or(|ip| ip.is_unspecified());
    a.host_port != 0 && (a.host_port, a.protocol) == (b.host_port, b.protocol) && (any(a) || any(b) || a.host_ip == b.host_ip)
}

/// Replaces the whole table by our rules and the elements of all pods, in one transaction.
pub fn table(config: &Config, elements: &[PortElement]) -> Transaction {
    let mut t = Transaction::new(TableFamily::Ipv4, &config.nft_table);
    t.add_table().delete_table().add_table();
    let key = [DataType::Ipv4Addr, DataType::InetProto, DataType::InetService];
    let value = [DataType::Ipv4Addr, DataType::InetService];
    t.add_set(&Set { name: MAP_ANY, key: &key[1..], value: &value });
    t.add_set(&Set { name: MAP_ONE, key: &key, value: &value });
    add_port_rules(&mut t);
    add_bridge_rules(&mut t, config);
    add_elements(&mut t, elements);
    t
}

fn add_port_rules(t: &mut Transaction) {
    t.add_chain(CHAIN_PORTS, None);
    let dport = |to| Expr::Transport { offset: 2, len: 2, to };
    let lookup = |set: &str| Expr::Lookup { set: set.into(), from: REG_0, to: Some(REG_0) };
    let dnat = Expr::Dnat { address: REG_0, port: REG_1 };
    let destination = Expr::Network { offset: IP_DESTINATION, len: 4, to: REG_0 };
    t.add_rule(CHAIN_PORTS, &[destination, Expr::L4Proto { to: REG_1 }, dport(REG_2), lookup(MAP_ONE), dnat.clone()]);
    t.add_rule(CHAIN_PORTS, &[Expr::L4Proto { to: REG_0 }, dport(REG_1), lookup(MAP_ANY), dnat]);
    for (name, hook) in [("prerouting", Hook::Prerouting), ("output", Hook::Output)] {
        t.add_chain(name, Some(BaseChain { kind: "nat", hook, priority: -100 }));
        t.add_rule(
            name,
            &[
                Expr::DestinationType { to: REG_0 },
                Expr::Equal { from: REG_0, bytes: RTN_LOCAL.to_ne_bytes().to_vec() },
                Expr::Jump(CHAIN_PORTS.into()),
            ],
        );
    }
}

fn add_bridge_rules(t: &mut Transaction, config: &Config) {
    let cidr = config.pod_cidr;
    let bridge = interface_name(&config.bridge);
    let loopback = Ipv4Addr::new(127, 0, 0, 0);
    let output = [Expr::OutputName { to: REG_0 }, Expr::Equal { from: REG_0, bytes: bridge.clone() }];
    let translated = [
        Expr::CtStatus { to: REG_0 },
        Expr::Mask { register: REG_0, mask: IPS_DST_NAT.to_ne_bytes().to_vec() },
        Expr::NotEqual { from: REG_0, bytes: vec![0; 4] },
    ];
    let from_pods = match_network(IP_SOURCE, cidr.network, cidr.prefix_len, true);
    let to_pods = |equal| match_network(IP_DESTINATION, cidr.network, cidr.prefix_len, equal);

    // route_localnet, which the bridge needs for answers to 127.0.0.1, lets what comes over a link reach the host's loopback (CVE-2020-8558).
    // Before any translation only a forged packet from outside has such a destination.
    let over_a_link = [Expr::InputName { to: REG_0 }, Expr::NotEqual { from: REG_0, bytes: interface_name("lo") }];
    t.add_chain("loopback_guard", Some(BaseChain { kind: "filter", hook: Hook::Prerouting, priority: -300 }));
    t.add_rule("loopback_guard", &[&over_a_link[..], &match_network(IP_DESTINATION, loopback, 8, true), &[Expr::Drop]].concat());

    let chain = "postrouting";
    t.add_chain(chain, Some(BaseChain { kind: "nat", hook: Hook::Postrouting, priority: 100 }));
    // From the host through 127.0.0.1 to a host port: the answer must find back.
    let from_loopback = match_network(IP_SOURCE, loopback, 8, true);
    t.add_rule(chain, &[&from_loopback, &output[..], &translated[..], &[Expr::Masquerade]].concat());
    // From a pod through a host port to a pod (itself as well): the answer must pass the host, not the bridge alone.
    t.add_rule(chain, &[&from_pods[..], &to_pods(true), &translated[..], &[Expr::Masquerade]].concat());
    // From a pod to anywhere else.
    let elsewhere = [Expr::OutputName { to: REG_0 }, Expr::NotEqual { from: REG_0, bytes: bridge }];
    t.add_rule(chain, &[&from_pods[..], &to_pods(false), &elsewhere[..], &[Expr::Masquerade]].concat());
}

/// Adds the elements of a pod to their maps.
pub fn add_elements(t: &mut Transaction, elements: &[PortElement]) {
    for map in [MAP_ANY, MAP_ONE] {
        let of_map: Vec<_> = elements.iter().filter(|e| e.map == map).map(|e| (e.key.clone(), e.value.clone())).collect();
        t.add_elements(map, &of_map);
    }
}

/// Deletes the elements of a pod from their maps.
pub fn delete_elements(t: &mut Transaction, elements: &[PortElement]) {
    for map in [MAP_ANY, MAP_ONE] {
        let of_map: Vec<_> = elements.iter().filter(|e| e.map == map).map(|e| e.key.clone()).collect();
        t.delete_elements(map, &of_map);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Protocol;

    fn cidr(text: &str) -> Ipv4Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_go_round_and_end() {
        let net = cidr("10.85.0.0/29");
        let mut taken = BTreeSet::new();
        let mut last = None;
        let mut given = Vec::new();
        while let Some(address) = next_address(net, last, &taken) {
            taken.insert(address);
            given.push(address.octets()[3]);
            last = Some(address);
        }
        assert_eq!(given, [2, 3, 4, 5, 6]);
        taken.remove(&Ipv4Addr::new(10, 85, 0, 3));
        taken.remove(&Ipv4Addr::new(10, 85, 0, 4));
        assert_eq!(next_address(net, Some(Ipv4Addr::new(10, 85, 0, 3)), &taken), Some(Ipv4Addr::new(10, 85, 0, 4)));
        assert_eq!(next_address(net, Some(Ipv4Addr::new(10, 85, 0, 6)), &taken), Some(Ipv4Addr::new(10, 85, 0, 3)));
    }

    #[test]
    fn cidr_is_normalised_and_checked() {
        assert_eq!(cidr("10.85.3.7/16").to_string(), "10.85.0.0/16");
        assert_eq!(cidr("10.85.0.0/16").gateway().to_string(), "10.85.0.1");
        for bad in ["", "10.85.0.0", "10.85.0.0/33", "10.85.0.0/31", "::/64", "x/16"] {
            assert!(bad.parse::<Ipv4Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_fit_and_differ() {
        let a = veth_name("sandbox-a");
        assert_eq!(a.len(), 15);
        assert!(is_veth_name(&a));
        assert_ne!(a, veth_name("sandbox-b"));
        assert!(!is_veth_name("coracle0"));
    }

    #[test]
    fn elements_carry_protocol_and_port() {
        let mapping = PortMapping { protocol: Protocol::Udp, container_port: 53, host_port: 5353, host_ip: None };
        let elements = port_elements(Ipv4Addr::new(10, 85, 0, 2), &[mapping]);
        assert_eq!(elements[0].key, [17, 0, 0, 0, 0x14, 0xe9, 0, 0]);
        assert_eq!(elements[0].value, [10, 85, 0, 2, 0, 53, 0, 0]);
        let one = PortMapping { host_ip: Some("192.0.2.1".parse().unwrap()), ..mapping };
        assert_eq!(port_elements(Ipv4Addr::new(10, 85, 0, 2), &[one])[0].key[..4], [192, 0, 2, 1]);
        assert!(port_elements(Ipv4Addr::new(10, 85, 0, 2), &[PortMapping { host_port: 0, ..mapping }]).is_empty());
    }

    #[test]
    fn ports_collide_by_protocol_and_address() {
        let a = PortMapping { protocol: Protocol::Tcp, container_port: 80, host_port: 80, host_ip: None };
        let b = PortMapping { host_ip: Some("192.0.2.1".parse().unwrap()), ..a };
        let c = PortMapping { host_ip: Some("192.0.2.2".parse().unwrap()), ..a };
        assert!(ports_collide(&a, &b) && ports_collide(&b, &b));
        assert!(!ports_collide(&b, &c));
        assert!(!ports_collide(&a, &PortMapping { protocol: Protocol::Udp, ..a }));
    }
}
