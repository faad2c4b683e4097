//! What flows between containers and the outside: log writers, copies to and from FIFOs, attached readers.
//!
//! Nothing here waits. Every source is told by edge-triggered epoll, and is read until it is dry or its sink is full.
//!
//! ```text
//! container --FIFO--> LogStream --tee, append, consume--> log file
//!                         `-----------------------------> attached FIFOs
//! container --FIFO or pty--> Pump --> client's FIFO or file
//! client's FIFO --> Pump --> container's stdin FIFO or pty
//! ```

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use cri_log::{Cursor, LogFile, Progress, ROUNDS_MAX, Scratch, Tap};
use linux::event::{Epoll, Interest, Ready};
use linux::pipes;

use crate::late::{self, Readers};

/// What an attached reader may leave unread, in bytes, before its session is ended.
const ATTACH_BYTES_MAX: usize = 1 << 20;

/// Names a stream.
pub type StreamId = u32;
/// Names a log file that one or two streams write to.
pub type LogId = u32;

/// Bytes from one descriptor to another.
#[derive(Debug)]
pub struct Pump {
    src: Option<OwnedFd>,
    dst: OwnedFd,
    carry: Vec<u8>,
    /// The source has told of itself once: before a FIFO's first writer a read finds an end that is none.
    told: bool,
    /// A writing end of the source, so that it has no end while this is held.
    keep: Option<OwnedFd>,
    /// The client's FIFO behind `dst`, if nobody read it when the copying began.
    late: Option<PathBuf>,
    /// Something was written to `dst`.
    written: bool,
}

/// A container's output on its way to the log.
#[derive(Debug)]
pub struct LogStream {
    source: Source,
    log: LogId,
    attached: Vec<Attached>,
}

#[derive(Debug)]
enum Source {
    Fifo(Tap),
    /// `carry`: a line without an end yet (a FIFO keeps its own).
    Terminal {
        master: OwnedFd,
        name: &'static str,
        carry: Vec<u8>,
    },
}

#[derive(Debug)]
struct Attached {
    fd: OwnedFd,
    pending: Vec<u8>,
}

#[derive(Debug)]
enum Stream {
    Pump(Pump),
    Log(LogStream),
}

/// All streams of the shim.
#[derive(Debug)]
pub struct Streams {
    streams: BTreeMap<StreamId, Stream>,
    logs: BTreeMap<LogId, LogFile>,
    next: u32,
    token_base: u64,
    scratch: Scratch,
    again: Vec<StreamId>,
    cursor: Option<Cursor>,
    readers: Readers,
}

/// A sink's token is its stream's with this bit.
const SINK: u64 = 1 << 31;

impl Streams {
    /// No streams yet. Tokens are `token_base` + a number below 2^32.
    ///
    /// # Errors
    /// Making the scratch pipe, opening `/dev/null`.
    pub fn new(token_base: u64) -> io::Result<Self> {
        Ok(Self {
            streams: BTreeMap::new(),
            logs: BTreeMap::new(),
            next: 1,
            token_base,
            scratch: Scratch::new()?,
            again: Vec::new(),
            cursor: None,
            readers: Readers::default(),
        })
    }

    /// Notes each step of a log's writing in `cursor`, for a successor.
    pub fn set_cursor(&mut self, cursor: Cursor) {
        self.cursor = Some(cursor);
    }

    fn id(&mut self) -> u32 {
        let id = self.next;
        self.next = (self.next + 1) & 0x7fff_ffff;
        id
    }

    /// Opens a log file for appending, made with its directory when missing (0640, as containerd).
    ///
    /// # Errors
    /// Making the directory, opening the file.
    pub fn open_log(&mut self, path: &Path) -> io::Result<LogId> {
        let file = LogFile::open(path)?;
        let id = self.id();
        self.logs.insert(id, file);
        Ok(id)
    }

    /// Opens the log's path anew, after a rotation.
    ///
    /// # Errors
    /// As [`Self::open_log`]; the old file stays in use then.
    pub fn reopen_log(&mut self, id: LogId) -> io::Result<()> {
        let Some(log) = self.logs.get_mut(&id) else { return Err(io::ErrorKind::NotFound.into()) };
        log.reopen()
    }

    /// Closes the logs that are not in `used` and that no stream writes to.
    pub fn close_logs_but(&mut self, used: &[LogId]) {
        let Self { logs, streams, .. } = self;
        logs.retain(|id, _| used.contains(id) || streams.values().any(|stream| matches!(stream, Stream::Log(stream) if stream.log == *id)));
    }

