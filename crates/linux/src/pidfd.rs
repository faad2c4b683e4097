//! Process descriptors: a handle of a process that cannot be reused for another. Source: pidfd_open(2).

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::sys::{check, own};
use crate::{Error, Result};

/// A descriptor of the process `pid`.
///
/// # Errors
/// `ESRCH` when there is none.
pub fn open(pid: i32) -> Result<OwnedFd> {
    // SAFETY: only integers are passed.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    check(ret).map(own).map_err(|e| Error::new("pidfd_open", pid.to_string(), e))
}

/// The pid behind a descriptor, in this process' PID namespace (`/proc/self/fdinfo`); -1 for one that was reaped.
///
/// # Errors
/// When procfs does not tell.
pub fn pid_of(pidfd: BorrowedFd<'_>) -> Result<i32> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let text = std::fs::read_to_string(&path).map_err(|e| Error::new("read", path.as_str(), e))?;
    let pid = text.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
    pid.ok_or_else(|| Error::invalid("read", path, "it is not that of a pidfd"))
}

/// Sends a signal (0: only checks that the process is there; a zombie is).
///
/// # Errors
/// `ESRCH` when it has been reaped.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<()> {
    // SAFETY: the info pointer may be null, then the kernel fills it as kill(2) does.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0) };
    check(ret).map_err(|e| Error::new("send signal", signal.to_string(), e))?;
    Ok(())
}

/// Waits until the process has ended (it may still be a zombie); `false` when `timeout` passes first.
///
/// # Errors
/// The kernel's answer to poll(2).
pub fn wait_exit(pidfd: BorrowedFd<'_>, timeout: Duration) -> Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let millis = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        // SAFETY: one pollfd, which is ours, is passed with its count.
        match check(unsafe { libc::poll(&mut poll, 1, millis) }.into()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::new("poll", "pidfd", e)),
        }
    }
}

/// A copy of descriptor number `fd` of that process (Linux 5.6).
///
/// # Errors
/// `EBADF` when it has no such descriptor, `EPERM` without the right to trace it.
pub fn get_fd(pidfd: BorrowedFd<'_>, fd: i32) -> Result<OwnedFd> {
    // SAFETY: only integers are passed.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    check(ret).map(own).map_err(|e| Error::new("pidfd_getfd", fd.to_string(), e))
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It returned this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
}

impl Exit {
    /// The code that a shell would show: the exit code, or 128 + the signal.
    pub fn status(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

const P_PIDFD: libc::idtype_t = 3;

/// How the child behind `pidfd` ended, waiting for it when `block`. With `keep` the child stays a zombie that can be
/// waited for again. `None`: it runs (only without `block`).
///
/// # Errors
/// `ECHILD` when it is not a child of this process or has been reaped.
pub fn wait(pidfd: BorrowedFd<'_>, block: bool, keep: bool) -> Result<Option<Exit>> {
    let flags = libc::WEXITED | if block { 0 } else { libc::WNOHANG } | if keep { libc::WNOWAIT } else { 0 };
    // SAFETY: a zeroed siginfo_t is valid, and the pointer to it outlives the call.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    crate::sys::retry(|| unsafe { libc::waitid(P_PIDFD, pidfd.as_raw_fd() as u32, &mut info, flags) }.into())
        .map_err(|e| Error::new("waitid", "pidfd", e))?;
    // SAFETY: waitid(2) filled the SIGCHLD fields, or left the zeroes.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok(match (pid, info.si_code) {
        (0, _) => None,
        (_, libc::CLD_EXITED) => Some(Exit::Code(status)),
        _ => Some(Exit::Signal(status)),
    })
}
