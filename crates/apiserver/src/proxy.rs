//! `log`, `exec`, `attach` and `portforward`: through to the kubelet's HTTPS port, as upstream's `UpgradeAwareHandler` does:
//! the request goes on with the same upgrade headers, and once the kubelet has switched protocols the bytes are copied both ways.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::status::Status;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, HeaderName, SEC_WEBSOCKET_ACCEPT, UPGRADE};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use remotecommand::Tunnel;
use rustls_pki_types::ServerName;
use serde_json::Value;
use serving::tls;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::api::Ctx;
use crate::object::text;
use crate::reply::{Body, full};
use crate::subresources::pod_and_node;

/// How long a kubelet may take to accept a connection (`--kubelet-timeout`).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How much of a kubelet's error is passed on.
const ERROR_BYTES_MAX: usize = 64 << 10;
/// How much text is taken from a kubelet: its metrics of some thousand containers.
const TEXT_BYTES_MAX: usize = 16 << 20;
/// Headers of a request that go on to the kubelet.
const PASSED_HEADERS: &[&str] = &[
    "connection",
    "upgrade",
    "sec-websocket-key",
    "sec-websocket-version",
    "sec-websocket-protocol",
    "sec-websocket-extensions",
    "x-stream-protocol-version",
    "content-length",
    "content-type",
    "accept",
    "origin",
];

/// The way to kubelets.
pub struct Kubelets {
    tls: Option<Arc<rustls::ClientConfig>>,
    address_types: Vec<String>,
}

impl Kubelets {
    /// With the API server's client certificate. Without a certificate authority for kubelets nothing can be proxied, for
    /// nobody could say whom the data would come from.
    ///
    /// # Errors
    /// What is wrong with the files.
    pub fn new(
        authority: Option<&Path>,
        certificate: Option<&Path>,
        key: Option<&Path>,
        address_types: Vec<String>,
    ) -> Result<Self, tls::Error> {
        let tls = authority.map(|authority| tls::client(authority, certificate, key)).transpose()?.map(Arc::new);
        Ok(Self { tls, address_types })
    }

    fn endpoint(&self, node: &Value) -> Result<(String, u16), Status> {
        let addresses = node.pointer("/status/addresses").and_then(Value::as_array).cloned().unwrap_or_default();
        let port = node.pointer("/status/daemonEndpoints/kubeletEndpoint/Port").and_then(Value::as_u64).unwrap_or(10250);
        let port = u16::try_from(port).map_err(|_| Status::internal(format!("the kubelet's port {port} is no port")))?;
        let found = self.address_types.iter().find_map(|wanted| addresses.iter().find(|address| text(address, &["type"]) == wanted));
        found.map(|address| (text(address, &["address"]).to_owned(), port)).ok_or_else(|| {
            Status::internal(format!("no preferred addresses found for node {}; known addresses: {addresses:?}", crate::object::name(node)))
        })
    }

    async fn send(&self, node: &Value, request: Request<Empty<Bytes>>) -> Result<Response<Incoming>, Status> {
        let tls = self.tls.clone().ok_or_else(|| {
            Status::unavailable("logs and exec need --kubelet-certificate-authority: this server cannot tell a kubelet from anybody else")
        })?;
        let (host, port) = self.endpoint(node)?;
        let failed = |act: &str, why: String| Status::internal(format!("error dialing backend: {act} {host}:{port}: {why}"));
        let connect = TcpStream::connect((host.as_str(), port));
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect)
            .await
            .map_err(|_| failed("connect to", "timed out".to_owned()))?
            .map_err(|error| failed("connect to", error.to_string()))?;
        let name = ServerName::try_from(host.clone()).map_err(|error| failed("name", error.to_string()))?;
        let handshake = TlsConnector::from(tls).connect(name, stream);
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, handshake)
            .await
            .map_err(|_| failed("tls with", "timed out".to_owned()))?
            .map_err(|error| failed("tls with", error.to_string()))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed("http with", error.to_string()))?;
        // Ends with the connection, which ends when either side closes.
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "connection to a kubelet ended");
            }
        });
        sender.send_request(request).await.map_err(|error| failed("request to", error.to_string()))
    }
}

