//! The keys with all their uncompacted versions, in memory. Sync and without clocks.
//!
//! What the writer has applied but not yet synced has revisions above `visible`; readers never look there. So a
//! commit becomes visible by moving `visible`, and is undone by dropping the versions above it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

use bytes::Bytes;

use super::lease::Leases;
use super::record::Record;
use crate::{Compare, CompareOp, CompareTarget, Error, Event, EventKind, KeyValue, RangeRequest, RangeResponse};

/// One version of a key.
#[derive(Debug, Clone)]
pub(crate) struct Version {
    pub(crate) revision: i64,
    /// Place of the change among those of its revision.
    pub(crate) sub: u32,
    pub(crate) create_revision: i64,
    pub(crate) version: i64,
    pub(crate) lease: i64,
    /// `None`: deleted.
    pub(crate) value: Option<Bytes>,
}

/// One change, in order; the rest is found in the key's versions.
#[derive(Debug, Clone)]
struct Change {
    revision: i64,
    key: Bytes,
}

/// Everything the store knows.
#[derive(Debug)]
pub(crate) struct State {
    keys: BTreeMap<Bytes, Vec<Version>>,
    changes: VecDeque<Change>,
    /// History below is gone.
    pub(crate) compacted: i64,
    /// The last revision applied, durable or not.
    pub(crate) applied: i64,
    /// The last durable revision: the present one for everybody but the writer.
    pub(crate) visible: i64,
    pub(crate) leases: Leases,
    /// Bytes that a log without garbage would have, roughly.
    pub(crate) live_bytes: u64,
}

/// Bytes that a version costs in the log beside its key and value.
const RECORD_OVERHEAD_BYTES: u64 = 45;

fn version_bytes(key: &[u8], version: &Version) -> u64 {
    (key.len() + version.value.as_ref().map_or(0, Bytes::len)) as u64 + RECORD_OVERHEAD_BYTES
}

/// What [`State::events`] found.
pub(crate) enum Events {
    /// The start is compacted.
    Compacted { compact_revision: i64 },
    /// The changes, of whole revisions, up to `through`; nothing in the range happened besides.
    Some { events: Vec<Event>, through: i64 },
}

impl Default for State {
    fn default() -> Self {
        // An empty etcd is at revision 1 and its first write makes revision 2 (`server/storage/mvcc/kvstore.go`).
        Self {
            keys: BTreeMap::new(),
            changes: VecDeque::new(),
            compacted: -1,
            applied: 1,
            visible: 1,
            leases: Leases::default(),
            live_bytes: 0,
        }
    }
}

/// The version that counts at a revision; `None` if the key is not there then.
fn at_revision(versions: &[Version], revision: i64) -> Option<&Version> {
    let end = versions.partition_point(|version| version.revision <= revision);
    versions[..end].last().filter(|version| version.value.is_some())
}

fn key_value(key: &Bytes, version: &Version, keys_only: bool) -> KeyValue {
    KeyValue {
        key: key.clone(),
        value: if keys_only { Bytes::new() } else { version.value.clone().unwrap_or_default() },
        create_revision: version.create_revision,
        mod_revision: version.revision,
        version: version.version,
        lease: version.lease,
    }
}

/// Whether a key lies in an etcd range.
pub(crate) fn in_range(key: &[u8], start: &[u8], end: &[u8]) -> bool {
    match end {
        b"" => key == start,
        b"\0" => key >= start,
        _ => key >= start && key < end,
    }
}

