//! The keyed work queue, as client-go's `util/workqueue`: a key waits at most once, is worked on by one worker at a
//! time, and comes back later when it failed.
//!
//! ```text
//!           add                    get                 done
//! absent ─────────> waiting ───────────> processing ─────────> absent
//!    │ add_after       ^                    │ add       done
//!    └──> delayed ─────┘ (its time)         └──> dirty ───────> waiting
//! ```
//!
//! Bounded by its keys: each is in it at most once, so it never holds more entries than there are objects.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// How failures are slowed down.
#[derive(Debug, Clone, Copy)]
pub struct RateLimits {
    /// Wait after the first failure of a key; doubles with each further one.
    pub base: Duration,
    /// The longest wait of a key.
    pub max: Duration,
    /// Retries per second over all keys.
    pub per_second: f64,
    /// Retries that may come at once.
    pub burst: f64,
}

impl Default for RateLimits {
    /// client-go's `DefaultTypedControllerRateLimiter`: 5 ms to 1000 s for a key, 10 a second and 100 at once for all.
    fn default() -> Self {
        Self { base: Duration::from_millis(5), max: Duration::from_secs(1000), per_second: 10.0, burst: 100.0 }
    }
}

#[derive(Debug)]
struct State<K> {
    waiting: VecDeque<K>,
    /// In `waiting`, or to be put there when its processing ends.
    dirty: HashSet<K>,
    processing: HashSet<K>,
    /// Ordered by time; the number tells apart keys of the same instant.
    delayed: BTreeMap<(Instant, u64), K>,
    delayed_until: HashMap<K, (Instant, u64)>,
    failures: HashMap<K, u32>,
    next_delay: u64,
    tokens: f64,
    tokens_at: Instant,
    shut_down: bool,
}

#[derive(Debug)]
struct Inner<K> {
    state: Mutex<State<K>>,
    wake: Notify,
    limits: RateLimits,
}

/// A cloneable handle to a queue of keys.
#[derive(Debug)]
pub struct WorkQueue<K>(Arc<Inner<K>>);

impl<K> Clone for WorkQueue<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Clone + Eq + Hash> Default for WorkQueue<K> {
    fn default() -> Self {
        Self::new(RateLimits::default())
    }
}

impl<K: Clone + Eq + Hash> WorkQueue<K> {
    /// An empty queue.
    pub fn new(limits: RateLimits) -> Self {
        let state = State {
            waiting: VecDeque::new(),
            dirty: HashSet::new(),
            processing: HashSet::new(),
            delayed: BTreeMap::new(),
            delayed_until: HashMap::new(),
            failures: HashMap::new(),
            next_delay: 0,
            tokens: limits.burst,
            tokens_at: Instant::now(),
            shut_down: false,
        };
        Self(Arc::new(Inner { state: Mutex::new(state), wake: Notify::new(), limits }))
    }

    fn state(&self) -> MutexGuard<'_, State<K>> {
        // Each change below is complete before anything can panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a key to be worked on; no change if it waits already.
    pub fn add(&self, key: K) {
        self.state().add(key);
        self.0.wake.notify_one();
    }

    /// Asks for a key to be worked on later; the earlier of two times counts.
    pub fn add_after(&self, key: K, delay: Duration) {
        if delay.is_zero() {
            return self.add(key);
        }
        self.state().add_at(key, Instant::now() + delay);
        self.0.wake.notify_one();
    }

    /// Asks for a failed key to be worked on again after its back-off.
    pub fn add_rate_limited(&self, key: K) {
        let delay = self.state().next_delay_of(&key, &self.0.limits);
        self.add_after(key, delay);
    }

    /// Ends the back-off of a key: it succeeded.
    pub fn forget(&self, key: &K) {
        self.state().failures.remove(key);
    }

    /// Failures of a key since it last succeeded.
    pub fn failures(&self, key: &K) -> u32 {
        self.state().failures.get(key).copied().unwrap_or(0)
    }

    /// Keys that wait now, without the delayed ones.
    pub fn len(&self) -> usize {
        self.state().waiting.len()
    }

    /// Whether no key waits now.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next key; [`WorkQueue::done`] must follow. `None` once the queue is shut down.
    pub async fn get(&self) -> Option<K> {
        loop {
            let woken = self.0.wake.notified();
            let next_time = {
                let mut state = self.state();
                if state.shut_down {
                    return None;
                }
                state.take_due(Instant::now());
                if let Some(key) = state.waiting.pop_front() {
                    state.dirty.remove(&key);
                    state.processing.insert(key.clone());
                    let more = !state.waiting.is_empty();
                    drop(state);
                    if more {
                        self.0.wake.notify_one();
                    }
                    return Some(key);
                }
                state.delayed.first_key_value().map(|((at, _), _)| *at)
            };
            match next_time {
                // Whichever comes first; both lead back to the state.
                Some(at) => _ = tokio::time::timeout_at(at, woken).await,
                None => woken.await,
            }
        }
    }

    /// Ends the work on a key; if it was added meanwhile it waits again.
    pub fn done(&self, key: &K) {
        let mut state = self.state();
        state.processing.remove(key);
        if state.dirty.contains(key) {
            state.waiting.push_back(key.clone());
        }
        drop(state);
        self.0.wake.notify_one();
    }

