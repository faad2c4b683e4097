//! Cgroup files and directories: the few ways in which they are read, written and removed.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// Writes a value in one call to a file that exists.
pub(crate) fn write(path: &Path, value: &str) -> Result<()> {
    let fail = |e| Error::new("write", format!("{value:?} to {}", path.display()), e);
    let mut file = std::fs::File::options().write(true).open(path).map_err(fail)?;
    file.write_all(value.as_bytes()).map_err(fail)
}

/// Reads a file.
pub(crate) fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::new("read", path.display().to_string(), e))
}

/// Reads a file, which may be gone: also while it is read (`ENODEV`, when its group is removed).
pub(crate) fn read_optional(path: &Path) -> Result<Option<String>> {
    match read(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.is(libc::ENOENT) || e.is(libc::ENODEV) || e.is(libc::EOPNOTSUPP) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Visits `dir` and all directories below it.
pub(crate) fn walk(dir: &Path, visit: &mut impl FnMut(&Path) -> Result<()>) -> Result<()> {
    visit(dir)?;
    for child in children(dir) {
        walk(&child, visit)?;
    }
    Ok(())
}

fn children(dir: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

/// Removes a group's directory and those below it, trying a busy one again until the deadline.
pub(crate) fn remove_tree(dir: &Path, deadline: Instant) -> Result<()> {
    loop {
        match std::fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                for child in children(dir) {
                    remove_tree(&child, deadline)?;
                }
                if Instant::now() > deadline {
                    return Err(Error::new("remove cgroup", dir.display().to_string(), e));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(e) => return Err(Error::new("remove cgroup", dir.display().to_string(), e)),
        }
    }
}
