//! Clients' FIFOs whose reader had not come when the copying to them was over.
//!
//! A client opens the reading ends while the process starts, or after (containerd's `ctr` and CRI do so in the background), and a
//! short process may have ended by then. Were the writing end simply closed, what it wrote would be lost, and the client would wait
//! for a writer for ever. (Upstream's shim waits in Create and Exec until the readers are there; nothing here waits.)
//!
//! ```text
//! unread bytes --> hold the FIFO, both ends --read by somebody--> let go, done
//! nothing unread ----------------------------------------------> let go, knock
//! knock: open the writing end: a reader is there (and finds the end) --> done
//!                              nobody                               --> knock again later, until the process is deleted
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use linux::pipes::{self, Access};

use crate::stream::StreamId;

/// The first pause between two looks; each is twice as long as the one before.
const PAUSE_MIN: Duration = Duration::from_millis(5);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// A FIFO that waits for its reader.
#[derive(Debug)]
struct Late {
    id: StreamId,
    path: PathBuf,
    /// Both ends, while there is something unread.
    held: Option<OwnedFd>,
    /// Something was written: once it is read, somebody was there.
    written: bool,
}

/// All that wait.
#[derive(Debug, Default)]
pub struct Readers {
    waiting: Vec<Late>,
    next: Option<(Instant, Duration)>,
}

