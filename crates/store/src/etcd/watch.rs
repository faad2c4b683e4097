//! A watch over a member that may die.
//!
//! ```text
//! open ──> created ──> events, progress ──> broken ──> (pause) ──> open at another member, from the next revision
//!                                      └──> compacted: one last response, the end
//! ```
//!
//! Progress. A cache learns from a watch that it has reached a revision which changed nothing in its range. From an etcd that
//! answers requests for progress rightly, it is asked for as soon as somebody waits for it. From an older one (before 3.4.31 and 3.5.13)
//! the whole key space is watched, and what is not in the range is only a sign that time goes on: every revision changes some key, so the
//! watch reaches each revision that a read can be told of. The alternative, reads that go through to etcd, would give each list and get a
//! second way that only old etcds take and few test, and cost a range of the whole collection per read; this costs the traffic of
//! keys that are not ours, and an etcd of Kubernetes has hardly any. The notices that an old etcd sends by itself are in the order of
//! its events (`mvcc/watchable_store.go`, `progress`: under the lock of `notify`); only answers to requests overtake them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use protocols::etcd::etcdserverpb as pb;
use protocols::etcd::etcdserverpb::watch_client::WatchClient;
use protocols::etcd::etcdserverpb::watch_request::RequestUnion;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::members::{Member, Members};
use super::{ANSWER_BYTES_MAX, REQUEST_TIMEOUT, failed, wire};
use crate::{Error, Event, WatchRequest, WatchResponse, WatchStream};

/// Requests of one stream that are not yet sent: the creation and a request for progress.
const REQUESTS_MAX: usize = 4;
/// Between two requests for progress while somebody waits (upstream's `progressRequestPeriod`).
const PROGRESS_PERIOD: Duration = Duration::from_millis(100);
/// Before a broken watch is opened again, and at most after several failures.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// The stream of one member.
struct Open {
    member: Member,
    requests: mpsc::Sender<pb::WatchRequest>,
    answers: Streaming<pb::WatchResponse>,
}

struct Watcher {
    members: Arc<Members>,
    wanted: tokio::sync::watch::Receiver<i64>,
    request: WatchRequest,
    /// Requests for progress may be sent.
    asks: bool,
    /// The first revision not yet told.
    next: i64,
    /// Parts of a response that came in fragments.
    fragments: Vec<Event>,
    ready: VecDeque<WatchResponse>,
    open: Option<Open>,
    pause: Duration,
    ended: bool,
}

/// Opens a watch; the answer comes when the member has it.
pub(super) async fn start(
    members: Arc<Members>,
    wanted: tokio::sync::watch::Receiver<i64>,
    progress: bool,
    request: WatchRequest,
) -> Result<WatchStream, Error> {
    if request.key.is_empty() {
        return Err(Error::EmptyKey);
    }
    let asks = request.progress_notify && progress;
    let next = request.start_revision;
    let (fragments, ready) = (Vec::new(), VecDeque::new());
    let mut watcher = Watcher { members, wanted, request, asks, next, fragments, ready, open: None, pause: PAUSE, ended: false };
    let mut left = watcher.members.len() * super::ROUNDS;
    while let Err((member, status)) = watcher.open().await {
        watcher.members.leave(&member);
        left -= 1;
        if left == 0 {
            return Err(failed("watch", &member, status));
        }
        tokio::time::sleep(PAUSE).await;
    }
    let responses = futures::stream::unfold(watcher, |mut watcher| async move {
        let response = watcher.next_response().await?;
        Some((Ok(response), watcher))
    });
    Ok(responses.boxed())
}

impl Watcher {
    /// Opens the watch at the present member, from the first revision not yet told.
    async fn open(&mut self) -> Result<(), (Member, Status)> {
        let member = self.members.current();
        let opened = tokio::time::timeout(REQUEST_TIMEOUT, self.open_at(&member)).await;
        let open = match opened {
            Ok(Ok(open)) => open,
            Ok(Err(status)) => return Err((member, status)),
            Err(_) => return Err((member, Status::deadline_exceeded("the watch was not made in time"))),
        };
        self.open = Some(open);
        self.fragments.clear();
        self.pause = PAUSE;
        Ok(())
    }

