//! Requests over loopback TLS, by table: codes and the parts of the answers that matter. The codes and texts are those of
//! kube-apiserver 1.37.2 for the same requests.

#[path = "common/client.rs"]
mod client;
mod common;

use apimachinery::Gvk;
use apimachinery::codec::protobuf;
use client::Server;
use common::Pki;
use http::Request;
use serde_json::{Value, json};

fn pod(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"containers": [{"name": "c", "image": "x"}]}})
}

fn config_map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"a": "b"}})
}

/// A namespace `t` with its default service account.
async fn namespace(server: &Server) {
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "t"}});
    assert_eq!(server.call("POST", "/api/v1/namespaces", namespace).await.code, 201);
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    assert_eq!(server.call("POST", "/api/v1/namespaces/t/serviceaccounts", account).await.code, 201);
}

#[tokio::test]
async fn a_table_of_requests() {
    let server = Server::start().await;
    namespace(&server).await;
    let pods = "/api/v1/namespaces/t/pods";
    let maps = "/api/v1/namespaces/t/configmaps";
    let services = "/api/v1/namespaces/t/services";
    let mut unknown = pod("x");
    unknown["spec"]["bogus"] = json!(1);
    let mut versioned = pod("x");
    versioned["metadata"]["resourceVersion"] = json!("3");
    let mut other = pod("x");
    other["metadata"]["namespace"] = json!("other");
    let service = |name: &str, spec: Value| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec});
    let table = [
        ("POST", pods.to_owned(), pod("a"), 201, "/status/phase", json!("Pending")),
        ("POST", pods.to_owned(), pod("a"), 409, "/reason", json!("AlreadyExists")),
        ("POST", format!("{pods}?fieldValidation=Strict"), unknown, 400, "/reason", json!("BadRequest")),
        ("POST", format!("{pods}?dryRun=All"), pod("dry"), 201, "/metadata/name", json!("dry")),
        ("GET", format!("{pods}/dry"), Value::Null, 404, "/details/kind", json!("pods")),
        ("POST", pods.to_owned(), versioned, 500, "/message", json!("resourceVersion should not be set on objects to be created")),
        ("POST", pods.to_owned(), other, 400, "/reason", json!("BadRequest")),
        ("POST", "/api/v1/namespaces/none/pods".to_owned(), pod("a"), 404, "/message", json!("namespaces \"none\" not found")),
        ("POST", "/api/v1/pods".to_owned(), pod("a"), 405, "/reason", json!("MethodNotAllowed")),
        ("POST", pods.to_owned(), json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}), 422, "/reason", json!("Invalid")),
        ("GET", "/api/v1/namespaces/t/foos".to_owned(), Value::Null, 404, "/reason", json!("NotFound")),
        ("GET", format!("{pods}?labelSelector=a%20b"), Value::Null, 400, "/reason", json!("BadRequest")),
        ("GET", format!("{pods}?fieldSelector=foo=b"), Value::Null, 400, "/message", json!("field label not supported: foo")),
        ("GET", format!("{pods}?resourceVersionMatch=Exact"), Value::Null, 422, "/reason", json!("Invalid")),
        ("DELETE", format!("{pods}/a"), json!({"preconditions": {"uid": "zz"}}), 409, "/reason", json!("Conflict")),
        ("DELETE", format!("{pods}/a"), Value::Null, 200, "/kind", json!("Pod")),
        ("POST", maps.to_owned(), config_map("cm"), 201, "/data/a", json!("b")),
        ("PUT", format!("{maps}/cm"), config_map("other"), 400, "/reason", json!("BadRequest")),
        ("PUT", format!("{maps}/none"), config_map("none"), 404, "/reason", json!("NotFound")),
        ("DELETE", format!("{maps}/cm"), Value::Null, 200, "/status", json!("Success")),
        ("POST", services.to_owned(), service("s", json!({"ports": [{"port": 80}]})), 201, "/spec/ipFamilies/0", json!("IPv4")),
        (
            "POST",
            services.to_owned(),
            service("u", json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]})),
            422,
            "/reason",
            json!("Invalid"),
        ),
        ("DELETE", "/api/v1/namespaces/default".to_owned(), Value::Null, 403, "/reason", json!("Forbidden")),
        ("PATCH", format!("{services}/s"), json!({}), 415, "/reason", json!("UnsupportedMediaType")),
    ];
    for (method, path, body, code, pointer, want) in table {
        let answer = server.call(method, &path, body).await;
        assert_eq!(answer.code, code, "{method} {path}: {}", String::from_utf8_lossy(&answer.body));
        assert_eq!(answer.json().pointer(pointer), Some(&want), "{method} {path}: {}", answer.json());
    }
    server.stop().await;
}

