//! The atomic writer: all files of a volume change at one instant
//! (upstream pkg/volume/util/atomic_writer.go, v1.37).
//!
//! `..STAMP/` holds the files, `..data` points to it, and each first path component points through `..data`.
//! An update makes a new `..STAMP` and renames a new `..data` over the old.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::volume::payload::Files;

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";

/// Writing failed.
#[derive(Debug, thiserror::Error)]
#[error("failed to {act} {path}: {source}")]
pub struct Error {
    act: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn at(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error { act, path, source }
}

/// Makes the volume's content be `files`; true when something changed.
pub fn write(directory: &Path, files: &Files) -> Result<bool, Error> {
    make_directory(directory)?;
    let data = directory.join(DATA);
    let old = std::fs::read_link(&data).ok();
    if old.is_some() && same(&data, files) {
        link_names(directory, files)?;
        return Ok(false);
    }
    let stamp = Timestamp::now().strftime("..%Y_%m_%d_%H_%M_%S.").to_string();
    let stamp = format!("{stamp}{:09}", Timestamp::now().subsec_nanosecond());
    let fresh = directory.join(&stamp);
    let put = fill(&fresh, files).and_then(|()| put_in_place(directory, &stamp));
    if put.is_err() {
        // Each attempt makes one of its own: on a full disk they would pile up.
        let _ = std::fs::remove_dir_all(&fresh);
    }
    put?;
    link_names(directory, files)?;
    if let Some(old) = old.filter(|o| o.as_os_str() != stamp.as_str()) {
        let old = directory.join(old);
        std::fs::remove_dir_all(&old).map_err(at("remove", &old))?;
    }
    Ok(true)
}

/// Makes the directory `fresh` with all files.
fn fill(fresh: &Path, files: &Files) -> Result<(), Error> {
    make_directory(fresh)?;
    for (path, file) in files {
        let target = fresh.join(path);
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).map_err(at("make directory", parent))?;
        }
        std::fs::write(&target, &file.data).map_err(at("write", &target))?;
        let mode = std::fs::Permissions::from_mode(file.mode);
        std::fs::set_permissions(&target, mode).map_err(at("set the mode of", &target))?;
        if file.owner.is_some() {
            chown(&target, file.owner, None).map_err(at("set the owner of", &target))?;
        }
    }
    Ok(())
}

/// Lets `..data` point to the directory `stamp`.
fn put_in_place(directory: &Path, stamp: &str) -> Result<(), Error> {
    let new_link = directory.join(DATA_NEW);
    match std::fs::remove_file(&new_link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(at("remove", &new_link)(error));
        }
        _ => {}
    }
    symlink(stamp, &new_link).map_err(at("link", &new_link))?;
    std::fs::rename(&new_link, directory.join(DATA)).map_err(at("rename", &new_link))
}

/// Links for each first component; those of names that are gone are removed.
fn link_names(directory: &Path, files: &Files) -> Result<(), Error> {
    let wanted: BTreeSet<&str> = files.keys().filter_map(|p| p.split('/').next()).collect();
    for name in &wanted {
        let link = directory.join(name);
        if link.symlink_metadata().is_err() {
            symlink(Path::new(DATA).join(name), &link).map_err(at("link", &link))?;
        }
    }
    let entries = std::fs::read_dir(directory).map_err(at("read", directory))?;
    for entry in entries {
        let entry = entry.map_err(at("read", directory))?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        let ours = entry.file_type().is_ok_and(|t| t.is_symlink());
        if !text.starts_with("..") && ours && !wanted.contains(text.as_ref()) {
            std::fs::remove_file(entry.path()).map_err(at("remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// True when the files on disk are the wanted ones; the group's bits that fsGroup added do not count.
fn same(data: &Path, files: &Files) -> bool {
    let mut found = 0;
    let mut pending = vec![data.to_owned()];
    while let Some(directory) = pending.pop() {
        let Ok(entries) = std::fs::read_dir(&directory) else {
            return false;
        };
        for entry in entries {
            let Ok(entry) = entry else { return false };
            let path = entry.path();
            if path.is_dir() {
                pending.push(path);
                continue;
            }
            let Some(file) = path.strip_prefix(data).ok().and_then(|p| files.get(p.to_str()?)) else {
                return false;
            };
            let owner = entry.metadata().map(|m| m.uid()).unwrap_or(0);
            let content = std::fs::read(&path).unwrap_or_default();
            if content != file.data || file.owner.is_some_and(|o| o != owner) {
                return false;
            }
            found += 1;
        }
    }
    found == files.len()
}

fn make_directory(path: &Path) -> Result<(), Error> {
    if !path.is_dir() {
        std::fs::create_dir_all(path).map_err(at("make directory", path))?;
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(path, mode).map_err(at("set the mode of", path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::payload::File;

    fn file(text: &str) -> File {
        File { data: text.into(), mode: 0o640, owner: None }
    }

    #[test]
    fn replaces_all_at_once_and_removes_what_is_gone() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let volume = dir.path().join("v");
        let first = Files::from([("a".into(), file("1")), ("d/e/f".into(), file("2"))]);
        assert!(write(&volume, &first).expect("first write"));
        assert!(!write(&volume, &first).expect("same content"));
        assert_eq!(std::fs::read_to_string(volume.join("d/e/f")).expect("read"), "2");
        let mode = std::fs::metadata(volume.join("a")).expect("stat").mode();
        assert_eq!(mode & 0o777, 0o640);
        let second = Files::from([("a".into(), file("3")), ("b".into(), file("4"))]);
        assert!(write(&volume, &second).expect("second write"));
        assert_eq!(std::fs::read_to_string(volume.join("a")).expect("read"), "3");
        assert!(volume.join("d").symlink_metadata().is_err());
        let stamps = std::fs::read_dir(&volume)
            .expect("list")
            .filter_map(Result::ok)
            .filter(|e| e.file_name().to_string_lossy().starts_with("..2"))
            .count();
        assert_eq!(stamps, 1);
    }
}
