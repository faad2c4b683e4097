//! The runtime's error: what was being done, and the chain of causes, as one line for the caller's log.

use std::error::Error as StdError;
use std::io;

/// A failed act of the runtime.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An act failed because of something else.
    #[error("{act}")]
    Act {
        /// What was being done, to what.
        act: String,
        /// Why it failed.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The request or its object does not allow it.
    #[error("{0}")]
    Refused(String),
}

/// The result of the runtime's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Names the act that failed.
pub trait Context<T> {
    /// Wraps the error with what was being done.
    fn during(self, act: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: StdError + Send + Sync + 'static> Context<T> for std::result::Result<T, E> {
    fn during(self, act: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Act { act: act(), source: Box::new(source) })
    }
}

impl From<linux::Error> for Error {
    fn from(error: linux::Error) -> Self {
        Self::Act { act: error.to_string(), source: Box::new(error.source) }
    }
}

/// Refuses with a message.
pub fn refuse<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::Refused(message.into()))
}

/// The error and its causes in one line, with the kernel's answers worded as Go words them ("no such file or
/// directory"): callers look for these words.
pub fn line(error: &(dyn StdError + 'static)) -> String {
    let mut text = words(error);
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&words(error));
        cause = error.source();
    }
    text
}

fn words(error: &(dyn StdError + 'static)) -> String {
    let text = error.to_string();
    let Some(io) = error.downcast_ref::<io::Error>() else { return text };
    if io.raw_os_error().is_none() {
        return text;
    }
    let text = text.rsplit_once(" (os error").map_or(text.as_str(), |(head, _)| head);
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worded_as_go_words_it() {
        let missing = Err::<(), _>(io::Error::from_raw_os_error(2));
        let error = missing.during(|| "stat /x".to_owned()).during(|| "exec: \"/x\"".to_owned()).expect_err("an error");
        assert_eq!(line(&error), "exec: \"/x\": stat /x: no such file or directory");
    }
}
