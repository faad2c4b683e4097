//! `log` and `exec` through the API server to a kubelet that is a test.

#[path = "common/client.rs"]
mod client;
mod common;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use client::{DEADLINE, Server};
use common::Pki;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// Answers logs with the request's own path and query; on an upgrade it sends every byte back in upper case.
async fn answer(mut request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let uri = request.uri().to_string();
    if !request.headers().contains_key("upgrade") {
        let code = if uri.contains("broken") { 500 } else { 200 };
        let mut response = Response::new(Full::new(Bytes::from(uri)));
        *response.status_mut() = StatusCode::from_u16(code).expect("a code");
        return Ok(response);
    }
    let protocol = request.headers().get("sec-websocket-protocol").cloned();
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut stream = TokioIo::new(upgraded.await.expect("an upgrade"));
        let mut buffer = [0u8; 64];
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            let upper = buffer[..read].to_ascii_uppercase();
            stream.write_all(&upper).await.expect("written");
        }
    });
    let mut response = Response::new(Full::new(Bytes::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert("connection", "Upgrade".parse().expect("header"));
    response.headers_mut().insert("upgrade", "websocket".parse().expect("header"));
    if let Some(protocol) = protocol {
        response.headers_mut().insert("sec-websocket-protocol", protocol);
    }
    Ok(response)
}

/// A kubelet's port that only the API server's certificate opens.
async fn kubelet(pki: &Pki) -> u16 {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(pki.dir.join("ca.crt")).expect("authority")).expect("certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().expect("verifier");
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![CertificateDer::from_pem_file(pki.dir.join("kubelet.crt")).expect("file")],
            PrivateKeyDer::from_pem_file(pki.dir.join("kubelet.key")).expect("file"),
        )
        .expect("certificate");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let stream = acceptor.accept(stream).await.expect("the API server's certificate");
                let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer));
                connection.with_upgrades().await.ok();
            });
        }
    });
    port
}

async fn start() -> Server {
    let dir = tempfile::tempdir().expect("temporary directory");
    let pki = Pki::new(dir.path());
    pki.issue("kubelet", "system:node:n1", &["system:nodes"], &["127.0.0.1"]);
    pki.issue("to-kubelet", "kube-apiserver-kubelet-client", &[], &[]);
    let port = kubelet(&pki).await;
    let server = Server::with(dir, pki, |mut config| {
        let file = |name: &str| Some(config.tls_cert_file.with_file_name(name));
        config.kubelet_certificate_authority = file("ca.crt");
        config.kubelet_client_certificate = file("to-kubelet.crt");
        config.kubelet_client_key = file("to-kubelet.key");
        config
    })
    .await;
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    assert_eq!(server.call("POST", "/api/v1/namespaces/default/serviceaccounts", account).await.code, 201);
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "status": {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}], "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}});
    assert_eq!(server.call("POST", "/api/v1/nodes", node).await.code, 201);
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"},
        "spec": {"nodeName": "n1", "containers": [{"name": "a", "image": "x"}, {"name": "b", "image": "x"}]}});
    assert_eq!(server.call("POST", "/api/v1/namespaces/default/pods", pod).await.code, 201);
    server
}

const POD: &str = "/api/v1/namespaces/default/pods/p";

#[tokio::test]
async fn logs_are_asked_of_the_kubelet_with_checked_parameters() {
    let server = start().await;
    let get = async |query: &str| server.call("GET", &format!("{POD}/log?{query}"), Value::Null).await;
    let answer = get("container=b&follow=true&tailLines=5&timestamps=true").await;
    let want = "/containerLogs/default/p/b?follow=true&timestamps=true&tailLines=5";
    assert_eq!((answer.code, String::from_utf8_lossy(&answer.body).into_owned()), (200, want.to_owned()));
    let unnamed = get("").await;
    let want = "a container name must be specified for pod p, choose one of: [a b]";
    assert_eq!((unnamed.code, unnamed.json()["message"].clone()), (400, json!(want)));
    assert_eq!(get("container=z").await.code, 400);
    assert_eq!(get("container=a&tailLines=-1").await.code, 422);
    assert_eq!(get("container=a&sinceTime=broken").await.code, 500);
    server.stop().await;
}

#[tokio::test]
async fn exec_copies_bytes_both_ways_after_the_upgrade() {
    let server = start().await;
    let request = Request::get(format!("{POD}/exec?container=a&stdin=true&stdout=true&command=cat"))
        .header("host", "localhost")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
        .header("sec-websocket-protocol", "v5.channel.k8s.io")
        .body(Full::new(Bytes::new()))
        .expect("request");
    let mut response = server.open(Some("admin"), request).await.expect("an answer");
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(response.headers()["sec-websocket-protocol"], "v5.channel.k8s.io");
    let mut stream = TokioIo::new(hyper::upgrade::on(&mut response).await.expect("an upgrade"));
    let talk = async {
        for word in ["hello", "world"] {
            stream.write_all(word.as_bytes()).await.expect("written");
            let mut back = [0u8; 5];
            stream.read_exact(&mut back).await.expect("read");
            assert_eq!(back, word.to_ascii_uppercase().as_bytes());
        }
    };
    tokio::time::timeout(DEADLINE, talk).await.expect("in time");
    let plain = server.call("GET", &format!("{POD}/exec?container=a&command=cat"), Value::Null).await;
    assert_eq!((plain.code, plain.json()["message"].clone()), (400, json!("Upgrade request required")));
    tokio::time::timeout(Duration::from_secs(10), server.stop()).await.expect("an open stream does not hold the server up");
}

#[tokio::test]
async fn without_an_authority_for_kubelets_logs_say_what_is_missing() {
    let server = Server::start().await;
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "status": {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}]}});
    assert_eq!(server.call("POST", "/api/v1/nodes", node).await.code, 201);
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    assert_eq!(server.call("POST", "/api/v1/namespaces/default/serviceaccounts", account).await.code, 201);
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"},
        "spec": {"nodeName": "n1", "containers": [{"name": "a", "image": "x"}]}});
    assert_eq!(server.call("POST", "/api/v1/namespaces/default/pods", pod).await.code, 201);
    let answer = server.call("GET", &format!("{POD}/log"), Value::Null).await;
    assert_eq!(answer.code, 503);
    assert!(answer.json()["message"].as_str().unwrap_or("").contains("--kubelet-certificate-authority"));
    server.stop().await;
}
