//! The way of a container's output from a FIFO into its log in CRI's format.
//!
//! Bytes are copied from the FIFO (`tee(2)`), appended to the log, and only then taken off the FIFO: whoever does so may be
//! killed at any moment, and its successor goes on without a line lost or doubled. Used by our shim, and by cri-server
//! in the place of shims that do not write logs.
//!
//! ```text
//! FIFO --tee--> entries --append--> log file --note--> consume
//!                  `-----> attached readers
//! ```

#![forbid(unsafe_code)]

mod cursor;
mod file;
mod format;
mod reconcile;
mod tap;

pub use cursor::Cursor;
pub use file::LogFile;
pub use format::format;
pub use reconcile::reconcile;
pub use tap::{Progress, ROUNDS_MAX, Scratch, Tap, now};
