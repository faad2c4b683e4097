//! Watches. A watcher pulls from the state's history, so it needs no queue and nothing is ever dropped for it: one that
//! is slow reads later, and one that is slower than the compaction is told so and ends.

use std::sync::Arc;
use std::time::Duration;

use futures::Stream;

use super::Shared;
use super::state::Events;
use crate::{Error, WatchRequest, WatchResponse};

/// About how many events one response carries.
const RESPONSE_EVENTS_MAX: usize = 1000;

/// What wakes watchers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Signal {
    /// The present revision.
    pub(crate) visible: i64,
    /// The store is closing.
    pub(crate) closed: bool,
}

struct Watcher {
    shared: Arc<Shared>,
    signal: tokio::sync::watch::Receiver<Signal>,
    request: WatchRequest,
    /// The first revision not yet looked at.
    next: i64,
    progress: Option<Duration>,
    ended: bool,
}

/// The responses of a watch.
pub(crate) fn stream(shared: Arc<Shared>, request: WatchRequest) -> impl Stream<Item = Result<WatchResponse, Error>> + Send {
    let signal = shared.signal.subscribe();
    let next = if request.start_revision > 0 { request.start_revision } else { shared.read().visible + 1 };
    let progress = request.progress_notify.then_some(shared.options.progress_interval);
    let watcher = Watcher { shared, signal, request, next, progress, ended: false };
    futures::stream::unfold(watcher, |mut watcher| async move {
        let response = watcher.next_response().await?;
        Some((Ok(response), watcher))
    })
}

impl Watcher {
    async fn next_response(&mut self) -> Option<WatchResponse> {
        let idle_until = self.progress.map(|interval| tokio::time::Instant::now() + interval);
        loop {
            if self.ended {
                return None;
            }
            let Signal { visible, closed } = *self.signal.borrow_and_update();
            if let Some(response) = self.collect() {
                return Some(response);
            }
            // Whatever was committed before the closing has been collected above.
            if closed && self.next > visible {
                return None;
            }
            let changed = self.signal.changed();
            match idle_until {
                None => changed.await.ok()?,
                Some(deadline) => match tokio::time::timeout_at(deadline, changed).await {
                    Ok(changed) => changed.ok()?,
                    Err(_) => {
                        let revision = visible.min(self.next - 1);
                        return Some(WatchResponse { revision, ..WatchResponse::default() });
                    }
                },
            }
        }
    }

    /// The next response that history holds; moves on past what is not in the range.
    fn collect(&mut self) -> Option<WatchResponse> {
        let WatchRequest { key, range_end, prev_kv, .. } = &self.request;
        let state = self.shared.read();
        match state.events(key, range_end, self.next, *prev_kv, RESPONSE_EVENTS_MAX) {
            Events::Compacted { compact_revision } => {
                self.ended = true;
                Some(WatchResponse { events: Vec::new(), revision: state.visible, compact_revision })
            }
            Events::Some { events, through } => {
                self.next = self.next.max(through + 1);
                (!events.is_empty()).then_some(WatchResponse { events, revision: through, compact_revision: 0 })
            }
        }
    }
}
