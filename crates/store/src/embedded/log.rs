//! The append-only log: a header, then frames. One frame is one group commit.
//!
//! ```text
//! header (32): "CORSTORE"  version u32  0 u32  salt u64  0 u32  crc u32
//! frame:       magic u32  length u32  sequence u64  crc u32  payload (records)
//! ```
//!
//! A frame is written with one write and one fdatasync, and the next one only after that. So after a crash at most the
//! last frame is torn, whichever of its sectors reached the disk; it was never acknowledged and is cut off. A bad frame
//! with a good one behind it is no torn write but damage: the log is then not opened. The salt, random for each file and
//! part of every checksum, keeps a value that happens to contain a frame from passing for one.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::crc::crc32c;
use super::disk;
use super::record::{self, Record};
use crate::Error;

const HEADER_BYTES: usize = 32;
const FRAME_HEADER_BYTES: usize = 20;
const HEADER_MAGIC: &[u8; 8] = b"CORSTORE";
const FRAME_MAGIC: u32 = 0x4652_4d31;
const VERSION: u32 = 1;
/// The log's file name below the store's directory.
pub(crate) const LOG_FILE: &str = "store.log";
/// A log being rewritten; whatever is found under this name at start-up is rubbish.
pub(crate) const NEW_FILE: &str = "store.log.new";

/// An open log, positioned at its end.
#[derive(Debug)]
pub(crate) struct Log {
    file: File,
    path: PathBuf,
    salt: u64,
    sequence: u64,
    length: u64,
    frame: Vec<u8>,
}

/// How an append failed.
#[derive(Debug)]
pub(crate) enum AppendError {
    /// Nothing of it is in the log; the next append may succeed.
    Undone(Error),
    /// It is not known what is on disk.
    Fatal(Error),
}

fn header(salt: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(HEADER_MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&salt.to_le_bytes());
    let crc = crc32c(0, &header[..28]);
    header[28..].copy_from_slice(&crc.to_le_bytes());
    header
}

fn frame_crc(salt: u64, head: &[u8], payload: &[u8]) -> u32 {
    crc32c(crc32c(crc32c(0, &salt.to_le_bytes()), head), payload)
}

fn le_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn le_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The frame at the start of `bytes`, if there is a whole and sound one: its sequence number and payload.
fn parse_frame(salt: u64, bytes: &[u8]) -> Option<(u64, &[u8])> {
    if le_u32(bytes, 0)? != FRAME_MAGIC {
        return None;
    }
    let length = le_u32(bytes, 4)? as usize;
    let sequence = le_u64(bytes, 8)?;
    let crc = le_u32(bytes, 16)?;
    let payload = bytes.get(FRAME_HEADER_BYTES..FRAME_HEADER_BYTES.checked_add(length)?)?;
    (frame_crc(salt, &bytes[..16], payload) == crc).then_some((sequence, payload))
}

/// What a log's bytes hold.
#[derive(Debug)]
pub(crate) struct Recovered {
    /// The salt of the header; `None` when even the header was not written whole.
    pub(crate) salt: Option<u64>,
    /// Sequence number of the last frame.
    pub(crate) sequence: u64,
    /// Bytes that are sound; what follows is a torn write.
    pub(crate) length: u64,
}

/// Reads a log's bytes and hands every record on. Pure but for `each`.
pub(crate) fn recover(path: &Path, bytes: &[u8], mut each: impl FnMut(Record)) -> Result<Recovered, Error> {
    let corrupt =
        |offset: usize, what: String| Error::Corrupt { path: path.to_owned(), offset: offset as u64, length: bytes.len() as u64, what };
    if bytes.len() < HEADER_BYTES {
        // Only a creation that was cut off looks like this; nothing can have been acknowledged from it.
        let fresh = bytes.iter().zip(HEADER_MAGIC).all(|(found, wanted)| found == wanted);
        return if fresh {
            Ok(Recovered { salt: None, sequence: 0, length: 0 })
        } else {
            Err(corrupt(0, "it does not start as a store's log".to_owned()))
        };
    }
    if &bytes[..8] != HEADER_MAGIC {
        return Err(corrupt(0, "it does not start as a store's log".to_owned()));
    }
    let version = le_u32(bytes, 8).unwrap_or_default();
    if version != VERSION {
        return Err(Error::Version { path: path.to_owned(), version, supported: VERSION });
    }
    let salt = le_u64(bytes, 16).unwrap_or_default();
    if header(salt) != bytes[..HEADER_BYTES] {
        return Err(corrupt(0, "its header's checksum is wrong".to_owned()));
    }
    let mut offset = HEADER_BYTES;
    let mut last = 0;
    while let Some((sequence, payload)) = parse_frame(salt, &bytes[offset..]) {
        if sequence != last + 1 {
            return Err(corrupt(offset, format!("frame {sequence} follows frame {last}")));
        }
        let mut input = payload;
        while let Some(record) = record::decode(&mut input).map_err(|what| corrupt(offset, what))? {
            each(record);
        }
        last = sequence;
        offset += FRAME_HEADER_BYTES + payload.len();
    }
    if let Some(at) = later_frame(salt, &bytes[offset..], last) {
        return Err(corrupt(offset, format!("a sound frame follows at byte {}", offset + at)));
    }
    Ok(Recovered { salt: Some(salt), sequence: last, length: offset as u64 })
}

