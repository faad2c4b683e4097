//! DELETE: preconditions, graceful deletion of pods, finalizers and propagation, collections.
//! (`apiserver/pkg/registry/rest/delete.go`, `registry/generic/registry/store.go`, `pkg/registry/core/pod/strategy.go`, v1.37)

use apimachinery::codec;
use apimachinery::field_error::FieldError;
use apimachinery::status::{Status, success};
use apimachinery::time::format_seconds;
use apimachinery::{Gvk, KindFacts};
use http::Response;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::admission::{self, Operation};
use crate::api::Ctx;
use crate::reply::{self, Body, ListMeta};
use crate::request::RequestInfo;
use crate::write::{Step, Stored, answer, decode, guaranteed_update};
use crate::{negotiate, object, read, tables};

const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";
/// The grace of a pod that does not say.
const GRACE_SECONDS_DEFAULT: i64 = 30;

/// `meta/v1` DeleteOptions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    grace_seconds: Option<i64>,
    propagation: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    dry_run: bool,
}

fn invalid(errors: &[FieldError]) -> Status {
    Status::invalid("meta.k8s.io", "DeleteOptions", "", errors)
}

impl Options {
    /// From the body, or from the query where there is none.
    ///
    /// # Errors
    /// 400, 415, 422.
    pub fn read(ctx: &Ctx<'_>, body: &[u8]) -> Result<Self, Status> {
        let value = if body.is_empty() {
            let mut value = json!({});
            for field in ["propagationPolicy"] {
                if let Some(text) = ctx.query.get(field) {
                    value[field] = text.into();
                }
            }
            if let Some(text) = ctx.query.get("gracePeriodSeconds") {
                let seconds: i64 = text.parse().map_err(|_| Status::bad_request(format!("gracePeriodSeconds: {text:?} is no number")))?;
                value["gracePeriodSeconds"] = seconds.into();
            }
            if ctx.query.get("orphanDependents").is_some() {
                value["orphanDependents"] = ctx.query.flag("orphanDependents").into();
            }
            value
        } else {
            codec::decode(negotiate::body_media(ctx.headers)?, body, &Gvk::new("v1", "DeleteOptions"))?.object
        };
        let mut options = Self::from_value(&value)?;
        options.dry_run |= ctx.dry_run()?;
        Ok(options)
    }

    fn from_value(value: &Value) -> Result<Self, Status> {
        let text = |path: &str| value.pointer(path).and_then(Value::as_str).map(str::to_owned);
        let mut propagation = text("/propagationPolicy");
        if let Some(orphan) = value.get("orphanDependents").and_then(Value::as_bool) {
            if propagation.is_some() {
                let why = "orphanDependents and deletionPropagation cannot be both set";
                return Err(invalid(&[FieldError::invalid("propagationPolicy", propagation, why)]));
            }
            propagation = Some(if orphan { "Orphan" } else { "Background" }.to_owned());
        }
        if let Some(policy) = propagation.as_deref().filter(|policy| !matches!(*policy, "Orphan" | "Background" | "Foreground")) {
            return Err(invalid(&[FieldError::not_supported("propagationPolicy", policy, &["Foreground", "Background", "Orphan", "nil"])]));
        }
        let mut dry_run = false;
        for entry in value.get("dryRun").and_then(Value::as_array).into_iter().flatten() {
            if entry != "All" {
                return Err(invalid(&[FieldError::not_supported("dryRun", json!([entry]), &["All"])]));
            }
            dry_run = true;
        }
        Ok(Self {
            grace_seconds: value.get("gracePeriodSeconds").and_then(Value::as_i64),
            propagation,
            uid: text("/preconditions/uid"),
            resource_version: text("/preconditions/resourceVersion"),
            dry_run,
        })
    }

