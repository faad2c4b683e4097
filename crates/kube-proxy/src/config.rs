//! Flags, by the names of kube-proxy's.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// Everything that can be set.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Kubeconfig with the API server's address and this program's identity.
    #[arg(long, value_name = "FILE", required_unless_present = "cleanup")]
    pub kubeconfig: Option<PathBuf>,
    /// Name of the node that this proxy runs on [default: the host's name].
    #[arg(long, value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// The node's primary address, where NodePorts are reached [default: the Node's InternalIP].
    #[arg(long, value_name = "IP")]
    pub bind_address: Option<IpAddr>,
    /// Ranges of the pods' addresses, comma-separated: traffic to a cluster IP from elsewhere is masqueraded, and traffic of pods to
    /// external addresses is not subject to externalTrafficPolicy.
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub cluster_cidr: Vec<Cidr>,
    /// Masquerade all traffic to cluster IPs.
    #[arg(long, default_value_t = false, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub masquerade_all: bool,
    /// Where NodePorts are served: ranges of this host's addresses, comma-separated, or `primary`.
    #[arg(long, value_name = "CIDR", value_delimiter = ',', default_value = "primary")]
    pub nodeport_addresses: Vec<NodePortAddress>,
    /// Where /healthz and /livez are served, without authentication as upstream's; empty for nowhere.
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:10256", value_parser = address)]
    pub healthz_bind_address: Listen,
    /// How packets are led; this proxy knows `nftables`.
    #[arg(long, value_name = "MODE", default_value = "nftables", value_parser = ["nftables"])]
    pub proxy_mode: String,
    /// The nftables table (family ip) that all rules are in; two proxies on one host need two.
    #[arg(long, value_name = "NAME", default_value = "kube-proxy", value_parser = table_name)]
    pub nftables_table: String,
    /// Remove the nftables table and exit.
    #[arg(long, default_value_t = false, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub cleanup: bool,
}

/// Where to listen, if anywhere.
pub type Listen = Option<SocketAddr>;

fn address(text: &str) -> Result<Listen, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let whole = text.parse().ok();
    // As upstream's: an address alone means the default port.
    let alone = || text.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, 10256));
    whole.or_else(alone).map(Some).ok_or_else(|| format!("{text:?} is no address such as 0.0.0.0:10256"))
}

/// The kernel takes names of up to 255 bytes.
fn table_name(text: &str) -> Result<String, String> {
    let good = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
    if (1..=255).contains(&text.len()) && text.chars().all(good) && text.starts_with(|letter: char| letter.is_ascii_alphabetic()) {
        Ok(text.to_owned())
    } else {
        Err(format!("{text:?} is no name of a table (letters, digits, '-', '_' and '.', a letter first)"))
    }
}

/// An IPv4 range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cidr {
    /// First address.
    pub network: Ipv4Addr,
    /// Length of the prefix, 0 to 32.
    pub prefix_len: u8,
}

impl Cidr {
    fn mask(self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.prefix_len)).unwrap_or(0)
    }

    /// Whether an address lies in the range.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & self.mask() == u32::from(self.network)
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no IPv4 range such as 10.85.0.0/16");
        let (network, prefix_len) = text.trim().split_once('/').ok_or_else(wrong)?;
        let network: Ipv4Addr = network.parse().map_err(|_| wrong())?;
        let prefix_len = prefix_len.parse().ok().filter(|length| *length <= 32).ok_or_else(wrong)?;
        let range = Self { network, prefix_len };
        Ok(Self { network: Ipv4Addr::from(u32::from(network) & range.mask()), prefix_len })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.network, self.prefix_len)
    }
}

/// One value of `--nodeport-addresses`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodePortAddress {
    /// The node's primary address.
    Primary,
    /// This host's addresses in a range.
    Range(Cidr),
}

impl FromStr for NodePortAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "primary" { Ok(Self::Primary) } else { text.parse().map(Self::Range) }
    }
}

impl Config {
    /// Whether NodePorts are served on every address but the loopback ones.
    pub fn every_node_port_address(&self) -> bool {
        self.nodeport_addresses.iter().any(|address| matches!(address, NodePortAddress::Range(range) if range.prefix_len == 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values() {
        assert_eq!("10.85.3.7/16".parse::<Cidr>().map(|cidr| cidr.to_string()), Ok("10.85.0.0/16".to_owned()));
        assert!("10.0.0.0/33".parse::<Cidr>().is_err() && "::/0".parse::<Cidr>().is_err());
        assert!("0.0.0.0/0".parse::<Cidr>().is_ok_and(|all| all.contains(Ipv4Addr::new(9, 9, 9, 9))));
        assert_eq!(address(""), Ok(None));
        assert_eq!(address("127.0.0.1"), Ok(Some(SocketAddr::from(([127, 0, 0, 1], 10256)))));
        assert!(address("x").is_err());
        assert!(table_name("a b").is_err() && table_name("").is_err() && table_name("kube-proxy").is_ok());
        assert_eq!("primary".parse(), Ok(NodePortAddress::Primary));
    }
}
