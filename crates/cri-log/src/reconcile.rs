//! A successor's first look: was the batch that its predecessor was at appended, and was it taken off the FIFO?

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use linux::pipes;

use crate::cursor::{self, Cursor, Stage};
use crate::format::format;

/// Finishes the step that the predecessor was in: afterwards no line of the stream is missing in the log or doubled. `cursor` and `log`
/// are the paths of what it noted and wrote, `name` is the stream's word.
///
/// # Errors
/// Reading or changing these files, or the FIFO.
pub fn reconcile(cursor: &Path, log: &Path, name: &str, fifo: &OwnedFd) -> std::io::Result<()> {
    let Some(record) = cursor::read(cursor)? else { return Ok(()) };
    if record.stage == Stage::Idle || record.path != log || record.stderr != (name == "stderr") {
        return Ok(());
    }
    let Some(file) = find(log, record.inode)? else { return Ok(()) };
    let size = file.metadata()?.len();
    let taken = usize::try_from(record.taken).unwrap_or(usize::MAX);
    let discard = if size < record.size + record.text {
        // It was not appended, or in part.
        file.set_len(size.min(record.size))?;
        false
    } else if record.stage == Stage::Appending {
        true
    } else {
        let mut text = vec![0; usize::try_from(record.text).unwrap_or(0)];
        file.read_exact_at(&mut text, record.size)?;
        let head = peek(fifo, taken)?;
        let mut again = Vec::new();
        // The last entry may have been an end without a newline.
        let whole = format(&head, true, name, "T", &mut again) == taken;
        whole && contents(&again).eq(contents(&text))
    };
    if discard {
        let null = std::fs::File::options().write(true).open("/dev/null")?;
        pipes::discard(fifo.as_fd(), &null, taken)?;
    }
    Cursor::open(cursor)?.done();
    Ok(())
}

/// The log file of that inode: under its name, or beside it under the one that a rotation gave it.
fn find(log: &Path, inode: u64) -> std::io::Result<Option<std::fs::File>> {
    let beside = log.parent().into_iter().flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten());
    for path in std::iter::once(log.to_owned()).chain(beside.map(|entry| entry.path())) {
        if std::fs::metadata(&path).is_ok_and(|meta| meta.ino() == inode && meta.is_file()) {
            return std::fs::File::options().read(true).write(true).open(path).map(Some);
        }
    }
    Ok(None)
}

/// A copy of a FIFO's head.
fn peek(fifo: &OwnedFd, bytes: usize) -> std::io::Result<Vec<u8>> {
    let (reader, writer) = pipes::pipe()?;
    let there = match pipes::tee(fifo.as_fd(), writer.as_fd(), bytes) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => 0,
        other => other?,
    };
    let mut head = vec![0; there];
    let mut filled = 0;
    while filled < there {
        filled += pipes::read(&reader, head.get_mut(filled..).unwrap_or_default())?;
    }
    Ok(head)
}

/// Entries without their times.
fn contents(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n').map(|line| {
        let space = line.iter().position(|byte| *byte == b' ').unwrap_or(0);
        line.get(space..).unwrap_or_default()
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::LogFile;

    struct Case {
        dir: PathBuf,
        log: PathBuf,
        reader: OwnedFd,
        writer: OwnedFd,
    }

    impl Case {
        fn new(name: &str, fifo: &[u8], log: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("coracle-adopt-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&dir).expect("directory");
            let path = dir.join("0.log");
            std::fs::write(&path, log).expect("log");
            let (reader, writer) = pipes::pipe().expect("pipe");
            pipes::write(&writer, fifo).expect("room");
            Self { dir, log: path, reader, writer }
        }

        /// What is left in the FIFO and in the log after a successor's look.
        fn reconciled(self) -> (Vec<u8>, String) {
            reconcile(&self.dir.join("cursor"), &self.log, "stdout", &self.reader).expect("reconciled");
            drop(self.writer);
            let left = peek(&self.reader, 1000).expect("left");
            let log = std::fs::read_to_string(&self.log).expect("log");
            std::fs::remove_dir_all(&self.dir).expect("directory");
            (left, log)
        }

        fn note(&self, taken: usize, text: usize, appended: bool) {
            let before = LogFile::open(&self.log).expect("log");
            let mut cursor = Cursor::open(&self.dir.join("cursor")).expect("cursor");
            cursor.appending(&before, "stdout", taken, text);
            if appended {
                cursor.consuming();
            }
        }

        fn append(&self, text: &str) {
            let mut file = std::fs::File::options().append(true).open(&self.log).expect("log");
            std::io::Write::write_all(&mut file, text.as_bytes()).expect("appended");
        }
    }

    const ENTRY: &str = "T1 stdout F one\n";

    #[test]
    fn killed_before_appending() {
        let case = Case::new("before", b"one\ntwo\n", "");
        case.note(4, ENTRY.len(), false);
        assert_eq!(case.reconciled(), (b"one\ntwo\n".to_vec(), String::new()));
    }

    #[test]
    fn killed_in_the_middle_of_appending() {
        let case = Case::new("middle", b"one\ntwo\n", "T0 stdout F zero\n");
        case.note(4, ENTRY.len(), false);
        case.append("T1 std");
        assert_eq!(case.reconciled(), (b"one\ntwo\n".to_vec(), "T0 stdout F zero\n".into()));
    }

    #[test]
    fn killed_between_appending_and_consuming() {
        for told in [false, true] {
            let case = Case::new(&format!("between-{told}"), b"one\ntwo\n", "");
            case.note(4, ENTRY.len(), told);
            case.append(ENTRY);
            assert_eq!(case.reconciled(), (b"two\n".to_vec(), ENTRY.into()));
        }
    }

    #[test]
    fn killed_after_consuming() {
        let case = Case::new("after", b"two\n", "");
        case.note(4, ENTRY.len(), true);
        case.append(ENTRY);
        assert_eq!(case.reconciled(), (b"two\n".to_vec(), ENTRY.into()));
    }
}
