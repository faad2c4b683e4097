//! Sub paths: a file or directory inside a volume, bind-mounted by descriptor, so that a link that a container
//! places in the volume cannot lead out of it (upstream pkg/volume/util/subpath, v1.37).

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// Makes the sub path available and returns the host path to mount; idempotent.
pub fn prepare(
    pod_directory: &Path,
    volume_name: &str,
    volume: &Path,
    container: &str,
    index: usize,
    sub_path: &str,
) -> Result<PathBuf, String> {
    let relative = Path::new(sub_path);
    let escapes = relative.components().any(|c| matches!(c, std::path::Component::ParentDir));
    if relative.is_absolute() || escapes {
        return Err(format!("subPath {sub_path:?} must be relative and without '..'"));
    }
    let failed =
        |e: &dyn std::fmt::Display| format!("failed to prepare subPath for volumeMount {volume_name:?} of container {container:?}: {e}");
    let root = linux::fs::open_directory(volume).map_err(|e| failed(&e))?;
    let found = match linux::fs::open_in_root(root.as_fd(), relative, O_PATH) {
        Ok(found) => found,
        Err(_) => linux::fs::make_directories_in_root(root.as_fd(), relative).map_err(|e| failed(&e))?,
    };
    let is_directory = linux::fs::stat_fd(found.as_fd()).map_err(|e| failed(&e))?.is_directory();
    let target = pod_directory.join("volume-subpaths").join(volume_name).join(container).join(index.to_string());
    linux::mount::unmount_all(&target, true).map_err(|e| failed(&e))?;
    place(&target, is_directory).map_err(|e| failed(&e))?;
    let tree = linux::mount::clone_tree_fd(found.as_fd(), true).map_err(|e| failed(&e))?;
    let at = linux::fs::open_path(&target).map_err(|e| failed(&e))?;
    linux::mount::attach(tree.as_fd(), at.as_fd()).map_err(|e| failed(&e))?;
    Ok(target)
}

/// open(2)'s O_PATH, whose value is the same on every architecture that Coracle supports.
const O_PATH: i32 = 0o10_000_000;

fn place(target: &Path, directory: bool) -> std::io::Result<()> {
    if directory {
        return std::fs::create_dir_all(target);
    }
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent)?;
    }
    if !target.exists() {
        std::fs::write(target, b"")?;
    }
    Ok(())
}
