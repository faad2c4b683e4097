//! Informers: a watch kept alive, a local copy of what it shows, and a call for each change.
//!
//! The copy is what a controller reads; the calls only say which key to look at. A watch that broke is taken up again
//! with a new list, and what is missing from that list counts as deleted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::{self, Debug, Display};
use std::ops::Bound;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use futures::StreamExt;
use futures::stream::BoxStream;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::WatchBackoff;

/// Namespace and name of an object; the namespace of a cluster-scoped one is empty.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ObjectKey {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ObjectKey {
    /// A key of its parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// The key of an object.
    pub fn of<K: Resource>(object: &K) -> Self {
        let meta = object.meta();
        Self::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
    }
}

impl Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return f.write_str(&self.name);
        }
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for ObjectKey {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (namespace, name) = text.split_once('/').unwrap_or(("", text));
        Ok(Self::new(namespace, name))
    }
}

/// A change, after the copy has it. What happened in between may be missing: changes are a hint, the copy is the truth.
#[derive(Debug, Clone)]
pub enum Delta<K> {
    /// It was not there before.
    Added(Arc<K>),
    /// It changed.
    Updated {
        /// As it was.
        old: Arc<K>,
        /// As it is.
        new: Arc<K>,
    },
    /// It is gone; this is its last state that was told.
    Deleted(Arc<K>),
}

impl<K> Delta<K> {
    /// The object as it is, or as it was last seen.
    pub fn object(&self) -> &Arc<K> {
        match self {
            Self::Added(object) | Self::Deleted(object) | Self::Updated { new: object, .. } => object,
        }
    }

    /// The object as it was before, if it was there.
    pub fn before(&self) -> Option<&Arc<K>> {
        match self {
            Self::Added(_) => None,
            Self::Updated { old, .. } | Self::Deleted(old) => Some(old),
        }
    }
}

type Handler<K> = Box<dyn Fn(&Delta<K>) + Send + Sync>;
type IndexFn<K> = Box<dyn Fn(&K) -> Vec<String> + Send + Sync>;

struct Index<K> {
    values_of: IndexFn<K>,
    keys_of: HashMap<String, BTreeSet<ObjectKey>>,
}

struct Copy<K> {
    objects: BTreeMap<ObjectKey, Arc<K>>,
    indices: HashMap<&'static str, Index<K>>,
}

struct Inner<K> {
    copy: RwLock<Copy<K>>,
    handlers: RwLock<Vec<Handler<K>>>,
    synced: tokio::sync::watch::Sender<bool>,
}

/// A cloneable handle to a local copy. Indices and handlers are to be added before [`Informer::run`].
pub struct Informer<K>(Arc<Inner<K>>);

impl<K> Clone for Informer<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K> Debug for Informer<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Informer").field("synced", &*self.0.synced.borrow()).finish_non_exhaustive()
    }
}

impl<K> Default for Informer<K> {
    fn default() -> Self {
        let copy = RwLock::new(Copy { objects: BTreeMap::new(), indices: HashMap::new() });
        let synced = tokio::sync::watch::Sender::new(false);
        Self(Arc::new(Inner { copy, handlers: RwLock::new(Vec::new()), synced }))
    }
}

