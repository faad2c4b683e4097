//! What every validation uses: paths, a list of errors, and access to fields.

use std::fmt;

use serde_json::Value;

use crate::field_error::FieldError;

/// `must be greater than or equal to 0`.
pub(super) const NEGATIVE: &str = "must be greater than or equal to 0";
/// `field is immutable`.
pub(super) const IMMUTABLE: &str = "field is immutable";

enum Step<'a> {
    Name(&'a str),
    Index(usize),
    Key(&'a str),
}

/// A field's path; built on the stack, made a text only for errors.
pub(super) struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    step: Step<'a>,
}

impl<'a> Path<'a> {
    pub(super) fn new(name: &'a str) -> Self {
        Self { parent: None, step: Step::Name(name) }
    }

    pub(super) fn child<'b>(&'b self, name: &'b str) -> Path<'b> {
        Path { parent: Some(self), step: Step::Name(name) }
    }

    pub(super) fn index<'b>(&'b self, index: usize) -> Path<'b> {
        Path { parent: Some(self), step: Step::Index(index) }
    }

    pub(super) fn key<'b>(&'b self, key: &'b str) -> Path<'b> {
        Path { parent: Some(self), step: Step::Key(key) }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(out)?;
        }
        match self.step {
            Step::Name(name) if self.parent.is_some() => write!(out, ".{name}"),
            Step::Name(name) => out.write_str(name),
            Step::Index(index) => write!(out, "[{index}]"),
            Step::Key(key) => write!(out, "[{key}]"),
        }
    }
}

/// The errors found so far.
#[derive(Default)]
pub(super) struct Errors(Vec<FieldError>);

impl Errors {
    pub(super) fn into_list(self) -> Vec<FieldError> {
        self.0
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn push(&mut self, error: FieldError) {
        self.0.push(error);
    }

    pub(super) fn invalid(&mut self, path: &Path<'_>, value: impl Into<Value>, detail: impl Into<String>) {
        self.push(FieldError::invalid(path, value, detail));
    }

    pub(super) fn required(&mut self, path: &Path<'_>, detail: &str) {
        self.push(FieldError::required(path, detail));
    }

    pub(super) fn forbidden(&mut self, path: &Path<'_>, detail: &str) {
        self.push(FieldError::forbidden(path, detail));
    }

    pub(super) fn duplicate(&mut self, path: &Path<'_>, value: impl Into<Value>) {
        self.push(FieldError::duplicate(path, value));
    }

    pub(super) fn not_supported(&mut self, path: &Path<'_>, value: impl Into<Value>, supported: &[&str]) {
        self.push(FieldError::not_supported(path, value, supported));
    }

    /// An `Invalid` for each text.
    pub(super) fn all_invalid(&mut self, path: &Path<'_>, value: &str, texts: Vec<String>) {
        for text in texts {
            self.invalid(path, value, text);
        }
    }

    /// A number that may not be negative.
    pub(super) fn nonnegative(&mut self, path: &Path<'_>, value: Option<i64>) {
        if let Some(value) = value.filter(|value| *value < 0) {
            self.invalid(path, value, NEGATIVE);
        }
    }

    /// A value of a closed list; an empty one is left out.
    pub(super) fn one_of(&mut self, path: &Path<'_>, value: &str, supported: &[&str]) {
        if !value.is_empty() && !supported.contains(&value) {
            self.not_supported(path, value, supported);
        }
    }
}

/// A field that is there and not null.
pub(super) fn get<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    value.get(key).filter(|value| !value.is_null())
}

/// A text; empty when absent.
pub(super) fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or("")
}

/// A number, if there is one.
pub(super) fn number(value: &Value, key: &str) -> Option<i64> {
    value.get(key).and_then(Value::as_i64)
}

/// A list; empty when absent.
pub(super) fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The pairs of a map of texts, by key.
pub(super) fn pairs<'a>(value: &'a Value, key: &str) -> Vec<(&'a str, &'a str)> {
    let map = value.get(key).and_then(Value::as_object).into_iter().flatten();
    let mut pairs: Vec<(&str, &str)> = map.map(|(key, value)| (key.as_str(), value.as_str().unwrap_or(""))).collect();
    pairs.sort_unstable();
    pairs
}

/// Whether a boolean is true.
pub(super) fn flag(value: &Value, key: &str) -> bool {
    value.get(key) == Some(&Value::Bool(true))
}

impl Errors {
    /// Shows `json` in place of the last error's value.
    pub(super) fn show_last(&mut self, json: &str) {
        if let Some(error) = self.0.pop() {
            self.0.push(error.showing(json));
        }
    }
}

impl Errors {
    /// Gives the last error a detail.
    pub(super) fn explain_last(&mut self, detail: &str) {
        if let Some(error) = self.0.last_mut() {
            detail.clone_into(&mut error.detail);
        }
    }
}
