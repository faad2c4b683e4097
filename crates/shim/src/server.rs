//! ttrpc connections on an epoll loop: what the shim and the keeper share.
//!
//! Calls come out as [`Call`]s; answers go in by [`Reply`], at any time and in any order. A connection that closes
//! takes its unanswered calls with it, and nothing else.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use linux::event::{Epoll, Interest, Ready};
use linux::scm;
use prost::Message;
use protocols::ttrpc::{self, FrameType, HEADER_BYTES, Request, Response, RpcError, code};

/// Connections at one time; one more is closed as soon as it is accepted.
const CONNECTIONS_MAX: usize = 1024;
/// Answers that a connection may leave unread, in bytes, before it is closed.
const OUTPUT_BYTES_MAX: usize = 16 << 20;
/// Descriptors that a connection may have sent ahead of the request they belong to.
const DESCRIPTORS_MAX: usize = 16;

/// Where an answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    connection: u32,
    stream: u32,
}

/// A request that came in.
#[derive(Debug)]
pub struct Call {
    /// Where to answer it.
    pub reply: Reply,
    /// The request.
    pub request: Request,
    /// The descriptor that came with it.
    pub descriptor: Option<OwnedFd>,
}

/// What an answer carries.
pub type Answer = Result<Vec<u8>, RpcError>;

#[derive(Debug)]
struct Connection {
    socket: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Descriptors that came and have not been given to a request.
    received: VecDeque<OwnedFd>,
    /// Descriptors to send with the byte of `output` at that place.
    to_send: VecDeque<(usize, OwnedFd)>,
}

/// A listener and its connections.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    connections: BTreeMap<u32, Connection>,
    next: u32,
    /// Added to connection ids to make epoll tokens.
    token_base: u64,
    listener_token: u64,
}

impl Server {
    /// Serves on `listener`. Its token is `listener_token`, a connection's is `token_base` + a number below 2^32.
    ///
    /// # Errors
    /// Making it non-blocking, `epoll_ctl(2)`'s.
    pub fn new(epoll: &Epoll, listener: UnixListener, listener_token: u64, token_base: u64) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        epoll.add(&listener, listener_token, Interest::READ)?;
        Ok(Self { listener, connections: BTreeMap::new(), next: 0, token_base, listener_token })
    }

    /// Whether every answer has left.
    #[must_use]
    pub fn flushed(&self) -> bool {
        self.connections.values().all(|connection| connection.output.is_empty())
    }

    /// Takes no further connections.
    pub fn stop_listening(&mut self, epoll: &Epoll) {
        // It may be out of the set already: then there is nothing to do.
        let _ = epoll.delete(&self.listener);
    }

    /// Handles an event of one of this server's tokens; calls are appended to `calls`.
    pub fn on_ready(&mut self, epoll: &Epoll, ready: Ready, calls: &mut Vec<Call>) {
        if ready.token == self.listener_token {
            self.accept(epoll);
            return;
        }
        let Ok(id) = u32::try_from(ready.token.wrapping_sub(self.token_base)) else { return };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let mut open = true;
        if ready.read || ready.hangup {
            open = connection.fill() && connection.split(id, calls);
        }
        if open && ready.write {
            open = connection.flush().is_ok();
        }
        if !open {
            self.connections.remove(&id);
        }
    }

    fn accept(&mut self, epoll: &Epoll) {
        // A failed accept (the peer is gone, descriptors are used up) is told again by the level-triggered listener.
        while let Ok((socket, _)) = self.listener.accept() {
            if self.connections.len() >= CONNECTIONS_MAX || socket.set_nonblocking(true).is_err() {
                continue;
            }
            let id = self.next;
            self.next = self.next.wrapping_add(1);
            if epoll.add(&socket, self.token_base + u64::from(id), Interest::BOTH_EDGE).is_ok() {
                let connection =
                    Connection { socket, input: Vec::new(), output: Vec::new(), received: VecDeque::new(), to_send: VecDeque::new() };
                self.connections.insert(id, connection);
            }
        }
    }

    /// Answers a call; nothing happens if its connection is gone.
    pub fn answer(&mut self, reply: Reply, answer: Answer, descriptor: Option<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&reply.connection) else { return };
        let start = connection.output.len();
        let response = Response::of(answer);
        let framed = ttrpc::encode_frame(&mut connection.output, FrameType::Response, reply.stream, &response);
        if let Err(error) = framed {
            let response = Response::of(Err(RpcError::new(code::RESOURCE_EXHAUSTED, error.to_string())));
            // An error's text is far below the limit.
            let _ = ttrpc::encode_frame(&mut connection.output, FrameType::Response, reply.stream, &response);
        }
        if let Some(descriptor) = descriptor {
            connection.to_send.push_back((start, descriptor));
        }
        if connection.flush().is_err() || connection.output.len() > OUTPUT_BYTES_MAX {
            self.connections.remove(&reply.connection);
        }
    }
}

impl Connection {
    /// Reads what is there. `false`: the connection is at its end or in error.
    fn fill(&mut self) -> bool {
        let mut buffer = [0u8; 4096];
        loop {
            match scm::receive(&self.socket, &mut buffer) {
                Ok((0, _)) => return false,
                Ok((bytes, fds)) => {
                    self.input.extend_from_slice(buffer.get(..bytes).unwrap_or_default());
                    self.received.extend(fds);
                    if self.received.len() > DESCRIPTORS_MAX {
                        return false;
                    }
                    // A frame is whole before more than one is read ahead: input stays below two frames.
                    if self.input.len() > 2 * (ttrpc::DATA_BYTES_MAX + HEADER_BYTES) {
                        return false;
                    }
                }
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }

    /// Takes whole requests off the input. `false`: the peer does not speak ttrpc.
    fn split(&mut self, id: u32, calls: &mut Vec<Call>) -> bool {
        let mut taken = 0;
        let ok = loop {
            let rest = self.input.get(taken..).unwrap_or_default();
            match ttrpc::split_frame(rest) {
                Ok(Some((header, data))) => {
                    taken += HEADER_BYTES + header.length;
                    if header.kind != FrameType::Request as u8 {
                        continue;
                    }
                    let Ok(request) = Request::decode(data) else { break false };
                    let reply = Reply { connection: id, stream: header.stream };
                    // Only the keeper's Put brings one.
                    let descriptor = if request.method == "Put" { self.received.pop_front() } else { None };
                    calls.push(Call { reply, request, descriptor });
                }
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        self.input.drain(..taken);
        if self.input.is_empty() {
            self.input = Vec::new();
        }
        ok
    }

    /// Sends what fits.
    fn flush(&mut self) -> io::Result<()> {
        let mut sent = 0;
        let result = loop {
            let rest = self.output.get(sent..).unwrap_or_default();
            if rest.is_empty() {
                break Ok(());
            }
            let (end, descriptor) = match self.to_send.front() {
                Some((at, fd)) if *at == sent => (self.output.len(), Some(fd)),
                Some((at, _)) => (*at, None),
                None => (self.output.len(), None),
            };
            let part = self.output.get(sent..end).unwrap_or_default();
            let fds: Vec<_> = descriptor.iter().map(|fd| fd.as_fd()).collect();
            match scm::send(&self.socket, part, &fds) {
                Ok(bytes) => {
                    if descriptor.is_some() {
                        self.to_send.pop_front();
                    }
                    sent += bytes;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.output.drain(..sent);
        for (at, _) in &mut self.to_send {
            *at -= sent;
        }
        if self.output.is_empty() {
            self.output = Vec::new();
        }
        result
    }
}
