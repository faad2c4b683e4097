//! Pseudo-terminals. Source: pty(7), ioctl_tty(2).

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use crate::sys::{check, own};
use crate::{Error, Result};

const TIOCGPTPEER: u64 = 0x5441;

/// The master of a new terminal, opened from this `ptmx` (O_PATH descriptor of the node in a devpts).
///
/// # Errors
/// The kernel's answer.
pub fn open_master(ptmx: BorrowedFd<'_>) -> Result<OwnedFd> {
    let fd = crate::fs::open_plain(&crate::fs::descriptor_path(ptmx), libc::O_RDWR | libc::O_NOCTTY)?;
    let unlock: libc::c_int = 0;
    // SAFETY: the pointer to the lock state outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) }.into())
        .map_err(|e| Error::new("unlock terminal", "ptmx", e))?;
    Ok(fd)
}

/// The slave of a master, found without any path (`TIOCGPTPEER`, Linux 4.13).
///
/// # Errors
/// The kernel's answer.
pub fn open_slave(master: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: only integers are passed.
    let ret = unsafe { libc::ioctl(master.as_raw_fd(), TIOCGPTPEER as _, flags) };
    check(ret.into()).map(|fd| own(fd as libc::c_long)).map_err(|e| Error::new("open terminal slave", "", e))
}

/// Sets the size in characters.
///
/// # Errors
/// The kernel's answer.
pub fn set_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the pointer outlives the call.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into())
        .map_err(|e| Error::new("set terminal size", format!("{rows}x{columns}"), e))?;
    Ok(())
}

/// The size in characters: rows, columns.
///
/// # Errors
/// `ENOTTY` when it is no terminal.
pub fn size(terminal: BorrowedFd<'_>) -> Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the pointer outlives the call.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) }.into())
        .map_err(|e| Error::new("get terminal size", "", e))?;
    Ok((size.ws_row, size.ws_col))
}

/// Makes the terminal the controlling one of this process, which must be a session's leader.
///
/// # Errors
/// The kernel's answer.
pub fn set_controlling(terminal: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: only integers are passed.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }.into())
        .map_err(|e| Error::new("set controlling terminal", "", e))?;
    Ok(())
}

/// A terminal's settings, to be restored.
pub struct Settings(libc::termios);

/// Passes every byte through the terminal as it is (cfmakeraw(3)); answers the settings before.
///
/// # Errors
/// `ENOTTY` when it is no terminal.
pub fn make_raw(terminal: BorrowedFd<'_>) -> Result<Settings> {
    // SAFETY: a zeroed termios is valid, and the pointers outlive the calls.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    check(unsafe { libc::tcgetattr(terminal.as_raw_fd(), &mut settings) }.into())
        .map_err(|e| Error::new("get terminal settings", "", e))?;
    let before = Settings(settings);
    // SAFETY: as above.
    unsafe { libc::cfmakeraw(&mut settings) };
    apply(terminal, &settings)?;
    Ok(before)
}

/// Restores what [`make_raw`] changed.
///
/// # Errors
/// The kernel's answer.
pub fn restore(terminal: BorrowedFd<'_>, settings: &Settings) -> Result<()> {
    apply(terminal, &settings.0)
}

fn apply(terminal: BorrowedFd<'_>, settings: &libc::termios) -> Result<()> {
    // SAFETY: the pointer outlives the call.
    check(unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, settings) }.into())
        .map_err(|e| Error::new("set terminal settings", "", e))?;
    Ok(())
}

/// Whether the descriptor is a terminal.
pub fn is_terminal(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: only an integer is passed.
    (unsafe { libc::isatty(fd.as_raw_fd()) }) == 1
}
