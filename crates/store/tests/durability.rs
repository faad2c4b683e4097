//! What only the embedded engine has: a file that may be cut off anywhere, a lock, group commit, rewriting.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{delete, embedded, get, put, txn_of};
use futures::StreamExt;
use store::{Embedded, Error, Op, Options, PutRequest, RangeRequest, Store, WatchRequest};

fn log_bytes(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("store.log")).expect("read the log")
}

async fn all(store: &Embedded) -> (Vec<store::KeyValue>, i64) {
    let range = RangeRequest { range_end: Bytes::from_static(b"\0"), ..RangeRequest::key(&b"\0"[..]) };
    let answer = store.range(range).await.expect("range");
    (answer.kvs, answer.revision)
}

#[tokio::test]
async fn a_second_opener_is_told_the_path() {
    let (store, dir) = embedded().await;
    let error = Embedded::open(dir.path(), Options::default()).expect_err("locked");
    assert!(matches!(error, Error::Locked { .. }));
    assert!(error.to_string().contains(&dir.path().display().to_string()));
    drop(store);
    Embedded::open(dir.path(), Options::default()).expect("the lock went with the store");
}

#[tokio::test]
async fn everything_is_there_after_a_restart() {
    let (store, dir) = embedded().await;
    let first = put(&store, "/a", "1").await;
    put(&store, "/a", "2").await;
    put(&store, "/gone", "x").await;
    delete(&store, "/gone", "").await;
    let lease = store.lease_grant(0, 600).await.expect("grant").id;
    let op = Op::Put(PutRequest { key: "/leased".into(), lease, ..PutRequest::default() });
    txn_of(&store, vec![op]).await.expect("put");
    store.compact(first).await.expect("compact");
    let before = all(&store).await;
    store.close().await;
    let store = Embedded::open(dir.path(), Options::default()).expect("open");
    assert_eq!(all(&store).await, before);
    assert_eq!(get(&store, "/a", first).await.expect("there").value, "1");
    assert_eq!(store.lease_time_to_live(lease).await.expect("lease").keys, ["/leased"]);
    let request = WatchRequest { key: "/gone".into(), start_revision: first, ..WatchRequest::default() };
    let mut watch = store.watch(request).await.expect("watch");
    assert_eq!(common::collect(&mut watch, 2).await.len(), 2);
}

/// The log is cut at every byte of the last commits and at every 97th before: what was acknowledged by then is there.
#[tokio::test]
async fn the_log_may_be_cut_anywhere() {
    let (store, dir) = embedded().await;
    let mut acknowledged = vec![(log_bytes(dir.path()).len(), all(&store).await)];
    for n in 0..12 {
        let ops = (0..3)
            .map(|k| {
                let key = Bytes::from(format!("/k/{}", (n + k) % 5));
                Op::Put(PutRequest { key, value: vec![n as u8; 100].into(), ..PutRequest::default() })
            })
            .collect();
        txn_of(&store, ops).await.expect("txn");
        acknowledged.push((log_bytes(dir.path()).len(), all(&store).await));
        delete(&store, &format!("/k/{}", n % 5), "").await;
        acknowledged.push((log_bytes(dir.path()).len(), all(&store).await));
    }
    store.close().await;
    let bytes = log_bytes(dir.path());
    let cut_dir = tempfile::tempdir().expect("tempdir");
    for cut in (0..bytes.len()).step_by(97).chain(bytes.len() - 500..=bytes.len()) {
        std::fs::write(cut_dir.path().join("store.log"), &bytes[..cut]).expect("write");
        let store = Embedded::open(cut_dir.path(), Options::default()).unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        let empty = (Vec::new(), 1);
        let wanted = acknowledged.iter().rfind(|(length, _)| *length <= cut).map_or(&empty, |(_, state)| state);
        assert_eq!(&all(&store).await, wanted, "cut at {cut}");
        // And it goes on from there.
        assert_eq!(put(&store, "/after", "x").await, wanted.1 + 1);
        store.close().await;
        let store = Embedded::open(cut_dir.path(), Options::default()).expect("open again");
        assert!(get(&store, "/after", 0).await.is_some(), "cut at {cut}");
    }
}

