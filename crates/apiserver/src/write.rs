//! POST, PUT and PATCH: decode, admit, default, validate, one store transaction.
//!
//! ```text
//! body ─> decode ─> system fields ─> default ─> admit ─> prepare ─> validate ─> admit (validating) ─> allocate ─> txn
//!                                        ^                                                               │
//!                                        └──────────── patches and unconditional updates: on conflict ───┘
//! ```

use apimachinery::codec::{self, strict};
use apimachinery::field_error::FieldError;
use apimachinery::patch;
use apimachinery::schema::TypeId;
use apimachinery::status::Status;
use apimachinery::{defaulting, strategy, support, validation};
use bytes::Bytes;
use http::Response;
use serde_json::Value;
use store::{Compare, DeleteRequest, Op, PutRequest, RangeRequest, Txn};

use crate::admission::{self, Operation};
use crate::allocations::Allocation;
use crate::api::{Ctx, store_error};
use crate::reply::{self, Body};
use crate::tables::Include;
use crate::{allocations, escalation, names, negotiate, object, read, resources};

/// Tries of an update whose transaction loses a race.
const UPDATE_TRIES_MAX: usize = 10;
/// Tries of a creation whose addresses and ports others take first.
const CREATE_TRIES_MAX: usize = 100;
/// Tries of a generated name (upstream's `maxNameGenerationCreateAttempts`).
const GENERATE_TRIES_MAX: usize = 8;

/// How `fieldValidation` treats unknown and duplicate fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldValidation {
    /// They are dropped.
    Ignore,
    /// They are dropped, with a warning each.
    Warn,
    /// 400.
    Strict,
}

/// Reads `fieldValidation`.
///
/// # Errors
/// 422 for another value.
pub fn field_validation(ctx: &Ctx<'_>) -> Result<FieldValidation, Status> {
    match ctx.query.get("fieldValidation") {
        None | Some("Warn") => Ok(FieldValidation::Warn),
        Some("Ignore") => Ok(FieldValidation::Ignore),
        Some("Strict") => Ok(FieldValidation::Strict),
        Some(other) => {
            let error = FieldError::not_supported("fieldValidation", other, &["", "Ignore", "Strict", "Warn"]);
            Err(Status::invalid("meta.k8s.io", "CreateOptions", "", &[error]))
        }
    }
}

/// Decodes a body that holds an object of the kind `wanted`; warnings are appended.
///
/// # Errors
/// 400, 415.
pub fn decode(ctx: &Ctx<'_>, body: &[u8], wanted: &apimachinery::Gvk, warnings: &mut Vec<String>) -> Result<Value, Status> {
    let media = negotiate::body_media(ctx.headers)?;
    let decoded = codec::decode(media, body, wanted)?;
    match field_validation(ctx)? {
        FieldValidation::Strict => {
            if let Some(status) = decoded.strict_error(wanted) {
                return Err(status);
            }
        }
        FieldValidation::Warn => warnings.extend(decoded.strict),
        FieldValidation::Ignore => {}
    }
    Ok(decoded.object)
}

/// An object as it was stored, or would have been.
pub struct Stored {
    /// The bytes.
    pub value: Bytes,
    /// Its resourceVersion.
    pub revision: i64,
}

/// Answers with a stored object.
///
/// # Errors
/// When it cannot be encoded as asked.
pub fn answer(ctx: &Ctx<'_>, code: u16, stored: &Stored, warnings: &[String]) -> Result<Response<Body>, Status> {
    let include = Include::parse(ctx.query.get("includeObject")).unwrap_or_default();
    let body = reply::render_stored(ctx.resource, ctx.accepted, &stored.value, stored.revision, include, true)?;
    let mut response = reply::bytes(code, ctx.accepted.media.as_str(), body);
    reply::warn(&mut response, warnings);
    Ok(response)
}

fn seconds(now: jiff::Timestamp) -> Value {
    apimachinery::time::format_seconds(now).into()
}

