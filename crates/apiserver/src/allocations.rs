//! Who holds which cluster IP and node port: one record for each in the store.
//!
//! The transaction that stores a Service makes its records, under the condition that there are none, and the one that takes the Service
//! away removes them. So servers that share a store give nothing out twice, and no crash leaves a record without its Service or a
//! Service without its records.
//!
//! A cluster IP's record is upstream's IPAddress, at upstream's key (`pkg/registry/core/service/ipallocator/ipallocator.go`, v1.37): a
//! kube-apiserver on the same etcd respects it. Node ports upstream keeps in one bitmap, for which all creations of all servers would
//! have to queue; ours are a key each. A kube-apiserver that works beside ours needs a `--service-node-port-range` of its own.

use std::collections::{HashMap, HashSet};

use apimachinery::status::Status;
use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use store::{Compare, DeleteRequest, KeyValue, Op, OpResponse, PutRequest, RangeRequest, Txn, TxnResponse};

use crate::api::{Api, Ctx, store_error};
use crate::cluster_ip::{Held, Wanted, held};
use crate::object::{name, text};

/// Tries to make the records of a Service that is changed at the same time.
const REPAIR_TRIES_MAX: usize = 10;
/// A record without a Service may be that of one which a kube-apiserver is about to store, for so long (upstream's `gracePeriod`).
const GRACE: SignedDuration = SignedDuration::from_secs(60);

/// What the records' keys begin with.
fn prefixes(root: &str) -> [String; 2] {
    [format!("{root}ipaddresses/"), format!("{root}coracle.io/nodeports/")]
}

fn key(root: &str, held: Held) -> String {
    let [addresses, ports] = prefixes(root);
    match held {
        Held::Address(address) => format!("{addresses}{address}"),
        Held::Port(port) => format!("{ports}{port}"),
    }
}

/// A record of what a Service holds.
fn record(held: Held, service: &Value, now: Timestamp) -> Result<Bytes, Status> {
    let (kind, version, name, labels) = match held {
        Held::Address(address) => {
            let labels = json!({"ipaddress.kubernetes.io/ip-family": "IPv4", "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io"});
            ("IPAddress", "networking.k8s.io/v1", address.to_string(), labels)
        }
        Held::Port(port) => ("NodePort", "coracle.io/v1", port.to_string(), json!({})),
    };
    let object = json!({"kind": kind, "apiVersion": version,
        "metadata": {"name": name, "uid": uuid::Uuid::new_v4().to_string(), "labels": labels,
            "creationTimestamp": apimachinery::time::format_seconds(now)},
        "spec": {"parentRef": {"resource": "services", "namespace": text(service, &["metadata", "namespace"]), "name": self::name(service)}}});
    crate::object::encode(&object).map(Bytes::from).map_err(|error| Status::internal(error.to_string()))
}

/// The namespace and name of a record's Service; `None` for what cannot be read, or is no Service's.
fn owner(record: &Value) -> Option<(String, String)> {
    let parent = &record["spec"]["parentRef"];
    let part = |field: &str| parent.get(field).and_then(Value::as_str).map(str::to_owned);
    if parent.get("resource").and_then(Value::as_str) == Some("services") { part("namespace").zip(part("name")) } else { None }
}

fn owner_of(service: &Value) -> (String, String) {
    (text(service, &["metadata", "namespace"]).to_owned(), name(service).to_owned())
}

/// What a transaction on a Service does to the records; nothing for other kinds.
#[derive(Debug, Default)]
pub struct Change {
    wanted: Vec<(String, Option<Status>)>,
    made: Vec<PutRequest>,
    /// Keys of records that go, with the revisions at which they were this Service's.
    gone: Vec<(Bytes, i64)>,
}

impl Change {
    /// Makes it part of a transaction, which then fails where another was quicker.
    pub fn join(&self, txn: &mut Txn) {
        for (key, _) in &self.wanted {
            txn.compare.push(Compare::mod_revision(key.clone(), 0));
            txn.failure.push(Op::Range(RangeRequest { keys_only: true, ..RangeRequest::key(key.clone()) }));
        }
        txn.success.extend(self.made.iter().cloned().map(Op::Put));
        for (key, revision) in &self.gone {
            txn.compare.push(Compare::mod_revision(key.clone(), *revision));
            txn.success.push(Op::Delete(DeleteRequest { key: key.clone(), ..DeleteRequest::default() }));
        }
    }
}

