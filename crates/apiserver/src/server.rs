//! The TLS listener: HTTP/1.1 and HTTP/2, a task per connection, a bounded drain at the end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use serving::head::{self, Counted};
use serving::tls::ClientVerifier;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::Api;
use crate::authn::x509::Peer;
use crate::router;

/// Connections at one time.
const CONNECTIONS_MAX: usize = 4096;
/// HTTP/2 streams of one connection (upstream's `--http2-max-streams-per-connection`).
const STREAMS_MAX: u32 = 1000;
/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long requests may go on after the end was asked for.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// After a failed accept (as when no descriptor is free).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// TLS of connections, and who judges their client certificates.
#[derive(Clone)]
pub struct Tls {
    /// Makes connections.
    pub acceptor: TlsAcceptor,
    /// Judges certificates.
    pub clients: ClientVerifier,
}

/// Serves until cancelled, then drains.
pub async fn serve(api: Arc<Api>, listener: TcpListener, tls: Tls, cancel: CancellationToken) {
    let tasks = TaskTracker::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = cancel.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!(connections = CONNECTIONS_MAX, "too many connections; one was closed");
            continue;
        };
        let (api, tls, cancel) = (api.clone(), tls.clone(), cancel.clone());
        tasks.spawn(async move {
            connection(api, stream, tls, cancel).await;
            drop(place);
        });
    }
    tasks.close();
    if tokio::time::timeout(DRAIN_TIMEOUT, tasks.wait()).await.is_err() {
        tracing::warn!(connections = tasks.len(), "connections were cut off after the drain time");
    }
}

async fn connection(api: Arc<Api>, stream: TcpStream, tls: Tls, cancel: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake failed"),
        Err(_) => return tracing::debug!("TLS handshake timed out"),
    };
    let peer = Peer::of(stream.get_ref().1.peer_certificates().unwrap_or_default(), tls.clients.as_ref());
    let service = service_fn(move |request: http::Request<Incoming>| {
        let (api, peer) = (api.clone(), peer.clone());
        async move { Ok::<_, Infallible>(router::handle(api, peer, request).await) }
    });
    // ALPN has told which it is: nothing needs to be waited for to find out.
    let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let stream = Counted::new(stream);
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(stream.timer()).header_read_timeout(head::IDLE);
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(STREAMS_MAX).keep_alive_interval(Duration::from_secs(30));
    let builder = if is_http2 { builder.http2_only() } else { builder.http1_only() };
    let preface_is_late = stream.preface_is_late();
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = preface_is_late, if is_http2 => return tracing::debug!("no HTTP/2 preface came"),
        () = cancel.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.as_mut().await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "connection ended");
    }
}
