//! From a request to its handler: authentication, authorization, dispatch, errors.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use apimachinery::selector::field::FieldSelector;
use apimachinery::status::Status;
use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use http::header::{AUTHORIZATION, UPGRADE};
use http::{HeaderMap, Method, Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use jiff::Timestamp;

use crate::api::{Api, Ctx};
use crate::authn::User;
use crate::authn::x509::Peer;
use crate::authz::{Attributes, Decision, forbidden};
use crate::negotiate::{self, Accepted};
use crate::reply::{self, Body};
use crate::request::{self, Query, RequestInfo};
use crate::{delete, discovery, impersonation, metrics, proxy, read, reviews, subresources, watch, write};

/// The largest body (upstream's `MaxRequestBodyBytes`).
const BODY_BYTES_MAX: usize = 3 << 20;
/// How much of a body that was refused is read all the same, so that its sender comes to read the answer, and for how long.
const SKIPPED_BYTES_MAX: usize = 16 << 20;
const SKIP_TIMEOUT: Duration = Duration::from_secs(5);
/// Paths that need no authorization (`--authorization-always-allow-paths`) and, with `/version`, no authentication.
const HEALTH_PATHS: &[&str] = &["/livez", "/readyz", "/healthz"];

/// Answers one request. `peer` is what the connection's client certificate says.
pub async fn handle(api: Arc<Api>, peer: Peer, request: Request<Incoming>) -> Response<Body> {
    let headers = request.headers().clone();
    let path = request.uri().path().to_owned();
    let mut request = Some(request);
    let outcome = AssertUnwindSafe(route(&api, peer, &mut request)).catch_unwind().await;
    if let Some(request) = request {
        skip(request.into_body()).await;
    }
    let status = match outcome {
        Ok(Ok(response)) => return response,
        Ok(Err(status)) => status,
        Err(_) => {
            tracing::error!(path, "a request's handler panicked");
            Status::internal("the request's handler panicked; this is a bug")
        }
    };
    if status.code >= 500 && status.code != 504 {
        tracing::warn!(path, code = status.code, message = status.message, "request failed");
    }
    reply::error(&status, negotiate::accept_or_json(&headers))
}

/// Reads and forgets a body that was refused before it was read: a client that is cut off while it still sends it may never see the
/// answer. A body that is too long or too slow for that is cut off.
async fn skip(mut body: Incoming) {
    let read = async {
        let mut bytes = 0;
        // A broken body does not change the answer.
        while let Some(Ok(frame)) = body.frame().await {
            bytes += frame.data_ref().map_or(0, Bytes::len);
            if bytes > SKIPPED_BYTES_MAX {
                return;
            }
        }
    };
    // Neither does a slow one.
    let _ = tokio::time::timeout(SKIP_TIMEOUT, read).await;
}

/// Takes `request` when its body is wanted; what is refused before that is left there.
async fn route(api: &Arc<Api>, peer: Peer, slot: &mut Option<Request<Incoming>>) -> Result<Response<Body>, Status> {
    let Some(request) = slot.as_ref() else { return Err(Status::internal("no request")) };
    let now = Timestamp::now();
    let query = Query::parse(request.uri().query().unwrap_or(""));
    let path = request.uri().path().to_owned();
    let mut info = request::parse(request.method(), &path, &query);
    let user = authenticate(api, &peer, request.headers(), &path, now)?;
    let user = impersonation::apply(api, user, request.headers())?;
    let resource = info.is_resource.then(|| api.resources.get(&info.group, &info.version, &info.resource)).flatten();
    let node = selector_facts(resource.map(|resource| resource.facts), &query, &mut info);
    if !HEALTH_PATHS.iter().any(|open| path == *open || path.starts_with(&format!("{open}/"))) {
        authorize(api, &user, &info, &node)?;
        // A WebSocket has to begin with GET, but what it does is what POST does.
        let streams = matches!(info.subresource.as_str(), "exec" | "attach" | "portforward");
        if streams && info.verb == "get" && request.headers().contains_key(UPGRADE) {
            authorize(api, &user, &RequestInfo { verb: "create".to_owned(), ..info.clone() }, &node)?;
        }
    }
    if request.method() == Method::HEAD || (!info.is_resource && request.method() != Method::GET) {
        return Err(wrong_method());
    }
    if !info.is_resource {
        return fixed(api, &path, &query, request.headers());
    }
    if info.group == metrics::GROUP {
        let answer = tokio::time::timeout(api.request_timeout, metrics::answer(api, &info, &query)).await;
        return answer.unwrap_or_else(|_| Err(Status::timeout("request did not complete within the allotted timeout", 0)));
    }
    let Some(resource) = resource else {
        // A group that is served answers by a Status, also for versions that it lacks.
        let known =
            apimachinery::kinds::all().any(|facts| facts.group == info.group && (!facts.group.is_empty() || facts.version == info.version));
        return if known { Err(Status::no_such_path()) } else { Ok(nothing()) };
    };
    let pretty = query.flag("pretty");
    let accepted = negotiate::accept(request.headers(), info.verb == "watch", pretty);
    let accepted = if info.subresource == "log" { Accepted::default() } else { accepted? };
    let headers = request.headers().clone();
    let ctx = Ctx { api, info: &info, query: &query, user: &user, accepted, headers: &headers, resource, now };
    check_scope(&ctx)?;
    match info.subresource.as_str() {
        "log" if info.verb == "get" => return proxy::log(&ctx).await,
        "exec" | "attach" | "portforward" => {
            let request = slot.take().ok_or_else(|| Status::internal("no request"))?;
            return proxy::stream(&ctx, request).await;
        }
        _ => {}
    }
    if info.verb == "watch" && info.subresource.is_empty() {
        return watch::watch(&ctx).await;
    }
    let Ok(_place) = api.places.try_acquire() else {
        return Err(Status::too_many_requests("Too many requests, please try again later.", 1));
    };
    let request = slot.take().ok_or_else(|| Status::internal("no request"))?;
    let work = async {
        let body = body(request.into_body()).await?;
        dispatch(&ctx, &body).await
    };
    tokio::time::timeout(api.request_timeout, work)
        .await
        .unwrap_or_else(|_| Err(Status::timeout("request did not complete within the allotted timeout", 0)))
}

async fn body(mut incoming: Incoming) -> Result<Bytes, Status> {
    let mut read = BytesMut::new();
    while let Some(frame) = incoming.frame().await {
        let frame = frame.map_err(|error| Status::bad_request(format!("failed to read the request's body: {error}")))?;
        let Some(data) = frame.data_ref() else { continue };
        if read.len() + data.len() > BODY_BYTES_MAX {
            drop(read);
            skip(incoming).await;
            return Err(Status::too_large(&format!("limit is {BODY_BYTES_MAX}")));
        }
        read.extend_from_slice(data);
    }
    Ok(read.freeze())
}

/// Who sends the request. A certificate that is not good is no harm to a good token, and makes nobody of who has none.
fn authenticate(api: &Api, peer: &Peer, headers: &HeaderMap, path: &str, now: Timestamp) -> Result<Arc<User>, Status> {
    let shown = peer.user(now);
    if let Ok(Some(user)) = shown {
        return Ok(user);
    }
    let header = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or("");
    if let Some((scheme, token)) = header.split_once(' ')
        && scheme.eq_ignore_ascii_case("bearer")
        && !token.trim().is_empty()
    {
        return match api.verifier.verify(token.trim(), &[], now, api.lookup.as_ref()) {
            Ok(user) => Ok(Arc::new(user)),
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, path, "request refused");
                Err(Status::unauthorized())
            }
        };
    }
    let open = path == "/version" || HEALTH_PATHS.iter().any(|open| path == *open || path.starts_with(&format!("{open}/")));
    if open && header.is_empty() && shown.is_ok() { Ok(Arc::new(User::anonymous())) } else { Err(Status::unauthorized()) }
}