impl<K: Resource + 'static> Informer<K> {
    /// An empty copy.
    pub fn new() -> Self {
        Self::default()
    }

    fn copy(&self) -> RwLockReadGuard<'_, Copy<K>> {
        self.0.copy.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn copy_mut(&self) -> RwLockWriteGuard<'_, Copy<K>> {
        self.0.copy.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `handler` for each change, in order; it must be quick and must not block.
    pub fn on_change(&self, handler: impl Fn(&Delta<K>) + Send + Sync + 'static) {
        self.0.handlers.write().unwrap_or_else(PoisonError::into_inner).push(Box::new(handler));
    }

    /// Keeps an index: `values_of` tells under which values an object is found with [`Informer::by_index`].
    pub fn add_index(&self, name: &'static str, values_of: impl Fn(&K) -> Vec<String> + Send + Sync + 'static) {
        let mut copy = self.copy_mut();
        let mut index = Index { values_of: Box::new(values_of), keys_of: HashMap::new() };
        for (key, object) in &copy.objects {
            index.insert(key, object);
        }
        copy.indices.insert(name, index);
    }

    /// One object.
    pub fn get(&self, key: &ObjectKey) -> Option<Arc<K>> {
        self.copy().objects.get(key).cloned()
    }

    /// All objects, by namespace and name.
    pub fn list(&self) -> Vec<Arc<K>> {
        self.copy().objects.values().cloned().collect()
    }

    /// The objects of a namespace, by name.
    pub fn list_namespace(&self, namespace: &str) -> Vec<Arc<K>> {
        let start = ObjectKey::new(namespace, "");
        let copy = self.copy();
        let range = copy.objects.range((Bound::Included(start), Bound::Unbounded));
        range.take_while(|(key, _)| key.namespace == namespace).map(|(_, object)| object.clone()).collect()
    }

    /// The objects that an index has under a value, by namespace and name; none for an index that was not added.
    pub fn by_index(&self, name: &str, value: &str) -> Vec<Arc<K>> {
        let copy = self.copy();
        let keys = copy.indices.get(name).and_then(|index| index.keys_of.get(value));
        keys.into_iter().flatten().filter_map(|key| copy.objects.get(key).cloned()).collect()
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.copy().objects.len()
    }

    /// Whether there are no objects.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the first list is complete.
    pub fn is_synced(&self) -> bool {
        *self.0.synced.borrow()
    }

    /// Waits until the first list is complete; false if `cancel` came first.
    pub async fn wait_synced(&self, cancel: &CancellationToken) -> bool {
        let mut synced = self.0.synced.subscribe();
        tokio::select! {
            () = cancel.cancelled() => false,
            // The sender lives in `self`, so the wait only ends with the value.
            waited = synced.wait_for(|synced| *synced) => waited.is_ok(),
        }
    }

    /// Takes a state in without a watch (for tests, and for callers with a source of their own).
    pub fn apply(&self, event: watcher::Event<K>, pending: &mut Option<BTreeMap<ObjectKey, Arc<K>>>) {
        let deltas = match event {
            watcher::Event::Apply(object) => vec![self.insert(Arc::new(object))],
            watcher::Event::Delete(object) => {
                let known = self.remove(&ObjectKey::of(&object));
                // The event tells the last state, which may be newer than the copy's.
                known.map(|_| Delta::Deleted(Arc::new(object))).into_iter().collect()
            }
            watcher::Event::Init => {
                *pending = Some(BTreeMap::new());
                return;
            }
            watcher::Event::InitApply(object) => {
                let key = ObjectKey::of(&object);
                pending.get_or_insert_default().insert(key, Arc::new(object));
                return;
            }
            watcher::Event::InitDone => self.replace(pending.take().unwrap_or_default()),
        };
        self.tell(&deltas);
    }

    fn tell(&self, deltas: &[Delta<K>]) {
        let handlers = self.0.handlers.read().unwrap_or_else(PoisonError::into_inner);
        for delta in deltas {
            handlers.iter().for_each(|handler| handler(delta));
        }
    }

    fn insert(&self, object: Arc<K>) -> Delta<K> {
        self.copy_mut().insert(ObjectKey::of(&*object), object)
    }

    fn remove(&self, key: &ObjectKey) -> Option<Delta<K>> {
        self.copy_mut().remove(key)
    }

    fn replace(&self, objects: BTreeMap<ObjectKey, Arc<K>>) -> Vec<Delta<K>> {
        let mut copy = self.copy_mut();
        let gone: Vec<ObjectKey> = copy.objects.keys().filter(|key| !objects.contains_key(*key)).cloned().collect();
        let mut deltas: Vec<Delta<K>> = gone.iter().filter_map(|key| copy.remove(key)).collect();
        deltas.extend(objects.into_iter().map(|(key, object)| copy.insert(key, object)));
        deltas
    }
}

impl<K> Index<K> {
    fn insert(&mut self, key: &ObjectKey, object: &K) {
        for value in (self.values_of)(object) {
            self.keys_of.entry(value).or_default().insert(key.clone());
        }
    }

    fn remove(&mut self, key: &ObjectKey, object: &K) {
        for value in (self.values_of)(object) {
            if let Some(keys) = self.keys_of.get_mut(&value) {
                keys.remove(key);
                if keys.is_empty() {
                    self.keys_of.remove(&value);
                }
            }
        }
    }
}

