//! Requests and answers, with the field names of etcd's `rpc.proto` and `kv.proto`.

use bytes::Bytes;

/// A key with its value and the revisions that made it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeyValue {
    /// The key.
    pub key: Bytes,
    /// The value; empty with `keys_only`.
    pub value: Bytes,
    /// Revision of the key's creation (its last one, after a deletion).
    pub create_revision: i64,
    /// Revision of the last change.
    pub mod_revision: i64,
    /// Number of puts since the creation; 1 for a new key.
    pub version: i64,
    /// The lease it is attached to; 0 for none.
    pub lease: i64,
}

/// Which keys, and at which revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RangeRequest {
    /// First key.
    pub key: Bytes,
    /// End of the half-open range; empty for the one key, `\0` for everything from `key` on.
    pub range_end: Bytes,
    /// The most keys to answer with; 0 for no limit.
    pub limit: i64,
    /// The revision to read at; 0 for the present one.
    pub revision: i64,
    /// Leave the values out.
    pub keys_only: bool,
    /// Answer only the count.
    pub count_only: bool,
}

impl RangeRequest {
    /// One key at the present revision.
    pub fn key(key: impl Into<Bytes>) -> Self {
        Self { key: key.into(), ..Self::default() }
    }

    /// All keys with a prefix, at the present revision.
    pub fn prefix(prefix: impl Into<Bytes>) -> Self {
        let key = prefix.into();
        let range_end = prefix_end(&key);
        Self { key, range_end, ..Self::default() }
    }
}

/// Answer to a [`RangeRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RangeResponse {
    /// The keys, in key order, at most `limit` of them.
    pub kvs: Vec<KeyValue>,
    /// Whether `limit` cut the answer.
    pub more: bool,
    /// How many keys the range has, whatever the limit.
    pub count: i64,
    /// The store's revision at the time of the answer (not the revision that was asked for).
    pub revision: i64,
}

/// Sets one key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PutRequest {
    /// The key, not empty.
    pub key: Bytes,
    /// Its new value.
    pub value: Bytes,
    /// The lease to attach to; 0 for none.
    pub lease: i64,
    /// Answer the key as it was before.
    pub prev_kv: bool,
}

/// Answer to a [`PutRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PutResponse {
    /// The key as it was, if asked for and there.
    pub prev_kv: Option<KeyValue>,
}

/// Deletes the keys of a range.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeleteRequest {
    /// First key.
    pub key: Bytes,
    /// As in [`RangeRequest::range_end`].
    pub range_end: Bytes,
    /// Answer the keys as they were before.
    pub prev_kv: bool,
}

/// Answer to a [`DeleteRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeleteResponse {
    /// How many keys were deleted.
    pub deleted: i64,
    /// The keys as they were, if asked for.
    pub prev_kvs: Vec<KeyValue>,
}

/// How a [`Compare`] relates what is there to what is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompareOp {
    /// There is what was given.
    Equal,
    /// There is something else.
    NotEqual,
    /// What is there is less.
    Less,
    /// What is there is greater.
    Greater,
}

/// What a [`Compare`] looks at, with the value given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CompareTarget {
    /// Number of puts since creation; 0 for an absent key.
    Version(i64),
    /// Revision of creation; 0 for an absent key.
    CreateRevision(i64),
    /// Revision of the last change; 0 for an absent key.
    ModRevision(i64),
    /// The value; never holds for an absent key.
    Value(Bytes),
    /// The lease; 0 for none and for an absent key.
    Lease(i64),
}

/// A condition of a transaction. With a range it must hold for every key of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// First key.
    pub key: Bytes,
    /// As in [`RangeRequest::range_end`].
    pub range_end: Bytes,
    /// The relation.
    pub op: CompareOp,
    /// The target and the value given.
    pub target: CompareTarget,
}

impl Compare {
    /// The key's `mod_revision` is this; 0: the key is absent.
    pub fn mod_revision(key: impl Into<Bytes>, revision: i64) -> Self {
        Self { key: key.into(), range_end: Bytes::new(), op: CompareOp::Equal, target: CompareTarget::ModRevision(revision) }
    }
}

/// One operation of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Read; sees what the operations before it wrote.
    Range(RangeRequest),
    /// Write.
    Put(PutRequest),
    /// Delete.
    Delete(DeleteRequest),
    /// A transaction within; its comparisons are evaluated before anything is applied.
    Txn(Txn),
}

/// Answer to an [`Op`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpResponse {
    /// To a read.
    Range(RangeResponse),
    /// To a write.
    Put(PutResponse),
    /// To a deletion.
    Delete(DeleteResponse),
    /// To a transaction within.
    Txn(TxnResponse),
}

/// If all of `compare` hold then `success`, else `failure`, in one revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// The conditions; none means success.
    pub compare: Vec<Compare>,
    /// Applied when all hold.
    pub success: Vec<Op>,
    /// Applied when one does not.
    pub failure: Vec<Op>,
}

/// Answer to a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TxnResponse {
    /// Whether all conditions held.
    pub succeeded: bool,
    /// One per operation of the branch taken.
    pub responses: Vec<OpResponse>,
    /// The revision of the transaction if it wrote, else the present one.
    pub revision: i64,
}

/// Which changes to see.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WatchRequest {
    /// First key.
    pub key: Bytes,
    /// As in [`RangeRequest::range_end`].
    pub range_end: Bytes,
    /// The first revision to see; 0 for what comes after now.
    pub start_revision: i64,
    /// Send the key as it was before the change, as far as it is not compacted.
    pub prev_kv: bool,
    /// Send empty responses with the present revision while nothing happens in the range.
    pub progress_notify: bool,
}

/// Kind of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// Created or changed; [`Event::is_create`] tells which.
    Put,
    /// Deleted or expired.
    Delete,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The key after it; of a deleted one only `key` and `mod_revision`.
    pub kv: KeyValue,
    /// The key before it, if asked for, there and not compacted.
    pub prev_kv: Option<KeyValue>,
}

impl Event {
    /// Whether the put made the key.
    pub fn is_create(&self) -> bool {
        self.kind == EventKind::Put && self.kv.create_revision == self.kv.mod_revision
    }
}

/// Changes of whole revisions: all of a revision's changes in the range are in one response.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WatchResponse {
    /// The changes, in the order of the operations; empty for a progress notification.
    pub events: Vec<Event>,
    /// Every change of the range up to this revision has been sent.
    pub revision: i64,
    /// Not 0: the revisions asked for are compacted; the first that can be watched is this. The stream ends.
    pub compact_revision: i64,
}

/// A lease.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LeaseInfo {
    /// Its id.
    pub id: i64,
    /// Seconds that remain.
    pub ttl_seconds: i64,
    /// Seconds that it was granted.
    pub granted_ttl_seconds: i64,
    /// The keys attached, in order; only filled in by `lease_time_to_live`.
    pub keys: Vec<Bytes>,
}

/// The end of the range of all keys with this prefix (`etcd/client/v3/op.go`, `GetPrefixRangeEnd`).
pub fn prefix_end(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.last_mut() {
        if *last < 0xff {
            *last += 1;
            return Bytes::from(end);
        }
        end.pop();
    }
    Bytes::from_static(b"\0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_ends() {
        assert_eq!(prefix_end(b"/a/"), &b"/a0"[..]);
        assert_eq!(prefix_end(b"a\xff"), &b"b"[..]);
        assert_eq!(prefix_end(b"\xff"), &b"\0"[..]);
        assert_eq!(prefix_end(b""), &b"\0"[..]);
    }
}
