//! The HTTPS API on port 10250 (seam 9): logs, exec, attach, port-forward, pods, stats, health.
//! Everything is authenticated and authorized (upstream pkg/kubelet/server, v1.37).

mod auth;
mod logs;
mod resource_metrics;
mod stats;
mod stream;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use rustls_pki_types::CertificateDer;
use serving::head::{self, Counted};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::kubelet::Kubelet;
use crate::model;

pub use auth::TlsError;
#[cfg(test)]
pub(crate) use logs::options as log_options;

/// Connections at once; more wait in the listener's queue.
const CONNECTIONS_MAX: usize = 512;
const HANDSHAKE: Duration = Duration::from_secs(10);
const DRAIN: Duration = Duration::from_secs(2);

/// A response; logs are streamed.
pub type Reply = Response<BoxBody<Bytes, Infallible>>;

/// The API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The certificate, its key or the CA.
    #[error("failed to set up TLS of the kubelet's API")]
    Tls(#[from] TlsError),
    /// The address.
    #[error("failed to listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
}

/// A failure of a request: status and text.
#[derive(Debug)]
pub struct Refusal(pub StatusCode, pub String);

impl Refusal {
    fn not_found(text: impl Into<String>) -> Self {
        Self(StatusCode::NOT_FOUND, text.into())
    }

    fn bad_request(text: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, text.into())
    }

    fn internal(text: impl Into<String>) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, text.into())
    }
}

/// The API, bound and not yet serving.
pub struct Server {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    state: Arc<State>,
}

/// What handlers share.
pub struct State {
    kubelet: Arc<Kubelet>,
    auth: auth::Auth,
    pods: client::Informer<Pod>,
    tasks: TaskTracker,
    cancel: CancellationToken,
}

impl Server {
    /// Reads the certificates and binds; `None` when the port is 0.
    pub async fn bind(kubelet: Arc<Kubelet>, pods: client::Informer<Pod>, cancel: CancellationToken) -> Result<Option<Self>, Error> {
        let config = &kubelet.config;
        if config.port == 0 {
            return Ok(None);
        }
        let (acceptor, clients) = auth::acceptor(config)?;
        let address = SocketAddr::new(config.address, config.port);
        let listener = TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?;
        let auth = auth::Auth::new(kubelet.client.clone(), clients, kubelet.node_name.clone());
        let state = Arc::new(State { kubelet, auth, pods, tasks: TaskTracker::new(), cancel });
        Ok(Some(Self { listener, acceptor, state }))
    }

    /// Serves until cancelled.
    pub async fn run(self) {
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let cancel = self.state.cancel.clone();
        loop {
            let accepted = tokio::select! {
                () = cancel.cancelled() => break,
                accepted = accept(&self.listener, &permits) => accepted,
            };
            let Some((stream, permit)) = accepted else {
                continue;
            };
            let (acceptor, state) = (self.acceptor.clone(), self.state.clone());
            let cancel = cancel.clone();
            self.state.tasks.spawn(async move {
                let _permit = permit;
                cancel.run_until_cancelled(connection(stream, acceptor, state)).await;
            });
        }
        self.state.tasks.close();
        if tokio::time::timeout(DRAIN, self.state.tasks.wait()).await.is_err() {
            tracing::warn!("connections to the kubelet's API did not end in time");
        }
    }
}

async fn accept(listener: &TcpListener, permits: &Arc<Semaphore>) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = permits.clone().acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _)) => Some((stream, permit)),
        Err(error) => {
            tracing::warn!(%error, "failed to accept a connection");
            // Descriptors are used up: others must get the chance to close some.
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

async fn connection(stream: TcpStream, acceptor: TlsAcceptor, state: Arc<State>) {
    // Keystrokes are small.
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%error, "a TLS handshake failed");
            return;
        }
        Err(_) => return,
    };
    let certificates: Arc<[CertificateDer<'static>]> = stream.get_ref().1.peer_certificates().unwrap_or_default().into();
    let service = hyper::service::service_fn(|request| {
        let (state, certificates) = (state.clone(), certificates.clone());
        async move { Ok::<_, Infallible>(answer(&state, &certificates, request).await) }
    });
    let stream = Counted::new(stream);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(stream.timer())
        .header_read_timeout(head::IDLE)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection to the kubelet's API failed");
    }
}

