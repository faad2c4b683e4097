//! A client of a real etcd behind the same trait.
//!
//! Reads are tried at each member. A write is sent again only when it surely reached no member; else its outcome is unknown, and
//! that is said. A watch outlives the member that it is served by: it goes on at another one from where it was.

mod members;
mod version;
mod watch;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use protocols::etcd::etcdserverpb as pb;
use protocols::etcd::etcdserverpb::kv_client::KvClient;
use protocols::etcd::etcdserverpb::lease_client::LeaseClient;
use tonic::transport::Channel;
use tonic::{Response, Status};

pub use self::members::EtcdConfig;
use self::members::{Member, Members, is_elsewhere, is_unsent};
use crate::embedded::{TTL_SECONDS_MAX, check_txn};
use crate::{Error, LeaseInfo, Options, RangeRequest, RangeResponse, Store, Txn, TxnResponse, WatchRequest, WatchStream};

/// How long one call may take (etcd itself gives up a write after 7 s by default).
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How often every member is tried for a read.
const ROUNDS: usize = 2;
/// Answers may be as large as etcd's client takes them.
const ANSWER_BYTES_MAX: usize = i32::MAX as usize;
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// A real etcd.
#[derive(Debug)]
pub struct Etcd {
    members: Arc<Members>,
    /// The newest revision that a caller of [`Store::revision`] was told: watches that tell of progress hurry to reach it.
    wanted: Arc<tokio::sync::watch::Sender<i64>>,
    /// Whether every member answers requests for progress rightly.
    progress: bool,
}

fn kv(channel: Channel) -> KvClient<Channel> {
    KvClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX)
}

fn failed(act: &'static str, member: &Member, status: Status) -> Error {
    Error::Etcd { act, endpoint: member.url.clone(), source: Arc::new(status) }
}

/// What etcd's words mean (`etcd/api/v3rpc/rpctypes/error.go`).
fn known(status: &Status) -> Option<Error> {
    let message = status.message();
    let is = |words: &str| message.contains(words);
    if is("required revision has been compacted") {
        return Some(Error::Compacted { revision: 0, compact_revision: 0 });
    }
    if is("required revision is a future revision") {
        return Some(Error::FutureRevision { revision: 0, current: 0 });
    }
    if is("key is not provided") {
        return Some(Error::EmptyKey);
    }
    if is("request is too large") {
        let max = Options::default().request_bytes_max;
        return Some(Error::RequestTooLarge { bytes: max, max });
    }
    None
}

impl Etcd {
    /// A client of the etcd at these endpoints. Asks each member for its version; those that do not answer are passed over.
    ///
    /// # Errors
    /// [`Error::Endpoint`] for a URL or certificate that cannot be used; [`Error::Etcd`] when no member answers.
    pub async fn connect(config: &EtcdConfig) -> Result<Self, Error> {
        let members = Members::new(config)?;
        let progress = version::progress_works(&members).await?;
        Ok(Self { members: Arc::new(members), wanted: Arc::new(tokio::sync::watch::Sender::new(0)), progress })
    }