/// Checks and fills in what the path says of the object: namespace, and name for updates.
fn check_path(ctx: &Ctx<'_>, object: &mut Value) -> Result<(), Status> {
    let namespaced = ctx.resource.facts.namespaced;
    let path_namespace = ctx.info.namespace.clone();
    let wanted_name = ctx.info.name.clone();
    let metadata = object::metadata_mut(object).ok_or_else(|| Status::bad_request("the object provided has no metadata"))?;
    metadata.remove("managedFields");
    metadata.remove("selfLink");
    let own = metadata.get("namespace").and_then(Value::as_str).unwrap_or("");
    if namespaced {
        if !own.is_empty() && own != path_namespace {
            return Err(Status::bad_request("the namespace of the provided object does not match the namespace sent on the request"));
        }
        metadata.insert("namespace".to_owned(), path_namespace.into());
    } else if !own.is_empty() {
        return Err(Status::bad_request("namespace must not be specified on this object"));
    }
    if wanted_name.is_empty() {
        return Ok(());
    }
    let own = metadata.get("name").and_then(Value::as_str).unwrap_or("");
    if own.is_empty() {
        metadata.insert("name".to_owned(), wanted_name.into());
    } else if own != wanted_name {
        return Err(Status::bad_request(format!("the name of the object ({own}) does not match the name on the URL ({wanted_name})")));
    }
    Ok(())
}

fn to_stored_kind(ctx: &Ctx<'_>, mut object: Value) -> Result<Value, Status> {
    if ctx.resource.converted {
        apimachinery::convert::convert(&mut object, &ctx.storage()?.facts.gvk());
    }
    Ok(object)
}

fn invalid(ctx: &Ctx<'_>, object: &Value, errors: &[FieldError]) -> Result<(), Status> {
    if errors.is_empty() {
        return Ok(());
    }
    // Upstream knows only one Event inside, that of the core group.
    let group = if ctx.resource.converted { "" } else { ctx.resource.facts.group.as_str() };
    Err(Status::invalid(group, &ctx.resource.facts.kind, object::name(object), errors))
}

/// POST of an object.
pub async fn create(ctx: &Ctx<'_>, body: &[u8]) -> Result<Response<Body>, Status> {
    let started = std::time::Instant::now();
    let dry_run = ctx.dry_run()?;
    let mut warnings = Vec::new();
    let mut object = decode(ctx, body, &ctx.resource.facts.gvk(), &mut warnings)?;
    check_path(ctx, &mut object)?;
    if !object::text(&object, &["metadata", "resourceVersion"]).is_empty() {
        let message = "resourceVersion should not be set on objects to be created".to_owned();
        return Err(Status { code: 500, reason: "", message, details: None });
    }
    let stored = create_object(ctx, object, dry_run, &mut warnings).await?;
    span(ctx, &stored, started);
    answer(ctx, 201, &stored, &warnings)
}

/// Emits the trace span of a created pod (DESIGN.md, section 3).
fn span(ctx: &Ctx<'_>, stored: &Stored, started: std::time::Instant) {
    if ctx.resource.facts.resource != "pods" {
        return;
    }
    let Ok(pod) = serde_json::from_slice::<Value>(&stored.value) else { return };
    let uid = object::text(&pod, &["metadata", "uid"]);
    let duration_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    let start_us = u64::try_from(ctx.now.as_microsecond()).unwrap_or(0);
    tracing::info!(target: "coracle::span", pod_uid = %uid, hop = "apiserver.create", start_us, duration_us);
}

/// Creates a decoded object whose path has been checked.
///
/// # Errors
/// Whatever admission, validation and the store refuse.
pub async fn create_object(ctx: &Ctx<'_>, mut object: Value, dry_run: bool, warnings: &mut Vec<String>) -> Result<Stored, Status> {
    let facts = ctx.resource.facts;
    let generate = {
        let metadata = object::metadata_mut(&mut object).ok_or_else(|| Status::bad_request("the object provided has no metadata"))?;
        for field in ["deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "managedFields", "resourceVersion"] {
            metadata.remove(field);
        }
        metadata.insert("uid".to_owned(), uuid::Uuid::new_v4().to_string().into());
        metadata.insert("creationTimestamp".to_owned(), seconds(ctx.now));
        let named = metadata.get("name").and_then(Value::as_str).is_some_and(|name| !name.is_empty());
        let base = metadata.get("generateName").and_then(Value::as_str).filter(|base| !named && !base.is_empty());
        base.map(str::to_owned)
    };
    for attempt in 1.. {
        let mut candidate = if generate.is_some() { object.clone() } else { std::mem::take(&mut object) };
        if let Some(base) = &generate {
            candidate["metadata"]["name"] = names::generate(base).into();
        }
        let last = generate.is_none() || attempt == GENERATE_TRIES_MAX;
        match create_once(ctx, candidate, dry_run, warnings).await {
            Err(status) if status.reason == "AlreadyExists" && !last => {}
            outcome => return outcome,
        }
    }
    Err(Status::server_timeout(&facts.group, &facts.resource, "create", 1))
}

