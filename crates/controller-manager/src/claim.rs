//! Adoption and release: which objects a controller manages (`pkg/controller/controller_ref_manager.go`, 1.37).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::api::{Patch, PatchParams};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

use crate::objects::{controller_of, controller_ref, selects};

/// What to do about one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// It is ours.
    Keep,
    /// It is nobody's and matches: make it ours.
    Adopt,
    /// It is ours and matches no more: let it go.
    Release,
    /// It is none of our business.
    Ignore,
}

/// Decides about one object.
pub fn claim(owner: &ObjectMeta, selector: &LabelSelector, object: &ObjectMeta) -> Claim {
    let matches = selects(selector, object.labels.as_ref());
    match controller_of(object) {
        Some(reference) if Some(&reference.uid) != owner.uid.as_ref() => Claim::Ignore,
        Some(_) if matches => Claim::Keep,
        Some(_) if owner.deletion_timestamp.is_some() => Claim::Ignore,
        Some(_) => Claim::Release,
        None if !matches || owner.deletion_timestamp.is_some() || object.deletion_timestamp.is_some() => Claim::Ignore,
        None => Claim::Adopt,
    }
}

/// Carries a claim out; true if the object is ours afterwards. An object that is gone or changed is not.
///
/// # Errors
/// Whatever the server answers but NotFound and Invalid.
pub async fn carry_out<O, K>(api: &Api<K>, owner: &O, object: &K, claim: Claim) -> Result<bool, kube::Error>
where
    O: Resource<DynamicType = ()>,
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug,
{
    let meta = object.meta();
    let (name, uid) = (meta.name.as_deref().unwrap_or_default(), meta.uid.as_deref().unwrap_or_default());
    let patch = match claim {
        Claim::Keep => return Ok(true),
        Claim::Ignore => return Ok(false),
        Claim::Adopt => serde_json::json!({"metadata": {"uid": uid, "ownerReferences": [controller_ref(owner)]}}),
        Claim::Release => serde_json::json!({"metadata": {"uid": uid, "ownerReferences": [
            {"$patch": "delete", "uid": owner.meta().uid},
        ]}}),
    };
    match api.patch(name, &PatchParams::default(), &Patch::Strategic(patch)).await {
        Ok(_) => Ok(claim == Claim::Adopt),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 422) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::apps::v1::ReplicaSet;

    fn meta(json: serde_json::Value) -> ObjectMeta {
        serde_json::from_value(json).expect("metadata")
    }

    #[test]
    fn the_table() {
        let owner = meta(serde_json::json!({"name": "a", "uid": "1"}));
        let leaving = meta(serde_json::json!({"name": "a", "uid": "1", "deletionTimestamp": "2026-01-01T00:00:00Z"}));
        let selector: LabelSelector = serde_json::from_value(serde_json::json!({"matchLabels": {"x": "y"}})).expect("selector");
        let owned_by = |uid: &str, label: &str| {
            meta(serde_json::json!({"labels": {"x": label}, "ownerReferences": [
                {"apiVersion": "v1", "kind": "X", "name": "n", "uid": uid, "controller": true}]}))
        };
        let free = |label: &str| meta(serde_json::json!({"labels": {"x": label}}));
        for (owner, object, wanted) in [
            (&owner, owned_by("1", "y"), Claim::Keep),
            (&owner, owned_by("1", "z"), Claim::Release),
            (&owner, owned_by("2", "y"), Claim::Ignore),
            (&owner, free("y"), Claim::Adopt),
            (&owner, free("z"), Claim::Ignore),
            (&leaving, free("y"), Claim::Ignore),
            (&leaving, owned_by("1", "z"), Claim::Ignore),
        ] {
            assert_eq!(claim(owner, &selector, &object), wanted, "{object:?}");
        }
        let rs = ReplicaSet { metadata: owner, ..ReplicaSet::default() };
        assert_eq!(controller_ref(&rs).kind, "ReplicaSet");
    }
}
