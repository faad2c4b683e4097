//! Unknown fields of values that were not decoded from text (results of patches).

use serde_json::Value;

use crate::KindFacts;
use crate::codec::strict;

/// What strict validation objects to in `value`: `unknown field "spec.foo"`.
///
/// Duplicate fields are found while decoding ([`crate::codec::decode`]).
pub fn check(kind: &KindFacts, value: &Value) -> Vec<String> {
    strict::unknown_fields(kind.type_id, value)
}
