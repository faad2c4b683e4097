//! A node runtime that is measured: `coracle cri`, or upstream's containerd and runc.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use testkit::containerd::{Bridge, Config, ConfigVersion, Cri, Handler};

use super::group::Group;
use super::{Places, wait_until};
use crate::sh;

/// How long a daemon may take to serve its socket, and to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// Address ranges and bridges of the two sides, within the bench's own network namespace.
const OUR_RANGE: &str = "10.85.0.0/16";
const THEIR_RANGE: &str = "10.86.0.0/16";

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
struct Pulled {
    pull: f64,
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
        let (registry, _) = image.split_once('/').context("the image's name has no host")?;
        let bridge = Bridge { link: "bench0", subnet: THEIR_RANGE.to_owned() };
        let cri = Cri {
            sandbox_image: image.to_owned(),
            registry: registry.to_owned(),
            network: Some(bridge),
            handlers: vec![Handler::runc("runc", peers.join("runc"))],
        };
        let socket = PathBuf::from("/run/containerd/containerd.sock");
        let config =
            Config { version: ConfigVersion::Three, folder, state: "/run/containerd".into(), socket: socket.clone(), cri: Some(cri) };
        let config = config.write().context("failed to write containerd's configuration")?;
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

    /// Pulls an image; milliseconds.
    pub fn pull(&self, reference: &str) -> Result<f64> {
        let answer = self.ask_of(reference, &["pull"])?;
        let answer: Pulled = serde_json::from_str(&answer).with_context(|| format!("the client printed {answer:?}"))?;
        Ok(answer.pull)
    }

    /// Removes all pods.
    pub fn clear(&self) -> Result<()> {
        self.ask(&["down"]).map(drop)
    }

    /// Removes all pods and ends the daemon.
    pub fn end(mut self) -> Result<()> {
        const TERM: u32 = 15;
        self.clear()?;
        linux::child::send_signal(self.daemon.id(), TERM).with_context(|| format!("failed to end {}", self.name))?;
        wait_until(PATIENCE, &format!("the end of {}", self.name), || Ok(self.daemon.try_wait()?.is_some()))
    }

    fn ask(&self, words: &[&str]) -> Result<String> {
        self.ask_of(&self.image, words)
    }

    fn ask_of(&self, image: &str, words: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.client);
        command.arg(&self.socket).arg(image).arg(&self.logs).arg(self.group.pods()).arg(self.network).args(words);
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

/// `PATH` with containerd's shim in front.
fn path_with(peers: &Path) -> Result<std::ffi::OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let parts = std::iter::once(peers.to_owned()).chain(std::env::split_paths(&path));
    std::env::join_paths(parts).context("PATH cannot be made")
}
