//! Compacts a real etcd's history, which grows without end otherwise. All API servers of one etcd, ours and upstream's, share one
//! record of when it was done last, and the first to come does it (`apiserver/pkg/storage/etcd3/compact.go`, v1.37).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use store::{Compare, CompareOp, CompareTarget, Op, OpResponse, PutRequest, RangeRequest, Store, Txn};
use tokio_util::sync::CancellationToken;

/// The record: its version counts the compactions, its value is the revision. It stands outside of every prefix, as upstream's.
const RECORD: &str = "compact_rev_key";

/// Compacts what was current one interval ago, once an interval. An interval of zero means never.
pub async fn run(store: Arc<dyn Store>, interval: Duration, cancel: CancellationToken) {
    if interval.is_zero() {
        return;
    }
    let (mut version, mut revision) = (0, 0);
    loop {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = cancel.cancelled() => return,
        }
        match step(store.as_ref(), version, revision).await {
            Ok(next) => (version, revision) = next,
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "etcd was not compacted; it is tried again"),
        }
    }
}

/// Compacts `revision` if nobody has since `version`. Answers the record's version and the present revision.
///
/// # Errors
/// What the store says; the next step starts from the same place.
async fn step(store: &dyn Store, version: i64, revision: i64) -> Result<(i64, i64), store::Error> {
    let key = Bytes::from_static(RECORD.as_bytes());
    let unchanged = Compare { key: key.clone(), range_end: Bytes::new(), op: CompareOp::Equal, target: CompareTarget::Version(version) };
    let record = PutRequest { key: key.clone(), value: revision.to_string().into(), ..PutRequest::default() };
    let txn = Txn { compare: vec![unchanged], success: vec![Op::Put(record)], failure: vec![Op::Range(RangeRequest::key(key))] };
    let answer = store.txn(txn).await?;
    if !answer.succeeded {
        let version = match &answer.responses[..] {
            [OpResponse::Range(range)] => range.kvs.first().map_or(0, |kv| kv.version),
            _ => 0,
        };
        return Ok((version, answer.revision));
    }
    if revision > 0 {
        match store.compact(revision).await {
            Ok(()) => tracing::debug!(revision, "etcd is compacted"),
            Err(store::Error::Compacted { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok((version + 1, answer.revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_of_two_servers_compacts_what_was_current_an_interval_ago() {
        let folder = tempfile::tempdir().expect("tempdir");
        let options = store::Options { compaction_interval: None, ..store::Options::default() };
        let store = store::Embedded::open(folder.path(), options).expect("open");
        let first = step(&store, 0, 0).await.expect("step");
        assert_eq!(first.0, 1);
        let second = step(&store, 0, 0).await.expect("step");
        assert_eq!(second, first, "the second server learns of the first one's turn");
        let put = Op::Put(PutRequest { key: "/registry/x".into(), ..PutRequest::default() });
        store.txn(Txn { success: vec![put], ..Txn::default() }).await.expect("put");
        let next = step(&store, first.0, first.1).await.expect("step");
        assert_eq!(next, (2, first.1 + 2));
        assert_eq!(step(&store, second.0, second.1).await.expect("step").0, 2);
        let old = RangeRequest { revision: first.1 - 1, ..RangeRequest::prefix("/") };
        assert!(matches!(store.range(old).await, Err(store::Error::Compacted { .. })));
    }
}