    /// Ends the queue for all workers.
    pub fn shut_down(&self) {
        self.state().shut_down = true;
        self.0.wake.notify_waiters();
        self.0.wake.notify_one();
    }
}

impl<K: Clone + Eq + Hash> State<K> {
    fn add(&mut self, key: K) {
        if self.shut_down || !self.dirty.insert(key.clone()) {
            return;
        }
        if !self.processing.contains(&key) {
            self.waiting.push_back(key);
        }
    }

    fn add_at(&mut self, key: K, at: Instant) {
        if self.shut_down {
            return;
        }
        if let Some(entry) = self.delayed_until.get(&key) {
            if entry.0 <= at {
                return;
            }
            self.delayed.remove(entry);
        }
        let entry = (at, self.next_delay);
        self.next_delay += 1;
        self.delayed.insert(entry, key.clone());
        self.delayed_until.insert(key, entry);
    }

    fn take_due(&mut self, now: Instant) {
        while let Some(first) = self.delayed.first_entry().filter(|first| first.key().0 <= now) {
            let key = first.remove();
            self.delayed_until.remove(&key);
            self.add(key);
        }
    }

    /// The larger of the key's own back-off and of what the bucket of all keys asks for.
    fn next_delay_of(&mut self, key: &K, limits: &RateLimits) -> Duration {
        let failures = self.failures.entry(key.clone()).or_insert(0);
        let own = limits.base.saturating_mul(1u32.checked_shl(*failures).unwrap_or(u32::MAX)).min(limits.max);
        *failures = failures.saturating_add(1);
        let now = Instant::now();
        let refill = (now - self.tokens_at).as_secs_f64() * limits.per_second;
        self.tokens = (self.tokens + refill).min(limits.burst) - 1.0;
        self.tokens_at = now;
        let shared = if self.tokens < 0.0 { -self.tokens / limits.per_second } else { 0.0 };
        own.max(Duration::from_secs_f64(shared))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn next(queue: &WorkQueue<&'static str>) -> Option<&'static str> {
        tokio::time::timeout(Duration::from_secs(5000), queue.get()).await.expect("a key")
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_waits_once_and_is_worked_on_once() {
        let queue = WorkQueue::default();
        queue.add("a");
        queue.add("a");
        queue.add("b");
        assert_eq!(queue.len(), 2);
        assert_eq!(next(&queue).await, Some("a"));
        queue.add("a");
        queue.add("a");
        assert_eq!(next(&queue).await, Some("b"));
        assert!(queue.is_empty(), "a is still being worked on");
        queue.done(&"a");
        assert_eq!(next(&queue).await, Some("a"));
        queue.done(&"a");
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn delays_keep_their_time_and_the_earlier_counts() {
        let queue = WorkQueue::default();
        let start = Instant::now();
        queue.add_after("late", Duration::from_secs(30));
        queue.add_after("x", Duration::from_secs(60));
        queue.add_after("x", Duration::from_secs(10));
        queue.add_after("x", Duration::from_secs(20));
        assert_eq!(next(&queue).await, Some("x"));
        assert_eq!(start.elapsed().as_secs(), 10);
        queue.done(&"x");
        assert_eq!(next(&queue).await, Some("late"));
        assert_eq!(start.elapsed().as_secs(), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn failures_back_off_from_5_ms_to_1000_s() {
        let queue = WorkQueue::default();
        let mut waits = Vec::new();
        for _ in 0..20 {
            let start = Instant::now();
            queue.add_rate_limited("a");
            assert_eq!(next(&queue).await, Some("a"));
            queue.done(&"a");
            waits.push(start.elapsed().as_millis() as u64);
        }
        assert_eq!(waits[..4], [5, 10, 20, 40]);
        assert_eq!(waits[17], 655_360);
        assert_eq!(waits[18..], [1_000_000, 1_000_000]);
        queue.forget(&"a");
        assert_eq!(queue.failures(&"a"), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn all_keys_share_a_bucket() {
        let queue = WorkQueue::new(RateLimits { burst: 2.0, ..RateLimits::default() });
        let start = Instant::now();
        for key in 0..4 {
            queue.add_rate_limited(key);
        }
        for _ in 0..4 {
            let key = queue.get().await.expect("a key");
            queue.done(&key);
        }
        assert_eq!(start.elapsed().as_millis(), 200);
    }

    #[tokio::test(start_paused = true)]
    async fn two_workers_are_both_woken() {
        let queue: WorkQueue<u32> = WorkQueue::default();
        let worker = |queue: WorkQueue<u32>| tokio::spawn(async move { queue.get().await });
        let workers = [worker(queue.clone()), worker(queue.clone())];
        tokio::task::yield_now().await;
        queue.add(1);
        queue.add(2);
        for worker in workers {
            assert!(worker.await.expect("worker").is_some());
        }
        let idle = worker(queue.clone());
        tokio::task::yield_now().await;
        queue.shut_down();
        assert_eq!(idle.await.expect("worker"), None);
    }
}
