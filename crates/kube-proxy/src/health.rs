//! `/healthz` and `/livez`, without authentication, as upstream's (`pkg/proxy/healthcheck/proxy_health.go`, v1.37): whether changes reach
//! the kernel in time, and whether the node is to get traffic.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::Error;

/// A change that has not reached the kernel for this long is a failure (twice upstream's sync period).
const LATE: Duration = Duration::from_secs(60);
const CONNECTIONS_MAX: usize = 64;
const HEADERS: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, Default)]
struct State {
    updated: Option<Timestamp>,
    pending: Option<Timestamp>,
    eligible: bool,
}

/// What is answered.
#[derive(Debug, Clone, Default)]
pub struct Health(Arc<Mutex<State>>);

impl Health {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change is known.
    pub fn queued(&self, now: Timestamp) {
        self.state().pending.get_or_insert(now);
    }

    /// All known changes are in the kernel.
    pub fn updated(&self, now: Timestamp) {
        let mut state = self.state();
        state.pending = None;
        state.updated = Some(now);
    }

    /// Whether the node is to get traffic: it is there and not about to be deleted.
    pub fn set_eligible(&self, eligible: bool) {
        self.state().eligible = eligible;
    }

    fn answer(&self, with_node: bool, now: Timestamp) -> (StatusCode, String) {
        let state = *self.state();
        let late = state.pending.is_some_and(|since| now.duration_since(since) > LATE.try_into().unwrap_or_default());
        let live = !(late && state.updated.is_some());
        let healthy = live && (!with_node || state.eligible);
        let zero = "0001-01-01T00:00:00Z".to_owned();
        let updated = state.updated.map_or_else(|| zero.clone(), |time| time.to_string());
        let mut body = json!({
            "lastUpdated": if healthy { now.to_string() } else { updated.clone() },
            "currentTime": now.to_string(),
            "healthy": live,
        });
        if with_node {
            body["nodeEligible"] = state.eligible.into();
        }
        if state.updated.is_some() {
            body["status"] = json!({"IPv4": {"lastUpdated": updated, "healthy": live}});
        }
        (if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body.to_string())
    }
}

/// Listens.
///
/// # Errors
/// [`Error::Listen`].
pub async fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })
}

/// Serves until `cancel`.
pub async fn serve(listener: TcpListener, health: Health, cancel: CancellationToken) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let tasks = TaskTracker::new();
    loop {
        let accept = async {
            let permit = permits.clone().acquire_owned().await.ok()?;
            Some((listener.accept().await, permit))
        };
        let (stream, permit) = tokio::select! {
            () = cancel.cancelled() => break,
            accepted = accept => match accepted {
                Some((Ok((stream, _)), permit)) => (stream, permit),
                Some((Err(error), _)) => {
                    tracing::warn!(%error, "failed to accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
                None => break,
            },
        };
        let (health, cancel) = (health.clone(), cancel.clone());
        tasks.spawn(async move {
            let _permit = permit;
            let service = hyper::service::service_fn(|request| {
                let reply = reply(&health, &request);
                async move { Ok::<_, Infallible>(reply) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS)
                .serve_connection(TokioIo::new(stream), service);
            if let Some(Err(error)) = cancel.run_until_cancelled(connection).await {
                tracing::debug!(%error, "a health connection failed");
            }
        });
    }
    tasks.close();
    tasks.wait().await;
}

fn reply(health: &Health, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/healthz") => health.answer(true, Timestamp::now()),
        (&Method::GET | &Method::HEAD, "/livez") => health.answer(false, Timestamp::now()),
        _ => (StatusCode::NOT_FOUND, String::new()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    headers.insert(http::header::X_CONTENT_TYPE_OPTIONS, http::HeaderValue::from_static("nosniff"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_changes_and_leaving_nodes_are_unhealthy() {
        let health = Health::default();
        let at = |second: i64| Timestamp::from_second(1_800_000_000 + second).expect("time");
        let code = |with_node, second| health.answer(with_node, at(second)).0.as_u16();
        assert_eq!((code(true, 0), code(false, 0)), (503, 200));
        health.set_eligible(true);
        health.queued(at(0));
        health.updated(at(1));
        assert_eq!(code(true, 100), 200);
        health.queued(at(100));
        health.queued(at(140));
        assert_eq!((code(true, 150), code(true, 161), code(false, 161)), (200, 503, 503));
        health.updated(at(170));
        assert_eq!(code(true, 171), 200);
        assert!(health.answer(true, at(171)).1.contains("\"nodeEligible\":true"));
    }
}