/// Opens the writing end if somebody has the FIFO open for reading, or waits in `open(2)` for a writer, whom this lets go on.
fn knock(path: &Path) -> io::Result<Option<OwnedFd>> {
    match pipes::open_fifo(path, Access::Write) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if error.raw_os_error() == Some(ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What `open(2)` answers to a writer that is alone.
const ENXIO: i32 = 6;

impl Late {
    /// Looks once; `true` when there is nothing more to wait for.
    fn settle(&mut self) -> bool {
        if let Some(held) = &self.held {
            if pipes::unread(held).is_ok_and(|bytes| bytes > 0) {
                self.written = true;
                return false;
            }
            self.held = None;
            if self.written {
                // Somebody has read it, and finds the end now.
                return true;
            }
        }
        // Any other failure (the client has removed it) leaves nothing to wait for.
        !matches!(knock(&self.path), Ok(None))
    }
}

impl Readers {
    /// Takes over the FIFO of a stream that is at its end; `fd` has both its ends, and `written` tells whether it got anything.
    pub fn await_reader(&mut self, now: Instant, id: StreamId, path: PathBuf, fd: OwnedFd, written: bool) {
        let mut late = Late { id, path, held: Some(fd), written };
        if !late.settle() {
            self.waiting.push(late);
            self.next = Some((now + PAUSE_MIN, PAUSE_MIN));
        }
    }

    /// Whether the stream's reader is waited for.
    #[must_use]
    pub fn awaits(&self, id: StreamId) -> bool {
        self.waiting.iter().any(|late| late.id == id)
    }

    /// When [`Self::on_time`] wants to be called.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.next.map(|(due, _)| due)
    }

    /// Looks at all, if it is time.
    pub fn on_time(&mut self, now: Instant) {
        let Some((due, pause)) = self.next else { return };
        if now < due {
            return;
        }
        self.waiting.retain_mut(|late| !late.settle());
        let pause = (pause * 2).min(PAUSE_MAX);
        self.next = (!self.waiting.is_empty()).then_some((now + pause, pause));
    }

    /// Waits no longer for a stream's reader: its process is deleted.
    pub fn forget(&mut self, id: StreamId) {
        self.waiting.retain(|late| late.id != id);
        if self.waiting.is_empty() {
            self.next = None;
        }
    }
}

/// Both ends of a client's FIFO; with its path if nobody reads it yet.
///
/// # Errors
/// `open(2)`'s; `InvalidInput` if it is not a FIFO.
pub fn open(path: &Path) -> io::Result<(OwnedFd, Option<PathBuf>)> {
    // Held until the other is open: a reader that this lets go on must not find an end.
    let knocked = knock(path)?;
    // Both ends: no signal and no wait while no reader is there.
    let fd = pipes::open_fifo(path, Access::Both)?;
    Ok((fd, knocked.is_none().then(|| path.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn fifo(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("coracle-late-{name}-{}", std::process::id()));
        pipes::make_fifo(&path, 0o600).expect("a FIFO");
        path
    }

    fn finish(readers: &mut Readers, path: &Path, written: &[u8]) {
        let (fd, late) = open(path).expect("opened");
        assert_eq!(late.as_deref(), Some(path), "nobody reads it yet");
        pipes::write(&fd, written).expect("written");
        readers.await_reader(Instant::now(), 1, path.to_owned(), fd, !written.is_empty());
        assert!(readers.due().is_some());
    }

    #[test]
    fn a_reader_that_comes_late_finds_all_and_the_end() {
        for written in [&b""[..], b"said before anybody listened"] {
            let path = fifo(if written.is_empty() { "empty" } else { "full" });
            let mut readers = Readers::default();
            finish(&mut readers, &path, written);
            let from = path.clone();
            let client = std::thread::spawn(move || {
                let mut read = Vec::new();
                std::fs::File::open(from).and_then(|mut file| file.read_to_end(&mut read)).map(|_| read)
            });
            let deadline = Instant::now() + Duration::from_secs(60);
            while let Some(due) = readers.due() {
                assert!(Instant::now() < deadline, "it still waits");
                std::thread::park_timeout(due.saturating_duration_since(Instant::now()));
                readers.on_time(Instant::now());
            }
            assert_eq!(client.join().expect("joined").expect("read"), written);
            std::fs::remove_file(path).expect("removed");
        }
    }

    #[test]
    fn a_reader_that_waits_for_a_writer_finds_no_early_end() {
        for _ in 0..50 {
            let path = fifo("waiting");
            let from = path.clone();
            let client = std::thread::spawn(move || {
                let mut read = Vec::new();
                std::fs::File::open(from).and_then(|mut file| file.read_to_end(&mut read)).map(|_| read)
            });
            // It is in `open(2)` now, or comes later: both are met in fifty rounds.
            std::thread::yield_now();
            let (fd, late) = open(&path).expect("opened");
            pipes::write(&fd, b"said").expect("written");
            let mut readers = Readers::default();
            match late {
                Some(path) => readers.await_reader(Instant::now(), 1, path, fd, true),
                None => drop(fd),
            }
            let deadline = Instant::now() + Duration::from_secs(60);
            while let Some(due) = readers.due() {
                assert!(Instant::now() < deadline, "it still waits");
                std::thread::park_timeout(due.saturating_duration_since(Instant::now()));
                readers.on_time(Instant::now());
            }
            assert_eq!(client.join().expect("joined").expect("read"), b"said");
            std::fs::remove_file(path).expect("removed");
        }
    }

    #[test]
    fn who_has_read_all_before_the_end_is_not_waited_for() {
        let path = fifo("swift");
        let (fd, late) = open(&path).expect("opened");
        pipes::write(&fd, b"said").expect("written");
        let mut client = std::fs::File::open(&path).expect("opened");
        let mut read = [0; 4];
        client.read_exact(&mut read).expect("read");
        drop(client);
        let mut readers = Readers::default();
        readers.await_reader(Instant::now(), 1, late.expect("nobody read it"), fd, true);
        assert_eq!((read, readers.due()), (*b"said", None));
        std::fs::remove_file(path).expect("removed");
    }

    #[test]
    fn nobody_is_waited_for_after_the_end() {
        let path = fifo("forgotten");
        let mut readers = Readers::default();
        finish(&mut readers, &path, b"x");
        readers.forget(1);
        assert_eq!(readers.due(), None);
        // A client that has removed its FIFO does not come any more.
        finish(&mut readers, &path, b"");
        std::fs::remove_file(&path).expect("removed");
        readers.on_time(Instant::now() + PAUSE_MAX);
        assert_eq!(readers.due(), None);
    }
}
