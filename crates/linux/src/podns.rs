//! Namespaces of a pod that its shim makes, enters and pins, and the confinement of a pause process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

/// A namespace that a pod's processes share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Network.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host name.
    Uts,
    /// Process ids: entered by the children made afterwards.
    Pid,
    /// Mounts.
    Mount,
}

impl Kind {
    /// Its file in `/proc/PID/ns`.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Pid => "pid",
            Self::Mount => "mnt",
        }
    }

    fn flag(self) -> UnshareFlags {
        match self {
            Self::Net => UnshareFlags::NEWNET,
            Self::Ipc => UnshareFlags::NEWIPC,
            Self::Uts => UnshareFlags::NEWUTS,
            Self::Pid => UnshareFlags::NEWPID,
            Self::Mount => UnshareFlags::NEWNS,
        }
    }

    fn link(self) -> LinkNameSpaceType {
        match self {
            Self::Net => LinkNameSpaceType::Network,
            Self::Ipc => LinkNameSpaceType::InterProcessCommunication,
            Self::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            Self::Pid => LinkNameSpaceType::ProcessID,
            Self::Mount => LinkNameSpaceType::Mount,
        }
    }
}

/// Moves this thread into a new namespace.
///
/// # Errors
/// `unshare(2)`'s.
pub fn make(kind: Kind) -> io::Result<()> {
    // SAFETY: none of the kinds is CLONE_FILES, the one flag that breaks descriptors' ownership.
    Ok(unsafe { rustix::thread::unshare_unsafe(kind.flag()) }?)
}

/// Moves this thread into a namespace that is there.
///
/// # Errors
/// `setns(2)`'s; EINVAL if the descriptor is of another kind.
pub fn enter(kind: Kind, namespace: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(namespace, Some(kind.link()))?)
}

/// Keeps this process' namespace alive by a bind mount on the file at `path`, which is made.
///
/// # Errors
/// Making the file, `mount(2)`'s.
pub fn pin(kind: Kind, path: &Path) -> io::Result<()> {
    File::create(path)?;
    let source = format!("/proc/thread-self/ns/{}", kind.file());
    rustix::mount::mount_bind(source, path)?;
    Ok(())
}

/// Undoes [`pin`]; nothing there is not an error.
///
/// # Errors
/// `umount2(2)`'s, and removing the file.
pub fn unpin(path: &Path) -> io::Result<()> {
    unmount(path)?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Unmounts everything that is mounted on `path`, lazily and without following a link; nothing there is not an error.
///
/// # Errors
/// `umount2(2)`'s.
pub fn unmount(path: &Path) -> io::Result<()> {
    loop {
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // EINVAL: not a mount point (any more).
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sets the host name of this process' UTS namespace.
///
/// # Errors
/// `sethostname(2)`'s.
pub fn set_hostname(name: &str) -> io::Result<()> {
    Ok(rustix::system::sethostname(name.as_bytes())?)
}

/// Leaves this process (which must be alone and about to exec a descriptor) an empty root, read-only. `workdir` is an empty
/// directory to build on; nothing stays there.
///
/// # Errors
/// Those of `unshare(2)`, `mount(2)`, `pivot_root(2)` and `umount2(2)`.
pub fn confine(workdir: &Path) -> io::Result<()> {
    make(Kind::Mount)?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    rustix::mount::mount("tmpfs", workdir, "tmpfs", flags, c"size=4k,mode=555,nr_inodes=2")?;
    rustix::process::chdir(workdir)?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

/// Takes every privilege from this process for good: user and group 65535, no capabilities, no new privileges.
///
/// # Errors
/// Those of `setgroups(2)`, `setresgid(2)`, `setresuid(2)` and `prctl(2)`.
pub fn drop_privileges() -> io::Result<()> {
    const NOBODY: u32 = 65535;
    // SAFETY: no pointer is passed but a null one with length 0; leaving root's user id clears all capability sets.
    let ok = unsafe {
        libc::setgroups(0, std::ptr::null()) == 0
            && libc::setresgid(NOBODY, NOBODY, NOBODY) == 0
            && libc::setresuid(NOBODY, NOBODY, NOBODY) == 0
            && libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    };
    if ok { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether two namespace files (`/proc/PID/ns/...`, pins) are of one namespace.
///
/// # Errors
/// `stat(2)`'s.
pub fn same(left: impl AsFd, right: impl AsFd) -> io::Result<bool> {
    let (left, right) = (rustix::fs::fstat(left)?, rustix::fs::fstat(right)?);
    Ok((left.st_dev, left.st_ino) == (right.st_dev, right.st_ino))
}