    fn check(&self, facts: &KindFacts, name: &str, old: &Value) -> Result<(), Status> {
        let conflict = |what: &str, wanted: &str, found: &str, fate: &str| {
            let why = format!(
                "the {what} in the precondition ({wanted}) does not match the {what} in record ({found}). The object might have been {fate}"
            );
            Err(Status::conflict(&facts.group, &facts.kind, name, &why))
        };
        let (uid, version) = (object::text(old, &["metadata", "uid"]), object::text(old, &["metadata", "resourceVersion"]));
        match (&self.uid, &self.resource_version) {
            (Some(wanted), _) if wanted != uid => conflict("UID", wanted, uid, "deleted and then recreated"),
            (_, Some(wanted)) if wanted != version => conflict("ResourceVersion", wanted, version, "modified"),
            _ => Ok(()),
        }
    }
}

/// The finalizers after a deletion with these options.
fn finalizers(old: &Value, options: &Options) -> Vec<String> {
    let present = object::finalizers(old);
    let has = |name: &str| present.contains(&name);
    let (orphan, foreground) = match options.propagation.as_deref() {
        Some("Orphan") => (true, false),
        Some("Foreground") => (false, true),
        Some(_) => (false, false),
        None => (has(ORPHAN), has(FOREGROUND)),
    };
    let mut wanted: Vec<String> =
        present.iter().filter(|name| !matches!(**name, ORPHAN | FOREGROUND)).map(|name| (*name).to_owned()).collect();
    if orphan {
        wanted.push(ORPHAN.to_owned());
    }
    if foreground {
        wanted.push(FOREGROUND.to_owned());
    }
    wanted
}

/// Seconds that a pod is given; 0 for what is deleted at once.
fn grace(facts: &KindFacts, old: &Value, options: &Options) -> i64 {
    if facts.resource != "pods" {
        return 0;
    }
    let unscheduled = object::text(old, &["spec", "nodeName"]).is_empty();
    let ended = matches!(object::text(old, &["status", "phase"]), "Failed" | "Succeeded");
    if unscheduled || ended {
        return 0;
    }
    let own = old.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(GRACE_SECONDS_DEFAULT);
    match options.grace_seconds.unwrap_or(own) {
        seconds if seconds < 0 => 1,
        seconds => seconds,
    }
}

/// What a deletion makes of an object.
fn plan(facts: &KindFacts, old: &Value, options: &Options, now: Timestamp) -> Step {
    let finalizers = finalizers(old, options);
    let seconds = grace(facts, old, options);
    let mut new = old.clone();
    let namespace_held =
        facts.kind == "Namespace" && old.pointer("/spec/finalizers").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
    let held = seconds > 0 || !finalizers.is_empty() || namespace_held;
    if finalizers.is_empty() {
        if let Some(metadata) = object::metadata_mut(&mut new) {
            metadata.remove("finalizers");
        }
    } else {
        new["metadata"]["finalizers"] = json!(finalizers);
    }
    let since = old.pointer("/metadata/deletionTimestamp").and_then(Value::as_str).and_then(apimachinery::time::parse);
    let before = old.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
    let deadline = match since {
        // Already going: the time can only become shorter, counted from when the deletion began.
        Some(_) if seconds >= before && held => None,
        Some(since) if seconds > 0 => Some(since - SignedDuration::from_secs(before) + SignedDuration::from_secs(seconds)),
        _ => Some(now + SignedDuration::from_secs(seconds)),
    };
    // What goes at once and had no time to be given goes as it was.
    let at_once = !held && facts.resource != "pods";
    if let Some(deadline) = deadline.filter(|_| !at_once) {
        new["metadata"]["deletionTimestamp"] = format_seconds(deadline).into();
        if facts.kind != "Namespace" {
            new["metadata"]["deletionGracePeriodSeconds"] = seconds.into();
        }
        let generation = old.pointer("/metadata/generation").and_then(Value::as_i64);
        if let (Some(generation), None) = (generation, since) {
            new["metadata"]["generation"] = (generation + 1).into();
        }
    }
    if !held {
        return Step::Delete(new);
    }
    if facts.kind == "Namespace" {
        new["status"]["phase"] = "Terminating".into();
    }
    Step::Put(new)
}

