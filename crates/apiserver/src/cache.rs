//! The watch cache: what the store holds, fed by one watch over `/registry/`, with a ring of recent changes per keyspace.
//!
//! ```text
//! store.watch("/registry/") ──> feed ──> objects + ring ──> applied revision ──> lists, watches
//! ```
//!
//! A watcher keeps only its position in the ring and pulls from it, so it has no queue and costs no memory. One that is so
//! slow that the ring has gone past it is closed, and resumes from its last resourceVersion; what is older than the ring is 410.
//!
//! **Invariant**: the cache's revision and its contents change under one lock, so a list or bookmark at revision R has seen
//! every change up to R, of every keyspace.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use serde_json::{Map, Value};
use store::{EventKind, KeyValue, RangeRequest, Store, WatchRequest};
use tokio_util::sync::CancellationToken;

use crate::resources::Storage;

/// Changes kept per keyspace.
const RING_EVENTS_MAX: usize = 2048;
/// Bytes of objects that the changes of one keyspace may hold.
const RING_BYTES_MAX: usize = 4 << 20;
/// Keys that one step of the first reading brings.
const LOAD_CHUNK: i64 = 2000;

/// One version of an object.
#[derive(Debug)]
pub struct Entry {
    /// Its key.
    pub key: Arc<str>,
    /// The stored bytes, without resourceVersion.
    pub value: Bytes,
    /// Its resourceVersion; for a deletion, that of the deletion.
    pub revision: i64,
    /// What selectors look at.
    pub attributes: Arc<Value>,
    /// Kept while the entry is the present one.
    parsed: Mutex<Option<Arc<Value>>>,
}

impl Entry {
    fn new(key: Arc<str>, value: Bytes, revision: i64) -> Self {
        let attributes = serde_json::from_slice(&value).map(attributes).unwrap_or_default();
        Self { key, value, revision, attributes: Arc::new(attributes), parsed: Mutex::default() }
    }

    fn deleted(&self, revision: i64) -> Self {
        let (key, value, attributes) = (self.key.clone(), self.value.clone(), self.attributes.clone());
        Self { key, value, revision, attributes, parsed: Mutex::default() }
    }

    /// The object, parsed once and kept (for the few kinds that the server itself looks up again and again).
    pub fn parsed(&self) -> Option<Arc<Value>> {
        let mut parsed = self.parsed.lock().unwrap_or_else(PoisonError::into_inner);
        if parsed.is_none() {
            *parsed = crate::object::parse(&self.value, self.revision).ok().map(Arc::new);
        }
        parsed.clone()
    }

    fn forget_parsed(&self) {
        *self.parsed.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The parts that selectors can see: names, labels, and scalars of a few objects.
pub fn attributes(object: Value) -> Value {
    let Value::Object(object) = object else { return Value::Null };
    let mut kept = Map::new();
    for (key, value) in object {
        match (key.as_str(), value) {
            ("metadata", Value::Object(metadata)) => {
                let known = |name: &str| matches!(name, "name" | "namespace" | "labels");
                kept.insert(key, Value::Object(metadata.into_iter().filter(|(name, _)| known(name)).collect()));
            }
            ("involvedObject", Value::Object(reference)) => {
                let reference = Value::Object(reference);
                kept.insert("regarding".to_owned(), reference.clone());
                kept.insert(key, reference);
            }
            ("reportingComponent", value) => {
                kept.insert("reportingController".to_owned(), value.clone());
                kept.insert(key, value);
            }
            ("spec" | "status" | "source", Value::Object(inner)) => {
                let small = |name: &str, value: &Value| name == "podIPs" || !(value.is_array() || value.is_object());
                kept.insert(key, Value::Object(inner.into_iter().filter(|(name, value)| small(name, value)).collect()));
            }
            ("type" | "reason", value) => {
                kept.insert(key, value);
            }
            _ => {}
        }
    }
    Value::Object(kept)
}

/// Kind of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Made.
    Added,
    /// Changed.
    Modified,
    /// Gone.
    Deleted,
}

/// One change of one object.
#[derive(Debug)]
pub struct CacheEvent {
    /// What happened.
    pub change: Change,
    /// The object after it; for a deletion, as it was last, with the deletion's revision.
    pub entry: Arc<Entry>,
    /// The object before it.
    pub previous: Option<Arc<Entry>>,
}

struct Keyspace {
    prefix: String,
    objects: BTreeMap<Arc<str>, Arc<Entry>>,
    ring: VecDeque<Arc<CacheEvent>>,
    ring_bytes: usize,
    /// Number of the ring's first event.
    first: u64,
    /// All changes after this revision are in the ring.
    complete_after: i64,
    signal: Arc<tokio::sync::watch::Sender<u64>>,
}

impl Keyspace {
    fn next(&self) -> u64 {
        self.first + self.ring.len() as u64
    }

