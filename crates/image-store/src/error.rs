//! Errors of the image store: each names the act and the object, and [`Error::kind`] sorts them for a caller's status codes.

use std::io;
use std::path::{Path, PathBuf};

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A reference that is no image name.
    #[error("bad image reference {reference:?}: {why}")]
    Reference { reference: String, why: &'static str },
    /// A snapshot key that can't be a file name, or a bad option.
    #[error("bad {field} {value:?}: {why}")]
    Argument { field: &'static str, value: String, why: &'static str },
    /// No such image here.
    #[error("image {reference} is not here")]
    ImageMissing { reference: String },
    /// An id prefix that several images have.
    #[error("image id {id} is ambiguous")]
    Ambiguous { id: String },
    /// No such snapshot here.
    #[error("snapshot {key} is not here")]
    SnapshotMissing { key: String },
    /// The registry does not have it.
    #[error("{object} is not in the registry")]
    NotInRegistry { object: String },
    /// The registry refuses these credentials, or wants some.
    #[error("registry denies {object}: {why}")]
    Denied { object: String, why: String },
    /// The registry could not be reached, broke off, or stalled, more often than is retried.
    #[error("failed to fetch {object}: {why}")]
    Unavailable { object: String, why: String },
    /// The registry's answer is not what the protocol allows.
    #[error("registry gave a bad answer for {object}: {why}")]
    BadAnswer { object: String, why: String },
    /// Content that is not what its digest says.
    #[error("{object} has digest {actual}, expected {expected}")]
    Digest { object: String, expected: String, actual: String },
    /// An image that can't be used here.
    #[error("image {object} can't be used: {why}")]
    Unusable { object: String, why: String },
    /// A layer that would write outside of itself, is no tar archive, or is above a limit.
    #[error("layer {layer} is refused: {why}")]
    Layer { layer: String, why: String },
    /// A file of the store.
    #[error("failed to {act} {path}")]
    File { act: &'static str, path: PathBuf, source: io::Error },
    /// A file of an archive or a layer being unpacked.
    #[error("failed to unpack {path:?} of layer {layer}")]
    Unpack { layer: String, path: String, source: io::Error },
    /// A record written by a newer program.
    #[error("record {path} has version {version}, this program knows up to {known}")]
    RecordVersion { path: PathBuf, version: u32, known: u32 },
    /// Another process has the store open.
    #[error("image store {path} is in use by another process")]
    InUse { path: PathBuf },
    /// TLS could not be set up.
    #[error("failed to set up TLS: {why}")]
    Tls { why: String },
    /// A registry's configuration can't be used.
    #[error("bad registry configuration {path}: {why}")]
    Hosts { path: PathBuf, why: String },
    /// The caller gave up.
    #[error("pull of {reference} was cancelled")]
    Cancelled { reference: String },
    /// A task of ours died.
    #[error("internal task for {what} failed")]
    Task { what: &'static str },
}

/// What a caller makes of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The caller's argument is wrong.
    InvalidArgument,
    /// It is not there, here or in the registry.
    NotFound,
    /// Credentials.
    PermissionDenied,
    /// Another try may help.
    Unavailable,
    /// The image itself is at fault; no try will help.
    DataLoss,
    /// The caller cancelled.
    Cancelled,
    /// This side is at fault.
    Internal,
}

impl Error {
    /// Whether there was no room on disk.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self, Self::File { source, .. } | Self::Unpack { source, .. } if is_full(source))
    }

    /// What a caller makes of it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Reference { .. } | Self::Argument { .. } | Self::Ambiguous { .. } => ErrorKind::InvalidArgument,
            Self::ImageMissing { .. } | Self::SnapshotMissing { .. } | Self::NotInRegistry { .. } => ErrorKind::NotFound,
            Self::Denied { .. } => ErrorKind::PermissionDenied,
            Self::Unavailable { .. } => ErrorKind::Unavailable,
            Self::BadAnswer { .. } | Self::Digest { .. } | Self::Unusable { .. } | Self::Layer { .. } => ErrorKind::DataLoss,
            Self::Cancelled { .. } => ErrorKind::Cancelled,
            _ => ErrorKind::Internal,
        }
    }
}

/// Whether an I/O error says that the file system or the user's share of it is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Names the act and the path of an I/O error.
pub(crate) fn file(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { act, path, source }
}
