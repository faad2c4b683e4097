//! Doubling back-off by key, as client-go's flowcontrol.Backoff decides it. Pure: time is an argument.
//!
//! It is the wall's time, for a container's end is told in it. Where the clock was put back behind the event no back-off is left: it
//! would else last until the clock comes there again.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;

/// First delay of container restarts and image pulls (upstream pkg/kubelet/kubelet.go, `initialNodeStatus…`: 10 s).
pub const INITIAL: Duration = Duration::from_secs(10);
/// Largest delay.
pub const MAX: Duration = Duration::from_secs(300);

#[derive(Clone, Debug)]
struct Entry {
    delay: Duration,
    last_update: Timestamp,
}

/// Delays by key. A key that was quiet for twice [`MAX`] starts anew.
#[derive(Clone, Debug, Default)]
pub struct BackOff {
    entries: HashMap<String, Entry>,
}

impl BackOff {
    /// The present delay of `key`; zero if none.
    pub fn delay(&self, key: &str) -> Duration {
        self.entries.get(key).map_or(Duration::ZERO, |e| e.delay)
    }

    /// When the back-off that began with the event at `since` ends, if it has not ended by `now`.
    pub fn until(&self, key: &str, since: Timestamp, now: Timestamp) -> Option<Timestamp> {
        let entry = self.entries.get(key)?;
        if expired(entry, since) {
            return None;
        }
        lasts(since, entry.delay, now)
    }

    /// When the back-off that began with the last [`BackOff::next`] ends, if it has not ended by `now`.
    pub fn until_since_update(&self, key: &str, now: Timestamp) -> Option<Timestamp> {
        let entry = self.entries.get(key)?;
        lasts(entry.last_update, entry.delay, now)
    }

    /// Doubles the delay of `key` after an event at `since`.
    pub fn next(&mut self, key: &str, since: Timestamp, now: Timestamp) {
        let delay = match self.entries.get(key) {
            Some(entry) if !expired(entry, since) => (entry.delay * 2).min(MAX),
            _ => INITIAL,
        };
        let entry = Entry { delay, last_update: now };
        self.entries.insert(key.to_owned(), entry);
    }

    /// Forgets `key`.
    pub fn reset(&mut self, key: &str) {
        self.entries.remove(key);
    }
}

/// When a delay that began at `since` ends, if `now` is within it.
fn lasts(since: Timestamp, delay: Duration, now: Timestamp) -> Option<Timestamp> {
    let until = since.checked_add(delay).ok()?;
    (since <= now && now < until).then_some(until)
}

fn expired(entry: &Entry, since: Timestamp) -> bool {
    let quiet = since.duration_since(entry.last_update);
    quiet > jiff::SignedDuration::try_from(MAX * 2).unwrap_or(jiff::SignedDuration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("small seconds are valid")
    }

    #[test]
    fn doubles_to_the_maximum_and_starts_anew_after_quiet() {
        let mut backoff = BackOff::default();
        let mut now = 1000;
        assert_eq!(backoff.until("a", at(now), at(now)), None);
        for expected in [10, 20, 40, 80, 160, 300, 300] {
            backoff.next("a", at(now), at(now));
            assert_eq!(backoff.delay("a").as_secs(), expected);
            assert!(backoff.until("a", at(now), at(now + 1)).is_some());
            now += i64::try_from(expected).expect("small");
        }
        now += 601;
        assert_eq!(backoff.until("a", at(now), at(now)), None);
        backoff.next("a", at(now), at(now));
        assert_eq!(backoff.delay("a"), INITIAL);
    }

    #[test]
    fn a_clock_that_is_put_back_holds_nobody_for_longer() {
        let mut backoff = BackOff::default();
        backoff.next("a", at(5000), at(5000));
        assert!(backoff.until_since_update("a", at(5001)).is_some());
        assert_eq!(backoff.until_since_update("a", at(1400)), None);
        assert_eq!(backoff.until("a", at(5000), at(1400)), None);
    }
}