async fn create_once(ctx: &Ctx<'_>, mut object: Value, dry_run: bool, warnings: &mut Vec<String>) -> Result<Stored, Status> {
    let facts = ctx.resource.facts;
    let name = object::name(&object).to_owned();
    // Admission looks things up in the cache, which must have seen what was acknowledged before this request.
    read::wait_for(ctx, ctx.api.store.revision().await.map_err(store_error)?).await?;
    defaulting::default(facts, &mut object);
    // No field is ignored in silence: what the system does not carry out is refused or warned of, before admission adds to it.
    let (refused, warned) = support::check(facts, &object);
    let request = ctx.admission(Operation::Create, &name, None);
    admission::admit(&request, Some(&mut object))?;
    // Admission may have put in objects (volumes, probes) that have defaults of their own.
    defaulting::default(facts, &mut object);
    strategy::prepare_create(facts, &mut object);
    invalid(ctx, &object, &validation::create(facts, &object))?;
    if name.is_empty() || !apimachinery::formats::path_segment(&name).is_empty() {
        return invalid(ctx, &object, &[FieldError::required("metadata.name", "name or generateName is required")])
            .and_then(|()| Err(Status::bad_request("invalid name")));
    }
    // Said last: an object that is wrong in itself gets upstream's words for it.
    invalid(ctx, &object, &refused)?;
    warnings.extend(warned);
    admission::validate(&request, Some(&object))?;
    escalation::check(ctx, &object, None)?;
    warnings.extend(strategy::warnings_create(facts, &object));
    let object = to_stored_kind(ctx, object)?;
    let key = ctx.storage()?.key(&ctx.info.namespace, &name);
    commit_create(ctx, key, object, dry_run).await
}

async fn commit_create(ctx: &Ctx<'_>, key: String, mut object: Value, dry_run: bool) -> Result<Stored, Status> {
    let facts = ctx.resource.facts;
    let name = object::name(&object).to_owned();
    let exists = || Status::already_exists(&facts.group, &facts.resource, &name);
    let mut allocation = Allocation::default();
    for _ in 0..CREATE_TRIES_MAX {
        // Only a Service may need more than one try.
        let mut given = if allocations::is_service(ctx) { object.clone() } else { std::mem::take(&mut object) };
        let change = allocation.change(ctx, Some(&mut given), None).await?;
        let value: Bytes = object::encode(&given).map_err(|error| Status::internal(error.to_string()))?.into();
        if dry_run {
            Allocation::check(ctx, change).await?;
            let found = ctx.api.store.range(RangeRequest::key(key)).await.map_err(store_error)?;
            return if found.kvs.is_empty() { Ok(Stored { value, revision: 0 }) } else { Err(exists()) };
        }
        let put = PutRequest { key: key.clone().into(), value: value.clone(), lease: event_lease(ctx).await?, prev_kv: false };
        let mut txn = Txn { compare: vec![Compare::mod_revision(key.clone(), 0)], success: vec![Op::Put(put)], failure: Vec::new() };
        change.join(&mut txn);
        let outcome = ctx.api.store.txn(txn).await.map_err(store_error)?;
        if outcome.succeeded {
            return Ok(Stored { value, revision: outcome.revision });
        }
        if !allocation.lost(ctx, change, outcome).await? {
            return Err(exists());
        }
    }
    Err(Status::server_timeout(&facts.group, &facts.resource, "create", 1))
}