    fn push(&mut self, event: CacheEvent) {
        if let Some(previous) = &event.previous {
            previous.forget_parsed();
        }
        self.ring_bytes += event.entry.value.len();
        self.ring.push_back(Arc::new(event));
        while self.ring.len() > RING_EVENTS_MAX || (self.ring_bytes > RING_BYTES_MAX && self.ring.len() > 1) {
            let Some(gone) = self.ring.pop_front() else { break };
            self.ring_bytes -= gone.entry.value.len();
            self.complete_after = gone.entry.revision;
            self.first += 1;
        }
    }

    fn apply(&mut self, kind: EventKind, kv: KeyValue) {
        let key: Arc<str> = String::from_utf8_lossy(&kv.key).into();
        match kind {
            EventKind::Put => {
                let entry = Arc::new(Entry::new(key.clone(), kv.value, kv.mod_revision));
                let previous = self.objects.insert(key, entry.clone());
                let change = if previous.is_some() { Change::Modified } else { Change::Added };
                self.push(CacheEvent { change, entry, previous });
            }
            EventKind::Delete => {
                if let Some(previous) = self.objects.remove(&key) {
                    let entry = Arc::new(previous.deleted(kv.mod_revision));
                    self.push(CacheEvent { change: Change::Deleted, entry, previous: Some(previous) });
                }
            }
        }
    }
}

struct State {
    revision: i64,
    keyspaces: Vec<Keyspace>,
    /// Counts reloads; a subscription of an earlier one is closed.
    generation: u64,
}

/// The cache of all keyspaces.
pub struct Cache {
    /// Everything of ours in the store.
    root: String,
    state: RwLock<State>,
    applied: tokio::sync::watch::Sender<i64>,
}

/// Where a watch starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the present state, then its changes.
    Snapshot,
    /// With the changes after a revision.
    After(i64),
}

/// A watcher's position.
pub struct Subscription {
    keyspace: usize,
    next: u64,
    generation: u64,
    signal: tokio::sync::watch::Receiver<u64>,
}

/// What a watcher finds.
pub enum Batch {
    /// Changes, in order, and the revision up to which nothing is missing. May be empty.
    Events(Vec<Arc<CacheEvent>>, i64),
    /// The ring has gone past this watcher.
    Lagged,
}

/// The revision asked for is older than the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooOld {
    /// What was asked for.
    pub wanted: i64,
    /// The oldest that can be had.
    pub oldest: i64,
}

/// A consistent view of a collection.
pub struct Snapshot {
    /// The objects, in key order.
    pub entries: Vec<Arc<Entry>>,
    /// The cache's revision.
    pub revision: i64,
}

impl Cache {
    /// An empty cache of these keyspaces below `root`.
    pub fn new(root: &str, storages: &[Storage]) -> Self {
        let keyspace = |storage: &Storage| Keyspace {
            prefix: storage.prefix.clone(),
            objects: BTreeMap::new(),
            ring: VecDeque::new(),
            ring_bytes: 0,
            first: 0,
            complete_after: 0,
            signal: Arc::new(tokio::sync::watch::Sender::new(0)),
        };
        let state = State { revision: 0, keyspaces: storages.iter().map(keyspace).collect(), generation: 0 };
        Self { root: root.to_owned(), state: RwLock::new(state), applied: tokio::sync::watch::Sender::new(0) }
    }

    // Nothing panics while it holds the lock halfway through a change that readers could see.
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The revision that the cache has reached.
    pub fn revision(&self) -> i64 {
        self.read().revision
    }

    /// Waits until the cache has reached a revision; `false` when `timeout` passed first.
    pub async fn reached(&self, revision: i64, timeout: Duration) -> bool {
        let mut applied = self.applied.subscribe();
        let wait = applied.wait_for(|applied| *applied >= revision);
        matches!(tokio::time::timeout(timeout, wait).await, Ok(Ok(_)))
    }

    /// One object.
    pub fn get(&self, keyspace: usize, key: &str) -> Option<Arc<Entry>> {
        self.read().keyspaces[keyspace].objects.get(key).cloned()
    }

    /// All objects whose key starts with `prefix`.
    pub fn snapshot(&self, keyspace: usize, prefix: &str) -> Snapshot {
        let state = self.read();
        Snapshot { entries: collect(&state.keyspaces[keyspace], prefix), revision: state.revision }
    }

