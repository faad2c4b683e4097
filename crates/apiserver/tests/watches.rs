//! Lists by page and watches over loopback TLS.

#[path = "common/client.rs"]
mod client;
mod common;

use bytes::Bytes;
use client::{DEADLINE, Server};
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

async fn put(server: &Server, name: &str, label: &str) -> Value {
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {"l": label}}});
    let answer = server.call("POST", MAPS, map).await;
    assert_eq!(answer.code, 201, "{}", answer.json());
    answer.json()
}

async fn relabel(server: &Server, name: &str, label: &str) {
    let patch = Request::patch(format!("{MAPS}/{name}")).header("content-type", "application/merge-patch+json");
    let body = json!({"metadata": {"labels": {"l": label}}}).to_string();
    assert_eq!(server.send(Some("admin"), patch, body).await.code, 200);
}

/// A watch, read event by event.
struct Events {
    body: Incoming,
    text: String,
}

impl Events {
    async fn open(server: &Server, query: &str) -> Self {
        let request = Request::get(format!("{MAPS}?watch=true&{query}")).header("host", "localhost").body(Full::new(Bytes::new()));
        let response = server.open(Some("admin"), request.expect("request")).await.expect("an answer");
        assert_eq!(response.status(), 200);
        Self { body: response.into_body(), text: String::new() }
    }

    /// Type and name (or the revision, of a bookmark) of the next event; `None` at the end.
    async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            if let Some((line, rest)) = self.text.split_once('\n') {
                let event: Value = serde_json::from_str(line).expect("an event a line");
                self.text = rest.to_owned();
                return Some((event["type"].as_str().unwrap_or("").to_owned(), event["object"].clone()));
            }
            let frame = tokio::time::timeout(DEADLINE, self.body.frame()).await.expect("an event in time")?.expect("a whole stream");
            if let Some(data) = frame.data_ref() {
                self.text.push_str(&String::from_utf8_lossy(data));
            }
        }
    }

    async fn expect(&mut self, kind: &str, name: &str) -> Value {
        let (found, object) = self.next().await.expect("one more event");
        assert_eq!((found.as_str(), object["metadata"]["name"].as_str().unwrap_or("")), (kind, name), "{object}");
        object
    }
}

#[tokio::test]
async fn pages_show_one_revision() {
    let server = Server::start().await;
    for index in 0..7 {
        put(&server, &format!("m{index}"), if index % 2 == 0 { "even" } else { "odd" }).await;
    }
    let first = server.call("GET", &format!("{MAPS}?limit=3"), Value::Null).await.json();
    assert_eq!(first["metadata"]["remainingItemCount"], 4);
    put(&server, "m00", "late").await;
    assert_eq!(server.call("DELETE", &format!("{MAPS}/m5"), Value::Null).await.code, 200);
    let mut names: Vec<String> = Vec::new();
    let mut page = first.clone();
    loop {
        assert_eq!(page["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
        names
            .extend(page["items"].as_array().expect("items").iter().map(|item| item["metadata"]["name"].as_str().unwrap_or("").to_owned()));
        let Some(next) = page["metadata"]["continue"].as_str() else { break };
        page = server.call("GET", &format!("{MAPS}?limit=3&continue={next}"), Value::Null).await.json();
    }
    assert_eq!(names, ["m0", "m1", "m2", "m3", "m4", "m5", "m6"]);
    let odd = server.call("GET", &format!("{MAPS}?limit=1&labelSelector=l%3Dodd"), Value::Null).await.json();
    assert!(odd["metadata"].get("remainingItemCount").is_none() && odd["items"][0]["metadata"]["name"] == "m1");
    assert!(odd["items"][0].get("kind").is_none(), "items of a list do not repeat their kind");
    let exact =
        format!("{MAPS}?resourceVersionMatch=Exact&resourceVersion={}", first["metadata"]["resourceVersion"].as_str().unwrap_or(""));
    let exact = server.call("GET", &exact, Value::Null).await.json();
    assert_eq!(exact["items"].as_array().map(Vec::len), Some(7));
    server.stop().await;
}

#[tokio::test]
async fn initial_events_then_changes_then_a_resumed_watch() {
    let server = Server::start().await;
    put(&server, "a", "x").await;
    let query = "sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let mut events = Events::open(&server, query).await;
    events.expect("ADDED", "a").await;
    let bookmark = events.expect("BOOKMARK", "").await;
    assert_eq!(bookmark["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    let from = bookmark["metadata"]["resourceVersion"].as_str().expect("a revision").to_owned();
    put(&server, "b", "x").await;
    let added = events.expect("ADDED", "b").await;
    relabel(&server, "b", "y").await;
    let modified = events.expect("MODIFIED", "b").await;
    let number =
        |object: &Value| object["metadata"]["resourceVersion"].as_str().and_then(|text| text.parse::<u64>().ok()).expect("a number");
    assert!(number(&modified) > number(&added));
    assert_eq!(server.call("DELETE", &format!("{MAPS}/b"), Value::Null).await.code, 200);
    let deleted = events.expect("DELETED", "b").await;
    assert!(number(&deleted) > number(&modified), "a deletion has the revision of the deletion");
    let mut resumed = Events::open(&server, &format!("resourceVersion={from}&timeoutSeconds=1")).await;
    for kind in ["ADDED", "MODIFIED", "DELETED"] {
        resumed.expect(kind, "b").await;
    }
    assert!(resumed.next().await.is_none(), "it ends after timeoutSeconds");
    server.stop().await;
}

#[tokio::test]
async fn selectors_turn_changes_into_additions_and_deletions() {
    let server = Server::start().await;
    put(&server, "a", "x").await;
    let mut events = Events::open(&server, "labelSelector=l%3Dx").await;
    events.expect("ADDED", "a").await;
    put(&server, "b", "y").await;
    relabel(&server, "a", "y").await;
    events.expect("DELETED", "a").await;
    relabel(&server, "b", "x").await;
    events.expect("ADDED", "b").await;
    let mut one = Events::open(&server, "fieldSelector=metadata.name%3Db").await;
    one.expect("ADDED", "b").await;
    server.stop().await;
}

#[tokio::test]
async fn a_revision_that_is_gone_is_410_and_a_server_that_ends_ends_its_watches() {
    let server = Server::start().await;
    for index in 0..3 {
        put(&server, &format!("m{index}"), "x").await;
    }
    let (dir, pki) = server.stop().await;
    let server = Server::with(dir, pki, |config| config).await;
    let mut old = Events::open(&server, "resourceVersion=2").await;
    let (kind, status) = old.next().await.expect("an error");
    assert_eq!((kind.as_str(), &status["code"], &status["reason"]), ("ERROR", &json!(410), &json!("Expired")));
    assert!(old.next().await.is_none());
    let mut live = Events::open(&server, "resourceVersion=0").await;
    while live.next().await.is_some_and(|(_, object)| object["metadata"]["name"] != "m2") {}
    let ended = tokio::spawn(async move { live.next().await.is_none() });
    server.stop().await;
    assert!(ended.await.expect("no panic"));
}