async fn event_lease(ctx: &Ctx<'_>) -> Result<i64, Status> {
    if ctx.resource.facts.resource == "events" { ctx.api.event_leases.lease(ctx.api.store.as_ref()).await } else { Ok(0) }
}

/// What an update makes of an object.
pub enum Step {
    /// This.
    Put(Value),
    /// Its end; this is how it was last.
    Delete(Value),
}

/// What became of an update.
pub struct Updated {
    /// The object.
    pub stored: Stored,
    /// It is gone.
    pub deleted: bool,
}

/// Reads, changes and writes an object until no other writer came in between.
///
/// # Errors
/// 404, 409 after too many tries, and whatever `change` refuses.
pub async fn guaranteed_update(
    ctx: &Ctx<'_>,
    dry_run: bool,
    mut change: impl FnMut(&Value) -> Result<Step, Status>,
) -> Result<Updated, Status> {
    let facts = ctx.resource.facts;
    let key = ctx.key()?;
    let mut allocation = Allocation::default();
    for _ in 0..UPDATE_TRIES_MAX {
        let (bytes, revision) = ctx.load().await?;
        let old = reply::parse(&bytes, revision)?;
        let (mut new, delete) = match change(&old)? {
            Step::Put(new) => (new, false),
            Step::Delete(last) => (last, true),
        };
        let change = allocation.change(ctx, (!delete).then_some(&mut new), Some(&old)).await?;
        let value: Bytes = object::encode(&new).map_err(|error| Status::internal(error.to_string()))?.into();
        if dry_run || (!delete && value == bytes) {
            Allocation::check(ctx, change).await?;
            return Ok(Updated { stored: Stored { value, revision }, deleted: delete });
        }
        let op = if delete {
            Op::Delete(DeleteRequest { key: key.clone().into(), ..DeleteRequest::default() })
        } else {
            Op::Put(PutRequest { key: key.clone().into(), value: value.clone(), lease: event_lease(ctx).await?, prev_kv: false })
        };
        let mut txn = Txn { compare: vec![Compare::mod_revision(key.clone(), revision)], success: vec![op], failure: Vec::new() };
        change.join(&mut txn);
        let outcome = ctx.api.store.txn(txn).await.map_err(store_error)?;
        if outcome.succeeded {
            return Ok(Updated { stored: Stored { value, revision: outcome.revision }, deleted: delete });
        }
        allocation.lost(ctx, change, outcome).await?;
    }
    Err(Status::modified(&facts.group, &facts.resource, &ctx.info.name))
}

/// Fields of the metadata that only the server writes.
const SERVER_FIELDS: &[&str] = &["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generateName"];

/// Whether an object that is being deleted has nothing left that holds it.
pub fn is_released(object: &Value) -> bool {
    let grace = object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
    let namespace_held = object::text(object, &["kind"]) == "Namespace"
        && object.pointer("/spec/finalizers").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
    object::is_deleting(object) && object::finalizers(object).is_empty() && grace == 0 && !namespace_held
}