    /// Starts a watch; with [`Start::Snapshot`] the present objects come along.
    ///
    /// # Errors
    /// [`TooOld`] when changes since the revision asked for are no longer kept.
    pub fn subscribe(&self, keyspace: usize, prefix: &str, start: Start) -> Result<(Snapshot, Subscription), TooOld> {
        let state = self.read();
        let space = &state.keyspaces[keyspace];
        let (next, entries) = match start {
            Start::Snapshot => (space.next(), collect(space, prefix)),
            Start::After(wanted) if wanted < space.complete_after => return Err(TooOld { wanted, oldest: space.complete_after }),
            Start::After(wanted) => {
                let skip = space.ring.partition_point(|event| event.entry.revision <= wanted);
                (space.first + skip as u64, Vec::new())
            }
        };
        let subscription = Subscription { keyspace, next, generation: state.generation, signal: space.signal.subscribe() };
        Ok((Snapshot { entries, revision: state.revision }, subscription))
    }

    /// The next changes for a watcher, at most `max`.
    pub fn pull(&self, subscription: &mut Subscription, max: usize) -> Batch {
        subscription.signal.mark_unchanged();
        let state = self.read();
        let space = &state.keyspaces[subscription.keyspace];
        if subscription.generation != state.generation || subscription.next < space.first {
            return Batch::Lagged;
        }
        let skip = usize::try_from(subscription.next - space.first).unwrap_or(usize::MAX);
        let events: Vec<_> = space.ring.iter().skip(skip).take(max).cloned().collect();
        subscription.next += events.len() as u64;
        let revision =
            if subscription.next == space.next() { state.revision } else { events.last().map_or(0, |event| event.entry.revision) };
        Batch::Events(events, revision)
    }

    /// Fills the cache and follows the store until cancelled. `changed` is told which keyspaces changed.
    pub async fn feed(&self, store: &dyn Store, changed: impl Fn(usize), ready: impl Fn(), cancel: CancellationToken) {
        while !cancel.is_cancelled() {
            let outcome = tokio::select! {
                outcome = self.follow(store, &changed, &ready) => outcome,
                () = cancel.cancelled() => return,
            };
            match outcome {
                Err(store::Error::Closed) => return,
                Err(error) => tracing::error!(error = &error as &dyn std::error::Error, "the watch over the store broke off"),
                Ok(()) => tracing::warn!("the watch over the store ended"),
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
                () = cancel.cancelled() => return,
            }
        }
    }

    async fn follow(&self, store: &dyn Store, changed: &impl Fn(usize), ready: &impl Fn()) -> Result<(), store::Error> {
        let range = RangeRequest::prefix(self.root.clone());
        let mut page = RangeRequest { limit: LOAD_CHUNK, ..range.clone() };
        let (mut all, mut revision) = (Vec::new(), 0);
        loop {
            let answer = store.range(page.clone()).await?;
            // Every further page is of the first one's revision.
            if revision == 0 {
                revision = answer.revision;
                page.revision = revision;
            }
            if let (true, Some(last)) = (answer.more, answer.kvs.last()) {
                page.key = [&last.key[..], b"\0"].concat().into();
            }
            all.extend(answer.kvs);
            if !answer.more {
                break;
            }
        }
        self.load(all, revision);
        (0..self.read().keyspaces.len()).for_each(changed);
        ready();
        let request = WatchRequest {
            key: range.key,
            range_end: range.range_end,
            start_revision: revision + 1,
            prev_kv: false,
            progress_notify: true,
        };
        let mut watch = store.watch(request).await?;
        while let Some(response) = watch.next().await {
            let response = response?;
            if response.compact_revision > 0 {
                return Ok(());
            }
            let touched = self.apply(response.events, response.revision);
            touched.into_iter().for_each(changed);
        }
        Err(store::Error::Closed)
    }

    fn load(&self, kvs: Vec<KeyValue>, revision: i64) {
        let mut state = self.write();
        state.generation += 1;
        for space in &mut state.keyspaces {
            space.objects.clear();
            space.ring.clear();
            space.ring_bytes = 0;
            space.complete_after = revision;
        }
        for kv in kvs {
            let key: Arc<str> = String::from_utf8_lossy(&kv.key).into();
            if let Some(space) = state.keyspaces.iter_mut().find(|space| key.starts_with(&space.prefix)) {
                space.objects.insert(key.clone(), Arc::new(Entry::new(key, kv.value, kv.mod_revision)));
            }
        }
        state.revision = revision;
        for space in &state.keyspaces {
            space.signal.send_modify(|count| *count += 1);
        }
        drop(state);
        self.applied.send_replace(revision);
    }

