//! A node runtime that is measured: `coracle cri`, or upstream's containerd and runc.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::group::Group;
use super::{Places, wait_until};
use crate::sh;

/// How long a daemon may take to serve its socket, and to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// Address ranges and bridges of the two sides, within the bench's own network namespace.
const OUR_RANGE: &str = "10.85.0.0/16";
const THEIR_RANGE: &str = "10.86.0.0/16";
/// The CNI plugins that containerd is given.
const PLUGINS: [&str; 3] = ["bridge", "host-local", "loopback"];
/// Where Debian puts them.
const PLUGIN_DIRECTORY: &str = "/usr/lib/cni";
/// CNI's version of the configuration.
const CNI_VERSION: &str = "1.0.0";

/// The milliseconds of one pod's calls.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Life {
    pub run: f64,
    pub create: f64,
    pub start: f64,
    pub exec: f64,
    pub stop: f64,
    pub remove: f64,
}

#[derive(Deserialize)]
struct Version {
    name: String,
    version: String,
}

/// A running daemon, and how its client reaches it.
pub struct Runtime {
    /// How it is called in the table.
    pub name: &'static str,
    /// What it calls itself, with its parts' versions.
    pub version: String,
    /// What was set, for the reader.
    pub settings: String,
    /// Its cgroup.
    pub group: Group,
    daemon: Child,
    client: PathBuf,
    socket: PathBuf,
    image: String,
    logs: PathBuf,
    network: &'static str,
}

/// Whether pods can have networks on both sides.
pub fn has_plugins() -> bool {
    PLUGINS.iter().all(|plugin| Path::new(PLUGIN_DIRECTORY).join(plugin).exists())
}

impl Runtime {
    /// `coracle cri`.
    pub fn ours(places: &Places, image: &str, network: &'static str) -> Result<Runtime> {
        let group = Group::create(format!("{}/ours", places.cgroup))?;
        let socket = PathBuf::from("/run/coracle/cri.sock");
        let mut command = group.command(&places.executables.join("coracle"));
        command.arg("cri").arg("--root").arg(places.folder.join("ours")).args(["--state", "/run/coracle/cri", "--pod-cidr", OUR_RANGE]);
        command.arg("--address").arg(&socket).arg("--cgroup-root").arg(group.pods());
        for flag in ["--cni-conf-dir", "--cni-bin-dir"] {
            command.arg(flag).arg(places.folder.join("no-cni"));
        }
        let settings =
            format!("overlay snapshots, cgroupfs, {}", if network == "pod" { "built-in bridge network" } else { "host network" });
        start("coracle", settings, group, command, socket, places, (image, network))
    }

    /// containerd and runc of `peers`.
    pub fn theirs(places: &Places, peers: &Path, image: &str, network: &'static str) -> Result<Runtime> {
        let group = Group::create(format!("{}/theirs", places.cgroup))?;
        let folder = places.folder.join("theirs");
        let cni = folder.join("cni");
        fs::create_dir_all(&cni).with_context(|| format!("failed to create {}", cni.display()))?;
        write(&cni.join("10-bench.conflist"), &conflist(&folder))?;
        // It takes a registry on a port other than 80 for one with TLS, unless told.
        let (host, _) = image.split_once('/').context("the image's name has no host")?;
        let hosts = folder.join("hosts").join(host);
        fs::create_dir_all(&hosts).with_context(|| format!("failed to create {}", hosts.display()))?;
        write(&hosts.join("hosts.toml"), &format!("server = \"http://{host}\"\n"))?;
        let socket = PathBuf::from("/run/containerd/containerd.sock");
        let config = folder.join("config.toml");
        write(&config, &config_toml(&folder, &cni, peers, &socket, image))?;
        let mut command = group.command(&peers.join("containerd"));
        command.arg("--config").arg(&config).env("PATH", path_with(peers)?);
        let network_setting = if network == "pod" { "CNI bridge and host-local, no masquerading" } else { "host network" };
        let settings = format!("overlayfs, cgroupfs, restrict_oom_score_adj = true, NRI off, {network_setting}, sandbox image {image}");
        let mut runtime = start("containerd", settings, group, command, socket, places, (image, network))?;
        let runc = sh::output(Command::new(peers.join("runc")).arg("--version"))?;
        runtime.version = format!("{} with {}", runtime.version, runc.lines().next().unwrap_or("runc"));
        Ok(runtime)
    }

