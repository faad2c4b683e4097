//! Sub paths: a file or directory inside a volume, bind-mounted by descriptor, so that a link that a container
//! places in the volume cannot lead out of it (upstream pkg/volume/util/subpath, v1.37).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
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
        Err(_) => make(root.as_fd(), volume, relative).map_err(|e| failed(&e))?,
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

/// Makes the directories that are missing, each with the volume's own mode (upstream's `SafeMakeDir`): who may write to the volume
/// may write to a sub path of it.
fn make(root: BorrowedFd<'_>, volume: &Path, relative: &Path) -> Result<OwnedFd, Box<dyn std::error::Error>> {
    const MODE_BITS: u32 = 0o7777;
    let above = relative.ancestors().filter(|path| !path.as_os_str().is_empty());
    let missing: Vec<&Path> = above.filter(|path| linux::fs::open_in_root(root, path, O_PATH).is_err()).collect();
    let made = linux::fs::make_directories_in_root(root, relative)?;
    let mode = std::fs::metadata(volume)?.mode() & MODE_BITS;
    for path in missing {
        let directory = linux::fs::open_in_root(root, path, O_PATH)?;
        let itself = format!("/proc/self/fd/{}", directory.as_raw_fd());
        std::fs::set_permissions(itself, std::fs::Permissions::from_mode(mode))?;
    }
    Ok(made)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_has_the_volumes_mode() {
        let volume = tempfile::tempdir().expect("a temporary directory");
        std::fs::set_permissions(volume.path(), std::fs::Permissions::from_mode(0o2777)).expect("a mode");
        std::fs::create_dir(volume.path().join("there")).expect("a directory");
        std::fs::set_permissions(volume.path().join("there"), std::fs::Permissions::from_mode(0o700)).expect("a mode");
        let root = linux::fs::open_directory(volume.path()).expect("a directory");
        make(root.as_fd(), volume.path(), Path::new("there/a/b")).expect("directories");
        let mode = |path: &str| std::fs::metadata(volume.path().join(path)).expect("a directory").mode() & 0o7777;
        assert_eq!([mode("there"), mode("there/a"), mode("there/a/b")], [0o700, 0o2777, 0o2777]);
    }
}
