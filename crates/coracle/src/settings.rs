//! What one Coracle on this machine is called and where it lives: the flags of `coracle up`, kept for `coracle down`.

use std::fs::{self, File, TryLockError};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use clap::Args;
use serde::{Deserialize, Serialize};

/// The version of [`Settings`] on disk.
const VERSION: u32 = 1;

/// Every name, port and range that is global to the host. Two Coracles with different ones fit on one machine.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where everything that survives a reboot is kept.
    #[arg(long, default_value = "/var/lib/coracle")]
    pub data_dir: Utf8PathBuf,
    /// Where everything that a reboot makes meaningless is kept, and the sockets.
    #[arg(long, default_value = "/run/coracle")]
    pub state_dir: Utf8PathBuf,
    /// Where the logs of containers are kept.
    #[arg(long, default_value = "/var/log/pods")]
    pub pod_log_dir: Utf8PathBuf,
    /// The name of this node [default: the host's name].
    #[arg(long)]
    pub node_name: Option<String>,
    /// The address of this node [default: that of the default route, else the first of the pod range].
    #[arg(long)]
    pub node_ip: Option<IpAddr>,
    /// The address that the API server and the kubelet listen on.
    #[arg(long, default_value = "0.0.0.0")]
    pub bind_address: IpAddr,
    /// The port of the API server.
    #[arg(long, default_value_t = 6443)]
    pub secure_port: u16,
    /// The port of the kubelet.
    #[arg(long, default_value_t = 10250)]
    pub kubelet_port: u16,
    /// The port at which the proxy tells whether it is healthy.
    #[arg(long, default_value_t = PROXY_HEALTHZ_PORT)]
    #[serde(default = "proxy_healthz_port")]
    pub proxy_healthz_port: u16,
    /// The range of pod addresses.
    #[arg(long, default_value = "10.85.0.0/16")]
    pub pod_cidr: String,
    /// The range of service addresses.
    #[arg(long, default_value = "10.96.0.0/12")]
    pub service_cluster_ip_range: String,
    /// The bridge of the built-in pod network.
    #[arg(long, default_value = "coracle0")]
    pub bridge: String,
    /// The nftables table of the built-in pod network.
    #[arg(long, default_value = "coracle")]
    pub nftables_table: String,
    /// The cgroup below which pods are put, in every hierarchy.
    #[arg(long, default_value = "/")]
    pub cgroup_root: String,
    /// Where a CNI conflist takes precedence over the built-in network.
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: Utf8PathBuf,
    /// Where CNI plugins are.
    #[arg(long, default_value = "/opt/cni/bin")]
    pub cni_bin_dir: Utf8PathBuf,
    /// When this node evicts pods, as kubelet's flag; empty is never.
    #[arg(long, default_value = EVICTION_HARD)]
    #[serde(default = "eviction_hard")]
    pub eviction_hard: String,
    /// Another container runtime's CRI socket, as kubelet's flag (`unix:///run/containerd/containerd.sock`): then none of ours is
    /// started, and the flags of its network, state and shim are without effect.
    #[arg(long, conflicts_with_all = ["bridge", "nftables_table", "cni_conf_dir", "cni_bin_dir", "shim"])]
    #[serde(default)]
    pub container_runtime_endpoint: Option<String>,
    /// The members of a real etcd in place of the embedded store, comma-separated URLs.
    #[arg(long, value_delimiter = ',')]
    #[serde(default)]
    pub etcd_servers: Vec<String>,
    /// Certificate authority of etcd's members, PEM.
    #[arg(long, requires = "etcd_servers")]
    #[serde(default)]
    pub etcd_cafile: Option<Utf8PathBuf>,
    /// Client certificate towards etcd, PEM.
    #[arg(long, requires = "etcd_servers", requires = "etcd_keyfile")]
    #[serde(default)]
    pub etcd_certfile: Option<Utf8PathBuf>,
    /// Key of the client certificate towards etcd, PEM.
    #[arg(long, requires = "etcd_servers", requires = "etcd_certfile")]
    #[serde(default)]
    pub etcd_keyfile: Option<Utf8PathBuf>,
    /// The shim's executable [default: containerd-shim-coracle-v2 beside this executable, else on PATH].
    #[arg(long)]
    pub shim: Option<Utf8PathBuf>,
}