    /// Lives pods one after another.
    pub fn lives(&self, pods: u32) -> Result<Vec<Life>> {
        let output = self.ask(&["lives", &pods.to_string()])?;
        output.lines().map(|line| serde_json::from_str(line).with_context(|| format!("the client printed {line:?}"))).collect()
    }

    /// Starts pods that stay.
    pub fn up(&self, pods: u32) -> Result<()> {
        self.ask(&["up", &pods.to_string()]).map(drop)
    }

    /// Removes all pods and ends the daemon.
    pub fn end(mut self) -> Result<()> {
        const TERM: u32 = 15;
        self.ask(&["down"])?;
        linux::child::send_signal(self.daemon.id(), TERM).with_context(|| format!("failed to end {}", self.name))?;
        wait_until(PATIENCE, &format!("the end of {}", self.name), || Ok(self.daemon.try_wait()?.is_some()))
    }

    fn ask(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.client);
        command.arg(&self.socket).arg(&self.image).arg(&self.logs).arg(self.group.pods()).arg(self.network).args(words);
        sh::output(&mut command).with_context(|| format!("{}: {}", self.name, words.join(" ")))
    }
}

fn start(
    name: &'static str,
    settings: String,
    group: Group,
    mut command: Command,
    socket: PathBuf,
    places: &Places,
    (image, network): (&str, &'static str),
) -> Result<Runtime> {
    eprintln!("==> start {name}");
    let log_path = places.folder.join(format!("{name}.log"));
    let log = File::create(&log_path).with_context(|| format!("failed to create {}", log_path.display()))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let daemon = command.spawn().with_context(|| format!("failed to run {name}"))?;
    let logs = places.folder.join("logs").join(name);
    let image = image.to_owned();
    let mut runtime =
        Runtime { name, version: String::new(), settings, group, daemon, client: places.client.clone(), socket, image, logs, network };
    let deadline = Instant::now() + PATIENCE;
    let answer = loop {
        match runtime.ask(&["prepare"]) {
            Ok(answer) => break answer,
            Err(error) if Instant::now() >= deadline || runtime.daemon.try_wait()?.is_some() => {
                let log = fs::read_to_string(&log_path).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(20).collect();
                bail!("{error:#}; the end of its log, last line first:\n{}", tail.join("\n"));
            }
            Err(_) => std::thread::park_timeout(super::POLL),
        }
    };
    let version: Version = serde_json::from_str(&answer).with_context(|| format!("the client printed {answer:?}"))?;
    runtime.version = format!("{} {}", version.name, version.version);
    Ok(runtime)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("failed to write {}", path.display()))
}

/// `PATH` with containerd's shim in front.
fn path_with(peers: &Path) -> Result<std::ffi::OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let parts = std::iter::once(peers.to_owned()).chain(std::env::split_paths(&path));
    std::env::join_paths(parts).context("PATH cannot be made")
}

fn conflist(folder: &Path) -> String {
    let ipam = serde_json::json!({
        "type": "host-local",
        "dataDir": folder.join("ipam"),
        "ranges": [[{ "subnet": THEIR_RANGE }]],
        "routes": [{ "dst": "0.0.0.0/0" }],
    });
    let bridge = serde_json::json!({ "type": "bridge", "bridge": "bench0", "isGateway": true, "ipMasq": false, "ipam": ipam });
    serde_json::json!({ "cniVersion": CNI_VERSION, "name": "bench", "plugins": [bridge] }).to_string()
}

/// containerd's configuration, version 3 (containerd 2.x).
fn config_toml(folder: &Path, cni: &Path, peers: &Path, socket: &Path, image: &str) -> String {
    let runc = peers.join("runc");
    let (root, hosts) = (folder.join("root"), folder.join("hosts"));
    format!(
        r#"version = 3
root = {root:?}
state = "/run/containerd"
[grpc]
address = {socket:?}
[ttrpc]
address = "/run/containerd/containerd.sock.ttrpc"
[plugins."io.containerd.nri.v1.nri"]
disable = true
[plugins."io.containerd.cri.v1.images"]
snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = {image:?}
[plugins."io.containerd.cri.v1.images".registry]
config_path = {hosts:?}
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = [{PLUGIN_DIRECTORY:?}]
conf_dir = {cni:?}
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = {runc:?}
SystemdCgroup = false
"#
    )
}
