//! What a [`crate::Network`] is told: every name that is global to a host, and the network of one pod.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use camino::Utf8PathBuf;

use crate::error::Error;

/// An IPv4 network in CIDR form. Host bits are cleared when it is parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ipv4Cidr {
    /// First address of the network.
    pub network: Ipv4Addr,
    /// Prefix length, 0 to 32.
    pub prefix_len: u8,
}

impl Ipv4Cidr {
    /// Whether `address` lies in the network.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.prefix_len) == u32::from(self.network)
    }

    /// The address that the bridge takes: the network's first host address.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) + 1)
    }

    /// First and last address for pods (behind the gateway, before the broadcast address).
    pub fn pod_range(&self) -> (u32, u32) {
        let first = u32::from(self.network);
        (first + 2, (first | !mask(self.prefix_len)) - 1)
    }
}

fn mask(prefix_len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix_len)).unwrap_or(0)
}

impl FromStr for Ipv4Cidr {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |why: &'static str| Error::Cidr { value: text.to_owned(), why };
        let (address, prefix_len) = text.split_once('/').ok_or_else(|| bad("expected ADDRESS/LENGTH"))?;
        let address: Ipv4Addr = address.parse().map_err(|_| bad("not an IPv4 address"))?;
        let prefix_len: u8 = prefix_len.parse().map_err(|_| bad("prefix length is no number"))?;
        if !(8..=29).contains(&prefix_len) {
            return Err(bad("prefix length must be 8 to 29"));
        }
        Ok(Self { network: Ipv4Addr::from(u32::from(address) & mask(prefix_len)), prefix_len })
    }
}

impl fmt::Display for Ipv4Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix_len)
    }
}

/// Names and places of the pod network on this host.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of the built-in bridge (at most 15 bytes), "coracle0" by default.
    pub bridge: String,
    /// Addresses of the pods of the built-in network.
    pub pod_cidr: Ipv4Cidr,
    /// Name of the nftables table (family ip) for masquerade and host ports, "coracle" by default.
    pub nft_table: String,
    /// MTU of bridge and veths in bytes, 1500 by default.
    pub mtu: u32,
    /// Where sandboxes' records live; means nothing after a reboot.
    pub state_dir: Utf8PathBuf,
    /// Where a CNI conflist would lie; one that is there takes precedence over the built-in network.
    pub cni_conf_dir: Utf8PathBuf,
    /// Where CNI plugins lie, in search order.
    pub cni_bin_dirs: Vec<Utf8PathBuf>,
}

impl Config {
    /// Defaults but for the state directory.
    pub fn new(state_dir: impl Into<Utf8PathBuf>) -> Self {
        Self {
            bridge: "coracle0".into(),
            pod_cidr: Ipv4Cidr { network: Ipv4Addr::new(10, 85, 0, 0), prefix_len: 16 },
            nft_table: "coracle".into(),
            mtu: 1500,
            state_dir: state_dir.into(),
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_bin_dirs: vec!["/opt/cni/bin".into()],
        }
    }

    /// Checks names before anything is touched.
    ///
    /// # Errors
    /// [`Error::Name`] for an interface or table name that the kernel would refuse.
    pub fn validate(&self) -> Result<(), Error> {
        let bad = |field, value: &str, why| Err(Error::Name { field, value: value.to_owned(), why });
        let name = &self.bridge;
        if name.is_empty() || name.len() > linux::rtnl::NAME_LEN_MAX {
            return bad("bridge", name, "an interface name has 1 to 15 bytes");
        }
        if name == "." || name == ".." || name.bytes().any(|b| b == b'/' || b == b':' || b.is_ascii_whitespace()) {
            return bad("bridge", name, "an interface name has no slash, colon or space");
        }
        if self.nft_table.is_empty() || self.nft_table.len() > 200 {
            return bad("nft table", &self.nft_table, "a table name has 1 to 200 bytes");
        }
        if !(576..=65_535).contains(&self.mtu) {
            return bad("mtu", &self.mtu.to_string(), "an MTU is 576 to 65535 bytes");
        }
        Ok(())
    }
}

