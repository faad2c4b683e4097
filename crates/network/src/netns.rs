//! Pods' network namespaces, pinned at a path. Thin names over [`linux::netns`].

use camino::Utf8Path;

pub use linux::netns::Error;

/// Makes a network namespace and pins it at `path`, whose parent directory must exist.
///
/// # Errors
/// When the path is taken or the kernel refuses.
pub fn create(path: &Utf8Path) -> Result<(), Error> {
    linux::netns::create(path.as_std_path())
}

/// Drops the pin; a path that does not exist is a success.
///
/// # Errors
/// When unmount or removal fails.
pub fn remove(path: &Utf8Path) -> Result<(), Error> {
    linux::netns::remove(path.as_std_path())
}

/// Whether `path` holds a namespace.
pub fn is_pinned(path: &Utf8Path) -> bool {
    linux::netns::is_pinned(path.as_std_path())
}
