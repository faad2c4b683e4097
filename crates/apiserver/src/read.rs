//! GET and LIST.

use std::time::Duration;

use apimachinery::selector::field::FieldSelector;
use apimachinery::selector::label::LabelSelector;
use apimachinery::status::Status;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::Response;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use store::{RangeRequest, prefix_end};

use crate::api::Ctx;
use crate::cache::attributes;
use crate::reply::{self, Body, ListMeta};
use crate::resources::Storage;
use crate::tables::Include;

/// How long a read waits for a revision that is not there yet (upstream's `blockTimeout`).
pub const FRESHNESS_TIMEOUT: Duration = Duration::from_secs(3);
/// Keys that one step over the store's range reads.
const RANGE_CHUNK: i64 = 1000;

/// Label and field selector of a request.
#[derive(Debug, Clone, Default)]
pub struct Selectors {
    /// Labels.
    pub labels: LabelSelector,
    /// Fields.
    pub fields: FieldSelector,
}

impl Selectors {
    /// From the query.
    ///
    /// # Errors
    /// 400 with upstream's text.
    pub fn parse(ctx: &Ctx<'_>) -> Result<Self, Status> {
        let labels = LabelSelector::parse(ctx.query.get("labelSelector").unwrap_or("")).map_err(Status::bad_request)?;
        let fields = FieldSelector::parse(ctx.resource.facts, ctx.query.get("fieldSelector").unwrap_or("")).map_err(Status::bad_request)?;
        Ok(Self { labels, fields })
    }

    /// Whether everything matches.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    /// Whether an object (or its [`attributes`]) matches.
    pub fn matches(&self, ctx_facts: &'static apimachinery::KindFacts, object: &Value) -> bool {
        (self.labels.is_empty() || self.labels.matches_object(object)) && (self.fields.is_empty() || self.fields.matches(ctx_facts, object))
    }
}

/// A resourceVersion of a query: `None` for an absent one.
///
/// # Errors
/// 400 for what is no number.
pub fn resource_version(ctx: &Ctx<'_>) -> Result<Option<i64>, Status> {
    let Some(text) = ctx.query.get("resourceVersion") else { return Ok(None) };
    text.parse::<u64>().ok().and_then(|revision| i64::try_from(revision).ok()).map(Some).ok_or_else(|| {
        Status::bad_request(format!(
            "invalid resource version: resourceVersion: Invalid value: \"{text}\": strconv.ParseUint: parsing \"{text}\": invalid syntax"
        ))
    })
}

/// Waits until the cache has seen a revision.
///
/// # Errors
/// 504 with the cause that client-go knows.
pub async fn wait_for(ctx: &Ctx<'_>, revision: i64) -> Result<(), Status> {
    if ctx.api.cache.revision() < revision {
        // An etcd is asked, so that it tells the cache of a revision that changed nothing of ours. If it fails, so does the wait.
        let _ = ctx.api.store.revision().await;
    }
    if ctx.api.cache.reached(revision, FRESHNESS_TIMEOUT).await {
        return Ok(());
    }
    let mut status = Status::timeout(&format!("Too large resource version: {revision}, current: {}", ctx.api.cache.revision()), 1);
    if let Some(details) = &mut status.details {
        details["causes"] = serde_json::json!([{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]);
    }
    Err(status)
}

/// GET of one object.
pub async fn get(ctx: &Ctx<'_>) -> Result<Response<Body>, Status> {
    if let Some(revision) = resource_version(ctx)?
        && revision > 0
    {
        wait_for(ctx, revision).await?;
    }
    let (stored, revision) = ctx.load().await?;
    let include = Include::parse(ctx.query.get("includeObject"))?;
    let body = reply::render_stored(ctx.resource, ctx.accepted, &stored, revision, include, true)?;
    Ok(reply::bytes(200, ctx.accepted.media.as_str(), body))
}

#[derive(Serialize, Deserialize)]
struct Token {
    v: String,
    rv: i64,
    start: String,
}

fn token(revision: i64, start: &str) -> String {
    let token = Token { v: "meta.k8s.io/v1".to_owned(), rv: revision, start: start.to_owned() };
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).unwrap_or_default())
}

