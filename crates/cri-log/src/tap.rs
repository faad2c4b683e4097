//! The copying itself, a step at a time: nothing here waits.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

use linux::pipes;

use crate::cursor::Cursor;
use crate::file::LogFile;
use crate::format::{format, rfc3339_nanos};

/// What is read at once, in bytes: more than one entry of a log, less than a FIFO holds.
const CHUNK_BYTES: usize = 20 * 1024;
/// Rounds for one stream before others are looked at.
pub const ROUNDS_MAX: usize = 16;

/// What came of moving a stream on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing more for now.
    Waiting,
    /// There is more; others first.
    More,
    /// At its end.
    Ended,
}

/// What copies pass through; one serves any number of taps.
#[derive(Debug)]
pub struct Scratch {
    reader: OwnedFd,
    writer: OwnedFd,
    null: File,
}

impl Scratch {
    /// Makes one.
    ///
    /// # Errors
    /// Making a pipe, opening `/dev/null`.
    pub fn new() -> io::Result<Self> {
        let (reader, writer) = pipes::pipe()?;
        Ok(Self { reader, writer, null: File::options().write(true).open("/dev/null")? })
    }
}

/// The reading end of a FIFO on its way into a log.
#[derive(Debug)]
pub struct Tap {
    src: OwnedFd,
    stream: &'static str,
    hangup: bool,
    /// Bytes at the FIFO's head that live readers have had.
    forwarded: usize,
}

impl Tap {
    /// For a non-blocking reading end; `stream` is the entries' word: stdout or stderr.
    #[must_use]
    pub fn new(src: OwnedFd, stream: &'static str) -> Self {
        Self { src, stream, hangup: false, forwarded: 0 }
    }

    /// Notes that there is no writer any more: what the FIFO holds is all that there will be.
    pub fn hang_up(&mut self) {
        self.hangup = true;
    }

    /// Moves whole entries into the log. `fresh` is given each byte once, as soon as it is seen.
    pub fn advance(
        &mut self,
        log: &mut LogFile,
        scratch: &Scratch,
        mut cursor: Option<&mut Cursor>,
        fresh: &mut dyn FnMut(&[u8]),
    ) -> Progress {
        let mut buffer = [0u8; CHUNK_BYTES];
        for _ in 0..ROUNDS_MAX {
            let there = match pipes::tee(self.src.as_fd(), scratch.writer.as_fd(), CHUNK_BYTES) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(_) => return Progress::Ended,
            };
            let Some(input) = read_exactly(&scratch.reader, &mut buffer, there) else { return Progress::Ended };
            if let Some(unseen) = input.get(self.forwarded..).filter(|unseen| !unseen.is_empty()) {
                fresh(unseen);
            }
            // With no writer left, what is short of a chunk is all there will be.
            let ended = self.hangup && there < CHUNK_BYTES;
            let mut text = Vec::new();
            let taken = format(input, ended, self.stream, &now(), &mut text);
            if taken > 0 {
                if let Some(cursor) = cursor.as_deref_mut() {
                    cursor.appending(log, self.stream, taken, text.len());
                }
                log.append(&text);
                if let Some(cursor) = cursor.as_deref_mut() {
                    cursor.consuming();
                }
                if pipes::discard(self.src.as_fd(), &scratch.null, taken).is_err() {
                    return Progress::Ended;
                }
                if let Some(cursor) = cursor.as_deref_mut() {
                    cursor.done();
                }
            }
            self.forwarded = there - taken;
            if ended {
                return Progress::Ended;
            }
            if taken == 0 {
                return Progress::Waiting;
            }
        }
        Progress::More
    }
}

/// Reads the bytes that were just put into the scratch pipe.
fn read_exactly<'a>(scratch: &OwnedFd, buffer: &'a mut [u8], bytes: usize) -> Option<&'a [u8]> {
    let mut filled = 0;
    while filled < bytes {
        let got = pipes::read(scratch, buffer.get_mut(filled..bytes)?).ok()?;
        filled += got;
    }
    buffer.get(..filled)
}

/// The time of an entry that is made now.
#[must_use]
pub fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    rfc3339_nanos(i64::try_from(since.as_secs()).unwrap_or(i64::MAX), since.subsec_nanos())
}
