//! Helpers of the suite.
#![allow(dead_code, unused_macros, unused_imports)]

pub mod real;

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use store::{
    DeleteRequest, Embedded, Error, Event, KeyValue, Op, OpResponse, Options, PutRequest, RangeRequest, Store, Txn, TxnResponse,
    WatchStream,
};

/// A fresh embedded engine with its directory.
pub async fn embedded() -> (Embedded, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("tempdir");
    let options = Options { progress_interval: Duration::from_millis(50), ..Options::default() };
    (Embedded::open(dir.path(), options).expect("open"), dir)
}

/// Makes a test of each function of the suite for a way to get a store.
macro_rules! check {
    ($maker:ident: $($case:ident),+ $(,)?) => {
        mod $maker {
            $(
                #[tokio::test]
                async fn $case() {
                    let (store, _guard) = super::$maker().await;
                    super::$case(&store).await;
                }
            )+
        }
    };
}
pub(crate) use check;

/// Makes a test of each function of the suite for a real etcd of this name among the peers.
macro_rules! check_real {
    ($peer:ident: $($case:ident),+ $(,)?) => {
        mod $peer {
            $(
                #[tokio::test]
                async fn $case() {
                    let Some(program) = super::common::real::peer(stringify!($peer)) else { return };
                    let member = super::common::real::Member::start(&program);
                    super::$case(&member.client().await).await;
                }
            )+
        }
    };
}
pub(crate) use check_real;

pub async fn txn_of(store: &dyn Store, ops: Vec<Op>) -> Result<TxnResponse, Error> {
    store.txn(Txn { success: ops, ..Txn::default() }).await
}

/// Puts and answers the revision.
pub async fn put(store: &dyn Store, key: &str, value: &str) -> i64 {
    let (key, value) = (Bytes::from(key.to_owned()), Bytes::from(value.to_owned()));
    txn_of(store, vec![Op::Put(PutRequest { key, value, ..PutRequest::default() })]).await.expect("put").revision
}

/// Deletes and answers how many and the revision.
pub async fn delete(store: &dyn Store, key: &str, range_end: &str) -> (i64, i64) {
    let (key, range_end) = (Bytes::from(key.to_owned()), Bytes::from(range_end.to_owned()));
    let op = Op::Delete(DeleteRequest { key, range_end, prev_kv: false });
    let answer = txn_of(store, vec![op]).await.expect("delete");
    match &answer.responses[..] {
        [OpResponse::Delete(deleted)] => (deleted.deleted, answer.revision),
        other => panic!("unexpected {other:?}"),
    }
}

pub async fn get(store: &dyn Store, key: &str, revision: i64) -> Option<KeyValue> {
    let request = RangeRequest { revision, ..RangeRequest::key(key.to_owned()) };
    store.range(request).await.expect("range").kvs.pop()
}

pub fn keys(kvs: &[KeyValue]) -> Vec<&str> {
    kvs.iter().map(|kv| std::str::from_utf8(&kv.key).expect("utf-8")).collect()
}

/// The next events of a watch, at least this many.
pub async fn collect(watch: &mut WatchStream, count: usize) -> Vec<Event> {
    let mut events = Vec::new();
    while events.len() < count {
        let next = tokio::time::timeout(Duration::from_secs(20), watch.next());
        let answer = next.await.expect("events in time").expect("the watch is open").expect("watch");
        assert_eq!(answer.compact_revision, 0);
        events.extend(answer.events);
    }
    events
}
