//! Namespaces: making, joining, comparing and pinning them. Source: namespaces(7), setns(2), ioctl_nsfs(2).

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::sys::{check, retry};
use crate::{Error, Result};

const NS_GET_NSTYPE: u64 = 0xb703;

/// A kind of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Users and capabilities.
    User,
    /// Mounts.
    Mount,
    /// Processes.
    Pid,
    /// Network.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host name.
    Uts,
    /// Cgroup root.
    Cgroup,
    /// Monotonic and boot clocks.
    Time,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 8] = [Self::User, Self::Mount, Self::Pid, Self::Net, Self::Ipc, Self::Uts, Self::Cgroup, Self::Time];

    /// The `CLONE_NEW*` flag.
    pub const fn flag(self) -> u64 {
        match self {
            Self::User => 0x1000_0000,
            Self::Mount => 0x0002_0000,
            Self::Pid => 0x2000_0000,
            Self::Net => 0x4000_0000,
            Self::Ipc => 0x0800_0000,
            Self::Uts => 0x0400_0000,
            Self::Cgroup => 0x0200_0000,
            Self::Time => 0x80,
        }
    }

    /// The name below `/proc/PID/ns`.
    pub const fn proc_name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Mount => "mnt",
            Self::Pid => "pid",
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Cgroup => "cgroup",
            Self::Time => "time",
        }
    }

    /// The path of a process' namespace of this kind.
    pub fn path_of(self, pid: i32) -> PathBuf {
        PathBuf::from(format!("/proc/{pid}/ns/{}", self.proc_name()))
    }
}

/// Opens the namespace at `path` (an nsfs file) and checks that it is of `kind`.
///
/// # Errors
/// When the path cannot be opened, is no namespace, or one of another kind.
pub fn open(path: &Path, kind: Kind) -> Result<OwnedFd> {
    let file = File::open(path).map_err(|e| Error::new("open namespace", path.display().to_string(), e))?;
    // SAFETY: this ioctl takes no argument.
    let ret = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE as _) };
    match check(ret.into()) {
        Ok(found) if found as u64 == kind.flag() => Ok(file.into()),
        Ok(_) => Err(Error::invalid(
            "open namespace",
            path.display().to_string(),
            &format!("it is not a namespace of kind {}", kind.proc_name()),
        )),
        Err(_) => Err(Error::invalid("open namespace", path.display().to_string(), "it is not a namespace")),
    }
}

/// Joins the namespace. For [`Kind::Pid`] and [`Kind::Time`] it is children that are in it. The process must be
/// single-threaded for [`Kind::User`], [`Kind::Mount`] needs a file system context of its own.
///
/// # Errors
/// The kernel's answer.
pub fn join(namespace: BorrowedFd<'_>, kind: Kind) -> Result<()> {
    set(namespace, kind.flag()).map_err(|e| Error::new("join namespace", kind.proc_name(), e))
}

/// Joins several namespaces of the process behind `pidfd` at once (Linux 5.8): all or none.
///
/// # Errors
/// The kernel's answer.
pub fn join_process(pidfd: BorrowedFd<'_>, kinds: &[Kind]) -> Result<()> {
    let flags = kinds.iter().fold(0, |all, kind| all | kind.flag());
    set(pidfd, flags).map_err(|e| Error::new("join namespaces", format!("{kinds:?}"), e))
}

fn set(fd: BorrowedFd<'_>, flags: u64) -> std::io::Result<()> {
    // SAFETY: only integers are passed.
    retry(|| unsafe { libc::setns(fd.as_raw_fd(), flags as i32) }.into()).map(|_| ())
}

/// Leaves the present namespaces of these kinds for new ones.
///
/// # Errors
/// The kernel's answer.
pub fn unshare(kinds: &[Kind]) -> Result<()> {
    let flags = kinds.iter().fold(0, |all, kind| all | kind.flag());
    // SAFETY: only an integer is passed.
    let ret = unsafe { libc::unshare(flags as i32) };
    check(ret.into()).map_err(|e| Error::new("unshare", format!("{kinds:?}"), e))?;
    Ok(())
}

/// What tells one namespace from another: device and inode of its nsfs file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id {
    /// Device.
    pub device: u64,
    /// Inode.
    pub inode: u64,
}

/// The identity of the namespace at `path`.
///
/// # Errors
/// When the path cannot be read.
pub fn id(path: &Path) -> Result<Id> {
    let meta = std::fs::metadata(path).map_err(|e| Error::new("stat namespace", path.display().to_string(), e))?;
    Ok(Id { device: meta.dev(), inode: meta.ino() })
}

/// The identity of a process' namespace (`pid` 0: one's own).
///
/// # Errors
/// When the process is gone.
pub fn id_of(pid: i32, kind: Kind) -> Result<Id> {
    if pid == 0 {
        return id(Path::new(&format!("/proc/self/ns/{}", kind.proc_name())));
    }
    id(&kind.path_of(pid))
}

/// Keeps the namespace of process `pid` (0: one's own) alive by a bind mount on the file `target`, which is made.
///
/// # Errors
/// When the file cannot be made (the file stays if the mount fails) or mounted on.
pub fn pin(pid: i32, kind: Kind, target: &Path) -> Result<()> {
    File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(target)
        .map_err(|e| Error::new("create", target.display().to_string(), e))?;
    let source = if pid == 0 {
        // Of the thread, not the process: a caller may have entered the namespace on a thread of its own.
        PathBuf::from(format!("/proc/thread-self/ns/{}", kind.proc_name()))
    } else {
        kind.path_of(pid)
    };
    crate::mount::bind(&source, target, false)
}

/// Undoes [`pin`]: unmounts and removes `target`. Fine when it is not there.
///
/// # Errors
/// When the mount or the file cannot be removed.
pub fn unpin(target: &Path) -> Result<()> {
    crate::mount::unmount_all(target, true)?;
    match std::fs::remove_file(target) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::new("remove", target.display().to_string(), e)),
        _ => Ok(()),
    }
}

/// Brings up the loopback interface of the present network namespace.
///
/// # Errors
/// The kernel's answer.
pub fn bring_loopback_up() -> Result<()> {
    let fail = |e| Error::new("bring up interface", "lo", e);
    // SAFETY: only integers are passed.
    let ret = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    let socket = check(ret.into()).map(crate::sys::own).map_err(fail)?;
    // SAFETY: a zeroed ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request, with a NUL-terminated name, outlives the call.
    let ret = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    check(ret.into()).map_err(fail)?;
    Ok(())
}

/// Sets the host name of the present UTS namespace.
///
/// # Errors
/// The kernel's answer.
pub fn set_hostname(name: &str) -> Result<()> {
    // SAFETY: the pointer and the length are those of a string that outlives the call.
    let ret = unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) };
    check(ret.into()).map_err(|e| Error::new("sethostname", name, e))?;
    Ok(())
}

/// Sets the NIS domain name of the present UTS namespace.
///
/// # Errors
/// The kernel's answer.
pub fn set_domainname(name: &str) -> Result<()> {
    // SAFETY: the pointer and the length are those of a string that outlives the call.
    let ret = unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) };
    check(ret.into()).map_err(|e| Error::new("setdomainname", name, e))?;
    Ok(())
}

/// Whether a namespace is mounted at `path`.
pub fn is_pinned(path: &Path) -> bool {
    const NSFS_MAGIC: i64 = 0x6e73_6673;
    crate::fs::filesystem_magic(path).is_ok_and(|magic| magic == NSFS_MAGIC)
}