impl State {
    fn scan<'a>(&'a self, start: &'a [u8], end: &'a [u8]) -> impl Iterator<Item = (&'a Bytes, &'a Vec<Version>)> {
        let upper = match end {
            b"" => Bound::Included(start),
            b"\0" => Bound::Unbounded,
            end => Bound::Excluded(end.max(start)),
        };
        // `Included(x)..Excluded(x)` is the empty range; BTreeMap takes it.
        self.keys.range::<[u8], _>((Bound::Included(start), upper))
    }

    /// The live keys of a range at a revision.
    pub(crate) fn live<'a>(&'a self, start: &'a [u8], end: &'a [u8], revision: i64) -> impl Iterator<Item = (&'a Bytes, &'a Version)> {
        self.scan(start, end).filter_map(move |(key, versions)| Some((key, at_revision(versions, revision)?)))
    }

    /// Reads a range; `current` is the revision that the caller may see.
    pub(crate) fn range(&self, request: &RangeRequest, current: i64) -> Result<RangeResponse, Error> {
        if request.key.is_empty() {
            return Err(Error::EmptyKey);
        }
        let revision = if request.revision <= 0 { current } else { request.revision };
        if revision > current {
            return Err(Error::FutureRevision { revision, current });
        }
        if revision < self.compacted {
            return Err(Error::Compacted { revision, compact_revision: self.compacted });
        }
        let mut response = RangeResponse { revision: current, ..RangeResponse::default() };
        let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
        for (key, version) in self.live(&request.key, &request.range_end, revision) {
            response.count += 1;
            if request.count_only {
                continue;
            }
            if response.kvs.len() < limit {
                response.kvs.push(key_value(key, version, request.keys_only));
            } else {
                response.more = true;
            }
        }
        Ok(response)
    }

    /// A key as it is at a revision.
    pub(crate) fn get(&self, key: &Bytes, revision: i64) -> Option<KeyValue> {
        at_revision(self.keys.get(key)?, revision).map(|version| key_value(key, version, false))
    }

    /// Whether a comparison holds at a revision (`server/etcdserver/txn/txn.go`, applyCompare).
    pub(crate) fn holds(&self, compare: &Compare, revision: i64) -> bool {
        let mut found = false;
        for (_, version) in self.live(&compare.key, &compare.range_end, revision) {
            found = true;
            if !holds_for(compare, Some(version)) {
                return false;
            }
        }
        found || holds_for(compare, None)
    }

    /// Applies one record, from the log or from the writer. Revisions must not fall.
    pub(crate) fn apply(&mut self, record: &Record) {
        match record {
            Record::Put { revision, sub, create_revision, version, lease, key, value } => {
                let made = Version {
                    revision: *revision,
                    sub: *sub,
                    create_revision: *create_revision,
                    version: *version,
                    lease: *lease,
                    value: Some(value.clone()),
                };
                self.push(key, made);
            }
            Record::Delete { revision, sub, key } => {
                let made = Version { revision: *revision, sub: *sub, create_revision: 0, version: 0, lease: 0, value: None };
                self.push(key, made);
            }
            Record::Compact { revision } => self.compact(*revision),
            Record::Revision { revision } => self.applied = self.applied.max(*revision),
            Record::LeaseGrant { id, ttl_seconds } => self.leases.grant(*id, *ttl_seconds),
            Record::LeaseRevoke { id } => self.leases.remove(*id),
        }
    }

    fn push(&mut self, key: &Bytes, version: Version) {
        self.live_bytes += version_bytes(key, &version);
        self.applied = self.applied.max(version.revision);
        self.changes.push_back(Change { revision: version.revision, key: key.clone() });
        match self.keys.get_mut(key) {
            Some(versions) => versions.push(version),
            None => {
                self.keys.insert(key.clone(), vec![version]);
            }
        }
    }

    /// Makes what was applied visible: called once it is durable.
    pub(crate) fn publish(&mut self, records: &[Record]) {
        for record in records {
            match record {
                Record::Put { key, lease, .. } => self.leases.attach(key, *lease),
                Record::Delete { key, .. } => self.leases.attach(key, 0),
                Record::LeaseRevoke { id } => self.leases.remove(*id),
                _ => {}
            }
        }
        self.visible = self.applied;
    }

    /// Drops what was applied and is not visible.
    pub(crate) fn undo(&mut self) {
        while let Some(change) = self.changes.pop_back_if(|change| change.revision > self.visible) {
            let Some(versions) = self.keys.get_mut(&change.key) else {
                continue;
            };
            while let Some(version) = versions.pop_if(|version| version.revision > self.visible) {
                self.live_bytes -= version_bytes(&change.key, &version);
            }
            if versions.is_empty() {
                self.keys.remove(&change.key);
            }
        }
        self.applied = self.visible;
    }

    /// Drops versions that no read or watch from `revision` on can see.
    pub(crate) fn compact(&mut self, revision: i64) {
        self.compacted = self.compacted.max(revision);
        let end = self.changes.partition_point(|change| change.revision <= revision);
        let keep_from = self.changes.partition_point(|change| change.revision < revision);
        for index in 0..end {
            let key = self.changes[index].key.clone();
            self.compact_key(&key, revision);
        }
        self.changes.drain(..keep_from);
    }

    fn compact_key(&mut self, key: &Bytes, revision: i64) {
        let Some(versions) = self.keys.get_mut(key) else {
            return;
        };
        let upto = versions.partition_point(|version| version.revision <= revision);
        // The last version stays, a deletion only if it is of this very revision: a watch may start there.
        let keep_last = upto > 0 && (versions[upto - 1].value.is_some() || versions[upto - 1].revision == revision);
        for version in versions.drain(..upto - usize::from(keep_last)) {
            self.live_bytes -= version_bytes(key, &version);
        }
        if versions.is_empty() {
            self.keys.remove(key);
        }
    }

    /// Changes of a range from `start` on, as many whole revisions as fit into about `max` events.
    pub(crate) fn events(&self, key: &[u8], range_end: &[u8], start: i64, prev_kv: bool, max: usize) -> Events {
        if start < self.compacted {
            return Events::Compacted { compact_revision: self.compacted };
        }
        let mut events = Vec::new();
        let first = self.changes.partition_point(|change| change.revision < start);
        let mut last = 0;
        for change in self.changes.range(first..) {
            if change.revision > self.visible {
                break;
            }
            if events.len() >= max && change.revision != last {
                return Events::Some { events, through: last };
            }
            last = change.revision;
            if in_range(&change.key, key, range_end) {
                events.extend(self.event(change, prev_kv));
            }
        }
        Events::Some { events, through: self.visible }
    }

    fn event(&self, change: &Change, prev_kv: bool) -> Option<Event> {
        let versions = self.keys.get(&change.key)?;
        let at = versions.binary_search_by_key(&change.revision, |version| version.revision).ok()?;
        let version = &versions[at];
        let previous = at.checked_sub(1).map(|at| &versions[at]).filter(|version| version.value.is_some());
        let kind = if version.value.is_some() { EventKind::Put } else { EventKind::Delete };
        Some(Event {
            kind,
            kv: key_value(&change.key, version, false),
            prev_kv: previous.filter(|_| prev_kv).map(|version| key_value(&change.key, version, false)),
        })
    }

    /// All that a rewritten log must say, in the order of replay.
    pub(crate) fn snapshot(&self) -> Vec<Record> {
        let mut versions: Vec<(&Bytes, &Version)> =
            self.keys.iter().flat_map(|(key, versions)| versions.iter().map(move |version| (key, version))).collect();
        versions.sort_by_key(|(_, version)| (version.revision, version.sub));
        let leases = self.leases.grants().map(|(id, ttl_seconds)| Record::LeaseGrant { id, ttl_seconds });
        let keys = versions.into_iter().map(|(key, version)| match &version.value {
            Some(value) => Record::Put {
                revision: version.revision,
                sub: version.sub,
                create_revision: version.create_revision,
                version: version.version,
                lease: version.lease,
                key: key.clone(),
                value: value.clone(),
            },
            None => Record::Delete { revision: version.revision, sub: version.sub, key: key.clone() },
        });
        let end = [Record::Revision { revision: self.visible }, Record::Compact { revision: self.compacted }];
        leases.chain(keys).chain(end).collect()
    }

    /// Ends a replay: all that was read is durable.
    pub(crate) fn recovered(&mut self) {
        self.visible = self.applied;
        let mut attached = Vec::new();
        for (key, version) in self.live(b"\0", b"\0", self.visible) {
            if version.lease != 0 {
                attached.push((key.clone(), version.lease));
            }
        }
        for (key, lease) in attached {
            self.leases.attach(&key, lease);
        }
    }
}

fn holds_for(compare: &Compare, version: Option<&Version>) -> bool {
    use std::cmp::Ordering;
    let number = |get: fn(&Version) -> i64| version.map_or(0, get);
    let ordering = match &compare.target {
        CompareTarget::Version(given) => number(|version| version.version).cmp(given),
        CompareTarget::CreateRevision(given) => number(|version| version.create_revision).cmp(given),
        CompareTarget::ModRevision(given) => number(|version| version.revision).cmp(given),
        CompareTarget::Lease(given) => number(|version| version.lease).cmp(given),
        CompareTarget::Value(given) => match version.and_then(|version| version.value.as_ref()) {
            Some(value) => value.cmp(given),
            None => return false,
        },
    };
    match compare.op {
        CompareOp::Equal => ordering == Ordering::Equal,
        CompareOp::NotEqual => ordering != Ordering::Equal,
        CompareOp::Less => ordering == Ordering::Less,
        CompareOp::Greater => ordering == Ordering::Greater,
    }
}
