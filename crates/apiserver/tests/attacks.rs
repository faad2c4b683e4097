//! Clients that mean harm, or are broken: what they send is refused with a clear answer, and everybody else is served meanwhile.

#[path = "common/client.rs"]
mod client;
mod common;

use std::sync::Arc;
use std::time::Duration;

use http::Request;
use rcgen::ExtendedKeyUsagePurpose;
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use client::{DEADLINE, Server, tls};
use common::Pki;

const CONFIG_MAPS: &str = "/api/v1/namespaces/default/configmaps";
/// The largest body, in bytes.
const BODY_BYTES_MAX: usize = 3 << 20;
/// Connections that never finish their request.
const SLOW_CLIENTS: usize = 200;

async fn changed(change: impl FnOnce(apiserver::Config) -> apiserver::Config) -> Server {
    let dir = tempfile::tempdir().expect("temporary directory");
    let pki = Pki::new(dir.path());
    Server::with(dir, pki, change).await
}

/// A connection on which bytes are sent as they are.
async fn raw(server: &Server, user: Option<&str>) -> TlsStream<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", server.pki.port)).await.expect("connected");
    let mut config = tls(&server.pki.dir, user);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = ServerName::try_from("localhost").expect("a name");
    tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.expect("TLS")
}

/// What the server says until `enough`, or until it closes.
async fn hear(stream: &mut TlsStream<TcpStream>, enough: impl Fn(&str) -> bool) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 8192];
    let read = async {
        while !enough(&String::from_utf8_lossy(&text)) {
            match stream.read(&mut buffer).await {
                Ok(count) if count > 0 => text.extend_from_slice(&buffer[..count]),
                _ => break,
            }
        }
    };
    tokio::time::timeout(DEADLINE, read).await.expect("an answer or an end in time");
    String::from_utf8_lossy(&text).into_owned()
}

