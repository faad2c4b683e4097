//! `Priority`: a pod's priority is that of its class (upstream: `plugin/pkg/admission/priority`).

use apimachinery::status::Status;
use serde_json::{Value, json};

use super::{Operation, Request};
use crate::lookup::text;

pub(super) fn admit(request: &Request, pod: &mut Value) -> Result<(), Status> {
    if request.operation == Operation::Update {
        for field in ["priority", "preemptionPolicy"] {
            let old = request.old.and_then(|old| old["spec"].get(field));
            if let Some(old) = old.filter(|_| pod["spec"].get(field).is_none_or(Value::is_null)) {
                pod["spec"][field] = old.clone();
            }
        }
        return Ok(());
    }
    let asked = text(pod, "/spec/priorityClassName").to_owned();
    let class = if asked.is_empty() {
        default_class(request)
    } else {
        let class = request.lookup.get("priorityclasses", "", &asked);
        Some(class.ok_or_else(|| request.forbidden(&format!("no PriorityClass with name {asked} was found")))?)
    };
    let (name, priority, policy) = match &class {
        Some(class) => {
            let policy = text(class, "/preemptionPolicy");
            let policy = if policy.is_empty() { "PreemptLowerPriority" } else { policy };
            (text(class, "/metadata/name"), class["value"].as_i64().unwrap_or(0), policy)
        }
        None => ("", 0, "PreemptLowerPriority"),
    };
    if let Some(given) = pod["spec"].get("priority").and_then(Value::as_i64).filter(|given| *given != priority) {
        return Err(request.forbidden(&format!(
            "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller computed {priority} from the given PriorityClass name"
        )));
    }
    let given = text(pod, "/spec/preemptionPolicy");
    if !given.is_empty() && given != policy {
        return Err(request.forbidden(&format!(
            "the string value of PreemptionPolicy ({given}) must not be provided in pod spec; priority admission controller computed {policy} from the given PriorityClass name"
        )));
    }
    if !name.is_empty() {
        pod["spec"]["priorityClassName"] = json!(name);
    }
    pod["spec"]["priority"] = json!(priority);
    pod["spec"]["preemptionPolicy"] = json!(policy);
    Ok(())
}

/// The global default; of several the lowest (upstream: `getDefaultPriorityClass`).
fn default_class(request: &Request) -> Option<std::sync::Arc<Value>> {
    let classes = request.lookup.list("priorityclasses", None);
    classes.into_iter().filter(|class| class["globalDefault"] == json!(true)).min_by_key(|class| class["value"].as_i64().unwrap_or(0))
}

pub(super) fn validate_class(request: &Request, class: &Value) -> Result<(), Status> {
    if class["globalDefault"] != json!(true) {
        return Ok(());
    }
    let name = text(class, "/metadata/name");
    let other = default_class(request).filter(|other| text(other, "/metadata/name") != name);
    match other {
        Some(other) => Err(request.forbidden(&format!(
            "PriorityClass {} is already marked as default. Only one default can exist",
            text(&other, "/metadata/name")
        ))),
        None => Ok(()),
    }
}