/// Deletes the object that `ctx` names.
async fn delete_one(ctx: &Ctx<'_>, options: &Options) -> Result<(Stored, bool), Status> {
    let facts = ctx.resource.facts;
    let mut marked = None;
    let outcome = guaranteed_update(ctx, options.dry_run, |old| {
        marked = None;
        options.check(facts, &ctx.info.name, old)?;
        admission::admit(&ctx.admission(Operation::Delete, &ctx.info.name, Some(old)), None)?;
        let step = plan(facts, old, options, ctx.now);
        // Whoever watches is told that a pod has no time left before it is told that it is gone: its kubelet acts on that.
        match step {
            Step::Delete(new) if facts.resource == "pods" && !options.dry_run && !has_no_time(old) => {
                marked = Some(object::text(old, &["metadata", "uid"]).to_owned());
                Ok(Step::Put(new))
            }
            step => Ok(step),
        }
    })
    .await?;
    let Some(uid) = marked else { return Ok((outcome.stored, outcome.deleted)) };
    // Somebody else may have deleted it since, and another of this name may be there.
    let last = guaranteed_update(ctx, false, |old| match object::text(old, &["metadata", "uid"]) == uid {
        true => Ok(Step::Delete(old.clone())),
        false => Err(ctx.not_found()),
    });
    match last.await {
        Err(status) if status.code == 404 => Ok((outcome.stored, true)),
        last => last.map(|last| (last.stored, true)),
    }
}

/// Whether a deletion without time has been told.
fn has_no_time(object: &Value) -> bool {
    object::is_deleting(object) && object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64) == Some(0)
}

/// Whether the answer to a deletion is the object, not a Status (each storage's `ReturnDeletedObject`).
fn returns_object(facts: &KindFacts) -> bool {
    facts.group.is_empty() && matches!(facts.resource.as_str(), "pods" | "services" | "serviceaccounts")
}

/// DELETE of one object.
pub async fn delete(ctx: &Ctx<'_>, body: &[u8]) -> Result<Response<Body>, Status> {
    let options = Options::read(ctx, body)?;
    let (stored, deleted) = delete_one(ctx, &options).await?;
    let facts = ctx.resource.facts;
    if !deleted || returns_object(facts) {
        return answer(ctx, 200, &stored, &[]);
    }
    let last = reply::parse(&stored.value, stored.revision)?;
    let uid = object::text(&last, &["metadata", "uid"]);
    let status = success(&facts.group, &facts.resource, &ctx.info.name, uid);
    reply::value(200, crate::write::plain(ctx), &status)
}

/// What an eviction makes of a pod: it is told why it goes, and deleted (`pkg/registry/core/pod/storage/eviction.go`).
fn plan_eviction(facts: &KindFacts, old: &Value, options: &Options, now: Timestamp) -> Step {
    let mut told = old.clone();
    let condition = json!({"type": "DisruptionTarget", "status": "True", "lastProbeTime": null,
        "lastTransitionTime": format_seconds(now), "reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting"});
    if let Value::Object(status) = &mut told["status"]
        && let Value::Array(conditions) = status.entry("conditions").or_insert_with(|| json!([]))
    {
        let was_told = conditions.iter().any(|found| found["type"] == "DisruptionTarget" && found["status"] == "True");
        if !was_told {
            conditions.retain(|found| found["type"] != "DisruptionTarget");
            conditions.push(condition);
        }
    }
    plan(facts, &told, options, now)
}

/// POST of an Eviction to `pods/NAME/eviction`: a deletion with its preconditions. No PodDisruptionBudget can forbid it, for that
/// kind is not served.
pub async fn evict(ctx: &Ctx<'_>, body: &[u8]) -> Result<Response<Body>, Status> {
    let mut warnings = Vec::new();
    let eviction = decode(ctx, body, &Gvk::new("policy/v1", "Eviction"), &mut warnings)?;
    if object::name(&eviction) != ctx.info.name {
        return Err(Status::bad_request("name in URL does not match name in Eviction object"));
    }
    let mut options = Options::from_value(eviction.get("deleteOptions").unwrap_or(&Value::Null))?;
    options.dry_run |= ctx.dry_run()?;
    admission::admit(&ctx.admission(Operation::Create, &ctx.info.name, None), Some(&mut eviction.clone()))?;
    let facts = ctx.resource.facts;
    guaranteed_update(ctx, options.dry_run, |old| {
        options.check(facts, &ctx.info.name, old)?;
        Ok(plan_eviction(facts, old, &options, ctx.now))
    })
    .await?;
    let answer = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
    let mut response = reply::value(201, crate::write::plain(ctx), &answer)?;
    reply::warn(&mut response, &warnings);
    Ok(response)
}

