//! etcd's semantics, told over the trait: every implementation of [`store::Store`] passes this one suite.

mod common;

use bytes::Bytes;
use common::{check, check_real, collect, delete, embedded, get, keys, put, txn_of};
use futures::StreamExt;
use store::{
    Compare, CompareOp, CompareTarget, DeleteRequest, Error, EventKind, Op, OpResponse, PutRequest, RangeRequest, Store, Txn, WatchRequest,
    prefix_end,
};

async fn revisions_and_versions(store: &dyn Store) {
    let base = store.revision().await.expect("revision");
    assert_eq!(put(store, "/a", "1").await, base + 1);
    assert_eq!(put(store, "/a", "2").await, base + 2);
    assert_eq!(put(store, "/b", "1").await, base + 3);
    let a = get(store, "/a", 0).await.expect("there");
    assert_eq!((a.create_revision, a.mod_revision, a.version), (base + 1, base + 2, 2));
    assert_eq!(delete(store, "/a", "").await, (1, base + 4));
    assert!(get(store, "/a", 0).await.is_none());
    assert_eq!(get(store, "/a", base + 1).await.expect("there").value, "1");
    assert_eq!(get(store, "/a", base + 3).await.expect("there").value, "2");
    assert!(get(store, "/a", base).await.is_none());
    // A deletion that finds nothing makes no revision; a key made anew starts over.
    assert_eq!(delete(store, "/a", "").await, (0, base + 4));
    assert_eq!(put(store, "/a", "3").await, base + 5);
    let a = get(store, "/a", 0).await.expect("there");
    assert_eq!((a.create_revision, a.mod_revision, a.version), (base + 5, base + 5, 1));
    assert_eq!(store.revision().await.expect("revision"), base + 5);
}

async fn ranges(store: &dyn Store) {
    for key in ["/r/a", "/r/b", "/r/c", "/s"] {
        put(store, key, key).await;
    }
    let all = store.range(RangeRequest::prefix("/r/")).await.expect("range");
    assert_eq!((keys(&all.kvs), all.count, all.more), (vec!["/r/a", "/r/b", "/r/c"], 3, false));
    let first = store.range(RangeRequest { limit: 2, ..RangeRequest::prefix("/r/") }).await.expect("range");
    assert_eq!((keys(&first.kvs), first.count, first.more), (vec!["/r/a", "/r/b"], 3, true));
    // The next page starts behind the last key, at the revision of the first page.
    put(store, "/r/bb", "late").await;
    let page = RangeRequest {
        key: Bytes::from_static(b"/r/b\0"),
        range_end: prefix_end(b"/r/"),
        revision: first.revision,
        ..RangeRequest::default()
    };
    let second = store.range(page).await.expect("range");
    assert_eq!((keys(&second.kvs), second.revision), (vec!["/r/c"], first.revision + 1));
    let count = store.range(RangeRequest { count_only: true, ..RangeRequest::prefix("/r/") }).await.expect("range");
    assert_eq!((count.kvs.len(), count.count), (0, 4));
    let names = store.range(RangeRequest { keys_only: true, ..RangeRequest::prefix("/r/") }).await.expect("range");
    assert!(names.kvs.iter().all(|kv| kv.value.is_empty() && kv.mod_revision > 0));
    let from = RangeRequest { range_end: Bytes::from_static(b"\0"), ..RangeRequest::key("/r/c") };
    assert_eq!(keys(&store.range(from).await.expect("range").kvs), ["/r/c", "/s"]);
    let backwards = RangeRequest { range_end: Bytes::from_static(b"/a"), ..RangeRequest::key("/r/c") };
    assert_eq!(store.range(backwards).await.expect("range").count, 0);
    assert!(matches!(store.range(RangeRequest::default()).await, Err(Error::EmptyKey)));
    let future = RangeRequest { revision: i64::MAX, ..RangeRequest::key("/s") };
    assert!(matches!(store.range(future).await, Err(Error::FutureRevision { .. })));
}

fn compare(key: &'static str, op: CompareOp, target: CompareTarget) -> Compare {
    Compare { key: Bytes::from_static(key.as_bytes()), range_end: Bytes::new(), op, target }
}