async fn serves(server: &Server) {
    assert_eq!(server.call("GET", "/api/v1/namespaces/default", Value::Null).await.code, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_certificates_are_unauthorized() {
    let server = changed(|config| config).await;
    let (pki, now) = (&server.pki, time::OffsetDateTime::now_utc());
    let hours = |from: i64, to: i64| {
        move |params: &mut rcgen::CertificateParams| {
            (params.not_before, params.not_after) = (now + time::Duration::hours(from), now + time::Duration::hours(to));
        }
    };
    pki.issue_changed("good", "kubernetes-admin", true, |_| {});
    pki.issue_changed("expired", "kubernetes-admin", true, hours(-9, -1));
    pki.issue_changed("early", "kubernetes-admin", true, hours(1, 9));
    pki.issue_changed("foreign", "kubernetes-admin", false, |_| {});
    pki.issue_changed("server-only", "kubernetes-admin", true, |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]
    });
    pki.issue_changed("nameless", "", true, |_| {});
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    assert_eq!(server.call("POST", "/api/v1/namespaces/default/serviceaccounts", account).await.code, 201);
    let account = server.call("POST", "/api/v1/namespaces/default/serviceaccounts/default/token", json!({"spec": {}})).await;
    assert_eq!(account.code, 201, "{account:?}");
    let token = account.json()["status"]["token"].as_str().expect("a token").to_owned();
    assert_eq!(server.send(Some("good"), Request::get("/api/v1/nodes"), "").await.code, 200);
    for user in ["expired", "early", "foreign", "server-only", "nameless"] {
        // Upstream refuses at the open paths, too, whoever shows something wrong.
        for path in ["/api/v1/nodes", "/healthz", "/version"] {
            let answer = server.send(Some(user), Request::get(path), "").await;
            assert_eq!((answer.code, answer.json()["reason"].as_str()), (401, Some("Unauthorized")), "{user} {path}: {answer:?}");
        }
        let with_token = Request::get("/api").header("authorization", format!("Bearer {token}"));
        assert_eq!(server.send(Some(user), with_token, "").await.code, 200, "{user} with a good token");
    }
    let stale: Vec<String> = vec![
        token.clone() + "x",
        token.split('.').take(2).collect::<Vec<_>>().join(".") + ".",
        token.split('.').take(2).collect::<Vec<_>>().join("."),
        token.replacen('e', "f", 1),
        String::from("x"),
    ];
    for token in stale {
        let answer = server.send(None, Request::get("/api").header("authorization", format!("Bearer {token}")), "").await;
        assert_eq!(answer.code, 401, "{token}: {answer:?}");
    }
    assert_eq!(server.call("DELETE", "/api/v1/namespaces/default/serviceaccounts/default", Value::Null).await.code, 200);
    let answer = server.send(None, Request::get("/api").header("authorization", format!("Bearer {token}")), "").await;
    assert_eq!(answer.code, 401, "the token of an account that is gone");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_and_deep_bodies_are_refused() {
    let server = changed(|config| config).await;
    let map = |size: usize| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"a": "x".repeat(size)}});
    let answer = server.call("POST", CONFIG_MAPS, map(BODY_BYTES_MAX)).await;
    assert_eq!((answer.code, answer.json()["reason"].as_str()), (413, Some("RequestEntityTooLarge")), "{answer:?}");
    let message = answer.json()["message"].as_str().unwrap_or_default().to_owned();
    assert_eq!(message, "Request entity too large: limit is 3145728");
    // Within the limit of bodies, beyond that of the data of a config map.
    assert_eq!(server.call("POST", CONFIG_MAPS, map(BODY_BYTES_MAX / 2)).await.code, 422);
    // A length that is announced costs nothing.
    let mut stream = raw(&server, Some("admin")).await;
    let head =
        format!("POST {CONFIG_MAPS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999999999999\r\n\r\n{{");
    stream.write_all(head.as_bytes()).await.expect("sent");
    serves(&server).await;
    drop(stream);

    let deep = 500_000;
    let nested = |open: &str, close: &str| open.repeat(deep) + &close.repeat(deep);
    let bodies = [
        ("POST", "application/json", nested("[", "]")),
        ("POST", "application/json", format!("{{\"metadata\":{}", nested("{\"a\":", "}"))),
        ("POST", "application/yaml", nested("[", "]")),
        ("POST", "application/yaml", "- ".repeat(deep)),
        ("PATCH", "application/merge-patch+json", nested("{\"a\":", "}")),
        ("PATCH", "application/strategic-merge-patch+json", nested("{\"a\":", "}")),
        ("PATCH", "application/json-patch+json", format!("[{{\"op\":\"add\",\"path\":\"{}\",\"value\":1}}]", "/a".repeat(deep))),
        ("POST", "application/vnd.kubernetes.protobuf", format!("k8s\u{0}{}", "\u{12}\u{7f}".repeat(deep))),
    ];
    assert_eq!(server.call("POST", CONFIG_MAPS, map(10)).await.code, 201);
    for (method, media, body) in bodies {
        let path = if method == "PATCH" { format!("{CONFIG_MAPS}/m") } else { CONFIG_MAPS.to_owned() };
        let shown = format!("{method} {media} {:?}", body.chars().take(12).collect::<String>());
        let request = Request::builder().method(method).uri(path).header("content-type", media);
        let answer = server.send(Some("admin"), request, body).await;
        assert!([400, 413, 415, 422].contains(&answer.code), "{shown}: {answer:?}");
        assert_eq!(answer.json()["kind"], "Status", "{shown}");
        serves(&server).await;
    }
    for query in [format!("labelSelector={}", "a%20in%20(".repeat(3000)), format!("fieldSelector={}", "metadata.name%3D".repeat(2000))] {
        let answer = server.call("GET", &format!("{CONFIG_MAPS}?{query}"), Value::Null).await;
        assert_eq!(answer.code, 400, "{answer:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_clients_hold_up_nobody() {
    let server = changed(|config| apiserver::Config { request_timeout: Duration::from_secs(1), ..config }).await;
    // Half a head, for ever; half a handshake.
    let mut slow = Vec::new();
    for _ in 0..SLOW_CLIENTS {
        let mut stream = raw(&server, None).await;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ").await.expect("sent");
        slow.push(stream);
    }
    let mut silent = Vec::new();
    for _ in 0..SLOW_CLIENTS {
        silent.push(TcpStream::connect(("127.0.0.1", server.pki.port)).await.expect("connected"));
    }
    serves(&server).await;
    // Half a body: the request's own time ends it.
    let mut stream = raw(&server, Some("admin")).await;
    let head = format!("POST {CONFIG_MAPS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{");
    stream.write_all(head.as_bytes()).await.expect("sent");
    let heard = hear(&mut stream, |text| text.contains("\r\n\r\n")).await;
    assert!(heard.starts_with("HTTP/1.1 504"), "{heard}");
    serves(&server).await;
    // A head without an end.
    let mut stream = raw(&server, None).await;
    let mut sent = 0;
    while sent < 64 << 20 && stream.write_all(&[b"X-Long: ".as_slice(), &[b'a'; 65_000], b"\r\n"].concat()).await.is_ok() {
        if sent == 0 {
            stream.write_all(b"GET /healthz HTTP/1.1\r\n").await.ok();
        }
        sent += 65_000;
    }
    assert!(sent < 64 << 20, "a head of {sent} bytes is taken");
    serves(&server).await;
    drop((slow, silent));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_are_answered_with_429() {
    let server = changed(|config| apiserver::Config { max_requests_inflight: 2, max_watches: 5, ..config }).await;
    // The server's own start needs no place of these.
    let watch = || Request::get(format!("{CONFIG_MAPS}?watch=true")).header("host", "x").body(Default::default()).expect("a request");
    let mut watches = Vec::new();
    for _ in 0..5 {
        let response = server.open(Some("admin"), watch()).await.expect("answered");
        assert_eq!(response.status(), 200);
        watches.push(response);
    }
    let refused = server.open(Some("admin"), watch()).await.expect("answered");
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers().get("retry-after").and_then(|value| value.to_str().ok()), Some("1"));
    // Reads and writes go on, and a watch that ends makes room.
    serves(&server).await;
    drop(watches.pop());
    let again = async {
        while server.open(Some("admin"), watch()).await.expect("answered").status() != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, again).await.expect("a watch that ended makes room");

    let mut slow = Vec::new();
    for _ in 0..2 {
        let mut stream = raw(&server, Some("admin")).await;
        let head = format!("POST {CONFIG_MAPS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{");
        stream.write_all(head.as_bytes()).await.expect("sent");
        slow.push(stream);
    }
    let full = async {
        loop {
            let answer = server.call("GET", "/api/v1/namespaces/default", Value::Null).await;
            if answer.code == 429 {
                return answer.json()["reason"].clone();
            }
        }
    };
    assert_eq!(tokio::time::timeout(DEADLINE, full).await.expect("no place is left"), "TooManyRequests");
    // The health of the server is told all the same.
    assert_eq!(server.send(None, Request::get("/livez"), "").await.code, 200);
    drop(slow);
    let free = async { while server.call("GET", "/api/v1/namespaces/default", Value::Null).await.code != 200 {} };
    tokio::time::timeout(DEADLINE, free).await.expect("there is room again");
    server.stop().await;
}

/// Two readers of one connection must not see different requests in it: what is ambiguous is refused, or is one request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn smuggled_requests_are_not_taken() {
    let server = changed(|config| config).await;
    let inner = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n";
    let post = format!("POST {CONFIG_MAPS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n");
    let refused = [
        format!("{post}Content-Length: 5\r\nContent-Length: 6\r\n\r\n{inner}"),
        format!("{post}Content-Length: +5\r\n\r\n{inner}"),
        format!("{post}Content-Length: 5, 6\r\n\r\n{inner}"),
        format!("{post}Transfer-Encoding: xchunked\r\n\r\n{inner}"),
        format!("{post}Transfer-Encoding: chunked, identity\r\n\r\n{inner}"),
        format!("{post}Transfer-Encoding : chunked\r\n\r\n{inner}"),
        format!("{post}Transfer-Encoding: chunked\r\n\r\nzz\r\n{inner}"),
        format!("{post}Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{inner}"),
        format!("GET /healthz HTTP/1.1\nHost: x\n X: y\r\n\r\n{inner}"),
        format!("GET /healthz\u{0} HTTP/1.1\r\nHost: x\r\n\r\n{inner}"),
        format!("GET /healthz HTTP/9.1\r\nHost: x\r\n\r\n{inner}"),
    ];
    for attack in refused {
        let mut stream = raw(&server, Some("admin")).await;
        stream.write_all(attack.as_bytes()).await.expect("sent");
        let heard = hear(&mut stream, |_| false).await;
        let answers = heard.matches("HTTP/1.1 ").count();
        assert!(answers <= 1 && !heard.starts_with("HTTP/1.1 2"), "{attack:?}: {heard}");
    }
    // Both a length and chunks: the chunks count, as with upstream, and what follows them is the next request, not a part of this one.
    let mut stream = raw(&server, Some("admin")).await;
    let attack = format!("{post}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{{\r\n0\r\n\r\n");
    stream.write_all(attack.as_bytes()).await.expect("sent");
    let heard = hear(&mut stream, |text| text.contains("\"kind\":\"Status\"")).await;
    assert!(heard.starts_with("HTTP/1.1 400") && heard.matches("HTTP/1.1 ").count() == 1, "{heard}");
    serves(&server).await;
    server.stop().await;
}
