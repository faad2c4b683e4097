//! WATCH: a stream of changes, with initial events and bookmarks.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::codec::{self, Media};
use apimachinery::status::Status;
use apimachinery::tree::Tree;
use apimachinery::{Gvk, KindFacts};
use bytes::Bytes;
use futures::StreamExt as _;
use http::Response;
use http::header::{CONTENT_TYPE, HeaderValue};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use serde_json::json;
use tokio::time::Instant;

use crate::api::{Api, Ctx};
use crate::cache::{Batch, CacheEvent, Change, Entry, Start, Subscription};
use crate::negotiate::{Accepted, Shape};
use crate::read::{Selectors, resource_version, wait_for};
use crate::reply::{self, Body};
use crate::resources::Resource;
use crate::tables::{self, Include};

/// Between bookmarks (upstream's `bookmarkFrequency`).
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);
/// Events that one chunk of the stream carries at most.
const CHUNK_EVENTS_MAX: usize = 200;
/// The shortest time that a watch without `timeoutSeconds` lasts (`--min-request-timeout`), and up to twice that.
const MIN_REQUEST_TIMEOUT: Duration = Duration::from_secs(1800);
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

struct Watch {
    api: Arc<Api>,
    facts: &'static KindFacts,
    encoder: Encoder,
    selectors: Selectors,
    prefix: String,
    after: i64,
    subscription: Subscription,
    initial: VecDeque<Arc<Entry>>,
    /// Revision of the bookmark that ends the initial events; taken when it is sent.
    initial_end: Option<i64>,
    bookmarks: bool,
    sent: i64,
    /// Revision of the last bookmark.
    bookmarked: i64,
    next_bookmark: Instant,
    deadline: Instant,
    ended: bool,
    /// Given back when the watch ends.
    _place: tokio::sync::OwnedSemaphorePermit,
}

struct Encoder {
    resource: Resource,
    accepted: Accepted,
    include: Include,
    first: bool,
}

/// Starts a watch.
///
/// # Errors
/// 410 where the revision is gone, 429 where there are too many watches already, and what is wrong with the request.
pub async fn watch(ctx: &Ctx<'_>) -> Result<Response<Body>, Status> {
    let Ok(place) = ctx.api.watches.clone().try_acquire_owned() else {
        return Err(Status::too_many_requests("Too many watches, please try again later.", 1));
    };
    let storage = ctx.storage()?;
    let selectors = Selectors::parse(ctx)?;
    let wanted = resource_version(ctx)?;
    let initial_events = check_initial_events(ctx)?;
    let start = match (initial_events, wanted) {
        (Some(false), Some(0) | None) => Start::After(ctx.api.store.revision().await.map_err(crate::api::store_error)?),
        (Some(true), _) | (None, None | Some(0)) => Start::Snapshot,
        (_, Some(revision)) => Start::After(revision),
    };
    if start == Start::Snapshot {
        match wanted {
            Some(0) => {}
            Some(revision) => wait_for(ctx, revision).await?,
            None => wait_for(ctx, ctx.api.store.revision().await.map_err(crate::api::store_error)?).await?,
        }
    }
    let bookmarks = ctx.query.flag("allowWatchBookmarks");
    let resource = Resource { facts: ctx.resource.facts, storage: ctx.resource.storage, converted: ctx.resource.converted };
    let encoder = Encoder { resource, accepted: ctx.accepted, include: Include::parse(ctx.query.get("includeObject"))?, first: true };
    let prefix = storage.collection(&ctx.info.namespace);
    let (snapshot, subscription) = match ctx.api.cache.subscribe(ctx.keyspace()?, &prefix, start) {
        Ok(found) => found,
        Err(old) => return gone(encoder, &format!("too old resource version: {} ({})", old.wanted, old.oldest)),
    };
    let timeout = match ctx.query.get("timeoutSeconds").and_then(|text| text.parse::<u64>().ok()).filter(|seconds| *seconds > 0) {
        Some(seconds) => Duration::from_secs(seconds),
        None => MIN_REQUEST_TIMEOUT + Duration::from_secs(u64::from(rand_seconds())),
    };
    let now = Instant::now();
    let after = match start {
        Start::After(revision) => revision,
        Start::Snapshot => snapshot.revision,
    };
    let watch = Watch {
        api: ctx.api.clone(),
        facts: ctx.resource.facts,
        encoder,
        selectors,
        prefix,
        after,
        subscription,
        initial: snapshot.entries.into(),
        initial_end: (initial_events == Some(true) && bookmarks).then_some(snapshot.revision),
        bookmarks,
        sent: after,
        bookmarked: 0,
        next_bookmark: now + BOOKMARK_INTERVAL,
        deadline: now + timeout,
        ended: false,
        _place: place,
    };
    let accepted = watch.encoder.accepted;
    Ok(streamed(accepted, futures::stream::unfold(watch, |mut watch| async move { Some((Ok(watch.next_chunk().await?), watch)) })))
}