fn read_token(text: &str) -> Result<Token, Status> {
    let invalid = |why: &str| Status::bad_request(format!("invalid continue token: continue key is not valid: {why}"));
    let bytes = URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).map_err(|error| invalid(&error.to_string()))?;
    let token: Token = serde_json::from_slice(&bytes).map_err(|error| invalid(&error.to_string()))?;
    if token.v != "meta.k8s.io/v1" {
        return Err(invalid(&format!("server does not recognize this encoded version \"{}\"", token.v)));
    }
    if token.start.is_empty() || token.start.split('/').any(|part| part == "..") {
        return Err(invalid("encoded start key is not valid"));
    }
    Ok(token)
}

/// One page of a list.
struct Page {
    items: Vec<(Bytes, i64)>,
    meta: ListMeta,
}

/// LIST of a collection.
pub async fn list(ctx: &Ctx<'_>) -> Result<Response<Body>, Status> {
    let storage = ctx.storage()?;
    let page = page(ctx, storage).await?;
    let items = page.items.iter().map(|(stored, revision)| (stored.as_ref(), *revision));
    let include = Include::parse(ctx.query.get("includeObject"))?;
    let body = reply::list(ctx.resource, storage, ctx.accepted, items, &page.meta, include)?;
    Ok(reply::bytes(200, ctx.accepted.media.as_str(), body))
}

/// Everything that a request's selectors match, at the present.
pub async fn matching(ctx: &Ctx<'_>) -> Result<Vec<std::sync::Arc<crate::cache::Entry>>, Status> {
    let selectors = Selectors::parse(ctx)?;
    let storage = ctx.storage()?;
    wait_for(ctx, ctx.api.store.revision().await.map_err(crate::api::store_error)?).await?;
    let mut entries = ctx.api.cache.snapshot(ctx.keyspace()?, &storage.collection(&ctx.info.namespace)).entries;
    entries.retain(|entry| selectors.matches(ctx.resource.facts, &entry.attributes));
    Ok(entries)
}

async fn page(ctx: &Ctx<'_>, storage: &Storage) -> Result<Page, Status> {
    let selectors = Selectors::parse(ctx)?;
    let limit = match ctx.query.get("limit") {
        None => 0,
        Some(text) => text
            .parse::<i64>()
            .ok()
            .map(|limit| limit.max(0))
            .ok_or_else(|| Status::bad_request(format!("strconv.ParseInt: parsing \"{text}\": invalid syntax")))?,
    };
    if let Some(text) = ctx.query.get("timeoutSeconds")
        && text.parse::<i64>().is_err()
    {
        return Err(Status::bad_request(format!("strconv.ParseInt: parsing \"{text}\": invalid syntax")));
    }
    let prefix = storage.collection(&ctx.info.namespace);
    let wanted = resource_version(ctx)?;
    let exact = check_match(ctx, wanted)?;
    if let Some(next) = ctx.query.get("continue") {
        if wanted.is_some_and(|revision| revision > 0) {
            return Err(Status::bad_request("specifying resource version is not allowed when using continue"));
        }
        let token = read_token(next)?;
        return stored_page(ctx, &selectors, &prefix, &token.start, token.rv, limit).await;
    }
    match wanted {
        Some(revision) if exact || (limit > 0 && revision > 0 && ctx.query.get("resourceVersionMatch").is_none()) => {
            wait_for(ctx, revision).await?;
            return stored_page(ctx, &selectors, &prefix, "", revision, limit).await;
        }
        Some(0) => {}
        Some(revision) => wait_for(ctx, revision).await?,
        None => wait_for(ctx, ctx.api.store.revision().await.map_err(crate::api::store_error)?).await?,
    }
    cached_page(ctx, &selectors, &prefix, limit)
}