/// What authorization reads of a field selector: `metadata.name` is the request's name, `spec.nodeName` is for the Node authorizer.
fn selector_facts(facts: Option<&'static apimachinery::KindFacts>, query: &Query, info: &mut RequestInfo) -> String {
    let (Some(facts), Some(text)) = (facts, query.get("fieldSelector")) else { return String::new() };
    if !matches!(info.verb.as_str(), "list" | "watch" | "deletecollection") {
        return String::new();
    }
    // A selector that cannot be read is refused by the handler; to authorization it says nothing.
    let Ok(selector) = FieldSelector::parse(facts, text) else { return String::new() };
    if let Some(name) = selector.exact("metadata.name").filter(|name| !name.is_empty()) {
        name.clone_into(&mut info.name);
    }
    selector.exact("spec.nodeName").unwrap_or("").to_owned()
}

/// Refuses what nobody allows.
///
/// # Errors
/// 403.
pub fn authorize(api: &Api, user: &User, info: &RequestInfo, node_name_selector: &str) -> Result<(), Status> {
    let attributes = Attributes {
        user,
        verb: &info.verb,
        api_group: &info.group,
        resource: &info.resource,
        subresource: &info.subresource,
        name: &info.name,
        namespace: &info.namespace,
        path: &info.path,
        is_resource: info.is_resource,
        node_name_selector,
    };
    match api.authorizer.authorize(&attributes) {
        Decision::Allow => Ok(()),
        Decision::NoOpinion(reason) => Err(forbidden(&attributes, &reason)),
    }
}

