//! Network namespaces: made, pinned by a bind mount, removed, and visited.
//!
//! `setns` and `unshare` change one thread only, so everything here that needs them runs on a thread of its own that ends
//! afterwards; the caller's thread never leaves its namespaces.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::mount::UnmountFlags;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

/// What failed, and on which path.
#[derive(Debug, thiserror::Error)]
#[error("failed to {act} network namespace {path}")]
pub struct Error {
    /// The step: "pin", "enter", ….
    pub act: &'static str,
    /// The namespace's path.
    pub path: PathBuf,
    /// The system's answer.
    pub source: io::Error,
}

fn fail(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error { act, path, source }
}

/// Makes a new network namespace and pins it at `path` (a new, empty file) by a bind mount. Its loopback is down.
///
/// # Errors
/// When `path` exists already, or the kernel refuses; nothing is left at `path` then.
pub fn create(path: &Path) -> Result<(), Error> {
    File::create_new(path).map_err(fail("create the file of", path))?;
    let pinned = std::thread::scope(|scope| {
        scope
            .spawn(|| -> io::Result<()> {
                // SAFETY: only CLONE_NEWNET is unshared, never FILES: no descriptor table changes hands.
                unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
                rustix::mount::mount_bind("/proc/thread-self/ns/net", path)?;
                Ok(())
            })
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("thread panicked")))
    });
    pinned.map_err(|source| {
        let _ = std::fs::remove_file(path);
        Error { act: "pin", path: path.to_owned(), source }
    })
}

/// Drops the pin at `path`: unmounts it (however often it is mounted) and removes the file. The kernel ends the namespace, and every veth
/// with an end in it, when its last process is gone. A path that does not exist is a success.
///
/// # Errors
/// When the unmount or the removal fails for another reason than that nothing is there.
pub fn remove(path: &Path) -> Result<(), Error> {
    loop {
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => break,
            Err(e) => {
                return Err(Error { act: "unmount", path: path.to_owned(), source: e.into() });
            }
        }
    }
    match std::fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(fail("remove the file of", path)(e)),
    }
}

/// Whether `path` is a network namespace (a pin that still holds), not a plain file or nothing.
pub fn is_pinned(path: &Path) -> bool {
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|s| s.f_type as u64 == NSFS_MAGIC)
}

/// Runs `visit` inside the network namespace at `path`, on a thread of its own.
///
/// # Errors
/// When the namespace can't be opened or entered, or `visit` panics.
pub fn within<T: Send>(path: &Path, visit: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let namespace = File::open(path).map_err(fail("open", path))?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".into())
            .stack_size(256 * 1024)
            .spawn_scoped(scope, || -> io::Result<T> {
                rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok(visit())
            })
            .map_err(fail("start a thread for", path))?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("thread panicked"))).map_err(fail("enter", path))
    })
}

/// Runs `visit` on a thread of its own with a new network namespace and a new, private mount namespace; threads and processes that it
/// starts are in them too. What it mounts is gone when the last of them ends. For tests, and for looking without touching.
///
/// # Errors
/// When a namespace can't be made, or `visit` panics.
pub fn in_private<T: Send>(visit: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> io::Result<T> {
            // SAFETY: CLONE_NEWNS unshares the working directory with it, but no descriptor table (FILES is not asked for).
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }?;
            let private = rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private)?;
            Ok(visit())
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("thread panicked")))
    })
}
