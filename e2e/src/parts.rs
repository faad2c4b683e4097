//! A cluster whose parts are processes of their own: started with the command lines that `coracle parts` prints for an operator.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};

use crate::api::eventually;
use crate::cluster::Cluster;
use crate::ours;

/// The port of the kubelet.
const KUBELET_PORT: u16 = 10250;

/// The parts of a cluster.
#[derive(Default)]
pub struct Parts {
    /// The command line of each part, by name.
    lines: BTreeMap<String, String>,
    running: BTreeMap<String, Child>,
}

impl Parts {
    /// Asks `coracle parts`, which makes the keys.
    pub(crate) fn plan(cluster: &Cluster) -> Result<Parts> {
        let mut arguments = cluster.up_arguments();
        arguments[0] = "parts".to_owned();
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = cluster.run(&ours("coracle")?, &words, "")?;
        ensure!(output.status.success(), "coracle parts failed: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).context("the command lines are not UTF-8")?;
        let name = |line: &str| line.split_whitespace().nth(1).map(str::to_owned);
        let lines = text.lines().filter_map(|line| Some((name(line)?, line.to_owned()))).collect();
        Ok(Parts { lines, running: BTreeMap::new() })
    }

    /// The names of all parts.
    pub fn names(&self) -> Vec<String> {
        self.lines.keys().cloned().collect()
    }

    /// Starts a part.
    pub(crate) fn start(&mut self, cluster: &Cluster, name: &str) -> Result<()> {
        let line = self.lines.get(name).with_context(|| format!("there is no part {name}"))?;
        let log = File::options().create(true).append(true).open(log(cluster.folder(), name)).context("failed to open a log")?;
        let program = ours("coracle")?;
        let mut command = cluster.enter(Path::new("sh"));
        let path = format!("{}:{}", program.parent().unwrap_or(Path::new("")).display(), std::env::var("PATH").unwrap_or_default());
        command.args(["-c", &format!("exec {line}")]).env("PATH", path).env("CORACLE_LOG", "info,kube_client=off,coracle::span=off");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        self.running.insert(name.to_owned(), child.with_context(|| format!("failed to run coracle {name}"))?);
        Ok(())
    }

    /// Ends a part by a signal, and reaps it.
    pub(crate) fn end(&mut self, name: &str, signal: i32) -> Result<()> {
        let mut child = self.running.remove(name).with_context(|| format!("{name} is not running"))?;
        linux::process::kill(i32::try_from(child.id())?, signal).with_context(|| format!("failed to end {name}"))?;
        child.wait().map(drop).with_context(|| format!("failed to wait for {name}"))
    }

    /// The names of parts that have ended without having been told to.
    pub(crate) fn ended(&mut self) -> Vec<String> {
        let ended = |child: &mut Child| child.try_wait().is_ok_and(|status| status.is_some());
        self.running.iter_mut().filter_map(|(name, child)| ended(child).then(|| name.clone())).collect()
    }

    /// Ends all that run.
    pub(crate) fn end_all(&mut self, signal: i32) -> Result<()> {
        // What depends on others ends first.
        for name in self.running.keys().rev().cloned().collect::<Vec<_>>() {
            self.end(&name, signal)?;
        }
        Ok(())
    }
}

/// The log of a part, of all its lives.
pub(crate) fn log(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.log"))
}

/// Waits until the API server, the node and the kubelet serve.
pub(crate) fn wait_ready(cluster: &Cluster) -> Result<()> {
    let api = cluster.api();
    let listens = |port: u16| cluster.within(|| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
    eventually("the API server is ready", || Ok(listens(6443)? && api.get("/readyz").is_ok()))?;
    eventually("the kubelet listens", || listens(KUBELET_PORT))?;
    eventually("the node is Ready", || {
        let Ok(nodes) = api.object("/api/v1/nodes") else { return Ok(false) };
        let conditions = nodes["items"][0]["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True"))
    })
}
