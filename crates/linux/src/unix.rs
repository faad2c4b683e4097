//! Unix sockets between a parent and its child, and to callers that take a descriptor: packets with descriptors.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::sys::{check, own, retry};
use crate::{Error, Result};

/// Two connected sockets that keep packets apart (`SOCK_SEQPACKET`).
///
/// # Errors
/// The kernel's answer.
pub fn packet_pair() -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0i32; 2];
    // SAFETY: the array has room for two descriptors and outlives the call.
    let ret = unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) };
    check(ret.into()).map_err(|e| Error::new("socketpair", "", e))?;
    Ok((own(fds[0].into()), own(fds[1].into())))
}

fn socket(kind: i32) -> Result<OwnedFd> {
    // SAFETY: only integers are passed.
    let ret = unsafe { libc::socket(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0) };
    check(ret.into()).map(|fd| own(fd as libc::c_long)).map_err(|e| Error::new("socket", "", e))
}

fn address(path: &Path) -> Result<(libc::sockaddr_un, libc::socklen_t)> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: a zeroed address is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(Error::invalid("socket address", path.display().to_string(), "longer than 107 bytes"));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok((address, size_of::<libc::sockaddr_un>() as libc::socklen_t))
}

/// Which kind of unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes.
    Stream,
    /// Packets.
    Packet,
}

impl Kind {
    fn raw(self) -> i32 {
        match self {
            Self::Stream => libc::SOCK_STREAM,
            Self::Packet => libc::SOCK_SEQPACKET,
        }
    }
}

/// A socket that listens at `path` (at most 107 bytes; see [`crate::fs::descriptor_path`] for longer ones).
///
/// # Errors
/// The kernel's answer, with the path.
pub fn listen(kind: Kind, path: &Path, backlog: i32) -> Result<OwnedFd> {
    let fd = socket(kind.raw())?;
    let (address, length) = address(path)?;
    // SAFETY: the address outlives the call and its length is given.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) }.into())
        .map_err(|e| Error::new("bind socket", path.display().to_string(), e))?;
    // SAFETY: only integers are passed.
    check(unsafe { libc::listen(fd.as_raw_fd(), backlog) }.into()).map_err(|e| Error::new("listen", path.display().to_string(), e))?;
    Ok(fd)
}

/// The next connection.
///
/// # Errors
/// The kernel's answer.
pub fn accept(listener: BorrowedFd<'_>) -> Result<OwnedFd> {
    // SAFETY: the peer's address is not asked for.
    retry(|| unsafe { libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) }.into())
        .map(own)
        .map_err(|e| Error::new("accept", "", e))
}

/// A socket connected to the listener at `path`.
///
/// # Errors
/// The kernel's answer, with the path; `ECONNREFUSED` when nobody listens.
pub fn connect(kind: Kind, path: &Path) -> Result<OwnedFd> {
    let fd = socket(kind.raw())?;
    let (address, length) = address(path)?;
    // SAFETY: the address outlives the call and its length is given.
    retry(|| unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), length) }.into())
        .map_err(|e| Error::new("connect to socket", path.display().to_string(), e))?;
    Ok(fd)
}

/// Sends one message, with descriptors. Never raises SIGPIPE.
///
/// # Errors
/// The kernel's answer; `EPIPE` when the peer is gone.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    crate::scm::send(socket, bytes, descriptors).map(drop).map_err(|e| Error::new("sendmsg", "", e))
}

/// Receives one message of at most `length_max` bytes, with its descriptors (close-on-exec). Empty: the peer is gone.
///
/// # Errors
/// The kernel's answer; a message that was cut off is invalid.
pub fn receive(socket: BorrowedFd<'_>, length_max: usize) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0u8; length_max];
    let received = crate::scm::receive_whole(socket, &mut bytes).map_err(|e| Error::new("recvmsg", "", e))?;
    bytes.truncate(received.0);
    Ok((bytes, received.1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn packets_carry_descriptors() {
        let (left, right) = packet_pair().expect("a pair");
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        send(left.as_fd(), b"hello", &[writer.as_fd()]).expect("sent");
        drop(writer);
        let (bytes, mut fds) = receive(right.as_fd(), 16).expect("received");
        assert_eq!((bytes.as_slice(), fds.len()), (b"hello".as_slice(), 1));
        std::fs::File::from(fds.remove(0)).write_all(b"x").expect("written");
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("read");
        assert_eq!(text, "x");
        drop(left);
        assert!(receive(right.as_fd(), 16).expect("the end").0.is_empty());
    }
}