/// Spreads the ends of watches without a timeout, so that they do not all come back at once.
fn rand_seconds() -> u32 {
    uuid::Uuid::new_v4().as_fields().0 % 1800
}

/// Checks `sendInitialEvents` with what it needs beside it.
fn check_initial_events(ctx: &Ctx<'_>) -> Result<Option<bool>, Status> {
    use apimachinery::field_error::FieldError;
    let asked = ctx.query.get("sendInitialEvents").map(|_| ctx.query.flag("sendInitialEvents"));
    let matching = ctx.query.get("resourceVersionMatch");
    let error = match (asked, matching) {
        (None, None) | (Some(_), Some("NotOlderThan")) => return Ok(asked),
        (None, Some(_)) => FieldError::forbidden(
            "resourceVersionMatch",
            "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
        ),
        (Some(_), None) => {
            FieldError::forbidden("resourceVersionMatch", "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan")
        }
        (Some(_), Some(other)) => FieldError::not_supported("resourceVersionMatch", other, &["NotOlderThan"]),
    };
    Err(Status::invalid("meta.k8s.io", "ListOptions", "", &[error]))
}

fn streamed(accepted: Accepted, stream: impl futures::Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static) -> Response<Body> {
    let mut response = Response::new(StreamBody::new(stream.map(|chunk| chunk.map(Frame::data))).boxed_unsync());
    let media_type = match (accepted.media, accepted.stream) {
        (Media::Protobuf, _) => "application/vnd.kubernetes.protobuf;stream=watch",
        (_, true) => "application/json;stream=watch",
        (_, false) => "application/json",
    };
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    response.headers_mut().insert("cache-control", HeaderValue::from_static("no-cache, private"));
    response
}

/// A watch whose only event is the error 410: that is how upstream's cache says it.
fn gone(mut encoder: Encoder, message: &str) -> Result<Response<Body>, Status> {
    let accepted = encoder.accepted;
    let frame = encoder.error(&Status::expired(message))?;
    Ok(streamed(accepted, futures::stream::once(async move { Ok(Bytes::from(frame)) })))
}

impl Encoder {
    fn frame(&self, kind: &str, object: &[u8]) -> Vec<u8> {
        if self.accepted.media == Media::Protobuf {
            return codec::protobuf::watch_frame(kind, object);
        }
        let mut out = Vec::with_capacity(object.len() + 32);
        out.extend_from_slice(b"{\"type\":\"");
        out.extend_from_slice(kind.as_bytes());
        out.extend_from_slice(b"\",\"object\":");
        out.extend_from_slice(object);
        out.extend_from_slice(b"}\n");
        out
    }

    fn object(&mut self, kind: &str, entry: &Entry, revision: i64) -> Result<Vec<u8>, Status> {
        let accepted = Accepted { pretty: false, ..self.accepted };
        let first = std::mem::take(&mut self.first);
        let object = reply::render_stored(&self.resource, accepted, &entry.value, revision, self.include, first)?;
        Ok(self.frame(kind, &object))
    }

    fn error(&mut self, status: &Status) -> Result<Vec<u8>, Status> {
        let object = codec::encode(self.accepted.media, &Gvk::new("v1", "Status"), &status.to_value())?;
        Ok(self.frame("ERROR", &object))
    }

