//! Processes: clone3, waiting, identity, execve and what a process may set about itself.
//!
//! **Invariant**: [`clone`] and [`fork`] refuse to run in a process with more than one thread, for the child would
//! hold locks that nobody opens again.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::ptr;

use crate::sys::{check, cpath, own};
use crate::{Error, Result};

const CLONE_PIDFD: u64 = 0x1000;
const CLONE_PARENT: u64 = 0x8000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` of clone(2), 88 bytes as of Linux 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// What the new process is to be.
#[derive(Default)]
pub struct CloneOptions<'a> {
    /// `Kind::flag()`s of the namespaces to make.
    pub namespaces: u64,
    /// The cgroup v2 directory to be born in.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The child becomes a sibling: a child of this process' parent.
    pub sibling: bool,
}

/// Which side of a [`clone`] this is.
pub enum Cloned {
    /// The new process.
    Child,
    /// The process that called, with the child's pid (in the caller's PID namespace) and its descriptor.
    Parent {
        /// The child's pid.
        pid: i32,
        /// The child's pidfd.
        pidfd: OwnedFd,
    },
}

/// Makes a process that goes on from here (a fork, not a thread).
///
/// # Errors
/// When this process has more than one thread, or the kernel's answer.
pub fn clone(options: &CloneOptions<'_>) -> Result<Cloned> {
    if !is_single_threaded() {
        return Err(Error::invalid("clone3", "", "the process has more than one thread"));
    }
    let mut pidfd: i32 = -1;
    let mut args = CloneArgs {
        flags: options.namespaces | CLONE_PIDFD,
        pidfd: ptr::from_mut(&mut pidfd) as u64,
        // With CLONE_PARENT the signal is the caller's own, and must be given as 0.
        exit_signal: if options.sibling { 0 } else { libc::SIGCHLD as u64 },
        ..CloneArgs::default()
    };
    if options.sibling {
        args.flags |= CLONE_PARENT;
    }
    if let Some(cgroup) = options.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the struct is given with its true size, its pidfd pointer outlives the call, no stack and no shared
    // memory are asked for (so the child is a copy, as after fork), and the process has a single thread.
    let ret = unsafe { libc::syscall(libc::SYS_clone3, ptr::from_mut(&mut args), size_of::<CloneArgs>()) };
    match check(ret).map_err(|e| Error::new("clone3", format!("flags {:#x}", args.flags), e))? {
        0 => Ok(Cloned::Child),
        pid => Ok(Cloned::Parent { pid: pid as i32, pidfd: own(pidfd.into()) }),
    }
}

/// A plain fork, with the child's descriptor.
///
/// # Errors
/// As [`clone`].
pub fn fork() -> Result<Cloned> {
    clone(&CloneOptions::default())
}

/// Whether this process has one thread only. Without a procfs the answer is no.
pub fn is_single_threaded() -> bool {
    // `/proc/self/task` has a link for itself, its parent, and each thread.
    fs::metadata("/proc/self/task").map_or_else(|_| fallback_single_threaded(), |meta| meta.nlink() == 3)
}

/// unshare(CLONE_THREAD) changes nothing and is refused (EINVAL) to a process with several threads.
fn fallback_single_threaded() -> bool {
    const CLONE_THREAD: i32 = 0x10000;
    // SAFETY: only an integer is passed.
    (unsafe { libc::unshare(CLONE_THREAD) }) == 0
}

/// This process' pid.
pub fn pid() -> i32 {
    std::process::id() as i32
}

/// Makes this process the one that orphaned descendants are given to (`PR_SET_CHILD_SUBREAPER`).
///
/// # Errors
/// The kernel's answer.
pub fn set_child_subreaper(on: bool) -> Result<()> {
    prctl("PR_SET_CHILD_SUBREAPER", libc::PR_SET_CHILD_SUBREAPER, [on.into(), 0, 0, 0])
}

/// The signal that this process gets when its parent thread ends; 0 for none.
///
/// # Errors
/// The kernel's answer.
pub fn set_parent_death_signal(signal: i32) -> Result<()> {
    prctl("PR_SET_PDEATHSIG", libc::PR_SET_PDEATHSIG, [signal as u64, 0, 0, 0])
}

/// Whether others of the same user may look into this process (`PR_SET_DUMPABLE`); execve(2) sets it again.
///
/// # Errors
/// The kernel's answer.
pub fn set_dumpable(on: bool) -> Result<()> {
    prctl("PR_SET_DUMPABLE", libc::PR_SET_DUMPABLE, [on.into(), 0, 0, 0])
}

/// Forbids this process and its descendants to gain privileges by execve(2). Cannot be undone.
///
/// # Errors
/// The kernel's answer.
pub fn set_no_new_privileges() -> Result<()> {
    prctl("PR_SET_NO_NEW_PRIVS", libc::PR_SET_NO_NEW_PRIVS, [1, 0, 0, 0])
}

/// Keeps the permitted capabilities over a change of user, until the next execve(2).
///
/// # Errors
/// The kernel's answer.
pub fn set_keep_capabilities(on: bool) -> Result<()> {
    prctl("PR_SET_KEEPCAPS", libc::PR_SET_KEEPCAPS, [on.into(), 0, 0, 0])
}

/// The name that `ps` shows (at most 15 bytes).
///
/// # Errors
/// The kernel's answer.
pub fn set_name(name: &str) -> Result<()> {
    let name_c = crate::sys::cstr("PR_SET_NAME", name)?;
    prctl("PR_SET_NAME", libc::PR_SET_NAME, [name_c.as_ptr() as u64, 0, 0, 0])
}

pub(crate) fn prctl(name: &'static str, option: i32, args: [u64; 4]) -> Result<()> {
    // SAFETY: the options used take integers, or a pointer that the caller keeps alive over this call.
    let ret = unsafe { libc::prctl(option, args[0], args[1], args[2], args[3]) };
    check(ret.into()).map_err(|e| Error::new("prctl", name, e))?;
    Ok(())
}

/// Begins a session without a terminal.
///
/// # Errors
/// `EPERM` for the leader of a process group.
pub fn setsid() -> Result<()> {
    // SAFETY: no arguments.
    check(unsafe { libc::setsid() }.into()).map_err(|e| Error::new("setsid", "", e))?;
    Ok(())
}

/// Sets all user ids, all group ids and the additional groups, in the order in which the right to do so lasts.
///
/// # Errors
/// The kernel's answer to the step that failed; 4294967295 is no id.
pub fn set_ids(uid: u32, gid: u32, additional_gids: &[u32]) -> Result<()> {
    // To the kernel it is -1, which leaves what is: root.
    if uid == u32::MAX || gid == u32::MAX {
        return Err(Error::invalid("set user", format!("{uid}:{gid}"), "4294967295 is no id"));
    }
    set_groups(additional_gids)?;
    // SAFETY: only integers are passed. The raw call: the process has one thread.
    let ret = unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) };
    check(ret).map_err(|e| Error::new("setgid", gid.to_string(), e))?;
    // SAFETY: as above.
    let ret = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) };
    check(ret).map_err(|e| Error::new("setuid", uid.to_string(), e))?;
    Ok(())
}

/// Sets the additional groups. With none given and setgroups(2) denied by the user namespace, nothing is done.
///
/// # Errors
/// The kernel's answer.
fn set_groups(gids: &[u32]) -> Result<()> {
    // SAFETY: the pointer is to `gids.len()` ids.
    let ret = unsafe { libc::syscall(libc::SYS_setgroups, gids.len(), gids.as_ptr()) };
    match check(ret) {
        Err(_) if gids.is_empty() && setgroups_denied() => Ok(()),
        Err(e) => Err(Error::new("setgroups", format!("{gids:?}"), e)),
        Ok(_) => Ok(()),
    }
}

fn setgroups_denied() -> bool {
    fs::read("/proc/self/setgroups").is_ok_and(|text| text.starts_with(b"deny"))
}

/// Sets the file mode creation mask.
pub fn set_umask(mask: u32) {
    // SAFETY: umask(2) cannot fail.
    unsafe { libc::umask(mask) };
}

/// Begins a session keyring of this name, or joins the one there is.
///
/// # Errors
/// The kernel's answer; `ENOSYS` without keyrings.
pub fn join_session_keyring(name: &str) -> Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: i32 = 1;
    let name_c = crate::sys::cstr("keyctl", name)?;
    // SAFETY: the string outlives the call.
    let ret = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name_c.as_ptr()) };
    check(ret).map_err(|e| Error::new("join session keyring", name, e))?;
    Ok(())
}

/// Sets the execution domain (personality(2)).
///
/// # Errors
/// The kernel's answer.
pub fn set_personality(persona: u64) -> Result<()> {
    // SAFETY: only an integer is passed.
    check(unsafe { libc::personality(persona) }.into()).map_err(|e| Error::new("personality", format!("{persona:#x}"), e))?;
    Ok(())
}

/// Closes all descriptors from `first` upwards, or only marks them to be closed by execve(2).
///
/// # Errors
/// The kernel's answer.
pub fn close_from(first: u32, on_exec_only: bool) -> Result<()> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    let flags = if on_exec_only { CLOSE_RANGE_CLOEXEC } else { 0 };
    // SAFETY: only integers are passed. Without `on_exec_only` the caller vouches, by its own type-checked drops, that
    // nothing is used afterwards; a use gives EBADF.
    let ret = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) };
    check(ret).map_err(|e| Error::new("close_range", first.to_string(), e))?;
    Ok(())
}

/// Closes all descriptors from `first` upwards but those in `keep`. For a process about to execute another program,
/// which leaves the owners of what is closed behind.
///
/// # Errors
/// The kernel's answer.
pub fn close_all_but(first: u32, keep: &[BorrowedFd<'_>]) -> Result<()> {
    let mut numbers: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd() as u32).filter(|n| *n >= first).collect();
    numbers.sort_unstable();
    let mut from = first;
    for number in numbers.into_iter().chain([u32::MAX]) {
        if number > from {
            let last = if number == u32::MAX { u32::MAX } else { number - 1 };
            // SAFETY: only integers are passed; see above for the owners.
            let ret = unsafe { libc::syscall(libc::SYS_close_range, from, last, 0) };
            check(ret).map_err(|e| Error::new("close_range", from.to_string(), e))?;
        }
        from = number.saturating_add(1);
    }
    Ok(())
}

/// Strings for execve(2), made before they are needed.
pub struct ExecStrings {
    strings: Vec<CString>,
}

impl ExecStrings {
    /// Takes the strings.
    ///
    /// # Errors
    /// When one has a NUL byte.
    pub fn new<'a>(strings: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let strings = strings.into_iter().map(|s| crate::sys::cstr("execve", s)).collect::<Result<_>>()?;
        Ok(Self { strings })
    }

    fn pointers(&self) -> Vec<*const libc::c_char> {
        self.strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
    }
}

/// Becomes the program at `path`. Returns only to say why it failed.
pub fn exec(path: &Path, args: &ExecStrings, env: &ExecStrings) -> Error {
    let path_c = match cpath("execve", path) {
        Ok(path) => path,
        Err(error) => return error,
    };
    let (argv, envp) = (args.pointers(), env.pointers());
    // SAFETY: both arrays end with null and point to strings that outlive the call.
    unsafe { libc::execve(path_c.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    Error::last("exec", path.display().to_string())
}

/// Becomes the program that `fd` is open on.
pub fn exec_fd(fd: BorrowedFd<'_>, args: &ExecStrings, env: &ExecStrings) -> Error {
    let (argv, envp) = (args.pointers(), env.pointers());
    // SAFETY: both arrays end with null and point to strings that outlive the call; the path is empty and static.
    unsafe { libc::syscall(libc::SYS_execveat, fd.as_raw_fd(), c"".as_ptr(), argv.as_ptr(), envp.as_ptr(), libc::AT_EMPTY_PATH) };
    Error::last("exec", format!("descriptor {}", fd.as_raw_fd()))
}

/// What `/proc/PID/stat` says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// `R`, `S`, `D`, `Z` (zombie), `X` (dead)...
    pub state: char,
    /// The parent's pid.
    pub parent: i32,
    /// When it began, in clock ticks since boot: with the pid, its identity.
    pub start_time: u64,
}

impl Stat {
    /// Whether it has ended and only waits to be reaped.
    pub fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// Reads `/proc/PID/stat`.
///
/// # Errors
/// `ENOENT` or `ESRCH` when there is no such process.
pub fn stat(pid: i32) -> Result<Stat> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read(&path).map_err(|e| Error::new("read", path.clone(), e))?;
    let text = String::from_utf8_lossy(&text);
    // The name, in parentheses, may hold anything: the fields begin after the last one.
    let parsed = text.rsplit_once(") ").and_then(|(_, rest)| {
        let fields: Vec<&str> = rest.split(' ').collect();
        Some(Stat {
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            start_time: fields.get(19)?.parse().ok()?,
        })
    });
    parsed.ok_or_else(|| Error::invalid("parse", path, "it is not the stat of a process"))
}

/// The kernel's random id of the present boot.
///
/// # Errors
/// When it cannot be read.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(path).map_err(|e| Error::new("read", path, e))?;
    Ok(text.trim_end().to_owned())
}

/// Sends a signal to a process by its pid. Prefer [`crate::pidfd::send_signal`].
///
/// # Errors
/// `ESRCH` when there is no such process.
pub fn kill(pid: i32, signal: i32) -> Result<()> {
    // SAFETY: only integers are passed.
    check(unsafe { libc::kill(pid, signal) }.into()).map_err(|e| Error::new("kill", pid.to_string(), e))?;
    Ok(())
}

/// The present value of `/proc/self/oom_score_adj`.
///
/// # Errors
/// When it cannot be read.
pub fn oom_score_adj() -> Result<i32> {
    let path = "/proc/self/oom_score_adj";
    let text = fs::read_to_string(path).map_err(|e| Error::new("read", path, e))?;
    text.trim().parse().map_err(|_| Error::invalid("parse", path, "it is not a number"))
}

/// Sets the `oom_score_adj` of process `pid`. A value that this process has no right to (lower than its own minimum,
/// without CAP_SYS_RESOURCE) is raised to the process' present one; answers the value that holds.
///
/// # Errors
/// Any answer of the kernel other than "not permitted".
pub fn set_oom_score_adj(pid: i32, value: i32) -> Result<i32> {
    let path = format!("/proc/{pid}/oom_score_adj");
    let written = fs::write(&path, value.to_string());
    match written {
        Ok(()) => Ok(value),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => {
            let text = fs::read_to_string(&path).map_err(|e| Error::new("read", path.clone(), e))?;
            text.trim().parse().map_err(|_| Error::invalid("parse", path, "it is not a number"))
        }
        Err(e) => Err(Error::new("write", path, e)),
    }
}

/// Whether process `pid`, begun at `start_time` (see [`Stat`]), still runs; a zombie does not.
pub fn is_running(pid: i32, start_time: u64) -> bool {
    stat(pid).is_ok_and(|stat| stat.start_time == start_time && !stat.is_dead())
}

/// A descriptor of the process `pid`, if it is the one that began at `start_time`.
///
/// # Errors
/// `ESRCH` when it is gone or another has its pid.
pub fn open_verified(pid: i32, start_time: u64) -> Result<OwnedFd> {
    let fd = crate::pidfd::open(pid)?;
    // Read after the descriptor is held: from here on the pid cannot become another's without the descriptor's end.
    let gone = || Error::new("open process", pid.to_string(), std::io::Error::from_raw_os_error(libc::ESRCH));
    match stat(pid) {
        Ok(found) if found.start_time == start_time => {
            crate::pidfd::send_signal(fd.as_fd(), 0).map_err(|_| gone())?;
            Ok(fd)
        }
        _ => Err(gone()),
    }
}
