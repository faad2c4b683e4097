//! The strategic merge patch from the status that the server has to the one that is wanted.

use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Map, Value, json};

/// The patch body, with the pod's uid as the precondition; `None` when nothing differs.
///
/// Conditions are merged by type, podIPs by address (a removed one makes the list replaced), all other lists
/// are atomic and sent whole (schema of core/v1 PodStatus, v1.37).
pub fn patch(uid: &str, old: &PodStatus, new: &PodStatus) -> Option<Value> {
    let (old, new) = (fields(old), fields(new));
    let mut changed = Map::new();
    for (key, value) in &new {
        let before = old.get(key).unwrap_or(&Value::Null);
        if before == value {
            continue;
        }
        let value = match key.as_str() {
            "conditions" => match changed_conditions(before, value) {
                Some(conditions) => conditions,
                None => continue,
            },
            "podIPs" | "hostIPs" => replaced_list(key, before, value),
            _ => value.clone(),
        };
        if key == "conditions" {
            changed.insert("$setElementOrder/conditions".to_owned(), condition_order(&new));
        }
        changed.insert(key.clone(), value);
    }
    for key in old.keys().filter(|k| !new.contains_key(*k)) {
        if kept_when_absent(key) {
            continue;
        }
        changed.insert(key.clone(), Value::Null);
    }
    if changed.is_empty() {
        return None;
    }
    Some(json!({"metadata": {"uid": uid}, "status": changed}))
}

/// The directive that orders the merged conditions.
fn condition_order(status: &Map<String, Value>) -> Value {
    let conditions = status.get("conditions").and_then(Value::as_array);
    let types = conditions.into_iter().flatten().map(|c| json!({"type": c["type"]}));
    Value::Array(types.collect())
}

/// Fields that others write.
fn kept_when_absent(key: &str) -> bool {
    matches!(
        key,
        "resourceClaimStatuses"
            | "extendedResourceClaimStatus"
            | "nodeAllocatableResourceClaimStatuses"
            | "nominatedNodeName"
            | "resize"
            | "volumeHealth"
    )
}

fn fields(status: &PodStatus) -> Map<String, Value> {
    match serde_json::to_value(status) {
        Ok(Value::Object(map)) => map,
        // A PodStatus always serializes to an object.
        _ => Map::new(),
    }
}

fn changed_conditions(before: &Value, after: &Value) -> Option<Value> {
    let before = before.as_array().map_or(&[][..], Vec::as_slice);
    let after = after.as_array().map_or(&[][..], Vec::as_slice);
    let changed: Vec<Value> = after
        .iter()
        .filter(|c| !before.contains(c))
        .map(|condition| {
            let mut condition = condition.clone();
            let old = before.iter().find(|c| c["type"] == condition["type"]);
            for key in ["reason", "message"] {
                if old.is_some_and(|o| o.get(key).is_some()) && condition.get(key).is_none() {
                    condition[key] = Value::Null;
                }
            }
            condition
        })
        .collect();
    if changed.is_empty() {
        return None;
    }
    Some(Value::Array(changed))
}

/// A list whose entries merge by address: replaced as a whole when an entry goes.
fn replaced_list(key: &str, before: &Value, after: &Value) -> Value {
    let before = before.as_array().map_or(&[][..], Vec::as_slice);
    let after = after.as_array().map_or(&[][..], Vec::as_slice);
    let lost = before.iter().any(|ip| !after.contains(ip));
    let mut list = after.to_vec();
    if key == "podIPs" && lost {
        list.insert(0, json!({"$patch": "replace"}));
    }
    Value::Array(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(value: Value) -> PodStatus {
        serde_json::from_value(value).expect("a literal status")
    }

    #[test]
    fn only_what_differs_is_sent() {
        let old = json!({
            "phase": "Pending", "reason": "R", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}], "nominatedNodeName": "n",
            "conditions": [{"type": "Ready", "status": "False", "reason": "X"}, {"type": "Mine", "status": "True"}],
        });
        let new = json!({
            "phase": "Running", "podIP": "10.0.0.2", "podIPs": [{"ip": "10.0.0.2"}],
            "conditions": [{"type": "Mine", "status": "True"}, {"type": "Ready", "status": "True"}],
        });
        let (old, new) = (status(old), status(new));
        assert_eq!(patch("u", &new, &new), None);
        let got = patch("u", &old, &new).expect("a patch");
        assert_eq!(got["metadata"], json!({"uid": "u"}));
        let expected = json!({
            "phase": "Running", "reason": null, "podIP": "10.0.0.2", "podIPs": [{"$patch": "replace"}, {"ip": "10.0.0.2"}],
            "conditions": [{"type": "Ready", "status": "True", "reason": null}],
            "$setElementOrder/conditions": [{"type": "Mine"}, {"type": "Ready"}],
        });
        assert_eq!(got["status"], expected, "what others write (nominatedNodeName) stays");
    }
}