/// Checks resourceVersionMatch; whether it is `Exact`.
fn check_match(ctx: &Ctx<'_>, wanted: Option<i64>) -> Result<bool, Status> {
    let Some(text) = ctx.query.get("resourceVersionMatch") else { return Ok(false) };
    let field = "resourceVersionMatch";
    let error = if wanted.is_none() {
        apimachinery::field_error::FieldError::forbidden(field, "resourceVersionMatch is forbidden unless resourceVersion is provided")
    } else if ctx.query.get("continue").is_some() {
        apimachinery::field_error::FieldError::forbidden(field, "resourceVersionMatch is forbidden when continue is provided")
    } else if !matches!(text, "Exact" | "NotOlderThan") {
        apimachinery::field_error::FieldError::not_supported(field, text, &["Exact", "NotOlderThan", ""])
    } else if text == "Exact" && wanted == Some(0) {
        apimachinery::field_error::FieldError::forbidden(field, "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"")
    } else {
        return Ok(text == "Exact");
    };
    Err(Status::invalid("meta.k8s.io", "ListOptions", "", &[error]))
}

fn cached_page(ctx: &Ctx<'_>, selectors: &Selectors, prefix: &str, limit: i64) -> Result<Page, Status> {
    let snapshot = ctx.api.cache.snapshot(ctx.keyspace()?, prefix);
    let total = snapshot.entries.len();
    let limit = usize::try_from(limit).unwrap_or(0);
    let mut page = Page { items: Vec::new(), meta: ListMeta { revision: snapshot.revision, ..ListMeta::default() } };
    let mut last = "";
    // Upstream reads the one object of a name as such.
    let single = selectors.fields.exact("metadata.name").is_some();
    for (index, entry) in snapshot.entries.iter().enumerate() {
        // Whether what follows matches is not looked at, neither here nor by upstream.
        if limit > 0 && page.items.len() == limit && !single {
            page.meta.next = token(snapshot.revision, &format!("{}\0", &last[prefix.len()..]));
            if selectors.is_empty() {
                page.meta.remaining = i64::try_from(total - index).ok();
            }
            break;
        }
        if selectors.matches(ctx.resource.facts, &entry.attributes) {
            page.items.push((entry.value.clone(), entry.revision));
            last = &entry.key;
        }
    }
    Ok(page)
}

async fn stored_page(ctx: &Ctx<'_>, selectors: &Selectors, prefix: &str, start: &str, revision: i64, limit: i64) -> Result<Page, Status> {
    let end = prefix_end(prefix.as_bytes());
    let mut from = format!("{prefix}{start}");
    let mut page = Page { items: Vec::new(), meta: ListMeta { revision, ..ListMeta::default() } };
    loop {
        let chunk = if limit > 0 && selectors.is_empty() { limit } else { RANGE_CHUNK };
        let request =
            RangeRequest { key: Bytes::from(from.clone()), range_end: end.clone(), limit: chunk, revision, ..RangeRequest::default() };
        let answer = ctx.api.store.range(request).await.map_err(crate::api::store_error)?;
        let found = answer.kvs.len();
        for (index, kv) in answer.kvs.into_iter().enumerate() {
            let matches = selectors.is_empty()
                || serde_json::from_slice(&kv.value).is_ok_and(|object| selectors.matches(ctx.resource.facts, &attributes(object)));
            from = format!("{}\0", String::from_utf8_lossy(&kv.key));
            if matches {
                page.items.push((kv.value, kv.mod_revision));
            }
            let more = index + 1 < found || answer.more;
            if limit > 0 && i64::try_from(page.items.len()).unwrap_or(i64::MAX) == limit && more {
                page.meta.next = token(revision, &from[prefix.len()..]);
                if selectors.is_empty() {
                    page.meta.remaining = Some(answer.count - i64::try_from(index + 1).unwrap_or(0));
                }
                return Ok(page);
            }
        }
        if !answer.more {
            return Ok(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continue_tokens_read_back_and_rubbish_is_refused() {
        let text = token(7, "ns/a\0");
        let back = read_token(&text).expect("own token");
        assert_eq!((back.rv, back.start.as_str()), (7, "ns/a\0"));
        assert_eq!(read_token("x!").map_err(|status| status.code).err(), Some(400));
        assert_eq!(read_token(&token(7, "../x")).map_err(|status| status.code).err(), Some(400));
    }
}