    /// Copies a container's output to a log. `terminal`: `src` is a pty's master, not a FIFO.
    ///
    /// # Errors
    /// `epoll_ctl(2)`'s.
    pub fn add_log_stream(&mut self, epoll: &Epoll, src: OwnedFd, terminal: bool, name: &'static str, log: LogId) -> io::Result<StreamId> {
        let id = self.id();
        epoll.add(&src, self.token_base | u64::from(id), Interest::READ_EDGE)?;
        let source = if terminal { Source::Terminal { master: src, name, carry: Vec::new() } } else { Source::Fifo(Tap::new(src, name)) };
        self.streams.insert(id, Stream::Log(LogStream { source, log, attached: Vec::new() }));
        Ok(id)
    }

    /// Copies from `src` to `dst` until either ends. `keep`: see [`Self::end_input`].
    ///
    /// # Errors
    /// `epoll_ctl(2)`'s.
    pub fn add_pump(&mut self, epoll: &Epoll, src: OwnedFd, dst: OwnedFd, keep: Option<OwnedFd>) -> io::Result<StreamId> {
        let id = self.id();
        let token = self.token_base | u64::from(id);
        epoll.add(&src, token, Interest::READ_EDGE)?;
        self.watch_sink(epoll, &dst, id)?;
        self.streams
            .insert(id, Stream::Pump(Pump { src: Some(src), dst, carry: Vec::new(), told: false, keep, late: None, written: false }));
        Ok(id)
    }

    /// Copies from `src` to a client's FIFO. A client that has not opened it yet finds what was copied, and its end, when it does.
    ///
    /// # Errors
    /// `epoll_ctl(2)`'s and `open(2)`'s; `InvalidInput` if it is not a FIFO.
    pub fn add_client(&mut self, epoll: &Epoll, src: OwnedFd, client: &Path) -> io::Result<StreamId> {
        let (dst, late) = late::open(client)?;
        let id = self.add_pump(epoll, src, dst, None)?;
        if let Some(Stream::Pump(pump)) = self.streams.get_mut(&id) {
            pump.late = late;
        }
        Ok(id)
    }