/// DELETE of a collection: of each object that the selectors match.
pub async fn collection(ctx: &Ctx<'_>, body: &[u8]) -> Result<Response<Body>, Status> {
    let options = Options::read(ctx, body)?;
    let entries = read::matching(ctx).await?;
    for entry in &entries {
        let Ok(found) = serde_json::from_slice::<Value>(&entry.value) else { continue };
        let info = RequestInfo {
            name: object::name(&found).to_owned(),
            namespace: object::text(&found, &["metadata", "namespace"]).to_owned(),
            ..ctx.info.clone()
        };
        let one = Ctx { info: &info, ..ctx.copy() };
        match delete_one(&one, &options).await {
            Err(status) if status.code == 404 => {}
            outcome => {
                outcome?;
            }
        }
    }
    let items = entries.iter().map(|entry| (entry.value.as_ref(), entry.revision));
    let meta = ListMeta { revision: ctx.api.cache.revision(), ..ListMeta::default() };
    let body = reply::list(ctx.resource, ctx.storage()?, ctx.accepted, items, &meta, tables::Include::default())?;
    Ok(reply::bytes(200, ctx.accepted.media.as_str(), body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(node: &str) -> Value {
        json!({"kind": "Pod", "metadata": {"name": "p", "generation": 1}, "spec": {"nodeName": node, "terminationGracePeriodSeconds": 20}})
    }

    fn run(old: &Value, options: &Options) -> (bool, Value) {
        let facts = apimachinery::kinds::by_kind("", "v1", "Pod").expect("served");
        match plan(facts, old, options, Timestamp::from_second(1_000).expect("time")) {
            Step::Put(new) => (false, new),
            Step::Delete(new) => (true, new),
        }
    }

    #[test]
    fn pods_are_given_time_once_they_are_scheduled() {
        assert!(run(&pod(""), &Options::default()).0);
        let (gone, new) = run(&pod("n"), &Options::default());
        assert!(!gone);
        assert_eq!(new["metadata"]["deletionTimestamp"], "1970-01-01T00:17:00Z");
        assert_eq!((&new["metadata"]["deletionGracePeriodSeconds"], &new["metadata"]["generation"]), (&json!(20), &json!(2)));
        // A longer time does not prolong it; a shorter one counts from the same beginning.
        let longer = Options { grace_seconds: Some(60), ..Options::default() };
        assert_eq!(run(&new, &longer).1, new);
        let shorter = Options { grace_seconds: Some(5), ..Options::default() };
        assert_eq!(run(&new, &shorter).1["metadata"]["deletionTimestamp"], "1970-01-01T00:16:45Z");
        assert!(run(&new, &Options { grace_seconds: Some(0), ..Options::default() }).0);
    }

    #[test]
    fn the_evicted_are_told_why() {
        let facts = apimachinery::kinds::by_kind("", "v1", "Pod").expect("served");
        let mut old = pod("n");
        old["status"] = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]});
        let Step::Put(new) = plan_eviction(facts, &old, &Options::default(), Timestamp::from_second(1_000).expect("time")) else {
            panic!("a running pod is given time")
        };
        assert_eq!(new["status"]["conditions"][1]["reason"], "EvictionByEvictionAPI");
        assert_eq!(new["metadata"]["deletionGracePeriodSeconds"], 20);
    }

    #[test]
    fn propagation_becomes_finalizers() {
        let options = |policy: &str| Options::from_value(&json!({"propagationPolicy": policy})).expect("known");
        let (gone, new) = run(&pod(""), &options("Foreground"));
        assert!(!gone && new["metadata"]["finalizers"] == json!([FOREGROUND]));
        assert_eq!(run(&pod(""), &options("Orphan")).1["metadata"]["finalizers"], json!([ORPHAN]));
        assert!(run(&new, &options("Background")).0);
        assert!(Options::from_value(&json!({"propagationPolicy": "x"})).is_err());
    }
}