/// Paths that are no resources.
fn fixed(api: &Api, path: &str, query: &Query, headers: &HeaderMap) -> Result<Response<Body>, Status> {
    match path {
        "/" => return Ok(reply::json(&discovery::paths())),
        "/version" | "/version/" => return Ok(reply::bytes(200, "application/json", pretty(&discovery::version()))),
        "/livez" | "/readyz" | "/healthz" => return Ok(health(api, path, query)),
        "/openapi/v3" | "/openapi/v3/" => return Ok(reply::json(&apimachinery::openapi::v3_index())),
        _ => {}
    }
    if let Some(check) = HEALTH_PATHS.iter().find_map(|open| path.strip_prefix(&format!("{open}/"))) {
        return Ok(checks(api).into_iter().find(|(name, _)| *name == check).map_or_else(nothing, |(_, good)| verdict(good)));
    }
    if let Some(document) = path.strip_prefix("/openapi/v3/").and_then(apimachinery::openapi::v3_document) {
        return Ok(reply::bytes(200, "application/json", document.json.clone()));
    }
    Ok(discovery::answer(path, headers, &api.advertise).unwrap_or_else(nothing))
}

fn pretty(value: &serde_json::Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}

fn checks(api: &Api) -> [(&'static str, bool); 3] {
    [("ping", true), ("store", !api.closing.is_cancelled()), ("poststarthook/bootstrap", api.is_ready())]
}

fn verdict(good: bool) -> Response<Body> {
    if good { reply::text(200, "ok") } else { reply::text(500, "not ok") }
}

fn health(api: &Api, path: &str, query: &Query) -> Response<Body> {
    let name = path.trim_start_matches('/');
    // The server lives before it is ready.
    let checks: Vec<_> = checks(api).into_iter().filter(|(check, _)| name != "livez" || *check != "poststarthook/bootstrap").collect();
    let good = checks.iter().all(|(_, good)| *good);
    if good && !query.flag("verbose") {
        return reply::text(200, "ok");
    }
    let mut lines: String = checks
        .iter()
        .map(|(check, good)| if *good { format!("[+]{check} ok\n") } else { format!("[-]{check} failed: reason withheld\n") })
        .collect();
    lines.push_str(&if good { format!("{name} check passed\n") } else { format!("{name} check failed\n") });
    reply::text(if good { 200 } else { 500 }, lines)
}

/// The answer for a path that is nobody's.
fn nothing() -> Response<Body> {
    reply::text(404, "404 page not found\n")
}

fn wrong_method() -> Status {
    let message = "the server does not allow this method on the requested resource".to_owned();
    Status { code: 405, reason: "MethodNotAllowed", message, details: Some(serde_json::json!({})) }
}

/// Whether the path's form fits the resource's scope.
fn check_scope(ctx: &Ctx<'_>) -> Result<(), Status> {
    let facts = ctx.resource.facts;
    let collection = matches!(ctx.info.verb.as_str(), "list" | "watch");
    let own_namespace = facts.resource == "namespaces" && facts.group.is_empty();
    match (facts.namespaced, ctx.info.namespace.is_empty()) {
        (true, true) if !collection => Err(wrong_method()),
        (false, false) if !own_namespace => Err(Status::no_such_path()),
        _ => Ok(()),
    }
}

async fn dispatch(ctx: &Ctx<'_>, body: &[u8]) -> Result<Response<Body>, Status> {
    let facts = ctx.resource.facts;
    let (verb, subresource) = (ctx.info.verb.as_str(), ctx.info.subresource.as_str());
    let unsupported = || Err(wrong_method());
    if subresource.is_empty() {
        let collection_verb = matches!(verb, "create" | "list" | "deletecollection");
        // A named list comes from a field selector.
        if !facts.has_verb(verb) || (verb == "create" && !ctx.info.name.is_empty()) || (!collection_verb && ctx.info.name.is_empty()) {
            return unsupported();
        }
        return match verb {
            "get" => read::get(ctx).await,
            "list" => read::list(ctx).await,
            "create" if reviews::is_review(&facts.group, &facts.resource) => subresources::review(ctx, body).await,
            "create" if facts.kind == "Binding" => subresources::bind(ctx, body).await,
            "create" => write::create(ctx, body).await,
            "update" => write::update(ctx, body).await,
            "patch" => write::patch(ctx, body).await,
            "delete" => delete::delete(ctx, body).await,
            "deletecollection" => delete::collection(ctx, body).await,
            _ => unsupported(),
        };
    }
    let found = facts.subresource(subresource).ok_or_else(Status::no_such_path)?;
    if !discovery::is_served(subresource) {
        return Err(Status::unimplemented(&format!("{}/{subresource}", facts.resource)));
    }
    if !found.verbs.iter().any(|known| known == verb) {
        return unsupported();
    }
    match (subresource, verb) {
        ("scale", _) => subresources::scale(ctx, body).await,
        ("binding", _) => subresources::bind(ctx, body).await,
        ("token", _) => subresources::token(ctx, body).await,
        ("eviction", _) => delete::evict(ctx, body).await,
        ("status" | "finalize" | "ephemeralcontainers", "get") => read::get(ctx).await,
        ("status" | "finalize" | "ephemeralcontainers", "update") => write::update(ctx, body).await,
        ("status" | "finalize" | "ephemeralcontainers", "patch") => write::patch(ctx, body).await,
        _ => unsupported(),
    }
}