    /// When [`Self::on_time`] wants to be called.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.readers.due()
    }

    /// Looks for clients that were late.
    pub fn on_time(&mut self, now: Instant) {
        self.readers.on_time(now);
    }

    fn watch_sink(&self, epoll: &Epoll, dst: &OwnedFd, id: StreamId) -> io::Result<()> {
        match epoll.add(dst, self.token_base | SINK | u64::from(id), Interest::WRITE_EDGE) {
            // A regular file is always writable.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            result => result,
        }
    }

    /// Gives a live reader (a non-blocking writing end) the stream's output from now on.
    ///
    /// # Errors
    /// `epoll_ctl(2)`'s; `NotFound` if the stream has ended or goes to no log.
    pub fn attach(&mut self, epoll: &Epoll, id: StreamId, fd: OwnedFd) -> io::Result<()> {
        self.watch_sink(epoll, &fd, id)?;
        match self.streams.get_mut(&id) {
            Some(Stream::Log(stream)) => {
                stream.attached.push(Attached { fd, pending: Vec::new() });
                Ok(())
            }
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Lets a pump's source come to its end: what was written to it is still copied.
    pub fn end_input(&mut self, id: StreamId) {
        if let Some(Stream::Pump(pump)) = self.streams.get_mut(&id) {
            pump.keep = None;
            pump.told = true;
            self.again.push(id);
        }
    }

    /// Has a stream looked at that no event tells of.
    pub fn nudge(&mut self, id: StreamId) {
        self.again.push(id);
    }

    /// Whether the stream is still there.
    #[must_use]
    pub fn is_open(&self, id: StreamId) -> bool {
        self.streams.contains_key(&id)
    }

    /// Whether the stream has ended before its client came to read it.
    #[must_use]
    pub fn is_awaited(&self, id: StreamId) -> bool {
        self.readers.awaits(id)
    }

    /// Ends a stream, whatever is still to come, and waits no longer for its reader.
    pub fn close(&mut self, id: StreamId) {
        self.readers.forget(id);
        self.streams.remove(&id);
    }

    /// Whether [`Self::run_again`] has work.
    #[must_use]
    pub fn has_more(&self) -> bool {
        !self.again.is_empty()
    }

    /// Moves those streams on that had more than their share.
    pub fn run_again(&mut self, epoll: &Epoll) {
        for id in std::mem::take(&mut self.again) {
            self.advance(epoll, id);
        }
    }

    /// Handles an event of one of these streams' tokens. Answers the stream if it has ended.
    pub fn on_ready(&mut self, epoll: &Epoll, ready: Ready) -> Option<StreamId> {
        let low = ready.token & 0xffff_ffff;
        let id = StreamId::try_from(low & !SINK).ok()?;
        match self.streams.get_mut(&id)? {
            Stream::Pump(pump) if low & SINK == 0 => pump.told = true,
            Stream::Log(LogStream { source: Source::Fifo(tap), .. }) if low & SINK == 0 && ready.hangup => tap.hang_up(),
            Stream::Log(_) if low & SINK == 0 => {}
            Stream::Log(stream) => {
                stream.attached.retain_mut(Attached::flush);
                return None;
            }
            Stream::Pump(_) => {}
        }
        self.advance(epoll, id).then_some(id)
    }

    /// Moves on what an ended process has left in the stream, as far as that goes at once.
    pub fn drain(&mut self, epoll: &Epoll, id: StreamId) {
        self.advance(epoll, id);
    }

    /// Moves the stream on; `true` if that was its end.
    fn advance(&mut self, epoll: &Epoll, id: StreamId) -> bool {
        let Self { streams, logs, scratch, again, cursor, .. } = self;
        let progress = match streams.get_mut(&id) {
            None => return false,
            Some(Stream::Pump(pump)) => pump.advance(),
            Some(Stream::Log(stream)) => match logs.get_mut(&stream.log) {
                Some(log) => stream.advance(log, scratch, cursor.as_mut()),
                None => Progress::Ended,
            },
        };
        match progress {
            Progress::Waiting => false,
            Progress::More => {
                again.push(id);
                false
            }
            Progress::Ended => {
                match self.streams.remove(&id) {
                    Some(Stream::Log(stream)) => self.leave_attached(epoll, stream.attached),
                    Some(Stream::Pump(Pump { late: Some(path), dst, written, .. })) => {
                        // Not watched any more, for its copy is kept.
                        let _ = epoll.delete(&dst);
                        self.readers.await_reader(Instant::now(), id, path, dst, written);
                    }
                    _ => {}
                }
                true
            }
        }
    }

    /// What attached readers have not read yet at the stream's end goes on as copies without a source.
    fn leave_attached(&mut self, epoll: &Epoll, attached: Vec<Attached>) {
        for reader in attached.into_iter().filter(|reader| !reader.pending.is_empty()) {
            let id = self.id();
            if epoll.delete(&reader.fd).is_ok() && self.watch_sink(epoll, &reader.fd, id).is_ok() {
                let pump = Pump { src: None, dst: reader.fd, carry: reader.pending, told: true, keep: None, late: None, written: false };
                self.streams.insert(id, Stream::Pump(pump));
            }
        }
    }
}

impl Pump {
    fn advance(&mut self) -> Progress {
        let mut buffer = [0u8; 4096];
        for _ in 0..ROUNDS_MAX {
            while !self.carry.is_empty() {
                match pipes::write(&self.dst, &self.carry) {
                    Ok(bytes) => {
                        self.written |= bytes > 0;
                        self.carry.drain(..bytes);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Waiting,
                    Err(_) => return Progress::Ended,
                }
            }
            let Some(src) = self.src.as_ref() else { return Progress::Ended };
            if !self.told {
                return Progress::Waiting;
            }
            match pipes::read(src, &mut buffer) {
                Ok(0) => self.src = None,
                Ok(bytes) => self.carry.extend_from_slice(buffer.get(..bytes).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Waiting,
                // EIO: the terminal's last user is gone.
                Err(_) => self.src = None,
            }
        }
        Progress::More
    }
}

impl LogStream {
    fn advance(&mut self, log: &mut LogFile, scratch: &Scratch, cursor: Option<&mut Cursor>) -> Progress {
        let Self { source, attached, .. } = self;
        match source {
            Source::Fifo(tap) => tap.advance(log, scratch, cursor, &mut |fresh| forward(attached, fresh)),
            Source::Terminal { master, name, carry } => advance_terminal(master, name, carry, log, attached),
        }
    }
}

fn advance_terminal(master: &OwnedFd, name: &str, carry: &mut Vec<u8>, log: &mut LogFile, attached: &mut Vec<Attached>) -> Progress {
    let mut buffer = [0u8; 4096];
    for _ in 0..ROUNDS_MAX {
        let (bytes, ended) = match pipes::read(master, &mut buffer) {
            Ok(bytes) => (bytes, bytes == 0),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Waiting,
            // EIO: the terminal's last user is gone.
            Err(_) => (0, true),
        };
        let input = buffer.get(..bytes).unwrap_or_default();
        forward(attached, input);
        carry.extend_from_slice(input);
        let mut text = Vec::new();
        let taken = cri_log::format(carry, ended, name, &cri_log::now(), &mut text);
        if taken > 0 {
            log.append(&text);
            carry.drain(..taken);
        }
        if ended {
            return Progress::Ended;
        }
    }
    Progress::More
}

fn forward(attached: &mut Vec<Attached>, fresh: &[u8]) {
    attached.retain_mut(|reader| {
        reader.pending.extend_from_slice(fresh);
        reader.flush() && reader.pending.len() <= ATTACH_BYTES_MAX
    });
}

impl Attached {
    /// Sends what fits; `false`: the reader is gone.
    fn flush(&mut self) -> bool {
        while !self.pending.is_empty() {
            match pipes::write(&self.fd, &self.pending) {
                Ok(bytes) => drop(self.pending.drain(..bytes)),
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }
}
