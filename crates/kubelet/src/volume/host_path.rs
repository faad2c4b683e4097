//! hostPath types (upstream pkg/volume/hostpath, v1.37).

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use k8s_openapi::api::core::v1::HostPathVolumeSource;

/// Checks the path against its type, and makes it for the types that say so.
pub fn check(source: &HostPathVolumeSource) -> Result<(), String> {
    let path = Path::new(&source.path);
    let meta = std::fs::metadata(path).ok();
    let failed = |act: &str, e: std::io::Error| format!("failed to {act} {}: {e}", path.display());
    let is = |yes: bool, what: &str| {
        if yes { Ok(()) } else { Err(format!("hostPath type check failed: {} is not {what}", source.path)) }
    };
    let type_of = meta.as_ref().map(std::fs::Metadata::file_type);
    match source.type_.as_deref().unwrap_or("") {
        "" => Ok(()),
        "DirectoryOrCreate" => {
            if meta.is_none() {
                std::fs::create_dir_all(path).map_err(|e| failed("make directory", e))?;
                let mode = std::fs::Permissions::from_mode(0o755);
                std::fs::set_permissions(path, mode).map_err(|e| failed("set the mode of", e))?;
            }
            is(path.is_dir(), "a directory")
        }
        "FileOrCreate" => {
            if meta.is_none() {
                std::fs::write(path, b"").map_err(|e| failed("make file", e))?;
            }
            is(path.is_file(), "a file")
        }
        "Directory" => is(type_of.is_some_and(|t| t.is_dir()), "a directory"),
        "File" => is(type_of.is_some_and(|t| t.is_file()), "a file"),
        "Socket" => is(type_of.is_some_and(|t| t.is_socket()), "a socket"),
        "CharDevice" => is(type_of.is_some_and(|t| t.is_char_device()), "a character device"),
        "BlockDevice" => is(type_of.is_some_and(|t| t.is_block_device()), "a block device"),
        other => Err(format!("hostPath type {other:?} is unknown")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_checked_and_made() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| root.path().join(name).to_string_lossy().into_owned();
        std::fs::create_dir(root.path().join("directory")).expect("a directory");
        std::fs::write(root.path().join("file"), b"").expect("a file");
        let _listener = std::os::unix::net::UnixListener::bind(root.path().join("socket")).expect("a socket");
        let check = |kind: &str, path: String| check(&HostPathVolumeSource { path, type_: Some(kind.to_owned()) }).is_ok();
        for (kind, fits) in [("Directory", "directory"), ("File", "file"), ("Socket", "socket")] {
            for name in ["directory", "file", "socket", "missing"] {
                assert_eq!(check(kind, path(name)), name == fits, "{kind} {name}");
            }
        }
        assert!(check("", path("missing")) && !root.path().join("missing").exists());
        assert!(check("DirectoryOrCreate", path("new/one")) && root.path().join("new/one").is_dir());
        assert!(check("FileOrCreate", path("new/file")) && root.path().join("new/file").is_file());
        assert!(!check("DirectoryOrCreate", path("file")) && !check("FileOrCreate", path("directory")));
        assert!(check("CharDevice", "/dev/null".to_owned()) && !check("BlockDevice", "/dev/null".to_owned()));
        assert!(!check("Other", path("file")));
    }
}