    fn bookmark(&mut self, revision: i64, initial_end: bool) -> Result<Vec<u8>, Status> {
        let facts = self.resource.facts;
        let mut metadata = json!({"resourceVersion": revision.to_string()});
        if initial_end {
            metadata["annotations"] = json!({INITIAL_EVENTS_END: "true"});
        }
        let (gvk, object) = match self.accepted.shape {
            Shape::Object => (facts.gvk(), json!({"kind": facts.kind, "apiVersion": facts.api_version(), "metadata": metadata})),
            Shape::Partial => {
                let gvk = Gvk::new("meta.k8s.io/v1", "PartialObjectMetadata");
                (gvk, json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}))
            }
            Shape::Table => {
                let object = json!({"kind": facts.kind, "apiVersion": facts.api_version(), "metadata": metadata});
                let first = std::mem::take(&mut self.first);
                let mut table = Vec::new();
                tables::put_head(&mut table, facts, &json!({"resourceVersion": revision.to_string()}), first);
                tables::put_row(&mut table, facts, &Tree::from(&object), jiff::Timestamp::now(), self.include)?;
                table.extend_from_slice(b"]}");
                return Ok(self.frame("BOOKMARK", &table));
            }
        };
        Ok(self.frame("BOOKMARK", &codec::encode(self.accepted.media, &gvk, &object)?))
    }
}

impl Watch {
    fn matches(&self, entry: &Entry) -> bool {
        self.selectors.is_empty() || self.selectors.matches(self.facts, &entry.attributes)
    }

    /// The event as this watcher sees it: an object that begins or ceases to match is added or deleted for it.
    fn event(&mut self, event: &CacheEvent) -> Result<Option<Vec<u8>>, Status> {
        if event.entry.revision <= self.after || !event.entry.key.starts_with(&self.prefix) {
            return Ok(None);
        }
        let now = event.change != Change::Deleted && self.matches(&event.entry);
        let before = event.previous.as_ref().filter(|previous| self.matches(previous));
        let (kind, entry) = match (before, now) {
            (None, true) => ("ADDED", &event.entry),
            (Some(_), true) => ("MODIFIED", &event.entry),
            (Some(previous), false) => ("DELETED", previous),
            (None, false) => return Ok(None),
        };
        self.encoder.object(kind, entry, event.entry.revision).map(Some)
    }

    /// The next bytes; `None` at the end of the stream.
    async fn next_chunk(&mut self) -> Option<Bytes> {
        loop {
            if self.ended {
                return None;
            }
            match self.collect() {
                Ok(chunk) if !chunk.is_empty() => return Some(chunk.into()),
                Ok(_) => {}
                Err(status) => {
                    self.ended = true;
                    return self.encoder.error(&status).ok().map(Bytes::from);
                }
            }
            let wake = if self.bookmarks { self.next_bookmark.min(self.deadline) } else { self.deadline };
            tokio::select! {
                more = self.subscription.changed() => self.ended |= !more,
                () = self.api.closing.cancelled() => self.ended = true,
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    fn collect(&mut self) -> Result<Vec<u8>, Status> {
        let mut out = Vec::new();
        for _ in 0..CHUNK_EVENTS_MAX {
            let Some(entry) = self.initial.pop_front() else { break };
            if self.matches(&entry) {
                out.extend(self.encoder.object("ADDED", &entry, entry.revision)?);
            }
        }
        if !self.initial.is_empty() {
            return Ok(out);
        }
        if let Some(revision) = self.initial_end.take() {
            self.bookmarked = revision;
            out.extend(self.encoder.bookmark(revision, true)?);
        }
        let api = self.api.clone();
        match api.cache.pull(&mut self.subscription, CHUNK_EVENTS_MAX) {
            // Closed without an error, as upstream: the client resumes from what it saw last.
            Batch::Lagged => self.ended = true,
            Batch::Events(events, revision) => {
                for event in &events {
                    out.extend(self.event(event)?.unwrap_or_default());
                }
                self.sent = self.sent.max(revision);
            }
        }
        let now = Instant::now();
        let over = now >= self.deadline;
        if self.bookmarks && out.is_empty() && (over || now >= self.next_bookmark) {
            self.next_bookmark = now + BOOKMARK_INTERVAL;
            if !over || self.sent > self.bookmarked {
                out.extend(self.encoder.bookmark(self.sent, false)?);
            }
            self.bookmarked = self.sent;
        }
        self.ended |= over;
        Ok(out)
    }
}
