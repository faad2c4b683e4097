//! Every change that the log makes on disk goes through here, so that a test can write them down and play power cuts.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

#[cfg(test)]
use super::tape::{self, Effect};

/// Makes an empty file, or empties the one that is there.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    #[cfg(test)]
    tape::note(path, || Effect::Create { name: tape::name(path), inode: tape::inode(&file) });
    Ok(file)
}

/// Writes bytes at a place of a file.
pub(crate) fn write_at(file: &File, path: &Path, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(test)]
    tape::note(path, || Effect::Write { inode: tape::inode(file), offset, bytes: bytes.to_vec() });
    let _ = path;
    file.write_all_at(bytes, offset)
}

/// Cuts a file off, or lengthens it with zeros.
pub(crate) fn set_len(file: &File, path: &Path, length: u64) -> io::Result<()> {
    #[cfg(test)]
    tape::note(path, || Effect::SetLength { inode: tape::inode(file), length });
    let _ = path;
    file.set_len(length)
}

/// Makes the content of a file durable, and all that is needed to read it.
pub(crate) fn sync(file: &File, path: &Path) -> io::Result<()> {
    file.sync_data()?;
    #[cfg(test)]
    tape::note(path, || Effect::Sync { inode: tape::inode(file) });
    let _ = path;
    Ok(())
}

/// As [`sync`], with all metadata: for files whose name is about to change, or whose end was cut off.
pub(crate) fn sync_all(file: &File, path: &Path) -> io::Result<()> {
    file.sync_all()?;
    #[cfg(test)]
    tape::note(path, || Effect::Sync { inode: tape::inode(file) });
    let _ = path;
    Ok(())
}

/// Gives a file the name of another one.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(test)]
    tape::note(to, || Effect::Rename {
        inode: tape::inode(&File::open(from).expect("a file")),
        from: tape::name(from),
        to: tape::name(to),
    });
    std::fs::rename(from, to)
}

/// Removes a file.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    std::fs::remove_file(path)?;
    #[cfg(test)]
    tape::note(path, || Effect::Remove { name: tape::name(path) });
    Ok(())
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()?;
    #[cfg(test)]
    tape::note_in(dir, || Effect::SyncDir);
    Ok(())
}