/// On one's own machine a disk that is nine tenths full is daily life: k3s' thresholds, not upstream's.
const EVICTION_HARD: &str = "imagefs.available<5%,nodefs.available<5%";

fn eviction_hard() -> String {
    EVICTION_HARD.to_owned()
}

const PROXY_HEALTHZ_PORT: u16 = 10256;

/// For settings of a time before there was a proxy.
fn proxy_healthz_port() -> u16 {
    PROXY_HEALTHZ_PORT
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OnDisk {
    version: u32,
    settings: Settings,
}

impl Settings {
    /// Where the admin's kubeconfig is.
    pub fn admin_kubeconfig(&self) -> Utf8PathBuf {
        self.data_dir.join("kubeconfig")
    }

    /// The kubeconfig of a component.
    pub fn kubeconfig(&self, component: &str) -> Utf8PathBuf {
        self.data_dir.join("kubeconfigs").join(component)
    }

    /// A file of the public key infrastructure.
    pub fn pki(&self, name: &str) -> Utf8PathBuf {
        self.data_dir.join("pki").join(name)
    }

    /// The CRI socket.
    pub fn cri_socket(&self) -> Utf8PathBuf {
        self.state_dir.join("cri.sock")
    }

    /// Where the kubelet asks for containers: our own runtime, or another one.
    pub fn runtime_endpoint(&self) -> String {
        self.container_runtime_endpoint.clone().unwrap_or_else(|| format!("unix://{}", self.cri_socket()))
    }

    /// The nftables table of the proxy: another one than that of the pod network, for each is replaced as a whole.
    pub fn proxy_table(&self) -> String {
        format!("{}-proxy", self.nftables_table)
    }

    /// Where the spans of `coracle trace` are kept.
    pub fn spans(&self) -> Utf8PathBuf {
        self.data_dir.join("trace").join("spans.jsonl")
    }

    /// The node's name: the flag, else the host's name in lower case.
    pub fn node(&self) -> Result<String> {
        if let Some(name) = &self.node_name {
            return Ok(name.clone());
        }
        let name = fs::read_to_string("/proc/sys/kernel/hostname").context("failed to read the host's name")?;
        Ok(name.trim().to_lowercase())
    }

    /// The node's address: the flag, else the source address of the default route, else the bridge's own address.
    pub fn node_address(&self) -> Result<IpAddr> {
        if let Some(address) = self.node_ip {
            return Ok(address);
        }
        // Connecting a UDP socket sends nothing: the kernel only chooses a route (192.0.2.1 is TEST-NET-1).
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("failed to open a socket")?;
        if socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).is_ok()
            && let Ok(local) = socket.local_addr()
            && !local.ip().is_loopback()
        {
            return Ok(local.ip());
        }
        if self.container_runtime_endpoint.is_some() {
            bail!("--node-ip: this machine has no default route to take an address from; give one");
        }
        nth_address(&self.pod_cidr, 1).with_context(|| format!("--pod-cidr: {:?} is no IPv4 range", self.pod_cidr))
    }

    /// An address on which this machine reaches what listens on `--bind-address`.
    pub fn reachable_address(&self) -> IpAddr {
        if self.bind_address.is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { self.bind_address }
    }

    /// The first service address: that of `kubernetes.default`.
    pub fn api_service_address(&self) -> Result<IpAddr> {
        nth_address(&self.service_cluster_ip_range, 1)
            .with_context(|| format!("--service-cluster-ip-range: {:?} is no IPv4 range", self.service_cluster_ip_range))
    }

    /// Keeps the settings beside the data, for `down`.
    pub fn save(&self) -> Result<()> {
        let json = serde_json::to_vec_pretty(&OnDisk { version: VERSION, settings: self.clone() })?;
        write_file(&self.data_dir.join("settings.json"), &json, 0o600)
    }

    /// The settings of the Coracle whose data are in `data_dir`; `None` where there is none.
    pub fn load(data_dir: &Utf8Path) -> Result<Option<Settings>> {
        let path = data_dir.join("settings.json");
        let json = match fs::read(&path) {
            Ok(json) => json,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("failed to read {path}")),
        };
        let on_disk: OnDisk = serde_json::from_slice(&json).with_context(|| format!("failed to read {path}"))?;
        if on_disk.version != VERSION {
            bail!("{path} has version {}, this program knows {VERSION}", on_disk.version);
        }
        Ok(Some(on_disk.settings))
    }
}

