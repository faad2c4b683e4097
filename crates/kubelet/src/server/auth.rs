//! Who calls, and whether they may: client certificate or TokenReview, then SubjectAccessReview
//! (upstream pkg/kubelet/server/auth.go and cmd/kubelet/app/auth.go, v1.37, with fine-grained authorization).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::{HeaderMap, Method, StatusCode};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::Api;
use kube::api::PostParams;
use rustls_pki_types::{CertificateDer, UnixTime};
use serving::tls::{self, ClientVerifier};
use tokio_rustls::TlsAcceptor;

use crate::config::Config;
use crate::server::Refusal;

/// How long answers are kept (upstream's kubelet configuration defaults).
const TOKEN_TTL: Duration = Duration::from_secs(120);
const ALLOWED_TTL: Duration = Duration::from_secs(300);
const DENIED_TTL: Duration = Duration::from_secs(30);
/// Answers kept of each sort.
const CACHE_MAX: usize = 1024;
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);

/// TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The flags name no such file.
    #[error("no {0} was given")]
    Missing(&'static str),
    /// What the flags name is not good.
    #[error(transparent)]
    File(#[from] tls::Error),
}

/// A caller.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct User {
    name: String,
    uid: String,
    groups: Vec<String>,
}

/// The TLS acceptor, and who judges client certificates when there is a CA. Any is taken: a wrong one is answered with 401.
pub fn acceptor(config: &Config) -> Result<(TlsAcceptor, Option<ClientVerifier>), TlsError> {
    let certificate = config.tls_cert_file.as_deref().ok_or(TlsError::Missing("--tls-cert-file"))?;
    let key = config.tls_private_key_file.as_deref().ok_or(TlsError::Missing("--tls-private-key-file"))?;
    let clients = config.client_ca_file.as_deref().map(tls::clients).transpose()?;
    let config = tls::server(certificate, key, clients.as_ref(), &["http/1.1"])?;
    Ok((TlsAcceptor::from(Arc::new(config)), clients))
}

