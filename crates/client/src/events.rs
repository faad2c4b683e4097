//! Events about objects, correlated as client-go's `tools/record` does it: repeated ones are counted up, many similar
//! ones are folded into one, and one object's flood is cut.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Events that may wait to be sent; further ones are dropped and counted.
const QUEUE_MAX: usize = 1000;
/// Objects and events remembered (client-go's maxLruCacheEntries).
const REMEMBERED_MAX: usize = 4096;
/// Similar events within [`SIMILAR_WINDOW`] before they are folded.
const SIMILAR_MAX: usize = 10;
const SIMILAR_WINDOW: Duration = Duration::from_secs(600);
/// Events about one object that may come at once, and how long it takes to gain one more.
const SPAM_BURST: f64 = 25.0;
const SPAM_REFILL_SECONDS: f64 = 300.0;
const SEND_DEADLINE: Duration = Duration::from_secs(10);
const SEND_TRIES: u32 = 12;

/// Whether something is amiss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventType {
    /// For information.
    Normal,
    /// Something may be wrong.
    Warning,
}

impl EventType {
    fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Draft {
    object: Subject,
    kind: EventType,
    reason: String,
    message: String,
}

/// An [`ObjectReference`] that can be hashed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Subject {
    api_version: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    field_path: Option<String>,
}

impl From<ObjectReference> for Subject {
    fn from(from: ObjectReference) -> Self {
        Self {
            api_version: from.api_version,
            kind: from.kind,
            namespace: from.namespace,
            name: from.name,
            uid: from.uid,
            resource_version: from.resource_version,
            field_path: from.field_path,
        }
    }
}

impl From<Subject> for ObjectReference {
    fn from(from: Subject) -> Self {
        Self {
            api_version: from.api_version,
            kind: from.kind,
            namespace: from.namespace,
            name: from.name,
            uid: from.uid,
            resource_version: from.resource_version,
            field_path: from.field_path,
        }
    }
}

/// Takes events in without waiting; [`run_events`] sends them.
#[derive(Debug, Clone)]
pub struct EventRecorder {
    sender: mpsc::Sender<Draft>,
    dropped: Arc<AtomicU32>,
    receiver: Arc<Mutex<Option<mpsc::Receiver<Draft>>>>,
    component: String,
    host: String,
}

impl EventRecorder {
    /// A recorder that signs as `component` (on `host`, which only a kubelet names).
    pub fn new(component: impl Into<String>, host: impl Into<String>) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE_MAX);
        Self {
            sender,
            dropped: Arc::default(),
            receiver: Arc::new(Mutex::new(Some(receiver))),
            component: component.into(),
            host: host.into(),
        }
    }

    /// Records an event about an object; dropped (and counted) when too many wait.
    pub fn event(&self, object: ObjectReference, kind: EventType, reason: impl Into<String>, message: impl Into<String>) {
        let draft = Draft { object: object.into(), kind, reason: reason.into(), message: message.into() };
        if self.sender.try_send(draft).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// As [`EventRecorder::event`], about a typed object.
    pub fn about<K: Resource<DynamicType = ()>>(&self, object: &K, kind: EventType, reason: impl Into<String>, message: impl Into<String>) {
        self.event(object.object_ref(&()), kind, reason, message);
    }

    /// Events dropped because too many waited.
    pub fn dropped(&self) -> u32 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// What to send.
#[derive(Debug, Clone, PartialEq)]
enum Delivery {
    Create(Event),
    /// The event of this namespace and name, seen once more.
    Update {
        namespace: String,
        name: String,
        event: Event,
    },
}

/// Events that differ at most in their message, as client-go's EventAggregatorByReasonFunc groups them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Group {
    object: Subject,
    kind: EventType,
    reason: String,
}

#[derive(Debug)]
struct Similar {
    messages: Vec<String>,
    last: Timestamp,
}

/// What was sent before. Pure: time and names are arguments.
#[derive(Debug, Default)]
struct Correlator {
    similar: Remembered<Group, Similar>,
    sent: Remembered<Draft, Event>,
    tokens: Remembered<Subject, (f64, Timestamp)>,
}

/// A map that forgets its oldest entry when it is full.
#[derive(Debug)]
struct Remembered<K, V> {
    map: HashMap<K, V>,
    order: VecDeque<K>,
}

impl<K, V> Default for Remembered<K, V> {
    fn default() -> Self {
        Self { map: HashMap::new(), order: VecDeque::new() }
    }
}

