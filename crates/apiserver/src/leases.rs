//! Leases of the store that end events. One lease serves the events of a short while, as upstream's lease manager does
//! (`apiserver/pkg/storage/etcd3/lease_manager.go`).

use std::time::{Duration, Instant};

use apimachinery::status::Status;
use store::Store;
use tokio::sync::Mutex;

use crate::api::store_error;

/// How long one lease is given to new events.
const REUSE: Duration = Duration::from_secs(60);
/// Keys that one lease carries at most.
const KEYS_MAX: u32 = 1000;

/// The lease in use.
pub struct EventLeases {
    ttl: Duration,
    current: Mutex<Option<(i64, Instant, u32)>>,
}

impl EventLeases {
    /// Events live for `ttl` (and up to a minute longer).
    pub fn new(ttl: Duration) -> Self {
        Self { ttl, current: Mutex::new(None) }
    }

    /// A lease for one more event.
    ///
    /// # Errors
    /// What the store says when it cannot grant one.
    pub async fn lease(&self, store: &dyn Store) -> Result<i64, Status> {
        let mut current = self.current.lock().await;
        if let Some((id, made, keys)) = current.as_mut()
            && made.elapsed() < REUSE
            && *keys < KEYS_MAX
        {
            *keys += 1;
            return Ok(*id);
        }
        let seconds = (self.ttl + REUSE).as_secs().max(1);
        let lease = store.lease_grant(0, i64::try_from(seconds).unwrap_or(i64::MAX)).await.map_err(store_error)?;
        *current = Some((lease.id, Instant::now(), 1));
        Ok(lease.id)
    }
}
