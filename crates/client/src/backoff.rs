//! How a broken watch is taken up again.

use std::time::Duration;

use kube::runtime::utils::Backoff;

/// First wait: short, for in `coracle up` the server comes up in the same second as its clients.
const FIRST: Duration = Duration::from_millis(50);
/// Longest wait, as client-go's reflector has it.
const LONGEST: Duration = Duration::from_secs(30);

/// Doubles from 50 ms to 30 s; starts over after a success.
#[derive(Debug, Clone, Default)]
pub struct WatchBackoff {
    failures: u32,
}

impl Iterator for WatchBackoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let wait = FIRST.saturating_mul(1u32.checked_shl(self.failures).unwrap_or(u32::MAX)).min(LONGEST);
        self.failures = (self.failures + 1).min(16);
        Some(wait)
    }
}

impl Backoff for WatchBackoff {
    fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_and_starts_over() {
        let mut backoff = WatchBackoff::default();
        let waits: Vec<u64> = (&mut backoff).take(12).map(|wait| wait.as_millis() as u64).collect();
        assert_eq!(waits, [50, 100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]);
        backoff.reset();
        assert_eq!(backoff.next(), Some(FIRST));
    }
}
