//! emptyDir volumes, on disk and in memory (upstream pkg/volume/emptydir, v1.37).

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use k8s_openapi::api::core::v1::EmptyDirVolumeSource;

use crate::quantity;

/// Makes the directory; with medium `Memory` mounts a tmpfs, of `memory_bytes` unless the volume says less. True when it was not there.
pub fn set_up(path: &Path, source: &EmptyDirVolumeSource, memory_bytes: i64) -> Result<bool, String> {
    let failed = |act: &str, e: &dyn std::fmt::Display| format!("failed to {act} {}: {e}", path.display());
    let is_new = !path.is_dir();
    if is_new {
        std::fs::create_dir_all(path).map_err(|e| failed("make directory", &e))?;
    }
    let mut fresh = is_new;
    match source.medium.as_deref().unwrap_or("") {
        "" => {}
        "Memory" => {
            if !is_mount_point(path) {
                let limit = source.size_limit.as_ref().and_then(quantity::value).filter(|l| *l > 0);
                let size = limit.map_or(memory_bytes, |l| l.min(memory_bytes.max(1)));
                let data = if size > 0 { format!("size={size}") } else { String::new() };
                linux::mount::mount("tmpfs", path, "tmpfs", 0, &data).map_err(|e| failed("mount a tmpfs on", &e))?;
                fresh = true;
            }
        }
        other => return Err(format!("emptyDir medium {other:?} is not supported by this kubelet")),
    }
    if fresh {
        let mode = source.mode.and_then(|m| u32::try_from(m).ok()).unwrap_or(0o777);
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(path, mode).map_err(|e| failed("set the mode of", &e))?;
    }
    Ok(fresh)
}

/// True when another filesystem than its parent's is at `path`.
fn is_mount_point(path: &Path) -> bool {
    let device = |p: &Path| std::fs::metadata(p).ok().map(|m| m.dev());
    let parent = path.parent().and_then(device);
    device(path) != parent
}