async fn comparisons(store: &dyn Store) {
    use CompareOp::{Equal, Greater, Less, NotEqual};
    use CompareTarget::{CreateRevision, Lease, ModRevision, Value, Version};
    let first = put(store, "/a", "m").await;
    let second = put(store, "/a", "m").await;
    let value = |value: &'static str| Value(Bytes::from_static(value.as_bytes()));
    let table = [
        ("/a", Equal, CreateRevision(first), true),
        ("/a", Equal, ModRevision(second), true),
        ("/a", Greater, ModRevision(first), true),
        ("/a", Less, ModRevision(first), false),
        ("/a", Equal, Version(2), true),
        ("/a", NotEqual, Version(2), false),
        ("/a", Equal, Lease(0), true),
        ("/a", Equal, value("m"), true),
        ("/a", Greater, value("a"), true),
        ("/a", Less, value("a"), false),
        ("/none", Equal, ModRevision(0), true),
        ("/none", Equal, Version(0), true),
        ("/none", Greater, Version(0), false),
        ("/none", Equal, value(""), false),
        ("/none", NotEqual, value("x"), false),
    ];
    for (key, op, target, holds) in table {
        let case = format!("{key} {op:?} {target:?}");
        let txn = Txn { compare: vec![compare(key, op, target)], ..Txn::default() };
        assert_eq!(store.txn(txn).await.expect("txn").succeeded, holds, "{case}");
    }
    put(store, "/p/1", "x").await;
    put(store, "/p/2", "x").await;
    put(store, "/p/2", "x").await;
    let range = |target| Compare { range_end: prefix_end(b"/p/"), ..compare("/p/", Equal, target) };
    for (target, holds) in [(Version(1), false), (value("x"), true)] {
        let txn = Txn { compare: vec![range(target)], ..Txn::default() };
        assert_eq!(store.txn(txn).await.expect("txn").succeeded, holds);
    }
}

async fn transactions(store: &dyn Store) {
    let base = put(store, "/old", "1").await;
    let put_op = |key: &str, value: &str| {
        Op::Put(PutRequest { key: Bytes::from(key.to_owned()), value: Bytes::from(value.to_owned()), ..PutRequest::default() })
    };
    let inner = Txn {
        // True only before the outer transaction's puts: comparisons come first.
        compare: vec![Compare::mod_revision("/new", 0)],
        success: vec![put_op("/inner", "yes")],
        failure: vec![put_op("/inner", "no")],
    };
    let answer = txn_of(
        store,
        vec![
            put_op("/new", "1"),
            Op::Range(RangeRequest::key("/new")),
            Op::Delete(DeleteRequest { key: "/old".into(), prev_kv: true, ..DeleteRequest::default() }),
            Op::Range(RangeRequest::key("/old")),
            Op::Txn(inner),
        ],
    )
    .await
    .expect("txn");
    assert_eq!(answer.revision, base + 1);
    let [_, OpResponse::Range(new), OpResponse::Delete(deleted), OpResponse::Range(old), OpResponse::Txn(inner)] = &answer.responses[..]
    else {
        panic!("unexpected {answer:?}");
    };
    assert_eq!((new.kvs.len(), new.kvs[0].mod_revision, old.count), (1, base + 1, 0));
    assert_eq!((deleted.deleted, keys(&deleted.prev_kvs)), (1, vec!["/old"]));
    assert!(inner.succeeded);
    let inner = get(store, "/inner", 0).await.expect("there");
    assert_eq!((inner.mod_revision, inner.value), (base + 1, Bytes::from_static(b"yes")));

    // A failed comparison reads, and makes no revision.
    let txn = Txn {
        compare: vec![Compare::mod_revision("/new", 1_000_000)],
        success: vec![put_op("/new", "2")],
        failure: vec![Op::Range(RangeRequest::key("/new"))],
    };
    let answer = store.txn(txn).await.expect("txn");
    assert_eq!((answer.succeeded, answer.revision), (false, base + 1));
    assert!(matches!(&answer.responses[..], [OpResponse::Range(range)] if range.kvs[0].value == "1"));

    let twice = |ops| txn_of(store, ops);
    let wipe = Op::Delete(DeleteRequest { key: "/".into(), range_end: prefix_end(b"/"), prev_kv: false });
    for ops in [vec![put_op("/x", "1"), put_op("/x", "2")], vec![wipe.clone(), put_op("/x", "1")], vec![put_op("/x", "1"), wipe]] {
        assert!(matches!(twice(ops).await, Err(Error::DuplicateKey { .. })));
    }
    let bad_lease = Op::Put(PutRequest { key: "/y".into(), lease: 77, ..PutRequest::default() });
    assert!(matches!(twice(vec![put_op("/x", "1"), bad_lease]).await, Err(Error::LeaseNotFound { id: 77 })));
    let many = (0..129).map(|n| put_op(&format!("/m/{n}"), "")).collect();
    assert!(matches!(twice(many).await, Err(Error::TooManyOps { .. })));
    let large = vec![Op::Put(PutRequest { key: "/x".into(), value: vec![0; 2 << 20].into(), ..PutRequest::default() })];
    assert!(matches!(twice(large).await, Err(Error::RequestTooLarge { .. })));
    assert!(get(store, "/x", 0).await.is_none(), "a refused transaction leaves nothing");
    assert_eq!(store.revision().await.expect("revision"), base + 1);
}

