//! Who sends a request: a client certificate, a service account's token, or nobody in particular.

pub mod token;
pub mod x509;

use std::collections::BTreeMap;

/// The group of everyone who proved who they are.
pub const AUTHENTICATED: &str = "system:authenticated";
/// The group of everyone else.
pub const UNAUTHENTICATED: &str = "system:unauthenticated";
/// The user of a request without credentials.
pub const ANONYMOUS: &str = "system:anonymous";

/// Who sends a request (upstream: `k8s.io/apiserver/pkg/authentication/user.Info`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// The name, unique in the cluster.
    pub name: String,
    /// The UID; empty for certificates.
    pub uid: String,
    /// The groups, `system:authenticated` or `system:unauthenticated` among them.
    pub groups: Vec<String>,
    /// What else the credential says.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// A request without credentials.
    pub fn anonymous() -> Self {
        User { name: ANONYMOUS.into(), groups: vec![UNAUTHENTICATED.into()], ..User::default() }
    }

    /// Whether the user is in a group.
    pub fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|own| own == group)
    }

    /// The node that this user is: `system:node:NAME` in the group `system:nodes` (upstream: `pkg/auth/nodeidentifier`).
    pub fn node(&self) -> Option<&str> {
        if !self.is_in("system:nodes") {
            return None;
        }
        self.name.strip_prefix("system:node:")
    }
}

/// Why a credential is refused. The request is answered with 401 and no reason; this goes to the log.
#[derive(Debug, thiserror::Error)]
pub enum AuthnError {
    /// The certificate is no X.509, of another authority, of another time, or not for clients.
    #[error("the client certificate is not valid")]
    Certificate(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The certificate was refused when the connection began.
    #[error("the client certificate was refused")]
    Refused,
    /// The certificate was good when the connection began.
    #[error("the client certificate has expired")]
    Expired,
    /// The certificate names nobody.
    #[error("the client certificate has no common name")]
    NoCommonName,
    /// The token is refused.
    #[error("invalid bearer token: {0}")]
    Token(String),
}
