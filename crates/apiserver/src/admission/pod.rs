//! The small mutations: `DefaultTolerationSeconds` and `TaintNodesByCondition`
//! (upstream: `plugin/pkg/admission/{defaulttolerationseconds,nodetaint}`).

use serde_json::{Value, json};

use crate::lookup::{items, text};

/// How long a pod stays on a node that is not ready or not reachable, in seconds.
const TOLERATION_SECONDS: i64 = 300;
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";

pub(super) fn default_tolerations(pod: &mut Value) {
    for key in [NOT_READY, UNREACHABLE] {
        let tolerates = |toleration: &Value| {
            let (own, effect) = (text(toleration, "/key"), text(toleration, "/effect"));
            (own == key || own.is_empty()) && (effect == "NoExecute" || effect.is_empty())
        };
        if items(pod, "/spec/tolerations").iter().any(tolerates) {
            continue;
        }
        let toleration = json!({ "key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": TOLERATION_SECONDS });
        append(pod, "tolerations", toleration);
    }
}

/// A node that registers is not ready until the node lifecycle controller has seen it.
pub(super) fn taint_new_node(node: &mut Value) {
    let tainted = |taint: &Value| text(taint, "/key") == NOT_READY && text(taint, "/effect") == "NoSchedule";
    if !items(node, "/spec/taints").iter().any(tainted) {
        append(node, "taints", json!({ "key": NOT_READY, "effect": "NoSchedule" }));
    }
}

fn append(object: &mut Value, list: &str, item: Value) {
    match object["spec"][list].as_array_mut() {
        Some(present) => present.push(item),
        None => object["spec"][list] = json!([item]),
    }
}
