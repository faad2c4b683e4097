//! fsGroup: the group of a volume's files (upstream pkg/volume/volume_linux.go `SetVolumeOwnership`, v1.37).

use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::Path;

use k8s_openapi::api::core::v1::Pod;

const SET_GID: u32 = 0o2000;

/// Gives the volume to the pod's fsGroup, if it has one. `readonly` content gets read bits only.
pub fn apply_group(path: &Path, pod: &Pod, readonly: bool) -> Result<(), String> {
    let context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let Some(group) = context.and_then(|c| c.fs_group) else {
        return Ok(());
    };
    let group = u32::try_from(group).map_err(|_| format!("fsGroup {group} is no group id"))?;
    if context.and_then(|c| c.fs_group_change_policy.as_deref()) == Some("OnRootMismatch") && !needs_change(path, group, readonly) {
        return Ok(());
    }
    walk(path, group, readonly).map_err(|e| format!("applyFSGroup failed for {}: {e}", path.display()))
}

fn needs_change(path: &Path, group: u32, readonly: bool) -> bool {
    let wanted = mask(true, readonly);
    std::fs::metadata(path).map_or(true, |m| m.gid() != group || m.mode() & wanted != wanted)
}

fn mask(directory: bool, readonly: bool) -> u32 {
    let read_write = if readonly { 0o440 } else { 0o660 };
    if directory { read_write | SET_GID | 0o110 } else { read_write }
}

fn walk(path: &Path, group: u32, readonly: bool) -> std::io::Result<()> {
    let meta = std::fs::symlink_metadata(path)?;
    if meta.gid() != group {
        lchown(path, None, Some(group))?;
    }
    if meta.file_type().is_symlink() {
        return Ok(());
    }
    let mode = (meta.mode() & 0o7777) | mask(meta.is_dir(), readonly);
    if meta.mode() & 0o7777 != mode {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    if meta.is_dir() {
        for entry in std::fs::read_dir(path)? {
            walk(&entry?.path(), group, readonly)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_given_as_the_policy_says() {
        let pod = |policy: &str| -> Pod {
            serde_json::from_value(
                serde_json::json!({"spec": {"containers": [], "securityContext": {"fsGroup": 4000, "fsGroupChangePolicy": policy}}}),
            )
            .expect("a pod")
        };
        let root = tempfile::tempdir().expect("a temporary directory");
        let file = root.path().join("file");
        let set = |path: &Path, mode: u32| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("a mode");
        let facts = |path: &Path| std::fs::metadata(path).map(|m| (m.gid(), m.mode() & 0o7777)).expect("a file");
        set(root.path(), 0o755);
        std::fs::write(&file, b"x").expect("a file");
        set(&file, 0o600);
        if let Err(error) = apply_group(root.path(), &pod("Always"), false) {
            // Only root gives files away.
            eprintln!("SKIPPED: the_group_is_given_as_the_policy_says: {error}");
            return;
        }
        assert_eq!((facts(root.path()), facts(&file)), ((4000, 0o2775), (4000, 0o660)));
        // The root is right already: what is below is only looked at when the policy says so.
        set(&file, 0o600);
        apply_group(root.path(), &pod("OnRootMismatch"), false).expect("nothing to do");
        assert_eq!(facts(&file), (4000, 0o600));
        apply_group(root.path(), &pod("Always"), true).expect("applied");
        assert_eq!(facts(&file), (4000, 0o640));
        set(root.path(), 0o755);
        set(&file, 0o600);
        apply_group(root.path(), &pod("OnRootMismatch"), false).expect("applied");
        assert_eq!(facts(&file), (4000, 0o660));
    }
}
