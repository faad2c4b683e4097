//! The shim's side of the keeper: descriptors that are to outlive it.
//!
//! Sent without waiting for the answer, as nothing here may wait; without a keeper nothing is sent, and only adoption is
//! missing. Names are paths: `BUNDLE/master`, `BUNDLE/stdin`, `BUNDLE/pidfd`.
//!
//! A keeper may die as well. Its successor holds nothing, so the shim has a copy of all that is kept, and gives it again.
//!
//! ```text
//! [connected] --hang-up, failed send--> [lost: nothing is told] --connected anew, after a pause--> all is told --> [connected]
//! ```

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use linux::event::{Epoll, Interest};
use linux::scm;
use prost::Message;
use protocols::shim::coracle::{DropRequest, ExitRequest, ExitResponse, GetRequest, KEEPER_SERVICE, PutRequest};
use protocols::ttrpc::{self, FrameType, HEADER_BYTES, Request, Response, RpcError, code};

use crate::daemon::{KEEPER, Shim};

/// The variable that names the keeper's socket to the shims that it starts.
pub const KEEPER_ENV: &str = "CORACLE_KEEPER";
/// How long a successor, which has nothing else to do yet, waits for the keeper's answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// The first pause before a lost keeper is looked for; each is twice as long as the one before.
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// A descriptor that the keeper is to hold.
#[derive(Debug)]
struct Kept {
    descriptor: OwnedFd,
    told: bool,
}

/// A connection to the keeper on which nobody waits.
#[derive(Debug)]
pub struct Keeping {
    socket: PathBuf,
    link: Option<UnixStream>,
    stream: u32,
    kept: BTreeMap<String, Kept>,
    /// When a lost keeper is looked for, and after which pause.
    next: Option<(Instant, Duration)>,
}

impl Keeping {
    /// For the keeper at that socket.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, link: None, stream: 1, kept: BTreeMap::new(), next: None }
    }

    /// When [`Self::on_time`] wants to be called.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.next.map(|(due, _)| due)
    }

    /// Looks for the keeper again, if it is time.
    pub(crate) fn on_time(&mut self, epoll: &Epoll, now: Instant) {
        if self.next.is_some_and(|(due, _)| due <= now) {
            self.tell(epoll, now);
        }
    }

    /// The keeper is gone.
    pub(crate) fn on_hangup(&mut self, now: Instant) {
        self.lose();
        if !self.kept.is_empty() {
            self.next = Some((now + PAUSE_MIN, PAUSE_MIN));
        }
    }

    /// Whoever answers next has been told nothing.
    fn lose(&mut self) {
        self.link = None;
        self.kept.values_mut().for_each(|kept| kept.told = false);
    }

    /// Tells what is not told yet; what cannot be told now is told later.
    fn tell(&mut self, epoll: &Epoll, now: Instant) {
        let pause = self.next.take().map_or(PAUSE_MIN, |(_, pause)| (pause * 2).min(PAUSE_MAX));
        while let Some((name, descriptor)) = self.kept.iter().find(|(_, kept)| !kept.told).map(|(name, kept)| (name, &kept.descriptor)) {
            let request = PutRequest { name: name.clone() };
            let sent = descriptor.try_clone().and_then(|copy| self.send(epoll, "Put", &request, &[copy.as_fd()]));
            match sent {
                Ok(()) => {
                    if let Some(kept) = self.kept.get_mut(&request.name) {
                        kept.told = true;
                    }
                }
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        self.lose();
                    }
                    self.next = Some((now + pause, pause));
                    return;
                }
            }
        }
    }

    fn send(&mut self, epoll: &Epoll, method: &str, message: &impl Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let request = Request::unary(KEEPER_SERVICE, method, message);
        let mut frame = Vec::new();
        ttrpc::encode_frame(&mut frame, FrameType::Request, self.stream, &request).map_err(io::Error::other)?;
        self.stream = self.stream.wrapping_add(2);
        let link = match self.link.as_mut() {
            Some(link) => link,
            None => {
                let link = scm::connect(&self.socket)?;
                epoll.add(&link, KEEPER, Interest::HANGUP)?;
                self.link.insert(link)
            }
        };
        // Earlier answers are of no interest, but must not fill the socket.
        let mut buffer = [0u8; 512];
        while matches!(link.read(&mut buffer), Ok(1..)) {}
        match scm::send(&*link, &frame, fds) {
            Ok(sent) if sent == frame.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(error) => Err(error),
        }
    }
}

