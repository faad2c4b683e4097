//! TLS: certificates from files, client certificates asked for and not demanded.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};

/// What is wrong with a certificate, a key or their use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or holds no PEM.
    #[error("failed to read {what} from {path}")]
    Pem {
        /// What was looked for.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// A file has no certificate in it.
    #[error("{path} has no certificate")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The parts do not fit.
    #[error("failed to configure TLS with {path}")]
    Configure {
        /// The file at fault.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = |source| Error::Pem { what: "certificates", path: path.to_owned(), source };
    let found = CertificateDer::pem_file_iter(path).map_err(pem)?.collect::<Result<Vec<_>, _>>().map_err(pem)?;
    if found.is_empty() { Err(Error::Empty { path: path.to_owned() }) } else { Ok(found) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    PrivateKeyDer::from_pem_file(path).map_err(|source| Error::Pem { what: "a private key", path: path.to_owned(), source })
}

fn roots(path: &Path) -> Result<RootCertStore, Error> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path)? {
        store.add(certificate).map_err(configure(path))?;
    }
    Ok(store)
}

fn configure<E: std::error::Error + Send + Sync + 'static>(path: &Path) -> impl Fn(E) -> Error {
    let path = path.to_owned();
    move |source| Error::Configure { path: path.clone(), source: Box::new(source) }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Takes any client certificate whose key the client has: a wrong one shall be answered with a Status, which clients can show,
/// and not by closing the connection (upstream: `tls.RequestClientCert`). Whoever asks who the client is must judge it.
#[derive(Debug)]
struct AnyClient(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// The server's side of TLS.
pub struct Server {
    /// HTTP/2 and HTTP/1.1. Client certificates are asked for, and any is taken.
    pub config: ServerConfig,
    /// Judges client certificates: those of the authority are good.
    pub clients: Arc<dyn ClientCertVerifier>,
}

/// The server's side of TLS; `client_ca` is the authority of good client certificates.
///
/// # Errors
/// What is wrong with the files.
pub fn server(certificate: &Path, key: &Path, client_ca: &Path) -> Result<Server, Error> {
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(client_ca)?), provider())
        .allow_unauthenticated()
        .build()
        .map_err(configure(client_ca))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(configure(certificate))?
        .with_client_cert_verifier(Arc::new(AnyClient(clients.clone())))
        .with_single_cert(certificates(certificate)?, private_key(key)?)
        .map_err(configure(certificate))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Server { config, clients })
}

/// The client's side towards kubelets.
///
/// # Errors
/// What is wrong with the files.
pub fn client(authority: &Path, certificate: Option<&Path>, key: Option<&Path>) -> Result<ClientConfig, Error> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(configure(authority))?
        .with_root_certificates(roots(authority)?);
    match (certificate, key) {
        (Some(certificate), Some(key)) => {
            builder.with_client_auth_cert(certificates(certificate)?, private_key(key)?).map_err(configure(certificate))
        }
        _ => Ok(builder.with_no_client_auth()),
    }
}
