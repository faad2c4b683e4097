//! `meta.k8s.io/v1` Tables: what `kubectl get` shows.

use apimachinery::status::Status;
use apimachinery::tree::Tree;
use apimachinery::{KindFacts, table};
use serde_json::Value;

use crate::reply::{put, put_partial};

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

/// Appends a Table up to its rows. `header`: whether the column definitions are in it (only in the first event of a watch).
pub fn put_head(out: &mut Vec<u8>, facts: &KindFacts, metadata: &Value, header: bool) {
    let columns = if header { Value::Array(table::columns(facts)) } else { Value::Null };
    let head = format!(
        "{{\"kind\":\"Table\",\"apiVersion\":\"meta.k8s.io/v1\",\"metadata\":{metadata},\"columnDefinitions\":{columns},\"rows\":["
    );
    out.extend_from_slice(head.as_bytes());
}

/// Appends the row of an object.
pub fn put_row(out: &mut Vec<u8>, facts: &KindFacts, object: &Tree<'_>, now: jiff::Timestamp, include: Include) -> Result<(), Status> {
    put(out, &table::row(facts, object, now))?;
    // Inside the row's braces.
    out.pop();
    out.extend_from_slice(b",\"object\":");
    match include {
        Include::None => out.extend_from_slice(b"null"),
        Include::Metadata => put_partial(out, object)?,
        Include::Object => put(out, object)?,
    }
    out.push(b'}');
    Ok(())
}