impl Shim {
    /// Has the keeper hold a descriptor too.
    pub(crate) fn keep(&mut self, path: &Path, descriptor: &OwnedFd) {
        let Some(keeping) = self.keeping.as_mut() else { return };
        match descriptor.try_clone() {
            Ok(descriptor) => {
                keeping.kept.insert(path.display().to_string(), Kept { descriptor, told: false });
                keeping.tell(&self.epoll, Instant::now());
            }
            Err(error) => say!("failed to copy {} for the keeper: {error}", path.display()),
        }
    }

    /// Has the keeper close what it holds under that path and below.
    pub(crate) fn drop_kept(&mut self, path: &Path) {
        let Some(keeping) = self.keeping.as_mut() else { return };
        let name = path.display().to_string();
        let below = format!("{name}/");
        keeping.kept.retain(|kept, _| *kept != name && !kept.starts_with(&below));
        for request in [DropRequest { name, prefix: false }, DropRequest { name: below, prefix: true }] {
            if keeping.send(&self.epoll, "Drop", &request, &[]).is_err() {
                // The link may be one to a keeper that died. Its successor, if there is one, is told on another.
                keeping.on_hangup(Instant::now());
                let _ = keeping.send(&self.epoll, "Drop", &request, &[]);
            }
        }
    }
}

/// Calls the keeper and waits for the answer, for a program that has no loop (yet).
///
/// # Errors
/// `Unavailable` if there is no keeper or it does not answer; else the keeper's own.
pub fn call(socket: &Path, method: &str, message: &impl Message, timeout: Duration) -> Result<(Vec<u8>, Vec<OwnedFd>), RpcError> {
    let said = |error: io::Error| RpcError::new(code::UNAVAILABLE, format!("failed to call the keeper at {}: {error}", socket.display()));
    let stream = UnixStream::connect(socket).map_err(said)?;
    stream.set_read_timeout(Some(timeout)).map_err(said)?;
    let request = Request::unary(KEEPER_SERVICE, method, message);
    let mut frame = Vec::new();
    ttrpc::encode_frame(&mut frame, FrameType::Request, 1, &request).map_err(|error| said(io::Error::other(error)))?;
    io::Write::write_all(&mut &stream, &frame).map_err(said)?;
    let (mut input, mut fds, mut buffer) = (Vec::new(), Vec::new(), [0u8; 4096]);
    loop {
        if let Some((header, data)) = ttrpc::split_frame(&input).map_err(|error| said(io::Error::other(error)))? {
            debug_assert_eq!(header.length + HEADER_BYTES, data.len() + HEADER_BYTES);
            let response = Response::decode(data).map_err(|error| said(io::Error::other(error)))?;
            return response.into_result().map(|payload| (payload, fds));
        }
        let (bytes, more) = scm::receive(&stream, &mut buffer).map_err(said)?;
        if bytes == 0 {
            return Err(said(io::ErrorKind::UnexpectedEof.into()));
        }
        input.extend_from_slice(buffer.get(..bytes).unwrap_or_default());
        fds.extend(more);
    }
}

/// A descriptor that the keeper holds; `None` if it holds none of that name, or there is no keeper.
#[must_use]
pub fn get(socket: Option<&Path>, path: &Path) -> Option<OwnedFd> {
    let request = GetRequest { name: path.display().to_string() };
    call(socket?, "Get", &request, ANSWER_TIME).ok().and_then(|(_, mut fds)| fds.pop())
}

/// An exit that the keeper saw; `None` if it saw none, or there is no keeper.
#[must_use]
pub fn exit_of(socket: Option<&Path>, pid: u32, start_time: u64) -> Option<ExitResponse> {
    let (payload, _) = call(socket?, "Exit", &ExitRequest { pid, start_time }, ANSWER_TIME).ok()?;
    ExitResponse::decode(payload.as_slice()).ok()
}
