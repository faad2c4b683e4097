//! Pods that wait: active by priority and age, backing off after a failure, or unschedulable until the cluster changes
//! (upstream: `pkg/scheduler/backend/queue`).
//!
//! ```text
//! add -> active --pop--> (being scheduled) --done--> gone
//!          ^                    | failed
//!          |                    v
//!       backing off <----- unschedulable (cluster changed, or five minutes)
//! ```

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use client::ObjectKey;

/// The first and the longest wait after a failure.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A pod is tried again after this long, whatever happened.
const UNSCHEDULABLE_MAX: Duration = Duration::from_secs(5 * 60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Active,
    /// Popped; `changed` when the cluster changed meanwhile.
    InFlight {
        changed: bool,
    },
    BackingOff {
        until: Instant,
    },
    Unschedulable {
        since: Instant,
    },
}

#[derive(Clone, Debug)]
struct Entry {
    priority: i32,
    order: u64,
    attempts: u32,
    state: State,
}

impl Entry {
    fn backoff(&self) -> Duration {
        let doublings = self.attempts.saturating_sub(1).min(8);
        (BACKOFF_FIRST * 2u32.pow(doublings)).min(BACKOFF_MAX)
    }
}

/// The queue. The time is an argument everywhere.
#[derive(Debug, Default)]
pub struct Queue {
    entries: HashMap<ObjectKey, Entry>,
    active: BTreeSet<(Reverse<i32>, u64, ObjectKey)>,
    next_order: u64,
}

impl Queue {
    /// A pod that is to be scheduled was made or changed.
    pub fn add(&mut self, key: ObjectKey, priority: i32) {
        let order = self.next_order;
        let entry = self.entries.entry(key.clone()).or_insert_with(|| Entry { priority, order, attempts: 0, state: State::Active });
        if entry.order == order {
            self.next_order += 1;
            self.active.insert((Reverse(priority), order, key));
        }
    }

    /// A pod is not to be scheduled any more: bound, deleted, or another's.
    pub fn remove(&mut self, key: &ObjectKey) {
        if let Some(entry) = self.entries.remove(key) {
            self.active.remove(&(Reverse(entry.priority), entry.order, key.clone()));
        }
    }

    /// The next pod to schedule.
    pub fn pop(&mut self, now: Instant) -> Option<ObjectKey> {
        self.wake(now);
        let (_, _, key) = self.active.pop_first()?;
        let entry = self.entries.get_mut(&key)?;
        entry.attempts += 1;
        entry.state = State::InFlight { changed: false };
        Some(key)
    }

    /// A popped pod found no node, or could not be bound. `retry` is for errors that a change of the cluster will not mend.
    pub fn failed(&mut self, key: &ObjectKey, retry: bool, now: Instant) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let changed = entry.state == State::InFlight { changed: true };
        entry.state =
            if retry || changed { State::BackingOff { until: now + entry.backoff() } } else { State::Unschedulable { since: now } };
    }

    /// The cluster changed so that pods may fit now.
    pub fn cluster_changed(&mut self) {
        for entry in self.entries.values_mut() {
            entry.state = match entry.state {
                State::Unschedulable { since } => State::BackingOff { until: since + entry.backoff() },
                State::InFlight { .. } => State::InFlight { changed: true },
                other => other,
            };
        }
    }

    /// When a waiting pod becomes active by itself, the earliest.
    pub fn next_wake(&self) -> Option<Instant> {
        let wake = |entry: &Entry| match entry.state {
            State::BackingOff { until } => Some(until),
            State::Unschedulable { since } => Some(since + UNSCHEDULABLE_MAX),
            _ => None,
        };
        self.entries.values().filter_map(wake).min()
    }

    fn wake(&mut self, now: Instant) {
        for (key, entry) in &mut self.entries {
            let due = match entry.state {
                State::BackingOff { until } => until <= now,
                State::Unschedulable { since } => since + UNSCHEDULABLE_MAX <= now,
                _ => false,
            };
            if due {
                entry.state = State::Active;
                self.active.insert((Reverse(entry.priority), entry.order, key.clone()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ObjectKey {
        ObjectKey::new("ns", name)
    }

    #[test]
    fn priority_then_age() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for (name, priority) in [("old", 0), ("young", 0), ("urgent", 10)] {
            queue.add(key(name), priority);
            queue.add(key(name), priority);
        }
        let order: Vec<String> = std::iter::from_fn(|| queue.pop(now)).map(|key| key.name).collect();
        assert_eq!(order, ["urgent", "old", "young"]);
    }

    #[test]
    fn a_pod_without_a_node_waits_for_a_change() {
        let (mut queue, start) = (Queue::default(), Instant::now());
        let second = Duration::from_secs(1);
        queue.add(key("p"), 0);
        assert!(queue.pop(start).is_some());
        queue.failed(&key("p"), false, start);
        assert_eq!(queue.pop(start + 60 * second), None);
        queue.cluster_changed();
        assert!(queue.pop(start + 60 * second).is_some());
        queue.failed(&key("p"), false, start + 60 * second);
        assert_eq!(queue.next_wake(), Some(start + 360 * second));
        // A change while it was tried counts.
        queue.cluster_changed();
        assert_eq!(queue.pop(start + 61 * second), None);
        assert!(queue.pop(start + 62 * second).is_some());
        queue.cluster_changed();
        queue.failed(&key("p"), false, start + 62 * second);
        assert!(queue.pop(start + 66 * second).is_some());
        queue.remove(&key("p"));
        assert_eq!(queue.next_wake(), None);
    }
}
