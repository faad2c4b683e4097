//! The built-in network's effects: bridge, veth pairs, nftables table, sysctls. What to do is decided in [`crate::plan`].

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;

use camino::Utf8Path;
use linux::conntrack::Conntrack;
use linux::netns;
use linux::nftables::{Nftables, TableFamily, Transaction};
use linux::rtnl::{Route, Veth};

use crate::config::{Config, PodNetwork, PortMapping, Protocol};
use crate::error::Error;
use crate::plan::{self, PortElement};
use crate::record::{Records, file};

/// The interface's name inside a pod.
pub(crate) const INTERFACE: &str = "eth0";
const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

fn kernel(act: impl Into<String>) -> impl FnOnce(linux::netlink::Error) -> Error {
    let act = act.into();
    move |source| Error::Kernel { act, source }
}

/// The bridge's index, if it is there.
pub(crate) fn index(config: &Config) -> Result<Option<u32>, Error> {
    let link =
        Route::open().and_then(|mut route| route.link(&config.bridge)).map_err(kernel(format!("look up bridge {}", config.bridge)))?;
    Ok(link.filter(|link| link.kind == "bridge").map(|link| link.index))
}

/// Makes the bridge unless it is there, with address and setting.
pub(crate) fn ensure_bridge(config: &Config) -> Result<(), Error> {
    let name = &config.bridge;
    let act = || format!("set up bridge {name}");
    let mut route = Route::open().map_err(kernel(act()))?;
    let gateway = config.pod_cidr.gateway();
    let owner = config.state_dir.as_str();
    let existing = route.link(name).map_err(kernel(act()))?;
    if let Some(link) = &existing {
        if link.kind != "bridge" {
            return Err(Error::NotABridge { name: name.clone(), kind: link.kind.clone() });
        }
        if !link.alias.is_empty() && link.alias != owner && Utf8Path::new(&link.alias).exists() {
            return Err(Error::BridgeOwned { name: name.clone(), owner: link.alias.clone() });
        }
    }
    refuse_overlap(config, &mut route, existing.as_ref().map(|l| l.index))?;
    if existing.is_none() {
        route.add_bridge(name, plan::hardware_address(gateway), config.mtu, owner).map_err(kernel(act()))?;
    } else if existing.as_ref().is_some_and(|l| l.alias != owner) {
        route.set_alias(name, owner).map_err(kernel(act()))?;
    }
    let link = route.link(name).map_err(kernel(act()))?;
    let index = link.as_ref().map(|l| l.index).ok_or_else(|| Error::Name {
        field: "bridge",
        value: name.clone(),
        why: "it vanished while it was set up",
    })?;
    match route.add_address(index, gateway, config.pod_cidr.prefix_len) {
        Err(e) if !e.is_exists() => return Err(kernel(act())(e)),
        _ => {}
    }
    if link.is_some_and(|l| !l.up) {
        route.set_up(index).map_err(kernel(act()))?;
    }
    // Answers to 127.0.0.1 come back over the bridge (host ports from the host itself); nowhere else is this wanted.
    write_sysctl(&format!("/proc/sys/net/ipv4/conf/{name}/route_localnet"), "1")
}

fn refuse_overlap(config: &Config, route: &mut Route, bridge: Option<u32>) -> Result<(), Error> {
    let addresses = route.addresses().map_err(kernel("list addresses"))?;
    let Some(taken) = addresses.iter().find(|a| Some(a.index) != bridge && config.pod_cidr.contains(a.address)) else {
        return Ok(());
    };
    let links = route.links().map_err(kernel("list links"))?;
    Err(Error::CidrTaken {
        cidr: config.pod_cidr.to_string(),
        address: taken.address.to_string(),
        interface: links.iter().find(|l| l.index == taken.index).map(|l| l.name.clone()).unwrap_or_default(),
    })
}

/// Lets the host forward, and keeps on record what it was before.
pub(crate) fn enable_forwarding(records: &Records) -> Result<(), Error> {
    let path = Utf8Path::new(IP_FORWARD);
    let before = std::fs::read_to_string(path).map_err(file("read", path))?;
    if before.trim() == "1" {
        return Ok(());
    }
    if records.host()?.is_none() {
        records.save_host(before.trim())?;
    }
    write_sysctl(IP_FORWARD, "1")
}

/// Puts the host's setting back, if it was changed since it booted.
pub(crate) fn restore_forwarding(records: &Records) -> Result<(), Error> {
    match records.host()? {
        Some(host) => write_sysctl(IP_FORWARD, &host.ip_forward),
        None => Ok(()),
    }
}

fn write_sysctl(path: &str, value: &str) -> Result<(), Error> {
    let path = Utf8Path::new(path);
    if std::fs::read_to_string(path).is_ok_and(|now| now.trim() == value) {
        return Ok(());
    }
    std::fs::write(path, value).map_err(file("write", path))
}

