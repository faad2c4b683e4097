//! The three patches of objects: JSON patch, JSON merge patch and strategic merge patch.

pub mod json;
pub mod merge;
pub mod strategic;

use crate::status::Status;

/// Why a patch cannot be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The patch itself is malformed: 400.
    #[error("{0}")]
    Malformed(String),
    /// The patch does not fit the object: 422.
    #[error("{0}")]
    Unprocessable(String),
    /// Too many operations: 413.
    #[error("{0}")]
    TooLarge(String),
    /// Upstream answers 500 here: a merge key is missing, types differ.
    #[error("{0}")]
    Internal(String),
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        match error {
            Error::Malformed(text) => Status::bad_request(text),
            Error::Unprocessable(_) => Status::unprocessable_patch(),
            Error::TooLarge(text) => Status::too_large(&text),
            Error::Internal(text) => Status { code: 500, reason: "", message: text, details: None },
        }
    }
}