    fn apply(&self, events: Vec<store::Event>, revision: i64) -> Vec<usize> {
        let mut touched = Vec::new();
        let mut state = self.write();
        for event in events {
            let index = state.keyspaces.iter().position(|space| event.kv.key.starts_with(space.prefix.as_bytes()));
            if let Some(index) = index {
                state.keyspaces[index].apply(event.kind, event.kv);
                if !touched.contains(&index) {
                    touched.push(index);
                }
            }
        }
        state.revision = state.revision.max(revision);
        let signals: Vec<_> = touched.iter().map(|index| state.keyspaces[*index].signal.clone()).collect();
        drop(state);
        for signal in signals {
            signal.send_modify(|count| *count += 1);
        }
        self.applied.send_if_modified(|applied| {
            let newer = revision > *applied;
            *applied = revision.max(*applied);
            newer
        });
        touched
    }
}

fn collect(space: &Keyspace, prefix: &str) -> Vec<Arc<Entry>> {
    let from = (Bound::Included(prefix), Bound::Unbounded);
    space.objects.range::<str, _>(from).take_while(|(key, _)| key.starts_with(prefix)).map(|(_, entry)| entry.clone()).collect()
}

impl Subscription {
    /// Waits until there may be more. `false` when the server is going down.
    pub async fn changed(&mut self) -> bool {
        self.signal.changed().await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::Resources;

    fn put(key: &str, value: &str, create: i64, revision: i64) -> store::Event {
        let kv = KeyValue {
            key: key.to_owned().into(),
            value: value.to_owned().into(),
            create_revision: create,
            mod_revision: revision,
            ..KeyValue::default()
        };
        store::Event { kind: EventKind::Put, kv, prev_kv: None }
    }

    fn cache() -> (Cache, usize) {
        let resources = Resources::default();
        let keyspace = resources.storage_of("configmaps").expect("served");
        (Cache::new(resources.root(), resources.storages()), keyspace)
    }

    #[test]
    fn a_watcher_that_the_ring_has_gone_past_is_closed_and_older_revisions_are_gone() {
        let (cache, keyspace) = cache();
        let key = "/registry/configmaps/n/a";
        cache.apply(vec![put(key, "{}", 1, 1)], 1);
        let (snapshot, mut slow) = cache.subscribe(keyspace, "/registry/configmaps/", Start::Snapshot).expect("present");
        assert_eq!((snapshot.entries.len(), snapshot.revision), (1, 1));
        let (_, mut other) = cache.subscribe(keyspace, "/registry/configmaps/", Start::After(0)).expect("in the ring");
        assert!(matches!(cache.pull(&mut other, 10), Batch::Events(events, 1) if events[0].change == Change::Added));
        let last = i64::try_from(RING_EVENTS_MAX).expect("small") + 2;
        for revision in 2..=last {
            cache.apply(vec![put(key, "{}", 1, revision)], revision);
        }
        assert!(matches!(cache.pull(&mut slow, 10), Batch::Lagged));
        assert_eq!(cache.subscribe(keyspace, "", Start::After(1)).err(), Some(TooOld { wanted: 1, oldest: 2 }));
        let (_, mut fresh) = cache.subscribe(keyspace, "", Start::After(last - 1)).expect("in the ring");
        assert!(matches!(cache.pull(&mut fresh, 10), Batch::Events(events, _) if events.len() == 1));
        assert_eq!(cache.revision(), last);
    }

    #[test]
    fn large_objects_shorten_the_ring() {
        let (cache, keyspace) = cache();
        let large = format!("{{\"data\":\"{}\"}}", "x".repeat(1 << 20));
        for revision in 1..=8 {
            cache.apply(vec![put("/registry/configmaps/n/a", &large, 1, revision)], revision);
        }
        let state = cache.read();
        assert!(state.keyspaces[keyspace].ring_bytes <= RING_BYTES_MAX && state.keyspaces[keyspace].ring.len() == 3);
        assert_eq!(state.keyspaces[keyspace].complete_after, 5);
    }

    #[test]
    fn attributes_keep_what_selectors_see() {
        let object = serde_json::json!({"metadata": {"name": "a", "labels": {"l": "x"}, "annotations": {"big": "y"}},
            "spec": {"nodeName": "n", "containers": [{}]}, "data": {"a": "b"}});
        let want = serde_json::json!({"metadata": {"name": "a", "labels": {"l": "x"}}, "spec": {"nodeName": "n"}});
        assert_eq!(attributes(object), want);
    }
}
