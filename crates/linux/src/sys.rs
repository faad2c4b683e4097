//! The raw call, EINTR in one place, and strings for the kernel.

use std::ffi::CString;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::{Error, Result};

/// Turns a call's return value into a result, reading errno at once.
pub(crate) fn check(ret: libc::c_long) -> io::Result<libc::c_long> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// Repeats a call until it is not interrupted by a signal.
pub(crate) fn retry(mut call: impl FnMut() -> libc::c_long) -> io::Result<libc::c_long> {
    loop {
        match check(call()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Takes ownership of a descriptor that the kernel just returned.
pub(crate) fn own(raw: libc::c_long) -> OwnedFd {
    // SAFETY: callers pass a descriptor that a system call returned to them in this very expression, so nobody else
    // owns it.
    unsafe { OwnedFd::from_raw_fd(raw as i32) }
}

/// A path for the kernel.
///
/// # Errors
/// When the path has a NUL byte within.
pub(crate) fn cpath(call: &'static str, path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::invalid(call, path.display().to_string(), "the path has a NUL byte"))
}

/// A string for the kernel.
///
/// # Errors
/// When the string has a NUL byte within.
pub(crate) fn cstr(call: &'static str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::invalid(call, text, "the string has a NUL byte"))
}
