//! Conversion between versions of one kind: `Event` of core/v1 and of events.k8s.io/v1, which are stored as core/v1.
//!
//! Source: kubernetes v1.37 `pkg/apis/events/v1/conversion.go`.

use serde_json::{Map, Value, json};

use crate::kinds::Gvk;
use crate::normalize;
use crate::schema::schema;

/// Names in core/v1 and in events.k8s.io/v1 of what differs.
const NAMES: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

/// Whether an object of `from` can be converted to `to`.
pub fn can_convert(from: &Gvk, to: &Gvk) -> bool {
    from == to || (is_event(from) && is_event(to))
}

fn is_event(gvk: &Gvk) -> bool {
    gvk.kind == "Event" && gvk.version == "v1" && matches!(gvk.group.as_str(), "" | "events.k8s.io")
}

/// Converts an object to another group and version of its kind, in place. Does nothing when it is of that kind already.
pub fn convert(object: &mut Value, to: &Gvk) {
    let Some(from) = Gvk::of(object) else { return };
    if from == *to || !can_convert(&from, to) {
        return;
    }
    let to_core = to.group.is_empty();
    let Value::Object(map) = object else { return };
    let renamed: Map<String, Value> = std::mem::take(map)
        .into_iter()
        .map(|(key, value)| {
            let pair = NAMES.iter().find(|(core, events)| key == if to_core { *events } else { *core });
            let key = pair.map_or(key, |(core, events)| (if to_core { *core } else { *events }).to_owned());
            (key, value)
        })
        .collect();
    *map = renamed;
    map.insert("apiVersion".to_owned(), to.api_version().into());
    // What one version always writes, the other leaves out when it is empty.
    let id = schema().by_kind(&to.group, &to.version, &to.kind);
    if let Some(id) = id {
        let found = schema().get(id);
        map.retain(|key, value| {
            let empty = value.is_null() || value.as_str() == Some("") || *value == json!(0);
            !(empty && found.field(key).is_some_and(|field| field.omit_empty))
        });
        normalize::fill(id, object);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let (core, events) = (Gvk::new("v1", "Event"), Gvk::new("events.k8s.io/v1", "Event"));
        let mut event = json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": "e"}, "involvedObject": {"name": "p"}, "message": "m",
            "source": {"component": "k"}, "count": 2, "reason": "r", "type": "Normal"});
        normalize::normalize(schema().by_kind("", "v1", "Event").expect("a kind"), &mut event).expect("fits");
        let before = event.clone();
        convert(&mut event, &events);
        assert_eq!(event["regarding"]["name"], "p");
        assert_eq!(event["note"], "m");
        assert_eq!(event["deprecatedCount"], 2);
        assert_eq!(event["apiVersion"], "events.k8s.io/v1");
        let mut fitted = event.clone();
        normalize::normalize(schema().by_kind("events.k8s.io", "v1", "Event").expect("a kind"), &mut fitted).expect("fits");
        assert_eq!(fitted, event);
        convert(&mut event, &core);
        assert_eq!(event, before);
    }
}
