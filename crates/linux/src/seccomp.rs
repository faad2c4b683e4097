//! Loading a seccomp filter. Source: seccomp(2). Compiling one is the caller's part.

use std::os::fd::OwnedFd;

use crate::bpf::Instruction;
use crate::sys::{check, own};
use crate::{Error, Result};

const SECCOMP_SET_MODE_FILTER: u32 = 1;

/// Flags of `SECCOMP_SET_MODE_FILTER`.
pub mod flags {
    /// All threads.
    pub const TSYNC: u64 = 1;
    /// Log what is not allowed.
    pub const LOG: u64 = 2;
    /// Without the speculative store bypass mitigation.
    pub const SPEC_ALLOW: u64 = 4;
    /// Answer a listener for `SECCOMP_RET_USER_NOTIF`.
    pub const NEW_LISTENER: u64 = 8;
    /// A notified process waits killable only.
    pub const WAIT_KILLABLE_RECV: u64 = 32;
}

/// The most instructions that the kernel takes in one filter.
pub const INSTRUCTIONS_MAX: usize = 4096;

/// Loads a filter into this process; with `flags::NEW_LISTENER` answers the listener. Takes CAP_SYS_ADMIN in the
/// user namespace, or no-new-privileges.
///
/// # Errors
/// The kernel's answer.
pub fn load(filter: &[Instruction], flags: u64) -> Result<Option<OwnedFd>> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast::<libc::sock_filter>().cast_mut() };
    // SAFETY: Instruction has the layout of sock_filter, the count is given, and both outlive the call, which only
    // reads them.
    let ret = unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    let ret = check(ret).map_err(|e| Error::new("load seccomp filter", format!("{} instructions", filter.len()), e))?;
    Ok((flags & self::flags::NEW_LISTENER != 0).then(|| own(ret)))
}