/// Replaces the nftables table: rules, and the elements of all pods.
pub(crate) fn write_table(config: &Config, elements: &[PortElement]) -> Result<(), Error> {
    let act = || format!("write nftables table {}", config.nft_table);
    let mut nft = Nftables::open().map_err(kernel(act()))?;
    plan::table(config, elements).commit(&mut nft).map_err(kernel(act()))
}

/// Adds a pod's host ports. `Ok(false)` when the table is not there (another program flushed the ruleset).
pub(crate) fn add_ports(config: &Config, elements: &[PortElement]) -> Result<bool, Error> {
    change_ports(config, elements, plan::add_elements)
}

/// Deletes a pod's host ports. `Ok(false)` when table or elements are not there.
pub(crate) fn delete_ports(config: &Config, elements: &[PortElement]) -> Result<bool, Error> {
    change_ports(config, elements, plan::delete_elements)
}

fn change_ports(config: &Config, elements: &[PortElement], change: fn(&mut Transaction, &[PortElement])) -> Result<bool, Error> {
    if elements.is_empty() {
        return Ok(true);
    }
    let act = || format!("change host ports in nftables table {}", config.nft_table);
    let mut nft = Nftables::open().map_err(kernel(act()))?;
    let mut transaction = Transaction::new(TableFamily::Ipv4, &config.nft_table);
    change(&mut transaction, elements);
    match transaction.commit(&mut nft) {
        Ok(()) => Ok(true),
        Err(e) if e.is_not_found() => Ok(false),
        Err(e) => Err(kernel(act())(e)),
    }
}

/// Forgets the datagram flows to these host ports, which would go on as they began: untranslated, or to a pod that is gone.
pub(crate) fn forget_flows(config: &Config, ports: &[PortMapping]) -> Result<(), Error> {
    let udp: Vec<u16> = ports.iter().filter(|p| p.protocol == Protocol::Udp).map(|p| p.host_port).collect();
    if udp.is_empty() {
        return Ok(());
    }
    let act = || "forget flows to host ports".to_owned();
    let local = Route::open().and_then(|mut r| r.addresses()).map_err(kernel(act()))?;
    let mut conntrack = Conntrack::open().map_err(kernel(act()))?;
    let mut flows = conntrack.flows().map_err(kernel(act()))?;
    flows.retain(|flow| {
        let ours = (flow.translated && config.pod_cidr.contains(flow.answering)) || local.iter().any(|a| a.address == flow.destination);
        flow.protocol == Protocol::Udp.number() && udp.contains(&flow.destination_port) && ours
    });
    conntrack.forget(&flows).map_err(kernel(act()))
}

/// Makes the veth pair and configures the pod's end.
pub(crate) fn attach(config: &Config, master: u32, pod: &PodNetwork, address: Ipv4Addr) -> Result<(), Error> {
    let act = || format!("attach sandbox {} to bridge {}", pod.sandbox_id, config.bridge);
    let namespace = File::open(&pod.netns_path).map_err(file("open network namespace", &pod.netns_path))?;
    let name = plan::veth_name(&pod.sandbox_id);
    let veth = Veth {
        name: &name,
        peer_name: INTERFACE,
        peer_namespace: namespace.as_fd(),
        peer_address: plan::hardware_address(address),
        mtu: config.mtu,
        master,
    };
    let mut route = Route::open().map_err(kernel(act()))?;
    match route.add_veth(&veth) {
        Err(e) if e.is_exists() => {
            // A pair of an earlier try with this id, whose record is gone.
            let stale = route.link(&name).map_err(kernel(act()))?.ok_or(e).map_err(kernel(act()))?;
            route.delete_links(&[stale.index]).map_err(kernel(act()))?;
            route.add_veth(&veth).map_err(kernel(act()))?;
        }
        other => other.map_err(kernel(act()))?,
    }
    let limit = pod.bandwidth.unwrap_or_default();
    if limit.ingress_bits_per_second != 0 {
        // What this end sends is what the pod receives.
        let link = route.link(&name).map_err(kernel(act()))?;
        let missing = || Error::InterfaceMissing { interface: name.clone(), sandbox_id: pod.sandbox_id.clone() };
        route.limit_rate(link.ok_or_else(missing)?.index, limit.ingress_bits_per_second).map_err(kernel(act()))?;
    }
    let cidr = config.pod_cidr;
    let configure = || -> Result<Option<()>, linux::netlink::Error> {
        let mut route = Route::open()?;
        let Some(link) = route.link(INTERFACE)? else {
            return Ok(None);
        };
        if limit.egress_bits_per_second != 0 {
            route.limit_rate(link.index, limit.egress_bits_per_second)?;
        }
        route.configure_pod(link.index, address, cidr.prefix_len, cidr.gateway()).map(Some)
    };
    in_pod(pod.netns_path.as_path(), &pod.sandbox_id, configure)?
        .map_err(kernel(act()))?
        .ok_or_else(|| Error::InterfaceMissing { interface: INTERFACE.into(), sandbox_id: pod.sandbox_id.clone() })
}

