//! Where the writing of a log stands, for the successor of a killed writer.
//!
//! A file of one record beside the writer's state, overwritten in place: written before a batch is appended, and after
//! it. A successor reads from it whether the batch at the FIFO's head is in the log already.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::file::LogFile;

/// The step that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Nothing is under way.
    Idle = 0,
    /// A batch is being appended.
    Appending = 1,
    /// It is in the log and is being taken off the FIFO.
    Consuming = 2,
}

/// What a successor finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The step that was begun.
    pub stage: Stage,
    /// Whether the batch is of stderr.
    pub stderr: bool,
    /// The batch's bytes in the FIFO.
    pub taken: u64,
    /// The batch's bytes in the log.
    pub text: u64,
    /// The log's size before it.
    pub size: u64,
    /// The log's inode.
    pub inode: u64,
    /// The log's path.
    pub path: PathBuf,
}

/// The writing side.
#[derive(Debug)]
pub struct Cursor {
    file: File,
}

impl Cursor {
    /// Makes or takes over the record's file.
    ///
    /// # Errors
    /// Opening the file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).truncate(false).write(true).read(true).open(path)?;
        Ok(Self { file })
    }

    /// Notes that a batch is about to be appended.
    pub fn appending(&mut self, log: &LogFile, stream: &str, taken: usize, text: usize) {
        use std::os::unix::ffi::OsStrExt;
        let path = log.path.as_os_str().as_bytes();
        let Ok(meta) = log.file.metadata() else { return };
        let mut record = Vec::with_capacity(40 + path.len());
        record.extend_from_slice(&[Stage::Appending as u8, u8::from(stream == "stderr"), 0, 0]);
        record.extend_from_slice(&u32::try_from(path.len()).unwrap_or(0).to_ne_bytes());
        for number in [taken as u64, text as u64, meta.len(), meta.ino()] {
            record.extend_from_slice(&number.to_ne_bytes());
        }
        record.extend_from_slice(path);
        // Without the note a kill in the next microseconds may double one batch; the batch itself matters more.
        let _ = self.file.write_at(&record, 0);
    }

    /// Notes that the batch is in the log.
    pub fn consuming(&mut self) {
        let _ = self.file.write_at(&[Stage::Consuming as u8], 0);
    }

    /// Notes that the batch is off the FIFO.
    pub fn done(&mut self) {
        let _ = self.file.write_at(&[Stage::Idle as u8], 0);
    }
}

/// Reads what a predecessor noted; `None` if it noted nothing readable.
///
/// # Errors
/// Opening or reading the file, but for its absence.
pub fn read(path: &Path) -> io::Result<Option<Record>> {
    use std::os::unix::ffi::OsStrExt;
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let number = |at: usize| bytes.get(at..at + 8).and_then(|part| part.try_into().ok()).map(u64::from_ne_bytes);
    let (Some(stage), Some(stderr)) = (bytes.first(), bytes.get(1)) else { return Ok(None) };
    let stage = match stage {
        1 => Stage::Appending,
        2 => Stage::Consuming,
        _ => Stage::Idle,
    };
    let length = bytes.get(4..8).and_then(|part| part.try_into().ok()).map_or(0, u32::from_ne_bytes) as usize;
    let (Some(taken), Some(text), Some(size), Some(inode), Some(path)) =
        (number(8), number(16), number(24), number(32), bytes.get(40..40 + length))
    else {
        return Ok(None);
    };
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(path));
    Ok(Some(Record { stage, stderr: *stderr == 1, taken, text, size, inode, path }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_reads_the_step() {
        let dir = std::env::temp_dir().join(format!("coracle-cursor-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("temporary directory");
        let (path, log_path) = (dir.join("cursor"), dir.join("0.log"));
        assert_eq!(read(&path).expect("absent"), None);
        std::fs::write(&log_path, "before\n").expect("log");
        let log = LogFile::open(&log_path).expect("log");
        let mut cursor = Cursor::open(&path).expect("cursor");
        assert_eq!(read(&path).expect("empty"), None);
        cursor.appending(&log, "stderr", 10, 50);
        let record = read(&path).expect("readable").expect("a record");
        assert_eq!((record.stage, record.stderr, record.taken, record.text, record.size), (Stage::Appending, true, 10, 50, 7));
        assert_eq!(record.path, log_path);
        cursor.consuming();
        assert_eq!(read(&path).expect("readable").expect("a record").stage, Stage::Consuming);
        cursor.done();
        assert_eq!(read(&path).expect("readable").expect("a record").stage, Stage::Idle);
        std::fs::remove_dir_all(&dir).expect("temporary directory");
    }
}
