//! Client certificates: the common name is the user, each organization a group
//! (upstream: `k8s.io/apiserver/pkg/authentication/request/x509`). rustls has verified the chain before.

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
