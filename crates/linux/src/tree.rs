//! Removing trees that somebody else has filled: a container may nest directories as deep as it likes, and neither the stack nor the
//! descriptors of who removes them may grow with that (`std::fs::remove_dir_all` takes a frame and a descriptor a level).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, RenameFlags, openat, renameat_with, unlinkat};
use rustix::io::Errno;

/// Removes `path` and everything below it, following no link and leaving mounts alone.
///
/// # Errors
/// The kernel's answer to the step that failed: `ENOENT` when nothing is there, `EBUSY` for a mount point.
pub fn remove(path: &Path) -> io::Result<()> {
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    Ok(remove_name(CWD, &name)?)
}

/// As [`remove`], of the entry `name` of `dir`.
///
/// # Errors
/// As [`remove`].
pub fn remove_at(dir: impl AsFd, name: &[u8]) -> io::Result<()> {
    Ok(remove_name(dir, &std::ffi::CString::new(name)?)?)
}

fn remove_name(dir: impl AsFd, name: &CStr) -> rustix::io::Result<()> {
    if unlink(&dir, name)? {
        return Ok(());
    }
    let top = open(&dir, name)?;
    let mut moved = 0;
    // Each round takes a level away: what a directory holds of directories is moved up to the top.
    while let Some(children) = some(names(&top)?) {
        for child in children {
            if !unlink(&top, &child)? {
                empty(&top, &child, &mut moved)?;
            }
        }
    }
    unlinkat(&dir, name, AtFlags::REMOVEDIR)
}

fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

/// Removes the directory `name` of `top`; those of its entries that are directories with entries are moved to `top`.
fn empty(top: &OwnedFd, name: &CStr, moved: &mut u64) -> rustix::io::Result<()> {
    let dir = open(top, name)?;
    for child in names(&dir)? {
        if unlink(&dir, &child)? {
            continue;
        }
        loop {
            *moved += 1;
            match renameat_with(&dir, &child, top, format!("{moved}.moved"), RenameFlags::NOREPLACE) {
                // Whoever filled the tree has used the name.
                Err(Errno::EXIST) => {}
                other => break other?,
            }
        }
    }
    match unlinkat(top, name, AtFlags::REMOVEDIR) {
        // It is filled meanwhile: the next round sees it again.
        Err(Errno::NOTEMPTY) => Ok(()),
        other => other,
    }
}

/// Removes a file or an empty directory; false for a directory that is not empty.
fn unlink(dir: impl AsFd, name: &CStr) -> rustix::io::Result<bool> {
    match unlinkat(&dir, name, AtFlags::empty()) {
        // A file system may call a directory either.
        Err(refused @ (Errno::ISDIR | Errno::PERM)) => match unlinkat(&dir, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
            Err(Errno::NOTDIR) => Err(refused),
            other => other.map(|()| true),
        },
        other => other.map(|()| true),
    }
}

fn open(dir: impl AsFd, name: &CStr) -> rustix::io::Result<OwnedFd> {
    openat(dir, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn names(dir: &OwnedFd) -> rustix::io::Result<Vec<std::ffi::CString>> {
    let entries = Dir::read_from(dir)?.map(|entry| entry.map(|entry| entry.file_name().to_owned()));
    let names: rustix::io::Result<Vec<_>> = entries.collect();
    Ok(names?.into_iter().filter(|name| !matches!(name.to_bytes(), b"." | b"..")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::mkdirat;

    fn folder(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("coracle-tree-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory");
        path
    }

    #[test]
    fn a_tree_as_deep_as_a_container_may_make_it() {
        const DEPTH: usize = 4_000;
        let path = folder("deep");
        let mut at = open(CWD, &std::ffi::CString::new(path.as_os_str().as_bytes()).expect("a name")).expect("open");
        for _ in 0..DEPTH {
            mkdirat(&at, c"d", Mode::from(0o700)).expect("a directory");
            at = open(&at, c"d").expect("open");
        }
        drop(at);
        let (small, removed) = (std::thread::Builder::new().stack_size(96 << 10), path.clone());
        small.spawn(move || remove(&removed)).expect("a thread").join().expect("no panic").expect("removed");
        assert!(!path.exists());
    }

    #[test]
    fn no_link_is_followed_and_names_may_be_taken() {
        let (path, outside) = (folder("names"), folder("outside"));
        std::fs::write(outside.join("stays"), "").expect("a file");
        for name in ["a/b/c", "1.moved/2.moved/3.moved", "2.moved/x/y"] {
            std::fs::create_dir_all(path.join(name)).expect("directories");
            std::fs::write(path.join(name).join("f"), "").expect("a file");
        }
        std::os::unix::fs::symlink(&outside, path.join("a/b/link")).expect("a link");
        std::os::unix::fs::symlink(&outside, path.join("link")).expect("a link");
        remove(&path).expect("removed");
        assert!(!path.exists() && outside.join("stays").exists());
        assert_eq!(remove(&path).expect_err("gone").kind(), io::ErrorKind::NotFound);
        std::os::unix::fs::symlink(&outside, &path).expect("a link");
        remove(&path).expect("the link is removed");
        assert!(outside.join("stays").exists());
        remove(&outside).expect("removed");
    }
}
