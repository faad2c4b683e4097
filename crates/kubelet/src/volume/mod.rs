//! Volumes of a pod: emptyDir, hostPath, configMap, secret, downwardAPI, projected. Others are a clear error.
//!
//! On disk, below `ROOT/pods/UID` (upstream's layout, so that the two can take over from each other):
//! `volumes/kubernetes.io~KIND/NAME`, `volume-subpaths/VOLUME/CONTAINER/INDEX`, `containers/NAME/…`, `etc-hosts`.

pub mod atomic;
pub mod empty_dir;
pub mod host_path;
pub mod ownership;
pub mod payload;
pub mod subpath;
pub mod token;
pub mod usage;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Pod, Volume};

use crate::downward::Facts;
use crate::model;
use crate::objects::Lookup;
use crate::volume::token::Tokens;

/// Why a volume cannot be set up. `Display` is the text of the FailedMount event.
#[derive(Debug, thiserror::Error)]
#[error("MountVolume.SetUp failed for volume \"{volume}\" : {message}")]
pub struct Error {
    /// Name in the pod's spec.
    pub volume: String,
    /// What went wrong.
    pub message: String,
}

/// A volume that is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// Where it is on the node.
    pub path: PathBuf,
    /// It is only ever mounted read-only into containers.
    pub readonly: bool,
}

/// Volumes by name.
pub type Volumes = BTreeMap<String, Mounted>;

/// What setting up needs.
pub struct Inputs<'a> {
    /// `--root-dir`.
    pub root: &'a Path,
    /// The pod.
    pub pod: &'a Pod,
    /// ConfigMaps and Secrets of its volumes.
    pub lookup: &'a Lookup,
    /// Service account tokens of its projected volumes.
    pub tokens: &'a Tokens,
    /// For the downward API.
    pub facts: &'a Facts,
    /// Bytes that a memory-backed emptyDir may have without a limit of its own.
    pub memory_bytes: i64,
}

/// The pod's directory.
pub fn pod_directory(root: &Path, uid: &str) -> PathBuf {
    root.join("pods").join(uid)
}

/// Sets up every volume of the pod or refreshes it; idempotent. Blocks on disk.
pub fn set_up(inputs: &Inputs<'_>) -> Result<Volumes, Error> {
    let volumes = inputs.pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    let mut mounted = Volumes::new();
    for volume in volumes {
        let ready = set_up_one(inputs, volume).map_err(|message| Error { volume: volume.name.clone(), message })?;
        mounted.insert(volume.name.clone(), ready);
    }
    Ok(mounted)
}

fn set_up_one(inputs: &Inputs<'_>, volume: &Volume) -> Result<Mounted, String> {
    let directory = |kind: &str| {
        pod_directory(inputs.root, model::uid(inputs.pod)).join("volumes").join(format!("kubernetes.io~{kind}")).join(&volume.name)
    };
    if let Some(source) = &volume.host_path {
        host_path::check(source)?;
        return Ok(Mounted { path: PathBuf::from(&source.path), readonly: false });
    }
    if let Some(source) = &volume.empty_dir {
        let path = directory("empty-dir");
        let fresh = empty_dir::set_up(&path, source, inputs.memory_bytes)?;
        // Once, before any container has it: one that runs could put links in the way of the walk (upstream's readiness file).
        let plugin = pod_directory(inputs.root, model::uid(inputs.pod)).join("plugins/kubernetes.io~empty-dir").join(&volume.name);
        let ready = plugin.join("ready");
        if fresh || !ready.exists() {
            ownership::apply_group(&path, inputs.pod, false)?;
            std::fs::create_dir_all(&plugin).map_err(|e| format!("failed to make directory {}: {e}", plugin.display()))?;
            std::fs::write(&ready, "").map_err(|e| format!("failed to write {}: {e}", ready.display()))?;
        }
        return Ok(Mounted { path, readonly: false });
    }
    let (kind, files) = payload::files(volume, inputs)?;
    let path = directory(kind);
    atomic::write(&path, &files).map_err(|e| e.to_string())?;
    ownership::apply_group(&path, inputs.pod, true)?;
    Ok(Mounted { path, readonly: true })
}

/// Takes down the volumes and sub path mounts of a pod; goes on past failures. Blocks on disk.
///
/// Content of a hostPath is never touched: nothing of it is below the pod's directory but bind mounts, which are
/// unmounted first; a directory that is still a mount point is left and reported.
pub fn tear_down(root: &Path, uid: &str) -> Result<(), String> {
    let directory = pod_directory(root, uid);
    if uid.is_empty() || !directory.exists() {
        return Ok(());
    }
    let prefix = directory.canonicalize().map_err(|e| format!("{}: {e}", directory.display()))?;
    let mounts = linux::mountinfo::read().map_err(|e| e.to_string())?;
    let mut errors = Vec::new();
    let mut targets: Vec<PathBuf> = mounts.into_iter().map(|m| PathBuf::from(&m.target)).filter(|t| t.starts_with(&prefix)).collect();
    targets.sort();
    for target in targets.into_iter().rev() {
        if let Err(error) = linux::mount::unmount_all(&target, true) {
            errors.push(error.to_string());
        }
    }
    if errors.is_empty()
        && let Err(error) = linux::tree::remove(&directory)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        errors.push(format!("failed to remove {}: {error}", directory.display()));
    }
    if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
}
