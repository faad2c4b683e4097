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

/// Judges client certificates: those of its authority are good.
pub type ClientVerifier = Arc<dyn ClientCertVerifier>;

/// The judge of client certificates: those of the authority in this file are good.
///
/// # Errors
/// What is wrong with the file.
pub fn clients(client_ca: &Path) -> Result<ClientVerifier, Error> {
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(client_ca)?), provider());
    let verifier = builder.allow_unauthenticated().build().map_err(configure(client_ca))?;
    Ok(verifier)
}

/// The server's side of TLS. With `clients` their certificates are asked for, and any is taken; `protocols` are those of ALPN, the best one
/// first.
///
/// # Errors
/// What is wrong with the files.
pub fn server(certificate: &Path, key: &Path, clients: Option<&ClientVerifier>, protocols: &[&str]) -> Result<ServerConfig, Error> {
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().map_err(configure(certificate))?;
    let builder = match clients {
        Some(clients) => builder.with_client_cert_verifier(Arc::new(AnyClient(clients.clone()))),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(certificates(certificate)?, private_key(key)?).map_err(configure(certificate))?;
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(config)
}

/// A client's side, as of the API server towards kubelets.
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

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

    /// An authority in files of this name, and the certificate of a client of it.
    fn authority(folder: &Path, name: &str) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let own = params.self_signed(&key).expect("an authority");
        std::fs::write(folder.join(format!("{name}.crt")), own.pem()).expect("written");
        std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).expect("written");
        let mut client = CertificateParams::default();
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let clients_key = KeyPair::generate().expect("a key");
        client.signed_by(&clients_key, &Issuer::new(params, key)).expect("a certificate").der().clone()
    }

    #[test]
    fn any_certificate_is_taken_and_those_of_the_authority_are_good() {
        let folder = tempfile::tempdir().expect("a folder");
        let (good, foreign) = (authority(folder.path(), "a"), authority(folder.path(), "b"));
        let judge = clients(&folder.path().join("a.crt")).expect("a verifier");
        let now = UnixTime::now();
        assert!(judge.verify_client_cert(&good, &[], now).is_ok());
        assert!(judge.verify_client_cert(&foreign, &[], now).is_err());
        let any = AnyClient(judge);
        assert!(any.verify_client_cert(&foreign, &[], now).is_ok() && !any.client_auth_mandatory());
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        authority(folder.path(), "a");
        authority(folder.path(), "b");
        std::fs::write(folder.path().join("empty"), "").expect("written");
        let path = |name: &str| folder.path().join(name);
        let made = |certificate: &str, key: &str| server(&path(certificate), &path(key), None, &["h2"]);
        assert_eq!(made("a.crt", "a.key").expect("a server").alpn_protocols, [b"h2"]);
        assert!(matches!(made("gone", "a.key"), Err(Error::Pem { .. })));
        assert!(matches!(made("empty", "a.key"), Err(Error::Empty { .. })));
        assert!(matches!(made("a.crt", "b.key"), Err(Error::Configure { .. })));
        assert!(matches!(clients(&path("empty")), Err(Error::Empty { .. })));
    }
}