async fn answer(state: &Arc<State>, certificates: &[CertificateDer<'_>], request: Request<Incoming>) -> Reply {
    match handle(state, certificates, request).await {
        Ok(reply) => reply,
        Err(Refusal(status, message)) => text(status, message),
    }
}

async fn handle(state: &Arc<State>, certificates: &[CertificateDer<'_>], request: Request<Incoming>) -> Result<Reply, Refusal> {
    let user = state.auth.authenticate(certificates, request.headers()).await?;
    state.auth.authorize(&user, request.method(), request.uri().path()).await?;
    let path = request.uri().path().trim_end_matches('/').to_owned();
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let is_get = request.method() == Method::GET;
    let is_stream = is_get || request.method() == Method::POST;
    match parts.as_slice() {
        ["healthz"] | ["healthz", "ping" | "syncloop" | "log"] if is_get => Ok(text(StatusCode::OK, "ok".to_owned())),
        ["pods"] if is_get => Ok(json(&pod_list(state))),
        ["stats", "summary"] if is_get => Ok(json(&stats::summary(&state.kubelet, &state.pods).await?)),
        ["metrics", "resource"] if is_get => {
            let mut reply = text(StatusCode::OK, resource_metrics::text(&state.kubelet, &state.pods).await);
            reply.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(resource_metrics::MEDIA_TYPE));
            Ok(reply)
        }
        ["containerLogs", namespace, pod, container] if is_get => {
            logs::serve(state, namespace, pod, container, request.uri().query().unwrap_or("")).await
        }
        ["exec", namespace, pod, container] | ["exec", namespace, pod, _, container] if is_stream => {
            stream::exec(state, namespace, pod, container, request).await
        }
        ["attach", namespace, pod, container] | ["attach", namespace, pod, _, container] if is_stream => {
            stream::attach(state, namespace, pod, container, request).await
        }
        ["portForward", namespace, pod] | ["portForward", namespace, pod, _] if is_stream => {
            stream::port_forward(state, namespace, pod, request).await
        }
        _ => Err(Refusal::not_found("404 page not found")),
    }
}

fn text(status: StatusCode, message: String) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(message)).boxed());
    *reply.status_mut() = status;
    let plain = http::HeaderValue::from_static("text/plain; charset=utf-8");
    reply.headers_mut().insert(http::header::CONTENT_TYPE, plain);
    reply
}

fn json(value: &serde_json::Value) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(value.to_string())).boxed());
    let kind = http::HeaderValue::from_static("application/json");
    reply.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    reply
}

fn pod_list(state: &State) -> serde_json::Value {
    let items: Vec<Arc<Pod>> = state.pods.list();
    let items: Vec<&Pod> = items.iter().map(AsRef::as_ref).collect();
    serde_json::json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
}

impl State {
    /// The pod by name.
    fn pod(&self, namespace: &str, name: &str) -> Result<Arc<Pod>, Refusal> {
        let key = client::ObjectKey::new(namespace, name);
        let pod = self.pods.get(&key);
        pod.ok_or_else(|| Refusal::not_found(format!("pod \"{name}_{namespace}\" does not exist")))
    }

    /// The running container's id.
    async fn container_id(&self, namespace: &str, pod: &str, container: &str) -> Result<String, Refusal> {
        let pod = self.pod(namespace, pod)?;
        let seen = self.kubelet.runtime.observe(model::uid(&pod)).await;
        let seen = seen.map_err(|e| Refusal::internal(crate::runtime::go_error(&e)))?;
        let found = seen.find(container).map(|c| c.id.clone());
        found.ok_or_else(|| Refusal::not_found(format!("container not found (\"{container}\")")))
    }
}

/// The decoded parameters of a query.
pub fn parameters(query: &str) -> Vec<(String, String)> {
    query
        .split('&')
        .filter(|p| !p.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(key), decode(value))
        })
        .collect()
}

fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = |i: usize| bytes.get(i).and_then(|b| char::from(*b).to_digit(16));
        match (bytes[at], hex(at + 1), hex(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                out.push(u8::try_from(high * 16 + low).unwrap_or(b'?'));
                at += 3;
            }
            (b'+', ..) => {
                out.push(b' ');
                at += 1;
            }
            (byte, ..) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
