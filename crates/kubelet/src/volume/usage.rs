//! What emptyDir volumes hold, against their limits (upstream pkg/kubelet/eviction `emptyDirLimitEviction`, v1.37).

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;

use crate::model;
use crate::quantity;
use crate::volume::pod_directory;

/// Bytes of a block as `stat` counts them.
const BLOCK_BYTES: u64 = 512;

/// The message of the eviction when an emptyDir on disk holds more than its limit. Blocks on disk.
pub fn over_limit(root: &Path, pod: &Pod) -> Option<String> {
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    for volume in volumes {
        let Some(source) = volume.empty_dir.as_ref().filter(|e| e.medium.as_deref().unwrap_or("").is_empty()) else {
            continue;
        };
        let Some(limit) = source.size_limit.as_ref() else {
            continue;
        };
        let bytes = quantity::value(limit).and_then(|l| u64::try_from(l).ok()).filter(|l| *l > 0)?;
        let path = pod_directory(root, model::uid(pod)).join("volumes/kubernetes.io~empty-dir").join(&volume.name);
        let (used, _) = used(&path);
        if u64::try_from(used).unwrap_or(0) > bytes {
            return Some(format!("Usage of EmptyDir volume \"{}\" exceeds the limit \"{}\". ", volume.name, limit.0));
        }
    }
    None
}

/// True when the pod has an emptyDir with a limit.
pub fn is_limited(pod: &Pod) -> bool {
    let mut volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    volumes.any(|v| v.empty_dir.as_ref().is_some_and(|e| e.size_limit.is_some()))
}

/// Where the pod's emptyDirs on disk are.
pub fn empty_dirs(root: &Path, pod: &Pod) -> Vec<PathBuf> {
    let on_disk =
        |v: &&k8s_openapi::api::core::v1::Volume| v.empty_dir.as_ref().is_some_and(|e| e.medium.as_deref().unwrap_or("").is_empty());
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()).filter(on_disk);
    let directory = pod_directory(root, model::uid(pod)).join("volumes/kubernetes.io~empty-dir");
    volumes.map(|volume| directory.join(&volume.name)).collect()
}

/// Bytes on disk below `path`, and files; links are not followed, what vanishes meanwhile counts nothing. Blocks on disk.
pub fn used(path: &Path) -> (i64, i64) {
    let mut total: u64 = 0;
    let mut files = 0;
    let mut pending = vec![path.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let Ok(meta) = entry.path().symlink_metadata() else {
                continue;
            };
            total += meta.blocks() * BLOCK_BYTES;
            files += 1;
            if meta.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    (i64::try_from(total).unwrap_or(i64::MAX), files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_volume_is_named() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"uid": "u"},
            "spec": {"containers": [], "volumes": [{"name": "d", "emptyDir": {"sizeLimit": "1Mi"}}]},
        }))
        .expect("a literal pod");
        let directory = root.path().join("pods/u/volumes/kubernetes.io~empty-dir/d");
        std::fs::create_dir_all(&directory).expect("a directory");
        assert_eq!(over_limit(root.path(), &pod), None);
        std::fs::write(directory.join("f"), vec![1; 2 << 20]).expect("a file");
        let message = over_limit(root.path(), &pod).expect("over the limit");
        assert_eq!(message, "Usage of EmptyDir volume \"d\" exceeds the limit \"1Mi\". ");
    }
}
