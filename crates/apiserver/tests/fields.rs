//! Fields that the server itself carries out: what it stores as given comes back whole, in JSON and in protobuf, and metadata is kept
//! or set. The rows of `apimachinery/data/fields.toml` name these tests, and the first test goes through those rows.

#[path = "common/client.rs"]
mod client;
mod common;

use std::collections::BTreeSet;

use apimachinery::codec::protobuf;
use apimachinery::schema::{Container, Field, Item, Shape, Type, TypeId, schema};
use apimachinery::support::{Row, table};
use client::Server;
use http::Request;
use serde_json::{Map, Value, json};

/// Values that the server's validation asks for, by type and field.
fn special(found: &Type, field: &Field) -> Option<Value> {
    Some(match (found.name, field.name) {
        ("core.v1.PodStatus", "phase") => json!("Running"),
        ("core.v1.PodStatus", "podIP") | ("core.v1.PodIP" | "core.v1.HostIP", "ip") | ("core.v1.PodStatus", "hostIP") => json!("192.0.2.1"),
        ("core.v1.PodStatus", "nominatedNodeName") => json!("node"),
        ("core.v1.PodResourceClaimStatus" | "core.v1.PodExtendedResourceClaimStatus", "resourceClaimName") => json!("claim"),
        ("core.v1.NodeSpec", "podCIDR") => json!("10.1.0.0/24"),
        ("core.v1.NodeSpec", "podCIDRs") => json!(["10.1.0.0/24"]),
        ("core.v1.NodeSpec", "providerID") => json!("provider://1"),
        _ => return None,
    })
}

/// A value of the field with every field below it set; what is set is added to `seen`.
fn sample(found: &Type, field: &Field, above: &mut Vec<&'static str>, seen: &mut BTreeSet<String>) -> Value {
    seen.insert(format!("{}.{}", found.name, field.name));
    if let Some(value) = special(found, field) {
        if let Item::Type(id) = field.item {
            object(id, above, seen);
        }
        return value;
    }
    let one = match field.item {
        Item::String => json!(field.enum_values.split(',').next().filter(|word| !word.is_empty()).unwrap_or("word")),
        Item::Bool => json!(true),
        Item::Int32 | Item::Int64 | Item::Double => json!(7),
        Item::Bytes => json!("eA=="),
        Item::Strings => json!(["word"]),
        Item::Type(id) => object(id, above, seen),
    };
    match field.container {
        Container::Single => one,
        Container::List => json!([one]),
        Container::Map => json!({"key": one}),
    }
}

fn object(id: TypeId, above: &mut Vec<&'static str>, seen: &mut BTreeSet<String>) -> Value {
    let found = schema().get(id);
    match found.shape {
        Shape::Quantity => return json!("7"),
        Shape::Time => return json!("2026-01-01T00:00:00Z"),
        Shape::MicroTime => return json!("2026-01-01T00:00:00.000000Z"),
        Shape::IntOrString => return json!(7),
        Shape::Object => {}
        _ => return json!({}),
    }
    above.push(found.name);
    let fields: Map<String, Value> = found.fields.iter().map(|field| (field.name.to_owned(), sample(found, field, above, seen))).collect();
    above.pop();
    Value::Object(fields)
}

/// Every value in `given` that is not in `got`, by its path.
fn missing(given: &Value, got: &Value, path: &str, wrong: &mut Vec<String>) {
    match given {
        Value::Object(map) => map.iter().for_each(|(key, value)| missing(value, &got[key], &format!("{path}.{key}"), wrong)),
        Value::Array(list) => list.iter().enumerate().for_each(|(at, value)| missing(value, &got[at], &format!("{path}[{at}]"), wrong)),
        value if value == got => {}
        value => wrong.push(format!("{path}: {value} came back as {got}")),
    }
}

fn part(group: &str, kind: &str, name: &str, seen: &mut BTreeSet<String>) -> Value {
    let found = schema().get(schema().by_kind(group, "v1", kind).expect("a kind"));
    let field = found.field(name).expect("a field");
    let Item::Type(id) = field.item else { panic!("{kind}.{name} is an object") };
    object(id, &mut Vec::new(), seen)
}

async fn namespace(server: &Server) {
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "t"}});
    assert_eq!(server.call("POST", "/api/v1/namespaces", namespace).await.code, 201);
    let account = |name: &str| json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}});
    for name in ["default", "robot"] {
        assert_eq!(server.call("POST", "/api/v1/namespaces/t/serviceaccounts", account(name)).await.code, 201);
    }
}

fn pod(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"containers": [{"name": "word", "image": "x"}],
        "resourceClaims": []}})
}

