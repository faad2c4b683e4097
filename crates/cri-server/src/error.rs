//! Errors of the server, and their gRPC codes.
//!
//! Codes as containerd's: NotFound, FailedPrecondition, Unimplemented, DeadlineExceeded, Unavailable where it has them, Unknown for what a
//! runtime or the kernel refused. Where containerd says Unknown to a wrong request, it is InvalidArgument here (`e2e/cri`).

use std::io;

use camino::Utf8PathBuf;
use tonic::Code;

use crate::shim::CallError;
use crate::spec::SpecError;

/// What went wrong, with the act and the object; the cause is the source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{flag}: {reason}")]
    Config { flag: &'static str, reason: String },
    #[error("{kind} {id:?} is not found")]
    NotFound { kind: &'static str, id: String },
    #[error("name {name:?} is reserved for {id}")]
    Reserved { name: String, id: String },
    #[error("{0}")]
    Invalid(String),
    #[error("{kind} {id} is {state}")]
    State { kind: &'static str, id: String, state: &'static str },
    #[error("failed to make the spec of a container")]
    Spec(#[from] SpecError),
    #[error("{0} is not implemented")]
    Unimplemented(&'static str),
    #[error("{act} of {id} took longer than {seconds} s")]
    Deadline { act: &'static str, id: String, seconds: u64 },
    #[error("failed to {act} {path}")]
    Io { act: &'static str, path: Utf8PathBuf, source: io::Error },
    #[error("failed to read the record {path}: {reason}")]
    Record { path: Utf8PathBuf, reason: String },
    #[error("failed to {act} {id}")]
    Shim { act: &'static str, id: String, source: CallError },
    #[error("failed to start the shim of {id}: {reason}")]
    ShimStart { id: String, reason: String },
    #[error("failed to {act} {object}")]
    Image { act: &'static str, object: String, source: Box<image_store::Error> },
    #[error("failed to {act} of sandbox {id}")]
    Network { act: &'static str, id: String, source: Box<network::Error> },
    #[error("failed to {act}")]
    Kernel { act: String, source: linux::Error },
    #[error("failed to serve {endpoint}")]
    Serve { endpoint: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An I/O error on a path, for `map_err`.
    pub fn io(act: &'static str, path: impl Into<Utf8PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { act, path, source }
    }

    /// What a stop or a removal makes of a lookup: what is not there is done already.
    ///
    /// # Errors
    /// All but [`Error::NotFound`].
    pub fn if_found<T>(found: Result<T>) -> Result<Option<T>> {
        match found {
            Ok(found) => Ok(Some(found)),
            Err(Self::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A shim's refusal, for `map_err`.
    pub fn shim(act: &'static str, id: impl Into<String>) -> impl FnOnce(CallError) -> Self {
        let id = id.into();
        move |source| Self::Shim { act, id, source }
    }

    /// The message with all its causes.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } => Code::NotFound,
            Self::Invalid(_) | Self::Config { .. } => Code::InvalidArgument,
            Self::State { .. } | Self::Reserved { .. } => Code::FailedPrecondition,
            Self::Spec(SpecError::Unimplemented(_)) | Self::Unimplemented(_) => Code::Unimplemented,
            Self::Spec(_) => Code::InvalidArgument,
            Self::Deadline { .. } => Code::DeadlineExceeded,
            Self::Shim { source, .. } => source.code(),
            Self::Image { source, .. } => crate::images::code(source),
            Self::ShuttingDown => Code::Unavailable,
            _ => Code::Unknown,
        }
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        Self::new(error.code(), error.chain())
    }
}