/// Turns the wanted object into what is stored: preconditions, server fields, admission, defaults, strategy, validation.
///
/// # Errors
/// 409, 422 and whatever admission refuses.
pub fn prepare_update(ctx: &Ctx<'_>, old: &Value, mut new: Value) -> Result<Step, Status> {
    let facts = ctx.resource.facts;
    let (uid, old_uid) = (object::text(&new, &["metadata", "uid"]), object::text(old, &["metadata", "uid"]));
    if !uid.is_empty() && uid != old_uid {
        if ctx.info.verb == "patch" {
            invalid(ctx, old, &[FieldError::invalid("metadata.uid", uid, "field is immutable")])?;
        }
        let why = format!(
            "StorageError: invalid object, Code: 4, Key: {}, ResourceVersion: 0, AdditionalErrorMsg: Precondition failed: UID in \
             precondition: {uid}, UID in object meta: {old_uid}",
            ctx.key()?
        );
        return Err(Status::conflict(&facts.group, &facts.resource, &ctx.info.name, &why));
    }
    let wanted = object::text(&new, &["metadata", "resourceVersion"]);
    let unset = wanted.is_empty() || wanted == "0";
    if !unset && wanted != object::text(old, &["metadata", "resourceVersion"]) {
        return Err(Status::modified(&facts.group, &facts.resource, &ctx.info.name));
    }
    if unset && ctx.info.verb == "update" && !resources::updates_unconditionally(facts) {
        let error = FieldError::invalid("metadata.resourceVersion", 0, "must be specified for an update");
        return Err(Status::invalid(&facts.group, &facts.resource, &ctx.info.name, &[error]));
    }
    let old_metadata = old.get("metadata").cloned().unwrap_or_default();
    let metadata = object::metadata_mut(&mut new).ok_or_else(|| Status::bad_request("the object provided has no metadata"))?;
    metadata.remove("managedFields");
    for field in SERVER_FIELDS.iter().chain(&["resourceVersion"]) {
        match old_metadata.get(*field) {
            Some(value) => metadata.insert((*field).to_owned(), value.clone()),
            None => metadata.remove(*field),
        };
    }
    defaulting::default(facts, &mut new);
    if changes_spec(ctx) {
        invalid(ctx, &new, &support::check_update(facts, &new, old).0)?;
    }
    let request = ctx.admission(Operation::Update, &ctx.info.name, Some(old));
    admission::admit(&request, Some(&mut new))?;
    match ctx.info.subresource.as_str() {
        "status" => strategy::prepare_status_update(facts, &mut new, old),
        "finalize" => strategy::prepare_finalize(&mut new, old),
        "ephemeralcontainers" => strategy::prepare_ephemeral_containers(&mut new, old),
        _ => strategy::prepare_update(facts, &mut new, old),
    }
    let errors = match ctx.info.subresource.as_str() {
        "status" => validation::update_status(facts, &new, old),
        "ephemeralcontainers" => validation::update_ephemeral_containers(facts, &new, old),
        _ => validation::update(facts, &new, old),
    };
    invalid(ctx, &new, &errors)?;
    admission::validate(&request, Some(&new))?;
    escalation::check(ctx, &new, Some(old))?;
    Ok(if is_released(&new) { Step::Delete(new) } else { Step::Put(new) })
}

/// The stored object as the client of this resource sees it.
fn as_seen(ctx: &Ctx<'_>, old: &Value) -> Value {
    let mut seen = old.clone();
    if ctx.resource.converted {
        apimachinery::convert::convert(&mut seen, &ctx.resource.facts.gvk());
    }
    seen
}

fn stored_step(ctx: &Ctx<'_>, step: Step) -> Result<Step, Status> {
    Ok(match step {
        Step::Put(object) => Step::Put(to_stored_kind(ctx, object)?),
        Step::Delete(object) => Step::Delete(to_stored_kind(ctx, object)?),
    })
}

/// Whether a request may change what an object asks for, so that its fields are looked at.
fn changes_spec(ctx: &Ctx<'_>) -> bool {
    matches!(ctx.info.subresource.as_str(), "" | "ephemeralcontainers")
}

/// Warnings of fields that an update sets and the system does not carry out.
fn field_warnings(ctx: &Ctx<'_>, new: &Value, old: &Value) -> Vec<String> {
    if changes_spec(ctx) { support::check_update(ctx.resource.facts, new, old).1 } else { Vec::new() }
}

/// PUT of an object, or of its status or finalizers.
pub async fn update(ctx: &Ctx<'_>, body: &[u8]) -> Result<Response<Body>, Status> {
    let dry_run = ctx.dry_run()?;
    let mut warnings = Vec::new();
    let mut object = decode(ctx, body, &ctx.resource.facts.gvk(), &mut warnings)?;
    check_path(ctx, &mut object)?;
    let mut warned = Vec::new();
    let outcome = guaranteed_update(ctx, dry_run, |old| {
        let old = as_seen(ctx, old);
        warned = field_warnings(ctx, &object, &old);
        stored_step(ctx, prepare_update(ctx, &old, object.clone())?)
    })
    .await;
    warnings.extend(warned);
    let creates = ctx.info.subresource.is_empty() && resources::creates_on_update(ctx.resource.facts);
    match outcome {
        Err(status) if status.reason == "NotFound" && creates => {
            let wanted = object::text(&object, &["metadata", "resourceVersion"]);
            if !wanted.is_empty() && wanted != "0" {
                return Err(status);
            }
            ctx.authorize_create()?;
            let stored = create_object(ctx, object, dry_run, &mut warnings).await?;
            answer(ctx, 201, &stored, &warnings)
        }
        outcome => answer(ctx, 200, &outcome?.stored, &warnings),
    }
}