/// Makes the object, puts the status, and looks at what comes back of it.
async fn stored(server: &Server, path: &str, made: Value, status: &Value, wrong: &mut Vec<String>) {
    let name = made["metadata"]["name"].as_str().expect("a name").to_owned();
    let answer = server.call("POST", path, made).await;
    assert_eq!(answer.code, 201, "{path}: {}", String::from_utf8_lossy(&answer.body));
    let path = format!("{path}/{name}");
    let mut body = server.call("GET", &path, Value::Null).await.json();
    body["status"] = status.clone();
    let answer = server.call("PUT", &format!("{path}/status"), body).await;
    assert_eq!(answer.code, 200, "{path}: {}", String::from_utf8_lossy(&answer.body));
    missing(status, &server.call("GET", &path, Value::Null).await.json()["status"], &format!("{path} status"), wrong);
    let request = Request::builder().uri(&path).header("accept", "application/vnd.kubernetes.protobuf");
    let answer = server.send(Some("admin"), request, "").await;
    let (_, decoded) = protobuf::decode(&answer.body).expect("protobuf");
    missing(status, &decoded["status"], &format!("{path} status in protobuf"), wrong);
}

#[tokio::test]
async fn what_is_stored_comes_back() {
    let server = Server::start().await;
    namespace(&server).await;
    let mut seen = BTreeSet::new();
    let mut wrong = Vec::new();
    let status = part("", "Pod", "status", &mut seen);
    stored(&server, "/api/v1/namespaces/t/pods", pod("p"), &status, &mut wrong).await;
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"},
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"], "providerID": "provider://1"}});
    let status = part("", "Node", "status", &mut seen);
    stored(&server, "/api/v1/nodes", node.clone(), &status, &mut wrong).await;
    let got = server.call("GET", "/api/v1/nodes/n", Value::Null).await.json();
    missing(&node["spec"], &got["spec"], "node spec", &mut wrong);
    seen.extend(["podCIDR", "podCIDRs", "providerID"].map(|name| format!("core.v1.NodeSpec.{name}")));
    let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": {"replicas": 7,
        "selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "x"}]}}}});
    let status = part("apps", "Deployment", "status", &mut seen);
    stored(&server, "/apis/apps/v1/namespaces/t/deployments", deployment, &status, &mut wrong).await;
    for (kind, rows) in table().expect("TOML") {
        for (field, row) in rows {
            let name = format!("{kind}.{field}");
            if matches!(row, Row::Done(text) if text.starts_with("done: stored as given")) && !seen.contains(&name) {
                wrong.push(format!("{name} is said to be stored, and was not tried"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    server.stop().await;
}

#[tokio::test]
async fn metadata_is_kept_or_set() {
    let server = Server::start().await;
    namespace(&server).await;
    let pods = "/api/v1/namespaces/t/pods";
    let mut object = pod("");
    object["metadata"] = json!({"generateName": "some-", "labels": {"l": "1"}, "annotations": {"a": "2"}, "finalizers": ["example.com/hold"],
        "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u", "controller": true, "blockOwnerDeletion": true}]});
    let answer = server.call("POST", pods, object.clone()).await;
    assert_eq!(answer.code, 201, "{}", String::from_utf8_lossy(&answer.body));
    let made = answer.json();
    let mut wrong = Vec::new();
    missing(&object["metadata"], &made["metadata"], "metadata", &mut wrong);
    assert!(wrong.is_empty(), "{wrong:?}");
    let text = |value: &Value, name: &str| value["metadata"][name].as_str().unwrap_or_default().to_owned();
    let name = text(&made, "name");
    assert!(name.starts_with("some-") && name.len() == 10, "{name}");
    assert_eq!((text(&made, "namespace").as_str(), text(&made, "uid").len()), ("t", 36));
    assert!(text(&made, "creationTimestamp").ends_with('Z'));
    assert_eq!(made["metadata"]["generation"], 1);
    assert_eq!((made["apiVersion"].as_str(), made["kind"].as_str()), (Some("v1"), Some("Pod")));

    let path = format!("{pods}/{name}");
    let answer = server.call("DELETE", &path, json!({"gracePeriodSeconds": 0})).await;
    assert_eq!(answer.code, 200, "{}", String::from_utf8_lossy(&answer.body));
    let held = server.call("GET", &path, Value::Null).await.json();
    assert!(text(&held, "deletionTimestamp").ends_with('Z'), "a finalizer holds it: {held}");
    assert_eq!(held["metadata"]["deletionGracePeriodSeconds"], 0);
    assert_ne!(text(&held, "resourceVersion"), text(&made, "resourceVersion"));
    let mut freed = held.clone();
    freed["metadata"]["finalizers"] = json!([]);
    assert_eq!(server.call("PUT", &path, freed).await.code, 200);
    assert_eq!(server.call("GET", &path, Value::Null).await.code, 404);

    // One of the two names of the account stands for both.
    for field in ["serviceAccountName", "serviceAccount"] {
        let mut object = pod(&field.to_lowercase());
        object["spec"][field] = json!("robot");
        let made = server.call("POST", pods, object).await.json();
        assert_eq!(
            (made["spec"]["serviceAccountName"].as_str(), made["spec"]["serviceAccount"].as_str()),
            (Some("robot"), Some("robot")),
            "{made}"
        );
    }
    let mut bare = pod("bare");
    bare["spec"]["automountServiceAccountToken"] = json!(false);
    let made = server.call("POST", pods, bare).await.json();
    assert!(made["spec"]["volumes"].is_null(), "{made}");
    let made = server.call("POST", pods, pod("mounted")).await.json();
    assert!(made["spec"]["volumes"][0]["projected"]["sources"][0]["serviceAccountToken"].is_object(), "{made}");
    server.stop().await;
}
