//! Leases: who holds which keys, and until when. Time is an argument.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::{Error, LeaseInfo};

/// etcd's limit (`server/lease/lessor.go`, MaxLeaseTTL).
pub(crate) const TTL_SECONDS_MAX: i64 = 9_000_000_000;

#[derive(Debug)]
struct Lease {
    ttl_seconds: i64,
    /// `None` until the clock first looks at it: after a start every lease gets its whole time again, as in etcd.
    deadline: Option<Instant>,
    keys: BTreeSet<Bytes>,
}

/// All leases.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    leases: BTreeMap<i64, Lease>,
    of_key: HashMap<Bytes, i64>,
}

impl Leases {
    /// Adds a lease whose time has not begun.
    pub(crate) fn grant(&mut self, id: i64, ttl_seconds: i64) {
        self.leases.insert(id, Lease { ttl_seconds, deadline: None, keys: BTreeSet::new() });
    }

    /// Forgets a lease.
    pub(crate) fn remove(&mut self, id: i64) {
        for key in self.leases.remove(&id).into_iter().flat_map(|lease| lease.keys) {
            self.of_key.remove(&key);
        }
    }

    /// Moves a key to a lease; 0 for none.
    pub(crate) fn attach(&mut self, key: &Bytes, id: i64) {
        if let Some(lease) = self.of_key.remove(key).and_then(|old| self.leases.get_mut(&old)) {
            lease.keys.remove(key);
        }
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.keys.insert(key.clone());
            self.of_key.insert(key.clone(), id);
        }
    }

    /// Whether the lease is there.
    pub(crate) fn contains(&self, id: i64) -> bool {
        self.leases.contains_key(&id)
    }

    /// The keys of a lease, in order.
    pub(crate) fn keys(&self, id: i64) -> Vec<Bytes> {
        self.leases.get(&id).map(|lease| lease.keys.iter().cloned().collect()).unwrap_or_default()
    }

    /// Ids and granted seconds of all.
    pub(crate) fn grants(&self) -> impl Iterator<Item = (i64, i64)> {
        self.leases.iter().map(|(id, lease)| (*id, lease.ttl_seconds))
    }

    /// Starts the clocks that do not run yet; answers the leases that have expired.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<i64> {
        let mut expired = Vec::new();
        for (id, lease) in &mut self.leases {
            let deadline = *lease.deadline.get_or_insert_with(|| after(now, lease.ttl_seconds));
            if deadline <= now {
                expired.push(*id);
            }
        }
        expired
    }

    /// Lets an expired lease that could not be ended be tried again later.
    pub(crate) fn postpone(&mut self, id: i64, until: Instant) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.deadline = Some(until);
        }
    }

    /// When the next lease expires.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.leases.values().filter_map(|lease| lease.deadline).min()
    }

    /// Starts a lease's time anew. An expired lease that is not yet revoked counts as gone.
    pub(crate) fn keepalive(&mut self, id: i64, now: Instant) -> Result<LeaseInfo, Error> {
        let lease = self.leases.get_mut(&id).ok_or(Error::LeaseNotFound { id })?;
        if lease.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(Error::LeaseNotFound { id });
        }
        lease.deadline = Some(after(now, lease.ttl_seconds));
        Ok(LeaseInfo { id, ttl_seconds: lease.ttl_seconds, granted_ttl_seconds: lease.ttl_seconds, keys: Vec::new() })
    }

    /// A lease's remaining time and keys.
    pub(crate) fn info(&self, id: i64, now: Instant) -> Result<LeaseInfo, Error> {
        let lease = self.leases.get(&id).ok_or(Error::LeaseNotFound { id })?;
        let remaining = lease
            .deadline
            .map_or(lease.ttl_seconds, |deadline| i64::try_from(deadline.saturating_duration_since(now).as_secs()).unwrap_or(i64::MAX));
        Ok(LeaseInfo { id, ttl_seconds: remaining, granted_ttl_seconds: lease.ttl_seconds, keys: lease.keys.iter().cloned().collect() })
    }
}

fn after(now: Instant, ttl_seconds: i64) -> Instant {
    let ttl = Duration::from_secs(u64::try_from(ttl_seconds).unwrap_or(0));
    // An instant past the clock's end is as good as one in a century.
    now.checked_add(ttl).unwrap_or(now + Duration::from_secs(3_000_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_lives_its_time_and_keepalive_renews_it() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut leases = Leases::default();
        leases.grant(7, 5);
        assert!(leases.tick(start).is_empty());
        assert_eq!(leases.next_deadline(), Some(start + second * 5));
        assert_eq!(leases.info(7, start + second * 2).expect("info").ttl_seconds, 3);
        leases.keepalive(7, start + second * 4).expect("keepalive");
        assert!(leases.tick(start + second * 8).is_empty());
        assert_eq!(leases.tick(start + second * 9), [7]);
        assert!(matches!(leases.keepalive(7, start + second * 9), Err(Error::LeaseNotFound { id: 7 })));
    }

    #[test]
    fn a_key_has_one_lease() {
        let key = Bytes::from_static(b"k");
        let mut leases = Leases::default();
        leases.grant(1, 5);
        leases.grant(2, 5);
        leases.attach(&key, 1);
        leases.attach(&key, 2);
        assert_eq!((leases.keys(1).len(), leases.keys(2).len()), (0, 1));
        leases.attach(&key, 0);
        assert!(leases.keys(2).is_empty());
    }
}
