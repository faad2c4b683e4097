//! What the system does with each field of Pod, Deployment and Node: carried out, refused, or warned of.
//!
//! The table is `data/fields.toml`, a row for each field of each type that these kinds reach; a field without a row fails a test here. The
//! server refuses or warns by [`check`] on what a client sends, before admission adds to it, so that no field is ignored in silence.

use std::collections::HashMap;
use std::sync::OnceLock;

use serde::Deserialize;
use serde_json::Value;

use crate::KindFacts;
use crate::field_error::FieldError;
use crate::schema::{Container, Field, Item, Type, TypeId, schema};

static TABLE: &str = include_str!("../data/fields.toml");

/// A row of the table.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Row {
    /// `done: WHERE, test NAME`: carried out there, and the test shows it (`cargo xtask tidy` looks for both).
    Done(String),
    /// A 422 when the field is set.
    Refused {
        /// Why, for the client.
        refused: String,
        /// Values that are taken all the same.
        #[serde(default)]
        unless: Vec<Value>,
    },
    /// A warning when the field is set.
    Warned {
        /// What happens instead, for the client.
        warned: String,
        /// Values that need no warning.
        #[serde(default)]
        unless: Vec<Value>,
    },
}

/// The whole table: rows by type and field. `*` stands for all fields of a type.
pub fn table() -> Result<HashMap<String, HashMap<String, Row>>, toml::de::Error> {
    toml::from_str(TABLE)
}

/// The rows that say no or beware, by type and field.
fn rows() -> &'static HashMap<&'static str, HashMap<String, Row>> {
    static ROWS: OnceLock<HashMap<&'static str, HashMap<String, Row>>> = OnceLock::new();
    ROWS.get_or_init(|| {
        let table = table().expect("data/fields.toml is parsed by a test");
        let kept = schema().iter().filter_map(|(_, found)| {
            let mut rows = table.get(found.name)?.clone();
            rows.retain(|_, row| !matches!(row, Row::Done(_)));
            (!rows.is_empty()).then_some((found.name, rows))
        });
        kept.collect()
    })
}

/// Refusals (causes of a 422) and warnings for an object's fields.
pub fn check(kind: &KindFacts, object: &Value) -> (Vec<FieldError>, Vec<String>) {
    let mut walk = Walk::default();
    walk.object(kind.type_id, object);
    (walk.refused, walk.warnings)
}

/// [`check`] of an update: what the old object has already (from another server) is not refused.
pub fn check_update(kind: &KindFacts, object: &Value, old: &Value) -> (Vec<FieldError>, Vec<String>) {
    let (mut refused, mut warnings) = check(kind, object);
    if !refused.is_empty() || !warnings.is_empty() {
        let (known, warned) = check(kind, old);
        refused.retain(|error| !known.contains(error));
        warnings.retain(|warning| !warned.contains(warning));
    }
    (refused, warnings)
}

#[derive(Default)]
struct Walk {
    path: Vec<String>,
    refused: Vec<FieldError>,
    warnings: Vec<String>,
}

/// Whether a value counts as set: upstream's zero values do not.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(set) => *set,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(_) | Value::Number(_) => true,
    }
}

impl Walk {
    fn path(&self) -> String {
        let mut path = String::new();
        for step in &self.path {
            if !path.is_empty() && !step.starts_with('[') {
                path.push('.');
            }
            path.push_str(step);
        }
        path
    }

    fn object(&mut self, id: TypeId, value: &Value) {
        let found = schema().get(id);
        let Value::Object(map) = value else { return };
        for (key, value) in map {
            let Some(field) = found.field(key) else { continue };
            self.path.push(key.clone());
            if self.judge(found, field, value)
                && let Item::Type(inner) = field.item
            {
                self.values(field, inner, value);
            }
            self.path.pop();
        }
    }

    fn values(&mut self, field: &Field, inner: TypeId, value: &Value) {
        match (field.container, value) {
            (Container::Single, value) => self.object(inner, value),
            (Container::List, Value::Array(items)) => {
                for (index, item) in items.iter().enumerate() {
                    self.path.push(format!("[{index}]"));
                    self.object(inner, item);
                    self.path.pop();
                }
            }
            (Container::Map, Value::Object(items)) => {
                for (key, item) in items {
                    self.path.push(format!("[{key}]"));
                    self.object(inner, item);
                    self.path.pop();
                }
            }
            _ => {}
        }
    }