/// The allocation for one request, over all its tries.
#[derive(Debug, Default)]
pub struct Allocation {
    /// What is known to be another's.
    taken: HashSet<Held>,
}

impl Allocation {
    /// Gives a Service that is stored (`new`, instead of `old`) what it lacks, and finds what it no longer holds.
    ///
    /// # Errors
    /// 422 and 500 of [`crate::cluster_ip::Ranges::claim`], and what the store says.
    pub async fn change(&self, ctx: &Ctx<'_>, new: Option<&mut Value>, old: Option<&Value>) -> Result<Change, Status> {
        let mut change = Change::default();
        if !is_service(ctx) {
            return Ok(change);
        }
        let root = ctx.api.resources.root();
        let mut kept = Vec::new();
        if let Some(new) = new {
            let seed = uuid::Uuid::new_v4().as_fields().0;
            for Wanted { held, refusal } in ctx.api.services.claim(new, old, &self.taken, seed)? {
                let key = key(root, held);
                change.made.push(PutRequest { key: key.clone().into(), value: record(held, new, ctx.now)?, ..PutRequest::default() });
                change.wanted.push((key, refusal));
            }
            kept = held(new);
        }
        let Some(old) = old else { return Ok(change) };
        let released = held(old).into_iter().filter(|held| !kept.contains(held)).map(|held| key(root, held));
        let reads: Vec<Op> = released.map(|key| Op::Range(RangeRequest::key(key))).collect();
        if reads.is_empty() {
            return Ok(change);
        }
        let answer = ctx.api.store.txn(Txn { success: reads, ..Txn::default() }).await.map_err(store_error)?;
        for kv in answer.responses.into_iter().flat_map(found) {
            let owner = serde_json::from_slice(&kv.value).ok().and_then(|record| owner(&record));
            if owner.is_none_or(|owner| owner == owner_of(old)) {
                change.gone.push((kv.key, kv.mod_revision));
            }
        }
        Ok(change)
    }

    /// Learns from a transaction that failed: whether something that was chosen is another's, so that it is worth another try.
    ///
    /// # Errors
    /// 422 when what was asked for is another's.
    pub async fn lost(&mut self, ctx: &Ctx<'_>, change: Change, outcome: TxnResponse) -> Result<bool, Status> {
        let taken: Vec<bool> = outcome.responses.into_iter().map(|response| !found(response).is_empty()).collect();
        let lost: Vec<Option<Status>> =
            change.wanted.into_iter().zip(taken).filter(|(_, taken)| *taken).map(|((_, refusal), _)| refusal).collect();
        if lost.is_empty() {
            return Ok(false);
        }
        if let Some(refusal) = lost.into_iter().flatten().next() {
            return Err(refusal);
        }
        self.taken = records(ctx.api, true).await?.into_keys().collect();
        Ok(true)
    }

    /// What [`Allocation::lost`] would say, of a change that is not to be made (`dryRun`).
    ///
    /// # Errors
    /// 422 when what is asked for is another's.
    pub async fn check(ctx: &Ctx<'_>, change: Change) -> Result<(), Status> {
        for (key, refusal) in change.wanted {
            let Some(refusal) = refusal else { continue };
            let answer = ctx.api.store.range(RangeRequest { keys_only: true, ..RangeRequest::key(key) }).await.map_err(store_error)?;
            if !answer.kvs.is_empty() {
                return Err(refusal);
            }
        }
        Ok(())
    }
}

/// Whether what a request is about holds addresses and ports.
pub fn is_service(ctx: &Ctx<'_>) -> bool {
    ctx.resource.facts.group.is_empty() && ctx.resource.facts.resource == "services"
}

fn found(response: OpResponse) -> Vec<KeyValue> {
    match response {
        OpResponse::Range(range) => range.kvs,
        _ => Vec::new(),
    }
}

/// All records.
async fn records(api: &Api, keys_only: bool) -> Result<HashMap<Held, KeyValue>, Status> {
    let [addresses, ports] = prefixes(api.resources.root());
    let mut all = HashMap::new();
    for prefix in [&addresses, &ports] {
        let request = RangeRequest { keys_only, ..RangeRequest::prefix(prefix.clone()) };
        for kv in api.store.range(request).await.map_err(store_error)?.kvs {
            let text = std::str::from_utf8(&kv.key).ok().and_then(|key| key.strip_prefix(prefix.as_str())).unwrap_or_default();
            let held = if *prefix == addresses { text.parse().ok().map(Held::Address) } else { text.parse().ok().map(Held::Port) };
            all.extend(held.map(|held| (held, kv)));
        }
    }
    Ok(all)
}

