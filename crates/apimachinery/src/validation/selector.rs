//! Label selectors. Source: k8s.io/apimachinery v0.37 `pkg/apis/meta/v1/validation/validation.go`.

use serde_json::Value;

use super::meta;
use super::support::{Errors, Path, list, text};
use crate::formats;

/// Checks a LabelSelector object.
pub(super) fn label_selector(errors: &mut Errors, selector: &Value, path: &Path<'_>) {
    meta::labels(errors, selector, "matchLabels", &path.child("matchLabels"));
    let expressions = path.child("matchExpressions");
    for (index, expression) in list(selector, "matchExpressions").iter().enumerate() {
        let path = &expressions.index(index);
        let values = list(expression, "values");
        match text(expression, "operator") {
            "In" | "NotIn" if values.is_empty() => {
                errors.required(&path.child("values"), "must be specified when `operator` is 'In' or 'NotIn'");
            }
            "In" | "NotIn" => {}
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                errors.forbidden(&path.child("values"), "may not be specified when `operator` is 'Exists' or 'DoesNotExist'");
            }
            "Exists" | "DoesNotExist" => {}
            other => errors.invalid(&path.child("operator"), other, "not a valid selector operator"),
        }
        let key = text(expression, "key");
        errors.all_invalid(&path.child("key"), key, formats::label_key(key));
        for (index, value) in values.iter().enumerate() {
            let value = value.as_str().unwrap_or("");
            errors.all_invalid(&path.child("values").index(index), value, formats::label_value(value));
        }
    }
}

/// Whether the selector can be turned into requirements at all.
pub(super) fn is_usable(selector: &Value) -> bool {
    let pairs = super::support::pairs(selector, "matchLabels");
    let labels = pairs.iter().all(|(key, value)| formats::label_key(key).is_empty() && formats::label_value(value).is_empty());
    labels
        && list(selector, "matchExpressions").iter().all(|expression| {
            let values = list(expression, "values");
            let operator = match text(expression, "operator") {
                "In" | "NotIn" => !values.is_empty(),
                "Exists" | "DoesNotExist" => values.is_empty(),
                _ => false,
            };
            operator
                && formats::label_key(text(expression, "key")).is_empty()
                && values.iter().all(|value| formats::label_value(value.as_str().unwrap_or("")).is_empty())
        })
}
