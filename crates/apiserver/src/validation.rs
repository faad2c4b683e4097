//! Temporary seam for `apimachinery::validation`.
use apimachinery::KindFacts;
use apimachinery::field_error::FieldError;
use serde_json::Value;
pub fn create(_: &KindFacts, _: &Value) -> Vec<FieldError> {
    Vec::new()
}
pub fn update(_: &KindFacts, _: &Value, _: &Value) -> Vec<FieldError> {
    Vec::new()
}
