//! A log file that whole entries are appended to.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A container's log, open for appending.
#[derive(Debug)]
pub struct LogFile {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    lost_entries: u64,
}

impl LogFile {
    /// Opens a log for appending, made with its directory when missing (0640, as containerd).
    ///
    /// # Errors
    /// Making the directory, opening the file.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: open(path)?, lost_entries: 0 })
    }

    /// Opens the log's path anew, after a rotation.
    ///
    /// # Errors
    /// As [`Self::open`]; the old file stays in use then.
    pub fn reopen(&mut self) -> io::Result<()> {
        self.file = open(&self.path)?;
        Ok(())
    }

    /// Appends whole entries. What cannot be written (a full disk) is lost, as under containerd: the container goes on. It is counted.
    pub fn append(&mut self, text: &[u8]) {
        let before = self.file.metadata().map(|meta| meta.len());
        let Err(error) = self.file.write_all(text) else {
            if self.lost_entries > 0 {
                tell(&format!("lost {} entries of log {}\n", self.lost_entries, self.path.display()));
                self.lost_entries = 0;
            }
            return;
        };
        if let Ok(before) = before {
            // Half an entry would spoil the next one.
            let _ = self.file.set_len(before);
        }
        if self.lost_entries == 0 {
            tell(&format!("failed to write log {}: {error}\n", self.path.display()));
        }
        self.lost_entries += text.iter().filter(|byte| **byte == b'\n').count() as u64;
    }
}

/// stderr may be a file on the same full disk, where `eprintln!` would panic.
fn tell(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

fn open(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    File::options().append(true).create(true).mode(0o640).open(path)
}