/// Where a sound frame newer than `last` stands in `bytes`.
fn later_frame(salt: u64, bytes: &[u8], last: u64) -> Option<usize> {
    let magic = FRAME_MAGIC.to_le_bytes();
    let mut at = 0;
    while let Some(found) = bytes.get(at..)?.windows(4).position(|window| window == magic) {
        at += found;
        if parse_frame(salt, &bytes[at..]).is_some_and(|(sequence, _)| sequence > last) {
            return Some(at);
        }
        at += 1;
    }
    None
}

impl Log {
    /// Opens the log of a directory, creates it where there is none, and replays it.
    pub(crate) fn open(dir: &Path, each: impl FnMut(Record)) -> Result<Self, Error> {
        let path = dir.join(LOG_FILE);
        let new = dir.join(NEW_FILE);
        match disk::remove(&new) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &new, source));
            }
            _ => {}
        }
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(Error::io("read", &path, source)),
        };
        let found = recover(&path, &bytes, each)?;
        let Some(salt) = found.salt else {
            let mut log = Self::create(dir)?;
            log.become_current(dir)?;
            return Ok(log);
        };
        let file = File::options().read(true).write(true).open(&path).map_err(|source| Error::io("open", &path, source))?;
        if found.length < bytes.len() as u64 {
            tracing::warn!(path = %path.display(), offset = found.length, length = bytes.len(),
                "cut off a torn write at the end of the log; it was never acknowledged");
            disk::set_len(&file, &path, found.length).map_err(|source| Error::io("truncate", &path, source))?;
        }
        // What was read may be in the page cache only (a killed predecessor between write and fsync); it is about to
        // become visible, so it must be on disk.
        disk::sync_all(&file, &path).map_err(|source| Error::io("sync", &path, source))?;
        Ok(Self { file, path, salt, sequence: found.sequence, length: found.length, frame: Vec::new() })
    }

    /// An empty log under [`NEW_FILE`], to be filled and then made the current one.
    pub(crate) fn create(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(NEW_FILE);
        let salt = RandomState::new().hash_one(std::process::id());
        let file = disk::create(&path).map_err(|source| Error::io("create", &path, source))?;
        disk::write_at(&file, &path, &header(salt), 0).map_err(|source| Error::io("write", &path, source))?;
        Ok(Self { file, path, salt, sequence: 0, length: HEADER_BYTES as u64, frame: Vec::new() })
    }

    /// Syncs a log that [`Log::create`] made and puts it in the place of the current one.
    pub(crate) fn become_current(&mut self, dir: &Path) -> Result<(), Error> {
        let current = dir.join(LOG_FILE);
        disk::sync_all(&self.file, &self.path).map_err(|source| Error::io("sync", &self.path, source))?;
        disk::rename(&self.path, &current).map_err(|source| Error::io("rename", &self.path, source))?;
        self.path = current;
        disk::sync_dir(dir).map_err(|source| Error::io("sync", dir, source))
    }

    /// Bytes of the log.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// The log's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes one frame without syncing.
    pub(crate) fn write(&mut self, payload: &[u8]) -> Result<(), AppendError> {
        let length = u32::try_from(payload.len())
            .map_err(|_| AppendError::Undone(Error::RequestTooLarge { bytes: payload.len(), max: u32::MAX as usize }))?;
        let frame = &mut self.frame;
        frame.clear();
        frame.extend_from_slice(&FRAME_MAGIC.to_le_bytes());
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(&(self.sequence + 1).to_le_bytes());
        let crc = frame_crc(self.salt, frame, payload);
        frame.extend_from_slice(&crc.to_le_bytes());
        frame.extend_from_slice(payload);
        if let Err(source) = disk::write_at(&self.file, &self.path, frame, self.length) {
            let error = Error::io("append to", &self.path, source);
            return Err(match disk::set_len(&self.file, &self.path, self.length) {
                Ok(()) => AppendError::Undone(error),
                Err(_) => AppendError::Fatal(error),
            });
        }
        self.length += frame.len() as u64;
        self.sequence += 1;
        if self.frame.capacity() > 1 << 20 {
            self.frame = Vec::new();
        }
        Ok(())
    }

    /// Makes everything written durable.
    pub(crate) fn sync(&self) -> Result<(), AppendError> {
        disk::sync(&self.file, &self.path).map_err(|source| AppendError::Fatal(Error::io("sync", &self.path, source)))
    }

    /// Copies the frames of `old` from `offset` on to the end of this log.
    pub(crate) fn copy_tail(&mut self, old: &Log, offset: u64) -> Result<(), Error> {
        let length = usize::try_from(old.length - offset).unwrap_or(usize::MAX);
        let mut bytes = vec![0; length];
        old.file.read_exact_at(&mut bytes, offset).map_err(|source| Error::io("read", &old.path, source))?;
        let mut rest = &bytes[..];
        while let Some((_, payload)) = parse_frame(old.salt, rest) {
            self.write(payload).map_err(|error| match error {
                AppendError::Undone(error) | AppendError::Fatal(error) => error,
            })?;
            rest = &rest[FRAME_HEADER_BYTES + payload.len()..];
        }
        if rest.is_empty() {
            return Ok(());
        }
        Err(Error::Corrupt {
            path: old.path.clone(),
            offset: old.length - rest.len() as u64,
            length: old.length,
            what: "a frame written by this process does not read back".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log_of(frames: &[&[u8]]) -> (tempfile::TempDir, Vec<u64>, Vec<u8>) {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut log = Log::open(dir.path(), |_| {}).expect("open");
        let mut ends = vec![log.length()];
        for frame in frames {
            log.write(frame).expect("write");
            ends.push(log.length());
        }
        let bytes = std::fs::read(dir.path().join(LOG_FILE)).expect("read");
        (dir, ends, bytes)
    }

    fn revisions(bytes: &[u8]) -> Result<(Vec<i64>, Recovered), Error> {
        let mut seen = Vec::new();
        let found = recover(Path::new("log"), bytes, |record| {
            if let Record::Revision { revision } = record {
                seen.push(revision);
            }
        })?;
        Ok((seen, found))
    }

    fn payload(revision: i64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..200 {
            Record::Revision { revision }.encode(&mut bytes);
        }
        bytes
    }

    #[test]
    fn cut_at_every_byte_keeps_every_whole_frame() {
        let payloads: Vec<Vec<u8>> = (1..=3).map(payload).collect();
        let (_dir, ends, bytes) = log_of(&payloads.iter().map(Vec::as_slice).collect::<Vec<_>>());
        for cut in 0..=bytes.len() {
            let (seen, found) = revisions(&bytes[..cut]).unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
            let whole = ends.iter().skip(1).filter(|end| **end <= cut as u64).count();
            assert_eq!(seen.len(), whole * 200, "cut at {cut}");
            let sound = ends.iter().rfind(|end| **end <= cut as u64).copied().unwrap_or(0);
            assert_eq!(found.length, sound, "cut at {cut}");
        }
    }

    #[test]
    fn any_sectors_of_the_last_frame_may_be_missing() {
        let payloads: Vec<Vec<u8>> = (1..=3).map(payload).collect();
        let (_dir, ends, bytes) = log_of(&payloads.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let first = ends[2] as usize / 512;
        let sectors = bytes.len().div_ceil(512) - first;
        assert!(sectors < 12);
        for missing in 1u32..1 << sectors {
            for filler in [0u8, 0xa5] {
                let mut torn = bytes.clone();
                for sector in (0..sectors).filter(|sector| missing >> sector & 1 == 1) {
                    let start = ((first + sector) * 512).max(ends[2] as usize);
                    let end = ((first + sector + 1) * 512).min(torn.len());
                    torn[start..end].fill(filler);
                }
                let (seen, found) = revisions(&torn).unwrap_or_else(|error| panic!("missing {missing:b}: {error}"));
                assert_eq!((seen.len(), found.length), (400, ends[2]), "missing {missing:b}");
            }
        }
    }

    #[test]
    fn damage_before_the_end_is_refused() {
        let payloads: Vec<Vec<u8>> = (1..=3).map(payload).collect();
        let (_dir, ends, bytes) = log_of(&payloads.iter().map(Vec::as_slice).collect::<Vec<_>>());
        for at in [8, 20, ends[0] as usize + 1, ends[1] as usize + 30, ends[2] as usize - 1] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            let error = revisions(&damaged).expect_err("damaged");
            assert!(matches!(error, Error::Corrupt { .. } | Error::Version { .. }), "byte {at}: {error}");
        }
        assert!(matches!(revisions(b"hello, I am something else entirely"), Err(Error::Corrupt { .. })));
        assert!(matches!(revisions(b"hello"), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn a_value_that_holds_a_frame_is_no_frame() {
        let (_dir, _, inner) = log_of(&[&payload(9)]);
        let (_dir, ends, bytes) = log_of(&[&inner]);
        // Everything but the embedded frame of the other file is torn.
        let mut torn = bytes;
        torn[ends[0] as usize + 4] ^= 0xff;
        assert!(recover(Path::new("log"), &torn, |_| {}).is_ok());
    }
}
