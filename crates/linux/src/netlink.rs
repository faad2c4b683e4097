//! Netlink, synchronously: a message builder with nested attributes, a socket, and a parser.
//!
//! Only what rtnetlink, nfnetlink and ctnetlink need. A [`Socket`] belongs to the network namespace of the thread that opened
//! it, wherever it is used later. Facts: `include/uapi/linux/netlink.h`, netlink(7).

#[cfg(test)]
mod fuzz;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `NLM_F_REQUEST`: every message that asks the kernel for something.
pub const F_REQUEST: u16 = 0x1;
/// `NLM_F_ACK`: answer success as well as failure.
pub const F_ACK: u16 = 0x4;
/// `NLM_F_DUMP` (`NLM_F_ROOT | NLM_F_MATCH`).
pub const F_DUMP: u16 = 0x300;
/// `NLM_F_REPLACE`.
pub const F_REPLACE: u16 = 0x100;
/// `NLM_F_EXCL`.
pub const F_EXCL: u16 = 0x200;
/// `NLM_F_CREATE`.
pub const F_CREATE: u16 = 0x400;
/// `NLM_F_APPEND`.
pub const F_APPEND: u16 = 0x800;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const HEADER_LEN: usize = 16;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;
const SOL_NETLINK: libc::c_int = 270;
const NETLINK_CAP_ACK: libc::c_int = 10;
const NETLINK_EXT_ACK: libc::c_int = 11;
/// A dump that goes on for longer than this many datagrams is refused (about 1 GiB).
const DUMP_DATAGRAMS_MAX: usize = 16_384;
/// The send buffer that every host allows (`net.core.wmem_default`).
const SEND_BUFFER_BYTES: usize = 212_992;
const RECV_BUFFER_BYTES: usize = 64 * 1024;

/// What went wrong between this process and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket itself failed (no permission, no memory, lost messages).
    #[error("failed to {act} on a netlink socket")]
    Socket { act: &'static str, source: io::Error },
    /// The kernel refused a request; `detail` is its own text where it gave one.
    #[error("kernel refused to {act}{}", detail.as_ref().map(|d| format!(" ({d})")).unwrap_or_default())]
    Refused { act: String, detail: Option<String>, source: io::Error },
    /// A reply that is shorter than its own lengths say, or that never ends.
    #[error("malformed netlink reply: {what}")]
    Malformed { what: &'static str },
    /// A request that does not fit the protocol (an attribute above 64 KiB).
    #[error("request to {act} is too large for netlink")]
    TooLarge { act: String },
    /// No acknowledgement came although the kernel processes requests in the sender's context.
    #[error("kernel did not answer the request to {act}")]
    NoAnswer { act: String },
}

impl Error {
    /// The errno of a refusal, if the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Socket { source, .. } | Self::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Whether the kernel said that the object does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self.errno(), Some(libc::ENOENT | libc::ENODEV | libc::ESRCH | libc::EADDRNOTAVAIL))
    }

    /// Whether the kernel said that the object exists already.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(libc::EEXIST)
    }
}

