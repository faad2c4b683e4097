//! Flags, with kube-apiserver's names where it has the flag.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use crate::cluster_ip::Cidr;

/// Configuration of the API server.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Address to listen on.
    #[arg(long, default_value = "0.0.0.0")]
    pub bind_address: IpAddr,
    /// Port to listen on, with TLS.
    #[arg(long, default_value_t = 6443)]
    pub secure_port: u16,
    /// Address that the cluster's members reach this server at; it stands in the endpoints of the service `kubernetes`.
    #[arg(long)]
    pub advertise_address: Option<Ipv4Addr>,
    /// The server's certificate chain, PEM.
    #[arg(long)]
    pub tls_cert_file: PathBuf,
    /// The server's private key, PEM.
    #[arg(long)]
    pub tls_private_key_file: PathBuf,
    /// Certificate authority of client certificates, PEM.
    #[arg(long)]
    pub client_ca_file: PathBuf,
    /// Public keys that service account tokens are verified with, PEM. May be given several times.
    #[arg(long, required = true)]
    pub service_account_key_file: Vec<PathBuf>,
    /// Private key (ECDSA P-256, PKCS#8 PEM) that signs service account tokens; its public half must be among the key files.
    #[arg(long)]
    pub service_account_signing_key_file: PathBuf,
    /// Issuer of service account tokens.
    #[arg(long, default_value = "https://kubernetes.default.svc.cluster.local")]
    pub service_account_issuer: String,
    /// Audiences of this server, comma-separated; the issuer when none is given.
    #[arg(long, value_delimiter = ',')]
    pub api_audiences: Vec<String>,
    /// IPv4 range of the Services' cluster IPs.
    #[arg(long, default_value = "10.96.0.0/12")]
    pub service_cluster_ip_range: Cidr,
    /// Ports for Services of type NodePort, `FIRST-LAST`.
    #[arg(long, default_value = "30000-32767", value_parser = port_range)]
    pub service_node_port_range: RangeInclusive<u16>,
    /// Certificate authority of the kubelets' serving certificates, PEM; logs and exec need it.
    #[arg(long)]
    pub kubelet_certificate_authority: Option<PathBuf>,
    /// Client certificate towards kubelets, PEM.
    #[arg(long, requires = "kubelet_client_key")]
    pub kubelet_client_certificate: Option<PathBuf>,
    /// Key of the client certificate towards kubelets, PEM.
    #[arg(long, requires = "kubelet_client_certificate")]
    pub kubelet_client_key: Option<PathBuf>,
    /// Node address types to reach kubelets at, most preferred first.
    #[arg(long, value_delimiter = ',', default_value = "InternalIP,Hostname,InternalDNS,ExternalIP,ExternalDNS")]
    pub kubelet_preferred_address_types: Vec<String>,
    /// How long events are kept, e.g. `1h`, `90m`, `300s`.
    #[arg(long, default_value = "1h", value_parser = duration)]
    pub event_ttl: Duration,
    /// Requests at one time that are no streams; more are answered with 429.
    #[arg(long, default_value_t = 400, value_parser = places)]
    pub max_requests_inflight: usize,
    /// Watches at one time; more are answered with 429.
    #[arg(long, default_value_t = 10_000, value_parser = places)]
    pub max_watches: usize,
    /// Longest time of a request that is no stream.
    #[arg(long, default_value = "1m", value_parser = duration)]
    pub request_timeout: Duration,
    /// Directory of the embedded store; not used with --etcd-servers.
    #[arg(long, default_value = "/var/lib/coracle/apiserver")]
    pub data_dir: PathBuf,
    /// The members of a real etcd in place of the embedded store, comma-separated URLs.
    #[arg(long, value_delimiter = ',')]
    pub etcd_servers: Vec<String>,
    /// Certificate authority of etcd's members, PEM.
    #[arg(long, requires = "etcd_servers")]
    pub etcd_cafile: Option<PathBuf>,
    /// Client certificate towards etcd, PEM.
    #[arg(long, requires = "etcd_servers", requires = "etcd_keyfile")]
    pub etcd_certfile: Option<PathBuf>,
    /// Key of the client certificate towards etcd, PEM.
    #[arg(long, requires = "etcd_servers", requires = "etcd_certfile")]
    pub etcd_keyfile: Option<PathBuf>,
    /// What the keys of all objects begin with.
    #[arg(long, default_value = "/registry", value_parser = prefix)]
    pub etcd_prefix: String,
    /// How often the history older than that is compacted in a real etcd, e.g. `5m`; `0` leaves it to others.
    #[arg(long, default_value = "5m", value_parser = duration_or_never)]
    pub etcd_compaction_interval: Duration,
}

fn port_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let wrong = || format!("{text:?} is no range of ports such as 30000-32767");
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let (first, last) = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
    if first == 0 || first > last { Err(wrong()) } else { Ok(first..=last) }
}

fn places(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|places| (1..=100_000).contains(places)).ok_or_else(|| format!("{text:?} is no number from 1 to 100000"))
}

fn prefix(text: &str) -> Result<String, String> {
    let trimmed = text.trim_matches('/');
    if trimmed.is_empty() { Err(format!("{text:?} is no prefix such as /registry")) } else { Ok(format!("/{trimmed}")) }
}

fn duration_or_never(text: &str) -> Result<Duration, String> {
    if matches!(text, "0" | "0s") { Ok(Duration::ZERO) } else { duration(text) }
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration such as 90s, 30m or 1h");
    let at = text.find(|letter: char| !letter.is_ascii_digit()).ok_or_else(wrong)?;
    let number: u64 = text[..at].parse().map_err(|_| wrong())?;
    let unit = match &text[at..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit).filter(|seconds| *seconds > 0).map(Duration::from_secs).ok_or_else(wrong)
}

impl Config {
    /// The address that the service `kubernetes` leads to.
    pub fn advertised(&self) -> Ipv4Addr {
        match (self.advertise_address, self.bind_address) {
            (Some(address), _) => address,
            (None, IpAddr::V4(address)) if !address.is_unspecified() => address,
            (None, _) => Ipv4Addr::LOCALHOST,
        }
    }

    /// The audiences of this server.
    pub fn audiences(&self) -> Vec<String> {
        if self.api_audiences.is_empty() { vec![self.service_account_issuer.clone()] } else { self.api_audiences.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values() {
        assert_eq!(duration("90m"), Ok(Duration::from_secs(5400)));
        assert!(duration("1d").is_err() && duration("h").is_err() && duration("0s").is_err());
        assert_eq!((prefix("registry/"), duration_or_never("0s")), (Ok("/registry".to_owned()), Ok(Duration::ZERO)));
        assert!(prefix("/").is_err() && duration_or_never("x").is_err());
        assert_eq!(port_range("30000-30010"), Ok(30000..=30010));
        assert!(port_range("5-4").is_err() && port_range("x").is_err());
    }
}
