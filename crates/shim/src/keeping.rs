//! The shim's side of the keeper: descriptors that are to outlive it.
//!
//! Sent without waiting for the answer, as nothing here may wait; without a keeper nothing is sent, and only adoption is
//! missing. Names are paths: `BUNDLE/master`, `BUNDLE/stdin`.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use linux::scm;
use prost::Message;
use protocols::shim::coracle::{DropRequest, ExitRequest, ExitResponse, GetRequest, KEEPER_SERVICE, PutRequest};
use protocols::ttrpc::{self, FrameType, HEADER_BYTES, Request, Response, RpcError, code};

use crate::daemon::Shim;

/// The variable that names the keeper's socket to the shims that it starts.
pub const KEEPER_ENV: &str = "CORACLE_KEEPER";
/// How long a successor, which has nothing else to do yet, waits for the keeper's answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// A connection to the keeper on which nobody waits.
#[derive(Debug)]
pub struct Keeping {
    socket: PathBuf,
    link: Option<UnixStream>,
    stream: u32,
}

impl Keeping {
    /// For the keeper at that socket.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, link: None, stream: 1 }
    }

    fn send(&mut self, method: &str, message: &impl Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let request = Request::unary(KEEPER_SERVICE, method, message);
        let mut frame = Vec::new();
        ttrpc::encode_frame(&mut frame, FrameType::Request, self.stream, &request).map_err(io::Error::other)?;
        self.stream = self.stream.wrapping_add(2);
        let link = match self.link.as_mut() {
            Some(link) => link,
            None => self.link.insert(scm::connect(&self.socket)?),
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

    fn tell(&mut self, method: &str, message: &impl Message, fds: &[BorrowedFd<'_>]) {
        // A keeper that was started anew has closed the old connection: one more try on a fresh one.
        if self.send(method, message, fds).is_err() {
            self.link = None;
            if let Err(error) = self.send(method, message, fds) {
                self.link = None;
                eprintln!("failed to tell the keeper ({method}): {error}");
            }
        }
    }
}

impl Shim {
    /// Has the keeper hold a descriptor too.
    pub(crate) fn keep(&mut self, path: &Path, descriptor: &OwnedFd) {
        if let Some(keeping) = self.keeping.as_mut() {
            keeping.tell("Put", &PutRequest { name: path.display().to_string() }, &[descriptor.as_fd()]);
        }
    }

    /// Has the keeper close what it holds under that path and below.
    pub(crate) fn drop_kept(&mut self, path: &Path) {
        if let Some(keeping) = self.keeping.as_mut() {
            let name = path.display().to_string();
            keeping.tell("Drop", &DropRequest { name: name.clone(), prefix: false }, &[]);
            keeping.tell("Drop", &DropRequest { name: format!("{name}/"), prefix: true }, &[]);
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