    async fn open_at(&mut self, member: &Member) -> Result<Open, Status> {
        let (requests, queue) = mpsc::channel(REQUESTS_MAX);
        let whole = self.request.progress_notify && !self.asks;
        let zero = Bytes::from_static(b"\0");
        let (key, range_end) = if whole { (zero.clone(), zero) } else { (self.request.key.clone(), self.request.range_end.clone()) };
        let create = pb::WatchCreateRequest {
            key,
            range_end,
            start_revision: self.next,
            progress_notify: self.request.progress_notify,
            prev_kv: self.request.prev_kv,
            fragment: true,
            ..Default::default()
        };
        let create = pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        // There is room: the queue is new.
        let _ = requests.send(create).await;
        let queue = futures::stream::unfold(queue, |mut queue| async move { Some((queue.recv().await?, queue)) });
        let mut client = WatchClient::new(member.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX);
        let mut answers = client.watch(queue).await?.into_inner();
        let created = answers.message().await?.ok_or_else(|| Status::unavailable("the watch ended before it was made"))?;
        if created.canceled && created.compact_revision == 0 {
            return Err(Status::unavailable(format!("the watch was refused: {}", created.cancel_reason)));
        }
        if self.next == 0 {
            self.next = wire::revision(created.header.as_ref()) + 1;
        }
        let open = Open { member: member.clone(), requests, answers };
        if !created.created || created.canceled {
            self.take(created);
        }
        Ok(open)
    }

    async fn next_response(&mut self) -> Option<WatchResponse> {
        loop {
            if let Some(response) = self.ready.pop_front() {
                return Some(response);
            }
            if self.ended {
                return None;
            }
            if self.open.is_none() {
                tokio::time::sleep(self.pause).await;
                if let Err((member, status)) = self.open().await {
                    tracing::debug!(endpoint = %member.url, error = %status, "the watch could not be opened again");
                    self.members.leave(&member);
                    self.pause = (self.pause * 2).min(PAUSE_MAX);
                }
                continue;
            }
            self.wait().await;
        }
    }

    /// Waits for one message, or for the time to ask for progress.
    async fn wait(&mut self) {
        let Some(open) = self.open.as_mut() else { return };
        let wanted = *self.wanted.borrow_and_update();
        let behind = self.asks && wanted >= self.next;
        if behind {
            let ask = pb::WatchRequest { request_union: Some(RequestUnion::ProgressRequest(pb::WatchProgressRequest {})) };
            // A full queue holds such a request already.
            let _ = open.requests.try_send(ask);
        }
        let message = tokio::select! {
            message = open.answers.message() => message,
            () = tokio::time::sleep(PROGRESS_PERIOD), if behind => return,
            changed = self.wanted.changed(), if self.asks => {
                // The store is gone: no one waits for progress any more.
                self.asks &= changed.is_ok();
                return;
            }
        };
        match message {
            Ok(Some(message)) => self.take(message),
            outcome => {
                let why = outcome.err().map_or_else(|| "it ended".to_owned(), |status| status.to_string());
                tracing::warn!(endpoint = %open.member.url, %why, from = self.next, "a watch broke off; it goes on elsewhere");
                self.members.leave(&open.member.clone());
                self.open = None;
            }
        }
    }

    fn take(&mut self, message: pb::WatchResponse) {
        let header = wire::revision(message.header.as_ref());
        if message.compact_revision > 0 {
            let compact_revision = message.compact_revision;
            self.ready.push_back(WatchResponse { events: Vec::new(), revision: header, compact_revision });
            self.ended = true;
            return;
        }
        if message.canceled {
            tracing::warn!(reason = %message.cancel_reason, "etcd cancelled a watch; it is opened again");
            self.open = None;
            return;
        }
        if message.created {
            return;
        }
        if message.events.is_empty() && !message.fragment && self.fragments.is_empty() {
            // Progress: everything up to the header's revision has been sent.
            self.progress(header);
            return;
        }
        self.fragments.extend(message.events.into_iter().map(wire::event));
        if message.fragment {
            return;
        }
        let mut events = std::mem::take(&mut self.fragments);
        // The header may be ahead of what has been sent (etcd/server/storage/mvcc/watchable_store.go, syncWatchers).
        let Some(revision) = events.last().map(|event| event.kv.mod_revision) else { return };
        events.retain(|event| event.kv.mod_revision >= self.next);
        let WatchRequest { key, range_end, .. } = &self.request;
        events.retain(|event| wire::in_range(&event.kv.key, key, range_end));
        if events.is_empty() {
            self.progress(revision);
            return;
        }
        self.next = revision + 1;
        self.ready.push_back(WatchResponse { events, revision, compact_revision: 0 });
    }

    fn progress(&mut self, revision: i64) {
        // A member that lags behind may tell of less than is known.
        if revision < self.next - 1 {
            return;
        }
        self.next = revision + 1;
        if self.request.progress_notify {
            self.ready.push_back(WatchResponse { events: Vec::new(), revision, compact_revision: 0 });
        }
    }
}
