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

/// How many descriptors one message may carry here.
const DESCRIPTORS_MAX: usize = 8;
const CONTROL_BYTES: usize = 64;

/// Sends one message, with descriptors. Never raises SIGPIPE.
///
/// # Errors
/// The kernel's answer; `EPIPE` when the peer is gone.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    assert!(descriptors.len() <= DESCRIPTORS_MAX, "at most eight descriptors a message");
    let mut iov = libc::iovec { iov_base: bytes.as_ptr() as *mut libc::c_void, iov_len: bytes.len() };
    let mut control = Control { bytes: [0; CONTROL_BYTES] };
    // SAFETY: a zeroed msghdr is valid; every pointer put into it outlives the call; CMSG_SPACE of eight descriptors
    // (16 + 32 bytes) fits the aligned control buffer, and the data written is within it.
    let ret = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        if !descriptors.is_empty() {
            let size = size_of::<i32>() * descriptors.len();
            message.msg_control = (&raw mut control).cast();
            message.msg_controllen = libc::CMSG_SPACE(size as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size as u32) as _;
            let data = libc::CMSG_DATA(header).cast::<i32>();
            for (index, fd) in descriptors.iter().enumerate() {
                data.add(index).write_unaligned(fd.as_raw_fd());
            }
        }
        retry(|| libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) as libc::c_long)
    };
    ret.map_err(|e| Error::new("sendmsg", "", e))?;
    Ok(())
}

/// A control buffer with the alignment of `cmsghdr`.
#[repr(C, align(8))]
struct Control {
    bytes: [u8; CONTROL_BYTES],
}

/// Receives one message of at most `length_max` bytes, with its descriptors (close-on-exec). Empty: the peer is gone.
///
/// # Errors
/// The kernel's answer; a message that was cut off is invalid.
pub fn receive(socket: BorrowedFd<'_>, length_max: usize) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0u8; length_max];
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = Control { bytes: [0; CONTROL_BYTES] };
    let mut descriptors = Vec::new();
    // SAFETY: a zeroed msghdr is valid; every pointer put into it outlives the call; the control messages are walked
    // with the kernel's own macros within the length that it reports, and each descriptor is taken once.
    let (length, flags) = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = CONTROL_BYTES as _;
        let length = retry(|| libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) as libc::c_long)
            .map_err(|e| Error::new("recvmsg", "", e))?;
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let count = ((*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize) / size_of::<i32>();
                let data = libc::CMSG_DATA(header).cast::<i32>();
                descriptors.extend((0..count).map(|index| own(data.add(index).read_unaligned().into())));
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
        (length as usize, message.msg_flags)
    };
    if flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(Error::invalid("recvmsg", "", "the message was cut off"));
    }
    bytes.truncate(length);
    Ok((bytes, descriptors))
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
