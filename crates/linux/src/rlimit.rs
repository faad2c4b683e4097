//! Resource limits. Source: getrlimit(2).

use crate::sys::check;
use crate::{Error, Result};

/// The names by which runtime-spec calls the limits, and their numbers.
const NAMES: [(&str, u32); 16] = [
    ("RLIMIT_CPU", 0),
    ("RLIMIT_FSIZE", 1),
    ("RLIMIT_DATA", 2),
    ("RLIMIT_STACK", 3),
    ("RLIMIT_CORE", 4),
    ("RLIMIT_RSS", 5),
    ("RLIMIT_NPROC", 6),
    ("RLIMIT_NOFILE", 7),
    ("RLIMIT_MEMLOCK", 8),
    ("RLIMIT_AS", 9),
    ("RLIMIT_LOCKS", 10),
    ("RLIMIT_SIGPENDING", 11),
    ("RLIMIT_MSGQUEUE", 12),
    ("RLIMIT_NICE", 13),
    ("RLIMIT_RTPRIO", 14),
    ("RLIMIT_RTTIME", 15),
];

/// The number of a limit by its name.
pub fn number(name: &str) -> Option<u32> {
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

/// A soft and a hard limit; `u64::MAX` is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What holds.
    pub soft: u64,
    /// What the process may raise it to.
    pub hard: u64,
}

/// This process' limit.
///
/// # Errors
/// The kernel's answer.
pub fn get(number: u32) -> Result<Limit> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer outlives the call; no new limit is given.
    let ret = unsafe { libc::syscall(libc::SYS_prlimit64, 0, number, std::ptr::null::<libc::rlimit64>(), &raw mut limit) };
    check(ret).map_err(|e| Error::new("get rlimit type", number.to_string(), e))?;
    Ok(Limit { soft: limit.rlim_cur, hard: limit.rlim_max })
}

/// Sets the limit of process `pid` (0: this one).
///
/// # Errors
/// `EPERM` for a hard limit above the present one without CAP_SYS_RESOURCE.
pub fn set(pid: i32, number: u32, limit: Limit) -> Result<()> {
    let limit = libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard };
    // SAFETY: the pointer outlives the call; the old limit is not asked for.
    let ret = unsafe { libc::syscall(libc::SYS_prlimit64, pid, number, &raw const limit, std::ptr::null::<libc::rlimit64>()) };
    check(ret).map_err(|e| Error::new("set rlimit type", number.to_string(), e))?;
    Ok(())
}
