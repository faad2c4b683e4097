//! Events on their way to the daemon (`TTRPC_ADDRESS`): one at a time, in order, tried again while it is away.
//!
//! The queue is bounded; when it is full the oldest event is dropped and counted. containerd's own shim gives an event up
//! after five tries (15 s); this one keeps it until the queue is full, so that what happened during a restart arrives.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use linux::event::{Epoll, Interest};
use prost::Message;
use protocols::shim::events::{ForwardRequest, SERVICE};
use protocols::shim::types::Envelope;
use protocols::ttrpc::{self, FrameType, HEADER_BYTES, Request};

use crate::process::timestamp;

/// Events that may wait.
const EVENTS_MAX: usize = 1024;
/// How long the daemon may take for one.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// The longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// The sender.
#[derive(Debug)]
pub struct Forwarder {
    address: Option<PathBuf>,
    namespace: String,
    queue: VecDeque<Envelope>,
    dropped: u64,
    link: Option<Link>,
    stream: u32,
    tries: u32,
    /// When to try again, or to give the present try up.
    due: Option<Instant>,
    token: u64,
}

#[derive(Debug)]
struct Link {
    socket: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// The head of the queue was sent and is not answered yet.
    sent: bool,
}

impl Forwarder {
    /// Sends to the socket at `address`; `None`: events are dropped.
    #[must_use]
    pub fn new(address: Option<PathBuf>, namespace: &str, token: u64) -> Self {
        Self {
            address,
            namespace: namespace.to_owned(),
            queue: VecDeque::new(),
            dropped: 0,
            link: None,
            stream: 1,
            tries: 0,
            due: None,
            token,
        }
    }

    /// Queues an event of the type `containerd.events.KIND`.
    pub fn publish(&mut self, epoll: &Epoll, topic: &str, kind: &str, event: &impl Message) {
        if self.address.is_none() {
            return;
        }
        if self.queue.len() >= EVENTS_MAX {
            // The head may be on its way: the one behind it goes.
            self.queue.remove(1);
            self.dropped += 1;
            if self.dropped.is_power_of_two() {
                say!("events dropped as nobody takes them: {}", self.dropped);
            }
        }
        let event = prost_types::Any { type_url: format!("containerd.events.{kind}"), value: event.encode_to_vec() };
        self.queue.push_back(Envelope {
            timestamp: Some(timestamp()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: Some(event),
        });
        if self.due.is_none() {
            self.advance(epoll);
        }
    }

    /// When [`Self::on_time`] wants to be called.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether nothing is left to send, or nobody is there to take it.
    #[must_use]
    pub fn idle(&self) -> bool {
        self.queue.is_empty() || self.tries > 0
    }

    /// Tries again, or gives up a try that was not answered in time.
    pub fn on_time(&mut self, epoll: &Epoll, now: Instant) {
        if self.due.is_some_and(|due| due <= now) {
            self.due = None;
            if self.link.as_ref().is_some_and(|link| link.sent) {
                self.fail();
            } else {
                self.advance(epoll);
            }
        }
    }

    /// Handles an event of the socket.
    pub fn on_ready(&mut self, epoll: &Epoll) {
        let answered = match self.link.as_mut().map(Link::receive) {
            None => return,
            Some(answered) => answered,
        };
        match answered {
            Ok(0) => {}
            Ok(_) => {
                self.queue.pop_front();
                self.tries = 0;
                self.due = None;
                if let Some(link) = self.link.as_mut() {
                    link.sent = false;
                }
            }
            // A daemon that ended between two events is no failure of an event.
            Err(_) if self.queue.is_empty() => {
                self.link = None;
                return;
            }
            Err(_) => {
                self.fail();
                return;
            }
        }
        self.advance(epoll);
    }

    fn fail(&mut self) {
        self.link = None;
        self.tries = self.tries.saturating_add(1);
        self.due = Some(Instant::now() + PAUSE_MAX.min(Duration::from_secs(u64::from(self.tries))));
    }

    fn advance(&mut self, epoll: &Epoll) {
        if self.queue.is_empty() {
            return;
        }
        if let Err(error) = self.send(epoll) {
            if self.tries == 0 {
                say!("failed to send an event, trying again: {error}");
            }
            self.fail();
        }
    }

    fn send(&mut self, epoll: &Epoll) -> io::Result<()> {
        let (Some(address), Some(envelope)) = (self.address.as_ref(), self.queue.front()) else { return Ok(()) };
        if self.link.is_none() {
            let socket = linux::scm::connect(address)?;
            epoll.add(&socket, self.token, Interest::BOTH_EDGE)?;
            self.link = Some(Link { socket, input: Vec::new(), output: Vec::new(), sent: false });
            self.stream = 1;
        }
        let Some(link) = self.link.as_mut() else { return Ok(()) };
        if !link.sent {
            let forward = ForwardRequest { envelope: Some(envelope.clone()) };
            let nanos = i64::try_from(ANSWER_TIME.as_nanos()).unwrap_or(i64::MAX);
            let request = Request::unary(SERVICE, "Forward", &forward).with_namespace(&self.namespace).with_timeout_nanos(nanos);
            ttrpc::encode_frame(&mut link.output, FrameType::Request, self.stream, &request).map_err(io::Error::other)?;
            self.stream = self.stream.wrapping_add(2);
            link.sent = true;
            self.due = Some(Instant::now() + ANSWER_TIME);
        }
        link.flush()
    }
}

impl Link {
    fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.socket.write(&self.output) {
                Ok(bytes) => drop(self.output.drain(..bytes)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads what is there; how many answers were whole. An answer with an error is one too: the daemon has the event.
    fn receive(&mut self) -> io::Result<usize> {
        self.flush()?;
        let mut buffer = [0u8; 512];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => self.input.extend_from_slice(buffer.get(..bytes).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        let mut answers = 0;
        while let Some((header, _)) = ttrpc::split_frame(&self.input).map_err(io::Error::other)? {
            answers += usize::from(header.kind == FrameType::Response as u8);
            self.input.drain(..HEADER_BYTES + header.length);
        }
        Ok(answers)
    }
}