impl Kubelets {
    /// A text that the kubelet of a node serves.
    ///
    /// # Errors
    /// The kubelet cannot be reached, refuses, or sends more than [`TEXT_BYTES_MAX`].
    pub async fn get_text(&self, node: &Value, path: &str) -> Result<String, Status> {
        let request = Request::get(path).header(HOST, "kubelet").body(Empty::new()).map_err(|error| Status::internal(error.to_string()))?;
        let response = self.send(node, request).await?;
        if response.status() != StatusCode::OK {
            return Err(error_of(response).await);
        }
        let body = Limited::new(response.into_body(), TEXT_BYTES_MAX).collect().await;
        let body = body.map_err(|error| Status::internal(format!("failed to read {path} of a kubelet: {error}")))?.to_bytes();
        String::from_utf8(body.into()).map_err(|_| Status::internal(format!("{path} of a kubelet is not UTF-8")))
    }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn query(pairs: &[(&str, String)]) -> String {
    let pairs: Vec<String> = pairs.iter().map(|(key, value)| format!("{key}={}", escape(value))).collect();
    if pairs.is_empty() { String::new() } else { format!("?{}", pairs.join("&")) }
}

/// The container meant, as upstream chooses it.
fn container(ctx: &Ctx<'_>, pod: &Value) -> Result<String, Status> {
    let names = |list: &str| -> Vec<String> {
        let containers = pod.pointer(&format!("/spec/{list}")).and_then(Value::as_array).into_iter().flatten();
        containers.map(|container| text(container, &["name"]).to_owned()).collect()
    };
    let (main, init, ephemeral) = (names("containers"), names("initContainers"), names("ephemeralContainers"));
    let pod_name = &ctx.info.name;
    let Some(wanted) = ctx.query.get("container") else {
        return match main.as_slice() {
            [only] if ctx.info.subresource != "log" || init.is_empty() => Ok(only.clone()),
            _ => {
                let all: Vec<&str> = init.iter().chain(&main).chain(&ephemeral).map(String::as_str).collect();
                let choice = all.join(" ");
                Err(Status::bad_request(format!("a container name must be specified for pod {pod_name}, choose one of: [{choice}]")))
            }
        };
    };
    if [main, init, ephemeral].concat().iter().any(|name| name == wanted) {
        return Ok(wanted.to_owned());
    }
    Err(Status::bad_request(format!("container {wanted} is not valid for pod {pod_name}")))
}

/// Log parameters that go on as they are, once they are known to be well-formed.
fn log_parameters(ctx: &Ctx<'_>) -> Result<Vec<(&'static str, String)>, Status> {
    let mut pairs = Vec::new();
    for flag in ["follow", "previous", "timestamps"] {
        if ctx.query.flag(flag) {
            pairs.push((flag, "true".to_owned()));
        }
    }
    for number in ["sinceSeconds", "tailLines", "limitBytes"] {
        let Some(value) = ctx.query.get(number) else { continue };
        let least = if number == "tailLines" { 0 } else { 1 };
        if value.parse::<i64>().ok().is_none_or(|value| value < least) {
            let why = if least == 0 { "must be greater than or equal to 0" } else { "must be greater than 0" };
            let error = apimachinery::field_error::FieldError::invalid(number, value, why);
            return Err(Status::invalid("", "PodLogOptions", &ctx.info.name, &[error]));
        }
        pairs.push((number, value.to_owned()));
    }
    for text in ["sinceTime", "stream"] {
        if let Some(value) = ctx.query.get(text).filter(|value| *value != "All") {
            pairs.push((text, value.to_owned()));
        }
    }
    Ok(pairs)
}

async fn error_of(response: Response<Incoming>) -> Status {
    let code = response.status().as_u16();
    let body = Limited::new(response.into_body(), ERROR_BYTES_MAX).collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let message = String::from_utf8_lossy(&body).trim().to_owned();
    match code {
        400 => Status::bad_request(message),
        404 => Status { code: 404, reason: "NotFound", message, details: None },
        _ => Status::internal(format!("the kubelet answered {code}: {message}")),
    }
}

/// GET of `log`: streamed as the kubelet sends it.
pub async fn log(ctx: &Ctx<'_>) -> Result<Response<Body>, Status> {
    let (pod, node) = pod_and_node(ctx).await?;
    let container = container(ctx, &pod)?;
    let path = format!("/containerLogs/{}/{}/{container}{}", ctx.info.namespace, ctx.info.name, query(&log_parameters(ctx)?));
    let Some(node) = node else {
        // Upstream's answer for a pod that nobody has placed: nothing, not an error.
        let mut answer = Response::new(full(Bytes::new()));
        *answer.status_mut() = StatusCode::NO_CONTENT;
        return Ok(answer);
    };
    let request = Request::get(path).header(HOST, "kubelet").body(Empty::new()).map_err(|error| Status::internal(error.to_string()))?;
    let response = ctx.api.kubelets.send(&node, request).await?;
    if response.status() != StatusCode::OK {
        return Err(error_of(response).await);
    }
    let mut answer = Response::new(response.into_body().map_err(std::io::Error::other).boxed_unsync());
    answer.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/plain"));
    answer.headers_mut().insert("cache-control", http::HeaderValue::from_static("no-cache, private"));
    Ok(answer)
}

fn stream_path(ctx: &Ctx<'_>, pod: &Value) -> Result<String, Status> {
    let (namespace, name) = (&ctx.info.namespace, &ctx.info.name);
    if ctx.info.subresource == "portforward" {
        let ports: Vec<_> = ctx.query.all("ports").map(|port| ("port", port.to_owned())).collect();
        return Ok(format!("/portForward/{namespace}/{name}{}", query(&ports)));
    }
    let container = container(ctx, pod)?;
    let mut pairs = Vec::new();
    for (ours, kubelets) in [("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty")] {
        if ctx.query.flag(ours) {
            pairs.push((kubelets, "1".to_owned()));
        }
    }
    pairs.extend(ctx.query.all("command").map(|word| ("command", word.to_owned())));
    Ok(format!("/{}/{namespace}/{name}/{container}{}", ctx.info.subresource, query(&pairs)))
}

fn passed(headers: &HeaderMap) -> impl Iterator<Item = (&HeaderName, &http::HeaderValue)> {
    headers.iter().filter(|(name, _)| PASSED_HEADERS.contains(&name.as_str()))
}

/// `exec`, `attach` and `portforward`: an upgraded connection, copied both ways.
pub async fn stream(ctx: &Ctx<'_>, request: Request<Incoming>) -> Result<Response<Body>, Status> {
    let (pod, node) = pod_and_node(ctx).await?;
    if request.headers().get(UPGRADE).is_none() {
        return Err(Status::bad_request("Upgrade request required"));
    }
    let path = stream_path(ctx, &pod)?;
    let node = node.ok_or_else(|| Status::bad_request(format!("pod {} does not have a host assigned", ctx.info.name)))?;
    // kubectl carries the SPDY connection of forwarded ports inside a WebSocket; kubelets speak plain SPDY.
    let tunnel = match ctx.info.subresource.as_str() {
        "portforward" => Tunnel::asked(request.headers()).map_err(|error| Status::bad_request(error.to_string()))?,
        _ => None,
    };
    let method = if tunnel.is_some() { Method::POST } else { request.method().clone() };
    let mut outgoing = Request::builder().method(method).uri(path).header(HOST, "kubelet");
    if let Some(headers) = outgoing.headers_mut() {
        headers.extend(match &tunnel {
            Some(tunnel) => tunnel.request_headers(),
            None => passed(request.headers()).map(|(name, value)| (name.clone(), value.clone())).collect(),
        });
    }
    let outgoing = outgoing.body(Empty::new()).map_err(|error| Status::internal(error.to_string()))?;
    let mut response = ctx.api.kubelets.send(&node, outgoing).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(error_of(response).await);
    }
    let mut answer = Response::new(full(Bytes::new()));
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *answer.headers_mut() = match &tunnel {
        Some(tunnel) => tunnel.response_headers(response.headers()).map_err(|error| Status::internal(error.to_string()))?,
        None => {
            let agreed = |name: &HeaderName| PASSED_HEADERS.contains(&name.as_str()) || name == SEC_WEBSOCKET_ACCEPT;
            let headers = response.headers().iter().filter(|(name, _)| agreed(name));
            headers.map(|(name, value)| (name.clone(), value.clone())).collect()
        }
    };
    let kubelet = hyper::upgrade::on(&mut response);
    let closing = ctx.api.closing.clone();
    let is_tunnel = tunnel.is_some();
    // Ends when either side closes, or with the server.
    tokio::spawn(async move {
        tokio::select! {
            outcome = relay(hyper::upgrade::on(request), kubelet, is_tunnel) => if let Err(error) = outcome {
                tracing::debug!(error = &*error, "a stream to a kubelet broke off");
            },
            () = closing.cancelled() => {}
        }
    });
    Ok(answer)
}

/// Copies between the client and the kubelet until either closes.
async fn relay(client: OnUpgrade, kubelet: OnUpgrade, is_tunnel: bool) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let (client, kubelet) = tokio::try_join!(client, kubelet)?;
    let (mut client, mut kubelet) = (TokioIo::new(client), TokioIo::new(kubelet));
    if is_tunnel {
        remotecommand::tunnel(client, kubelet).await?;
    } else {
        tokio::io::copy_bidirectional(&mut client, &mut kubelet).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn addresses_by_preference() {
        let kubelets = Kubelets { tls: None, address_types: vec!["InternalIP".to_owned(), "Hostname".to_owned()] };
        let node = json!({"metadata": {"name": "n"}, "status": {
            "addresses": [{"type": "Hostname", "address": "n"}, {"type": "InternalIP", "address": "10.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10251}}}});
        assert_eq!(kubelets.endpoint(&node), Ok(("10.0.0.1".to_owned(), 10251)));
        assert!(kubelets.endpoint(&json!({})).is_err());
        assert_eq!(query(&[("command", "a b&c".to_owned())]), "?command=a%20b%26c");
    }
}
