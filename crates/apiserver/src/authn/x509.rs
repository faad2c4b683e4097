//! Client certificates: the common name is the user, each organization a group
//! (upstream: `k8s.io/apiserver/pkg/authentication/request/x509`).

use std::sync::Arc;

use jiff::Timestamp;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::{CertificateDer, UnixTime};
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{AUTHENTICATED, AuthnError, User};

/// The user of a verified certificate, in DER.
pub fn user(der: &[u8]) -> Result<User, AuthnError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| AuthnError::Certificate(Box::new(error)))?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next().and_then(|name| name.as_str().ok()).filter(|name| !name.is_empty());
    let mut groups: Vec<String> = subject.iter_organization().filter_map(|name| name.as_str().ok()).map(str::to_owned).collect();
    groups.push(AUTHENTICATED.to_owned());
    let fingerprint = format!("X509SHA256={}", hex::encode(Sha256::digest(der)));
    let extra = [("authentication.kubernetes.io/credential-id".to_owned(), vec![fingerprint])].into();
    Ok(User { name: name.ok_or(AuthnError::NoCommonName)?.to_owned(), groups, extra, ..User::default() })
}

/// What the client certificate of a connection says.
#[derive(Debug, Clone)]
pub enum Peer {
    /// There is none.
    Nobody,
    /// It is good, until this time.
    Known(Arc<User>, Timestamp),
    /// It is not good: of another authority, of another time, of a server, or without a name. Only a token can help.
    Refused,
}

impl Peer {
    /// Judges a connection's certificates, the client's own first.
    pub fn of(chain: &[CertificateDer<'_>], clients: &dyn ClientCertVerifier) -> Self {
        let Some((own, others)) = chain.split_first() else { return Peer::Nobody };
        let judged = clients.verify_client_cert(own, others, UnixTime::now()).map_err(|error| AuthnError::Certificate(Box::new(error)));
        match judged.and_then(|_| Ok(Peer::Known(Arc::new(user(own)?), expiry(own)?))) {
            Ok(known) => known,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "a client certificate is refused");
                Peer::Refused
            }
        }
    }

    /// The user, `None` where there is no certificate.
    ///
    /// # Errors
    /// The certificate is not good, or not any more.
    pub fn user(&self, now: Timestamp) -> Result<Option<Arc<User>>, AuthnError> {
        match self {
            Peer::Nobody => Ok(None),
            Peer::Known(user, until) if now <= *until => Ok(Some(user.clone())),
            Peer::Known(..) => Err(AuthnError::Expired),
            Peer::Refused => Err(AuthnError::Refused),
        }
    }
}

fn expiry(der: &[u8]) -> Result<Timestamp, AuthnError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| AuthnError::Certificate(Box::new(error)))?;
    Ok(Timestamp::from_second(certificate.validity().not_after.timestamp()).unwrap_or(Timestamp::MAX))
}