/// One or more requests, sent to the kernel in one `sendto`.
///
/// Messages are begun with [`Batch::begin`], filled with [`Batch::put`] and [`Batch::attr`], and ended by the next `begin`.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    /// Start of the message being built, if any.
    open: Option<usize>,
    /// What each message does, in order; the sequence number is the index plus one.
    acts: Vec<(String, bool)>,
    too_large: bool,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether no message has been begun.
    pub fn is_empty(&self) -> bool {
        self.acts.is_empty()
    }

    /// Number of messages.
    pub fn len(&self) -> usize {
        self.acts.len()
    }

    /// Begins a message of `kind` with `flags` (`F_REQUEST` is added). `act` names it in errors: "add link veth0".
    pub fn begin(&mut self, kind: u16, flags: u16, act: impl Into<String>) -> &mut Self {
        self.finish();
        self.acts.push((act.into(), flags & F_ACK != 0));
        self.open = Some(self.bytes.len());
        let seq = self.acts.len() as u32;
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | F_REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&seq.to_ne_bytes());
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self
    }

    /// Appends raw bytes (a fixed header such as `ifinfomsg`), padded to four.
    pub fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// Appends an attribute.
    pub fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let Ok(len) = u16::try_from(value.len() + 4) else {
            self.too_large = true;
            return self;
        };
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.put(value)
    }

    /// Appends an attribute of one host-endian 32-bit number.
    pub fn attr_u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Appends an attribute of one big-endian 32-bit number, as nfnetlink has them.
    pub fn attr_be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_be_bytes())
    }

    /// Appends a NUL-terminated string attribute.
    pub fn attr_str(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Appends a nested attribute whose content `fill` writes.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0, 0]);
        self.bytes.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        fill(self);
        match u16::try_from(self.bytes.len() - start) {
            Ok(len) => self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes()),
            Err(_) => self.too_large = true,
        }
        self
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }

    fn finish(&mut self) {
        if let Some(start) = self.open.take() {
            let len = (self.bytes.len() - start) as u32;
            self.bytes[start..start + 4].copy_from_slice(&len.to_ne_bytes());
        }
    }

    /// The encoded messages.
    pub fn encode(&mut self) -> Result<&[u8], Error> {
        self.finish();
        if self.too_large {
            return Err(Error::TooLarge { act: self.summary() });
        }
        Ok(&self.bytes)
    }

    fn summary(&self) -> String {
        self.acts.last().map(|(act, _)| act.clone()).unwrap_or_default()
    }

    fn act(&self, seq: u32) -> String {
        let index = (seq as usize).wrapping_sub(1);
        self.acts.get(index).map_or_else(|| self.summary(), |(act, _)| act.clone())
    }
}

/// A netlink protocol family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `NETLINK_ROUTE`: links, addresses, routes.
    Route,
    /// `NETLINK_NETFILTER`: nftables, conntrack.
    Netfilter,
}

/// A netlink socket of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

