//! What the controller has written and its local copy may not show yet: acting on an old copy would make slices twice.
//! Source: `k8s.io/endpointslice` v0.37, `util/endpointslice_tracker.go` and `util/trigger_time_tracker.go`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use client::ObjectKey;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::plan::SERVICE_NAME;
use crate::objects::condition;

/// What was written last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    Generation(i64),
    Deleted,
}

#[derive(Debug, Default)]
struct State {
    /// Slices by UID.
    slices: HashMap<String, Written>,
    /// Times of the Service and its pods when it was last looked at; `None` before the first time.
    seen: Option<Times>,
}

#[derive(Debug, Default)]
struct Times {
    service: Option<Timestamp>,
    pods: HashMap<String, Timestamp>,
}

/// Written slices and seen times of each Service.
#[derive(Debug, Default)]
pub struct Tracker(Mutex<HashMap<ObjectKey, State>>);

/// The Service that a slice belongs to.
pub fn service_of(slice: &EndpointSlice) -> Option<ObjectKey> {
    let name = slice.metadata.labels.as_ref()?.get(SERVICE_NAME).filter(|name| !name.is_empty())?;
    Some(ObjectKey::new(slice.metadata.namespace.clone().unwrap_or_default(), name))
}

fn uid(slice: &EndpointSlice) -> &str {
    slice.metadata.uid.as_deref().unwrap_or_default()
}

fn generation(slice: &EndpointSlice) -> i64 {
    slice.metadata.generation.unwrap_or_default()
}

impl Tracker {
    fn states(&self) -> MutexGuard<'_, HashMap<ObjectKey, State>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slice was created or updated.
    pub fn wrote(&self, service: &ObjectKey, slice: &EndpointSlice) {
        let mut states = self.states();
        let slices = &mut states.entry(service.clone()).or_default().slices;
        slices.insert(uid(slice).to_owned(), Written::Generation(generation(slice)));
    }

    /// A slice was deleted.
    pub fn deleted(&self, service: &ObjectKey, slice: &EndpointSlice) {
        self.states().entry(service.clone()).or_default().slices.insert(uid(slice).to_owned(), Written::Deleted);
    }

    /// Whether the local copy is older than what was written.
    pub fn is_stale(&self, service: &ObjectKey, copy: &[Arc<EndpointSlice>]) -> bool {
        let states = self.states();
        let Some(state) = states.get(service) else { return false };
        let newer = |slice: &Arc<EndpointSlice>| match state.slices.get(uid(slice)) {
            Some(Written::Deleted) => true,
            Some(Written::Generation(written)) => *written > generation(slice),
            None => false,
        };
        let there = |wanted: &String| copy.iter().any(|slice| uid(slice) == wanted);
        copy.iter().any(newer) || state.slices.iter().any(|(uid, written)| *written != Written::Deleted && !there(uid))
    }

    /// Whether somebody else changed a slice that was just seen.
    pub fn is_foreign(&self, slice: &EndpointSlice) -> bool {
        let Some(service) = service_of(slice) else { return false };
        match self.states().get(&service).and_then(|state| state.slices.get(uid(slice))) {
            Some(Written::Generation(written)) => generation(slice) > *written,
            Some(Written::Deleted) => false,
            None => true,
        }
    }

    /// A slice is seen to be gone; answers whether nobody here deleted it.
    pub fn gone(&self, slice: &EndpointSlice) -> bool {
        let Some(service) = service_of(slice) else { return false };
        let mut states = self.states();
        let written = states.get_mut(&service).and_then(|state| state.slices.remove(uid(slice)));
        matches!(written, Some(Written::Generation(_)))
    }

    /// A Service is gone.
    pub fn forget(&self, service: &ObjectKey) {
        self.states().remove(service);
    }

    /// When that happened which the slices are about to tell: the earliest new time of Service and pods.
    pub fn trigger_time(&self, key: &ObjectKey, service: &Service, pods: &[Arc<Pod>]) -> Option<Timestamp> {
        let created = service.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let times = pods.iter().filter_map(|pod| {
            let ready = condition(pod, "Ready")?.last_transition_time.as_ref()?.0;
            Some((pod.metadata.name.clone().unwrap_or_default(), ready))
        });
        let now = Times { service: created, pods: times.collect() };
        let mut states = self.states();
        let seen = states.entry(key.clone()).or_default().seen.replace(now);
        let Some(before) = seen else { return created };
        let now = states.get(key).and_then(|state| state.seen.as_ref())?;
        let pods = now.pods.iter().filter(|(name, time)| before.pods.get(*name).is_none_or(|old| old < time)).map(|(_, time)| *time);
        pods.chain(now.service.filter(|time| before.service.is_none_or(|old| old < *time))).min()
    }
}
