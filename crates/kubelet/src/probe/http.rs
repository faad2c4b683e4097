//! A small HTTP/1.1 client for probes and hooks, and gRPC's health check. Certificates are not verified,
//! as upstream's probes do not (pkg/probe/http/http.go, v1.37).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::probe::action::{Verdict, resolve_port};

/// Bytes of an answer's body that are read.
const BODY_BYTES_MAX: usize = 10 << 10;
/// Redirects that are followed on the same host.
const REDIRECTS_MAX: usize = 10;

/// A request of a probe or hook.
#[derive(Clone, Debug)]
pub struct Request {
    tls: bool,
    host: String,
    port: u16,
    path: String,
    headers: Vec<(String, String)>,
}

/// An answer, its body dropped.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status code.
    pub status: u16,
    /// Where a redirect to another host pointed; such a redirect is not followed.
    pub redirected_away: Option<String>,
}

impl Request {
    /// From the API's action; the host defaults to the pod's address.
    pub fn from_action(get: &HTTPGetAction, container: &Container, pod_ip: &str, user_agent: &str) -> Result<Self, String> {
        let port = resolve_port(&get.port, container)?;
        let host = get.host.as_deref().filter(|h| !h.is_empty()).unwrap_or(pod_ip);
        let path = get.path.as_deref().unwrap_or("");
        let mut headers: Vec<(String, String)> = get.http_headers.iter().flatten().map(|h| (h.name.clone(), h.value.clone())).collect();
        let has = |headers: &[(String, String)], name: &str| headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
        if !has(&headers, "user-agent") {
            headers.push(("User-Agent".into(), user_agent.into()));
        }
        if !has(&headers, "accept") {
            headers.push(("Accept".into(), "*/*".into()));
        }
        Ok(Self {
            tls: get.scheme.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("https")),
            host: host.to_owned(),
            port,
            path: if path.starts_with('/') { path.to_owned() } else { format!("/{path}") },
            headers,
        })
    }

    fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}{}", join_host_port(&self.host, self.port), self.path)
    }
}

/// Carries out a GET within `timeout`; the error is the text of an event.
pub async fn get(request: &Request, timeout: Duration) -> Result<Answer, String> {
    let url = request.url();
    match tokio::time::timeout(timeout, follow(request)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(format!("Get \"{url}\": {error}")),
        Err(_) => Err(format!("Get \"{url}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)")),
    }
}

async fn follow(request: &Request) -> Result<Answer, String> {
    let mut request = request.clone();
    for _ in 0..REDIRECTS_MAX {
        let (status, location) = once(&request).await?;
        let Some(location) = location.filter(|_| (300..400).contains(&status)) else {
            return Ok(Answer { status, redirected_away: None });
        };
        match redirect(&request, &location) {
            Some(next) => request = next,
            None => return Ok(Answer { status, redirected_away: Some(location) }),
        }
    }
    Err(format!("stopped after {REDIRECTS_MAX} redirects"))
}

/// The next request when `location` stays on the same host.
fn redirect(request: &Request, location: &str) -> Option<Request> {
    let mut next = request.clone();
    if location.starts_with('/') && !location.starts_with("//") {
        next.path = location.to_owned();
        return Some(next);
    }
    let uri: http::Uri = location.parse().ok()?;
    if uri.host()?.trim_matches(['[', ']']) != request.host {
        return None;
    }
    next.tls = uri.scheme_str() == Some("https");
    next.port = uri.port_u16().unwrap_or(if next.tls { 443 } else { 80 });
    next.path = uri.path_and_query().map_or("/".to_owned(), ToString::to_string);
    Some(next)
}

async fn once(request: &Request) -> Result<(u16, Option<String>), String> {
    let address = join_host_port(&request.host, request.port);
    let stream = tokio::net::TcpStream::connect(&address).await.map_err(|e| format!("dial tcp {address}: {}", io_text(&e)))?;
    if request.tls {
        let connector = tokio_rustls::TlsConnector::from(unverified_tls()?);
        let name = ServerName::try_from(request.host.clone()).map_err(|e| e.to_string())?;
        let stream = connector.connect(name, stream).await.map_err(|e| e.to_string())?;
        exchange(request, &address, stream).await
    } else {
        exchange(request, &address, stream).await
    }
}

