//! `meta.k8s.io/v1` Tables: what `kubectl get` shows.

use apimachinery::status::Status;
use apimachinery::{KindFacts, table};
use serde_json::{Value, json};

use crate::reply::partial;

/// What a row carries of its object (`includeObject`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Include {
    /// Nothing.
    None,
    /// Its metadata.
    #[default]
    Metadata,
    /// All of it.
    Object,
}

impl Include {
    /// From the query parameter.
    ///
    /// # Errors
    /// 400 for another value.
    pub fn parse(text: Option<&str>) -> Result<Self, Status> {
        match text {
            Some("None") => Ok(Self::None),
            Some("Object") => Ok(Self::Object),
            None | Some("Metadata") => Ok(Self::Metadata),
            Some(other) => Err(Status::bad_request(format!(
                "Unable to convert to Table as requested: includeObject: Invalid value: \"{other}\": must be 'Metadata', 'Object', 'None', or empty"
            ))),
        }
    }
}

/// A Table of objects. `header`: whether the column definitions are in it (only in the first event of a watch).
pub fn table(facts: &'static KindFacts, objects: &[Value], metadata: Value, include: Include, header: bool) -> Value {
    let now = jiff::Timestamp::now();
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut row = table::row(facts, object, now);
            match include {
                Include::None => row["object"] = Value::Null,
                Include::Metadata => row["object"] = partial(object),
                Include::Object => row["object"] = object.clone(),
            }
            row
        })
        .collect();
    let columns = header.then(|| table::columns(facts));
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "columnDefinitions": columns, "rows": rows})
}