#[tokio::test]
async fn who_may_do_what() {
    let server = Server::start().await;
    namespace(&server).await;
    server.pki.issue("node", "system:node:n1", &["system:nodes"], &[]);
    server.pki.issue("nobody", "nobody", &[], &[]);
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {}});
    assert_eq!(server.call("POST", "/api/v1/namespaces/t/secrets", secret).await.code, 201);
    for name in ["n1", "n2"] {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        let made = server.call("POST", "/api/v1/nodes", node).await;
        assert_eq!(made.json()["spec"]["taints"][0]["key"], "node.kubernetes.io/not-ready", "{}", made.json());
    }
    for (user, path, code) in [
        (None, "/livez", 200),
        (None, "/readyz", 200),
        (None, "/healthz", 200),
        (None, "/version", 200),
        (None, "/api", 401),
        (None, "/openapi/v3", 401),
        (None, "/api/v1/namespaces/t/secrets", 401),
        (None, "/metrics", 401),
        (Some("nobody"), "/api", 200),
        (Some("nobody"), "/api/v1/pods", 403),
        (Some("node"), "/api/v1/namespaces/t/secrets/s", 403),
        (Some("node"), "/api/v1/namespaces/t/secrets", 403),
        (Some("node"), "/api/v1/nodes/n1", 200),
        (Some("node"), "/api/v1/nodes?fieldSelector=metadata.name%3Dn1", 200),
        (Some("node"), "/api/v1/pods?fieldSelector=spec.nodeName%3Dn1", 200),
        (Some("node"), "/api/v1/pods?fieldSelector=spec.nodeName%3Dn2", 403),
        (Some("admin"), "/api/v1/namespaces/t/secrets/s", 200),
    ] {
        assert_eq!(server.send(user, Request::get(path), "").await.code, code, "{user:?} {path}");
    }
    // A pod on the node that uses the secret opens it to the node.
    let mut user = pod("uses");
    user["spec"]["nodeName"] = json!("n1");
    user["spec"]["volumes"] = json!([{"name": "v", "secret": {"secretName": "s"}}]);
    assert_eq!(server.call("POST", "/api/v1/namespaces/t/pods", user).await.code, 201);
    assert_eq!(server.send(Some("node"), Request::get("/api/v1/namespaces/t/secrets/s"), "").await.code, 200);
    let patch = |path: &str| Request::patch(path.to_owned()).header("content-type", "application/merge-patch+json");
    let label = r#"{"metadata":{"labels":{"node-restriction.kubernetes.io/x":"y"}}}"#;
    assert_eq!(server.send(Some("node"), patch("/api/v1/nodes/n1"), label).await.code, 403);
    assert_eq!(server.send(Some("node"), patch("/api/v1/nodes/n2/status"), r#"{"status":{}}"#).await.code, 403);
    assert_eq!(server.send(Some("node"), patch("/api/v1/nodes/n1/status"), r#"{"status":{"phase":"Running"}}"#).await.code, 200);
    // A bad token is refused even where nobody would have been let in.
    let bad = Request::get("/version").header("authorization", "Bearer x");
    assert_eq!(server.send(None, bad, "").await.code, 401);
    let impersonated = Request::get("/api/v1/pods").header("impersonate-user", "nobody");
    assert_eq!(server.send(Some("admin"), impersonated, "").await.code, 403);
    let forged = Request::get("/api/v1/pods").header("impersonate-user", "x").header("impersonate-group", "system:masters");
    assert_eq!(server.send(Some("nobody"), forged, "").await.code, 403);
    server.stop().await;
}

#[tokio::test]
async fn tokens_open_what_their_account_may() {
    let server = Server::start().await;
    namespace(&server).await;
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
    let issued = server.call("POST", "/api/v1/namespaces/t/serviceaccounts/default/token", request).await;
    assert_eq!(issued.code, 201);
    let token = issued.json()["status"]["token"].as_str().expect("a token").to_owned();
    let get = |path: &str| Request::get(path.to_owned()).header("authorization", format!("Bearer {token}"));
    assert_eq!(server.send(None, get("/api"), "").await.code, 200);
    assert_eq!(server.send(None, get("/api/v1/namespaces/t/pods"), "").await.code, 403);
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "v"},
        "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": "t"}],
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}});
    let path = "/apis/rbac.authorization.k8s.io/v1/namespaces/t/rolebindings";
    assert_eq!(server.call("POST", path, binding.clone()).await.code, 201);
    assert_eq!(server.send(None, get("/api/v1/namespaces/t/pods"), "").await.code, 200);
    assert_eq!(server.send(None, get("/api/v1/pods"), "").await.code, 403);
    // It may not give itself more than it holds.
    let wide = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "w"},
        "rules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]});
    let roles = "/apis/rbac.authorization.k8s.io/v1/clusterroles";
    let post = Request::post(roles).header("authorization", format!("Bearer {token}")).header("content-type", "application/json");
    assert_eq!(server.send(None, post, wide.to_string()).await.code, 403);
    assert_eq!(server.call("DELETE", "/api/v1/namespaces/t/serviceaccounts/default", Value::Null).await.code, 200);
    assert_eq!(server.send(None, get("/api"), "").await.code, 401);
    server.stop().await;
}

