//! The records of cluster IPs and node ports: each belongs to a Service, and what somebody else has left wrong is put right at the
//! start.

#[path = "common/client.rs"]
mod client;
mod common;

use std::collections::BTreeMap;
use std::path::Path;

use client::Server;
use serde_json::{Value, json};
use store::{DeleteRequest, Embedded, Op, Options, PutRequest, RangeRequest, Store, Txn};

const SERVICES: &str = "/api/v1/namespaces/default/services";
const ADDRESSES: &str = "/registry/ipaddresses/";
const PORTS: &str = "/registry/coracle.io/nodeports/";

fn service(name: &str, spec: &Value) -> Value {
    json!({"metadata": {"name": name}, "spec": spec})
}

/// The owners of all records, by key; then what `change` makes.
async fn records(dir: &Path, change: impl FnOnce(&BTreeMap<String, String>) -> Vec<Op>) -> BTreeMap<String, String> {
    let store = Embedded::open(dir.join("store"), Options::default()).expect("the server has closed it");
    let mut all = BTreeMap::new();
    for prefix in [ADDRESSES, PORTS] {
        for kv in store.range(RangeRequest::prefix(prefix)).await.expect("range").kvs {
            let record: Value = serde_json::from_slice(&kv.value).expect("JSON");
            let owner = record["spec"]["parentRef"]["name"].as_str().expect("an owner").to_owned();
            all.insert(String::from_utf8(kv.key.to_vec()).expect("UTF-8"), owner);
        }
    }
    let success = change(&all);
    if !success.is_empty() {
        store.txn(Txn { success, ..Txn::default() }).await.expect("txn");
    }
    store.close().await;
    all
}

#[tokio::test]
async fn records_come_and_go_with_their_services_and_are_repaired() {
    let server = Server::start().await;
    for (name, spec) in [
        ("a", json!({"ports": [{"port": 80}]})),
        ("b", json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30007}]})),
        ("c", json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30008}]})),
        ("d", json!({"clusterIP": "None", "ports": [{"port": 80}]})),
    ] {
        let answer = server.call("POST", SERVICES, service(name, &spec)).await;
        assert_eq!(answer.code, 201, "{}", answer.json());
    }
    let dry = service("dry", &json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 30007}]}));
    assert_eq!(server.call("POST", &format!("{SERVICES}?dryRun=All"), dry).await.code, 422);
    let address = server.call("GET", &format!("{SERVICES}/a"), Value::Null).await.json()["spec"]["clusterIP"].clone();
    // A port is let go with the type that had it, and all with the Service.
    let patch = http::Request::patch(format!("{SERVICES}/b")).header("content-type", "application/merge-patch+json");
    let changed = server.send(Some("admin"), patch, json!({"spec": {"type": "ClusterIP"}}).to_string()).await;
    assert_eq!(changed.code, 200, "{}", changed.json());
    assert_eq!(server.call("DELETE", &format!("{SERVICES}/c"), Value::Null).await.code, 200);
    let (dir, pki) = server.stop().await;

    let key = format!("{ADDRESSES}{}", address.as_str().expect("an address"));
    let stale = |made: String| {
        json!({"kind": "IPAddress", "apiVersion": "networking.k8s.io/v1", "metadata": {"name": "x", "creationTimestamp": made},
            "spec": {"parentRef": {"resource": "services", "namespace": "default", "name": "gone"}}})
    };
    let put = |key: &str, made: String| {
        Op::Put(PutRequest { key: format!("{ADDRESSES}{key}").into(), value: stale(made).to_string().into(), ..PutRequest::default() })
    };
    let found = records(dir.path(), |_| {
        let now = apimachinery::time::format_seconds(jiff::Timestamp::now());
        vec![
            Op::Delete(DeleteRequest { key: key.clone().into(), ..DeleteRequest::default() }),
            put("10.96.9.9", "2020-01-01T00:00:00Z".to_owned()),
            put("10.96.9.10", now),
        ]
    });
    let owners: Vec<String> = found.await.into_values().collect();
    assert_eq!(owners.iter().filter(|owner| *owner == "b").count(), 1, "its address: {owners:?}");
    assert_eq!(owners.len(), 3, "those of kubernetes, a and b: {owners:?}");

    let server = Server::with(dir, pki, |config| config).await;
    for (wanted, code) in [(address, 422), (json!("10.96.9.9"), 201), (json!("10.96.9.10"), 422)] {
        let answer = server.call("POST", SERVICES, service("e", &json!({"clusterIP": wanted, "ports": [{"port": 80}]}))).await;
        assert_eq!(answer.code, code, "{wanted}: {}", answer.json());
    }
    let (dir, _) = server.stop().await;
    let owners = records(dir.path(), |_| Vec::new()).await;
    assert_eq!((owners.get(&key).map(String::as_str), owners.len()), (Some("a"), 5), "{owners:?}");
}
