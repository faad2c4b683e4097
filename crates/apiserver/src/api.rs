//! What all requests share, and the context of one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use apimachinery::status::Status;
use bytes::Bytes;
use http::HeaderMap;
use jiff::Timestamp;
use serde_json::Value;
use store::{RangeRequest, Store};
use tokio_util::sync::CancellationToken;

use crate::admission;
use crate::authn::User;
use crate::authn::token::{Issuer, Verifier};
use crate::authz::Authorizer;
use crate::cache::Cache;
use crate::cluster_ip::Ranges;
use crate::leases::EventLeases;
use crate::lookup::Lookup;
use crate::metrics::Looks;
use crate::negotiate::Accepted;
use crate::proxy::Kubelets;
use crate::request::{Query, RequestInfo};
use crate::resources::{Resource, Resources, Storage};

/// The server's parts.
pub struct Api {
    /// Facts of what is served.
    pub resources: Arc<Resources>,
    /// The store.
    pub store: Arc<dyn Store>,
    /// The watch cache over it.
    pub cache: Arc<Cache>,
    /// Look-ups for policy, over the cache.
    pub lookup: Arc<CacheLookup>,
    /// Who may do what.
    pub authorizer: Arc<Authorizer>,
    /// Checks tokens.
    pub verifier: Verifier,
    /// Makes tokens.
    pub issuer: Issuer,
    /// The server's own audiences.
    pub audiences: Vec<String>,
    /// Cluster IPs and node ports that may be given out.
    pub services: Ranges,
    /// The way to kubelets.
    pub kubelets: Kubelets,
    /// The last looks at what nodes use.
    pub looks: Looks,
    /// Leases that end events.
    pub event_leases: EventLeases,
    /// Where clients reach the server: `10.0.0.1:6443`.
    pub advertise: String,
    /// Places for requests that are no streams.
    pub places: tokio::sync::Semaphore,
    /// Places for watches.
    pub watches: Arc<tokio::sync::Semaphore>,
    /// Longest time of a request that is no stream.
    pub request_timeout: Duration,
    /// The bootstrap is done.
    pub ready: AtomicBool,
    /// The server is going down: watches end.
    pub closing: CancellationToken,
}

impl Api {
    /// Whether requests are to be sent here.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire) && !self.closing.is_cancelled()
    }
}

/// [`Lookup`] over the watch cache.
pub struct CacheLookup {
    /// Facts of what is served.
    pub resources: Arc<Resources>,
    /// The cache.
    pub cache: Arc<Cache>,
}

impl Lookup for CacheLookup {
    fn get(&self, resource: &str, namespace: &str, name: &str) -> Option<Arc<Value>> {
        let keyspace = self.resources.storage_of(resource)?;
        self.cache.get(keyspace, &self.resources.storages()[keyspace].key(namespace, name))?.parsed()
    }

    fn list(&self, resource: &str, namespace: Option<&str>) -> Vec<Arc<Value>> {
        let Some(keyspace) = self.resources.storage_of(resource) else { return Vec::new() };
        let prefix = self.resources.storages()[keyspace].collection(namespace.unwrap_or(""));
        self.cache.snapshot(keyspace, &prefix).entries.iter().filter_map(|entry| entry.parsed()).collect()
    }
}

/// An error of the store as the client sees it.
pub fn store_error(error: store::Error) -> Status {
    match &error {
        store::Error::Compacted { .. } => Status::expired(
            "The provided continue parameter is too old to display a consistent list result. You must start a new list without the continue parameter.",
        ),
        store::Error::RequestTooLarge { .. } => Status::too_large(&error.to_string()),
        store::Error::Closed => Status::unavailable("the server is shutting down"),
        _ => {
            tracing::error!(error = &error as &dyn std::error::Error, "the store failed");
            // With its causes: only they tell that a disk is full.
            let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
            let words: Vec<String> = causes.map(ToString::to_string).collect();
            Status::internal(words.join(": "))
        }
    }
}

/// One request for a resource.
pub struct Ctx<'a> {
    /// The server.
    pub api: &'a Arc<Api>,
    /// What is asked.
    pub info: &'a RequestInfo,
    /// With which parameters.
    pub query: &'a Query,
    /// By whom.
    pub user: &'a User,
    /// How the answer is to be encoded.
    pub accepted: Accepted,
    /// The request's headers.
    pub headers: &'a HeaderMap,
    /// The resource.
    pub resource: &'a Resource,
    /// When it came.
    pub now: Timestamp,
}

impl<'a> Ctx<'a> {
    /// The keyspace's number.
    ///
    /// # Errors
    /// 405 for a resource that is not stored.
    pub fn keyspace(&self) -> Result<usize, Status> {
        let facts = self.resource.facts;
        self.resource.storage.ok_or_else(|| Status::method_not_supported(&facts.group, &facts.resource, &self.info.verb))
    }

    /// The keyspace.
    ///
    /// # Errors
    /// 405 for a resource that is not stored.
    pub fn storage(&self) -> Result<&'a Storage, Status> {
        Ok(&self.api.resources.storages()[self.keyspace()?])
    }

    /// The key of the object that the path names.
    ///
    /// # Errors
    /// 405 for a resource that is not stored.
    pub fn key(&self) -> Result<String, Status> {
        Ok(self.storage()?.key(&self.info.namespace, &self.info.name))
    }

    /// 404 for the object that the path names.
    pub fn not_found(&self) -> Status {
        Status::not_found(&self.resource.facts.group, &self.resource.facts.resource, &self.info.name)
    }

    /// The present bytes and revision of the object that the path names.
    ///
    /// # Errors
    /// 404.
    pub async fn load(&self) -> Result<(Bytes, i64), Status> {
        let answer = self.api.store.range(RangeRequest::key(self.key()?)).await.map_err(store_error)?;
        answer.kvs.into_iter().next().map(|kv| (kv.value, kv.mod_revision)).ok_or_else(|| self.not_found())
    }

    /// Whether nothing may be changed (`dryRun=All`).
    ///
    /// # Errors
    /// 422 for another value.
    pub fn dry_run(&self) -> Result<bool, Status> {
        let mut found = false;
        for value in self.query.all("dryRun").filter(|value| !value.is_empty()) {
            if value != "All" {
                let error = apimachinery::field_error::FieldError::not_supported("dryRun", serde_json::json!([value]), &["All"]);
                return Err(Status::invalid("meta.k8s.io", "CreateOptions", "", &[error]));
            }
            found = true;
        }
        Ok(found)
    }

    /// The admission request for an object.
    pub fn admission<'b>(&'b self, operation: admission::Operation, name: &'b str, old: Option<&'b Value>) -> admission::Request<'b> {
        admission::Request {
            user: self.user,
            operation,
            group: &self.resource.facts.group,
            resource: &self.resource.facts.resource,
            subresource: &self.info.subresource,
            namespace: &self.info.namespace,
            name,
            old,
            lookup: self.api.lookup.as_ref(),
        }
    }

    /// The same request, for changing what it is about.
    pub fn copy(&self) -> Self {
        Self {
            api: self.api,
            info: self.info,
            query: self.query,
            user: self.user,
            accepted: self.accepted,
            headers: self.headers,
            resource: self.resource,
            now: self.now,
        }
    }

    /// Whether the user may also create what a PUT would create.
    ///
    /// # Errors
    /// 403.
    pub fn authorize_create(&self) -> Result<(), Status> {
        let info = RequestInfo { verb: "create".to_owned(), ..self.info.clone() };
        crate::router::authorize(self.api, self.user, &info, "")
    }
}
