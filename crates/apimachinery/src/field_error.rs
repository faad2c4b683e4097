//! Errors of fields, rendered as upstream renders them. Source: k8s.io/apimachinery v0.37 `pkg/util/validation/field/errors.go`.

use std::fmt;

use serde_json::{Value, json};

use crate::formats::go_quote;

/// The class of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorType {
    /// `FieldValueNotFound`.
    NotFound,
    /// `FieldValueRequired`.
    Required,
    /// `FieldValueDuplicate`.
    Duplicate,
    /// `FieldValueInvalid`.
    Invalid,
    /// `FieldValueNotSupported`.
    NotSupported,
    /// `FieldValueForbidden`.
    Forbidden,
    /// `FieldValueTooLong`.
    TooLong,
    /// `FieldValueTooMany`.
    TooMany,
    /// `FieldValueTooFew`.
    TooFew,
    /// `FieldValueTypeInvalid`.
    TypeInvalid,
    /// `InternalError`.
    Internal,
}

impl ErrorType {
    /// The `reason` of a Status cause.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotFound => "FieldValueNotFound",
            Self::Required => "FieldValueRequired",
            Self::Duplicate => "FieldValueDuplicate",
            Self::Invalid => "FieldValueInvalid",
            Self::NotSupported => "FieldValueNotSupported",
            Self::Forbidden => "FieldValueForbidden",
            Self::TooLong => "FieldValueTooLong",
            Self::TooMany => "FieldValueTooMany",
            Self::TooFew => "FieldValueTooFew",
            Self::TypeInvalid => "FieldValueTypeInvalid",
            Self::Internal => "InternalError",
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::NotFound => "Not found",
            Self::Required => "Required value",
            Self::Duplicate => "Duplicate value",
            Self::Invalid | Self::TypeInvalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::Forbidden => "Forbidden",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
            Self::TooFew => "Too few",
            Self::Internal => "Internal error",
        }
    }
}

/// An error at a field.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    /// Class.
    pub kind: ErrorType,
    /// Path, as `spec.containers[0].name`.
    pub field: String,
    /// The offending value; shown by the classes that show it.
    pub bad_value: Value,
    /// What is wrong; may be empty.
    pub detail: String,
    /// JSON text shown in place of the value, where upstream shows a Go struct (its order is not that of a sorted map).
    pub shown: Option<String>,
}

impl FieldError {
    fn new(kind: ErrorType, field: impl fmt::Display, bad_value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self { kind, field: field.to_string(), bad_value: bad_value.into(), detail: detail.into(), shown: None }
    }

    /// A value that is not well-formed.
    pub fn invalid(field: impl fmt::Display, value: impl Into<Value>, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::Invalid, field, value, detail)
    }

    /// A value that must be there.
    pub fn required(field: impl fmt::Display, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::Required, field, "", detail)
    }

    /// A value that may not be there.
    pub fn forbidden(field: impl fmt::Display, detail: impl Into<String>) -> Self {
        Self::new(ErrorType::Forbidden, field, "", detail)
    }

    /// A value that was there already.
    pub fn duplicate(field: impl fmt::Display, value: impl Into<Value>) -> Self {
        Self::new(ErrorType::Duplicate, field, value, "")
    }

    /// A value that names nothing.
    pub fn not_found(field: impl fmt::Display, value: impl Into<Value>) -> Self {
        Self::new(ErrorType::NotFound, field, value, "")
    }

    /// A value outside of a closed list.
    pub fn not_supported(field: impl fmt::Display, value: impl Into<Value>, supported: &[&str]) -> Self {
        let quoted: Vec<String> = supported.iter().map(|value| go_quote(value)).collect();
        let detail = if quoted.is_empty() { String::new() } else { format!("supported values: {}", quoted.join(", ")) };
        Self::new(ErrorType::NotSupported, field, value, detail)
    }

    /// A text with too many bytes.
    pub fn too_long(field: impl fmt::Display, limit: usize) -> Self {
        let bytes = if limit == 1 { "byte" } else { "bytes" };
        Self::new(ErrorType::TooLong, field, "", format!("may not be more than {limit} {bytes}"))
    }

    /// A list with too many items.
    pub fn too_many(field: impl fmt::Display, actual: usize, limit: usize) -> Self {
        let items = if limit == 1 { "item" } else { "items" };
        Self::new(ErrorType::TooMany, field, actual, format!("must have at most {limit} {items}"))
    }

    /// The error with `json` in place of the value.
    pub fn showing(mut self, json: impl Into<String>) -> Self {
        self.shown = Some(json.into());
        self
    }

    /// Text without the field: a cause's `message`.
    pub fn body(&self) -> String {
        let mut text = self.kind.text().to_owned();
        if !matches!(self.kind, ErrorType::Required | ErrorType::Forbidden | ErrorType::TooLong | ErrorType::Internal) {
            let value = match (&self.shown, &self.bad_value) {
                (Some(shown), _) => shown.clone(),
                (None, Value::String(value)) => go_quote(value),
                (None, other) => other.to_string(),
            };
            text = format!("{text}: {value}");
        }
        if !self.detail.is_empty() {
            text = format!("{text}: {}", self.detail);
        }
        text
    }

    /// The cause of a Status.
    pub fn cause(&self) -> Value {
        json!({"reason": self.kind.reason(), "message": self.body(), "field": self.field})
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}: {}", self.field, self.body())
    }
}

/// The errors in one text, each once: the text itself, or `[a, b]`.
pub fn aggregate(errors: &[FieldError]) -> String {
    let mut texts: Vec<String> = Vec::new();
    for error in errors {
        let text = error.to_string();
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    if texts.len() == 1 { texts.remove(0) } else { format!("[{}]", texts.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_as_upstream() {
        let errors = [
            FieldError::required("metadata.name", "name or generateName is required"),
            FieldError::required("spec.containers", ""),
            FieldError::not_supported("spec.restartPolicy", "x", &["Always", "Never"]),
            FieldError::invalid("spec.priority", 5, "no"),
            FieldError::too_long("metadata.name", 63),
        ];
        assert_eq!(
            aggregate(&errors),
            "[metadata.name: Required value: name or generateName is required, spec.containers: Required value, spec.restartPolicy: \
             Unsupported value: \"x\": supported values: \"Always\", \"Never\", spec.priority: Invalid value: 5: no, metadata.name: Too \
             long: may not be more than 63 bytes]"
        );
    }
}