/// One message of a dump: its type and its payload (after the 16-byte header).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// `nlmsg_type`.
    pub kind: u16,
    /// Everything behind the header.
    pub payload: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Socket`] with the failing call.
    pub fn open(family: Family) -> Result<Self, Error> {
        let protocol = match family {
            Family::Route => None,
            Family::Netfilter => Some(rustix::net::netlink::NETFILTER),
        };
        let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)
            .map_err(|e| Error::Socket { act: "open", source: e.into() })?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, 0)).map_err(|e| Error::Socket { act: "bind", source: e.into() })?;
        for option in [NETLINK_CAP_ACK, NETLINK_EXT_ACK] {
            set_netlink_option(&fd, option);
        }
        Ok(Self { fd, buffer: vec![0; RECV_BUFFER_BYTES] })
    }

    /// Sends all messages of `batch` and reads what the kernel says to each.
    ///
    /// Requests that are no dumps are carried out within the send itself, so every refusal is already in the receive queue when it
    /// returns: messages without `F_ACK` count as done when no error is there.
    ///
    /// # Errors
    /// The first refusal, with the `act` of its message; [`Error::NoAnswer`] if a message with `F_ACK` got none.
    pub fn transact(&mut self, mut batch: Batch) -> Result<(), Error> {
        if batch.is_empty() {
            return Ok(());
        }
        self.send(batch.encode()?)?;
        let mut acknowledged = vec![false; batch.len()];
        let mut first: Option<Error> = None;
        while let Some(len) = self.recv(RecvFlags::DONTWAIT)? {
            for message in Messages(&self.buffer[..len]) {
                let message = message?;
                if message.kind != NLMSG_ERROR {
                    continue;
                }
                if let Some(slot) = acknowledged.get_mut((message.seq as usize).wrapping_sub(1)) {
                    *slot = true;
                }
                if let Some((source, detail)) = refusal(&message)? {
                    first.get_or_insert(Error::Refused { act: batch.act(message.seq), detail, source });
                }
            }
        }
        if let Some(error) = first {
            return Err(error);
        }
        let missing = batch.acts.iter().zip(&acknowledged).find(|((_, ack), seen)| *ack && !**seen);
        match missing {
            Some(((act, _), _)) => Err(Error::NoAnswer { act: act.clone() }),
            None => Ok(()),
        }
    }

    /// Sends the one request of `batch` and collects its replies: for a dump until the kernel ends it, else until the acknowledgement.
    ///
    /// # Errors
    /// A refusal; [`Error::Malformed`] for a reply that does not parse or does not end.
    pub fn request(&mut self, mut batch: Batch) -> Result<Vec<Reply>, Error> {
        self.send(batch.encode()?)?;
        let mut replies = Vec::new();
        for _ in 0..DUMP_DATAGRAMS_MAX {
            let Some(len) = self.recv(RecvFlags::empty())? else {
                continue;
            };
            for message in Messages(&self.buffer[..len]) {
                let message = message?;
                match message.kind {
                    NLMSG_DONE => return Ok(replies),
                    NLMSG_OVERRUN => return Err(Error::Malformed { what: "overrun" }),
                    NLMSG_ERROR => {
                        return match refusal(&message)? {
                            None => Ok(replies),
                            Some((source, detail)) => Err(Error::Refused { act: batch.act(message.seq), detail, source }),
                        };
                    }
                    kind => replies.push(Reply { kind, payload: message.payload.to_vec() }),
                }
            }
        }
        Err(Error::Malformed { what: "endless dump" })
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Error> {
        if bytes.len() > SEND_BUFFER_BYTES / 2 {
            set_send_buffer(&self.fd, bytes.len());
        }
        let kernel = SocketAddrNetlink::new(0, 0);
        loop {
            match rustix::net::sendto(&self.fd, bytes, SendFlags::empty(), &kernel) {
                Ok(sent) if sent == bytes.len() => return Ok(()),
                Ok(_) => return Err(Error::Malformed { what: "short send" }),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => {
                    return Err(Error::Socket { act: "send", source: e.into() });
                }
            }
        }
    }

    /// One datagram into the buffer; `None` when nothing is there (only with `DONTWAIT`).
    fn recv(&mut self, flags: RecvFlags) -> Result<Option<usize>, Error> {
        loop {
            match rustix::net::recv(&self.fd, &mut self.buffer[..], flags) {
                Ok((len, _)) => return Ok(Some(len)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(e) => {
                    return Err(Error::Socket { act: "receive", source: e.into() });
                }
            }
        }
    }
}

fn set_netlink_option(fd: &OwnedFd, option: libc::c_int) {
    let on: libc::c_int = 1;
    // SAFETY: the fd is open, and the value pointer and length describe one live c_int. A kernel that does not know the option
    // only leaves out its text or truncation, so the result is not needed.
    let _ = unsafe {
        libc::setsockopt(fd.as_fd().as_raw_fd(), SOL_NETLINK, option, (&raw const on).cast(), size_of::<libc::c_int>() as libc::socklen_t)
    };
}

/// Makes room for one message of `len` bytes, beyond the limit for those who are not root. What does not succeed shows when it is sent.
fn set_send_buffer(fd: &OwnedFd, len: usize) {
    // The kernel's own structures stand in the buffer too, and it doubles the value for them.
    let bytes = libc::c_int::try_from(len).unwrap_or(libc::c_int::MAX);
    // SAFETY: the fd is open, and the value pointer and length describe one live c_int.
    let _ = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_SNDBUFFORCE,
            (&raw const bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
}

struct RawMessage<'a> {
    kind: u16,
    flags: u16,
    seq: u32,
    payload: &'a [u8],
}

/// The messages of one datagram.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Result<RawMessage<'a>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.0;
        if bytes.len() < HEADER_LEN {
            return None;
        }
        let len = u32_at(bytes, 0) as usize;
        if len < HEADER_LEN || len > bytes.len() {
            self.0 = &[];
            return Some(Err(Error::Malformed { what: "message length" }));
        }
        self.0 = bytes.get(align(len)..).unwrap_or(&[]);
        Some(Ok(RawMessage { kind: u16_at(bytes, 4), flags: u16_at(bytes, 6), seq: u32_at(bytes, 8), payload: &bytes[HEADER_LEN..len] }))
    }
}

/// The errno and the kernel's text of an `NLMSG_ERROR`, or `None` for an acknowledgement.
fn refusal(message: &RawMessage<'_>) -> Result<Option<(io::Error, Option<String>)>, Error> {
    if message.payload.len() < 4 {
        return Err(Error::Malformed { what: "error message" });
    }
    let code = u32_at(message.payload, 0) as i32;
    if code == 0 {
        return Ok(None);
    }
    let mut detail = None;
    if message.flags & NLM_F_ACK_TLVS != 0 && message.payload.len() >= 4 + HEADER_LEN {
        // Behind the errno stands the header of the request, and its payload too unless the reply is capped.
        let original = if message.flags & NLM_F_CAPPED != 0 { HEADER_LEN } else { u32_at(message.payload, 4) as usize };
        let rest = message.payload.get(4 + align(original)..).unwrap_or(&[]);
        detail = Attrs(rest)
            .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
            .map(|(_, value)| String::from_utf8_lossy(trim_nul(value)).into_owned());
    }
    Ok(Some((io::Error::from_raw_os_error(code.saturating_neg()), detail)))
}

/// The attributes in a byte slice, as (type without flag bits, value). Ends at the first attribute that does not fit.
#[derive(Debug, Clone, Copy)]
pub struct Attrs<'a>(pub &'a [u8]);

impl<'a> Iterator for Attrs<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.0;
        if bytes.len() < 4 {
            return None;
        }
        let len = usize::from(u16_at(bytes, 0));
        if len < 4 || len > bytes.len() {
            self.0 = &[];
            return None;
        }
        self.0 = bytes.get(align(len)..).unwrap_or(&[]);
        Some((u16_at(bytes, 2) & NLA_TYPE_MASK, &bytes[4..len]))
    }
}

/// Cuts a C string at its first NUL.
pub fn trim_nul(bytes: &[u8]) -> &[u8] {
    bytes.iter().position(|b| *b == 0).map_or(bytes, |end| &bytes[..end])
}

fn align(len: usize) -> usize {
    len.saturating_add(3) & !3
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_attributes_round_trip() {
        let mut batch = Batch::new();
        batch.begin(16, 0, "test").attr_str(3, "lo").nest(18, |b| {
            b.attr_str(1, "veth").attr_u32(2, 7);
        });
        let bytes = batch.encode().unwrap().to_vec();
        let message = Messages(&bytes).next().unwrap().unwrap();
        assert_eq!((message.kind, message.seq), (16, 1));
        let attrs: Vec<_> = Attrs(message.payload).collect();
        assert_eq!(attrs[0], (3, &b"lo\0"[..]));
        let inner: Vec<_> = Attrs(attrs[1].1).collect();
        assert_eq!(inner, vec![(1, &b"veth\0"[..]), (2, &7u32.to_ne_bytes()[..])]);
    }

    #[test]
    fn truncated_input_never_panics() {
        let mut batch = Batch::new();
        batch.begin(16, F_ACK, "test").attr_str(3, "eth0");
        let bytes = batch.encode().unwrap().to_vec();
        for cut in 0..bytes.len() {
            for message in Messages(&bytes[..cut]).flatten() {
                assert!(Attrs(message.payload).count() <= 1);
            }
        }
    }

    #[test]
    fn oversized_attributes_are_an_error() {
        let mut batch = Batch::new();
        batch.begin(16, 0, "carry too much").attr(1, &vec![0; 70_000]);
        assert!(matches!(batch.encode(), Err(Error::TooLarge { .. })));
    }
}
