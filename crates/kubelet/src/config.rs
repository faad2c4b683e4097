//! Flags, named as upstream's kubelet names them (cmd/kubelet/app/options, v1.37).

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::eviction::thresholds;

/// Configuration of the kubelet.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Kubeconfig with the node's credentials.
    #[arg(long)]
    pub kubeconfig: PathBuf,
    /// Socket of the container runtime.
    #[arg(long, default_value = "unix:///run/coracle/cri.sock")]
    pub container_runtime_endpoint: String,
    /// Socket of the image service; the runtime's when not given.
    #[arg(long)]
    pub image_service_endpoint: Option<String>,
    /// Directory of pods and volumes.
    #[arg(long, default_value = "/var/lib/kubelet")]
    pub root_dir: PathBuf,
    /// Directory of the pods' logs.
    #[arg(long, default_value = "/var/log/pods")]
    pub pod_logs_dir: PathBuf,
    /// Name of the node; the host's name when not given.
    #[arg(long)]
    pub hostname_override: Option<String>,
    /// Address of the node; that of the default route's interface when not given.
    #[arg(long)]
    pub node_ip: Option<IpAddr>,
    /// Address that the HTTPS API listens on.
    #[arg(long, default_value = "0.0.0.0")]
    pub address: IpAddr,
    /// Port of the HTTPS API; 0 is no API.
    #[arg(long, default_value_t = 10250)]
    pub port: u16,
    /// CA of client certificates of the HTTPS API.
    #[arg(long)]
    pub client_ca_file: Option<PathBuf>,
    /// Certificate of the HTTPS API.
    #[arg(long)]
    pub tls_cert_file: Option<PathBuf>,
    /// Key of the HTTPS API's certificate.
    #[arg(long)]
    pub tls_private_key_file: Option<PathBuf>,
    /// Cgroup below which `kubepods` is made.
    #[arg(long, default_value = "/")]
    pub cgroup_root: String,
    /// Make cgroups for QoS classes and pods.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub cgroups_per_qos: bool,
    /// Range of pod addresses, handed to the runtime at the start; without it the runtime's own holds.
    #[arg(long)]
    pub pod_cidr: Option<String>,
    /// Labels of the node when it registers, `KEY=VALUE`.
    #[arg(long, value_delimiter = ',')]
    pub node_labels: Vec<String>,
    /// Taints of the node when it registers, `KEY=VALUE:EFFECT`.
    #[arg(long, value_delimiter = ',')]
    pub register_with_taints: Vec<String>,
    /// Make the Node object.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub register_node: bool,
    /// Pods that the node takes.
    #[arg(long, default_value_t = 110)]
    pub max_pods: u32,
    /// Addresses of the cluster's DNS.
    #[arg(long, value_delimiter = ',')]
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster.
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Resolver configuration of the node, for pods that use it.
    #[arg(long, default_value = "/etc/resolv.conf")]
    pub resolv_conf: PathBuf,
    /// Size at which a container's log is rotated, a quantity.
    #[arg(long, default_value = "10Mi")]
    pub container_log_max_size: String,
    /// Log files kept of a container, at least 2.
    #[arg(long, default_value_t = 5)]
    pub container_log_max_files: u32,
    /// How often node status is computed; it is written on change and every five minutes.
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub node_status_update_frequency: Duration,
    /// How often a pod is looked at without cause (volumes are refreshed then).
    #[arg(long, default_value = "1m", value_parser = parse_duration)]
    pub sync_frequency: Duration,
    /// Seconds of the node's lease.
    #[arg(long, default_value_t = 40)]
    pub node_lease_duration_seconds: u32,
    /// Pods are evicted at once when the node is short of this, `SIGNAL<QUANTITY` or `SIGNAL<PERCENT%`; empty is never. Signals:
    /// memory.available, nodefs.available, nodefs.inodesFree, imagefs.available, imagefs.inodesFree, pid.available.
    #[arg(long, value_delimiter = ',', default_value = thresholds::HARD_DEFAULT)]
    pub eviction_hard: Vec<String>,
    /// As --eviction-hard, but only when it lasts.
    #[arg(long, value_delimiter = ',')]
    pub eviction_soft: Vec<String>,
    /// How long a soft threshold must be met, `SIGNAL=DURATION`.
    #[arg(long, value_delimiter = ',')]
    pub eviction_soft_grace_period: Vec<String>,
    /// What is won beyond a threshold once pods are evicted, `SIGNAL=QUANTITY` or `SIGNAL=PERCENT%`.
    #[arg(long, value_delimiter = ',')]
    pub eviction_minimum_reclaim: Vec<String>,
    /// Longest grace period of a pod that a soft threshold evicts, seconds.
    #[arg(long, default_value_t = 0)]
    pub eviction_max_pod_grace_period: i64,
    /// How long a pressure condition stays after it was last seen.
    #[arg(long, default_value = "5m", value_parser = parse_duration)]
    pub eviction_pressure_transition_period: Duration,
    /// Unused images are removed when so many percent of their disk are used; 100 is never.
    #[arg(long, default_value_t = 85)]
    pub image_gc_high_threshold: u8,
    /// Down to so many percent.
    #[arg(long, default_value_t = 80)]
    pub image_gc_low_threshold: u8,
    /// Resources kept from pods, `cpu=100m,memory=200Mi`.
    #[arg(long, value_delimiter = ',')]
    pub kube_reserved: Vec<String>,
}

