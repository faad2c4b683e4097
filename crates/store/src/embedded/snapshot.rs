//! Snapshots of a store: its log up to a whole frame. The log is only ever appended to or replaced as a whole, so what was read of
//! it from one descriptor is the store at one revision, also while a server writes.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::lock;
use super::log::{LOG_FILE, recover};
use super::state::State;
use crate::{Error, RangeRequest};

/// What a snapshot holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotStatus {
    /// The present revision in it.
    pub revision: i64,
    /// How many keys there are at that revision.
    pub keys: i64,
    /// Its size.
    pub bytes: u64,
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let mut file = File::open(path).map_err(|source| Error::io("open", path, source))?;
    file.read_to_end(&mut bytes).map_err(|source| Error::io("read", path, source))?;
    Ok(bytes)
}

/// Checks a log's bytes; answers what is in it, and how many of the bytes are whole frames.
fn check(path: &Path, bytes: &[u8]) -> Result<(SnapshotStatus, usize), Error> {
    let mut state = State::default();
    let found = recover(path, bytes, |record| state.apply(&record))?;
    state.recovered();
    let length = usize::try_from(found.length).unwrap_or(usize::MAX).min(bytes.len());
    if found.salt.is_none() || length == 0 {
        let what = "it is no store's log, or was never written to".to_owned();
        return Err(Error::Corrupt { path: path.to_owned(), offset: 0, length: bytes.len() as u64, what });
    }
    let all = RangeRequest { count_only: true, range_end: b"\0"[..].into(), ..RangeRequest::key(&b"\0"[..]) };
    let keys = state.range(&all, state.visible)?.count;
    Ok((SnapshotStatus { revision: state.visible, keys, bytes: found.length }, length))
}

/// Writes a file durably under a name that nothing has yet.
fn publish(to: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut partial = to.as_os_str().to_owned();
    partial.push(".part");
    let partial = PathBuf::from(partial);
    let mut file = File::create(&partial).map_err(|source| Error::io("create", &partial, source))?;
    file.write_all(bytes).map_err(|source| Error::io("write", &partial, source))?;
    file.sync_all().map_err(|source| Error::io("sync", &partial, source))?;
    // A link, unlike a rename, replaces nothing.
    let linked = std::fs::hard_link(&partial, to).map_err(|source| Error::io("create", to, source));
    std::fs::remove_file(&partial).map_err(|source| Error::io("remove", &partial, source))?;
    linked?;
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|source| Error::io("sync", folder, source))
}

/// Writes a snapshot of the store in `dir`, which may be in use, to a new file.
///
/// # Errors
/// [`Error::Io`], also when there is such a file; [`Error::Corrupt`] and [`Error::Version`] for a log that cannot be restored.
pub fn snapshot_save(dir: &Path, to: &Path) -> Result<SnapshotStatus, Error> {
    let path = dir.join(LOG_FILE);
    let bytes = read(&path)?;
    let (status, length) = check(&path, &bytes)?;
    publish(to, &bytes[..length])?;
    Ok(status)
}

/// What a snapshot holds, after its checksums are checked.
///
/// # Errors
/// As [`snapshot_save`].
pub fn snapshot_status(snapshot: &Path) -> Result<SnapshotStatus, Error> {
    check(snapshot, &read(snapshot)?).map(|(status, _)| status)
}

/// Makes a store of a snapshot in `dir`, where there must be none.
///
/// # Errors
/// As [`snapshot_save`]; [`Error::Locked`] when a store is open there.
pub fn snapshot_restore(snapshot: &Path, dir: &Path) -> Result<SnapshotStatus, Error> {
    let bytes = read(snapshot)?;
    let (status, length) = check(snapshot, &bytes)?;
    if (length as u64) < bytes.len() as u64 {
        let what = "it is cut short".to_owned();
        return Err(Error::Corrupt { path: snapshot.to_owned(), offset: length as u64, length: bytes.len() as u64, what });
    }
    let _lock = lock(dir)?;
    publish(&dir.join(LOG_FILE), &bytes)?;
    Ok(status)
}
