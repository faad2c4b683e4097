//! What only a store beyond a wire can suffer: members that die, come again, or are not to be trusted.

mod common;

use std::time::{Duration, Instant};

use common::real::{self, Member};
use common::{collect, put, txn_of};
use futures::StreamExt;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use store::{Error, Etcd, EtcdConfig, Op, PutRequest, RangeRequest, Store, WatchRequest, WatchStream};

const EVENTUALLY: Duration = Duration::from_secs(90);

/// Puts until it is acknowledged.
async fn put_at_last(store: &dyn Store, key: &str) -> i64 {
    let deadline = Instant::now() + EVENTUALLY;
    loop {
        let op = Op::Put(PutRequest { key: key.to_owned().into(), ..PutRequest::default() });
        match txn_of(store, vec![op]).await {
            Ok(answer) => return answer.revision,
            Err(error) if Instant::now() < deadline => {
                assert!(matches!(error, Error::Etcd { .. }), "{error}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(error) => panic!("no put: {error:?}"),
        }
    }
}

fn everything() -> WatchRequest {
    let range = RangeRequest::prefix("/k/");
    WatchRequest { key: range.key, range_end: range.range_end, ..WatchRequest::default() }
}

/// A member and a watch of it that has told of one put.
async fn watched() -> Option<(Member, Etcd, WatchStream)> {
    let member = Member::start(&real::peer("etcd")?);
    let store = member.client().await;
    let mut watch = store.watch(everything()).await.expect("watch");
    put(&store, "/k/1", "").await;
    assert_eq!(collect(&mut watch, 1).await.len(), 1);
    Some((member, store, watch))
}

#[tokio::test]
async fn a_watch_goes_on_when_etcd_comes_again() {
    let Some((mut member, store, mut watch)) = watched().await else { return };
    member.kill();
    assert!(matches!(store.range(RangeRequest::key("/k/1")).await, Err(Error::Etcd { .. })), "what is gone is an error, not a wait");
    member.restart();
    // Written before the watch is looked at again.
    put_at_last(&store, "/k/2").await;
    put_at_last(&store, "/k/3").await;
    let events = collect(&mut watch, 2).await;
    let keys: Vec<_> = events.iter().map(|event| &event.kv.key[..]).collect();
    assert_eq!(keys, [b"/k/2", b"/k/3"]);
}

#[tokio::test]
async fn a_watch_that_missed_what_is_compacted_is_told_so() {
    let Some((mut member, store, mut watch)) = watched().await else { return };
    member.kill();
    member.restart();
    put_at_last(&store, "/k/1").await;
    let last = put_at_last(&store, "/k/1").await;
    store.compact(last).await.expect("compact");
    let answer = watch.next().await.expect("a response").expect("watch");
    assert_eq!((answer.compact_revision, answer.events.len()), (last, 0));
    assert!(watch.next().await.is_none());
}

#[tokio::test]
async fn one_member_of_three_dies() {
    let Some(program) = real::peer("etcd") else { return };
    let mut members = Member::start_three(&program);
    let store = real::client(members.iter().map(Member::url).collect()).await;
    let mut watch = store.watch(everything()).await.expect("watch");
    let mut written = Vec::new();
    for number in 0..30 {
        // The first is the one that the client speaks to.
        if number == 10 {
            members[0].kill();
        }
        if number == 20 {
            members[0].restart();
            members[1].kill();
        }
        let key = format!("/k/{number:02}");
        written.push((put_at_last(&store, &key).await, key));
    }
    let mut seen = std::collections::BTreeMap::new();
    let mut last = 0;
    while seen.len() < written.len() {
        for event in collect(&mut watch, 1).await {
            assert!(event.kv.mod_revision > last, "each change once, in order");
            last = event.kv.mod_revision;
            // A put whose acknowledgement was lost with its member came twice.
            seen.insert(String::from_utf8_lossy(&event.kv.key).into_owned(), event.kv.mod_revision);
        }
    }
    for (revision, key) in written {
        assert!(seen.get(&key).is_some_and(|seen| *seen <= revision), "{key} was acknowledged and is not seen");
        let there = store.range(RangeRequest::key(key.clone())).await.expect("range");
        assert_eq!(there.count, 1, "{key}");
    }
}

#[tokio::test]
async fn tls_on_both_sides() {
    let Some(program) = real::peer("etcd") else { return };
    let folder = tempfile::tempdir().expect("tempdir");
    let ca_key = KeyPair::generate().expect("key");
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).expect("certificate").pem();
    let issuer = Issuer::new(ca, ca_key);
    let signed = |usage: Vec<ExtendedKeyUsagePurpose>| {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::default();
        params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
        params.extended_key_usages = usage;
        (params.signed_by(&key, &issuer).expect("certificate").pem(), key.serialize_pem())
    };
    let (certificate, key) = signed(vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]);
    for (name, text) in [("ca", &ca_pem), ("crt", &certificate), ("key", &key)] {
        std::fs::write(folder.path().join(name), text).expect("write");
    }
    let path = |name: &str| folder.path().join(name).display().to_string();
    let security = format!(
        "client-transport-security:\n  cert-file: {}\n  key-file: {}\n  trusted-ca-file: {}\n  client-cert-auth: true\n",
        path("crt"),
        path("key"),
        path("ca")
    );
    let member = Member::start_with(&program, "https", &security);
    let config =
        |identity| EtcdConfig { endpoints: vec![format!("https://127.0.0.1:{}", member.port)], ca: Some(ca_pem.clone()), identity };
    let store = Etcd::connect(&config(Some(signed(vec![ExtendedKeyUsagePurpose::ClientAuth])))).await.expect("connect");
    assert!(put(&store, "/a", "1").await > 1);
    let stranger = Etcd::connect(&config(None)).await;
    assert!(matches!(stranger, Err(Error::Etcd { .. })), "without a certificate nobody is let in");
}
