//! Who owns whom, as the watches have shown it: a pure structure, and the decisions on it
//! (`pkg/controller/garbagecollector/graph.go` and `garbagecollector.go`, 1.37).

use std::collections::{BTreeSet, HashMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::core::ApiResource;

/// Finalizer of an object that waits for its dependents to be deleted.
pub const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer of an object whose dependents are to be let go first.
pub const ORPHAN: &str = "orphan";

/// An object as the graph knows it.
#[derive(Debug, Clone)]
pub struct Object {
    /// Its kind, as the server serves it.
    pub resource: ApiResource,
    /// Its metadata.
    pub meta: ObjectMeta,
}

impl Object {
    fn has_finalizer(&self, name: &str) -> bool {
        self.meta.finalizers.iter().flatten().any(|finalizer| finalizer == name)
    }

    /// Being deleted, with its dependents first.
    pub fn deletes_dependents(&self) -> bool {
        self.meta.deletion_timestamp.is_some() && self.has_finalizer(FOREGROUND)
    }

    /// Being deleted, its dependents to be let go.
    pub fn orphans_dependents(&self) -> bool {
        self.meta.deletion_timestamp.is_some() && self.has_finalizer(ORPHAN)
    }

    fn blocks(&self, owner: &str) -> bool {
        let owners = self.meta.owner_references.iter().flatten();
        owners.into_iter().any(|reference| reference.uid == owner && reference.block_owner_deletion == Some(true))
    }
}

/// All objects, by UID, and who depends on whom.
#[derive(Debug, Default)]
pub struct Graph {
    objects: HashMap<String, Object>,
    dependents: HashMap<String, BTreeSet<String>>,
}

fn owners(meta: &ObjectMeta) -> impl Iterator<Item = &OwnerReference> {
    meta.owner_references.iter().flatten()
}

impl Graph {
    /// An object of this UID.
    pub fn get(&self, uid: &str) -> Option<&Object> {
        self.objects.get(uid)
    }

    /// The objects that name `uid` as their owner.
    pub fn dependents(&self, uid: &str) -> impl Iterator<Item = (&str, &Object)> {
        let uids = self.dependents.get(uid).into_iter().flatten();
        uids.filter_map(|uid| Some((uid.as_str(), self.objects.get(uid)?)))
    }

    /// Takes an object in, new or changed; answers the UIDs to look at.
    pub fn set(&mut self, object: Object) -> Vec<String> {
        let uid = object.meta.uid.clone().unwrap_or_default();
        let before = self.unlink(&uid);
        for owner in owners(&object.meta) {
            self.dependents.entry(owner.uid.clone()).or_default().insert(uid.clone());
        }
        let began = object.meta.deletion_timestamp.is_some()
            && before
                .as_ref()
                .is_none_or(|before| before.meta.deletion_timestamp.is_none() || before.meta.finalizers != object.meta.finalizers);
        let moved = before.as_ref().is_none_or(|before| before.meta.owner_references != object.meta.owner_references);
        let mut look = Vec::new();
        // A change of its owners, or an owner that was never seen: does it still have a reason to be?
        if moved && owners(&object.meta).next().is_some() {
            look.push(uid.clone());
        }
        if let Some(before) = &before {
            // An owner that waits for it may go on.
            look.extend(owners(&before.meta).map(|owner| owner.uid.clone()));
        }
        let deleting = object.deletes_dependents() || object.orphans_dependents();
        self.objects.insert(uid.clone(), object);
        if began && deleting {
            look.extend(self.dependents(&uid).map(|(uid, _)| uid.to_owned()));
            look.push(uid);
        }
        look.retain(|uid| self.objects.contains_key(uid));
        look
    }

    fn unlink(&mut self, uid: &str) -> Option<Object> {
        let before = self.objects.remove(uid)?;
        for owner in owners(&before.meta) {
            if let Some(uids) = self.dependents.get_mut(&owner.uid) {
                uids.remove(uid);
                if uids.is_empty() {
                    self.dependents.remove(&owner.uid);
                }
            }
        }
        Some(before)
    }

    /// An object is gone; answers the UIDs to look at: its dependents, and owners that waited for it.
    pub fn remove(&mut self, uid: &str) -> Vec<String> {
        let before = self.unlink(uid);
        let mut look: Vec<String> = self.dependents.get(uid).into_iter().flatten().cloned().collect();
        look.extend(before.iter().flat_map(|object| owners(&object.meta)).map(|owner| owner.uid.clone()));
        look.retain(|uid| self.objects.contains_key(uid));
        look
    }
}

/// What is known of one owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// It is there.
    Solid,
    /// It is not, or another one has its name.
    Dangling,
    /// It waits for its dependents to be deleted.
    Waiting,
}

/// What to do about one object.
#[derive(Debug, PartialEq)]
pub enum Plan {
    /// Nothing.
    Keep,
    /// Take these owners (UIDs) off it.
    DropOwners(Vec<String>),
    /// Delete it, dependents first; those that would block each other in a ring are told not to.
    DeleteForeground {
        /// Dependents (UIDs) that must not block it.
        unblock: bool,
    },
    /// Delete it, its dependents afterwards, or let go if it says so.
    Delete {
        /// `Background`, `Foreground` or `Orphan`.
        policy: &'static str,
    },
    /// It waits for its dependents: look at these (UIDs).
    LookAtDependents(Vec<String>),
    /// It waits for its dependents and none is left: take its finalizer off.
    FinishForeground,
    /// Let its dependents go, then take its finalizer off.
    Orphan,
}