/// A layer 4 protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP, number 6.
    Tcp,
    /// UDP, number 17.
    Udp,
    /// SCTP, number 132.
    Sctp,
}

impl Protocol {
    /// The IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The name in CNI's portMappings and in errors.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// One port of a pod as CRI has it. Mappings with host port 0 (the kubelet sends every containerPort) map nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct PortMapping {
    /// Protocol.
    pub protocol: Protocol,
    /// Port inside the pod.
    pub container_port: u16,
    /// Port on the host; 0 for none.
    pub host_port: u16,
    /// Only this address of the host; `None` and the unspecified address mean all.
    pub host_ip: Option<IpAddr>,
}

/// Limits of a pod's traffic in bits per second (CNI's `bandwidth` capability; Kubernetes' `kubernetes.io/ingress-bandwidth` and `egress-bandwidth`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bandwidth {
    /// Towards the pod; 0 for no limit.
    pub ingress_bits_per_second: u64,
    /// From the pod; 0 for no limit.
    pub egress_bits_per_second: u64,
}

impl Bandwidth {
    /// The limits that a pod's annotations ask for (kubernetes.io/ingress-bandwidth and egress-bandwidth), if they do.
    ///
    /// # Errors
    /// [`Error::Name`] for a value that is no quantity from 1k to 1P, the range that the kubelet and containerd take.
    pub fn from_annotations(annotations: &std::collections::BTreeMap<String, String>) -> Result<Option<Self>, Error> {
        let read =
            |field: &'static str| match annotations.get(field) {
                None => Ok(0),
                Some(value) => parse_quantity(value)
                    .filter(|bits| (1_000..=1_000_000_000_000_000).contains(bits))
                    .ok_or_else(|| Error::Name { field, value: value.clone(), why: "expected bits per second from 1k to 1P, such as 10M" }),
            };
        let found = Self {
            ingress_bits_per_second: read("kubernetes.io/ingress-bandwidth")?,
            egress_bits_per_second: read("kubernetes.io/egress-bandwidth")?,
        };
        Ok((found != Self::default()).then_some(found))
    }
}

/// A decimal number with an SI or binary suffix, rounded down to an integer.
fn parse_quantity(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let factor = match suffix {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "Ki" => 1024.0,
        "Mi" => 1_048_576.0,
        "Gi" => 1_073_741_824.0,
        "Ti" => 1_099_511_627_776.0,
        _ => return None,
    };
    number.parse::<f64>().ok().map(|n| (n * factor) as u64)
}

/// The network that one pod sandbox asks for.
#[derive(Debug, Clone, Default)]
pub struct PodNetwork {
    /// The sandbox's id: file name, and CNI's container id.
    pub sandbox_id: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The pod's UID.
    pub uid: String,
    /// The pinned network namespace.
    pub netns_path: Utf8PathBuf,
    /// Ports.
    pub port_mappings: Vec<PortMapping>,
    /// Traffic limits; `None` for what the annotations say.
    pub bandwidth: Option<Bandwidth>,
    /// CNI's `cgroupPath` capability.
    pub cgroup_path: Option<String>,
    /// CNI's `dns` capability: servers, searches, options.
    pub dns: Option<Dns>,
    /// The pod's annotations: CNI's `io.kubernetes.cri.pod-annotations` capability, and traffic limits ([`Bandwidth::from_annotations`]).
    pub annotations: std::collections::BTreeMap<String, String>,
    /// CNI's `ips` capability: addresses asked for, with or without a prefix length. The built-in network takes one.
    pub requested_ips: Vec<String>,
}

/// The pod's resolver settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Dns {
    /// Name servers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<String>,
    /// Search domains.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub searches: Vec<String>,
    /// resolv.conf options.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// What a pod got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Addresses of the pod, the primary one first.
    pub ips: Vec<IpAddr>,
    /// Name of the interface inside the pod: "eth0".
    pub interface: String,
    /// The network that gave them: the bridge's name, or the conflist's.
    pub network: String,
    /// The final CNI result, when a conflist was executed.
    pub cni_result: Option<serde_json::Value>,
}