async fn watches(store: &dyn Store) {
    let base = put(store, "/w/a", "1").await;
    put(store, "/other", "x").await;
    put(store, "/w/a", "2").await;
    let request =
        WatchRequest { key: "/w/".into(), range_end: prefix_end(b"/w/"), start_revision: base, prev_kv: true, progress_notify: false };
    let mut past = store.watch(request.clone()).await.expect("watch");
    let mut present = store.watch(WatchRequest { start_revision: 0, ..request.clone() }).await.expect("watch");
    let mut future = store.watch(WatchRequest { start_revision: base + 4, ..request }).await.expect("watch");
    delete(store, "/w/a", "").await;
    txn_of(store, ["/w/c", "/w/b"].map(|key| Op::Put(PutRequest { key: key.into(), ..PutRequest::default() })).to_vec())
        .await
        .expect("txn");
    let seen = collect(&mut past, 5).await;
    let told: Vec<_> = seen
        .iter()
        .map(|event| {
            let before = event.prev_kv.as_ref().map(|kv| String::from_utf8_lossy(&kv.value).into_owned());
            (event.kind, std::str::from_utf8(&event.kv.key).expect("utf-8"), event.kv.mod_revision - base, before)
        })
        .collect();
    use EventKind::{Delete, Put};
    assert_eq!(
        told,
        [
            (Put, "/w/a", 0, None),
            (Put, "/w/a", 2, Some("1".to_owned())),
            (Delete, "/w/a", 3, Some("2".to_owned())),
            (Put, "/w/c", 4, None),
            (Put, "/w/b", 4, None),
        ]
    );
    assert!(seen[0].is_create() && !seen[1].is_create());
    assert_eq!(collect(&mut present, 3).await, seen[2..]);
    assert_eq!(collect(&mut future, 2).await, seen[3..]);
}

async fn compaction(store: &dyn Store) {
    let base = put(store, "/c/a", "1").await;
    put(store, "/c/a", "2").await;
    put(store, "/c/b", "1").await;
    delete(store, "/c/b", "").await;
    let last = put(store, "/c/a", "3").await;
    store.compact(base + 2).await.expect("compact");
    assert!(matches!(store.compact(base + 2).await, Err(Error::Compacted { .. })));
    assert!(matches!(store.compact(last + 1).await, Err(Error::FutureRevision { .. })));
    let old = RangeRequest { revision: base + 1, ..RangeRequest::key("/c/a") };
    // A real etcd does not tell the compacted revision here; then it is 0.
    assert!(matches!(store.range(old).await, Err(Error::Compacted { compact_revision, .. }) if [0, base + 2].contains(&compact_revision)));
    assert_eq!(get(store, "/c/a", base + 2).await.expect("there").value, "2");
    assert_eq!(get(store, "/c/b", base + 2).await.expect("there").value, "1");
    let request =
        |start_revision| WatchRequest { key: "/c/".into(), range_end: prefix_end(b"/c/"), start_revision, ..WatchRequest::default() };
    let mut gone = store.watch(request(base + 1)).await.expect("watch");
    let answer = gone.next().await.expect("a response").expect("watch");
    assert_eq!((answer.compact_revision, answer.events.len()), (base + 2, 0));
    assert!(gone.next().await.is_none());
    let mut there = store.watch(request(base + 2)).await.expect("watch");
    assert_eq!(collect(&mut there, 3).await.len(), 3);
    store.compact(last).await.expect("compact");
    assert_eq!(store.range(RangeRequest::prefix("/c/")).await.expect("range").count, 1);
}

