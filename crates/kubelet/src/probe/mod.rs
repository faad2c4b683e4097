//! Probes: results by container, and the tasks that make them.
//!
//! ```text
//!   container runs --> startup probe --success--> liveness and readiness probes, each at its period
//!                           |                                   |
//!                        failure: the plan ends the container   failure: result, worker is woken
//! ```

pub mod action;
pub mod http;
mod task;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use task::{Context, Set};

/// Which of a container's probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Gates the other two.
    Startup,
    /// Its failure ends the container.
    Liveness,
    /// Its failure takes the pod out of service.
    Readiness,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        })
    }
}

/// What a probe has established, thresholds applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Passed.
    Success,
    /// Failed.
    Failure,
    /// Not known yet (startup only).
    Unknown,
}

/// Results by container id and kind. A clone is a snapshot.
#[derive(Clone, Debug, Default)]
pub struct Results(HashMap<(String, Kind), Outcome>);

impl Results {
    /// The result, if that probe of that container has one.
    pub fn get(&self, container_id: &str, kind: Kind) -> Option<Outcome> {
        // The tuple key wants an owned string; ids are short and lookups few.
        self.0.get(&(container_id.to_owned(), kind)).copied()
    }

    /// Records a result; true when it is another than before.
    pub fn set(&mut self, container_id: &str, kind: Kind, outcome: Outcome) -> bool {
        self.0.insert((container_id.to_owned(), kind), outcome) != Some(outcome)
    }

    /// Forgets all results of a container.
    pub fn forget(&mut self, container_id: &str) {
        self.0.retain(|(id, _), _| id != container_id);
    }
}

/// Results that the probe tasks of one pod write and its worker reads.
#[derive(Clone, Debug, Default)]
pub struct Shared(Arc<Mutex<Results>>);

impl Shared {
    /// The results as they are now.
    pub fn snapshot(&self) -> Results {
        self.lock().clone()
    }

    /// Records a result; true when it is another than before.
    pub fn set(&self, container_id: &str, kind: Kind, outcome: Outcome) -> bool {
        self.lock().set(container_id, kind, outcome)
    }

    /// The result, if any.
    pub fn get(&self, container_id: &str, kind: Kind) -> Option<Outcome> {
        self.lock().get(container_id, kind)
    }

    /// Forgets all results of a container.
    pub fn forget(&self, container_id: &str) {
        self.lock().forget(container_id);
    }

    fn lock(&self) -> MutexGuard<'_, Results> {
        // A panic while the map is held leaves it whole: every change is one insert or retain.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
