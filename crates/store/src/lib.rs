//! Revisions, ranges, transactions, watches, leases and compaction with etcd v3's semantics.
//!
//! The seam is the trait [`Store`]; its words are those of etcd's `rpc.proto` (KV, Watch, Lease). [`Embedded`] is the
//! engine of a single server: one writer thread, group commit over an append-only log, reads from memory. [`Etcd`] is a client of
//! a real one; how a cache over it stays linearizable with old versions too stands in `etcd/watch.rs`.
//!
//! ```text
//! txn ──> queue ──> writer: evaluate ─> one frame ─> fdatasync ─> publish ──> reply, reads, watches
//! ```
//!
//! **Invariant**: nothing is visible to a read, a watch or a reply before the frame that holds it is on disk.
#![forbid(unsafe_code)]

mod embedded;
mod error;
mod etcd;
mod types;

pub use embedded::{Embedded, Options, SnapshotStatus, snapshot_restore, snapshot_save, snapshot_status};
pub use error::Error;
pub use etcd::{Etcd, EtcdConfig};
pub use types::{
    Compare, CompareOp, CompareTarget, DeleteRequest, DeleteResponse, Event, EventKind, KeyValue, LeaseInfo, Op, OpResponse, PutRequest,
    PutResponse, RangeRequest, RangeResponse, Txn, TxnResponse, WatchRequest, WatchResponse, prefix_end,
};

use futures::future::BoxFuture;
use futures::stream::BoxStream;

/// What [`Store::watch`] answers: responses in revision order. The stream ends after a response with a
/// `compact_revision`, and when the store is closed.
pub type WatchStream = BoxStream<'static, Result<WatchResponse, Error>>;

/// etcd v3's KV, Watch and Lease services as an object-safe trait (`etcd/api/etcdserverpb/rpc.proto`, 3.6).
///
/// Every method is linearizable: what one caller got acknowledged is seen by every later call.
pub trait Store: Send + Sync + 'static {
    /// Keys of a range at a revision, in key order.
    ///
    /// # Errors
    /// [`Error::Compacted`] and [`Error::FutureRevision`] for revisions that are gone or not yet there.
    fn range(&self, request: RangeRequest) -> BoxFuture<'_, Result<RangeResponse, Error>>;

    /// Evaluates the comparisons and applies one of the branches atomically, in one revision.
    ///
    /// # Errors
    /// [`Error::DuplicateKey`], [`Error::LeaseNotFound`], [`Error::RequestTooLarge`], [`Error::TooManyOps`], or an
    /// error of the disk; nothing is changed then.
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnResponse, Error>>;

    /// Watches a range from a revision. No event is skipped: a watcher that falls behind the compacted revision gets
    /// one last response with `compact_revision` set, and its stream ends.
    fn watch(&self, request: WatchRequest) -> BoxFuture<'_, Result<WatchStream, Error>>;

    /// Drops the history before `revision`; what is current at `revision` stays readable.
    ///
    /// # Errors
    /// [`Error::Compacted`] if it is compacted already, [`Error::FutureRevision`] if it is not there yet.
    fn compact(&self, revision: i64) -> BoxFuture<'_, Result<(), Error>>;

    /// Makes a lease of `ttl_seconds`; `id` 0 lets the store choose one.
    ///
    /// # Errors
    /// [`Error::LeaseExists`] when `id` is taken.
    fn lease_grant(&self, id: i64, ttl_seconds: i64) -> BoxFuture<'_, Result<LeaseInfo, Error>>;

    /// Ends a lease; its keys are deleted in one revision.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`].
    fn lease_revoke(&self, id: i64) -> BoxFuture<'_, Result<(), Error>>;

    /// Starts a lease's time anew.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`], also when it has expired.
    fn lease_keepalive(&self, id: i64) -> BoxFuture<'_, Result<LeaseInfo, Error>>;

    /// A lease's remaining time and keys.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`].
    fn lease_time_to_live(&self, id: i64) -> BoxFuture<'_, Result<LeaseInfo, Error>>;

    /// The present revision (what the header of a range would say).
    ///
    /// # Errors
    /// [`Error::Closed`], or an error of the store's transport.
    fn revision(&self) -> BoxFuture<'_, Result<i64, Error>>;
}
