//! Spans for `coracle trace`: one log record per hop, found by the pod's UID.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A hop that has begun.
#[derive(Debug)]
pub(crate) struct Span {
    start_us: u64,
    began: Instant,
}

impl Span {
    pub(crate) fn start() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { start_us: u64::try_from(since.as_micros()).unwrap_or(u64::MAX), began: Instant::now() }
    }

    /// Records the hop for the object of this UID.
    pub(crate) fn end(self, uid: Option<&str>, hop: &'static str) {
        let duration_us = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::info!(target: "coracle::span", pod_uid = uid.unwrap_or_default(), hop, start_us = self.start_us, duration_us);
    }
}
