//! A small HTTPS client for tests: one connection a request.
#![allow(dead_code)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::common::Pki;

/// How long a test waits for anything.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// A running server.
pub struct Server {
    pub pki: Pki,
    pub dir: tempfile::TempDir,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), apiserver::Error>>,
}

/// An answer that is whole.
#[derive(Debug)]
pub struct Answer {
    pub code: u16,
    pub content_type: String,
    pub warnings: Vec<String>,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", String::from_utf8_lossy(&self.body)))
    }
}

impl Server {
    /// Starts a server and waits until it is ready.
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let pki = Pki::new(dir.path());
        Self::with(dir, pki, |config| config).await
    }

    /// Starts a server with a changed configuration.
    pub async fn with(dir: tempfile::TempDir, pki: Pki, change: impl FnOnce(apiserver::Config) -> apiserver::Config) -> Self {
        pki.issue("admin", "kubernetes-admin", &["coracle:cluster-admins"], &[]);
        let cancel = CancellationToken::new();
        let task = tokio::spawn(apiserver::run(change(pki.config()), cancel.clone()));
        let server = Self { pki, dir, cancel, task };
        server.wait_ready().await;
        server
    }

    async fn wait_ready(&self) {
        let ready = async {
            loop {
                if self.task.is_finished() {
                    panic!("the server ended at its start");
                }
                if let Ok(answer) = self.try_send(None, Request::get("/readyz"), Bytes::new()).await
                    && answer.code == 200
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(DEADLINE, ready).await.expect("the server becomes ready");
    }

    /// Ends the server and keeps its directory.
    pub async fn stop(self) -> (tempfile::TempDir, Pki) {
        self.cancel.cancel();
        self.task.await.expect("no panic").expect("a clean end");
        (self.dir, self.pki)
    }

    pub async fn open(&self, user: Option<&str>, request: Request<Full<Bytes>>) -> std::io::Result<Response<Incoming>> {
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", self.pki.port)).await?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(tls(&self.pki.dir, user)));
        let stream = connector.connect(ServerName::try_from("localhost").expect("a name"), stream).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.map_err(std::io::Error::other)
    }

    async fn try_send(&self, user: Option<&str>, request: http::request::Builder, body: Bytes) -> std::io::Result<Answer> {
        let request = request.header("host", "localhost").body(Full::new(body)).map_err(std::io::Error::other)?;
        let response = self.open(user, request).await?;
        let header = |name: &str| -> Vec<String> {
            response.headers().get_all(name).iter().filter_map(|value| value.to_str().ok()).map(str::to_owned).collect()
        };
        let (code, content_type, warnings) = (response.status().as_u16(), header("content-type").join(""), header("warning"));
        let body = response.into_body().collect().await.map_err(std::io::Error::other)?.to_bytes();
        Ok(Answer { code, content_type, warnings, body })
    }

    /// Sends a request as a user (a certificate's file name, or nobody).
    pub async fn send(&self, user: Option<&str>, request: http::request::Builder, body: impl Into<Bytes>) -> Answer {
        let answer = tokio::time::timeout(DEADLINE, self.try_send(user, request, body.into())).await;
        answer.expect("an answer in time").expect("an answer")
    }

    /// Sends JSON as the admin.
    pub async fn call(&self, method: &str, path: &str, body: Value) -> Answer {
        let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(Some("admin"), request, body).await
    }
}

/// The client's side of TLS, with a user's certificate.
pub fn tls(dir: &Path, user: Option<&str>) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(dir.join("ca.crt")).expect("authority") {
        roots.add(certificate.expect("PEM")).expect("certificate");
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    match user {
        None => builder.with_no_client_auth(),
        Some(user) => {
            let chain: Vec<_> = CertificateDer::pem_file_iter(dir.join(format!("{user}.crt"))).expect("file").flatten().collect();
            let key = PrivateKeyDer::from_pem_file(dir.join(format!("{user}.key"))).expect("key");
            builder.with_client_auth_cert(chain, key).expect("certificate and key")
        }
    }
}
