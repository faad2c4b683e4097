//! The process table: the keeper of a cluster, its shims, and what runs below them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The name of the shim's executable, which is the keeper's too.
const SHIM: &str = "containerd-shim-coracle-v2";

/// A process.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its parent's id.
    pub parent: u32,
    /// Its command line.
    pub arguments: Vec<String>,
    /// `/proc/PID/cgroup`.
    pub cgroups: String,
}

impl Process {
    /// The sandbox that a shim serves.
    pub fn sandbox(&self) -> Option<&str> {
        let at = self.arguments.iter().position(|argument| argument == "-id")?;
        self.arguments.get(at + 1).map(String::as_str)
    }

    fn is_shim(&self) -> bool {
        self.arguments.first().is_some_and(|program| program.ends_with(SHIM))
    }

    fn is_of(&self, state: &Path) -> bool {
        self.arguments.iter().any(|argument| Path::new(argument).starts_with(state))
    }

    fn has(&self, argument: &str) -> bool {
        self.arguments.iter().any(|given| given == argument)
    }
}

/// What `/proc` said at one time.
#[derive(Clone, Debug)]
pub struct Table {
    processes: BTreeMap<u32, Process>,
    keeper: Option<u32>,
    state: PathBuf,
}

impl Table {
    /// Reads the table, and finds the keeper of the cluster with this state directory.
    pub(crate) fn read(state: &Path) -> Result<Table> {
        let mut processes = BTreeMap::new();
        for entry in fs::read_dir("/proc").context("failed to list /proc")? {
            let name = entry.context("failed to list /proc")?.file_name();
            // A process that ends meanwhile is left out.
            if let Some(process) = name.to_str().and_then(|name| name.parse().ok()).and_then(read) {
                processes.insert(process.pid, process);
            }
        }
        // What the keeper has just forked has its name until it executes a shim.
        let forked = |process: &Process| processes.get(&process.parent).is_some_and(|parent| is_keeper(parent, state));
        let is_one = |process: &&Process| is_keeper(process, state) && !forked(process);
        let keepers: Vec<u32> = processes.values().filter(is_one).map(|process| process.pid).collect();
        ensure!(keepers.len() < 2, "{} has the keepers {keepers:?}", state.display());
        let keeper = keepers.first().copied();
        Ok(Table { processes, keeper, state: state.to_owned() })
    }

    /// The keeper's process, if it lives.
    pub fn keeper(&self) -> Option<u32> {
        self.keeper
    }

    /// The shims of the cluster: all shim processes below the keeper, at any depth.
    pub fn shims(&self) -> Vec<&Process> {
        self.keeper.map(|keeper| self.below(keeper)).into_iter().flatten().filter(|process| process.is_shim()).collect()
    }

    /// The processes that serve a sandbox of this cluster, also those that lost their keeper.
    pub fn all_shims(&self) -> Vec<&Process> {
        let is_one = |process: &Process| process.is_shim() && !process.has("keeper") && process.is_of(&self.state);
        // What a shim has forked has its name, too.
        let forked = |process: &Process| self.processes.get(&process.parent).is_some_and(is_one);
        self.processes.values().filter(|process| is_one(process) && !forked(process)).collect()
    }

    /// The first process of a container: the one whose parent is not in its cgroup.
    pub fn first_in_cgroup(&self, id: &str) -> Option<&Process> {
        let members = self.in_cgroup(id);
        members.iter().find(|process| !members.iter().any(|other| other.pid == process.parent)).copied()
    }

    /// The children of a process.
    pub fn children(&self, pid: u32) -> Vec<&Process> {
        self.processes.values().filter(|process| process.parent == pid).collect()
    }

    /// All processes below one, at any depth.
    pub fn below(&self, pid: u32) -> Vec<&Process> {
        self.processes.values().filter(|process| process.pid != pid && self.ancestors(process.pid).contains(&pid)).collect()
    }

    /// The processes in whose cgroup path this id stands.
    pub fn in_cgroup(&self, id: &str) -> Vec<&Process> {
        self.processes.values().filter(|process| process.cgroups.contains(id)).collect()
    }

    /// Walks up from the running containers of one pod: the parent of each is the shim, above it the keeper, and the shim has no
    /// other children. Gives the shim.
    pub fn shim_of(&self, containers: &[String]) -> Result<u32> {
        let mut parents = BTreeSet::new();
        let mut tops = BTreeSet::new();
        for id in containers {
            let members = self.in_cgroup(id);
            let first: Vec<_> = members.iter().filter(|process| !members.iter().any(|other| other.pid == process.parent)).collect();
            ensure!(first.len() == 1, "container {id} has not one first process: {members:?}");
            tops.insert(first[0].pid);
            parents.insert(first[0].parent);
        }
        ensure!(parents.len() == 1, "the containers of one pod have the parents {parents:?}");
        let shim = parents.into_iter().next().context("a pod without containers")?;
        ensure!(self.shims().iter().any(|process| process.pid == shim), "the containers' parent {shim} is no shim");
        ensure!(self.keeper.is_some() && self.ancestors(shim).first() == self.keeper.as_ref(), "the shim's parent is not the keeper");
        let children: BTreeSet<u32> = self.children(shim).iter().map(|process| process.pid).collect();
        ensure!(children == tops, "the shim has more children than the containers {tops:?}: {:?}", self.children(shim));
        Ok(shim)
    }

    /// Parent, its parent, and so on.
    pub fn ancestors(&self, pid: u32) -> Vec<u32> {
        let mut all = Vec::new();
        let mut next = self.processes.get(&pid);
        while let Some(process) = next {
            // Processes come and go while they are read; a number that came back must not make a ring.
            if all.contains(&process.parent) {
                break;
            }
            all.push(process.parent);
            next = self.processes.get(&process.parent);
        }
        all
    }
}

/// The ids of a pod's containers that run, as its status tells them.
pub fn running_containers(pod: &Value) -> Result<Vec<String>> {
    let mut ids = Vec::new();
    for list in ["initContainerStatuses", "containerStatuses"] {
        for status in pod["status"][list].as_array().into_iter().flatten() {
            if status["state"].get("running").is_some() {
                let id = status["containerID"].as_str().and_then(|id| id.split_once("://")).context("a container has no id")?;
                ids.push(id.1.to_owned());
            }
        }
    }
    Ok(ids)
}

fn is_keeper(process: &Process, state: &Path) -> bool {
    process.is_shim() && process.has("keeper") && process.is_of(state)
}

fn read(pid: u32) -> Option<Process> {
    let file = |name: &str| fs::read(format!("/proc/{pid}/{name}")).ok();
    let status = String::from_utf8_lossy(&file("status")?).into_owned();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
    let command = String::from_utf8_lossy(&file("cmdline")?).into_owned();
    let arguments = command.split('\0').filter(|argument| !argument.is_empty()).map(str::to_owned).collect();
    Some(Process { pid, parent, arguments, cgroups: String::from_utf8_lossy(&file("cgroup")?).into_owned() })
}