impl<K: Clone + Eq + std::hash::Hash, V> Remembered<K, V> {
    fn get_or_insert(&mut self, key: K, value: impl FnOnce() -> V) -> &mut V {
        if !self.map.contains_key(&key) {
            self.order.push_back(key.clone());
            if self.order.len() > REMEMBERED_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.map.remove(&oldest);
            }
        }
        self.map.entry(key).or_insert_with(value)
    }
}

impl Correlator {
    /// What to send for a draft; `None` when the object has had too many.
    fn correlate(&mut self, source: &EventSource, mut draft: Draft, now: Timestamp) -> Option<Delivery> {
        let (tokens, at) = self.tokens.get_or_insert(draft.object.clone(), || (SPAM_BURST, now));
        *tokens = (*tokens + (now.duration_since(*at).as_secs_f64() / SPAM_REFILL_SECONDS)).min(SPAM_BURST);
        *at = now;
        if *tokens < 1.0 {
            return None;
        }
        *tokens -= 1.0;
        if self.is_folded(&draft, now) {
            draft.message = format!("(combined from similar events): {}", draft.message);
        }
        // A folded event is one event whatever its message.
        let mut key = draft.clone();
        if draft.message.starts_with("(combined") {
            key.message.clear();
        }
        let count = self.sent.map.get(&key).and_then(|event| event.count).unwrap_or(0);
        let namespace = draft.object.namespace.clone().unwrap_or_else(|| "default".to_owned());
        if count > 0 {
            let event = self.sent.map.get_mut(&key)?;
            event.count = Some(count + 1);
            event.last_timestamp = Some(Time(now));
            event.message = Some(draft.message);
            let name = event.metadata.name.clone().unwrap_or_default();
            return Some(Delivery::Update { namespace, name, event: event.clone() });
        }
        let name = format!("{}.{:x}", draft.object.name.as_deref().unwrap_or_default(), now.as_nanosecond());
        let event = Event {
            metadata: ObjectMeta { name: Some(name), namespace: Some(namespace), ..ObjectMeta::default() },
            involved_object: draft.object.into(),
            reason: Some(draft.reason),
            message: Some(draft.message),
            type_: Some(draft.kind.as_str().to_owned()),
            first_timestamp: Some(Time(now)),
            last_timestamp: Some(Time(now)),
            count: Some(1),
            source: Some(source.clone()),
            reporting_component: source.component.clone(),
            reporting_instance: Some(source.host.clone().unwrap_or_default()),
            ..Event::default()
        };
        self.sent.get_or_insert(key, || event.clone());
        Some(Delivery::Create(event))
    }

    fn is_folded(&mut self, draft: &Draft, now: Timestamp) -> bool {
        let group = Group { object: draft.object.clone(), kind: draft.kind, reason: draft.reason.clone() };
        let similar = self.similar.get_or_insert(group, || Similar { messages: Vec::new(), last: now });
        if now.duration_since(similar.last).unsigned_abs() > SIMILAR_WINDOW {
            similar.messages.clear();
        }
        similar.last = now;
        if similar.messages.contains(&draft.message) {
            return false;
        }
        if similar.messages.len() + 1 >= SIMILAR_MAX {
            return true;
        }
        similar.messages.push(draft.message.clone());
        false
    }

    fn forget(&mut self, name: &str) {
        self.sent.map.retain(|_, event| event.metadata.name.as_deref() != Some(name));
        let map = &self.sent.map;
        self.sent.order.retain(|key| map.contains_key(key));
    }
}

/// Sends what the recorder takes in, until `cancel`; then what waits is sent once more without retries. A second call
/// for the same recorder returns at once.
pub async fn run_events(client: Client, recorder: EventRecorder, cancel: CancellationToken) {
    let taken = recorder.receiver.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(mut receiver) = taken else { return };
    let source =
        EventSource { component: Some(recorder.component.clone()), host: Some(recorder.host.clone()).filter(|host| !host.is_empty()) };
    let mut correlator = Correlator::default();
    loop {
        let draft = tokio::select! {
            biased;
            draft = receiver.recv() => draft,
            () = cancel.cancelled() => None,
        };
        let Some(draft) = draft else { return };
        let Some(send) = correlator.correlate(&source, draft, Timestamp::now()) else { continue };
        deliver(&client, &mut correlator, send, &cancel).await;
    }
}