#[tokio::test]
async fn protobuf_in_and_out() {
    let server = Server::start().await;
    namespace(&server).await;
    let gvk = Gvk::new("v1", "ConfigMap");
    let body = protobuf::encode(&gvk, &config_map("p")).expect("encodable");
    let media = "application/vnd.kubernetes.protobuf";
    let post = Request::post("/api/v1/namespaces/t/configmaps").header("content-type", media).header("accept", media);
    let answer = server.send(Some("admin"), post, body).await;
    assert_eq!((answer.code, answer.content_type.as_str()), (201, media));
    let (found, object) = protobuf::decode(&answer.body).expect("protobuf");
    assert_eq!((found, &object["data"]["a"]), (gvk, &json!("b")));
    let list = server.send(Some("admin"), Request::get("/api/v1/namespaces/t/configmaps").header("accept", media), "").await;
    let (found, object) = protobuf::decode(&list.body).expect("protobuf");
    assert_eq!((found.kind.as_str(), object["items"].as_array().map(Vec::len)), ("ConfigMapList", Some(1)));
    let watch = "/api/v1/namespaces/t/configmaps?watch=true&timeoutSeconds=1&resourceVersion=0";
    let frames = server.send(Some("admin"), Request::get(watch).header("accept", media), "").await;
    assert_eq!(frames.content_type, "application/vnd.kubernetes.protobuf;stream=watch");
    let length = u32::from_be_bytes(frames.body[..4].try_into().expect("4 bytes")) as usize;
    let (kind, object) = protobuf::decode_watch_event(&frames.body[4..4 + length]).expect("a frame");
    assert_eq!((kind.as_str(), &object["metadata"]["name"]), ("ADDED", &json!("p")));
    let yaml = server.send(Some("admin"), Request::get("/api/v1/namespaces/t/configmaps/p").header("accept", "application/yaml"), "").await;
    assert!(String::from_utf8_lossy(&yaml.body).contains("kind: ConfigMap"));
    let missing = server.send(Some("admin"), Request::get("/api/v1/namespaces/t/configmaps/q").header("accept", media), "").await;
    assert_eq!(protobuf::decode(&missing.body).expect("a Status").1["reason"], "NotFound");
    server.stop().await;
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_restart() {
    let server = Server::start().await;
    namespace(&server).await;
    let spec = json!({"ports": [{"port": 80}]});
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": spec});
    let made = server.call("POST", "/api/v1/namespaces/t/services", service.clone()).await.json();
    let (dir, old) = server.stop().await;
    let port = old.port;
    let server = Server::with(dir, old, |config| config).await;
    assert_eq!(server.pki.port, port);
    let found = server.call("GET", "/api/v1/namespaces/t/services/s", Value::Null).await.json();
    assert_eq!(found, made);
    let mut again = service;
    again["metadata"]["name"] = json!("s2");
    again["spec"]["clusterIP"] = made["spec"]["clusterIP"].clone();
    assert_eq!(server.call("POST", "/api/v1/namespaces/t/services", again).await.code, 422, "the address is still taken");
    server.stop().await;
}

#[tokio::test]
async fn a_bad_configuration_fails_before_anything_is_bound() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let pki = Pki::new(dir.path());
    let mut config = pki.config();
    config.client_ca_file = dir.path().join("missing");
    let error = apiserver::run(config, tokio_util::sync::CancellationToken::new()).await.expect_err("no authority");
    assert!(error.to_string().contains("missing"), "{error}");
    assert!(!dir.path().join("store").exists());
}