/// Runs `visit` inside a pod's network namespace.
pub(crate) fn in_pod<T: Send>(path: &Utf8Path, sandbox_id: &str, visit: impl FnOnce() -> T + Send) -> Result<T, Error> {
    netns::within(path.as_std_path(), visit).map_err(|source| Error::Namespace { sandbox_id: sandbox_id.to_owned(), source })
}

/// Sets a pod's loopback up (what CNI leaves to its runtime).
pub(crate) fn loopback_up(path: &Utf8Path, sandbox_id: &str) -> Result<(), Error> {
    in_pod(path, sandbox_id, || Route::open()?.set_up(1))?.map_err(kernel(format!("set up loopback of sandbox {sandbox_id}")))
}

/// Deletes the veth pairs that hang on the bridge, or on none any more, and that `keep` does not name; pairs go away by themselves
/// with their namespace, so this is for what a crash left.
pub(crate) fn delete_veths(config: &Config, keep: impl Fn(&str) -> bool) -> Result<(), Error> {
    let mut route = Route::open().map_err(kernel("list links"))?;
    let links = route.links().map_err(kernel("list links"))?;
    let bridge = links.iter().find(|l| l.name == config.bridge && l.kind == "bridge").map(|l| l.index);
    let Some(bridge) = bridge else { return Ok(()) };
    let stale: Vec<u32> = links
        .iter()
        .filter(|l| l.kind == "veth" && l.master == Some(bridge) && plan::is_veth_name(&l.name) && !keep(&l.name))
        .map(|l| l.index)
        .collect();
    route.delete_links(&stale).map_err(kernel("delete stale veth pairs"))
}

/// Deletes bridge and table.
pub(crate) fn remove(config: &Config) -> Result<(), Error> {
    let mut errors = Vec::new();
    errors.extend(remove_bridge(config).err());
    errors.extend(remove_table(config).err());
    Error::collect(errors)
}

fn remove_bridge(config: &Config) -> Result<(), Error> {
    let act = || format!("remove bridge {}", config.bridge);
    let mut route = Route::open().map_err(kernel(act()))?;
    match route.link(&config.bridge).map_err(kernel(act()))? {
        Some(link) if link.kind == "bridge" && link.alias == config.state_dir.as_str() => {
            route.delete_links(&[link.index]).map_err(kernel(act()))
        }
        _ => Ok(()),
    }
}

fn remove_table(config: &Config) -> Result<(), Error> {
    let act = || format!("remove nftables table {}", config.nft_table);
    let mut nft = Nftables::open().map_err(kernel(act()))?;
    if !nft.tables(TableFamily::Ipv4).map_err(kernel(act()))?.contains(&config.nft_table) {
        return Ok(());
    }
    let mut transaction = Transaction::new(TableFamily::Ipv4, &config.nft_table);
    transaction.delete_table();
    transaction.commit(&mut nft).map_err(kernel(act()))
}

/// What is not as the record says: the veth, the address, or the host ports; `None` when all is there.
pub(crate) fn inspect(
    config: &Config,
    sandbox_id: &str,
    netns_path: &Utf8Path,
    address: Ipv4Addr,
    elements: &[PortElement],
) -> Result<Option<String>, Error> {
    let act = || format!("check network of sandbox {sandbox_id}");
    let mut route = Route::open().map_err(kernel(act()))?;
    let name = plan::veth_name(sandbox_id);
    let bridge = route.link(&config.bridge).map_err(kernel(act()))?.map(|l| l.index);
    match route.link(&name).map_err(kernel(act()))? {
        None => return Ok(Some(format!("interface {name} is missing"))),
        Some(link) if bridge.is_none() || link.master != bridge => {
            return Ok(Some(format!("interface {name} is not on bridge {}", config.bridge)));
        }
        Some(_) => {}
    }
    let addresses = in_pod(netns_path, sandbox_id, || Route::open()?.addresses())?.map_err(kernel(act()))?;
    if !addresses.iter().any(|a| a.address == address) {
        return Ok(Some(format!("address {address} is missing")));
    }
    let mut nft = Nftables::open().map_err(kernel(act()))?;
    for element in elements {
        let present = nft.elements(TableFamily::Ipv4, &config.nft_table, element.map).map_err(kernel(act()))?;
        if !present.iter().any(|(key, value)| *key == element.key && *value == element.value) {
            return Ok(Some("a host port is missing".into()));
        }
    }
    Ok(None)
}
