//! What the informer has yet to show of one's own writes: until it has, no new decision is made
//! (`pkg/controller/controller_utils.go`, ControllerExpectations).

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use client::ObjectKey;
use tokio::time::Instant;

/// An expectation that is not met in this time is given up.
const TIMEOUT: Duration = Duration::from_secs(300);

#[derive(Debug)]
struct Expected {
    creations: usize,
    deletions: HashSet<String>,
    since: Instant,
}

/// Expectations by ReplicaSet.
#[derive(Debug, Default)]
pub(super) struct Expectations(Mutex<HashMap<ObjectKey, Expected>>);

impl Expectations {
    fn map(&self) -> MutexGuard<'_, HashMap<ObjectKey, Expected>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether everything expected has been seen, or was given up.
    pub(super) fn satisfied(&self, key: &ObjectKey) -> bool {
        self.map()
            .get(key)
            .is_none_or(|expected| (expected.creations == 0 && expected.deletions.is_empty()) || expected.since.elapsed() > TIMEOUT)
    }

    /// From now on so many creations and these deletions (UIDs) are expected.
    pub(super) fn expect(&self, key: &ObjectKey, creations: usize, deletions: impl IntoIterator<Item = String>) {
        let expected = Expected { creations, deletions: deletions.into_iter().collect(), since: Instant::now() };
        self.map().insert(key.clone(), expected);
    }

    /// So many creations were seen, or will not come.
    pub(super) fn created(&self, key: &ObjectKey, count: usize) {
        if let Some(expected) = self.map().get_mut(key) {
            expected.creations = expected.creations.saturating_sub(count);
        }
    }

    /// A deletion was seen, or will not come.
    pub(super) fn deleted(&self, key: &ObjectKey, uid: &str) {
        if let Some(expected) = self.map().get_mut(key) {
            expected.deletions.remove(uid);
        }
    }

    /// The ReplicaSet is gone.
    pub(super) fn forget(&self, key: &ObjectKey) {
        self.map().remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn met_or_given_up() {
        let expectations = Expectations::default();
        let key = ObjectKey::new("ns", "a");
        assert!(expectations.satisfied(&key));
        expectations.expect(&key, 2, ["u".to_owned()]);
        expectations.created(&key, 2);
        assert!(!expectations.satisfied(&key));
        expectations.deleted(&key, "other");
        expectations.deleted(&key, "u");
        assert!(expectations.satisfied(&key));
        expectations.expect(&key, 1, []);
        tokio::time::advance(TIMEOUT + Duration::from_secs(1)).await;
        assert!(expectations.satisfied(&key));
    }
}
