//! FIFOs and pipes: making, opening, copying without consuming.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::pipe::SpliceFlags;

/// How a FIFO is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads, without waiting for a writer.
    Read,
    /// Writes; ENXIO if nobody reads.
    Write,
    /// Both: never waits, never fails for want of the other side, and keeps the other side from seeing an end.
    Both,
}

/// Makes a FIFO, in place of one that is there already.
///
/// # Errors
/// `mknodat(2)`'s; `AlreadyExists` if there is something that is not a FIFO.
pub fn make_fifo(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_fifo()) {
        std::fs::remove_file(path)?;
    }
    Ok(rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, Mode::from_raw_mode(mode), 0)?)
}

/// Opens a FIFO, non-blocking and closed on exec; what is not a FIFO is refused.
///
/// # Errors
/// `open(2)`'s; `InvalidInput` if it is not a FIFO.
pub fn open_fifo(path: &Path, access: Access) -> io::Result<OwnedFd> {
    let access = match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::WRONLY,
        Access::Both => OFlags::RDWR,
    };
    let fd = rustix::fs::open(path, access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())?;
    let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
    if kind != rustix::fs::FileType::Fifo {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a FIFO"));
    }
    Ok(fd)
}

/// Makes a descriptor blocking or not (for every process that shares its open file description).
///
/// # Errors
/// `fcntl(2)`'s.
pub fn set_nonblocking(fd: impl AsFd, nonblocking: bool) -> io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(&fd)?;
    flags.set(OFlags::NONBLOCK, nonblocking);
    Ok(rustix::fs::fcntl_setfl(fd, flags)?)
}

/// A pipe (reading end, writing end), non-blocking and closed on exec.
///
/// # Errors
/// `pipe2(2)`'s.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::pipe::{PipeFlags, pipe_with};
    Ok(pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?)
}

/// Copies the head of a pipe to another pipe and leaves it where it is. 0: no writer is left and it is empty.
///
/// # Errors
/// `tee(2)`'s; `WouldBlock` if it is empty.
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, bytes: usize) -> io::Result<usize> {
    Ok(rustix::io::retry_on_intr(|| rustix::pipe::tee(from, to, bytes, SpliceFlags::NONBLOCK))?)
}

/// Takes `bytes` bytes, which must be there, off the head of a pipe, by moving them to `/dev/null` (`sink`).
///
/// # Errors
/// `splice(2)`'s; `UnexpectedEof` if fewer were there.
pub fn discard(from: BorrowedFd<'_>, sink: &File, mut bytes: usize) -> io::Result<()> {
    while bytes > 0 {
        let moved =
            rustix::io::retry_on_intr(|| rustix::pipe::splice(from, None, sink, None, bytes, SpliceFlags::NONBLOCK | SpliceFlags::MOVE))?;
        if moved == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes -= moved;
    }
    Ok(())
}

/// Reads what is there. 0: the end.
///
/// # Errors
/// `read(2)`'s; `WouldBlock` if nothing is there.
pub fn read(fd: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(rustix::io::retry_on_intr(|| rustix::io::read(&fd, &mut *buffer))?)
}

/// How many bytes a pipe or FIFO holds that nobody has read.
///
/// # Errors
/// `ioctl(2)`'s.
pub fn unread(fd: impl AsFd) -> io::Result<u64> {
    Ok(rustix::io::ioctl_fionread(fd)?)
}

/// Writes what fits.
///
/// # Errors
/// `write(2)`'s; `WouldBlock` if nothing fits, `BrokenPipe` if nobody reads (SIGPIPE is to be ignored).
pub fn write(fd: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    Ok(rustix::io::retry_on_intr(|| rustix::io::write(&fd, bytes))?)
}

/// Gives a file to a user and group.
///
/// # Errors
/// `fchownat(2)`'s.
pub fn give_to(path: &Path, uid: u32, gid: u32) -> io::Result<()> {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))
}

/// Sets a terminal's size, in characters.
///
/// # Errors
/// `ioctl(TIOCSWINSZ)`'s.
pub fn set_window(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tee_leaves_and_discard_takes() {
        let (from, into) = pipe().expect("pipe");
        let (copy, copy_into) = pipe().expect("pipe");
        assert_eq!(write(&into, b"one\ntwo\n").expect("room"), 8);
        assert_eq!(tee(from.as_fd(), copy_into.as_fd(), 64).expect("data"), 8);
        let mut buffer = [0; 64];
        assert_eq!(read(&copy, &mut buffer).expect("data"), 8);
        let null = File::options().write(true).open("/dev/null").expect("null");
        discard(from.as_fd(), &null, 4).expect("there");
        assert_eq!(read(&from, &mut buffer).expect("data"), 4);
        assert_eq!(&buffer[..4], b"two\n");
        assert_eq!(tee(from.as_fd(), copy_into.as_fd(), 1).expect_err("empty").kind(), io::ErrorKind::WouldBlock);
        drop(into);
        assert_eq!(tee(from.as_fd(), copy_into.as_fd(), 1).expect("end"), 0);
    }

    #[test]
    fn only_fifos_open() {
        assert_eq!(open_fifo(Path::new("/dev/null"), Access::Both).expect_err("refused").kind(), io::ErrorKind::InvalidInput);
    }
}