async fn exchange<S>(request: &Request, address: &str, stream: S) -> Result<(u16, Option<String>), String>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|e| e.to_string())?;
    let mut builder = hyper::Request::get(&request.path);
    let has_host = request.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case("host"));
    if !has_host {
        builder = builder.header("Host", address);
    }
    for (name, value) in &request.headers {
        builder = builder.header(name, value);
    }
    let message = builder.body(Empty::<Bytes>::new()).map_err(|e| e.to_string())?;
    let talk = async {
        let answer = sender.send_request(message).await.map_err(|e| e.to_string())?;
        let status = answer.status().as_u16();
        let location = answer.headers().get("location");
        let location = location.and_then(|l| l.to_str().ok()).map(str::to_owned);
        // A body over the limit is cut off, which is no failure of the probe.
        let _ = Limited::new(answer.into_body(), BODY_BYTES_MAX).collect().await;
        Ok((status, location))
    };
    tokio::pin!(talk);
    tokio::select! {
        answer = &mut talk => answer,
        ended = connection => match ended {
            Ok(()) => talk.await,
            Err(error) => Err(error.to_string()),
        },
    }
}

/// gRPC's `grpc.health.v1.Health/Check`.
pub async fn grpc_health(host: &str, port: i32, service: &str, timeout: Duration) -> Verdict {
    let port = u16::try_from(port).unwrap_or(0);
    let address = join_host_port(host, port);
    match tokio::time::timeout(timeout, check_health(&address, service)).await {
        Ok(Ok(1)) => Verdict::Success,
        Ok(Ok(status)) => {
            let word = ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"]
                .get(usize::try_from(status).unwrap_or(0))
                .copied()
                .unwrap_or("UNKNOWN");
            Verdict::Failure(format!("service unhealthy (responded with \"{word}\")"))
        }
        Ok(Err(error)) => Verdict::Failure(error),
        Err(_) => Verdict::Failure(format!("timeout: failed to connect service \"{address}\" within {}s", timeout.as_secs())),
    }
}

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct HealthCheckRequest {
    /// The service asked for.
    #[prost(string, tag = "1")]
    pub(super) service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct HealthCheckResponse {
    /// 1 is SERVING.
    #[prost(int32, tag = "1")]
    pub(super) status: i32,
}

async fn check_health(address: &str, service: &str) -> Result<i32, String> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).map_err(|e| e.to_string())?;
    let channel = endpoint.connect().await.map_err(|_| format!("timeout: failed to connect service \"{address}\""))?;
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|e| e.to_string())?;
    let codec = tonic_prost::ProstCodec::<HealthCheckRequest, HealthCheckResponse>::default();
    let path = http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let message = HealthCheckRequest { service: service.to_owned() };
    let answer = client.unary(tonic::Request::new(message), path, codec).await.map_err(|status| match status.code() {
        tonic::Code::Unimplemented => "this server does not implement the grpc health protocol (grpc.health.v1.Health)".to_owned(),
        _ => format!("error: health rpc probe failed: {status}"),
    })?;
    Ok(answer.into_inner().status)
}

/// `HOST:PORT`, an IPv6 address in brackets.
pub fn join_host_port(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// An I/O error in the words of Go's net package, which users know.
pub fn io_text(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => "connect: connection refused".to_owned(),
        std::io::ErrorKind::ConnectionReset => "connection reset by peer".to_owned(),
        std::io::ErrorKind::HostUnreachable => "connect: no route to host".to_owned(),
        std::io::ErrorKind::TimedOut => "i/o timeout".to_owned(),
        _ => error.to_string(),
    }
}

fn unverified_tls() -> Result<Arc<rustls::ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let schemes = provider.signature_verification_algorithms.supported_schemes();
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(NoVerification(schemes)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Probes ask whether a server answers, not who it is.
#[derive(Debug)]
struct NoVerification(Vec<rustls::SignatureScheme>);

impl ServerCertVerifier for NoVerification {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.clone()
    }
}