impl<K> Copy<K> {
    fn insert(&mut self, key: ObjectKey, new: Arc<K>) -> Delta<K> {
        let old = self.objects.insert(key.clone(), new.clone());
        for index in self.indices.values_mut() {
            if let Some(old) = &old {
                index.remove(&key, old);
            }
            index.insert(&key, &new);
        }
        match old {
            Some(old) => Delta::Updated { old, new },
            None => Delta::Added(new),
        }
    }

    fn remove(&mut self, key: &ObjectKey) -> Option<Delta<K>> {
        let old = self.objects.remove(key)?;
        for index in self.indices.values_mut() {
            index.remove(key, &old);
        }
        Some(Delta::Deleted(old))
    }
}

impl<K> Informer<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    /// Keeps the copy up to date until `cancel`. A broken watch is taken up again for ever, with back-off.
    pub async fn run(self, api: Api<K>, config: watcher::Config, cancel: CancellationToken) {
        let resource = api.resource_url().to_owned();
        self.run_stream(&resource, watcher(api, config).boxed(), cancel).await;
    }

    /// As [`Informer::run`], from a stream of the caller's (for example one of metadata only).
    pub async fn run_stream(
        self,
        resource: &str,
        events: BoxStream<'static, watcher::Result<watcher::Event<K>>>,
        cancel: CancellationToken,
    ) {
        let mut events = events.backoff(WatchBackoff::default()).boxed();
        let mut pending = None;
        loop {
            let event = tokio::select! {
                () = cancel.cancelled() => return,
                event = events.next() => event,
            };
            match event {
                Some(Ok(event)) => {
                    let done = matches!(event, watcher::Event::InitDone);
                    self.apply(event, &mut pending);
                    if done {
                        self.0.synced.send_replace(true);
                    }
                }
                Some(Err(error)) => {
                    let error = crate::workers::chain(&error);
                    tracing::debug!(resource, error, "a watch broke; taking it up again");
                }
                None => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::api::ObjectMeta;
    use std::sync::Mutex;
    use watcher::Event;

    fn config_map(name: &str, value: &str) -> ConfigMap {
        ConfigMap {
            metadata: ObjectMeta { namespace: Some("ns".to_owned()), name: Some(name.to_owned()), ..ObjectMeta::default() },
            data: Some([("v".to_owned(), value.to_owned())].into()),
            ..ConfigMap::default()
        }
    }

    #[tokio::test]
    async fn a_new_list_tells_what_was_missed() {
        let informer = Informer::<ConfigMap>::new();
        informer.add_index("v", |object| object.data.iter().flat_map(|data| data.values().cloned()).collect());
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = seen.clone();
        informer.on_change(move |delta| {
            let name = ObjectKey::of(&**delta.object());
            let what = match delta {
                Delta::Added(_) => "added",
                Delta::Updated { .. } => "updated",
                Delta::Deleted(_) => "deleted",
            };
            log.lock().expect("lock").push(format!("{what} {name}"));
        });
        let mut pending = None;
        let events = [
            Event::Init,
            Event::InitApply(config_map("a", "1")),
            Event::InitApply(config_map("b", "1")),
            Event::InitDone,
            Event::Apply(config_map("c", "2")),
            Event::Delete(config_map("c", "2")),
            Event::Init,
            Event::InitApply(config_map("b", "2")),
            Event::InitDone,
        ];
        for event in events {
            informer.apply(event, &mut pending);
        }
        assert_eq!(*seen.lock().expect("lock"), ["added ns/a", "added ns/b", "added ns/c", "deleted ns/c", "deleted ns/a", "updated ns/b"]);
        assert_eq!(informer.len(), 1);
        assert_eq!(informer.list_namespace("ns").len(), 1);
        assert!(informer.list_namespace("n").is_empty());
        assert_eq!(informer.by_index("v", "1").len(), 0);
        assert_eq!(informer.by_index("v", "2").len(), 1);
        assert!(informer.get(&"ns/b".parse().expect("key")).is_some());
    }

    #[tokio::test]
    async fn a_stream_marks_the_copy_synced() {
        let informer = Informer::<ConfigMap>::new();
        let cancel = CancellationToken::new();
        let events = futures::stream::iter([Ok(Event::Init), Ok(Event::InitDone)]);
        informer.clone().run_stream("configmaps", events.boxed(), cancel.clone()).await;
        assert!(informer.wait_synced(&cancel).await && informer.is_synced());
    }
}
