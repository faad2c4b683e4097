//! What the server does once its cache is full, before it is ready: repairs the allocations, makes the objects that a
//! cluster begins with, and publishes itself as the service `kubernetes`.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use apimachinery::Gvk;
use apimachinery::status::Status;
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use http::HeaderMap;
use serde_json::{Value, json};

use crate::api::{Api, Ctx};
use crate::authn::User;
use crate::negotiate::Accepted;
use crate::publish::Publisher;
use crate::request::{Query, RequestInfo};
use crate::resources::Resource;
use crate::write::{Step, create_object, guaranteed_update, prepare_update};
use crate::{allocations, bootstrap, object};

/// Where the server is reached.
#[derive(Debug, Clone)]
pub struct Place {
    /// Address in the endpoints.
    pub address: Ipv4Addr,
    /// Port.
    pub port: u16,
    /// The cluster IP of the service `kubernetes`.
    pub cluster_ip: Ipv4Addr,
    /// PEM of the authority of client certificates.
    pub client_ca: String,
}

/// Objects that are made at one time.
const AT_ONCE: usize = 32;

/// Makes or repairs everything.
///
/// # Errors
/// The first object that the server's own rules or the store refuse.
pub async fn run(api: &Arc<Api>, place: &Place, publisher: &mut Publisher) -> Result<(), Status> {
    allocations::repair(api).await?;
    // Namespaces come before what is in them; the rest is made side by side, so that the store commits it in groups.
    let all: Vec<Value> = bootstrap::objects().into_iter().chain(own_objects(place)).collect();
    let (namespaces, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(|object| object::text(object, &["kind"]) == "Namespace");
    for wanted in &namespaces {
        ensure(api, wanted).await?;
    }
    let work: Vec<BoxFuture<'static, Result<(), Status>>> = rest.into_iter().map(|wanted| ensure_owned(api.clone(), wanted)).collect();
    futures::stream::iter(work).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
    // A loopback address would lead every pod to itself; upstream does not accept one either.
    if place.address.is_loopback() {
        tracing::warn!(address = %place.address, "the service kubernetes has no endpoint: give an --advertise-address that pods can reach");
    }
    publisher.publish(api, place).await
}

/// Objects that depend on where the server is.
fn own_objects(place: &Place) -> Vec<Value> {
    vec![json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "extension-apiserver-authentication", "namespace": "kube-system"},
        "data": {"client-ca-file": place.client_ca}})]
}

/// The Service by which pods reach the API servers.
pub fn kubernetes_service(place: &Place) -> Value {
    json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {"type": "ClusterIP", "clusterIP": place.cluster_ip, "sessionAffinity": "None",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": place.port}]}})
}

/// Its endpoints.
pub fn kubernetes_slice(place: &Place, addresses: &BTreeSet<Ipv4Addr>) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|address| json!({"addresses": [address], "conditions": {"ready": true}})).collect();
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "https", "port": place.port, "protocol": "TCP"}]})
}

/// Fields of these that are kept as wanted.
const OWN_FIELDS: &[&str] = &["endpoints", "ports", "data"];

fn reconcile(existing: &Value, wanted: &Value) -> Option<Value> {
    let own = object::text(wanted, &["metadata", "namespace"]);
    if own.is_empty() || object::text(wanted, &["apiVersion"]).starts_with("rbac.") {
        return bootstrap::reconcile(Some(existing), wanted);
    }
    let mut object = existing.clone();
    for field in OWN_FIELDS {
        if let Some(value) = wanted.get(*field) {
            object[*field] = value.clone();
        }
    }
    (object != *existing).then_some(object)
}

fn ensure_owned(api: Arc<Api>, wanted: Value) -> BoxFuture<'static, Result<(), Status>> {
    async move { ensure(&api, &wanted).await }.boxed()
}

/// Makes an object, or gives it back the fields that are kept as wanted.
///
/// # Errors
/// What the server's own rules or the store refuse.
pub async fn ensure(api: &Arc<Api>, wanted: &Value) -> Result<(), Status> {
    let gvk = Gvk::of(wanted).ok_or_else(|| Status::internal("a bootstrap object has no kind"))?;
    let facts = apimachinery::kinds::by_gvk(&gvk).ok_or_else(|| Status::internal(format!("bootstrap object of unknown kind {gvk}")))?;
    let resource: &Resource =
        api.resources.get(&facts.group, &facts.version, &facts.resource).ok_or_else(|| Status::internal("a kind without resource"))?;
    let user = User { name: "system:apiserver".to_owned(), groups: vec!["system:masters".to_owned()], ..User::default() };
    let (query, headers) = (Query::default(), HeaderMap::new());
    let info = RequestInfo {
        verb: "patch".to_owned(),
        is_resource: true,
        group: facts.group.clone(),
        version: facts.version.clone(),
        resource: facts.resource.clone(),
        namespace: object::text(wanted, &["metadata", "namespace"]).to_owned(),
        name: object::name(wanted).to_owned(),
        ..RequestInfo::default()
    };
    let ctx = Ctx {
        api,
        info: &info,
        query: &query,
        user: &user,
        accepted: Accepted::default(),
        headers: &headers,
        resource,
        now: jiff::Timestamp::now(),
    };
    let failed = |status: Status| Status::internal(format!("failed to make {gvk} {}: {}", info.name, status.message));
    match ctx.load().await {
        Err(status) if status.code == 404 => match create_object(&ctx, wanted.clone(), false, &mut Vec::new()).await {
            // Another server of the same etcd may have been quicker, also with the cluster IP.
            Err(status) if ctx.load().await.is_err() => return Err(failed(status)),
            Err(_) => {}
            Ok(_) => return Ok(()),
        },
        Err(status) => return Err(failed(status)),
        Ok(_) => {}
    }
    let update = guaranteed_update(&ctx, false, |old| match reconcile(old, wanted) {
        Some(new) => prepare_update(&ctx, old, new),
        None => Ok(Step::Put(old.clone())),
    });
    update.await.map(drop).map_err(failed)
}
