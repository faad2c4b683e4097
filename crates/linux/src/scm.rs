//! Descriptors over unix sockets (`SCM_RIGHTS`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg,
    sendmsg,
};

/// The most descriptors that come with one message; what is beyond is closed by the kernel.
pub const DESCRIPTORS_MAX: usize = 8;

/// Sends bytes, and with the first of them the descriptors. Answers how many bytes went.
///
/// # Errors
/// `sendmsg(2)`'s; `InvalidInput` for more than [`DESCRIPTORS_MAX`].
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
    }
    Ok(rustix::io::retry_on_intr(|| sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL))?)
}

/// Receives bytes, and what descriptors came with them (closed on exec). 0 bytes: the end.
///
/// # Errors
/// `recvmsg(2)`'s.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    receive_flagged(socket, buffer).map(|(bytes, fds, _)| (bytes, fds))
}

/// As [`receive`], of a message that must not have been cut off.
pub(crate) fn receive_whole(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let (bytes, fds, flags) = receive_flagged(socket, buffer)?;
    if flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the message was cut off"));
    }
    Ok((bytes, fds))
}

fn receive_flagged(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>, ReturnFlags)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message =
        rustix::io::retry_on_intr(|| recvmsg(&socket, &mut [IoSliceMut::new(&mut *buffer)], &mut control, RecvFlags::CMSG_CLOEXEC))?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    Ok((message.bytes, fds, message.flags))
}

/// Connects to a unix socket without waiting; the stream is non-blocking and closed on exec.
///
/// # Errors
/// `socket(2)`'s and `connect(2)`'s; `WouldBlock` if the listener's queue is full.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_descriptor_goes_across() {
        let (left, right) = UnixStream::pair().expect("pair");
        let (mut reader, writer) = std::io::pipe().expect("pipe");
        assert_eq!(send(&left, b"x", &[writer.as_fd()]).expect("sent"), 1);
        drop(writer);
        let mut buffer = [0; 8];
        let (bytes, fds) = receive(&right, &mut buffer).expect("received");
        assert_eq!((bytes, fds.len()), (1, 1));
        crate::pipes::write(&fds[0], b"hello").expect("room");
        drop(fds);
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("utf-8");
        assert_eq!(text, "hello");
        drop(left);
        assert_eq!(receive(&right, &mut buffer).expect("end").0, 0);
    }
}
