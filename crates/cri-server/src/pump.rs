//! Copies a container's output from its FIFOs into its log, and to those who attach, where the shim does not.
//!
//! Nothing is taken off a FIFO before it is in the log, so that a server that is killed loses and doubles nothing; and as the keeper holds
//! the FIFOs too, what a container writes while no server runs is kept, even if it ends. (containerd reads before it writes, and with its
//! end a shim that closes its FIFOs throws away what is in them.) As there, a container waits when 64 KiB are unread.

use std::io;
use std::os::fd::OwnedFd;
use std::task::Poll;

use camino::{Utf8Path, Utf8PathBuf};
use cri_log::{Cursor, LogFile, Progress, Scratch, Tap};
use linux::pipes::{self, Access};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, DuplexStream, Interest};
use tokio::sync::{mpsc, oneshot};

/// What an attached reader may leave unread, in bytes, before its session is ended.
const ATTACH_BYTES_MAX: usize = 1 << 20;
/// Requests to a pump that may wait.
const COMMANDS_MAX: usize = 16;
/// Both streams, in the order of [`Pump::attach`]'s answer.
pub const STREAMS: [&str; 2] = ["stdout", "stderr"];

/// The copying of one container's output, which goes on until this is dropped.
#[derive(Debug)]
pub struct Pump {
    commands: mpsc::Sender<Command>,
}

#[derive(Debug)]
enum Command {
    Reopen(oneshot::Sender<io::Result<()>>),
    Attach(oneshot::Sender<[Option<DuplexStream>; 2]>),
    Finish(oneshot::Sender<()>),
}

/// A stream as the loop sees it.
struct Source {
    /// Its place in [`STREAMS`].
    place: usize,
    fd: AsyncFd<OwnedFd>,
    /// There was more than one turn's share.
    more: bool,
    hangup: bool,
    ended: bool,
    attached: Vec<DuplexStream>,
}

/// What blocks, and therefore goes to a thread of its own.
struct Work {
    taps: Vec<Tap>,
    log: LogFile,
    cursor: Cursor,
    scratch: Scratch,
}

impl Work {
    /// A turn of one tap; what readers have not had yet goes to `fresh`, if it is there.
    fn advance(&mut self, index: usize, hangup: bool, mut fresh: Option<&mut Vec<u8>>) -> Progress {
        let Self { taps, log, cursor, scratch } = self;
        let Some(tap) = taps.get_mut(index) else { return Progress::Ended };
        if hangup {
            tap.hang_up();
        }
        tap.advance(log, scratch, Some(cursor), &mut |bytes| {
            if let Some(fresh) = fresh.as_deref_mut() {
                fresh.extend_from_slice(bytes);
            }
        })
    }
}

impl Pump {
    /// Opens the reading ends of those FIFOs `DIR/stdout` and `DIR/stderr` that exist and goes on where a predecessor stopped, which
    /// `DIR/cursor` tells. Answers copies of these ends besides, with their paths.
    ///
    /// # Errors
    /// Opening the log, or a FIFO.
    pub fn start(dir: &Utf8Path, log: &Utf8Path) -> io::Result<(Self, Vec<(String, OwnedFd)>)> {
        let cursor = dir.join("cursor");
        let (mut taps, mut sources, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        for (place, name) in STREAMS.into_iter().enumerate() {
            let path: Utf8PathBuf = dir.join(name);
            let fd = match pipes::open_fifo(path.as_std_path(), Access::Read) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other?,
            };
            cri_log::reconcile(cursor.as_std_path(), log.as_std_path(), name, &fd)?;
            ends.push((path.into_string(), fd.try_clone()?));
            taps.push(Tap::new(fd.try_clone()?, name));
            #[allow(deprecated, reason = "sound for an OwnedFd, and its successor is an unsafe function")]
            let fd = AsyncFd::with_interest(fd, Interest::READABLE)?;
            // What is there already no event tells of.
            sources.push(Source { place, fd, more: true, hangup: false, ended: false, attached: Vec::new() });
        }
        let (log, cursor) = (LogFile::open(log.as_std_path())?, Cursor::open(cursor.as_std_path())?);
        let work = Work { taps, log, cursor, scratch: Scratch::new()? };
        let (commands, requests) = mpsc::channel(COMMANDS_MAX);
        tokio::spawn(run(work, sources, requests));
        Ok((Self { commands }, ends))
    }