/// Decides about the object of this UID. `owner` tells about each of its owners.
pub fn plan(graph: &Graph, uid: &str, object: &Object, owner: impl Fn(&OwnerReference) -> Owner) -> Plan {
    if object.orphans_dependents() {
        return Plan::Orphan;
    }
    if object.deletes_dependents() {
        let left: Vec<String> =
            graph.dependents(uid).filter(|(_, dependent)| dependent.blocks(uid)).map(|(uid, _)| uid.to_owned()).collect();
        return if left.is_empty() { Plan::FinishForeground } else { Plan::LookAtDependents(left) };
    }
    if object.meta.deletion_timestamp.is_some() {
        return Plan::Keep;
    }
    let known: Vec<(Owner, &OwnerReference)> = owners(&object.meta).map(|o| (owner(o), o)).collect();
    if known.is_empty() {
        return Plan::Keep;
    }
    if known.iter().any(|(state, _)| *state == Owner::Solid) {
        let gone: Vec<String> = known.iter().filter(|(state, _)| *state != Owner::Solid).map(|(_, owner)| owner.uid.clone()).collect();
        return if gone.is_empty() { Plan::Keep } else { Plan::DropOwners(gone) };
    }
    let waiting = known.iter().any(|(state, _)| *state == Owner::Waiting);
    if waiting && graph.dependents(uid).next().is_some() {
        // Its own dependents may be waiting for it: a ring.
        let unblock = graph.dependents(uid).any(|(_, dependent)| dependent.deletes_dependents());
        return Plan::DeleteForeground { unblock };
    }
    let policy = if object.has_finalizer(ORPHAN) {
        "Orphan"
    } else if object.has_finalizer(FOREGROUND) {
        "Foreground"
    } else {
        "Background"
    };
    Plan::Delete { policy }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(uid: &str, owner: Option<&str>, more: serde_json::Value) -> Object {
        let owners: Vec<_> = owner
            .map(|uid| json!({"apiVersion": "v1", "kind": "X", "name": uid, "uid": uid, "blockOwnerDeletion": true}))
            .into_iter()
            .collect();
        let mut meta = json!({"name": uid, "uid": uid, "ownerReferences": owners});
        meta.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
        let resource = ApiResource {
            group: String::new(),
            version: "v1".to_owned(),
            api_version: "v1".to_owned(),
            kind: "X".to_owned(),
            plural: "xs".to_owned(),
        };
        Object { resource, meta: serde_json::from_value(meta).expect("metadata") }
    }

    fn deleting(finalizer: &str) -> serde_json::Value {
        json!({"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": [finalizer]})
    }

    fn decide(graph: &Graph, uid: &str, state: Owner) -> Plan {
        plan(graph, uid, graph.get(uid).expect("there"), |_| state)
    }

    #[test]
    fn background() {
        let mut graph = Graph::default();
        graph.set(object("owner", None, json!({})));
        assert_eq!(graph.set(object("child", Some("owner"), json!({}))), ["child"]);
        assert_eq!(decide(&graph, "child", Owner::Solid), Plan::Keep);
        assert_eq!(graph.remove("owner"), ["child"]);
        assert_eq!(decide(&graph, "child", Owner::Dangling), Plan::Delete { policy: "Background" });
    }

    #[test]
    fn foreground_waits_for_those_who_block() {
        let mut graph = Graph::default();
        graph.set(object("owner", None, json!({})));
        graph.set(object("child", Some("owner"), json!({})));
        graph.set(object("grandchild", Some("child"), json!({})));
        let look = graph.set(object("owner", None, deleting(FOREGROUND)));
        assert_eq!(look, ["child", "owner"]);
        assert_eq!(decide(&graph, "owner", Owner::Solid), Plan::LookAtDependents(vec!["child".to_owned()]));
        assert_eq!(decide(&graph, "child", Owner::Waiting), Plan::DeleteForeground { unblock: false });
        assert_eq!(decide(&graph, "grandchild", Owner::Waiting), Plan::Delete { policy: "Background" });
        graph.remove("grandchild");
        assert_eq!(graph.remove("child"), ["owner"]);
        assert_eq!(decide(&graph, "owner", Owner::Solid), Plan::FinishForeground);
    }

    #[test]
    fn orphan_lets_go() {
        let mut graph = Graph::default();
        graph.set(object("child", Some("owner"), json!({})));
        graph.set(object("owner", None, deleting(ORPHAN)));
        assert_eq!(decide(&graph, "owner", Owner::Solid), Plan::Orphan);
    }

    #[test]
    fn one_owner_of_two_is_enough() {
        let mut graph = Graph::default();
        let mut both = object("child", Some("a"), json!({}));
        let mut second = both.meta.owner_references.clone().expect("owners")[0].clone();
        second.uid = "b".to_owned();
        both.meta.owner_references.as_mut().expect("owners").push(second);
        graph.set(both);
        let child = graph.get("child").expect("there");
        let decided = plan(&graph, "child", child, |owner| if owner.uid == "a" { Owner::Solid } else { Owner::Dangling });
        assert_eq!(decided, Plan::DropOwners(vec!["b".to_owned()]));
    }
}
