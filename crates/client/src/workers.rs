//! Runs a function over the keys of a queue.

use std::fmt::Display;
use std::future::Future;
use std::hash::Hash;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::WorkQueue;

/// A key's work is given up after this long and tried again.
const SYNC_DEADLINE: Duration = Duration::from_secs(60);

/// What comes after a successful piece of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Requeue {
    /// Nothing until the key is added again.
    #[default]
    No,
    /// The same key once more after this long.
    After(Duration),
}

/// Works on keys with `count` workers until `cancel`, then finishes what has begun. A key that fails comes back after
/// its back-off.
pub async fn run_workers<K, F, Fut, E>(name: &'static str, queue: WorkQueue<K>, count: usize, cancel: CancellationToken, sync: F)
where
    K: Clone + Eq + Hash + Display + Send + Sync + 'static,
    F: Fn(K) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<Requeue, E>> + Send,
    E: std::error::Error + Send,
{
    let tracker = TaskTracker::new();
    for _ in 0..count {
        let (queue, sync) = (queue.clone(), sync.clone());
        tracker.spawn(async move {
            while let Some(key) = queue.get().await {
                match tokio::time::timeout(SYNC_DEADLINE, sync(key.clone())).await {
                    Ok(Ok(requeue)) => {
                        queue.forget(&key);
                        if let Requeue::After(delay) = requeue {
                            queue.add_after(key.clone(), delay);
                        }
                    }
                    Ok(Err(error)) => {
                        let failures = queue.failures(&key);
                        let error = chain(&error);
                        // The first failures of a key are mostly conflicts, which end by themselves.
                        if failures < 3 {
                            tracing::debug!(controller = name, %key, failures, error, "failed to sync; trying again");
                        } else {
                            tracing::warn!(controller = name, %key, failures, error, "failed to sync; trying again");
                        }
                        queue.add_rate_limited(key.clone());
                    }
                    Err(_) => {
                        tracing::warn!(controller = name, %key, seconds = SYNC_DEADLINE.as_secs(),
                            "gave a sync up after its deadline; trying again");
                        queue.add_rate_limited(key.clone());
                    }
                }
                queue.done(&key);
            }
        });
    }
    tracker.close();
    cancel.cancelled().await;
    queue.shut_down();
    tracker.wait().await;
}

/// An error with all its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test(start_paused = true)]
    async fn a_failed_key_comes_back_and_cancel_ends_the_workers() {
        let queue = WorkQueue::default();
        let cancel = CancellationToken::new();
        let tries = Arc::new(AtomicU32::new(0));
        let sync = {
            let (tries, cancel) = (tries.clone(), cancel.clone());
            move |_key: String| {
                let (tries, cancel) = (tries.clone(), cancel.clone());
                async move {
                    match tries.fetch_add(1, Ordering::SeqCst) {
                        0 | 1 => Err(std::io::Error::other("not yet")),
                        2 => Ok(Requeue::After(Duration::from_secs(9))),
                        _ => {
                            cancel.cancel();
                            Ok(Requeue::No)
                        }
                    }
                }
            }
        };
        queue.add("a".to_owned());
        let start = tokio::time::Instant::now();
        run_workers("test", queue, 2, cancel, sync).await;
        assert_eq!(tries.load(Ordering::SeqCst), 4);
        assert_eq!(start.elapsed().as_secs(), 9);
    }
}
