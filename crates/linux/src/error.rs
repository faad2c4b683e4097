//! The error of every call of this crate: which call, on what, and the kernel's answer.

use std::io;

/// A failed call to the kernel.
#[derive(Debug, thiserror::Error)]
#[error("{call} {object}")]
pub struct Error {
    /// The system call, or the act when it takes several.
    pub call: &'static str,
    /// What it was done to: a path, a pid, a name.
    pub object: String,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

/// The result of every call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// All of it in one, for callers whose own errors are the kernel's.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let text = format!("{error}: {}", error.source);
        io::Error::new(error.source.kind(), text)
    }
}

impl Error {
    /// An error of `call` on `object`.
    pub fn new(call: &'static str, object: impl Into<String>, source: io::Error) -> Self {
        Self { call, object: object.into(), source }
    }

    /// An error that carries the calling thread's present `errno`.
    pub(crate) fn last(call: &'static str, object: impl Into<String>) -> Self {
        Self::new(call, object, io::Error::last_os_error())
    }

    /// An error that the kernel did not give but a check of ours.
    pub(crate) fn invalid(call: &'static str, object: impl Into<String>, why: &str) -> Self {
        Self::new(call, object, io::Error::new(io::ErrorKind::InvalidData, why.to_owned()))
    }

    /// The errno, when the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// Whether the kernel answered with this errno.
    pub fn is(&self, errno: i32) -> bool {
        self.errno() == Some(errno)
    }
}