/// A patch, read.
pub enum Patch {
    /// RFC 6902.
    Json(Value),
    /// RFC 7386.
    Merge(Value),
    /// Kubernetes' own.
    Strategic(Value),
}

impl Patch {
    /// Reads a patch by its media type.
    ///
    /// # Errors
    /// 400 for what is no JSON, 415 for another media type (server-side apply among them).
    pub fn read(media_type: &str, body: &[u8]) -> Result<Self, Status> {
        let make = match media_type {
            "application/json-patch+json" => Self::Json,
            "application/merge-patch+json" => Self::Merge,
            "application/strategic-merge-patch+json" => Self::Strategic,
            _ => {
                let message = "415: Unsupported Media Type".to_owned();
                return Err(Status { code: 415, reason: "UnsupportedMediaType", message, details: Some(serde_json::json!({})) });
            }
        };
        let value: Value = serde_json::from_slice(body).map_err(|_| Status::bad_request("invalid JSON patch"))?;
        if media_type == "application/merge-patch+json" && value.is_array() {
            let why = "json: cannot unmarshal array into Go value of type map[string]interface {}";
            return Err(Status::bad_request(format!("error decoding patch: {why}")));
        }
        Ok(make(value))
    }

    /// Applies it to a copy of `target`, of the type `id`.
    ///
    /// # Errors
    /// 400, 413, 422, 500 as upstream.
    pub fn apply(&self, id: TypeId, target: &Value) -> Result<Value, Status> {
        let mut patched = target.clone();
        match self {
            Self::Json(patch) => patch::json::apply(&mut patched, patch.clone())?,
            Self::Merge(patch) => patch::merge::apply(&mut patched, patch.clone()),
            Self::Strategic(patch) => patch::strategic::apply(id, &mut patched, patch.clone())?,
        }
        Ok(patched)
    }
}

/// PATCH of an object or of its status.
pub async fn patch(ctx: &Ctx<'_>, body: &[u8]) -> Result<Response<Body>, Status> {
    let dry_run = ctx.dry_run()?;
    let facts = ctx.resource.facts;
    let patch = Patch::read(negotiate::content_type(ctx.headers), body)?;
    let checks = field_validation(ctx)?;
    let text = String::from_utf8_lossy(body);
    let mut warnings = Vec::new();
    let outcome = guaranteed_update(ctx, dry_run, |old| {
        let old = as_seen(ctx, old);
        let mut new = patch.apply(facts.type_id, &old)?;
        let unknown = strict::unknown_fields(facts.type_id, &new);
        match checks {
            FieldValidation::Strict if !unknown.is_empty() => {
                let why = format!("strict decoding error: {}", unknown.join(", "));
                return Err(Status::invalid("", "", "", &[FieldError::invalid("patch", text.as_ref(), why)]));
            }
            FieldValidation::Warn => warnings = unknown,
            _ => warnings.clear(),
        }
        codec::refit(facts.type_id, &mut new, &text)?;
        for field in ["apiVersion", "kind"] {
            new[field] = old[field].clone();
        }
        check_path(ctx, &mut new)?;
        warnings.extend(field_warnings(ctx, &new, &old));
        stored_step(ctx, prepare_update(ctx, &old, new)?)
    })
    .await?;
    answer(ctx, 200, &outcome.stored, &warnings)
}

/// The encoding of an answer that is no stored object.
pub fn plain(ctx: &Ctx<'_>) -> crate::negotiate::Accepted {
    crate::negotiate::Accepted { shape: crate::negotiate::Shape::Object, stream: false, ..ctx.accepted }
}