    /// Calls one member after the other until one answers.
    async fn read<T, F>(&self, act: &'static str, call: impl Fn(Channel) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let attempts = self.members.len() * ROUNDS;
        for attempt in 1.. {
            let member = self.members.current();
            let status = match timed(call(member.channel.clone())).await {
                Ok(answer) => return Ok(answer),
                Err(status) => status,
            };
            if let Some(error) = known(&status) {
                return Err(error);
            }
            if is_elsewhere(&status) {
                self.members.leave(&member);
                if attempt < attempts {
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            }
            return Err(failed(act, &member, status));
        }
        Err(Error::Closed)
    }

    /// Calls a member for a write; another one only when the first was not reached.
    async fn write<T, F>(&self, act: &'static str, call: impl Fn(Channel) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut left = self.members.len() * ROUNDS;
        loop {
            left -= 1;
            let member = self.members.current();
            let status = match timed(call(member.channel.clone())).await {
                Ok(answer) => return Ok(answer),
                Err(status) => status,
            };
            if is_elsewhere(&status) {
                self.members.leave(&member);
            }
            if left > 0 && is_unsent(&status) {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            return Err(known(&status).unwrap_or_else(|| failed(act, &member, status)));
        }
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Error> {
        if request.key.is_empty() {
            return Err(Error::EmptyKey);
        }
        let asked = request.revision;
        let request = wire::range_request(request);
        let answer = self.read("read from", |channel| {
            let request = request.clone();
            async move { kv(channel).range(request).await }
        });
        match answer.await {
            Ok(answer) => Ok(wire::range_response(answer)),
            Err(Error::Compacted { .. }) => Err(Error::Compacted { revision: asked, compact_revision: 0 }),
            Err(Error::FutureRevision { .. }) => Err(Error::FutureRevision { revision: asked, current: 0 }),
            Err(error) => Err(error),
        }
    }

    async fn txn(&self, txn: Txn) -> Result<TxnResponse, Error> {
        check_txn(&txn, Options::default().request_bytes_max)?;
        let lease = wire::first_lease(&txn);
        let request = wire::txn_request(txn);
        let answer = self.write("write to", |channel| {
            let request = request.clone();
            async move { kv(channel).txn(request).await }
        });
        match answer.await {
            Ok(answer) => Ok(wire::txn_response(answer)),
            Err(Error::Etcd { source, .. }) if is_lease_missing(&source) => Err(Error::LeaseNotFound { id: lease }),
            Err(error) => Err(error),
        }
    }

    async fn compact(&self, revision: i64) -> Result<(), Error> {
        let request = pb::CompactionRequest { revision, physical: false };
        match self.write("compact", |channel| async move { kv(channel).compact(request).await }).await {
            Ok(_) => Ok(()),
            Err(Error::Compacted { .. }) => Err(Error::Compacted { revision, compact_revision: 0 }),
            Err(Error::FutureRevision { .. }) => Err(Error::FutureRevision { revision, current: 0 }),
            Err(error) => Err(error),
        }
    }

    async fn lease_grant(&self, id: i64, ttl_seconds: i64) -> Result<LeaseInfo, Error> {
        if !(1..=TTL_SECONDS_MAX).contains(&ttl_seconds) {
            return Err(Error::LeaseTtl { ttl_seconds });
        }
        let request = pb::LeaseGrantRequest { ttl: ttl_seconds, id };
        let answer = self.write("grant a lease of", |channel| async move { LeaseClient::new(channel).lease_grant(request).await });
        match answer.await {
            Ok(answer) => Ok(LeaseInfo { id: answer.id, ttl_seconds: answer.ttl, granted_ttl_seconds: answer.ttl, ..LeaseInfo::default() }),
            Err(Error::Etcd { source, .. }) if source.message().contains("lease already exists") => Err(Error::LeaseExists { id }),
            Err(error) => Err(error),
        }
    }

    async fn lease_revoke(&self, id: i64) -> Result<(), Error> {
        let request = pb::LeaseRevokeRequest { id };
        let answer = self.write("revoke a lease of", |channel| async move { LeaseClient::new(channel).lease_revoke(request).await });
        match answer.await {
            Ok(_) => Ok(()),
            Err(Error::Etcd { source, .. }) if is_lease_missing(&source) => Err(Error::LeaseNotFound { id }),
            Err(error) => Err(error),
        }
    }

    async fn lease_keepalive(&self, id: i64) -> Result<LeaseInfo, Error> {
        let answer = self.read("keep a lease alive of", |channel| async move {
            // One request, and the stream is open until its answer is there.
            let requests = futures::stream::once(async move { pb::LeaseKeepAliveRequest { id } });
            let requests = futures::StreamExt::chain(requests, futures::stream::pending());
            let answers = LeaseClient::new(channel).lease_keep_alive(requests).await?;
            let (metadata, mut answers, extensions) = answers.into_parts();
            let answer = answers.message().await?.ok_or_else(|| Status::unavailable("the stream of keepalives ended"))?;
            Ok(Response::from_parts(metadata, answer, extensions))
        });
        let answer = answer.await?;
        if answer.ttl <= 0 {
            return Err(Error::LeaseNotFound { id });
        }
        Ok(LeaseInfo { id, ttl_seconds: answer.ttl, granted_ttl_seconds: answer.ttl, ..LeaseInfo::default() })
    }

    async fn lease_time_to_live(&self, id: i64) -> Result<LeaseInfo, Error> {
        let request = pb::LeaseTimeToLiveRequest { id, keys: true };
        let answer = self.read("read a lease of", |channel| async move { LeaseClient::new(channel).lease_time_to_live(request).await });
        match answer.await {
            Ok(answer) if answer.ttl < 0 => Err(Error::LeaseNotFound { id }),
            Ok(answer) => {
                let mut keys: Vec<Bytes> = answer.keys;
                keys.sort();
                Ok(LeaseInfo { id, ttl_seconds: answer.ttl, granted_ttl_seconds: answer.granted_ttl, keys })
            }
            Err(Error::Etcd { source, .. }) if is_lease_missing(&source) => Err(Error::LeaseNotFound { id }),
            Err(error) => Err(error),
        }
    }

    async fn revision(&self) -> Result<i64, Error> {
        let request = RangeRequest { count_only: true, ..RangeRequest::key(Bytes::from_static(b"\0")) };
        let revision = self.range(request).await?.revision;
        self.wanted.send_if_modified(|wanted| {
            let newer = revision > *wanted;
            *wanted = revision.max(*wanted);
            newer
        });
        Ok(revision)
    }
}

async fn timed<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(REQUEST_TIMEOUT, call).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()))),
    }
}

fn is_lease_missing(status: &Status) -> bool {
    status.message().contains("requested lease not found")
}

impl Store for Etcd {
    fn range(&self, request: RangeRequest) -> BoxFuture<'_, Result<RangeResponse, Error>> {
        self.range(request).boxed()
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnResponse, Error>> {
        self.txn(txn).boxed()
    }

    fn watch(&self, request: WatchRequest) -> BoxFuture<'_, Result<WatchStream, Error>> {
        watch::start(self.members.clone(), self.wanted.subscribe(), self.progress, request).boxed()
    }

    fn compact(&self, revision: i64) -> BoxFuture<'_, Result<(), Error>> {
        self.compact(revision).boxed()
    }

    fn lease_grant(&self, id: i64, ttl_seconds: i64) -> BoxFuture<'_, Result<LeaseInfo, Error>> {
        self.lease_grant(id, ttl_seconds).boxed()
    }

    fn lease_revoke(&self, id: i64) -> BoxFuture<'_, Result<(), Error>> {
        self.lease_revoke(id).boxed()
    }

    fn lease_keepalive(&self, id: i64) -> BoxFuture<'_, Result<LeaseInfo, Error>> {
        self.lease_keepalive(id).boxed()
    }

    fn lease_time_to_live(&self, id: i64) -> BoxFuture<'_, Result<LeaseInfo, Error>> {
        self.lease_time_to_live(id).boxed()
    }

    fn revision(&self) -> BoxFuture<'_, Result<i64, Error>> {
        self.revision().boxed()
    }
}