/// The user of a client's certificate, if it is good now: common name, organizations as groups.
fn certificate_user(chain: &[CertificateDer<'_>], clients: &ClientVerifier) -> Option<User> {
    let (leaf, others) = chain.split_first()?;
    if let Err(error) = clients.verify_client_cert(leaf, others, UnixTime::now()) {
        tracing::debug!(error = &error as &dyn std::error::Error, "a client certificate is refused");
        return None;
    }
    let (_, certificate) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject.iter_organization().filter_map(|o| o.as_str().ok());
    let mut groups: Vec<String> = groups.map(str::to_owned).collect();
    groups.push("system:authenticated".to_owned());
    (!name.is_empty()).then_some(User { name, uid: String::new(), groups })
}

type Cache<K, V> = Mutex<HashMap<K, (Instant, V)>>;
type AccessKey = (User, String, String);

/// Authentication and authorization with their caches.
pub struct Auth {
    client: kube::Client,
    clients: Option<ClientVerifier>,
    node: String,
    tokens: Cache<String, Option<User>>,
    access: Cache<AccessKey, bool>,
}

impl Auth {
    /// With empty caches.
    pub fn new(client: kube::Client, clients: Option<ClientVerifier>, node: String) -> Self {
        Self { client, clients, node, tokens: Mutex::default(), access: Mutex::default() }
    }

    /// The caller, by the certificates of the connection, the client's own first, or by bearer token; anonymous callers are refused.
    pub async fn authenticate(&self, chain: &[CertificateDer<'_>], headers: &HeaderMap) -> Result<User, Refusal> {
        if let Some(user) = self.clients.as_ref().and_then(|clients| certificate_user(chain, clients)) {
            return Ok(user);
        }
        let unauthorized = || Refusal(StatusCode::UNAUTHORIZED, "Unauthorized".to_owned());
        let header = headers.get(http::header::AUTHORIZATION).and_then(|h| h.to_str().ok());
        let token = header.and_then(|h| h.strip_prefix("Bearer ")).map(str::trim).filter(|t| !t.is_empty());
        let token = token.ok_or_else(unauthorized)?;
        if let Some(user) = get(&self.tokens, &token.to_owned()) {
            return user.ok_or_else(unauthorized);
        }
        let user = self.review(token).await.map_err(|error| {
            tracing::warn!(error, "failed to review a token");
            unauthorized()
        })?;
        put(&self.tokens, token.to_owned(), user.clone(), TOKEN_TTL);
        user.ok_or_else(unauthorized)
    }

    async fn review(&self, token: &str) -> Result<Option<User>, String> {
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let spec = TokenReviewSpec { token: token.to_owned(), audiences: None };
        let review = TokenReview { spec, ..TokenReview::default() };
        let params = PostParams::default();
        let answer = tokio::time::timeout(REVIEW_TIMEOUT, api.create(&params, &review)).await;
        let status = answer.map_err(|_| "no answer".to_owned())?.map_err(|e| e.to_string())?.status;
        let status = status.unwrap_or_default();
        let user = status.user.filter(|_| status.authenticated == Some(true));
        Ok(user.map(|u| User {
            name: u.username.unwrap_or_default(),
            uid: u.uid.unwrap_or_default(),
            groups: u.groups.unwrap_or_default(),
        }))
    }

    /// Whether the caller may do this.
    pub async fn authorize(&self, user: &User, method: &Method, path: &str) -> Result<(), Refusal> {
        let verb = verb(method);
        let subresources = subresources(path);
        for subresource in &subresources {
            let key = (user.clone(), verb.to_owned(), (*subresource).to_owned());
            let allowed = match get(&self.access, &key) {
                Some(allowed) => allowed,
                None => {
                    let allowed = self.ask(user, verb, subresource).await.map_err(|error| {
                        tracing::warn!(error, "failed to review access");
                        let text =
                            format!("Authorization error (user={}, verb={verb}, resource=nodes, subresource={subresource})", user.name);
                        Refusal::internal(text)
                    })?;
                    put(&self.access, key, allowed, if allowed { ALLOWED_TTL } else { DENIED_TTL });
                    allowed
                }
            };
            if allowed {
                return Ok(());
            }
        }
        let list = subresources.join(" ");
        let text = format!("Forbidden (user={}, verb={verb}, resource=nodes, subresource(s)=[{list}])\n", user.name);
        Err(Refusal(StatusCode::FORBIDDEN, text))
    }

    async fn ask(&self, user: &User, verb: &str, subresource: &str) -> Result<bool, String> {
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(user.name.clone()),
                uid: Some(user.uid.clone()),
                groups: Some(user.groups.clone()),
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(verb.to_owned()),
                    version: Some("v1".to_owned()),
                    resource: Some("nodes".to_owned()),
                    subresource: Some(subresource.to_owned()),
                    name: Some(self.node.clone()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let params = PostParams::default();
        let answer = tokio::time::timeout(REVIEW_TIMEOUT, api.create(&params, &review)).await;
        let answer = answer.map_err(|_| "no answer".to_owned())?.map_err(|e| e.to_string())?;
        Ok(answer.status.is_some_and(|s| s.allowed))
    }
}

fn verb(method: &Method) -> &'static str {
    match method.as_str() {
        "POST" => "create",
        "GET" => "get",
        "PUT" => "update",
        "PATCH" => "patch",
        "DELETE" => "delete",
        _ => "",
    }
}

/// Subresources of `nodes`, any of which allows the path: the fine one first, `proxy` for all that has none of its own.
fn subresources(path: &str) -> Vec<&'static str> {
    let is = |prefix: &str| path == prefix || path.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'));
    let mut list = Vec::new();
    if is("/pods") || is("/runningpods") {
        list.push("pods");
    } else if is("/healthz") {
        list.push("healthz");
    } else if is("/configz") {
        list.push("configz");
    }
    list.push(if is("/stats") {
        "stats"
    } else if is("/metrics") {
        "metrics"
    } else if is("/logs") {
        "log"
    } else if is("/checkpoint") {
        "checkpoint"
    } else {
        "proxy"
    });
    list
}

fn get<K: std::hash::Hash + Eq, V: Clone>(cache: &Cache<K, V>, key: &K) -> Option<V> {
    let cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
    let (until, value) = cache.get(key)?;
    (Instant::now() < *until).then(|| value.clone())
}

fn put<K: std::hash::Hash + Eq, V>(cache: &Cache<K, V>, key: K, value: V, ttl: Duration) {
    let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    if cache.len() >= CACHE_MAX {
        cache.retain(|_, (until, _)| now < *until);
        if cache.len() >= CACHE_MAX {
            cache.clear();
        }
    }
    cache.insert(key, (now + ttl, value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_has_its_subresource() {
        for (path, expected) in [
            ("/pods", &["pods", "proxy"][..]),
            ("/healthz", &["healthz", "proxy"]),
            ("/stats/summary", &["stats"]),
            ("/metrics/cadvisor", &["metrics"]),
            ("/containerLogs/a/b/c", &["proxy"]),
            ("/exec/a/b/c", &["proxy"]),
            ("/podsy", &["proxy"]),
        ] {
            assert_eq!(subresources(path), expected, "{path}");
        }
    }
}