/// Makes the records of Services that have none (an older Coracle's, or a kube-apiserver's), and removes those whose Service is gone (a
/// kube-apiserver knows nothing of our node ports).
///
/// # Errors
/// What the store says.
pub async fn repair(api: &Api) -> Result<(), Status> {
    let Some(keyspace) = api.resources.storage_of("services") else { return Ok(()) };
    let storage = &api.resources.storages()[keyspace];
    let (records, mut in_use) = (records(api, false).await?, HashSet::new());
    for entry in api.cache.snapshot(keyspace, &storage.prefix).entries {
        let Some(service) = entry.parsed() else { continue };
        for held in held(&service) {
            let Some(record) = records.get(&held) else {
                adopt(api, &entry.key, held).await?;
                continue;
            };
            match serde_json::from_slice(&record.value).ok().and_then(|record| owner(&record)) {
                Some(owner) if owner != owner_of(&service) => {
                    let (namespace, name) = owner;
                    tracing::error!(?held, service = %entry.key, "belongs to {namespace}/{name}; one of the two Services must be deleted");
                }
                _ => drop(in_use.insert(held)),
            }
        }
    }
    for (_, record) in records.into_iter().filter(|(held, _)| !in_use.contains(held)) {
        release(api, record).await?;
    }
    Ok(())
}

/// Makes the record of what a stored Service holds.
async fn adopt(api: &Api, service_key: &str, wanted: Held) -> Result<(), Status> {
    for _ in 0..REPAIR_TRIES_MAX {
        let answer = api.store.range(RangeRequest::key(service_key.to_owned())).await.map_err(store_error)?;
        let Some(kv) = answer.kvs.into_iter().next() else { return Ok(()) };
        let Ok(service) = serde_json::from_slice::<Value>(&kv.value) else { return Ok(()) };
        if !held(&service).contains(&wanted) {
            return Ok(());
        }
        let key = key(api.resources.root(), wanted);
        let put = PutRequest { key: key.clone().into(), value: record(wanted, &service, Timestamp::now())?, ..PutRequest::default() };
        let compare = vec![Compare::mod_revision(kv.key, kv.mod_revision), Compare::mod_revision(key.clone(), 0)];
        let failure = vec![Op::Range(RangeRequest { keys_only: true, ..RangeRequest::key(key) })];
        let outcome = api.store.txn(Txn { compare, success: vec![Op::Put(put)], failure }).await.map_err(store_error)?;
        let is_there = outcome.responses.into_iter().any(|response| !found(response).is_empty());
        if outcome.succeeded || is_there {
            return Ok(());
        }
    }
    Err(Status::internal(format!("{service_key} is changed too often to record that it holds {wanted:?}")))
}

/// Removes a record that no Service holds, unless one does by now. What cannot be read is left alone.
async fn release(api: &Api, record: KeyValue) -> Result<(), Status> {
    let Ok(object) = serde_json::from_slice::<Value>(&record.value) else { return Ok(()) };
    let Some((namespace, name)) = owner(&object) else { return Ok(()) };
    let made = text(&object, &["metadata", "creationTimestamp"]).parse::<Timestamp>();
    if made.is_ok_and(|made| Timestamp::now().duration_since(made) < GRACE) {
        return Ok(());
    }
    let Some(keyspace) = api.resources.storage_of("services") else { return Ok(()) };
    let service_key = api.resources.storages()[keyspace].key(&namespace, &name);
    let answer = api.store.range(RangeRequest::key(service_key.clone())).await.map_err(store_error)?;
    let service = answer.kvs.into_iter().next();
    let held = service.as_ref().and_then(|kv| serde_json::from_slice(&kv.value).ok()).map(|service| held(&service)).unwrap_or_default();
    if held.into_iter().any(|held| key(api.resources.root(), held).as_bytes() == &record.key[..]) {
        return Ok(());
    }
    tracing::warn!(key = %String::from_utf8_lossy(&record.key), "removing the record of what no Service holds");
    let compare = vec![
        Compare::mod_revision(record.key.clone(), record.mod_revision),
        Compare::mod_revision(service_key, service.map_or(0, |kv| kv.mod_revision)),
    ];
    let delete = Op::Delete(DeleteRequest { key: record.key, ..DeleteRequest::default() });
    api.store.txn(Txn { compare, success: vec![delete], failure: Vec::new() }).await.map(drop).map_err(store_error)
}
