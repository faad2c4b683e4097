//! Whole lists of what a cluster has on the machine, to find what it leaves behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cluster::Cluster;

/// How often it is looked whether all is gone.
const PAUSE: Duration = Duration::from_millis(250);

/// Processes, mounts, links, cgroups and files.
pub struct Inventory(BTreeSet<String>);

impl Inventory {
    /// Takes the lists.
    pub fn take(cluster: &Cluster) -> Result<Inventory> {
        let mut all = BTreeSet::new();
        let holder = cluster.holder();
        let mounts = fs::read_to_string(format!("/proc/{holder}/mountinfo")).context("failed to read the cluster's mounts")?;
        all.extend(mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(|point| format!("mount {point}")));
        let links = fs::read_to_string(format!("/proc/{holder}/net/dev")).context("failed to read the cluster's links")?;
        all.extend(links.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| format!("link {}", name.trim())));
        for hierarchy in fs::read_dir("/sys/fs/cgroup").context("failed to list /sys/fs/cgroup")?.flatten() {
            walk(&hierarchy.path().join(cluster.cgroup_root().trim_start_matches('/')), "cgroup", true, &mut all);
        }
        walk(&Path::new("/sys/fs/cgroup").join(cluster.cgroup_root().trim_start_matches('/')), "cgroup", true, &mut all);
        for folder in ["run", "logs", "data/cri", "data/kubelet"] {
            walk(&cluster.folder().join(folder), "file", false, &mut all);
        }
        let table = cluster.table()?;
        all.extend(table.all_shims().iter().map(|shim| format!("shim {shim:?}")));
        Ok(Inventory(all))
    }

    /// What is there now and was not, once it has had time to go.
    pub fn left(&self, cluster: &Cluster, time: Duration) -> Result<Vec<String>> {
        let deadline = Instant::now() + time;
        loop {
            let now = Inventory::take(cluster)?;
            let left: Vec<String> = now.0.difference(&self.0).cloned().collect();
            if left.is_empty() || Instant::now() > deadline {
                return Ok(left);
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// All paths below one. What goes meanwhile is left out.
fn walk(path: &Path, kind: &str, only_folders: bool, all: &mut BTreeSet<String>) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_folder || !only_folders {
            all.insert(format!("{kind} {}", entry.path().display()));
        }
        if is_folder {
            walk(&entry.path(), kind, only_folders, all);
        }
    }
}