/// The `n`th address of an IPv4 range in CIDR form.
fn nth_address(cidr: &str, n: u32) -> Option<IpAddr> {
    let (base, bits) = cidr.split_once('/')?;
    let (base, bits): (Ipv4Addr, u32) = (base.parse().ok()?, bits.parse().ok()?);
    let mask = u32::MAX.checked_shl(32 - bits.min(32)).unwrap_or(0);
    (bits <= 30).then(|| IpAddr::from(Ipv4Addr::from((u32::from(base) & mask) + n)))
}

/// Makes a directory, and its name durable: what is synced in it is of no use where that is lost.
fn make_directory(directory: &Utf8Path) -> Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    let parent = directory.parent().filter(|parent| !parent.as_str().is_empty()).unwrap_or(Utf8Path::new("."));
    make_directory(parent)?;
    let made = match fs::create_dir(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        _ => File::open(parent).and_then(|parent| parent.sync_all()),
    };
    made.with_context(|| format!("failed to create {directory}"))
}

/// Writes a file whole or not at all: temporary file, fsync, rename, fsync of the directory. One that has this content already is left
/// alone, so that a disk that became full does not stand in the way of a restart.
pub fn write_file(path: &Utf8Path, bytes: &[u8], mode: u32) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    if fs::read(path).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    let directory = path.parent().with_context(|| format!("{path} has no directory"))?;
    make_directory(directory)?;
    let temporary = path.with_extension("tmp");
    let write = || -> std::io::Result<()> {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    };
    let written = write();
    if written.is_err() {
        // What stays is overwritten by the next attempt.
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("failed to write {path}"))
}

/// The right to be the one Coracle of a data directory. Held until dropped, also by a kill.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Who holds a data directory.
#[derive(Debug)]
pub enum LockOutcome {
    /// This process now does.
    Taken(Lock),
    /// The process with this pid does.
    HeldBy(u32),
}

/// Takes the lock of a data directory, or tells who has it.
pub fn lock(data_dir: &Utf8Path) -> Result<LockOutcome> {
    make_directory(data_dir).context("--data-dir")?;
    let path = data_dir.join("lock");
    let mut file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("--data-dir: failed to open {path}"))?;
    match file.try_lock() {
        Ok(()) => {
            // In place, for on a full disk what is cut off may not come back.
            write!(file, "{:<10}", std::process::id()).with_context(|| format!("--data-dir: failed to write {path}"))?;
            Ok(LockOutcome::Taken(Lock { _file: file }))
        }
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            file.read_to_string(&mut pid)?;
            Ok(LockOutcome::HeldBy(
                pid.trim().parse().with_context(|| format!("--data-dir: {path} is held by a process that has not named itself yet"))?,
            ))
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("--data-dir: failed to lock {path}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_address_of_a_range() {
        assert_eq!(nth_address("10.96.0.0/12", 1).unwrap().to_string(), "10.96.0.1");
        assert_eq!(nth_address("10.85.3.7/16", 1).unwrap().to_string(), "10.85.0.1");
        assert_eq!(nth_address("10.85.0.0/31", 1), None);
        assert_eq!(nth_address("nonsense", 1), None);
    }

    #[test]
    fn a_second_holder_learns_of_the_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(directory.path()).unwrap();
        let first = lock(path).unwrap();
        assert!(matches!(first, LockOutcome::Taken(_)));
        assert!(matches!(lock(path).unwrap(), LockOutcome::HeldBy(pid) if pid == std::process::id()));
        drop(first);
        assert!(matches!(lock(path).unwrap(), LockOutcome::Taken(_)));
    }
}
