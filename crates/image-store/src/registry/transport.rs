//! Connections: TCP, with TLS but for loopback, HTTP/1.1 on it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::error::Error;
use crate::types::Options;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// Whom to trust, and how to connect.
pub(crate) struct Transport {
    tls: TlsConnector,
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Transport")
    }
}

impl Transport {
    /// Reads the certificate authorities: the built-in ones, and those of the file.
    ///
    /// # Errors
    /// [`Error::Tls`] when the file that was named can't be read.
    pub fn new(options: &Options) -> Result<Self, Error> {
        let mut roots = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        if let Some(path) = &options.ca_file {
            let fail = |why: String| Error::Tls { why: format!("certificate authorities of {}: {why}", path.display()) };
            for certificate in CertificateDer::pem_file_iter(path).map_err(|e| fail(e.to_string()))? {
                // One strange certificate in a system's bundle must not stop the others.
                let _ = roots.add(certificate.map_err(|e| fail(e.to_string()))?);
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::Tls { why: e.to_string() })?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { tls: TlsConnector::from(Arc::new(config)) })
    }

    /// Sends one request on a connection of its own and gives its answer's head; the body follows. The error is a text for
    /// [`Error::Unavailable`].
    pub async fn send(&self, mut request: Request<Full<Bytes>>, timeout: Duration) -> Result<Response<Incoming>, String> {
        let uri = request.uri().clone();
        let authority = uri.authority().ok_or("address has no host")?.clone();
        let secure = uri.scheme_str() == Some("https");
        let path = uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
        *request.uri_mut() = path.parse::<Uri>().map_err(|e| e.to_string())?;
        // Without the user that a redirect may name.
        let host = authority.as_str().rsplit('@').next().unwrap_or_default();
        let host = HeaderValue::from_str(host).map_err(|e| e.to_string())?;
        request.headers_mut().insert("host", host);
        request.headers_mut().insert("user-agent", HeaderValue::from_static(concat!("coracle/", env!("CARGO_PKG_VERSION"))));
        let name = authority.host().trim_matches(['[', ']']).to_owned();
        let port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let exchange = async {
            let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect(&name, port));
            let stream = stream.await.map_err(|_| format!("{authority} does not answer"))?;
            let stream = stream.map_err(|e| format!("failed to connect to {authority}: {e}"))?;
            let _ = stream.set_nodelay(true);
            if !secure {
                return converse(stream, request).await;
            }
            let server = ServerName::try_from(name).map_err(|e| format!("{authority}: {e}"))?;
            let stream = self.tls.connect(server, stream).await.map_err(|e| format!("TLS with {authority} failed: {e}"))?;
            converse(stream, request).await
        };
        tokio::time::timeout(timeout, exchange).await.map_err(|_| format!("{authority} does not answer"))?
    }
}

/// `localhost` is the loopback interface also on a host without /etc/hosts, and no name server is asked for it (RFC 6761, section 6.3).
async fn connect(name: &str, port: u16) -> std::io::Result<TcpStream> {
    if name.eq_ignore_ascii_case("localhost") {
        let addresses: [SocketAddr; 2] =
            [(IpAddr::from(Ipv4Addr::LOCALHOST), port).into(), (IpAddr::from(Ipv6Addr::LOCALHOST), port).into()];
        return TcpStream::connect(&addresses[..]).await;
    }
    TcpStream::connect((name, port)).await
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, String> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    // The connection lives as long as the response's body is read, and ends with it: its errors are told there.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    sender.send_request(request).await.map_err(|e| chain(&e))
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Whether a registry is on this machine, and so spoken to in plain text, as containerd and Docker do.
pub(crate) fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
