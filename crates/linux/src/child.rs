//! Children of a single-threaded program: fork, descriptors and signals of a child, waiting without reaping.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Which side of a fork the caller is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    /// The new process. It ends by [`exit_now`] or by exec.
    Child,
    /// The old process, with the child's pid.
    Parent(u32),
}

/// Forks.
///
/// # Errors
/// `fork(2)`'s; `InvalidInput` if this process has more than one thread, as the child could then do next to nothing.
pub fn fork() -> io::Result<Fork> {
    if !crate::process::is_single_threaded() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "fork of a process with several threads"));
    }
    // SAFETY: with a single thread no lock can be held by a thread that the child lacks.
    match unsafe { libc::fork() } {
        0 => Ok(Fork::Child),
        pid if pid > 0 => Ok(Fork::Parent(pid.unsigned_abs())),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends the process at once: no destructor, no exit handler, no flush.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: _exit takes any value and does not return.
    unsafe { libc::_exit(i32::from(code)) }
}

/// A child that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exited {
    /// Its pid, which nobody else gets until it is reaped.
    pub pid: u32,
    /// Its exit code, or 128 + the signal that killed it.
    pub status: u32,
}

/// A child that has ended, left unreaped: the same is answered until [`reap`].
///
/// `pid` is one child, or `None` for any. `Ok(None)`: none has ended.
///
/// # Errors
/// `waitid(2)`'s; ECHILD if there is no such child.
pub fn ended_child(pid: Option<u32>) -> io::Result<Option<Exited>> {
    wait(pid, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT)
}

/// Reaps a child that has ended. `Ok(None)`: it has not.
///
/// # Errors
/// `waitid(2)`'s; ECHILD if there is no such child.
pub fn reap(pid: u32) -> io::Result<Option<Exited>> {
    wait(Some(pid), libc::WEXITED | libc::WNOHANG)
}

/// Waits for a child to end and reaps it.
///
/// # Errors
/// `waitid(2)`'s; ECHILD if there is no such child.
pub fn wait_for(pid: u32) -> io::Result<Exited> {
    loop {
        match wait(Some(pid), libc::WEXITED) {
            Ok(Some(exited)) => return Ok(exited),
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn wait(pid: Option<u32>, options: i32) -> io::Result<Option<Exited>> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let (kind, id) = pid.map_or((libc::P_ALL, 0), |pid| (libc::P_PID, pid));
    // SAFETY: waitid writes at most the siginfo_t, whose every bit pattern is valid; it was zeroed, so it is whole.
    let (result, pid, status, code) = unsafe {
        let result = libc::waitid(kind, id, info.as_mut_ptr(), options);
        let info = info.assume_init_ref();
        (result, info.si_pid(), info.si_status(), info.si_code)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        return Ok(None);
    }
    let status = status.unsigned_abs();
    let status = if code == libc::CLD_EXITED { status & 0xff } else { 128 + status };
    Ok(Some(Exited { pid: pid.unsigned_abs(), status }))
}

/// Gives the process back the default signal mask and SIGPIPE's default action, as a program expects them at its start.
///
/// # Errors
/// `sigprocmask(2)`'s.
pub fn reset_signals() -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset makes the set whole before sigprocmask reads it; SIG_DFL is a valid action for SIGPIPE.
    check(unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::sigprocmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut())
    })
}

/// Makes `fd` also known as number `target` (0, 1 and 2 among them), kept open across exec.
///
/// # Errors
/// `dup2(2)`'s.
pub fn dup_to(fd: BorrowedFd<'_>, target: i32) -> io::Result<()> {
    if fd.as_raw_fd() == target {
        // SAFETY: F_SETFD on a descriptor that is borrowed here, so open.
        return check(unsafe { libc::fcntl(target, libc::F_SETFD, 0) });
    }
    // SAFETY: closing what `target` was is what the caller asks for; only a child before exec, or a program at its
    // start, calls this, where nothing owns the numbers 0 to 3.
    match unsafe { libc::dup2(fd.as_raw_fd(), target) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Takes over a descriptor that the process was started with.
///
/// # Errors
/// EBADF if it is not open.
pub fn inherited(number: i32) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: F_SETFD touches no memory, and fails if the number is not open.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, and the caller is the program's start, so nothing else owns it.
    Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(number) })
}

/// Sends a signal to a process. Only for children that are not reaped yet, as another may have the pid afterwards.
///
/// # Errors
/// `kill(2)`'s; ESRCH if there is no such process, EINVAL for a number that is no signal.
pub fn send_signal(pid: u32, signal: u32) -> io::Result<()> {
    let (Ok(pid), Ok(signal)) = (i32::try_from(pid), i32::try_from(signal)) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    if pid <= 0 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: kill touches no memory.
    check(unsafe { libc::kill(pid, signal) })
}

/// Sends a signal to the process of a pidfd, whoever its parent is.
///
/// # Errors
/// `pidfd_send_signal(2)`'s; ESRCH if it has ended.
pub fn send_signal_by(pidfd: BorrowedFd<'_>, signal: u32) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed and stands for kill(2)'s.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How the process of a pidfd has ended, told by the kernel even after it was reaped by another (Linux 6.15,
/// `PIDFD_GET_INFO`). `None`: it has not ended, or the kernel does not tell.
#[must_use]
pub fn exit_status_of(pidfd: BorrowedFd<'_>) -> Option<u32> {
    /// `include/uapi/linux/pidfd.h`: the first version of the structure.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        mask: u64,
        cgroup: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    const EXIT: u64 = 1 << 3;
    // _IOWR(0xFF, 11, struct pidfd_info)
    const PIDFD_GET_INFO: libc::c_ulong = (3 << 30) | ((size_of::<Info>() as libc::c_ulong) << 16) | (0xff << 8) | 11;
    let mut info = Info { mask: EXIT, ..Info::default() };
    // SAFETY: the kernel writes at most the size that the request's number holds, which is the structure's.
    let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO as _, &raw mut info) };
    if result != 0 || info.mask & EXIT == 0 {
        return None;
    }
    let signal = info.exit_code & 0x7f;
    let code = (info.exit_code >> 8) & 0xff;
    Some(if signal == 0 { code } else { 128 + signal }.unsigned_abs())
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_threads_do_not_fork() {
        // The test harness has a thread beside this one.
        assert_eq!(fork().expect_err("refused").kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn an_ended_child_stays_until_it_is_reaped() {
        let mut child = std::process::Command::new("/bin/sh").args(["-c", "kill -9 $$"]).spawn().expect("sh");
        let pid = child.id();
        let found = loop {
            if let Some(found) = ended_child(Some(pid)).expect("a child") {
                break found;
            }
            std::thread::yield_now();
        };
        assert_eq!(found, Exited { pid, status: 137 });
        assert_eq!(ended_child(Some(pid)).expect("still there"), Some(found));
        let pidfd = crate::pidfd::open(i32::try_from(pid).expect("a pid")).expect("pidfd");
        assert_eq!(reap(pid).expect("there"), Some(found));
        // None where the kernel is older than 6.15.
        assert!(matches!(exit_status_of(std::os::fd::AsFd::as_fd(&pidfd)), None | Some(137)));
        assert!(ended_child(Some(pid)).is_err());
        assert!(child.wait().is_err());
    }
}