#[tokio::test]
async fn a_damaged_log_is_refused_and_left_alone() {
    let (store, dir) = embedded().await;
    for n in 0..10 {
        put(&store, "/a", &n.to_string()).await;
    }
    store.close().await;
    let mut bytes = log_bytes(dir.path());
    bytes[100] ^= 1;
    std::fs::write(dir.path().join("store.log"), &bytes).expect("write");
    let error = Embedded::open(dir.path(), Options::default()).expect_err("damaged");
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert_eq!(log_bytes(dir.path()), bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_that_wait_share_one_sync() {
    let (store, _dir) = embedded().await;
    let store = Arc::new(store);
    let before = store.syncs();
    let writes = (0..400).map(|n| {
        let store = store.clone();
        async move { put(&*store, &format!("/g/{n}"), "x").await }
    });
    let mut revisions = futures::future::join_all(writes).await;
    revisions.sort_unstable();
    assert_eq!(revisions, (2..402).collect::<Vec<_>>());
    let syncs = store.syncs() - before;
    assert!(syncs <= 40, "{syncs} syncs for 400 concurrent writes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_rewritten_while_writes_go_on() {
    let dir = tempfile::tempdir().expect("tempdir");
    let options = Options { rewrite_bytes_min: 64 << 10, compaction_interval: None, ..Options::default() };
    let store = Embedded::open(dir.path(), options.clone()).expect("open");
    let lease = store.lease_grant(0, 600).await.expect("grant").id;
    let value = "v".repeat(1000);
    let mut largest = 0;
    for n in 0..1200 {
        let revision = put(&store, &format!("/k/{}", n % 10), &value).await;
        if n % 100 == 99 {
            store.compact(revision - 5).await.expect("compact");
        }
        largest = largest.max(log_bytes(dir.path()).len());
    }
    assert!(largest < 600 << 10, "the log grew to {largest} bytes");
    let before = all(&store).await;
    store.close().await;
    let store = Embedded::open(dir.path(), options).expect("open");
    assert_eq!(all(&store).await, before);
    assert!(store.lease_time_to_live(lease).await.is_ok());
    assert!(get(&store, "/k/9", before.1 - 4).await.is_some());
}

#[tokio::test]
async fn old_history_goes_by_time() {
    let dir = tempfile::tempdir().expect("tempdir");
    let options = Options { compaction_interval: Some(Duration::from_millis(50)), ..Options::default() };
    let store = Embedded::open(dir.path(), options).expect("open");
    let first = put(&store, "/a", "1").await;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    loop {
        put(&store, "/a", "2").await;
        let old = RangeRequest { revision: first, ..RangeRequest::key("/a") };
        if matches!(store.range(old).await, Err(Error::Compacted { .. })) {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "nothing was compacted");
    }
}

#[tokio::test]
async fn watches_end_when_the_store_closes() {
    let (store, _dir) = embedded().await;
    let request = WatchRequest { key: "/a".into(), ..WatchRequest::default() };
    let mut watch = store.watch(request).await.expect("watch");
    put(&store, "/a", "1").await;
    store.close().await;
    assert_eq!(watch.next().await.expect("the event").expect("watch").events.len(), 1);
    assert!(watch.next().await.is_none());
}

/// What a reader sees at some moment is there after a crash at that moment: nothing is visible before it is durable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_visible_before_it_is_in_the_log() {
    let (store, dir) = embedded().await;
    let store = Arc::new(store);
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            for n in 0..300 {
                put(&*store, "/n", &n.to_string()).await;
            }
        }
    });
    let copy = tempfile::tempdir().expect("tempdir");
    while !writer.is_finished() {
        let seen = store.revision().await.expect("revision");
        std::fs::write(copy.path().join("store.log"), log_bytes(dir.path())).expect("write");
        let crashed = Embedded::open(copy.path(), Options::default()).expect("open");
        assert!(crashed.revision().await.expect("revision") >= seen);
    }
    writer.await.expect("writer");
}