    /// Judges a field; false when what is below needs no look.
    fn judge(&mut self, found: &Type, field: &Field, value: &Value) -> bool {
        let row = rows().get(found.name).and_then(|rows| rows.get(field.name));
        match row {
            Some(Row::Refused { refused, unless }) if applies(value, unless) => {
                self.refused.push(FieldError::forbidden(self.path(), format!("{refused} by this server")));
                false
            }
            Some(Row::Warned { warned, unless }) if applies(value, unless) => {
                self.warnings.push(format!("{}: {warned}", self.path()));
                false
            }
            _ => true,
        }
    }
}

/// A row with exceptions looks at the value itself (false may be what is refused), one without at whether it is set.
fn applies(value: &Value, unless: &[Value]) -> bool {
    if unless.is_empty() { is_set(value) } else { !value.is_null() && !unless.contains(value) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::kinds;
    use serde_json::json;

    #[test]
    fn every_field_has_a_row_and_every_row_a_field() {
        let table = table().expect("TOML");
        let mut queue: Vec<TypeId> = [("", "Pod"), ("apps", "Deployment"), ("", "Node")]
            .map(|(group, kind)| schema().by_kind(group, "v1", kind).expect("a kind"))
            .into();
        let mut seen: HashSet<&str> = HashSet::new();
        let mut missing = Vec::new();
        let mut fields = 0;
        while let Some(id) = queue.pop() {
            let found = schema().get(id);
            if !seen.insert(found.name) {
                continue;
            }
            let rows = table.get(found.name);
            for field in &found.fields {
                fields += 1;
                if !rows.is_some_and(|rows| rows.contains_key(field.name) || rows.contains_key("*")) {
                    missing.push(format!("{}.{}", found.name, field.name));
                }
                queue.extend(match field.item {
                    Item::Type(id) => Some(id),
                    _ => None,
                });
            }
            for name in rows.into_iter().flat_map(HashMap::keys) {
                assert!(name == "*" || found.field(name).is_some(), "{} has no field {name}", found.name);
            }
        }
        assert!(missing.is_empty(), "fields without a row in data/fields.toml: {missing:?}");
        assert!(fields > 700);
        assert!(table.keys().all(|name| seen.contains(name.as_str())), "rows for types that are not reached");
        let texts = table.values().flat_map(HashMap::values);
        assert!(texts.into_iter().all(|row| !matches!(row, Row::Done(text) if !text.starts_with("done: "))));
    }

    #[test]
    fn refusals_and_warnings() {
        let deployment = kinds::by_kind("apps", "v1", "Deployment").expect("served");
        let object = json!({"spec": {"template": {"spec": {"hostUsers": false, "priorityClassName": "high", "schedulingGates": [],
            "containers": [{"name": "c", "volumeMounts": [{"name": "v", "recursiveReadOnly": "Enabled"}],
                "livenessProbe": {"grpc": {"port": 1, "mode": "TLS"}}}],
            "volumes": [{"name": "v", "nfs": {"server": "s"}}, {"name": "w", "emptyDir": {"medium": "Memory"}}]}}}});
        let (refused, warnings) = check(deployment, &object);
        let refused: Vec<String> = refused.iter().map(ToString::to_string).collect();
        assert_eq!(
            refused,
            [
                "spec.template.spec.containers[0].livenessProbe.grpc.mode: Forbidden: gRPC probes over TLS are not carried out by this server",
                "spec.template.spec.containers[0].volumeMounts[0].recursiveReadOnly: Forbidden: recursive read-only mounts are not carried \
                 out by this server",
                "spec.template.spec.hostUsers: Forbidden: user namespaces of pods are not carried out by this server",
                "spec.template.spec.volumes[0].nfs: Forbidden: volumes of this kind are not carried out by this server",
            ]
        );
        assert_eq!(warnings, ["spec.template.spec.priorityClassName: pods wait in order of priority, but none is preempted"]);
    }

    #[test]
    fn plain_objects_pass() {
        let pod = kinds::by_kind("", "v1", "Pod").expect("served");
        let mut object =
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
        crate::normalize::normalize(pod.type_id, &mut object).expect("fits");
        crate::defaulting::default(pod, &mut object);
        assert_eq!(check(pod, &object), (Vec::new(), Vec::new()));
    }
}
