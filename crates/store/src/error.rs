//! What can go wrong, in the words of etcd's errors (`etcd/api/v3rpc/rpctypes/error.go`) where it has them.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// An error of a store. Cloneable, for one failed group commit fails every writer that waited for it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The revision has been compacted.
    #[error("required revision {revision} has been compacted (first revision kept: {compact_revision})")]
    Compacted {
        /// What was asked for.
        revision: i64,
        /// The compacted revision.
        compact_revision: i64,
    },
    /// The revision does not exist yet.
    #[error("required revision {revision} is a future revision (current: {current})")]
    FutureRevision {
        /// What was asked for.
        revision: i64,
        /// The present revision.
        current: i64,
    },
    /// A key is empty.
    #[error("key is not provided")]
    EmptyKey,
    /// A transaction writes a key twice.
    #[error("duplicate key {key:?} given in txn request")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A transaction has too many operations.
    #[error("too many operations in txn request: {ops} (at most {max})")]
    TooManyOps {
        /// How many there were.
        ops: usize,
        /// How many may be.
        max: usize,
    },
    /// A request exceeds the size limit.
    #[error("request is too large: {bytes} bytes (at most {max})")]
    RequestTooLarge {
        /// Bytes of its keys and values.
        bytes: usize,
        /// How many may be.
        max: usize,
    },
    /// The lease does not exist or has expired.
    #[error("requested lease {id:x} not found")]
    LeaseNotFound {
        /// Its id.
        id: i64,
    },
    /// The lease exists already.
    #[error("lease {id:x} already exists")]
    LeaseExists {
        /// Its id.
        id: i64,
    },
    /// The TTL is not one.
    #[error("lease TTL {ttl_seconds} s is out of range (1 to 9000000000)")]
    LeaseTtl {
        /// What was asked for.
        ttl_seconds: i64,
    },
    /// The store is closed.
    #[error("the store is closed")]
    Closed,
    /// Another process (or another opener in this one) has the store open.
    #[error("the store {path} is in use by another process; stop it, or give this one another directory")]
    Locked {
        /// The store's directory.
        path: PathBuf,
    },
    /// The log is damaged before its end: acknowledged writes may be lost, so nothing is opened.
    #[error("the store's log {path} is damaged at byte {offset} of {length}: {what}; restore it from a backup")]
    Corrupt {
        /// The log.
        path: PathBuf,
        /// Where the damage starts.
        offset: u64,
        /// The log's length.
        length: u64,
        /// What is wrong there.
        what: String,
    },
    /// The log was written by a later version.
    #[error("the store's log {path} has format version {version}; this program reads up to {supported}")]
    Version {
        /// The log.
        path: PathBuf,
        /// Its version.
        version: u32,
        /// Ours.
        supported: u32,
    },
    /// The disk refused.
    #[error("failed to {act} {path}")]
    Io {
        /// What was being done.
        act: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Arc<io::Error>,
    },
    /// An etcd's address cannot be used.
    #[error("etcd endpoint {endpoint:?}: {what}")]
    Endpoint {
        /// The URL.
        endpoint: String,
        /// What is wrong with it.
        what: String,
    },
    /// A real etcd did not do it. After a write it is not known whether it was done.
    #[error("failed to {act} etcd at {endpoint}")]
    Etcd {
        /// What was asked.
        act: &'static str,
        /// The member's URL.
        endpoint: String,
        /// What it answered.
        #[source]
        source: Arc<tonic::Status>,
    },
    /// An earlier fsync failed, so what is on disk is not known; the store must be opened anew.
    #[error("the store {path} has stopped after a failed fsync; restart the program")]
    Failed {
        /// The log.
        path: PathBuf,
    },
}

impl Error {
    pub(crate) fn io(act: &'static str, path: &std::path::Path, source: io::Error) -> Self {
        Self::Io { act, path: path.to_owned(), source: Arc::new(source) }
    }
}
