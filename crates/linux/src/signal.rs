//! Signals: names, masks and dispositions. Source: signal(7).

use crate::sys::check;
use crate::{Error, Result};

const NAMES: [(&str, i32); 37] = [
    ("ABRT", libc::SIGABRT),
    ("ALRM", libc::SIGALRM),
    ("BUS", libc::SIGBUS),
    ("CHLD", libc::SIGCHLD),
    ("CLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("FPE", libc::SIGFPE),
    ("HUP", libc::SIGHUP),
    ("ILL", libc::SIGILL),
    ("INT", libc::SIGINT),
    ("IO", libc::SIGIO),
    ("IOT", libc::SIGIOT),
    ("KILL", libc::SIGKILL),
    ("PIPE", libc::SIGPIPE),
    ("POLL", libc::SIGPOLL),
    ("PROF", libc::SIGPROF),
    ("PWR", libc::SIGPWR),
    ("QUIT", libc::SIGQUIT),
    ("SEGV", libc::SIGSEGV),
    ("STKFLT", libc::SIGSTKFLT),
    ("STOP", libc::SIGSTOP),
    ("SYS", libc::SIGSYS),
    ("TERM", libc::SIGTERM),
    ("TRAP", libc::SIGTRAP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("UNUSED", libc::SIGSYS),
    ("URG", libc::SIGURG),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("VTALRM", libc::SIGVTALRM),
    ("WINCH", libc::SIGWINCH),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("RTMIN", 34),
    ("RTMAX", 64),
];

/// The last signal's number.
pub const MAX: i32 = 64;

/// A signal by its number, or its name with or without `SIG`, in either case (`TERM`, `sigterm`, `RTMIN+3`).
pub fn parse(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (0..=MAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let (base, offset) = match name.split_once(['+', '-']) {
        Some((base @ ("RTMIN" | "RTMAX"), offset)) => {
            let sign = if name.contains('-') { -1 } else { 1 };
            (base, sign * offset.parse::<i32>().ok()?)
        }
        _ => (name, 0),
    };
    let number = NAMES.iter().find(|(known, _)| *known == base).map(|(_, number)| *number)? + offset;
    (1..=MAX).contains(&number).then_some(number)
}

/// Unblocks all signals and gives each its default effect: what a new program expects to inherit.
///
/// # Errors
/// The kernel's answer.
pub fn reset_all() -> Result<()> {
    for number in (1..=MAX).filter(|n| ![libc::SIGKILL, libc::SIGSTOP, 32, 33].contains(n)) {
        // SAFETY: the default disposition runs no code of ours.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
    // SAFETY: a zeroed set is valid for sigemptyset, and the pointers outlive the calls.
    let ret = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut())
    };
    check(ret.into()).map_err(|e| Error::new("sigprocmask", "", e))?;
    Ok(())
}

/// Blocks these signals, so that they can be waited for (signalfd, [`wait_for`]).
///
/// # Errors
/// The kernel's answer.
pub fn block(signals: &[i32]) -> Result<()> {
    let set = set_of(signals);
    // SAFETY: the pointer outlives the call.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) }.into())
        .map_err(|e| Error::new("sigprocmask", "", e))?;
    Ok(())
}

/// Unblocks these signals: a program that is to end by them may have been started by one that blocks them.
///
/// # Errors
/// The kernel's answer.
pub fn unblock(signals: &[i32]) -> Result<()> {
    let set = set_of(signals);
    // SAFETY: the pointer outlives the call.
    check(unsafe { libc::sigprocmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut()) }.into())
        .map_err(|e| Error::new("sigprocmask", "", e))?;
    Ok(())
}

/// Waits for one of these (blocked) signals; answers its number.
///
/// # Errors
/// The kernel's answer.
pub fn wait_for(signals: &[i32]) -> Result<i32> {
    let set = set_of(signals);
    // SAFETY: the pointer outlives the call; no info is asked for.
    crate::sys::retry(|| unsafe { libc::sigwaitinfo(&set, std::ptr::null_mut()) }.into())
        .map(|n| n as i32)
        .map_err(|e| Error::new("sigwaitinfo", "", e))
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: a zeroed set is valid for sigemptyset, and the pointers outlive the calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn names() {
        for (text, number) in [("9", 9), ("KILL", 9), ("SIGKILL", 9), ("sigterm", 15), ("RTMIN+3", 37), ("0", 0)] {
            assert_eq!(parse(text), Some(number), "{text}");
        }
        for text in ["", "SIG", "NOPE", "65", "-1", "RTMAX+1"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