    /// Opens the log anew under its path.
    ///
    /// # Errors
    /// Opening it; the old file stays in use then.
    pub async fn reopen(&self) -> io::Result<()> {
        let (answer, answered) = oneshot::channel();
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.commands.send(Command::Reopen(answer)).await.map_err(|_| gone(()))?;
        answered.await.map_err(|_| gone(()))?
    }

    /// The output from now on, of each stream that there is.
    pub async fn attach(&self) -> [Option<DuplexStream>; 2] {
        let (answer, answered) = oneshot::channel();
        if self.commands.send(Command::Attach(answer)).await.is_err() {
            return [None, None];
        }
        answered.await.unwrap_or_default()
    }

    /// Copies what the FIFOs still hold, after the container's end, and ends.
    pub async fn finish(&self) {
        let (answer, answered) = oneshot::channel();
        // One that has ended has copied all.
        if self.commands.send(Command::Finish(answer)).await.is_ok() {
            let _ = answered.await;
        }
    }
}

/// Copies until it is told to finish, or dropped.
async fn run(mut work: Work, mut sources: Vec<Source>, mut requests: mpsc::Receiver<Command>) {
    let mut next = 0;
    let answer = loop {
        let index = tokio::select! {
            request = requests.recv() => match request {
                Some(Command::Reopen(answer)) => {
                    let _ = answer.send(work.log.reopen());
                    continue;
                }
                Some(Command::Attach(answer)) => {
                    let _ = answer.send(attach(&mut sources));
                    continue;
                }
                Some(Command::Finish(answer)) => break answer,
                None => return,
            },
            index = ready(&mut sources, next) => index,
        };
        next = index + 1;
        let Some(kept) = turn(work, &mut sources, index).await else { return };
        work = kept;
    };
    for index in 0..sources.len() {
        sources[index].hangup = true;
        while !sources[index].ended {
            let Some(kept) = turn(work, &mut sources, index).await else { return };
            work = kept;
        }
    }
    let _ = answer.send(());
}

fn attach(sources: &mut [Source]) -> [Option<DuplexStream>; 2] {
    let mut readers = [None, None];
    for source in sources.iter_mut().filter(|source| !source.ended) {
        let (ours, theirs) = tokio::io::duplex(ATTACH_BYTES_MAX);
        source.attached.push(ours);
        readers[source.place] = Some(theirs);
    }
    readers
}

/// The next stream with something to do; they take turns.
async fn ready(sources: &mut [Source], next: usize) -> usize {
    std::future::poll_fn(|context| {
        for turn in 0..sources.len() {
            let index = (next + turn) % sources.len();
            let source = &mut sources[index];
            if source.ended {
                continue;
            }
            if std::mem::take(&mut source.more) {
                return Poll::Ready(index);
            }
            if let Poll::Ready(Ok(mut guard)) = source.fd.poll_read_ready(context) {
                source.hangup |= guard.ready().is_read_closed();
                // Before the FIFO is looked at: what comes later is another event.
                guard.clear_ready();
                return Poll::Ready(index);
            }
        }
        Poll::Pending
    })
    .await
}

/// Moves one stream on. `None`: the runtime is being shut down.
async fn turn(mut work: Work, sources: &mut [Source], index: usize) -> Option<Work> {
    let source = sources.get_mut(index)?;
    let (hangup, is_watched) = (source.hangup, !source.attached.is_empty());
    let done = tokio::task::spawn_blocking(move || {
        let mut fresh = Vec::new();
        let progress = work.advance(index, hangup, is_watched.then_some(&mut fresh));
        (work, progress, fresh)
    });
    let (work, progress, fresh) = done.await.ok()?;
    source.attached.retain_mut(|reader| {
        use futures::FutureExt as _;
        // A reader that is too far behind is cut off rather than waited for.
        matches!(reader.write_all(&fresh).now_or_never(), Some(Ok(())))
    });
    match progress {
        Progress::Waiting => {}
        Progress::More => source.more = true,
        Progress::Ended => {
            source.ended = true;
            source.attached.clear();
        }
    }
    Some(work)
}