/// A deletion at the compacted revision can still be watched from there; etcd before 3.4.36 and 3.5.19 had lost it.
async fn compacted_deletions(store: &dyn Store) {
    put(store, "/d/a", "1").await;
    let (_, deleted) = delete(store, "/d/a", "").await;
    put(store, "/d/b", "1").await;
    store.compact(deleted).await.expect("compact");
    let request = WatchRequest { key: "/d/".into(), range_end: prefix_end(b"/d/"), start_revision: deleted, ..WatchRequest::default() };
    let mut there = store.watch(request).await.expect("watch");
    assert_eq!(collect(&mut there, 2).await[0].kind, EventKind::Delete);
}

async fn progress(store: &dyn Store) {
    let request = WatchRequest { key: "/quiet".into(), progress_notify: true, ..WatchRequest::default() };
    let mut quiet = store.watch(request).await.expect("watch");
    let revision = put(store, "/loud", "1").await;
    // Who asks what the present is wants to see it reached.
    assert_eq!(store.revision().await.expect("revision"), revision);
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let answer = tokio::time::timeout_at(deadline, quiet.next()).await.expect("in time").expect("open").expect("watch");
        assert!(answer.events.is_empty());
        if answer.revision >= revision {
            break;
        }
    }
}

async fn leases(store: &dyn Store) {
    assert!(matches!(store.lease_grant(0, 0).await, Err(Error::LeaseTtl { .. })));
    let lease = store.lease_grant(0, 60).await.expect("grant").id;
    assert!(matches!(store.lease_grant(lease, 60).await, Err(Error::LeaseExists { .. })));
    let attach = |key: &str, lease| vec![Op::Put(PutRequest { key: Bytes::from(key.to_owned()), lease, ..PutRequest::default() })];
    for key in ["/l/b", "/l/a", "/l/c"] {
        txn_of(store, attach(key, lease)).await.expect("put");
    }
    // A put without the lease takes the key off it.
    txn_of(store, attach("/l/c", 0)).await.expect("put");
    let info = store.lease_time_to_live(lease).await.expect("info");
    assert_eq!(info.keys, ["/l/a", "/l/b"]);
    assert!(info.ttl_seconds <= 60 && info.granted_ttl_seconds == 60);
    assert_eq!(store.lease_keepalive(lease).await.expect("keepalive").ttl_seconds, 60);
    let before = store.revision().await.expect("revision");
    store.lease_revoke(lease).await.expect("revoke");
    assert_eq!(store.revision().await.expect("revision"), before + 1, "all keys go in one revision");
    assert_eq!(store.range(RangeRequest::prefix("/l/")).await.expect("range").count, 1);
    assert!(matches!(store.lease_revoke(lease).await, Err(Error::LeaseNotFound { .. })));
    assert!(matches!(store.lease_keepalive(lease).await, Err(Error::LeaseNotFound { .. })));
    // One that nobody keeps alive ends by itself, and its keys with it.
    let short = store.lease_grant(4711, 1).await.expect("grant").id;
    txn_of(store, attach("/l/short", short)).await.expect("put");
    let request = WatchRequest { key: "/l/short".into(), ..WatchRequest::default() };
    let mut watch = store.watch(request).await.expect("watch");
    assert_eq!(collect(&mut watch, 1).await[0].kind, EventKind::Delete);
    assert!(matches!(store.lease_time_to_live(short).await, Err(Error::LeaseNotFound { .. })));
}

check!(embedded: revisions_and_versions, ranges, comparisons, transactions, watches, compaction, compacted_deletions, progress, leases);
check_real!(etcd: revisions_and_versions, ranges, comparisons, transactions, watches, compaction, compacted_deletions, progress, leases);
check_real!(etcd_debian: revisions_and_versions, ranges, comparisons, transactions, watches, compaction, progress, leases);
