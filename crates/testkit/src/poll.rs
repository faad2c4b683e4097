//! Waiting for a state: it is looked at again and again, for a busy machine has its own idea of time.

use std::fmt;
use std::time::{Duration, Instant};

/// How long a state that must come may take: an emulated machine is slow.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// The first pause between two looks; each is twice the one before, up to the last.
const PAUSES: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(100)];

/// A state did not come in time.
#[derive(Debug)]
pub struct NotReached {
    what: String,
    patience: Duration,
}

impl fmt::Display for NotReached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "waited {} s until {}", self.patience.as_secs(), self.what)
    }
}

impl std::error::Error for NotReached {}

/// Waits until `so`, for at most [`PATIENCE`].
///
/// # Panics
/// When it does not come true.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    if let Err(error) = until_within::<NotReached>(PATIENCE, what, || Ok(so())) {
        panic!("{error}");
    }
}

/// Waits until `so`; its error ends the wait.
///
/// # Errors
/// Its, or [`NotReached`] after `patience`.
pub fn until_within<E: From<NotReached>>(patience: Duration, what: &str, mut so: impl FnMut() -> Result<bool, E>) -> Result<(), E> {
    let deadline = Instant::now() + patience;
    let [mut pause, pause_max] = PAUSES;
    while !so()? {
        if Instant::now() >= deadline {
            return Err(NotReached { what: what.to_owned(), patience }.into());
        }
        std::thread::park_timeout(pause);
        pause = (pause * 2).min(pause_max);
    }
    Ok(())
}