/// A flag that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("--{flag}: {message}")]
pub struct Invalid {
    flag: &'static str,
    message: String,
}

/// A label of `--node-labels`, split.
pub type Label = (String, String);

/// A taint of `--register-with-taints`, split: key, value, effect.
pub type TaintText = (String, String, String);

impl Config {
    /// Checks what can be checked before anything is touched.
    pub fn validate(&self) -> Result<(), Invalid> {
        let invalid = |flag, message: &str| Err(Invalid { flag, message: message.to_owned() });
        self.labels()?;
        self.taints()?;
        self.reserved()?;
        self.log_size_bytes()?;
        self.thresholds()?;
        if self.eviction_max_pod_grace_period < 0 {
            return invalid("eviction-max-pod-grace-period", "must not be negative");
        }
        if self.image_gc_high_threshold > 100 {
            return invalid("image-gc-high-threshold", "must be between 0 and 100, inclusive");
        }
        if self.image_gc_low_threshold >= self.image_gc_high_threshold {
            return invalid("image-gc-low-threshold", "must be less than --image-gc-high-threshold");
        }
        if self.container_log_max_files < 2 {
            return invalid("container-log-max-files", "must be at least 2");
        }
        if !self.cgroup_root.starts_with('/') {
            return invalid("cgroup-root", "must be an absolute path");
        }
        if self.max_pods == 0 {
            return invalid("max-pods", "must be at least 1");
        }
        for (flag, path) in [("root-dir", &self.root_dir), ("pod-logs-dir", &self.pod_logs_dir)] {
            if !path.is_absolute() {
                return invalid(flag, "must be an absolute path");
            }
        }
        if self.port != 0 && (self.tls_cert_file.is_none() || self.tls_private_key_file.is_none()) {
            return invalid("tls-cert-file", "and --tls-private-key-file are needed for the HTTPS API (--port 0 turns it off)");
        }
        Ok(())
    }

    /// The node's labels.
    pub fn labels(&self) -> Result<Vec<Label>, Invalid> {
        let split = |text: &String| match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(Invalid { flag: "node-labels", message: format!("{text:?} is not KEY=VALUE") }),
        };
        self.node_labels.iter().map(split).collect()
    }

    /// The node's taints.
    pub fn taints(&self) -> Result<Vec<TaintText>, Invalid> {
        let split = |text: &String| {
            let bad = || Invalid { flag: "register-with-taints", message: format!("{text:?} is not KEY[=VALUE]:EFFECT") };
            let (rest, effect) = text.rsplit_once(':').ok_or_else(bad)?;
            let (key, value) = rest.split_once('=').unwrap_or((rest, ""));
            if key.is_empty() || !matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
                return Err(bad());
            }
            Ok((key.to_owned(), value.to_owned(), effect.to_owned()))
        };
        self.register_with_taints.iter().map(split).collect()
    }

    /// Reserved resources by name, as quantities.
    pub fn reserved(&self) -> Result<Vec<(String, String)>, Invalid> {
        let split = |text: &String| {
            let bad = || Invalid { flag: "kube-reserved", message: format!("{text:?} is not NAME=QUANTITY") };
            let (name, amount) = text.split_once('=').ok_or_else(bad)?;
            let quantity = k8s_openapi::apimachinery::pkg::api::resource::Quantity(amount.to_owned());
            crate::quantity::milli_value(&quantity).ok_or_else(bad)?;
            Ok((name.to_owned(), amount.to_owned()))
        };
        self.kube_reserved.iter().map(split).collect()
    }

    /// Thresholds of the eviction flags.
    pub fn thresholds(&self) -> Result<Vec<thresholds::Threshold>, Invalid> {
        let all =
            thresholds::parse(&self.eviction_hard, &self.eviction_soft, &self.eviction_soft_grace_period, &self.eviction_minimum_reclaim);
        all.map_err(|(flag, message)| Invalid { flag, message })
    }

    /// The size at which logs are rotated, in bytes.
    pub fn log_size_bytes(&self) -> Result<u64, Invalid> {
        let text = self.container_log_max_size.clone();
        let quantity = k8s_openapi::apimachinery::pkg::api::resource::Quantity(text.clone());
        crate::quantity::value(&quantity)
            .and_then(|v| u64::try_from(v).ok())
            .filter(|v| *v > 0)
            .ok_or_else(|| Invalid { flag: "container-log-max-size", message: format!("{text:?} is no positive quantity") })
    }
}

/// A Go duration (`1m30s`, `500ms`).
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is no duration such as 10s or 1m30s");
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
        let amount: f64 = rest[..digits].parse().map_err(|_| bad())?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| digits + at);
        let unit = match &rest[digits..unit_end] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(bad()),
        };
        total += Duration::try_from_secs_f64(amount * unit).map_err(|_| bad())?;
        rest = &rest[unit_end..];
    }
    if total.is_zero() { Err(bad()) } else { Ok(total) }
}