async fn deliver(client: &Client, correlator: &mut Correlator, mut send: Delivery, cancel: &CancellationToken) {
    for attempt in 0..SEND_TRIES {
        let error = match tokio::time::timeout(SEND_DEADLINE, send_once(client, &send)).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_) => kube::Error::Service("no answer in time".into()),
        };
        if let kube::Error::Api(status) = &error {
            // The event counted up has expired: make it anew, as client-go does.
            if let Delivery::Update { event, .. } = &send
                && status.code == 404
            {
                send = Delivery::Create(event.clone());
                continue;
            }
            if let Delivery::Create(event) = &send {
                correlator.forget(event.metadata.name.as_deref().unwrap_or_default());
            }
            if status.code != 429 && status.code < 500 {
                let error = crate::workers::chain(&error);
                tracing::debug!(error, "the server refused an event");
                return;
            }
        }
        if cancel.is_cancelled() {
            return;
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(Duration::from_millis(200).saturating_mul(1 << attempt.min(6))) => {}
        }
    }
    tracing::warn!("gave an event up: the server does not answer");
}

async fn send_once(client: &Client, send: &Delivery) -> Result<(), kube::Error> {
    match send {
        Delivery::Create(event) => {
            let api: Api<Event> = Api::namespaced(client.clone(), event.metadata.namespace.as_deref().unwrap_or("default"));
            api.create(&PostParams::default(), event).await.map(drop)
        }
        Delivery::Update { namespace, name, event } => {
            let api: Api<Event> = Api::namespaced(client.clone(), namespace);
            let patch = serde_json::json!({
                "count": event.count, "lastTimestamp": event.last_timestamp, "message": event.message,
            });
            api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(name: &str, message: &str) -> Draft {
        let object = ObjectReference { name: Some(name.to_owned()), namespace: Some("ns".to_owned()), ..ObjectReference::default() };
        Draft { object: object.into(), kind: EventType::Normal, reason: "Why".to_owned(), message: message.to_owned() }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).expect("a time")
    }

    fn count(send: &Option<Delivery>) -> (bool, i32) {
        match send {
            Some(Delivery::Create(event)) => (true, event.count.unwrap_or(0)),
            Some(Delivery::Update { event, .. }) => (false, event.count.unwrap_or(0)),
            None => (false, 0),
        }
    }

    #[test]
    fn repeated_events_are_counted() {
        let mut correlator = Correlator::default();
        let source = EventSource::default();
        assert_eq!(count(&correlator.correlate(&source, draft("a", "m"), at(0))), (true, 1));
        assert_eq!(count(&correlator.correlate(&source, draft("a", "m"), at(1))), (false, 2));
        assert_eq!(count(&correlator.correlate(&source, draft("b", "m"), at(1))), (true, 1));
    }

    #[test]
    fn many_similar_events_become_one() {
        let mut correlator = Correlator::default();
        let source = EventSource::default();
        for n in 0..9 {
            assert_eq!(count(&correlator.correlate(&source, draft("a", &n.to_string()), at(n))), (true, 1));
        }
        let Some(Delivery::Create(event)) = correlator.correlate(&source, draft("a", "tenth"), at(10)) else { panic!() };
        assert_eq!(event.message.as_deref(), Some("(combined from similar events): tenth"));
        let folded = correlator.correlate(&source, draft("a", "eleventh"), at(11));
        assert_eq!(count(&folded), (false, 2));
    }

    #[test]
    fn one_objects_flood_is_cut() {
        let mut correlator = Correlator::default();
        let source = EventSource::default();
        for _ in 0..25 {
            assert!(correlator.correlate(&source, draft("a", "m"), at(0)).is_some());
        }
        assert!(correlator.correlate(&source, draft("a", "m"), at(1)).is_none());
        assert!(correlator.correlate(&source, draft("b", "m"), at(1)).is_some());
        assert!(correlator.correlate(&source, draft("a", "m"), at(301)).is_some());
    }

    #[test]
    fn memory_is_bounded() {
        let mut correlator = Correlator::default();
        for n in 0..5000 {
            correlator.correlate(&EventSource::default(), draft(&n.to_string(), "m"), at(n));
        }
        assert!(correlator.sent.map.len() <= REMEMBERED_MAX && correlator.similar.map.len() <= REMEMBERED_MAX);
    }

    #[test]
    fn a_full_recorder_counts_what_it_drops() {
        let recorder = EventRecorder::new("test", "");
        for _ in 0..QUEUE_MAX + 5 {
            recorder.event(ObjectReference::default(), EventType::Normal, "Why", "m");
        }
        assert_eq!(recorder.dropped(), 5);
    }
}
